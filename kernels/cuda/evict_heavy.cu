// H2O's step after decode attention, fused: a block (or, where there are many slots, several that
// share their memory, a cluster) takes one row and KV head, updates the scores of all its slots,
// finds the least of the heavy ones on the way, and puts the new token in its place. Its time is
// that of memory's answers in turn, so whatever may be needed is asked for at once: where slots
// lie, ahead of the earlier kernel's end; then probabilities, scores, positions and both rows that
// may move. A warp stands still at the first use of an answer, if only to convert or add it, so
// nothing is used before all is asked for. After one reduction nothing is left but to write.
// Instructions that run once are waited for too, so the usual case has a kernel without the
// others'.
#include <cmath>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;  // slots that a thread has under way
constexpr unsigned kClusterBlocks = 8;
// From so many slots on a cluster is worth its barriers: a block goes three times through memory.
constexpr int64_t kClusterSlots = 3 * kBatch * kThreads;
constexpr int32_t kNowhere = -1;

// One row and KV head.
struct Head {
  const EvictHeavyArgs& args;
  int64_t row;
  int32_t head;
  int32_t query_position;  // of the new token
  HeavyScoring scoring;
  int32_t heavy_begin;  // slots of which one may leave
  int32_t heavy_end;
  bool same_places;  // of scores and positions

  __device__ bool IsHeavy(int32_t slot) const { return slot >= heavy_begin && slot < heavy_end; }
  __device__ float& ScoreAt(int64_t offset) const {
    return static_cast<float*>(args.score.data)[offset];
  }
  __device__ int32_t& PositionAt(int64_t offset) const {
    return static_cast<int32_t*>(args.slot_position.data)[offset];
  }
  __device__ int64_t ScoreOffset(int32_t slot) const {
    return SlotOffset(args.score, row, slot, head);
  }
  __device__ int64_t PositionOffset(int32_t slot) const {
    return SlotOffset(args.slot_position, row, slot, head);
  }
  __device__ int32_t& Rank(int32_t slot) const {
    return static_cast<int32_t*>(args.rank.data)[SlotOffset(args.rank, row, slot, head)];
  }

