// The tokens with the largest margins of each row and KV head, ascending. A block of its own for
// each, or for long rows several that share their memory (a cluster), reads the margins once and
// keeps them in registers: a count over equal parts of their range finds the part in which the last
// one lies, and the few that lie there are compared one with another. Rows of which too many lie
// there, or that are longer than that, go the old way: byte by byte from the second-level cache.
#include <algorithm>
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

// Half the most there can be: two blocks share a multiprocessor.
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// Margins that a thread holds: of short rows, of long ones.
constexpr int kFewItems = 8;
constexpr int kManyItems = 32;
constexpr int kMostBlocks = 8;  // of a row and head
constexpr int kOwnBins = 4;     // of a thread
constexpr int kBins = kOwnBins * kThreads;
constexpr int kMostCandidates = kThreads;

// What a block keeps in shared memory; the others of its team read it.
struct Scratch {
  SelectScratch select;
  alignas(16) uint32_t bin[kBins];      // read by fours
  uint32_t candidate[kMostCandidates];  // keys in the bin that was found
  uint32_t joined[kMostCandidates];     // the same of all blocks
  int32_t candidates;
  uint2 range_of_warp[kWarps];  // smallest and largest key
  uint2 range;
  int2 of_warp[kWarps];  // keys above the threshold, keys equal to it
  int2 of_block;
  int32_t found_bin;
  int32_t found_larger;  // keys in bins of larger ones
  int32_t found_within;
  Threshold threshold;
};

__device__ __forceinline__ bool Selects(const SelectTopArgs& args, int64_t row) {
  return IsActive(args.row_active, row) && args.length[row] > 0;
}

// How many entries a selecting row and head take, `most` at most; each warp finds it for itself.
// Integers, so the order of the sums does not matter.
__device__ __forceinline__ int32_t SelectedCount(const SelectTopArgs& args, int64_t row,
                                                 int32_t head, int32_t most) {
  int64_t wanted;
  if (args.wanted != nullptr) {
    wanted = args.wanted[row];
  } else if (args.scope == SelectionScope::kHead) {
    wanted = args.count[row * args.kv_heads + head];
  } else {
    const bool batch = args.scope == SelectionScope::kBatch;
    const int32_t first = batch ? 0 : static_cast<int32_t>(row) * args.kv_heads;
    const int32_t end = batch ? args.rows * args.kv_heads : first + args.kv_heads;
    uint64_t counted = 0;
    int32_t pairs = 0;
    for (int32_t i = first + static_cast<int32_t>(threadIdx.x % 32); i < end; i += 32) {
      if (batch && !Selects(args, i / args.kv_heads)) continue;
      counted += static_cast<uint32_t>(args.count[i]);
      ++pairs;
    }
    // In two halves that 32 lanes cannot overflow.
    const uint32_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(counted & 0xffffffu));
    const uint32_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(counted >> 24));
    wanted = static_cast<int64_t>(low + (uint64_t{high} << 24)) / __reduce_add_sync(~0u, pairs);
  }
  return static_cast<int32_t>(max(int64_t{1}, min(wanted, int64_t{most})));
}

// Marks what has been selected in the slots' memory of their use. For one block.
__device__ void MarkUse(const SelectTopArgs& args, int64_t row, int32_t head, int32_t length,
                        int32_t selected, const int32_t* index) {
  int32_t* const use = static_cast<int32_t*>(args.use.data);
  bool saturated = false;
  for (int32_t j = threadIdx.x; j < selected; j += kThreads) {
    int32_t& mark = use[SlotOffset(args.use, row, __ldcg(index + j), head)];
    mark = args.use_rule == SlotUse::kStamp ? args.stamp[row] : mark + 1;
    saturated |= args.use_rule == SlotUse::kCount && mark >= args.use_limit;
  }
  if (__syncthreads_or(saturated ? 1 : 0) == 0) return;
  for (int32_t t = threadIdx.x; t < length; t += kThreads) {
    use[SlotOffset(args.use, row, t, head)] /= 2;
  }
}

