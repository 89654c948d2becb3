// Column sums of the attention matrix with wgmma. A block keeps kKeys keys of one KV head in shared
// memory; the queries of the group pass in tiles of kColumnSumRows rows, and a product is keys x
// queries, so that a key's weights lie side by side in a thread's registers and their sum needs no
// other thread until the tile is done. Exponentials take longest; four warpgroups, each with 64 of
// the keys, make them while the others multiply. There is one block for each multiprocessor, and
// they share all tiles evenly: while a block passes over its last tiles of some keys, the next keys
// come. The sum of each tile goes to the workspace, from where a second kernel adds it to the
// score, tile by tile in order; no atomics, so no two runs differ.
#include <algorithm>

#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kBoxRows = 16;  // keys of a copy: a page, or a part of one
constexpr int kQueryPanelBytes = kColumnSumRows * kPanelRowBytes;
[[maybe_unused]] constexpr int kNowhere = 1 << 30;  // a coordinate outside every tensor
constexpr int kKeyStages = 2;
constexpr int kStages = 3;  // tiles of queries in shared memory
constexpr int kFoldThreads = 128;

struct ColumnSumMaps {
  CUtensorMap query;  // boxes of kColumnSumRows rows
  CUtensorMap key;    // boxes of kBoxRows rows
};

// Tiles [first_tile, end_tile) of rows; the sums of tile t lie at sums[(t - first_tile) * heads +
// h], one for each column. Where tiles are few, each query head's stand apart, so that blocks can
// share them evenly.
struct ColumnSumPart {
  float* sums;  // [tiles, heads, columns]
  int32_t first_tile;
  int32_t end_tile;
  int32_t key_blocks;
  int64_t head_tiles;  // of all key blocks of a KV head
  bool by_query_head;  // heads: Hq, not Hk

  // Tiles of a block of keys, of kKeys: [FirstOf, end_tile), which may be none.
  template <int kKeys>
  __host__ __device__ __forceinline__ int FirstOf(const ColumnSumArgs& args, int block) const {
    const int first = FirstTile(args, args.keys.first_token + block * kKeys);
    const int from = first > first_tile ? first : first_tile;
    return from < end_tile ? from : end_tile;
  }
};

// A block's share of all tiles, which stand in the order of their KV heads, blocks of keys and
// rows; each passes once for every query head of the group. Tiles of one block of keys are a run.
template <int kKeys>
class ColumnSumRuns {
 public:
  int kv_head;
  int block;   // of keys
  int tile;    // of the run's first pass
  int q;       // of the group, likewise
  int passes;  // of the run

  // REQUIRES: there is a share for every block of the grid.
  __device__ __forceinline__ ColumnSumRuns(const ColumnSumArgs& args, const ColumnSumPart& part)
      : args_(args), part_(part), group_(args.query_heads / args.kv_heads) {
    const int together = part.by_query_head ? 1 : group_;  // passes that are not shared
    const int64_t head_passes = part.head_tiles * group_;
    const int64_t shares = head_passes / together * args.kv_heads;
    const int64_t begin = shares * blockIdx.x / gridDim.x * together;
    left_ = static_cast<int>(shares * (blockIdx.x + 1) / gridDim.x * together - begin);
    kv_head = static_cast<int>(begin / head_passes);
    auto passed = static_cast<int>(begin % head_passes / group_);  // tiles
    for (block = 0;; ++block) {
      const int tiles = part.end_tile - First();
      if (passed < tiles) break;
      passed -= tiles;
    }
    Take(First() + passed, static_cast<int>(begin % group_));
  }
  // False if there is none.
  __device__ __forceinline__ bool Next() {
    if (left_ == 0) return false;
    do {
      if (++block == part_.key_blocks) {
        block = 0;
        ++kv_head;
      }
    } while (First() >= part_.end_tile);
    Take(First(), 0);
    return true;
  }
  // Calls body(tile, q) for each pass of the run.
  template <typename Body>
  __device__ __forceinline__ void ForEach(const Body& body) const {
    int at_tile = tile;
    int at_q = q;
    for (int pass = 0; pass < passes; ++pass) {
      body(at_tile, at_q);
      if (++at_q < group_) continue;
      at_q = 0;
      ++at_tile;
    }
  }

