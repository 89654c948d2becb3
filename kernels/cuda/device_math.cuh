// What the kernels over activations share: their two formats as f32, sixteen bytes at a time, and
// reductions in a fixed order.
#ifndef KVSWEEP_KERNELS_CUDA_DEVICE_MATH_CUH_
#define KVSWEEP_KERNELS_CUDA_DEVICE_MATH_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/views.cuh"
#include "kernels/shapes.h"

namespace kvsweep::cuda {

inline constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------
// formats

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T FromFloat(float value);
template <>
__device__ __forceinline__ float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
// kCount elements that lie together, moved as one access.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T element[kCount];
};

// What a gate lets pass: silu(gate) * passed.
__device__ __forceinline__ float Gated(float gate, float passed) {
  return gate / (1.0f + expf(-gate)) * passed;
}

// Elements of T in one 16-byte access.
template <typename T>
inline constexpr int kVectorElements = 16 / sizeof(T);

// Whether a row pointer and its stride (elements) allow 16-byte accesses over `columns` elements.
template <typename T>
inline bool CanVectorise(const void* data, int64_t stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVectorElements<T> == 0 &&
         columns % kVectorElements<T> == 0;
}

// ------------------------------------------------------------------------------------------------
// reductions; every lane (thread) gets the result, in an order that depends on nothing but the size

// Sum over a block of kThreads (a multiple of 32). `shared` [kThreads / 32] may be used again after
// the next __syncthreads.
template <int kThreads>
__device__ __forceinline__ float BlockSum(float value, float* shared) {
  constexpr int kWarps = kThreads / kWarp;
  value = WarpSum(value);
  if constexpr (kWarps == 1) return value;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  __syncthreads();
  return sum;
}

// ------------------------------------------------------------------------------------------------
// choosing a kernel by format

// Calls body with a value of the element type: body(T{}).
template <typename Body>
auto WithActivations(DType dtype, const Body& body) {
  return dtype == DType::kF32 ? body(float{}) : body(__nv_bfloat16{});
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_DEVICE_MATH_CUH_
