// The two small products of which projections and attention are made. Each element of a result is
// summed in an order that depends on the inner length alone, never on how many rows or columns are
// computed together: that is what batch-invariant mode rests on.
#ifndef KVSWEEP_KERNELS_CPU_PRODUCTS_H_
#define KVSWEEP_KERNELS_CPU_PRODUCTS_H_

#include <cstdint>

#include "kernels/cpu/simd.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // every function here is inlined

namespace kvsweep::cpu {

// sum[r][c] = lane-wise sums of a[r][k] * b[c][k], for kRows x kColumns pairs of rows at once.
template <int kRows, int kColumns>
KVSWEEP_INLINE void DotLanes(F8 sum[kRows][kColumns], const float* a, int64_t a_stride,
                             const float* b, int64_t b_stride, int64_t length) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = F8{};
  }
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    F8 left[kRows];
    for (int r = 0; r < kRows; ++r) left[r] = Load(a + r * a_stride + k);
    for (int c = 0; c < kColumns; ++c) {
      const F8 right = Load(b + c * b_stride + k);
      for (int r = 0; r < kRows; ++r) sum[r][c] += left[r] * right;
    }
  }
  if (k == length) return;
  const int rest = static_cast<int>(length - k);
  for (int c = 0; c < kColumns; ++c) {
    const F8 right = LoadFirst(b + c * b_stride + k, rest);
    for (int r = 0; r < kRows; ++r) {
      sum[r][c] += LoadFirst(a + r * a_stride + k, rest) * right;
    }
  }
}

// out[c] = a . b[c] for c < columns, a multiple of 8; both sides contiguous along `length`.
inline void DotRow(float* out, const float* a, const float* b, int64_t b_stride, int64_t length,
                   int columns) {
  for (int c = 0; c < columns; c += kLanes) {
    F8 sum[1][kLanes];
    DotLanes<1, kLanes>(sum, a, 0, b + c * b_stride, b_stride, length);
    Store(out + c, SumEach(sum[0]));
  }
}

// out[r][:] += a[r][:] * b for kRows rows and 8 * kVectors columns.
template <int kRows, int kVectors>
KVSWEEP_INLINE void AddProductTile(float* out, int64_t out_stride, const float* a, int64_t a_stride,
                                   const float* b, int64_t b_stride, int inner) {
  F8 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(out + r * out_stride + v * kLanes);
  }
  for (int k = 0; k < inner; ++k) {
    F8 right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = Load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F8 left = Splat(a[r * a_stride + k]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) Store(out + r * out_stride + v * kLanes, sum[r][v]);
  }
}

template <int kRows>
inline void AddProductRows(float* out, int64_t out_stride, const float* a, int64_t a_stride,
                           const float* b, int64_t b_stride, int inner, int columns) {
  int c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    AddProductTile<kRows, 2>(out + c, out_stride, a, a_stride, b + c, b_stride, inner);
  }
  for (; c + kLanes <= columns; c += kLanes) {
    AddProductTile<kRows, 1>(out + c, out_stride, a, a_stride, b + c, b_stride, inner);
  }
  for (; c < columns; ++c) {
    for (int r = 0; r < kRows; ++r) {
      float sum = out[r * out_stride + c];
      for (int k = 0; k < inner; ++k) sum += a[r * a_stride + k] * b[k * b_stride + c];
      out[r * out_stride + c] = sum;
    }
  }
}

// out [rows, columns] += a [rows, inner] * b [inner, columns], each with its row stride.
inline void AddProduct(float* out, int64_t out_stride, const float* a, int64_t a_stride,
                       const float* b, int64_t b_stride, int rows, int inner, int columns) {
  int r = 0;
  for (; r + 6 <= rows; r += 6) {
    AddProductRows<6>(out + r * out_stride, out_stride, a + r * a_stride, a_stride, b, b_stride,
                      inner, columns);
  }
  for (; r + 3 <= rows; r += 3) {
    AddProductRows<3>(out + r * out_stride, out_stride, a + r * a_stride, a_stride, b, b_stride,
                      inner, columns);
  }
  for (; r < rows; ++r) {
    AddProductRows<1>(out + r * out_stride, out_stride, a + r * a_stride, a_stride, b, b_stride,
                      inner, columns);
  }
}

}  // namespace kvsweep::cpu

#pragma GCC diagnostic pop

#endif  // KVSWEEP_KERNELS_CPU_PRODUCTS_H_