 private:
  __device__ __forceinline__ int First() const { return part_.FirstOf<kKeys>(args_, block); }
  __device__ __forceinline__ void Take(int first_tile, int first_q) {
    tile = first_tile;
    q = first_q;
    passes = min(left_, (part_.end_tile - tile) * group_ - q);
    left_ -= passes;
  }

  const ColumnSumArgs& args_;
  const ColumnSumPart& part_;
  const int group_;
  int left_;  // passes behind the run
};

constexpr int kConsumers = 4;  // warpgroups
constexpr int kGroupKeys = 64;
constexpr int kKeys = kConsumers * kGroupKeys;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;

template <int D>
struct ColumnSumShared {
  alignas(1024) unsigned char key[kKeyStages][D / kPanelColumns][kKeyPanelBytes];
  alignas(1024) unsigned char query[kStages][D / kPanelColumns][kQueryPanelBytes];
  float offset[kStages][kColumnSumRows];  // minus the log-sum-exp, in units of log 2
  uint64_t key_full[kKeyStages];
  uint64_t key_empty[kKeyStages];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

// One warpgroup: the sums of its keys.
template <int D>
struct ColumnSumConsumer {
  static constexpr int kScores = kColumnSumRows / 2;  // registers

  ColumnSumShared<D>& shared;
  int group;
  int lane;
  float scale;
  float score[kScores];

  __device__ __forceinline__ void Multiply(int key_stage, int stage) {
    const uint64_t key =
        RowOperand(SharedAddress(shared.key[key_stage]) + group * kGroupKeys * kPanelRowBytes);
    const uint64_t query = RowOperand(SharedAddress(shared.query[stage]));
    BeginProducts();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t within = k % 4 * 32;
      const uint64_t a = Further(key, k / 4 * kKeyPanelBytes + within);
      const uint64_t b = Further(query, k / 4 * kQueryPanelBytes + within);
      if (k == 0) {
        StartProduct<false>(score, a, b);
      } else {
        StartProduct<true>(score, a, b);
      }
    }
    CommitProducts();
    WaitProducts<0>();
    Settle(score);
  }

  // A tile's weights of one query head, summed over the lane's rows: of the keys lane / 4 + {0, 8}.
  // `key` is the tile's position of the first of them: earlier rows do not see it.
  __device__ __forceinline__ float2 Sum(int stage, int key, bool masked) {
    if (masked) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < key + i % 4 / 2 * 8) score[i] = -INFINITY;
      }
    }
    const float* const offset = shared.offset[stage] + lane % 4 * 2;
    float total[2][2] = {};
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(offset + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = score[4 * n + 2 * half] * scale + pair.x;
        const float high = score[4 * n + 2 * half + 1] * scale + pair.y;
        total[half][0] += Exp2(low);
        total[half][1] += Exp2(high);
      }
    }
    return make_float2(total[0][0] + total[0][1], total[1][0] + total[1][1]);
  }
};

