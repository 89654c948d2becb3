// Prefill attention with wgmma. A block holds 64 query rows of one head for each of its consumer
// warpgroups; one warp has the copy engine bring queries, keys and values, the latter in tiles of
// kTile tokens at absolute slots through a ring of stages, from the last tile that a row sees to
// the first, so that all but the first one or two are seen whole. Three warpgroups leave
// each 160 registers: too few to begin a tile before the one before is done, but one's exponentials
// run beside the others' products, and 192 rows share a tile's way from the L2 cache. Blocks stay
// and draw (head, rows) pairs, those with the most keys first, heads in sections whose keys and
// values fit into the L2 cache together.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kConsumers = 3;             // warpgroups that multiply
constexpr int kStages = 2;                // of the ring
constexpr int kTile = 128;                // tokens
constexpr int kBoxRows = 16;              // tokens of a copy: a page, or a part of one
constexpr int kBoxes = kTile / kBoxRows;  // of a panel
constexpr int kBoxBytes = kBoxRows * kPanelRowBytes;
constexpr int kPanelBytes = kTile * kPanelRowBytes;
constexpr int kGroupRows = 64;  // query rows of a warpgroup
constexpr int kQueryPanelBytes = kGroupRows * kPanelRowBytes;
constexpr int kNowhere = 1 << 30;  // a coordinate outside every tensor

struct PrefillMaps {
  CUtensorMap query;        // boxes of kGroupRows rows
  CUtensorMap history_key;  // the others: of kBoxRows rows
  CUtensorMap history_value;
  CUtensorMap chunk_key;
  CUtensorMap chunk_value;
  CUtensorMap chunk_key_tile;  // boxes of kTile rows
  CUtensorMap chunk_value_tile;
};

// Which (head, rows) pair a block takes: pairs are numbered by section, then from the last rows to
// the first, then by head.
struct PrefillSchedule {
  int32_t pairs;
  int32_t row_blocks;
  int32_t section_heads;  // query heads
  bool whole_tiles;
};

template <int D>
struct PrefillShared {
  alignas(1024) unsigned char query[kConsumers][D / kPanelColumns][kQueryPanelBytes];
  alignas(1024) unsigned char key[kStages][D / kPanelColumns][kPanelBytes];
  alignas(1024) unsigned char value[kStages][D / kPanelColumns][kPanelBytes];
  uint64_t query_full;
  uint64_t query_empty;
  uint64_t key_full[kStages];
  uint64_t key_empty[kStages];
  uint64_t value_full[kStages];
  uint64_t value_empty[kStages];
  // Of the queries; -1: no more. Written and read atomically: barriers order that, but racecheck
  // does not follow those of bulk copies.
  int32_t pair;
};

// Tokens that row `row` of the chunk sees.
__device__ __forceinline__ int32_t Visible(const PrefillAttentionArgs& args, int32_t row) {
  return args.history_tokens + (args.chunk_key.data != nullptr ? row + 1 : 0);
}

// What a pair number stands for.
template <int kRows>
struct PrefillPair {
  int32_t head;
  int32_t first_row;
  int32_t tiles;

  __device__ __forceinline__ PrefillPair(const PrefillAttentionArgs& args,
                                         const PrefillSchedule& schedule, int32_t pair) {
    const int32_t section = pair / (schedule.row_blocks * schedule.section_heads);
    const int32_t within = pair - section * schedule.row_blocks * schedule.section_heads;
    const int32_t heads =
        min(schedule.section_heads, args.query_heads - section * schedule.section_heads);
    head = section * schedule.section_heads + within % heads;
    first_row = (schedule.row_blocks - 1 - within / heads) * kRows;
    tiles = (Visible(args, min(first_row + kRows, args.rows) - 1) + kTile - 1) / kTile;
  }
};

// One warp: fills the rings.
template <int D>
struct PrefillProducer {
  using Shared = PrefillShared<D>;
  static constexpr int kPanels = D / kPanelColumns;

