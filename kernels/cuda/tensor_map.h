// Descriptions of tensors of bf16 for Hopper's copy engine (wgmma.cuh: CopyBox, bulk_copy.cuh:
// CopyMatrixBox). Host code.
#ifndef KVSWEEP_KERNELS_CUDA_TENSOR_MAP_H_
#define KVSWEEP_KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace kvsweep::cuda {

// [blocks, heads, rows, columns]; strides in elements, multiples of 8. A box is `box_rows` rows of
// 64 columns of one head, as a panel of wgmma.cuh.
struct TensorShape {
  const void* data = nullptr;  // at a multiple of 16 bytes
  int64_t columns = 0;
  int64_t rows = 0;
  int64_t row_stride = 0;
  int64_t heads = 1;
  int64_t head_stride = 0;
  int64_t blocks = 1;
  int64_t block_stride = 0;
  uint32_t box_rows = 0;
};

// A matrix [rows, columns] of which a box lies in shared memory as it is: box_rows rows of
// box_columns columns, at most 256 of both; or, a panel, as wgmma.cuh says: 64 columns.
struct MatrixShape {
  const void* data = nullptr;  // at a multiple of 16 bytes
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // elements, a multiple of 8; of one row any
  uint32_t box_rows = 0;
  uint32_t box_columns = 0;
  bool is_panel = false;
};

// The driver's function, or nullptr where it has none.
inline auto TensorMapEncoder() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)
               : nullptr;
  }();
  return encode;
}

// `strides` of all dimensions but the first, bytes.
template <size_t kRank>
cudaError_t EncodeTensorMap(const void* data, const cuuint64_t (&sizes)[kRank],
                            const cuuint64_t* strides, const cuuint32_t (&box)[kRank],
                            CUtensorMapSwizzle swizzle, CUtensorMap& map) {
  const auto encode = TensorMapEncoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  const CUresult made =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t MakeTensorMap(const TensorShape& shape, CUtensorMap& map) {
  const auto bytes = [](int64_t elements) {
    return static_cast<cuuint64_t>(std::max<int64_t>(elements, 8) * 2);
  };
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(shape.columns), static_cast<cuuint64_t>(shape.rows),
      static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.blocks)};
  const cuuint64_t strides[] = {bytes(shape.row_stride), bytes(shape.head_stride),
                                bytes(shape.block_stride)};
  const cuuint32_t box[] = {64, shape.box_rows, 1, 1};
  return EncodeTensorMap(shape.data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B, map);
}

inline cudaError_t MakeMatrixMap(const MatrixShape& shape, CUtensorMap& map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.columns),
                              static_cast<cuuint64_t>(shape.rows)};
  const auto stride = static_cast<cuuint64_t>(std::max(shape.row_stride, shape.columns)) * 2;
  const cuuint32_t box[] = {shape.box_columns, shape.box_rows};
  return EncodeTensorMap(shape.data, sizes, &stride, box,
                         shape.is_panel ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                         map);
}

// Rows of activations: head h of row r at (0, r, h, 0).
inline TensorShape ShapeOf(const Activations& activations, int64_t rows, int64_t heads,
                           int64_t head_dim, uint32_t box_rows) {
  return {.data = activations.data,
          .columns = head_dim,
          .rows = rows,
          .row_stride = activations.stride,
          .heads = heads,
          .head_stride = head_dim,
          .box_rows = box_rows};
}

// Keys or values of a view, from `data`: slot s of head h at (0, s % block_size, h, the block).
inline TensorShape ShapeOf(const KvView& view, const std::byte* data, int64_t heads,
                           int64_t head_dim, uint32_t box_rows) {
  return {.data = data,
          .columns = head_dim,
          .rows = view.block_size,
          .row_stride = view.token_stride,
          .heads = heads,
          .head_stride = view.head_stride,
          .blocks = INT32_MAX,
          .block_stride = view.block_stride,
          .box_rows = box_rows};
}

// Whether boxes of `box_rows` slots, from slot 0 on, never leave a block before its end.
inline bool HoldsBoxes(const KvView& view, int32_t box_rows) {
  return view.block_table == nullptr || view.block_size % box_rows == 0;
}

// Whether a kernel that is compiled for sm_90a alone can run on the current device: elsewhere its
// body is empty and needs next to no registers.
template <typename Kernel>
bool IsBuilt(Kernel* kernel) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.numRegs > 32;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_TENSOR_MAP_H_