// The run of a row's tokens that a warp owns, so that warps in order write in order.
struct Run {
  int32_t begin;
  int32_t end;
  int32_t share;  // tokens of a run, a multiple of 32

  // A team is a power of two.
  __device__ __forceinline__ Run(const Team& team, int32_t length) {
    const int32_t threads = team.size * kThreads;
    share = (length + threads - 1) >> (31 - __clz(threads)) << 5;
    begin = min((team.rank * kWarps + static_cast<int32_t>(threadIdx.x / 32)) * share, length);
    end = min(begin + share, length);
  }
};

// Calls body(j, t, key) for each key in registers, of token t; beyond the run's end it is 0.
template <int kItems, typename Body>
__device__ __forceinline__ void ForHeld(const Run& run, const uint32_t (&held)[kItems],
                                        const Body& body) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (kItems > kFewItems && j * 32 >= run.share) break;
    body(j, run.begin + j * 32 + static_cast<int32_t>(threadIdx.x % 32), held[j]);
  }
}

// The key that OrderedKey made of a float.
__device__ __forceinline__ float OfKey(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// The threshold of keys in registers; false if they do not spread.
template <int kItems>
__device__ bool FindByRange(Scratch& scratch, const Team& team, const Run& run,
                            const uint32_t (&held)[kItems], int32_t wanted, Threshold& threshold) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  uint32_t smallest = ~0u;
  uint32_t largest = 0;
  ForHeld(run, held, [&](int, int32_t t, uint32_t key) {
    if (t >= run.end) return;
    smallest = min(smallest, key);
    largest = max(largest, key);
  });
  smallest = __reduce_min_sync(~0u, smallest);
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) scratch.range_of_warp[warp] = make_uint2(smallest, largest);
  for (int i = threadIdx.x; i < kBins; i += kThreads) scratch.bin[i] = 0;
  if (threadIdx.x == 0) scratch.candidates = 0;
  __syncthreads();
  smallest = __reduce_min_sync(~0u, scratch.range_of_warp[lane % kWarps].x);
  largest = __reduce_max_sync(~0u, scratch.range_of_warp[lane % kWarps].y);
  if (team.size > 1) {
    if (threadIdx.x == 0) scratch.range = make_uint2(smallest, largest);
    team.Meet();
    for (int other = 0; other < team.size; ++other) {
      const uint2 range = team.Of(scratch.range, other);
      smallest = min(smallest, range.x);
      largest = max(largest, range.y);
    }
  }
  const float top = OfKey(largest);
  const float scale = static_cast<float>(kBins - 1) / (top - OfKey(smallest));
  if (!(scale > 0.0f && isfinite(scale))) return false;
  const auto bin_of = [&](uint32_t key) {
    return min(static_cast<int32_t>((top - OfKey(key)) * scale), kBins - 1);
  };
  ForHeld(run, held, [&](int, int32_t t, uint32_t key) {
    if (t < run.end) atomicAdd(&scratch.bin[bin_of(key)], 1u);
  });
  team.Meet();
  // A thread owns neighbouring bins, counted from that of the largest keys on.
  int32_t own[kOwnBins] = {};
  for (int other = 0; other < team.size; ++other) {
    const uint4 four = team.Of(reinterpret_cast<uint4*>(scratch.bin)[threadIdx.x], other);
    const uint32_t counts[kOwnBins] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) own[i] += static_cast<int32_t>(counts[i]);
  }
  int32_t total;
  int32_t before = BlockScan<kThreads>(scratch.select, own[0] + own[1] + own[2] + own[3], total);
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) {
    if (before < wanted && before + own[i] >= wanted) {
      scratch.found_bin = kOwnBins * static_cast<int32_t>(threadIdx.x) + i;
      scratch.found_larger = before;
      scratch.found_within = own[i];
    }
    before += own[i];
  }
  __syncthreads();
  const int32_t within = scratch.found_within;
  if (within > kMostCandidates) return false;
  const int32_t found_bin = scratch.found_bin;
  const int32_t left = wanted - scratch.found_larger;
  ForHeld(run, held, [&](int, int32_t t, uint32_t key) {
    if (t < run.end && bin_of(key) == found_bin) {
      scratch.candidate[atomicAdd(&scratch.candidates, 1)] = key;
    }
  });
  team.Meet();
  const uint32_t* candidate = scratch.candidate;
  if (team.size > 1) {
    int32_t first = 0;
    for (int other = 0; other < team.size; ++other) {
      const int32_t count = team.Of(scratch.candidates, other);
      if (threadIdx.x < count) {
        scratch.joined[first + threadIdx.x] = team.Of(scratch.candidate[threadIdx.x], other);
      }
      first += count;
    }
    __syncthreads();
    candidate = scratch.joined;
  }
  if (threadIdx.x < within) {
    const uint32_t key = candidate[threadIdx.x];
    int32_t larger = 0;
    int32_t equal = 0;
    bool is_first = true;  // of the equal ones
    for (int32_t i = 0; i < within; ++i) {
      larger += candidate[i] > key ? 1 : 0;
      equal += candidate[i] == key ? 1 : 0;
      is_first &= candidate[i] != key || i >= static_cast<int32_t>(threadIdx.x);
    }
    if (is_first && larger < left && larger + equal >= left) {
      scratch.threshold = {key, left - larger};
    }
  }
  __syncthreads();
  threshold = scratch.threshold;
  return true;
}

