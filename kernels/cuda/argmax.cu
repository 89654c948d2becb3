// The most likely token of each row of logits.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 1024;

struct Best {
  float value;
  int32_t index;
};

// Whether b stands behind a in the order of Better.
__device__ __forceinline__ bool StandsBehind(Best b, Best a) {
  return b.value < a.value || (b.value == a.value && b.index > a.index);
}

// Total order, so that the result does not depend on who compares with whom.
__device__ __forceinline__ Best Better(Best a, Best b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

__device__ __forceinline__ Best WarpBest(Best best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = Better(
        best, {__shfl_xor_sync(~0u, best.value, offset), __shfl_xor_sync(~0u, best.index, offset)});
  }
  return best;
}

__global__ void __launch_bounds__(kThreads) ArgmaxKernel(ArgmaxArgs args) {
  __shared__ Best of_warp[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const int32_t target = args.target[row];
  if (target < 0) return;
  const float* const logits =
      static_cast<const float*>(args.logits.data) + row * args.logits.stride;
  const int32_t rank = args.rank == nullptr ? 0 : args.rank[row];
  // Pass r finds the best of those behind the best of the pass before; nearly always there is one.
  Best found{INFINITY, -1};
  for (int32_t pass = 0; pass <= rank; ++pass) {
    Best best{-INFINITY, INT32_MAX};
#pragma unroll 8
    for (int i = threadIdx.x; i < args.columns; i += kThreads) {
      const Best candidate{logits[i], i};
      if (StandsBehind(candidate, found)) best = Better(best, candidate);
    }
    best = WarpBest(best);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
    __syncthreads();
    found = WarpBest(of_warp[threadIdx.x % kWarp]);
    __syncthreads();
  }
  if (threadIdx.x == 0) args.token[target] = min(found.index, args.columns - 1);
}

}  // namespace

cudaError_t Launch(const ArgmaxArgs& args, const LaunchContext& context) {
  ArgmaxKernel<<<static_cast<unsigned>(args.rows), kThreads, 0, context.stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
