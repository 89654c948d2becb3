// The tokens with the largest margins of each row and KV head, ascending: a block of its own for
// each, four passes over the margins (which the second-level cache holds) and one to write.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

__global__ void __launch_bounds__(kSelectThreads)
    SelectTopKernel(const __grid_constant__ SelectTopArgs args) {
  __shared__ SelectScratch scratch;
  __shared__ int32_t shared_selected;
  const int64_t pair = blockIdx.x;
  const int64_t row = pair / args.kv_heads;
  const int32_t head = static_cast<int32_t>(pair % args.kv_heads);
  int32_t length = IsActive(args.row_active, row) ? args.length[row] : 0;
  if (threadIdx.x < 32) {
    int64_t counted = 0;
    if (length > 0) {
      for (int32_t h = threadIdx.x; h < args.kv_heads; h += 32) {
        counted += args.count[row * args.kv_heads + h];
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      counted += __shfl_xor_sync(~0u, counted, offset);
    }
    if (threadIdx.x == 0) {
      const int64_t mean = counted / args.kv_heads;
      int32_t selected =
          static_cast<int32_t>(max(int64_t{1}, min(mean, static_cast<int64_t>(args.limit[row]))));
      if (length <= 0) selected = 0;
      shared_selected = selected;
      if (head == 0) args.selected[row] = selected;
    }
  }
  __syncthreads();
  // No count is larger than the length; should one be, nothing outside the arrays is touched.
  length = static_cast<int32_t>(min(static_cast<int64_t>(length), args.margin_stride));
  const int32_t selected = static_cast<int32_t>(
      min(static_cast<int64_t>(min(shared_selected, length)), args.index_stride));
  if (selected <= 0) return;

  const float* const margin = args.margin + pair * args.margin_stride;
  int32_t* const index = args.index + pair * args.index_stride;
  if (selected == length) {
    for (int32_t t = threadIdx.x; t < length; t += kSelectThreads) index[t] = t;
    return;
  }
  const Threshold threshold =
      FindThreshold(scratch, length, selected, [&](int32_t t) { return OrderedKey(margin[t]); });

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
    equal += __popc(__ballot_sync(~0u, t < end && key == threshold.key));
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
    const bool ties = t < end && key == threshold.key;
    const uint32_t tied = __ballot_sync(~0u, ties);
    const bool takes = (t < end && key > threshold.key) ||
                       (ties && equal_before + __popc(tied & below) < threshold.ties);
    const uint32_t taken = __ballot_sync(~0u, takes);
    if (takes) index[written + __popc(taken & below)] = t;
    written += __popc(taken);
    equal_before += __popc(tied);
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const SelectTopArgs& args, const LaunchContext& context) {
  SelectTopKernel<<<args.rows * args.kv_heads, kSelectThreads, 0, context.stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
