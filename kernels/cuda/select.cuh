// The largest of many floats by their bits: a block narrows down the value that separates them, one
// byte at a time, and then walks through them in order.
#ifndef KVSWEEP_KERNELS_CUDA_SELECT_CUH_
#define KVSWEEP_KERNELS_CUDA_SELECT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace kvsweep::cuda {

inline constexpr int kSelectThreads = 1024;
inline constexpr int kSelectWarps = kSelectThreads / 32;

// Larger floats have larger keys; the two zeros are equal.
__device__ __forceinline__ uint32_t OrderedKey(float value) {
  const uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The key of which fewer than `wanted` keys are larger, but not fewer than `wanted` at least as
// large.
struct Threshold {
  uint32_t key;
  int32_t ties;  // how many of the keys equal to it belong to the largest `wanted`
};

struct SelectScratch {
  uint32_t count[256];
  Threshold found;
  int32_t warp_count[kSelectWarps];
};

// For a block of kThreads; key(i) for i in [0, count) is asked for four times. REQUIRES: 1 <=
// wanted <= count.
template <int kThreads = kSelectThreads, typename Key>
__device__ Threshold FindThreshold(SelectScratch& scratch, int32_t count, int32_t wanted,
                                   const Key& key) {
  uint32_t prefix = 0;
  int32_t left = wanted;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) scratch.count[i] = 0;
    __syncthreads();
    const uint32_t mask = shift == 24 ? 0u : ~0u << (shift + 8);
    // Whole warps, so that lanes with the same byte can add it once.
    for (int32_t base = 0; base < count; base += kThreads) {
      const int32_t i = base + threadIdx.x;
      const uint32_t k = i < count ? key(i) : 0;
      const bool takes_part = i < count && (k & mask) == prefix;
      const uint32_t digit = takes_part ? k >> shift & 0xffu : 256u;
      const uint32_t same = __match_any_sync(~0u, digit);
      if (takes_part && (threadIdx.x % 32) == __ffs(same) - 1) {
        atomicAdd(&scratch.count[digit], static_cast<uint32_t>(__popc(same)));
      }
    }
    __syncthreads();
    // One warp finds the digit: counts from the largest down.
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      uint32_t own = 0;
      for (int j = 0; j < 8; ++j) own += scratch.count[255 - (lane * 8 + j)];
      uint32_t before = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, before, offset);
        if (lane >= offset) before += other;
      }
      before -= own;
      if (before < static_cast<uint32_t>(left) && before + own >= static_cast<uint32_t>(left)) {
        for (int j = 0; j < 8; ++j) {
          const int digit = 255 - (lane * 8 + j);
          if (before + scratch.count[digit] >= static_cast<uint32_t>(left)) {
            scratch.found.key = prefix | static_cast<uint32_t>(digit) << shift;
            scratch.found.ties = left - static_cast<int32_t>(before);
            break;
          }
          before += scratch.count[digit];
        }
      }
    }
    __syncthreads();
    prefix = scratch.found.key;
    left = scratch.found.ties;
    __syncthreads();
  }
  return {prefix, left};
}

// Exclusive sum over a block of kThreads; `total` is the sum.
template <int kThreads = kSelectThreads>
__device__ __forceinline__ int32_t BlockScan(SelectScratch& scratch, int32_t value,
                                             int32_t& total) {
  const int lane = threadIdx.x % 32;
  int32_t inclusive = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == 31) scratch.warp_count[threadIdx.x / 32] = inclusive;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    const int32_t count = scratch.warp_count[w];
    if (w < static_cast<int>(threadIdx.x) / 32) before += count;
    total += count;
  }
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_SELECT_CUH_
