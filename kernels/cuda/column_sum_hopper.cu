// Column sums of the attention matrix with wgmma. A block keeps kKeys keys of one KV head in shared
// memory; the queries of the group pass in tiles of kColumnSumRows rows, and a product is keys x
// queries, so that a key's weights lie side by side in a thread's registers and their sum needs no
// other thread until the tile is done. Blocks share the tiles in segments of equal length: the sum
// of each tile goes to the workspace, from where a second kernel adds it to the score, tile by tile
// in order; no atomics, so no two runs differ.
#include <algorithm>

#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kBoxRows = 16;  // keys of a copy: a page, or a part of one
constexpr int kQueryPanelBytes = kColumnSumRows * kPanelRowBytes;
constexpr int kNowhere = 1 << 30;  // a coordinate outside every tensor
constexpr int kFoldThreads = 128;

struct ColumnSumMaps {
  CUtensorMap query;  // boxes of kColumnSumRows rows
  CUtensorMap key;    // boxes of kBoxRows rows
};

// Tiles [first_tile, end_tile) of rows, in segments; the sums of tile t lie at sums[(t -
// first_tile)
// * Hk + h], one for each column.
struct ColumnSumPart {
  float* sums;  // [tiles, Hk, columns]
  int32_t first_tile;
  int32_t end_tile;
  int32_t segment_tiles;
  int32_t key_blocks;
};

// kConsumers warpgroups, of kProducts * 64 keys each; kStages tiles of queries in shared memory.
template <int D_, int kConsumers_, int kProducts_, int kStages_>
struct ColumnSumShape {
  static constexpr int D = D_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kProducts = kProducts_;
  static constexpr int kStages = kStages_;
  static constexpr int kGroupKeys = 64 * kProducts;
  static constexpr int kKeys = kConsumers * kGroupKeys;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
};

template <typename Shape>
struct ColumnSumShared {
  static constexpr int D = Shape::D;
  static constexpr int kStages = Shape::kStages;
  alignas(1024) unsigned char key[D / kPanelColumns][Shape::kKeyPanelBytes];
  alignas(1024) unsigned char query[kStages][D / kPanelColumns][kQueryPanelBytes];
  float offset[kStages][kColumnSumRows];  // minus the log-sum-exp, in units of log 2
  uint64_t key_full;
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

// One warpgroup: the sums of its keys.
template <typename Shape>
struct ColumnSumConsumer {
  static constexpr int D = Shape::D;
  static constexpr int kScores = kColumnSumRows / 2;  // registers

  ColumnSumShared<Shape>& shared;
  int group;
  int lane;
  float scale;
  float score[Shape::kProducts][kScores];
  float sum[Shape::kProducts][2];  // of keys lane / 4 + {0, 8}

  __device__ __forceinline__ void Start(int product, int stage) {
    const uint64_t key = RowOperand(SharedAddress(shared.key) +
                                    (group * Shape::kGroupKeys + product * 64) * kPanelRowBytes);
    const uint64_t query = RowOperand(SharedAddress(shared.query[stage]));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t within = k % 4 * 32;
      const uint64_t a = Further(key, k / 4 * Shape::kKeyPanelBytes + within);
      const uint64_t b = Further(query, k / 4 * kQueryPanelBytes + within);
      if (k == 0) {
        StartProduct<false>(score[product], a, b);
      } else {
        StartProduct<true>(score[product], a, b);
      }
    }
    CommitProducts();
  }

  // Adds a tile's weights of one query head. `key` is the tile's position of this lane's first key:
  // earlier rows do not see it.
  __device__ __forceinline__ void Add(int product, int stage, int key, bool masked) {
    float(&entry)[kScores] = score[product];
    if (masked) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < key + i % 4 / 2 * 8) entry[i] = -INFINITY;
      }
    }
    const float* const offset = shared.offset[stage] + lane % 4 * 2;
    float total[2][2] = {};
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(offset + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = entry[4 * n + 2 * half] * scale + pair.x;
        const float high = entry[4 * n + 2 * half + 1] * scale + pair.y;
        total[half][0] += Exp2(low);
        total[half][1] += Exp2(high);
      }
    }
    for (int half = 0; half < 2; ++half) sum[product][half] += total[half][0] + total[half][1];
  }
};