// Where slots have positions of their own, the ties that belong are those with the lowest: how old
// a slot's token is, and the age from which on they belong.
__device__ __forceinline__ uint32_t Age(const SelectTopArgs& args, int64_t row, int32_t head,
                                        int32_t t) {
  const int32_t* const position = static_cast<const int32_t*>(args.slot_position.data);
  return ~static_cast<uint32_t>(position[SlotOffset(args.slot_position, row, t, head)]);
}
__device__ __noinline__ uint32_t FindYoungest(SelectScratch& scratch, const SelectTopArgs& args,
                                              int64_t row, int32_t head, int32_t length,
                                              const float* margin, const Threshold& threshold) {
  return FindThreshold<kThreads>(
             scratch, length, threshold.ties,
             [&](int32_t t) {
               return OrderedKey(margin[t]) == threshold.key ? Age(args, row, head, t) : 0u;
             })
      .key;
}

// Tokens above the threshold, and equal to it, of all warps ahead of this one; each warp has
// counted its own.
__device__ __forceinline__ int2 CountAhead(Scratch& scratch, const Team& team, int2 own) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (lane == 0) scratch.of_warp[warp] = own;
  __syncthreads();
  int2 ahead = lane < kWarps ? scratch.of_warp[lane] : make_int2(0, 0);
  if (team.size > 1) {
    if (warp == 0) {
      const int32_t all_larger = __reduce_add_sync(~0u, ahead.x);
      const int32_t all_equal = __reduce_add_sync(~0u, ahead.y);
      if (lane == 0) scratch.of_block = make_int2(all_larger, all_equal);
    }
    team.Meet();
  }
  if (lane >= warp) ahead = make_int2(0, 0);
  for (int other = lane; other < team.rank; other += 32) {
    const int2 of_block = team.Of(scratch.of_block, other);
    ahead.x += of_block.x;
    ahead.y += of_block.y;
  }
  return make_int2(__reduce_add_sync(~0u, ahead.x), __reduce_add_sync(~0u, ahead.y));
}

// Where a warp writes its tokens.
struct Writer {
  int32_t* index;
  int32_t written;
  int32_t ties;  // left to take