  __device__ int32_t group() const { return args.query_heads / args.kv_heads; }
  // What slot `slot` (the new token: the number stored) received from query q of the group.
  __device__ float Probability(int32_t q, int32_t slot) const {
    return args.probability[(row * args.query_heads + int64_t{head} * group() + q) *
                                args.probability_stride +
                            slot];
  }
  // What it received from queries before and from this one, neither of them negative.
  __device__ float Received(float before, float probability) const {
    return scoring.group_maximum ? fmaxf(before, probability) : before + probability;
  }
  __device__ float Kept(float value) const {
    return scoring.half ? RoundTo(DType::kF16, value) : value;
  }
  // What a slot of this score and position is compared by.
  __device__ float Worth(float score, int32_t position) const {
    if (!scoring.mean) return score;
    return score / static_cast<float>(query_position + 1 - position);
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

// Of a warp, in all its lanes: positions differ, so one lane owns the least.
__device__ __forceinline__ Least WarpLeast(const Least& mine) {
  const uint32_t key = mine.slot == kNowhere ? ~0u : OrderedKey(mine.worth);
  const uint32_t least = __reduce_min_sync(~0u, key);
  const uint32_t later =
      key == least && mine.slot != kNowhere ? static_cast<uint32_t>(mine.position) + 1u : 0u;
  const uint32_t latest = __reduce_max_sync(~0u, later);
  const int owner =
      __ffs(static_cast<int>(__ballot_sync(~0u, key == least && later == latest))) - 1;
  return {__shfl_sync(~0u, mine.worth, owner), __shfl_sync(~0u, mine.position, owner),
          __shfl_sync(~0u, mine.slot, owner)};
}

// Of the block, in all threads. Behind its barrier all that any thread read or wrote before is
// done.
__device__ Least BlockLeast(const Least& mine) {
  __shared__ Least of_warp[kWarps];
  const Least warp = WarpLeast(mine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = warp;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return WarpLeast(lane < kWarps ? of_warp[lane] : Least{});
}

// Of all blocks of the team, in all threads; its barriers are as BlockLeast's.
__device__ Least TeamLeast(const Team& team, const Least& mine) {
  const Least block = BlockLeast(mine);
  if (team.size == 1) return block;
  __shared__ Least of_block;
  if (threadIdx.x == 0) of_block = block;
  team.Meet();
  const int lane = threadIdx.x % 32;
  const Least least = WarpLeast(lane < team.size ? team.Of(of_block, lane) : Least{});
  team.Meet();  // no block ends while others read what it shares
  return least;
}

// What each thread holds of the rows that may move: elements of a key, then of its value.
constexpr int kElements = 2;  // of a thread; 2 d <= kElements * kThreads

// An element as it lies in memory, in the lowest bits: not touched before it is stored.
__device__ __forceinline__ uint32_t LoadBits(const void* pool, DType dtype, int64_t index) {
  switch (ElementBytes(dtype)) {
    case 4:
      return static_cast<const uint32_t*>(pool)[index];
    case 2:
      return static_cast<const uint16_t*>(pool)[index];
    default:
      return static_cast<const uint8_t*>(pool)[index];
  }
}

__device__ __forceinline__ float FromBits(uint32_t bits, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return __uint_as_float(bits);
    case DType::kBf16:
      return __uint_as_float(bits << 16);
    case DType::kF16:
      return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    default:
      return WidenFp8(static_cast<uint8_t>(bits));
  }
}

// Elements of a row of the view, or of the new token.
struct MovedRow {
  uint32_t element[kElements];

  // load(is_value, column)
  template <typename LoadOne>
  __device__ __forceinline__ void Load(int32_t d, const LoadOne& load) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int32_t i = threadIdx.x + e * kThreads;
      if (i < 2 * d) element[e] = load(i >= d, i < d ? i : i - d);
    }
  }
  // `dtype`: of the elements; `kept`: of the view's.
  __device__ __forceinline__ void Store(const Head& at, int32_t slot, DType dtype,
                                        DType kept) const {
    const int32_t d = at.args.head_dim;
    const KvView& view = at.args.view;
    const int64_t to = KvOffset(view, at.row, slot, at.head);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int32_t i = threadIdx.x + e * kThreads;
      if (i >= 2 * d) continue;
      std::byte* const pool = i < d ? view.key : view.value;
      const int64_t index = to + (i < d ? i : i - d);
      if (dtype == kept && ElementBytes(kept) == 2) {
        reinterpret_cast<uint16_t*>(pool)[index] = static_cast<uint16_t>(element[e]);
      } else {
        StoreElement(pool, kept, index, FromBits(element[e], dtype));
      }
    }
  }
};

// A batch of slots of one thread: base, base + kThreads, ... Loading asks for everything of the
// group's first query and uses nothing.
struct Batch {
  int64_t score[kBatch];
  int64_t position[kBatch];
  float before[kBatch];
  float received[kBatch];
  int32_t place[kBatch];  // of the heavy slots

