// What kernels share: places in the views of shapes.h, lengths that only the device knows, and
// elements whose type is a run-time value.
#ifndef KVSWEEP_KERNELS_CUDA_VIEWS_CUH_
#define KVSWEEP_KERNELS_CUDA_VIEWS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>

#include "kernels/shapes.h"

namespace kvsweep::cuda {

// ------------------------------------------------------------------------------------------ places

// Elements from the start of the pool to slot `token` of head `head` of block table row `row`.
__device__ __forceinline__ int64_t KvOffset(const KvView& view, int64_t row, int32_t token,
                                            int32_t head) {
  const int32_t block = token / view.block_size;
  const int64_t id =
      view.block_table == nullptr ? row : view.block_table[row * view.block_table_stride + block];
  return id * view.block_stride + (token - block * view.block_size) * view.token_stride +
         head * view.head_stride;
}

// The same for a view of one number a slot.
__device__ __forceinline__ int64_t SlotOffset(const SlotView& view, int64_t row, int32_t slot,
                                              int32_t head) {
  const int32_t block = slot / view.block_size;
  const int64_t id =
      view.block_table == nullptr ? row : view.block_table[row * view.block_table_stride + block];
  return id * view.block_stride + head * view.head_stride + (slot - block * view.block_size);
}

// Whether the table of `target` has the slot: one that it does not have is never written.
__device__ __forceinline__ bool HasSlot(const KvView& target, int64_t table_row, int32_t slot) {
  const int32_t block = slot / target.block_size;
  if (slot < 0) return false;
  if (target.block_table == nullptr) return block < 1;
  return block < target.block_table_stride &&
         target.block_table[table_row * target.block_table_stride + block] >= 0;
}

// Slots of head `head` of row `row` that attention reads.
__device__ __forceinline__ int32_t KvLength(const KvView& view, int64_t row, int32_t head) {
  if (view.length == nullptr) return 0;
  const int32_t length = view.length[row * view.length_stride + head * view.length_head_stride];
  return min(max(length - view.first_token, 0), view.max_tokens);
}

__device__ __forceinline__ bool IsActive(const int32_t* row_active, int64_t row) {
  return row_active == nullptr || row_active[row] != 0;
}

// ---------------------------------------------------------------------------------------- elements

__device__ __forceinline__ float WidenFp8(uint8_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}
// What is too large becomes 448.
__device__ __forceinline__ uint8_t NarrowFp8(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float LoadElement(const void* pool, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(pool)[index];
    case DType::kBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(pool)[index]);
    case DType::kF16:
      return __half2float(static_cast<const __half*>(pool)[index]);
    default:
      return WidenFp8(static_cast<const uint8_t*>(pool)[index]);
  }
}

// Rounds to nearest even.
__device__ __forceinline__ void StoreElement(void* pool, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(pool)[index] = value;
      return;
    case DType::kBf16:
      static_cast<__nv_bfloat16*>(pool)[index] = __float2bfloat16_rn(value);
      return;
    case DType::kF16:
      static_cast<__half*>(pool)[index] = __float2half_rn(value);
      return;
    default:
      static_cast<uint8_t*>(pool)[index] = NarrowFp8(value);
  }
}

// What StoreElement, then LoadElement would give.
__device__ __forceinline__ float RoundTo(DType dtype, float value) {
  switch (dtype) {
    case DType::kF32:
      return value;
    case DType::kBf16:
      return __bfloat162float(__float2bfloat16_rn(value));
    case DType::kF16:
      return __half2float(__float2half_rn(value));
    default:
      return WidenFp8(NarrowFp8(value));
  }
}

// As DTypeBytes.
__host__ __device__ __forceinline__ int64_t ElementBytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kFp8E4m3 ? 1 : 2;
}

// Address of an element.
__host__ __device__ __forceinline__ const std::byte* ElementAt(const void* pool, DType dtype,
                                                               int64_t index) {
  return static_cast<const std::byte*>(pool) + index * ElementBytes(dtype);
}

// Whether rows that start at multiples of these strides can be moved 16 bytes at a time.
inline bool IsAligned(const void* data, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && element_bytes % 16 == 0;
}
inline bool IsAligned(const KvView& view) {
  const int64_t bytes = DTypeBytes(view.dtype);
  return IsAligned(view.key, view.block_stride * bytes) &&
         IsAligned(view.value, view.token_stride * bytes) && (view.head_stride * bytes) % 16 == 0;
}
inline bool IsAligned(const Activations& activations, DType dtype) {
  return IsAligned(activations.data, activations.stride * DTypeBytes(dtype));
}

// ------------------------------------------------------------------------------------------ warps

__device__ __forceinline__ float WarpSum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ __forceinline__ float WarpMax(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_VIEWS_CUH_