  const PrefillAttentionArgs& args;
  const PrefillMaps& maps;
  Shared& shared;
  int lane;
  bool whole_tiles;
  RingPlace place{kStages};

  // Block id of the box that this lane copies of a tile; -1 past the history.
  __device__ __forceinline__ int32_t FindBlock(int tile) const {
    const int32_t token = tile * kTile + lane % kBoxes * kBoxRows;
    if (tile < 0 || token >= args.history_tokens) return -1;
    const KvView& view = args.history;
    return view.block_table == nullptr
               ? args.history_row
               : view.block_table[int64_t{args.history_row} * view.block_table_stride +
                                  token / view.block_size];
  }

  // A box in which history ends within: by ordinary copies, zeros behind the last token.
  __device__ void CopyMixed(uint32_t panels, const std::byte* stored, const Activations& own,
                            int32_t token, int32_t kv_head) const {
    for (int c = lane; c < kBoxRows * D / 8; c += 32) {
      const int row = c / (D / 8);
      const int column = c % (D / 8) * 8;
      uint4 chunk = {};
      const int32_t at = token + row;
      if (at < args.history_tokens) {
        chunk = *reinterpret_cast<const uint4*>(
            reinterpret_cast<const __nv_bfloat16*>(stored) +
            KvOffset(args.history, args.history_row, at, kv_head) + column);
      } else if (own.data != nullptr && at < args.history_tokens + args.rows) {
        chunk = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(own.data) +
                                                int64_t{at - args.history_tokens} * own.stride +
                                                int64_t{kv_head} * D + column);
      }
      const uint32_t target = panels + column / kPanelColumns * kPanelBytes + row * kPanelRowBytes +
                              (column % kPanelColumns / 8 ^ row % 8) * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(chunk.x),
                   "r"(chunk.y), "r"(chunk.z), "r"(chunk.w)
                   : "memory");
    }
    FenceAsyncProxy();
  }

  // One tile of keys or of values.
  __device__ __forceinline__ void CopyTile(uint32_t target, uint32_t full,
                                           const CUtensorMap& stored, const CUtensorMap& own,
                                           const CUtensorMap& own_tile,
                                           const std::byte* stored_data,
                                           const Activations& own_rows, int tile, int32_t block,
                                           int32_t kv_head) const {
    const int32_t history = args.history_tokens;
    const int32_t mixed = history % kBoxRows == 0 ? -1 : history / kBoxRows * kBoxRows;
    const bool has_mixed = mixed >= tile * kTile && mixed < tile * kTile + kTile;
    if (has_mixed) {
      CopyMixed(target + (mixed - tile * kTile) * kPanelRowBytes, stored_data, own_rows, mixed,
                kv_head);
    }
    __syncwarp();
    if (lane == 0) {
      ArriveExpecting(full, kPanels * (kPanelBytes - (has_mixed ? kBoxBytes : 0)));
    }
    __syncwarp();
    if (whole_tiles && tile * kTile >= history) {
      if (lane < kPanels) {
        CopyBox(target + lane * kPanelBytes, own_tile, full, lane * kPanelColumns,
                tile * kTile - history, kv_head, 0);
      }
      return;
    }
    if (lane >= kPanels * kBoxes) return;
    const int panel = lane / kBoxes;
    const int32_t token = tile * kTile + lane % kBoxes * kBoxRows;
    if (token == mixed) return;
    const uint32_t box = target + panel * kPanelBytes + lane % kBoxes * kBoxBytes;
    if (token < history) {
      CopyBox(box, stored, full, panel * kPanelColumns, token % args.history.block_size, kv_head,
              block);
    } else {
      CopyBox(box, own, full, panel * kPanelColumns,
              args.chunk_key.data != nullptr ? token - history : kNowhere, kv_head, 0);
    }
  }

  template <typename Pair>
  __device__ __forceinline__ void Produce(const Pair& pair) {
    const int32_t kv_head = pair.head / (args.query_heads / args.kv_heads);
    int32_t next = FindBlock(pair.tiles - 1);
    for (int tile = pair.tiles - 1; tile >= 0; --tile) {
      const int32_t block = next;
      next = FindBlock(tile - 1);
      WaitPhase(SharedAddress(&shared.key_empty[place.stage]), place.parity ^ 1);
      CopyTile(SharedAddress(shared.key[place.stage]), SharedAddress(&shared.key_full[place.stage]),
               maps.history_key, maps.chunk_key, maps.chunk_key_tile, args.history.key,
               args.chunk_key, tile, block, kv_head);
      WaitPhase(SharedAddress(&shared.value_empty[place.stage]), place.parity ^ 1);
      CopyTile(SharedAddress(shared.value[place.stage]),
               SharedAddress(&shared.value_full[place.stage]), maps.history_value, maps.chunk_value,
               maps.chunk_value_tile, args.history.value, args.chunk_value, tile, block, kv_head);
      place.Advance();
    }
  }
};

