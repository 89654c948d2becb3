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

// How many entries a selecting row and head take; each warp finds it for itself. Integers, so the
// order of the sums does not matter.
__device__ int32_t SelectedCount(const SelectTopArgs& args, int64_t row, int32_t head) {
  int64_t wanted;
  if (args.wanted != nullptr) {
    wanted = args.wanted[row];
  } else if (args.scope == SelectionScope::kHead) {
    wanted = args.count[row * args.kv_heads + head];
  } else {
    const bool batch = args.scope == SelectionScope::kBatch;
    const int32_t first = batch ? 0 : static_cast<int32_t>(row) * args.kv_heads;
    const int32_t end = batch ? args.rows * args.kv_heads : first + args.kv_heads;
    unsigned long long counted = 0;
    int32_t pairs = 0;
    for (int32_t i = first + static_cast<int32_t>(threadIdx.x % 32); i < end; i += 32) {
      if (batch && !Selects(args, i / args.kv_heads)) continue;
      counted += static_cast<unsigned long long>(args.count[i]);
      ++pairs;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      counted += __shfl_xor_sync(~0u, counted, offset);
    }
    wanted = static_cast<int64_t>(counted) / __reduce_add_sync(~0u, pairs);
  }
  const int64_t most = min(args.limit[row], args.length[row]);
  return static_cast<int32_t>(max(int64_t{1}, min(wanted, most)));
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

  __device__ Run(const Team& team, int32_t length) {
    const int32_t threads = team.size * kThreads;
    share = (length + threads - 1) / threads * 32;
    begin = min((team.rank * kWarps + static_cast<int32_t>(threadIdx.x / 32)) * share, length);
    end = min(begin + share, length);
  }
};

// Calls body(t, key) for each token of the run, whole warps at a time; beyond its end the key is 0.
// kHeld: the keys are those in registers.
template <bool kHeld, int kItems, typename Body>
__device__ __forceinline__ void ForTokens(const Run& run, const uint32_t (&held)[kItems],
                                          const float* margin, const Body& body) {
  const int32_t lane = threadIdx.x % 32;
  if constexpr (kHeld) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j * 32 >= run.share) break;
      body(run.begin + j * 32 + lane, held[j]);
    }
  } else {
    for (int32_t t = run.begin + lane; t - lane < run.end; t += 32) {
      body(t, t < run.end ? OrderedKey(margin[t]) : 0);
    }
  }
}

