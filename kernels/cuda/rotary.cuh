// Rotary embedding of one row by the blocks of one grid column (blockIdx.x is the row), for the
// operations that turn rows: sines and cosines once for all heads, then pairs of columns.
#ifndef KVSWEEP_KERNELS_CUDA_ROTARY_CUH_
#define KVSWEEP_KERNELS_CUDA_ROTARY_CUH_

#include "kernels/arguments.h"
#include "kernels/cuda/device_math.cuh"

namespace kvsweep::cuda {

inline constexpr int kRotaryThreads = 256;
inline constexpr int kMostRotaryHalf = 512;  // half of the largest head dimension

// Blocks for a grid: with few rows several share one, so that each thread waits for memory once.
inline dim3 RotaryGrid(int32_t rows) {
  return dim3(static_cast<unsigned>(rows), rows <= 64 ? 2 : 1);
}

// Thread of those that share the row, and how many they are.
__device__ __forceinline__ int RowThread() { return blockIdx.y * kRotaryThreads + threadIdx.x; }
__device__ __forceinline__ int RowThreads() { return gridDim.y * kRotaryThreads; }

// Turns a pair of columns. The operations are spelled out: whichever kernel turns a row, its bits
// are the same.
__device__ __forceinline__ void TurnPair(float& low, float& high, float cosine, float sine) {
  const float x = low;
  const float y = high;
  low = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
  high = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
}

// In f32, as the models' own code computes them.
__device__ __forceinline__ void FindAngle(const RotaryArgs& args, int64_t row, int j, float* sine,
                                          float* cosine) {
  const float position = static_cast<float>(args.position[row]);
  sincosf(__fmul_rn(position, args.inverse_frequency[j]), sine, cosine);
}

// Of one row, in shared memory.
struct RotaryAngles {
  float cosine[kMostRotaryHalf];
  float sine[kMostRotaryHalf];
};

// Followed by a barrier before RotateRow. `position` and `inverse_frequency` only: what is turned
// may still be under way.
__device__ __forceinline__ void FindAngles(RotaryAngles& angles, const RotaryArgs& args) {
  for (int j = threadIdx.x; j < args.head_dim / 2; j += kRotaryThreads) {
    FindAngle(args, blockIdx.x, j, &angles.sine[j], &angles.cosine[j]);
  }
}

// Turns a row in place, kWidth pairs at a time, and hands each to also(head, column, elements): a
// low run of kWidth columns, then its high one.
template <typename T, int kWidth, typename Also>
__device__ __forceinline__ void RotateRow(const RotaryAngles& angles, const RotaryArgs& args,
                                          const Also& also) {
  using Elements = Vector<T, kWidth>;
  const int half = args.head_dim / 2;
  const int runs = half / kWidth;
  T* const data = static_cast<T*>(args.data.data) + blockIdx.x * args.data.stride;
  for (int i = RowThread(); i < args.heads * runs; i += RowThreads()) {
    const int head = i / runs;
    const int column = (i - head * runs) * kWidth;
    T* const at = data + int64_t{head} * args.head_dim + column;
    Elements low = *reinterpret_cast<const Elements*>(at);
    Elements high = *reinterpret_cast<const Elements*>(at + half);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      float x = ToFloat(low.element[e]);
      float y = ToFloat(high.element[e]);
      TurnPair(x, y, angles.cosine[column + e], angles.sine[column + e]);
      low.element[e] = FromFloat<T>(x);
      high.element[e] = FromFloat<T>(y);
    }
    *reinterpret_cast<Elements*>(at) = low;
    *reinterpret_cast<Elements*>(at + half) = high;
    also(head, column, low);
    also(head, column + half, high);
  }
}

// Whether pairs can be moved 16 bytes at a time.
template <typename T>
bool CanRotateWide(const RotaryArgs& args) {
  return CanVectorise<T>(args.data.data, args.data.stride, args.head_dim / 2);
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_ROTARY_CUH_