// One warpgroup: the softmax of its rows, tile by tile.
template <int D>
struct PrefillConsumer {
  using Shared = PrefillShared<D>;
  static constexpr int kScores = kTile / 2;  // registers

  Shared& shared;
  int group;  // of the consumers
  int lane;
  float scale;
  float output[D / 2];
  float score[kScores];
  uint32_t weight[kScores / 2];
  float maximum[2];  // of rows lane / 4 + {0, 8}
  float sum[2];      // of this lane's columns

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) output[i] = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  __device__ __forceinline__ void StartScores(int stage) {
    const uint64_t query = RowOperand(SharedAddress(shared.query[group]));
    const uint64_t key = RowOperand(SharedAddress(shared.key[stage]));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t within = k % 4 * 32;
      const uint64_t a = Further(query, k / 4 * kQueryPanelBytes + within);
      const uint64_t b = Further(key, k / 4 * kPanelBytes + within);
      if (k == 0) {
        StartProduct<false>(score, a, b);
      } else {
        StartProduct<true>(score, a, b);
      }
    }
    CommitProducts();
  }

  __device__ __forceinline__ void StartOutput(int stage) {
    const uint64_t value = ColumnOperand(SharedAddress(shared.value[stage]), kPanelBytes);
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
      StartProduct(output, weight + 4 * t, Further(value, t * 16 * kPanelRowBytes));
    }
    CommitProducts();
  }

  // Row half h sees the first limit[h] tokens of the tile.
  __device__ __forceinline__ void Mask(int32_t low_limit, int32_t high_limit) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (column >= (i % 4 < 2 ? low_limit : high_limit)) score[i] = -INFINITY;
    }
  }

  // Scores to weights in place; by how much what was summed so far shrinks.
  __device__ __forceinline__ void Weigh(float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest[2] = {maximum[half], -INFINITY};
#pragma unroll
      for (int n = 0; n < kScores / 4; ++n) {
        const float pair = fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]);
        highest[n % 2] = fmaxf(highest[n % 2], pair);
      }
      float top = fmaxf(highest[0], highest[1]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // A row that has seen nothing yet keeps its zeros.
      const float base = top == -INFINITY ? 0.0f : top * scale;
      shrink[half] = Exp2(maximum[half] * scale - base);
      maximum[half] = top;
      float total[2] = {sum[half] * shrink[half], 0.0f};
#pragma unroll
      for (int n = 0; n < kScores / 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& entry = score[4 * n + 2 * half + c];
          entry = Exp2(entry * scale - base);
          total[c] += entry;
        }
      }
      sum[half] = total[0] + total[1];
    }
  }

  __device__ __forceinline__ void Shrink(const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) output[i] *= shrink[i % 4 / 2];
  }

  __device__ __forceinline__ void Round() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      weight[i] = Pack<__nv_bfloat16>(score[2 * i], score[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void Release(uint64_t& empty) const {
    if (lane == 0) Arrive(SharedAddress(&empty));
  }

  // Rows `row` + {0, 8} of head `head`.
  __device__ __forceinline__ void Write(const AttentionResult& result, int32_t head, int32_t row,
                                        int32_t rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int64_t at = row + half * 8;
      if (at >= rows) continue;
      Softmax softmax{maximum[half] == -INFINITY ? -INFINITY : maximum[half] * scale, total};
      const int64_t index = at * result.query_heads + head;
      float mine = 1.0f;
      float others = 0.0f;
      if (result.accumulate) {
        mine =
            softmax.Join(result.partial.maximum[index] * kLog2E, result.partial.sum[index], others);
      }
      const bool partial = result.out.data == nullptr;
      const float inverse = partial ? 1.0f : softmax.sum > 0.0f ? 1.0f / softmax.sum : 0.0f;
      float* const place = result.partial.output + index * D + lane % 4 * 2;
      __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(result.out.data) +
                                 at * result.out.stride + int64_t{head} * D + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        float2 pair = {output[4 * n + 2 * half] * mine, output[4 * n + 2 * half + 1] * mine};
        if (others != 0.0f) {
          const float2 other = *reinterpret_cast<const float2*>(place + n * 8);
          pair.x += other.x * others;
          pair.y += other.y * others;
        }
        if (partial) {
          *reinterpret_cast<float2*>(place + n * 8) = pair;
        } else {
          *reinterpret_cast<uint32_t*>(out + n * 8) =
              Pack<__nv_bfloat16>(pair.x * inverse, pair.y * inverse);
        }
      }
      __syncwarp(0xfu << (lane & 28));  // the quad has read what it joined
      if (lane % 4 == 0) result.WriteSums(at, head, softmax);
    }
  }
};