// [T, Hq, d] x [n, Hk, d] -> weights [64 keys, 128 rows] in registers -> sums [tiles, Hk, n].
template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    HopperColumnSumKernel(const __grid_constant__ ColumnSumArgs args,
                          const __grid_constant__ ColumnSumMaps maps,
                          const __grid_constant__ ColumnSumPart part) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kPanels = D / kPanelColumns;
  extern __shared__ unsigned char memory[];
  ColumnSumShared<D>& shared =
      *reinterpret_cast<ColumnSumShared<D>*>(memory + (1024 - SharedAddress(memory) % 1024) % 1024);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  ReleaseLaterKernels();
  if (threadIdx.x == 0) {
    PrefetchMap(maps.query);
    PrefetchMap(maps.key);
    for (int stage = 0; stage < kKeyStages; ++stage) {
      InitialiseBarrier(SharedAddress(&shared.key_full[stage]), 1);
      InitialiseBarrier(SharedAddress(&shared.key_empty[stage]), 4 * kConsumers);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      InitialiseBarrier(SharedAddress(&shared.full[stage]), 2);
      InitialiseBarrier(SharedAddress(&shared.empty[stage]), 4 * kConsumers);
    }
    PublishBarriers();
  }
  __syncthreads();

  const int columns = LastColumn(args) - args.keys.first_token;
  const int group = args.query_heads / args.kv_heads;
  ColumnSumRuns<kKeys> runs(args, part);
  // Which boxes of a run's keys a lane of the first warp asks for: its place in the run, and the
  // block that holds it, which is looked up ahead of the kernel that made the keys.
  constexpr int kBoxes = kPanels * kKeys / kBoxRows;
  static_assert(kBoxes <= 32);
  const int within = lane % (kKeys / kBoxRows) * kBoxRows;
  const auto find_block = [&] {
    const int slot = runs.block * kKeys + within;
    if (args.keys.block_table == nullptr || slot >= columns) return args.table_row;
    return args.keys.block_table[int64_t{args.table_row} * args.keys.block_table_stride +
                                 slot / args.keys.block_size];
  };
  int key_block = warp == 0 ? find_block() : 0;
  WaitForEarlierKernels();
  RingPlace keys{kKeyStages};
  RingPlace place{kStages};
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<64>();
    if (warp == 0) {
      while (true) {
        const uint32_t full = SharedAddress(&shared.key_full[keys.stage]);
        if (lane == 0) {
          WaitPhase(SharedAddress(&shared.key_empty[keys.stage]), keys.parity ^ 1);
          ArriveExpecting(full, kPanels * kKeyPanelBytes);
        }
        __syncwarp();
        if (lane < kBoxes) {
          const int panel = lane / (kKeys / kBoxRows);
          const int slot = runs.block * kKeys + within;
          CopyBox(SharedAddress(shared.key[keys.stage][panel]) + within * kPanelRowBytes, maps.key,
                  full, panel * kPanelColumns,
                  slot < columns ? slot % args.keys.block_size : kNowhere, runs.kv_head, key_block);
        }
        keys.Advance();
        runs.ForEach([&](int tile, int q) {
          const uint32_t ready = SharedAddress(&shared.full[place.stage]);
          if (lane == 0) {
            WaitPhase(SharedAddress(&shared.empty[place.stage]), place.parity ^ 1);
            ArriveExpecting(ready, kPanels * kQueryPanelBytes);
            for (int panel = 0; panel < kPanels; ++panel) {
              CopyBox(SharedAddress(shared.query[place.stage][panel]), maps.query, ready,
                      panel * kPanelColumns, tile * kColumnSumRows - args.history_tokens,
                      runs.kv_head * group + q, 0);
            }
          }
          place.Advance();
        });
        if (!runs.Next()) break;
        key_block = find_block();
      }
    } else if (warp == 1) {
      do {
        runs.ForEach([&](int tile, int q) {
          const int tile_row = tile * kColumnSumRows - args.history_tokens;
          const float* const log_sum_exp = args.log_sum_exp + runs.kv_head * group + q;
          float offset[kColumnSumRows / 32];
#pragma unroll
          for (int i = 0; i < kColumnSumRows / 32; ++i) {
            const int row = tile_row + i * 32 + lane;
            offset[i] = INFINITY;  // no weight
            if (row >= 0 && row < args.rows) {
              offset[i] = log_sum_exp[int64_t{row} * args.query_heads];
            }
          }
#pragma unroll
          for (int i = 0; i < kColumnSumRows / 32; ++i) {
            const float fading = Fading(args, tile_row, tile_row + i * 32 + lane);
            offset[i] = offset[i] == INFINITY ? -INFINITY : fading - offset[i] * kLog2E;
          }
          WaitPhase(SharedAddress(&shared.empty[place.stage]), place.parity ^ 1);
          for (int i = 0; i < kColumnSumRows / 32; ++i) {
            shared.offset[place.stage][i * 32 + lane] = offset[i];
          }
          __syncwarp();
          if (lane == 0) Arrive(SharedAddress(&shared.full[place.stage]));
          place.Advance();
        });
      } while (runs.Next());
    }
  } else {
    TakeRegisters<104>();
    ColumnSumConsumer<D> consumer{
        .shared = shared,
        .group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0),
        .lane = lane,
        .scale = args.scale * kLog2E};
    const bool is_odd = lane % 2 == 1;
    const int heads = part.by_query_head ? args.query_heads : args.kv_heads;  // of a tile's sums
    float tile_sum = 0.0f;  // of the tile's heads so far
    do {
      const int column = runs.block * kKeys + consumer.group * kGroupKeys;
      // Of the four lanes that share two keys, two store their sums.
      const int own = warp % 4 * 16 + lane / 4;
      const int stored = column + own + (is_odd ? 8 : 0);
      const bool stores = lane % 4 < 2 && stored < columns;
      const int head = part.by_query_head ? runs.kv_head * group : runs.kv_head;
      float* const sums = part.sums + int64_t{head} * columns + stored;
      const int64_t tile_floats = int64_t{heads} * columns;
      WaitPhase(SharedAddress(&shared.key_full[keys.stage]), keys.parity);
      runs.ForEach([&](int tile, int q) {
        WaitPhase(SharedAddress(&shared.full[place.stage]), place.parity);
        // Of the warpgroup's first key, from the tile's first row.
        const int key = args.keys.first_token + column - tile * kColumnSumRows;
        const bool is_seen = key < kColumnSumRows;
        float2 sum = {};
        if (is_seen) {
          consumer.Multiply(keys.stage, place.stage);
          sum = consumer.Sum(place.stage, key + own, key + kGroupKeys > 1);
          __syncwarp();  // every lane has read the stage's offsets
        }
        if (lane == 0) Arrive(SharedAddress(&shared.empty[place.stage]));
        place.Advance();
        if (!is_seen) return;  // nor is the tile's sum read
        float mine = is_odd ? sum.y : sum.x;
        mine += __shfl_xor_sync(~0u, is_odd ? sum.x : sum.y, 1);
        mine += __shfl_xor_sync(~0u, mine, 2);
        tile_sum += mine;
        if (!part.by_query_head && q + 1 < group) return;
        float* const line = sums + (tile - part.first_tile) * tile_floats;
        if (stores) line[part.by_query_head ? int64_t{q} * columns : 0] = tile_sum;
        tile_sum = 0.0f;
      });
      if (lane == 0) Arrive(SharedAddress(&shared.key_empty[keys.stage]));
      keys.Advance();
    } while (runs.Next());
  }