// [T, Hq, d] x [n, Hk, d] -> weights [64 keys, 128 rows] in registers -> sums [tiles, Hk, n].
template <typename Shape, int kBlocks>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks)
    HopperColumnSumKernel(const __grid_constant__ ColumnSumArgs args,
                          const __grid_constant__ ColumnSumMaps maps,
                          const __grid_constant__ ColumnSumPart part) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kPanels = Shape::D / kPanelColumns;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kStages = Shape::kStages;
  constexpr int kProducts = Shape::kProducts;
  const int group = args.query_heads / args.kv_heads;
  const int block = blockIdx.x % part.key_blocks;
  const int kv_head = blockIdx.x / part.key_blocks % args.kv_heads;
  const int segment = blockIdx.x / part.key_blocks / args.kv_heads;
  const int first = args.keys.first_token + block * kKeys;
  const int segment_tile = part.first_tile + segment * part.segment_tiles;
  const int end_tile = min(segment_tile + part.segment_tiles, part.end_tile);
  const int first_tile = max(segment_tile, FirstTile(args, first));
  if (first_tile >= end_tile) return;

  extern __shared__ unsigned char memory[];
  ColumnSumShared<Shape>& shared = *reinterpret_cast<ColumnSumShared<Shape>*>(
      memory + (1024 - SharedAddress(memory) % 1024) % 1024);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    InitialiseBarrier(SharedAddress(&shared.key_full), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      InitialiseBarrier(SharedAddress(&shared.full[stage]), 2);
      InitialiseBarrier(SharedAddress(&shared.empty[stage]), 4 * Shape::kConsumers);
    }
    PublishBarriers();
  }
  __syncthreads();

  const int columns = LastColumn(args) - args.keys.first_token;
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<Shape::kConsumers == 2 ? 56 : 32>();
    RingPlace place{kStages};
    if (warp == 0) {
      const uint32_t full = SharedAddress(&shared.key_full);
      if (lane == 0) ArriveExpecting(full, kPanels * Shape::kKeyPanelBytes);
      __syncwarp();
      for (int box = lane; box < kPanels * kKeys / kBoxRows; box += 32) {
        const int panel = box / (kKeys / kBoxRows);
        const int within = box % (kKeys / kBoxRows) * kBoxRows;
        const int slot = block * kKeys + within;
        int id = args.table_row;
        if (args.keys.block_table != nullptr && slot < columns) {
          id = args.keys.block_table[int64_t{args.table_row} * args.keys.block_table_stride +
                                     slot / args.keys.block_size];
        }
        CopyBox(SharedAddress(shared.key[panel]) + within * kPanelRowBytes, maps.key, full,
                panel * kPanelColumns, slot < columns ? slot % args.keys.block_size : kNowhere,
                kv_head, id);
      }
      for (int tile = first_tile; tile < end_tile; ++tile) {
        for (int q = 0; q < group; ++q) {
          const uint32_t ready = SharedAddress(&shared.full[place.stage]);
          if (lane == 0) {
            WaitPhase(SharedAddress(&shared.empty[place.stage]), place.parity ^ 1);
            ArriveExpecting(ready, kPanels * kQueryPanelBytes);
            for (int panel = 0; panel < kPanels; ++panel) {
              CopyBox(SharedAddress(shared.query[place.stage][panel]), maps.query, ready,
                      panel * kPanelColumns, tile * kColumnSumRows - args.history_tokens,
                      kv_head * group + q, 0);
            }
          }
          place.Advance();
        }
      }
    } else if (warp == 1) {
      for (int tile = first_tile; tile < end_tile; ++tile) {
        const int tile_row = tile * kColumnSumRows - args.history_tokens;
        for (int q = 0; q < group; ++q) {
          float offset[kColumnSumRows / 32];
          for (int i = 0; i < kColumnSumRows / 32; ++i) {
            const int row = tile_row + i * 32 + lane;
            offset[i] = -INFINITY;  // no weight
            if (row >= 0 && row < args.rows) {
              offset[i] =
                  Fading(args, tile_row, row) -
                  args.log_sum_exp[int64_t{row} * args.query_heads + kv_head * group + q] * kLog2E;
            }
          }
          WaitPhase(SharedAddress(&shared.empty[place.stage]), place.parity ^ 1);
          for (int i = 0; i < kColumnSumRows / 32; ++i) {
            shared.offset[place.stage][i * 32 + lane] = offset[i];
          }
          __syncwarp();
          if (lane == 0) Arrive(SharedAddress(&shared.full[place.stage]));
          place.Advance();
        }
      }
    }
  } else {
    TakeRegisters<Shape::kConsumers == 2 ? 224 : Shape::kConsumers == 3 ? 160 : 112>();
    ColumnSumConsumer<Shape> consumer{
        .shared = shared,
        .group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0),
        .lane = lane,
        .scale = args.scale * kLog2E};
    const int group_key = first + consumer.group * Shape::kGroupKeys;
    const int own = warp % 4 * 16 + lane / 4;  // of each product's keys
    RingPlace place{kStages};
    WaitPhase(SharedAddress(&shared.key_full), 0);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) consumer.sum[i][0] = consumer.sum[i][1] = 0.0f;
    for (int tile = first_tile; tile < end_tile; ++tile) {
      const int first_row = tile * kColumnSumRows;
      for (int q = 0; q < group; ++q) {
        WaitPhase(SharedAddress(&shared.full[place.stage]), place.parity);
        BeginProducts();
#pragma unroll
        for (int i = 0; i < kProducts; ++i) consumer.Start(i, place.stage);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          if (i + 1 < kProducts) {
            WaitProducts<1>();
          } else {
            WaitProducts<0>();
          }
          Settle(consumer.score[i]);
          const int key = group_key + i * 64;
          consumer.Add(i, place.stage, key + own - first_row, key + 63 > first_row);
        }
        __syncwarp();  // every lane has read the stage's offsets
        if (lane == 0) Arrive(SharedAddress(&shared.empty[place.stage]));
        place.Advance();
      }
      // All heads of the tile are in.
      float* const sums =
          part.sums + (int64_t{tile - part.first_tile} * args.kv_heads + kv_head) * columns;