// [T, Hq, d] x [n, Hk, d] -> scores [64, 128] and output [64, d] in registers -> [T, Hq, d].
template <int D>
__global__ void __launch_bounds__((kConsumers + 1) * kWarpgroup, 1)
    HopperPrefillKernel(const __grid_constant__ PrefillAttentionArgs args,
                        const __grid_constant__ AttentionResult result,
                        const __grid_constant__ PrefillMaps maps,
                        const __grid_constant__ PrefillSchedule schedule, uint32_t* tickets) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = PrefillShared<D>;
  using Pair = PrefillPair<kConsumers * kGroupRows>;
  extern __shared__ unsigned char memory[];
  Shared& shared =
      *reinterpret_cast<Shared*>(memory + (1024 - SharedAddress(memory) % 1024) % 1024);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    InitialiseBarrier(SharedAddress(&shared.query_full), 1);
    InitialiseBarrier(SharedAddress(&shared.query_empty), 4 * kConsumers);
    for (int stage = 0; stage < kStages; ++stage) {
      InitialiseBarrier(SharedAddress(&shared.key_full[stage]), 1);
      InitialiseBarrier(SharedAddress(&shared.key_empty[stage]), 4 * kConsumers);
      InitialiseBarrier(SharedAddress(&shared.value_full[stage]), 1);
      InitialiseBarrier(SharedAddress(&shared.value_empty[stage]), 4 * kConsumers);
    }
    PublishBarriers();
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<32>();
    if (threadIdx.x < 32) {
      PrefillProducer<D> producer{.args = args,
                                  .maps = maps,
                                  .shared = shared,
                                  .lane = lane,
                                  .whole_tiles = schedule.whole_tiles};
      int32_t drawn = blockIdx.x;
      for (uint32_t turn = 0;; ++turn) {
        int32_t next = 0;
        if (lane == 0) next = gridDim.x + atomicAdd(tickets, 1);
        WaitPhase(SharedAddress(&shared.query_empty), (turn & 1) ^ 1);
        const uint32_t full = SharedAddress(&shared.query_full);
        if (drawn >= schedule.pairs) {
          if (lane == 0) {
            atomicExch(&shared.pair, -1);
            Arrive(full);
          }
          break;
        }
        const Pair pair(args, schedule, drawn);
        if (lane == 0) {
          atomicExch(&shared.pair, drawn);
          ArriveExpecting(full, kConsumers * D / kPanelColumns * kQueryPanelBytes);
        }
        __syncwarp();
        constexpr int kPanels = D / kPanelColumns;
        if (lane < kConsumers * kPanels) {
          const int group = lane / kPanels;
          const int panel = lane % kPanels;
          CopyBox(SharedAddress(shared.query[group][panel]), maps.query, full,
                  panel * kPanelColumns, pair.first_row + group * kGroupRows, pair.head, 0);
        }
        producer.Produce(pair);
        drawn = __shfl_sync(~0u, next, 0);
      }
      // The last block to end leaves the tickets as it found them.
      if (lane == 0) {
        __threadfence();
        if (atomicAdd(tickets + 1, 1) == gridDim.x - 1) tickets[0] = tickets[1] = 0;
      }
    }
  } else {
    TakeRegisters<160>();
    PrefillConsumer<D> consumer{
        .shared = shared,
        .group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0),
        .lane = lane,
        .scale = args.scale * kLog2E};
    RingPlace keys{kStages};
    RingPlace values{kStages};
    for (uint32_t turn = 0;; ++turn) {
      WaitPhase(SharedAddress(&shared.query_full), turn & 1);
      const int32_t number = __shfl_sync(~0u, lane == 0 ? atomicAdd(&shared.pair, 0) : 0, 0);
      if (number < 0) break;
      const Pair pair(args, schedule, number);
      const int32_t group_row = pair.first_row + consumer.group * kGroupRows;
      const int32_t row = group_row + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
      const int32_t all_see = Visible(args, group_row);  // what every row of the group sees
      consumer.Clear();
      float shrink[2];
      const auto weigh = [&](int tile) {
        if (tile * kTile + kTile > all_see) {
          consumer.Mask(Visible(args, row) - tile * kTile, Visible(args, row + 8) - tile * kTile);
        }
        consumer.Weigh(shrink);
      };
      for (int tile = pair.tiles - 1; tile >= 0; --tile) {
        WaitPhase(SharedAddress(&shared.key_full[keys.stage]), keys.parity);
        BeginProducts();
        consumer.StartScores(keys.stage);
        WaitProducts<0>();
        Settle(consumer.score);
        consumer.Release(shared.key_empty[keys.stage]);
        keys.Advance();
        if (tile == 0) consumer.Release(shared.query_empty);
        weigh(tile);
        consumer.Round();
        consumer.Shrink(shrink);
        WaitPhase(SharedAddress(&shared.value_full[values.stage]), values.parity);
        BeginProducts();
        consumer.StartOutput(values.stage);
        WaitProducts<0>();
        Settle(consumer.output);
        consumer.Release(shared.value_empty[values.stage]);
        values.Advance();
      }
      consumer.Write(result, pair.head, row, args.rows);
    }
  }
