// H2O's step after decode attention, fused: a block takes one row and KV head, updates the scores
// of all its slots, finds the least of the heavy ones on the way, and puts the new token in its
// place.
#include <cmath>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kNowhere = -1;

// One row and KV head.
struct Head {
  const EvictHeavyArgs& args;
  int64_t row;
  int32_t head;

  __device__ float& Score(int32_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, row, slot, head)];
  }
  __device__ int32_t& Position(int32_t slot) const {
    return static_cast<int32_t*>(
        args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)];
  }
  __device__ int32_t& Rank(int32_t slot) const {
    return static_cast<int32_t*>(args.rank.data)[SlotOffset(args.rank, row, slot, head)];
  }

  // What slot `slot` (the new token: the number stored) received from the group's queries.
  __device__ float Received(int32_t slot) const {
    const int32_t group = args.query_heads / args.kv_heads;
    const float* const line =
        args.probability +
        (row * args.query_heads + int64_t{head} * group) * args.probability_stride + slot;
    float received = 0.0f;
    for (int32_t q = 0; q < group; ++q) {
      const float probability = line[q * args.probability_stride];
      received = args.scoring.group_maximum ? fmaxf(received, probability) : received + probability;
    }
    return received;
  }
  __device__ float Kept(float value) const {
    return args.scoring.half ? RoundTo(DType::kF16, value) : value;
  }
  // What a slot of this score is compared by.
  __device__ float Worth(float score, int32_t slot) const {
    if (!args.scoring.mean) return score;
    return score / static_cast<float>(args.position[row] + 1 - Position(slot));
  }
};

// The slot of least worth so far; on ties the one with the highest position.
struct Least {
  float worth = INFINITY;
  int32_t position = -1;
  int32_t slot = kNowhere;

  __device__ void Take(const Least& other) {
    const bool less = other.worth < worth || (other.worth == worth && other.position > position);
    if (other.slot != kNowhere && (slot == kNowhere || less)) *this = other;
  }
};

