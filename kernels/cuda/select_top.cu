// The tokens with the largest margins of each row and KV head, ascending: a block of its own for
// each, four passes over the margins (which the second-level cache holds) and one to write.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

__device__ __forceinline__ bool Selects(const SelectTopArgs& args, int64_t row) {
  return IsActive(args.row_active, row) && args.length[row] > 0;
}

// How many entries a (row, head) takes; the same in all threads of the block. Integers, so the
// order of the sums does not matter.
__device__ int32_t SelectedCount(const SelectTopArgs& args, int64_t row, int32_t head) {
  __shared__ unsigned long long counted;
  __shared__ int32_t pairs;
  if (!Selects(args, row)) return 0;
  const bool batch = args.scope == SelectionScope::kBatch;
  if (threadIdx.x == 0) counted = pairs = 0;
  __syncthreads();
  if (args.wanted == nullptr && args.scope != SelectionScope::kHead) {
    const int32_t first = batch ? 0 : row * args.kv_heads;
    const int32_t end = batch ? args.rows * args.kv_heads : first + args.kv_heads;
    for (int32_t i = first + threadIdx.x; i < end; i += kSelectThreads) {
      if (!Selects(args, i / args.kv_heads)) continue;
      atomicAdd(&counted, static_cast<unsigned long long>(args.count[i]));
      atomicAdd(&pairs, 1);
    }
  }
  __syncthreads();
  int64_t wanted;
  if (args.wanted != nullptr) {
    wanted = args.wanted[row];
  } else if (args.scope == SelectionScope::kHead) {
    wanted = args.count[row * args.kv_heads + head];
  } else {
    wanted = static_cast<int64_t>(counted) / pairs;
  }
  const int64_t most = min(args.limit[row], args.length[row]);
  return static_cast<int32_t>(max(int64_t{1}, min(wanted, most)));
}

// Marks what has been selected in the slots' memory of their use.
__device__ void MarkUse(const SelectTopArgs& args, int64_t row, int32_t head, int32_t length,
                        int32_t selected, const int32_t* index) {
  int32_t* const use = static_cast<int32_t*>(args.use.data);
  bool saturated = false;
  __syncthreads();
  for (int32_t j = threadIdx.x; j < selected; j += kSelectThreads) {
    int32_t& mark = use[SlotOffset(args.use, row, index[j], head)];
    mark = args.use_rule == SlotUse::kStamp ? args.stamp[row] : mark + 1;
    saturated |= args.use_rule == SlotUse::kCount && mark >= args.use_limit;
  }
  if (__syncthreads_or(saturated ? 1 : 0) == 0) return;
  for (int32_t t = threadIdx.x; t < length; t += kSelectThreads) {
    use[SlotOffset(args.use, row, t, head)] /= 2;
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    SelectTopKernel(const __grid_constant__ SelectTopArgs args) {
  __shared__ SelectScratch scratch;
  const int64_t pair = blockIdx.x;
  const int64_t row = pair / args.kv_heads;
  const int32_t head = static_cast<int32_t>(pair % args.kv_heads);
  const int32_t wanted = SelectedCount(args, row, head);
  if (threadIdx.x == 0) args.selected[pair] = wanted;
  if (wanted == 0) return;
  // Should a length or a limit be larger than its array, nothing outside is touched.
  const int32_t length =
      static_cast<int32_t>(min(static_cast<int64_t>(args.length[row]), args.margin_stride));
  const int32_t selected =
      static_cast<int32_t>(min(static_cast<int64_t>(min(wanted, length)), args.index_stride));
  const float* const margin = args.margin + pair * args.margin_stride;
  int32_t* const index = args.index + pair * args.index_stride;
  if (selected == length) {
    for (int32_t t = threadIdx.x; t < length; t += kSelectThreads) index[t] = t;
    if (args.use_rule != SlotUse::kNone) MarkUse(args, row, head, length, selected, index);
    return;
  }
  const Threshold threshold =
      FindThreshold(scratch, length, selected, [&](int32_t t) { return OrderedKey(margin[t]); });

  // Where slots have positions of their own, the ties that belong are those with the lowest.
  const bool placed = args.slot_position.data != nullptr;
  const auto age = [&](int32_t t) {
    const int32_t* const position = static_cast<const int32_t*>(args.slot_position.data);
    return ~static_cast<uint32_t>(position[SlotOffset(args.slot_position, row, t, head)]);
  };
  uint32_t youngest = 0;
  if (placed) {
    youngest = FindThreshold(scratch, length, threshold.ties, [&](int32_t t) {
                 return OrderedKey(margin[t]) == threshold.key ? age(t) : 0u;
               }).key;
  }

  // Each warp owns a run of tokens: it counts them, then it writes them.
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t share = (length + kSelectThreads - 1) / kSelectThreads * 32;
  const int32_t begin = min(warp * share, length);
  const int32_t end = min(begin + share, length);
  int32_t larger = 0;
  int32_t equal = 0;
  for (int32_t base = begin; base < end; base += 32) {
    const int32_t t = base + lane;
    const uint32_t key = t < end ? OrderedKey(margin[t]) : 0;
    larger += __popc(__ballot_sync(~0u, t < end && key > threshold.key));
    const bool ties = t < end && key == threshold.key && (!placed || age(t) >= youngest);
    equal += __popc(__ballot_sync(~0u, ties));
  }
  __shared__ int2 of_warp[kSelectWarps];
  if (lane == 0) of_warp[warp] = make_int2(larger, equal);
  __syncthreads();
  int32_t equal_before = 0;
  int32_t written = 0;
  for (int w = 0; w < warp; ++w) {
    written += of_warp[w].x;
    equal_before += of_warp[w].y;
  }
  written += min(equal_before, threshold.ties);
  const uint32_t below = (1u << lane) - 1u;
  for (int32_t base = begin; base < end; base += 32) {
    const int32_t t = base + lane;
    const uint32_t key = t < end ? OrderedKey(margin[t]) : 0;
    const bool ties = t < end && key == threshold.key && (!placed || age(t) >= youngest);
    const uint32_t tied = __ballot_sync(~0u, ties);
    const bool takes = (t < end && key > threshold.key) ||
                       (ties && equal_before + __popc(tied & below) < threshold.ties);
    const uint32_t taken = __ballot_sync(~0u, takes);
    if (takes) index[written + __popc(taken & below)] = t;
    written += __popc(taken);
    equal_before += __popc(tied);
  }
  if (args.use_rule != SlotUse::kNone) MarkUse(args, row, head, length, selected, index);
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const SelectTopArgs& args, const LaunchContext& context) {
  SelectTopKernel<<<args.rows * args.kv_heads, kSelectThreads, 0, context.stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