#endif
}

// ------------------------------------------------------------------------------------------
// launchers

// Keys and values of so many bytes stay in the L2 cache while all rows of their heads pass.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

template <int D>
cudaError_t MakeMaps(const PrefillAttentionArgs& args, PrefillMaps& maps) {
  const auto make = [](const TensorShape& shape, CUtensorMap& map) {
    return MakeTensorMap(shape, map);
  };
  cudaError_t error =
      make(ShapeOf(args.query, args.rows, args.query_heads, D, kGroupRows), maps.query);
  if (error == cudaSuccess && args.history_tokens > 0) {
    error =
        make(ShapeOf(args.history, args.history.key, args.kv_heads, D, kBoxRows), maps.history_key);
    if (error == cudaSuccess) {
      error = make(ShapeOf(args.history, args.history.value, args.kv_heads, D, kBoxRows),
                   maps.history_value);
    }
    // Without a chunk its maps only give zeros.
    maps.chunk_key = maps.history_key;
    maps.chunk_value = maps.history_value;
  }
  if (error == cudaSuccess && args.chunk_key.data != nullptr) {
    error = make(ShapeOf(args.chunk_key, args.rows, args.kv_heads, D, kBoxRows), maps.chunk_key);
    if (error == cudaSuccess) {
      error =
          make(ShapeOf(args.chunk_value, args.rows, args.kv_heads, D, kBoxRows), maps.chunk_value);
    }
    if (error == cudaSuccess) {
      error =
          make(ShapeOf(args.chunk_key, args.rows, args.kv_heads, D, kTile), maps.chunk_key_tile);
    }
    if (error == cudaSuccess) {
      error = make(ShapeOf(args.chunk_value, args.rows, args.kv_heads, D, kTile),
                   maps.chunk_value_tile);
    }
  }
  return error;
}