// The key that OrderedKey made of a float.
__device__ __forceinline__ float OfKey(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// The threshold of keys in registers; false if they do not spread.
template <int kItems>
__device__ bool FindByRange(Scratch& scratch, const Team& team, const Run& run,
                            const uint32_t (&held)[kItems], const float* margin, int32_t wanted,
                            Threshold& threshold) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  uint32_t smallest = ~0u;
  uint32_t largest = 0;
  ForTokens<true>(run, held, margin, [&](int32_t t, uint32_t key) {
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
  ForTokens<true>(run, held, margin, [&](int32_t t, uint32_t key) {
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
  ForTokens<true>(run, held, margin, [&](int32_t t, uint32_t key) {
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

// Writes the tokens above the threshold and those of its ties that belong, ascending.
template <bool kHeld, int kItems>
__device__ void WriteSelected(Scratch& scratch, const Team& team, const SelectTopArgs& args,
                              int64_t row, int32_t head, const Run& run, int32_t length,
                              const uint32_t (&held)[kItems], const float* margin,
                              const Threshold& threshold, int32_t* index) {
  // Where slots have positions of their own, the ties that belong are those with the lowest.
  const bool placed = args.slot_position.data != nullptr;
  const auto age = [&](int32_t t) {
    const int32_t* const position = static_cast<const int32_t*>(args.slot_position.data);
    return ~static_cast<uint32_t>(position[SlotOffset(args.slot_position, row, t, head)]);
  };
  uint32_t youngest = 0;
  if (placed) {
    youngest = FindThreshold<kThreads>(scratch.select, length, threshold.ties, [&](int32_t t) {
                 return OrderedKey(margin[t]) == threshold.key ? age(t) : 0u;
               }).key;
  }
  const auto is_tied = [&](int32_t t, uint32_t key) {
    return t < run.end && key == threshold.key && (!placed || age(t) >= youngest);
  };

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int32_t larger = 0;
  int32_t equal = 0;
  ForTokens<kHeld>(run, held, margin, [&](int32_t t, uint32_t key) {
    larger += __popc(__ballot_sync(~0u, t < run.end && key > threshold.key));
    equal += __popc(__ballot_sync(~0u, is_tied(t, key)));
  });
  if (lane == 0) scratch.of_warp[warp] = make_int2(larger, equal);
  __syncthreads();
  int2 of_warp = lane < kWarps ? scratch.of_warp[lane] : make_int2(0, 0);
  if (team.size > 1) {
    if (warp == 0) {
      const int32_t all_larger = __reduce_add_sync(~0u, of_warp.x);
      const int32_t all_equal = __reduce_add_sync(~0u, of_warp.y);
      if (lane == 0) scratch.of_block = make_int2(all_larger, all_equal);
    }
    team.Meet();
  }
  if (lane >= warp) of_warp = make_int2(0, 0);
  for (int other = lane; other < team.rank; other += 32) {
    const int2 of_block = team.Of(scratch.of_block, other);
    of_warp.x += of_block.x;
    of_warp.y += of_block.y;
  }
  int32_t written = __reduce_add_sync(~0u, of_warp.x);
  int32_t equal_before = __reduce_add_sync(~0u, of_warp.y);
  written += min(equal_before, threshold.ties);
  const uint32_t below = (1u << lane) - 1u;
  ForTokens<kHeld>(run, held, margin, [&](int32_t t, uint32_t key) {
    const bool ties = is_tied(t, key);
    const uint32_t tied = __ballot_sync(~0u, ties);
    const bool takes = (t < run.end && key > threshold.key) ||
                       (ties && equal_before + __popc(tied & below) < threshold.ties);
    const uint32_t taken = __ballot_sync(~0u, takes);
    if (takes) index[written + __popc(taken & below)] = t;
    written += __popc(taken);
    equal_before += __popc(tied);
  });
}

template <int kItems>
__global__ void __launch_bounds__(kThreads)
    SelectTopKernel(const __grid_constant__ SelectTopArgs args) {
  __shared__ Scratch scratch;
  ReleaseLaterKernels();
  Team team = ClusterTeam();
  const int64_t pair = blockIdx.x / team.size;
  const int64_t row = pair / args.kv_heads;
  const int32_t head = static_cast<int32_t>(pair % args.kv_heads);
  const bool selects = Selects(args, row);
  // Should a length or a limit be larger than its array, nothing outside is touched.
  const int32_t length =
      selects
          ? static_cast<int32_t>(min(static_cast<int64_t>(args.length[row]), args.margin_stride))
          : 0;
  WaitForEarlierKernels();
  constexpr int32_t kBlockItems = kItems * kThreads;
  // Short rows are one block's, and so are those that all blocks together cannot hold.
  const bool held = length <= team.size * kBlockItems;
  if (team.size > 1 && (length <= kBlockItems || !held)) {
    if (team.rank > 0) return;
    team.size = 1;
  }
  if (!selects) {
    if (team.rank == 0 && threadIdx.x == 0) args.selected[pair] = 0;
    return;
  }
  const float* const margin = args.margin + pair * args.margin_stride;
  int32_t* const index = args.index + pair * args.index_stride;
  const Run run(team, length);
  uint32_t key[kItems];
  if (held) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j * 32 >= run.share) break;
      const int32_t t = run.begin + j * 32 + static_cast<int32_t>(threadIdx.x % 32);
      key[j] = t < run.end ? OrderedKey(margin[t]) : 0;
    }
  }
  const int32_t wanted = SelectedCount(args, row, head);
  const int32_t selected =
      static_cast<int32_t>(min(static_cast<int64_t>(min(wanted, length)), args.index_stride));
  if (team.rank == 0 && threadIdx.x == 0) args.selected[pair] = wanted;
  if (selected == length) {
    for (int32_t t = run.begin + threadIdx.x % 32; t < run.end; t += 32) index[t] = t;
  } else {
    Threshold threshold;
    if (!held || !FindByRange(scratch, team, run, key, margin, selected, threshold)) {
      threshold = FindThreshold<kThreads>(scratch.select, length, selected,
                                          [&](int32_t t) { return OrderedKey(margin[t]); });
    }
    if (held) {
      WriteSelected<true>(scratch, team, args, row, head, run, length, key, margin, threshold,
                          index);
    } else {
      WriteSelected<false>(scratch, team, args, row, head, run, length, key, margin, threshold,
                           index);
    }
  }
  const bool marks = args.use_rule != SlotUse::kNone;
  // Behind this nobody reads another's memory.
  if (team.size > 1 || marks) team.Meet();
  if (marks && team.rank == 0) MarkUse(args, row, head, length, selected, index);
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const SelectTopArgs& args, const LaunchContext& context) {
  const auto pairs = static_cast<unsigned>(args.rows * args.kv_heads);
  if (args.margin_stride <= kFewItems * kThreads) {
    return LaunchDependent(context, SelectTopKernel<kFewItems>, pairs, kThreads, 0, args);
  }
  unsigned blocks = 1;  // of a row and head
  while (context.architecture >= 90 && blocks < kMostBlocks &&
         blocks * int64_t{kManyItems * kThreads} < args.margin_stride) {
    blocks *= 2;
  }
  return LaunchDependentClusters(context, SelectTopKernel<kManyItems>, pairs * blocks, kThreads, 0,
                                 blocks, args);
}

}  // namespace kvsweep::cuda