#endif
}

// One thread for each column of a KV head: score = its tiles' sums, added in order. A tile has
// kHeads of them, one behind the other; many are asked for before any is used.
template <int kHeads>
__global__ void __launch_bounds__(kFoldThreads)
    FoldColumnSumsKernel(const __grid_constant__ ColumnSumArgs args,
                         const __grid_constant__ ColumnSumPart part) {
  constexpr int kTiles = 16 / kHeads;  // at once
  const int columns = LastColumn(args) - args.keys.first_token;
  const int slot = blockIdx.x * kFoldThreads + threadIdx.x;
  const int kv_head = blockIdx.y;
  const int column = args.keys.first_token + slot;
  const int first_tile = FirstTile(args, column);
  WaitForEarlierKernels();
  if (slot >= columns || first_tile >= part.end_tile) return;
  float* const place = static_cast<float*>(args.score.data) +
                       SlotOffset(args.score, args.table_row, column, kv_head);
  const bool fresh = column >= args.history_tokens && first_tile >= part.first_tile;
  const bool plain = args.scoring.decay == 1.0f && !args.scoring.half;
  const int64_t tile_floats = int64_t{args.kv_heads} * kHeads * columns;
  int tile = max(first_tile, part.first_tile);
  const float* from = part.sums + (tile - part.first_tile) * tile_floats +
                      int64_t{kv_head} * kHeads * columns + slot;
  float score = fresh ? 0.0f : *place;
  for (; tile < part.end_tile; tile += kTiles) {
    float sum[kTiles][kHeads];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int q = 0; q < kHeads; ++q) {
        sum[t][q] = tile + t < part.end_tile ? from[t * tile_floats + q * columns] : 0.0f;
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int q = 1; q < kHeads; ++q) sum[t][0] += sum[t][q];
      if (plain) score += sum[t][0];
    }
    if (!plain) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (tile + t >= part.end_tile) break;
        score = AddTile(args, (tile + t) * kColumnSumRows - args.history_tokens, score, sum[t][0]);
      }
    }
    from += kTiles * tile_floats;
  }
  *place = score;
}

// ------------------------------------------------------------------------------------------
// launchers

// Tiles for each multiprocessor below which some would have a noticeable share more than others.
constexpr int64_t kFewTiles = 16;

