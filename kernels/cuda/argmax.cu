// The most likely token of each row of logits: several blocks share a row, so that also one row is
// read at the speed of many multiprocessors, and the last of them to end compares what they found.
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMostParts = kWarp;  // of a row: one warp compares them

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

// The best of logits[begin, end) that stands behind `ahead`; in all threads.
__device__ Best BlockBest(const float* logits, int32_t begin, int32_t end, Best ahead) {
  __shared__ Best of_warp[kThreads / kWarp];
  Best best{-INFINITY, INT32_MAX};
#pragma unroll 8
  for (int32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Best candidate{logits[i], i};
    if (StandsBehind(candidate, ahead)) best = Better(best, candidate);
  }
  best = WarpBest(best);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = WarpBest(of_warp[threadIdx.x % (kThreads / kWarp)]);
  __syncthreads();
  return best;
}

// Part blockIdx.y of row blockIdx.x. `found` [rows, parts] and `tickets` [rows] are for more than
// one part.
__global__ void __launch_bounds__(kThreads)
    ArgmaxKernel(const __grid_constant__ ArgmaxArgs args, Best* found, uint32_t* tickets) {
  __shared__ bool is_last;
  const int64_t row = blockIdx.x;
  const auto parts = static_cast<int32_t>(gridDim.y);
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int32_t target = args.target[row];
  if (target < 0) return;
  const float* const logits =
      static_cast<const float*>(args.logits.data) + row * args.logits.stride;
  const int32_t share = (args.columns + parts - 1) / parts;
  const int32_t begin = blockIdx.y * share;
  const int32_t end = min(begin + share, args.columns);
  const int32_t rank = args.rank == nullptr ? 0 : args.rank[row];
  // Pass r finds the best of those behind the best of the pass before; nearly always there is one.
  Best best{INFINITY, -1};
  for (int32_t pass = 0; pass <= rank; ++pass) best = BlockBest(logits, begin, end, best);
  if (parts > 1) {
    if (threadIdx.x == 0) {
      found[row * parts + blockIdx.y] = best;
      __threadfence();
      is_last = atomicInc(&tickets[row], parts - 1) == parts - 1;  // zero again behind the last
    }
    __syncthreads();
    if (!is_last || threadIdx.x >= kWarp) return;
    __threadfence();
    best = {-INFINITY, INT32_MAX};
    if (threadIdx.x < parts) {
      const volatile Best& other = found[row * parts + threadIdx.x];
      best = {other.value, other.index};
    }
    best = WarpBest(best);
  }
  if (threadIdx.x == 0) args.token[target] = min(best.index, args.columns - 1);
}

}  // namespace

cudaError_t Launch(const ArgmaxArgs& args, const LaunchContext& context) {
  // Later ranks are sought in passes over the whole row.
  constexpr int64_t kLeastShare = 2048;
  const bool shares = args.rank == nullptr && args.rows <= context.ticket_count;
  const int64_t wanted = 2 * int64_t{context.multiprocessors} / args.rows;
  const int64_t most = std::min<int64_t>(kMostParts, args.columns / kLeastShare);
  const int64_t parts = shares ? std::max<int64_t>(1, std::min(wanted, most)) : 1;
  return LaunchDependent(
      context, ArgmaxKernel, dim3(static_cast<unsigned>(args.rows), static_cast<unsigned>(parts)),
      kThreads, 0, args, reinterpret_cast<Best*>(context.workspace), context.tickets);
}

}  // namespace kvsweep::cuda