  __device__ __forceinline__ Writer(int32_t* index, int2 ahead, const Threshold& threshold)
      : index(index),
        written(ahead.x + min(ahead.y, threshold.ties)),
        ties(max(threshold.ties - ahead.y, 0)) {}
  // Of 32 tokens, this lane's being t: those whose bits say that they are above the threshold, and
  // the first of those that are equal to it.
  __device__ __forceinline__ void Write(int32_t t, uint32_t larger, uint32_t equal) {
    const int32_t takes = min(__popc(equal), ties);
    if ((larger | equal) != 0) {
      const uint32_t own = 1u << threadIdx.x % 32;
      const int32_t rank = __popc(equal & (own - 1));
      if ((larger & own) != 0 || ((equal & own) != 0 && rank < takes)) {
        index[written + __popc(larger & (own - 1)) + min(rank, takes)] = t;
      }
    }
    written += __popc(larger) + takes;
    ties -= takes;
  }
};

// Writes the tokens above the threshold and those of its ties that belong, ascending.
// is_tied(t, key)
template <int kItems, typename IsTied>
__device__ __forceinline__ void WriteSelected(Scratch& scratch, const Team& team, const Run& run,
                                              const uint32_t (&held)[kItems],
                                              const Threshold& threshold, int32_t* index,
                                              const IsTied& is_tied) {
  uint32_t larger[kItems];
  uint32_t equal[kItems];
  int2 own = make_int2(0, 0);
  ForHeld(run, held, [&](int j, int32_t t, uint32_t key) {
    larger[j] = __ballot_sync(~0u, key > threshold.key);
    equal[j] = __ballot_sync(~0u, t < run.end && is_tied(t, key));
    own.x += __popc(larger[j]);
    own.y += __popc(equal[j]);
  });
  Writer writer(index, CountAhead(scratch, team, own), threshold);
  ForHeld(run, held, [&](int j, int32_t t, uint32_t) { writer.Write(t, larger[j], equal[j]); });
}

// All of it from memory. For one block.
__device__ __noinline__ void SelectFromMemory(Scratch& scratch, const SelectTopArgs& args,
                                              int64_t row, int32_t head, int32_t length,
                                              const float* margin, int32_t selected,
                                              int32_t* index) {
  const Run run({1, 0}, length);
  const Threshold threshold = FindThreshold<kThreads>(
      scratch.select, length, selected, [&](int32_t t) { return OrderedKey(margin[t]); });
  const bool placed = args.slot_position.data != nullptr;
  const uint32_t youngest =
      placed ? FindYoungest(scratch.select, args, row, head, length, margin, threshold) : 0;
  const auto for_tokens = [&](const auto& body) {
    const int32_t lane = threadIdx.x % 32;
    for (int32_t t = run.begin + lane; t - lane < run.end; t += 32) {
      const uint32_t key = t < run.end ? OrderedKey(margin[t]) : 0;
      const bool tied =
          t < run.end && key == threshold.key && (!placed || Age(args, row, head, t) >= youngest);
      body(t, __ballot_sync(~0u, key > threshold.key), __ballot_sync(~0u, tied));
    }
  };
  int2 own = make_int2(0, 0);
  for_tokens([&](int32_t, uint32_t larger, uint32_t equal) {
    own.x += __popc(larger);
    own.y += __popc(equal);
  });
  Writer writer(index, CountAhead(scratch, {1, 0}, own), threshold);
  for_tokens([&](int32_t t, uint32_t larger, uint32_t equal) { writer.Write(t, larger, equal); });
}