__device__ Least BlockLeast(Least mine) {
  __shared__ Least of_warp[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    Least other;
    other.worth = __shfl_xor_sync(~0u, mine.worth, offset);
    other.position = __shfl_xor_sync(~0u, mine.position, offset);
    other.slot = __shfl_xor_sync(~0u, mine.slot, offset);
    mine.Take(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Least all = of_warp[0];
  for (int w = 1; w < kWarps; ++w) all.Take(of_warp[w]);
  return all;
}

// What each thread holds of the rows that may move: elements of a key, then of its value.
constexpr int kElements = 2;  // of a thread; 2 d <= kElements * kThreads

// Elements of the new token, and of the row in slot `slot` unless that is kNowhere.
struct MovedRows {
  float fresh[kElements];
  float leaving[kElements];

  __device__ void Load(const Head& at, int32_t slot, DType dtype) {
    const int32_t d = at.args.head_dim;
    const KvView& view = at.args.view;
    const int64_t from = slot == kNowhere ? 0 : KvOffset(view, at.row, slot, at.head);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int32_t i = threadIdx.x + e * kThreads;
      if (i >= 2 * d) continue;
      const Activations& row = i < d ? at.args.key : at.args.value;
      const int32_t column = i < d ? i : i - d;
      fresh[e] = LoadElement(row.data, dtype, at.row * row.stride + int64_t{at.head} * d + column);
      if (slot == kNowhere) continue;
      leaving[e] = LoadElement(i < d ? view.key : view.value, view.dtype, from + column);
    }
  }
  __device__ void Store(const Head& at, int32_t slot, const float (&elements)[kElements]) const {
    const int32_t d = at.args.head_dim;
    const KvView& view = at.args.view;
    const int64_t to = KvOffset(view, at.row, slot, at.head);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int32_t i = threadIdx.x + e * kThreads;
      if (i >= 2 * d) continue;
      StoreElement(i < d ? view.key : view.value, view.dtype, to + (i < d ? i : i - d),
                   elements[e]);
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    EvictHeavyKernel(const __grid_constant__ EvictHeavyArgs args, DType dtype) {
  __shared__ float shared_new_score;
  const Head at{args, blockIdx.x / args.kv_heads, static_cast<int32_t>(blockIdx.x) % args.kv_heads};
  if (!IsActive(args.row_active, at.row)) return;
  const bool scored = args.score.data != nullptr;
  const bool ranked = args.rank.data != nullptr;
  const int32_t stored = KvLength(args.view, at.row, at.head);
  const int32_t position = args.position[at.row];
  const int32_t heavy = args.heavy[at.row];
  const int32_t recent = args.recent[at.row];
  const int32_t sinks = min(args.sinks, heavy);
  const bool full = position >= heavy + recent;

  // The slot that the new token takes from the window is known at once: its row is on its way while
  // the scores are looked at.
  const int32_t ring = full && recent > 0 ? heavy + (position - heavy) % recent : kNowhere;
  MovedRows rows;
  rows.Load(at, ring, dtype);

  Least mine;
  if (scored) {
    if (threadIdx.x == 0) shared_new_score = at.Kept(at.Received(stored));
    constexpr int kBatch = 4;  // slots that a thread reads before it writes the first
    for (int32_t base = threadIdx.x; base < stored; base += kBatch * kThreads) {
      float* place[kBatch];
      float before[kBatch];
      float received[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t slot = min(base + j * kThreads, stored - 1);
        place[j] = &at.Score(slot);
        before[j] = *place[j];
        received[j] = at.Received(slot);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t slot = base + j * kThreads;
        if (slot >= stored) continue;
        const float kept = at.Kept(before[j] * args.scoring.decay + received[j]);
        *place[j] = kept;
        if (full && slot >= sinks && slot < heavy) {
          const float worth = at.Worth(kept, slot);
          // Positions are looked up where they may decide.
          if (mine.slot == kNowhere || worth <= mine.worth) {
            mine.Take({worth, at.Position(slot), slot});
          }
        }
      }
    }
  }
  const Least least = BlockLeast(mine);  // a barrier: all scores are written
  const float new_score = scored ? shared_new_score : 0.0f;

  int32_t target = position;  // of the new token
  int32_t leaves = position;  // slot of the token that leaves
  if (full) {
    leaves = least.slot;
    target = least.slot;
    if (recent == 0) {
      if (least.slot == kNowhere || (!args.promote && !(new_score > least.worth))) return;
    } else {
      target = ring;
      const bool displaces = least.slot != kNowhere &&
                             (args.promote || least.worth < at.Worth(at.Score(target), target));
      if (!displaces) leaves = target;
    }
    const int32_t gone = ranked ? at.Rank(leaves) : 0;
    const int32_t moved = ranked ? at.Rank(target) : 0;
    __syncthreads();  // all threads have decided by scores, positions and ranks that now change
    if (ranked) {
      for (int32_t slot = threadIdx.x; slot < heavy + recent; slot += kThreads) {
        const int32_t rank = slot == leaves ? moved : at.Rank(slot);
        at.Rank(slot) = slot == target ? heavy + recent - 1 : rank - (rank > gone ? 1 : 0);
      }
    }
  } else if (ranked && threadIdx.x == 0) {
    at.Rank(position) = position;
  }
  if (leaves != target) rows.Store(at, leaves, rows.leaving);
  rows.Store(at, target, rows.fresh);
  if (threadIdx.x != 0) return;
  if (scored) {
    if (leaves != target) at.Score(leaves) = at.Score(target);
    at.Score(target) = new_score;
  }
  if (args.slot_position.data != nullptr) {
    if (leaves != target) at.Position(leaves) = at.Position(target);
    at.Position(target) = position;
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const EvictHeavyArgs& args, const LaunchContext& context) {
  if (2 * args.head_dim > kElements * kThreads) return cudaErrorInvalidValue;
  EvictHeavyKernel<<<args.rows * args.kv_heads, kThreads, 0, context.stream>>>(
      args, context.activation_dtype);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