#pragma unroll
      for (int i = 0; i < 2 * kProducts; ++i) {
        float total = consumer.sum[i / 2][i % 2];
        consumer.sum[i / 2][i % 2] = 0.0f;
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const int column = group_key - args.keys.first_token + i / 2 * 64 + own + i % 2 * 8;
        if (lane % 4 == 0 && column < columns) sums[column] = total;
      }
    }
  }
#endif
}

// One thread for each column of a KV head: score = its tiles' sums, added in order.
__global__ void __launch_bounds__(kFoldThreads)
    FoldColumnSumsKernel(const __grid_constant__ ColumnSumArgs args,
                         const __grid_constant__ ColumnSumPart part) {
  const int columns = LastColumn(args) - args.keys.first_token;
  const int slot = blockIdx.x * kFoldThreads + threadIdx.x;
  const int kv_head = blockIdx.y;
  if (slot >= columns) return;
  const int column = args.keys.first_token + slot;
  const int first_tile = FirstTile(args, column);
  if (first_tile >= part.end_tile) return;
  float* const place = static_cast<float*>(args.score.data) +
                       SlotOffset(args.score, args.table_row, column, kv_head);
  const bool fresh = column >= args.history_tokens && first_tile >= part.first_tile;
  float score = fresh ? 0.0f : *place;
#pragma unroll 8
  for (int tile = max(first_tile, part.first_tile); tile < part.end_tile; ++tile) {
    const float sum =
        part.sums[(int64_t{tile - part.first_tile} * args.kv_heads + kv_head) * columns + slot];
    score = AddTile(args, tile * kColumnSumRows - args.history_tokens, score, sum);
  }
  *place = score;
}