// kSlots: slots have positions of their own, or remember their use.
template <int kItems, bool kSlots>
__global__ void __launch_bounds__(kThreads)
    SelectTopKernel(const __grid_constant__ SelectTopArgs args) {
  __shared__ Scratch scratch;
  ReleaseLaterKernels();
  Team team = ClusterTeam();
  const int32_t pair = static_cast<int32_t>(blockIdx.x) / team.size;
  const int32_t row = pair / args.kv_heads;
  const int32_t head = pair % args.kv_heads;
  const bool selects = Selects(args, row);
  const int32_t stored = selects ? args.length[row] : 0;
  const int32_t most = selects ? min(args.limit[row], stored) : 0;
  // Should a length or a limit be larger than its array, nothing outside is touched.
  const auto length = static_cast<int32_t>(min(int64_t{stored}, args.margin_stride));
  constexpr int32_t kBlockItems = kItems * kThreads;
  // Short rows are one block's, and so are those that all blocks together cannot hold.
  const bool held = length <= team.size * kBlockItems;
  const bool rests = team.size > 1 && (length <= kBlockItems || !held) && team.rank > 0;
  if (length <= kBlockItems || !held) team.size = 1;
  const float* const margin = args.margin + pair * args.margin_stride;
  int32_t* const index = args.index + pair * args.index_stride;
  const Run run(team, length);
  WaitForEarlierKernels();
  if (rests) return;
  if (!selects) {
    if (team.rank == 0 && threadIdx.x == 0) args.selected[pair] = 0;
    return;
  }
  float value[kItems];
  if (held) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int32_t t = run.begin + j * 32 + static_cast<int32_t>(threadIdx.x % 32);
      value[j] = t < run.end ? margin[t] : 0.0f;
    }
  }
  const int32_t wanted = SelectedCount(args, row, head, most);
  const int32_t selected =
      static_cast<int32_t>(min(int64_t{min(wanted, length)}, args.index_stride));
  if (team.rank == 0 && threadIdx.x == 0) args.selected[pair] = wanted;
  if (selected == length) {
    for (int32_t t = run.begin + threadIdx.x % 32; t < run.end; t += 32) index[t] = t;
  } else {
    uint32_t key[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int32_t t = run.begin + j * 32 + static_cast<int32_t>(threadIdx.x % 32);
      key[j] = t < run.end ? OrderedKey(value[j]) : 0;
    }
    Threshold threshold;
    if (held && FindByRange(scratch, team, run, key, selected, threshold)) {
      const bool placed = kSlots && args.slot_position.data != nullptr;
      uint32_t youngest = 0;
      if (placed) {
        youngest = FindYoungest(scratch.select, args, row, head, length, margin, threshold);
      }
      WriteSelected(scratch, team, run, key, threshold, index, [&](int32_t t, uint32_t k) {
        return k == threshold.key && (!placed || Age(args, row, head, t) >= youngest);
      });
    } else if (team.rank == 0) {
      SelectFromMemory(scratch, args, row, head, length, margin, selected, index);
    }
  }
  const bool marks = kSlots && args.use_rule != SlotUse::kNone;
  // Behind this nobody reads another's memory.
  if (team.size > 1 || marks) team.Meet();
  if (marks && team.rank == 0) MarkUse(args, row, head, length, selected, index);
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const SelectTopArgs& args, const LaunchContext& context) {
  const auto pairs = static_cast<unsigned>(args.rows * args.kv_heads);
  const bool slots = args.slot_position.data != nullptr || args.use_rule != SlotUse::kNone;
  if (args.margin_stride <= kFewItems * kThreads) {
    return LaunchDependent(
        context, slots ? SelectTopKernel<kFewItems, true> : SelectTopKernel<kFewItems, false>,
        pairs, kThreads, 0, args);
  }
  unsigned blocks = 1;  // of a row and head
  while (context.architecture >= 90 && blocks < kMostBlocks &&
         blocks * int64_t{kManyItems * kThreads} < args.margin_stride) {
    blocks *= 2;
  }
  return LaunchDependentClusters(
      context, slots ? SelectTopKernel<kManyItems, true> : SelectTopKernel<kManyItems, false>,
      pairs * blocks, kThreads, 0, blocks, args);
}

}  // namespace kvsweep::cuda