  __device__ __forceinline__ void Find(const Head& at, int32_t base, int32_t stored) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int32_t slot = base + j * kThreads;
      if (slot >= stored) continue;
      score[j] = at.ScoreOffset(slot);
      position[j] = at.same_places ? score[j] : at.PositionOffset(slot);
    }
  }
  __device__ __forceinline__ void Load(const Head& at, int32_t base, int32_t stored) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int32_t slot = base + j * kThreads;
      if (slot >= stored) continue;
      before[j] = at.ScoreAt(score[j]);
      received[j] = at.Probability(0, slot);
      if (at.IsHeavy(slot)) place[j] = at.PositionAt(position[j]);
    }
  }
  // Adds the other queries, writes all scores but that of slot `ring`, and takes the least.
  __device__ __forceinline__ void Take(const Head& at, int32_t base, int32_t stored, int32_t ring,
                                       Least& least) {
    for (int32_t q = 1; q < at.group(); ++q) {
      float more[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t slot = base + j * kThreads;
        more[j] = slot < stored ? at.Probability(q, slot) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) received[j] = at.Received(received[j], more[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int32_t slot = base + j * kThreads;
      if (slot >= stored) continue;
      const float kept = at.Kept(before[j] * at.scoring.decay + received[j]);
      if (slot != ring) at.ScoreAt(score[j]) = kept;
      if (at.IsHeavy(slot)) least.Take({at.Worth(kept, place[j]), place[j], slot});
    }
  }
};

// kUsual: IsUsual.
template <bool kUsual>
__global__ void __launch_bounds__(kThreads, kUsual ? 3 : 2)
    EvictHeavyKernel(const __grid_constant__ EvictHeavyArgs args, DType activation_dtype) {
  const DType dtype = kUsual ? DType::kBf16 : activation_dtype;
  const DType kept_dtype = kUsual ? DType::kBf16 : args.view.dtype;
  HeavyScoring scoring = args.scoring;
  if (kUsual) scoring.group_maximum = scoring.half = scoring.mean = false;
  ReleaseLaterKernels();
  const Team team = ClusterTeam();
  const int32_t pair = static_cast<int32_t>(blockIdx.x) / team.size;
  const int32_t first_slot = team.rank * kBatch * kThreads + static_cast<int>(threadIdx.x);
  const int64_t row = pair / args.kv_heads;
  const bool active = IsActive(args.row_active, row);
  const int32_t position = args.position[row];
  const int32_t heavy = args.heavy[row];
  const int32_t recent = args.recent[row];
  const bool scored = kUsual || args.score.data != nullptr;
  const bool placed = kUsual || args.slot_position.data != nullptr;
  const bool ranked = !kUsual && args.rank.data != nullptr;
  const int32_t sinks = min(args.sinks, heavy);
  const bool full = position >= heavy + recent;
  const Head at{.args = args,
                .row = row,
                .head = pair % args.kv_heads,
                .query_position = position,
                .scoring = scoring,
                .heavy_begin = sinks,
                .heavy_end = full ? heavy : 0,
                .same_places = kUsual};
  const int32_t stored = active ? KvLength(args.view, row, at.head) : 0;
  // The slot that the new token takes from the window is known at once.
  const int32_t ring =
      active && full && recent > 0 ? heavy + (position - heavy) % recent : kNowhere;
  const int64_t ring_row = ring == kNowhere ? 0 : KvOffset(args.view, row, ring, at.head);
  const int64_t ring_score = ring == kNowhere || !scored ? 0 : at.ScoreOffset(ring);
  const int64_t ring_place = kUsual                        ? ring_score
                             : ring == kNowhere || !placed ? 0
                                                           : at.PositionOffset(ring);
  Batch batch;
  if (scored) batch.Find(at, first_slot, stored);
  WaitForEarlierKernels();
  if (!active) return;

  if (scored) batch.Load(at, first_slot, stored);
  MovedRow fresh;
  fresh.Load(args.head_dim, [&](bool is_value, int32_t column) {
    const Activations& from = is_value ? args.value : args.key;
    return LoadBits(from.data, dtype,
                    row * from.stride + int64_t{at.head} * args.head_dim + column);
  });
  MovedRow leaving;
  if (ring != kNowhere) {
    leaving.Load(args.head_dim, [&](bool is_value, int32_t column) {
      return LoadBits(is_value ? args.view.value : args.view.key, kept_dtype, ring_row + column);
    });
  }
  const int32_t ring_position = ring != kNowhere && placed ? at.PositionAt(ring_place) : 0;
  float new_received = 0.0f;
  float ring_received = 0.0f;
  float ring_before = 0.0f;
  Least mine;
  if (scored) {
    new_received = at.Probability(0, stored);
    if (ring != kNowhere) {
      ring_received = at.Probability(0, ring);
      ring_before = at.ScoreAt(ring_score);
    }
    // The window's slot was read for all threads: nobody writes it before everybody has.
    batch.Take(at, first_slot, stored, ring, mine);
    const int32_t stride = team.size * kBatch * kThreads;
    for (int32_t base = first_slot + stride; base < stored; base += stride) {
      batch.Find(at, base, stored);
      batch.Load(at, base, stored);
      batch.Take(at, base, stored, ring, mine);
    }
    for (int32_t q = 1; q < at.group(); ++q) {
      const float to_new = at.Probability(q, stored);
      const float to_ring = ring != kNowhere ? at.Probability(q, ring) : 0.0f;
      new_received = at.Received(new_received, to_new);
      ring_received = at.Received(ring_received, to_ring);
    }
  }
  const float new_score = at.Kept(new_received);
  const float kept_ring_score = at.Kept(ring_before * scoring.decay + ring_received);
  const Least least = TeamLeast(team, mine);

  int32_t target = position;  // of the new token
  int32_t leaves = position;  // slot of the token that leaves
  if (full) {
    leaves = least.slot;
    target = least.slot;
    if (recent == 0) {
      if (least.slot == kNowhere || (!args.promote && !(new_score > least.worth))) return;
    } else {
      target = ring;
      const bool displaces =
          least.slot != kNowhere &&
          (args.promote || least.worth < at.Worth(kept_ring_score, ring_position));
      if (!displaces) leaves = target;
    }
    if (ranked) {
      const int32_t gone = at.Rank(leaves);
      const int32_t moved = at.Rank(target);
      team.Meet();  // all threads have read the ranks that now change
      for (int32_t slot = team.rank * kThreads + static_cast<int>(threadIdx.x);
           slot < heavy + recent; slot += team.size * kThreads) {
        const int32_t rank = slot == leaves ? moved : at.Rank(slot);
        at.Rank(slot) = slot == target ? heavy + recent - 1 : rank - (rank > gone ? 1 : 0);
      }
    }
  } else if (ranked && team.rank == 0 && threadIdx.x == 0) {
    at.Rank(position) = position;
  }
  if (team.rank != 0) return;
  if (leaves != target) leaving.Store(at, leaves, kept_dtype, kept_dtype);
  fresh.Store(at, target, dtype, kept_dtype);
  if (threadIdx.x != 0) return;
  if (scored) {
    if (leaves != target) at.ScoreAt(at.ScoreOffset(leaves)) = kept_ring_score;
    at.ScoreAt(at.ScoreOffset(target)) = new_score;
  }
  if (placed) {
    if (leaves != target) at.PositionAt(at.PositionOffset(leaves)) = ring_position;
    at.PositionAt(at.PositionOffset(target)) = position;
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

namespace {

bool HaveSamePlaces(const SlotView& one, const SlotView& other) {
  return one.block_size == other.block_size && one.block_stride == other.block_stride &&
         one.head_stride == other.head_stride && one.block_table == other.block_table &&
         one.block_table_stride == other.block_table_stride;
}

// The paper's scores, of rows of bf16 whose keys have been turned by their own positions.
bool IsUsual(const EvictHeavyArgs& args, const LaunchContext& context) {
  const HeavyScoring& scoring = args.scoring;
  return context.activation_dtype == DType::kBf16 && args.view.dtype == DType::kBf16 &&
         args.score.data != nullptr && args.slot_position.data != nullptr &&
         HaveSamePlaces(args.score, args.slot_position) && args.rank.data == nullptr &&
         !scoring.group_maximum && !scoring.half && !scoring.mean;
}

}  // namespace

cudaError_t Launch(const EvictHeavyArgs& args, const LaunchContext& context) {
  if (2 * args.head_dim > kElements * kThreads) return cudaErrorInvalidValue;
  const auto pairs = static_cast<unsigned>(args.rows * args.kv_heads);
  const bool many = context.architecture >= 90 && args.probability_stride > kClusterSlots;
  const unsigned cluster = many ? kClusterBlocks : 1;
  const auto kernel = IsUsual(args, context) ? EvictHeavyKernel<true> : EvictHeavyKernel<false>;
  return LaunchDependentClusters(context, kernel, pairs * cluster, kThreads, 0, cluster, args,
                                 context.activation_dtype);
}

}  // namespace kvsweep::cuda