// ------------------------------------------------------------------------------------------
// launchers

// Products of 128 rows that a block makes at least, so that fetching its keys does not count.
constexpr int kLeastProducts = 8;
// Blocks for each multiprocessor, so that the last ones end together.
constexpr int kWaves = 6;

template <typename Shape, int kBlocks>
cudaError_t LaunchPart(const ColumnSumArgs& args, const ColumnSumMaps& maps, ColumnSumPart part,
                       const LaunchContext& context) {
  constexpr int kBytes = sizeof(ColumnSumShared<Shape>) + 1024;
  const auto kernel = HopperColumnSumKernel<Shape, kBlocks>;
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (configured != cudaSuccess) return configured;
  int64_t tiles = 0;  // of all key blocks
  for (int32_t block = 0; block < part.key_blocks; ++block) {
    const int first = FirstTile(args, args.keys.first_token + block * Shape::kKeys);
    tiles += std::max(0, part.end_tile - std::max(part.first_tile, first));
  }
  const int group = args.query_heads / args.kv_heads;
  part.segment_tiles = static_cast<int32_t>(
      std::max<int64_t>((kLeastProducts + group - 1) / group,
                        tiles * args.kv_heads / (int64_t{kWaves} * context.multiprocessors)));
  const int segments =
      (part.end_tile - part.first_tile + part.segment_tiles - 1) / part.segment_tiles;
  kernel<<<static_cast<unsigned>(segments) * args.kv_heads * part.key_blocks, Shape::kThreads,
           kBytes, context.stream>>>(args, maps, part);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int columns = LastColumn(args) - args.keys.first_token;
  const dim3 grid((columns + kFoldThreads - 1) / kFoldThreads, args.kv_heads);
  FoldColumnSumsKernel<<<grid, kFoldThreads, 0, context.stream>>>(args, part);
  return cudaGetLastError();
}

// [T, Hq, d] -> sums [tiles, Hk, n] -> score, as many tiles at once as the workspace holds.
template <typename Shape, int kBlocks>
cudaError_t LaunchAll(const ColumnSumArgs& args, const LaunchContext& context) {
  constexpr int D = Shape::D;
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
    error = LaunchPart<Shape, kBlocks>(
        args, maps,
        {.sums = reinterpret_cast<float*>(context.workspace),
         .first_tile = tile,
         .end_tile = std::min(end, tile + tiles_at_once),
         .segment_tiles = 0,
         .key_blocks = static_cast<int32_t>((columns + Shape::kKeys - 1) / Shape::kKeys)},
        context);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <int D>
using Chosen = ColumnSumShape<D, 2, 2, 4>;

}  // namespace

bool IsForHopper(const ColumnSumArgs& args, const LaunchContext& context) {
  const DType dtype = context.activation_dtype;
  const int64_t columns = LastColumn(args) - args.keys.first_token;
  const bool maximum = args.scoring.group_maximum && args.query_heads > args.kv_heads;
  const bool shapes = !maximum && columns > 0 && args.rotation.inverse_frequency == nullptr &&
                      dtype == DType::kBf16 && args.keys.dtype == dtype &&
                      (args.head_dim == 64 || args.head_dim == 128) && IsAligned(args.keys) &&
                      HoldsBoxes(args.keys, kBoxRows) && IsAligned(args.query, dtype);
  static const bool built = IsBuilt(HopperColumnSumKernel<Chosen<128>, 1>);
  return shapes && built &&
         columns * args.kv_heads * static_cast<int64_t>(sizeof(float)) <=
             static_cast<int64_t>(context.workspace_bytes);
}

cudaError_t LaunchOnHopper(const ColumnSumArgs& args, const LaunchContext& context) {
  return args.head_dim == 64 ? LaunchAll<Chosen<64>, 1>(args, context)
                             : LaunchAll<Chosen<128>, 1>(args, context);
}

}  // namespace kvsweep::cuda