template <int D>
cudaError_t LaunchPart(const ColumnSumArgs& args, const ColumnSumMaps& maps, ColumnSumPart part,
                       const LaunchContext& context) {
  constexpr int kBytes = sizeof(ColumnSumShared<D>) + 1024;
  const auto kernel = HopperColumnSumKernel<D>;
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (configured != cudaSuccess) return configured;
  for (int32_t block = 0; block < part.key_blocks; ++block) {
    part.head_tiles += part.end_tile - part.FirstOf<kKeys>(args, block);
  }
  if (part.head_tiles == 0) return cudaSuccess;
  const int64_t columns = LastColumn(args) - args.keys.first_token;
  const int64_t bytes = (part.end_tile - part.first_tile) * columns * args.query_heads *
                        static_cast<int64_t>(sizeof(float));
  const int64_t tiles = part.head_tiles * args.kv_heads;
  const int group = args.query_heads / args.kv_heads;
  part.by_query_head = (group == 2 || group == 4 || group == 8) &&
                       tiles < kFewTiles * context.multiprocessors &&
                       bytes <= static_cast<int64_t>(context.workspace_bytes);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, context.multiprocessors));
  const cudaError_t error =
      LaunchDependent(context, kernel, blocks, kThreads, kBytes, args, maps, part);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((columns + kFoldThreads - 1) / kFoldThreads),
                  args.kv_heads);
  const auto fold = !part.by_query_head ? FoldColumnSumsKernel<1>
                    : group == 2        ? FoldColumnSumsKernel<2>
                    : group == 4        ? FoldColumnSumsKernel<4>
                                        : FoldColumnSumsKernel<8>;
  return LaunchDependent(AfterKernel(context), fold, grid, kFoldThreads, 0, args, part);
}

// [T, Hq, d] -> sums [tiles, Hk, n] -> score, as many tiles at once as the workspace holds.
template <int D>
cudaError_t LaunchAll(const ColumnSumArgs& args, const LaunchContext& context) {
  ColumnSumMaps maps = {};
  cudaError_t error = MakeTensorMap(
      ShapeOf(args.query, args.rows, args.query_heads, D, kColumnSumRows), maps.query);
  if (error != cudaSuccess) return error;
  error = MakeTensorMap(ShapeOf(args.keys, args.keys.key, args.kv_heads, D, kBoxRows), maps.key);
  if (error != cudaSuccess) return error;
  const int64_t columns = LastColumn(args) - args.keys.first_token;
  const int64_t tile_bytes = columns * args.kv_heads * static_cast<int64_t>(sizeof(float));
  const auto tiles_at_once =
      static_cast<int32_t>(static_cast<int64_t>(context.workspace_bytes) / tile_bytes);
  const int32_t end = (args.history_tokens + args.rows + kColumnSumRows - 1) / kColumnSumRows;
  for (int32_t tile = FirstTile(args, args.keys.first_token); tile < end; tile += tiles_at_once) {
    error = LaunchPart<D>(args, maps,
                          {.sums = reinterpret_cast<float*>(context.workspace),
                           .first_tile = tile,
                           .end_tile = std::min(end, tile + tiles_at_once),
                           .key_blocks = static_cast<int32_t>((columns + kKeys - 1) / kKeys),
                           .head_tiles = 0,
                           .by_query_head = false},
                          context);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

bool IsForHopper(const ColumnSumArgs& args, const LaunchContext& context) {
  const DType dtype = context.activation_dtype;
  const int64_t columns = LastColumn(args) - args.keys.first_token;
  const bool maximum = args.scoring.group_maximum && args.query_heads > args.kv_heads;
  const bool shapes = !maximum && columns > 0 && args.rotation.inverse_frequency == nullptr &&
                      dtype == DType::kBf16 && args.keys.dtype == dtype &&
                      (args.head_dim == 64 || args.head_dim == 128) && IsAligned(args.keys) &&
                      HoldsBoxes(args.keys, kBoxRows) && IsAligned(args.query, dtype);
  static const bool built = IsBuilt(HopperColumnSumKernel<128>);
  return shapes && built &&
         columns * args.kv_heads * static_cast<int64_t>(sizeof(float)) <=
             static_cast<int64_t>(context.workspace_bytes);
}

cudaError_t LaunchOnHopper(const ColumnSumArgs& args, const LaunchContext& context) {
  return args.head_dim == 64 ? LaunchAll<64>(args, context) : LaunchAll<128>(args, context);
}

}  // namespace kvsweep::cuda