template <int D>
cudaError_t LaunchHeads(const PrefillAttentionArgs& args, const AttentionResult& result,
                        const LaunchContext& context) {
  constexpr int kBytes = sizeof(PrefillShared<D>) + 1024;
  constexpr int kRows = kConsumers * kGroupRows;
  const auto kernel = HopperPrefillKernel<D>;
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (configured != cudaSuccess) return configured;
  PrefillMaps maps = {};
  const cudaError_t made = MakeMaps<D>(args, maps);
  if (made != cudaSuccess) return made;
  const int64_t tokens = int64_t{args.history_tokens} + args.rows;
  const int64_t heads = std::max<int64_t>(1, kSectionBytes / (tokens * D * 2 * 2));
  const int32_t group = args.query_heads / args.kv_heads;
  PrefillSchedule schedule;
  schedule.row_blocks = (args.rows + kRows - 1) / kRows;
  schedule.pairs = schedule.row_blocks * args.query_heads;
  schedule.section_heads = static_cast<int32_t>(std::min<int64_t>(heads * group, args.query_heads));
  schedule.whole_tiles = args.chunk_key.data != nullptr;
  const int blocks = std::min(schedule.pairs, context.multiprocessors);
  kernel<<<blocks, (kConsumers + 1) * kWarpgroup, kBytes, context.stream>>>(
      args, result, maps, schedule, context.tickets);
  return cudaGetLastError();
}

}  // namespace

bool IsForHopper(const PrefillAttentionArgs& args, const LaunchContext& context) {
  const DType dtype = context.activation_dtype;
  const bool history = args.history_tokens > 0;
  const bool chunk = args.chunk_key.data != nullptr;
  if (!history && !chunk) return false;
  // Without history nothing is rounded if the view's type holds the activations'.
  const bool same = args.history.dtype == dtype || (!history && args.history.dtype == DType::kF32);
  const bool shapes =
      dtype == DType::kBf16 && same && args.rotation.inverse_frequency == nullptr &&
      (args.head_dim == 64 || args.head_dim == 128) && args.scale > 0 &&
      (!history || (IsAligned(args.history) && HoldsBoxes(args.history, kBoxRows))) &&
      IsAligned(args.query, dtype) && (args.out.data == nullptr || IsAligned(args.out, dtype)) &&
      (!chunk || (IsAligned(args.chunk_key, dtype) && IsAligned(args.chunk_value, dtype)));
  static const bool built = IsBuilt(HopperPrefillKernel<128>);
  return shapes && built && context.ticket_count >= 2;
}

cudaError_t LaunchOnHopper(const PrefillAttentionArgs& args, const LaunchContext& context) {
  const AttentionResult result{.out = args.out,
                               .dtype = context.activation_dtype,
                               .partial = args.partial,
                               .accumulate = args.accumulate,
                               .log_sum_exp = args.log_sum_exp,
                               .query_heads = args.query_heads,
                               .head_dim = args.head_dim};
  return args.head_dim == 64 ? LaunchHeads<64>(args, result, context)
                             : LaunchHeads<128>(args, result, context);
}

}  // namespace kvsweep::cuda
