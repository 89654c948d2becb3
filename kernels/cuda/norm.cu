// Root-mean-square and layer norm: one block a row, which is read once and kept in shared memory.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

// The same threads sum the same columns in the same order whatever the number of rows.
template <typename T, int kWidth>
__global__ void NormKernel(NormArgs args) {
  using Elements = Vector<T, kWidth>;
  extern __shared__ float x[];  // [columns]
  __shared__ float reduced[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* const in = static_cast<const T*>(args.in.data) + row * args.in.stride;
  T* const out = static_cast<T*>(args.out.data) + row * args.out.stride;
  const int columns = args.columns;
  const bool centred = args.bias != nullptr;

  float sum = 0.0f;
  for (int column = threadIdx.x * kWidth; column < columns; column += kThreads * kWidth) {
    const Elements values = *reinterpret_cast<const Elements*>(in + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float value = ToFloat(values.element[i]);
      x[column + i] = value;
      sum += centred ? value : value * value;
    }
  }
  sum = BlockSum<kThreads>(sum, reduced);
  float mean = 0.0f;
  if (centred) {
    mean = sum / columns;
    sum = 0.0f;
    for (int column = threadIdx.x * kWidth; column < columns; column += kThreads * kWidth) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float difference = x[column + i] - mean;
        sum += difference * difference;
      }
    }
    sum = BlockSum<kThreads>(sum, reduced);
  }
  const float scale = 1.0f / sqrtf(sum / columns + args.epsilon);
  for (int column = threadIdx.x * kWidth; column < columns; column += kThreads * kWidth) {
    Elements values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float value = (x[column + i] - mean) * scale * args.weight[column + i];
      if (centred) value += args.bias[column + i];
      values.element[i] = FromFloat<T>(value);
    }
    *reinterpret_cast<Elements*>(out + column) = values;
  }
}

}  // namespace

cudaError_t Launch(const NormArgs& args, const LaunchContext& context) {
  const size_t shared_bytes = sizeof(float) * static_cast<size_t>(args.columns);
  if (shared_bytes > 47 * 1024) return cudaErrorInvalidValue;  // rows of up to 12,032 columns
  WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = CanVectorise<T>(args.out.data, args.out.stride, args.columns) &&
                      CanVectorise<T>(args.in.data, args.in.stride, args.columns);
    const auto kernel = wide ? NormKernel<T, kVectorElements<T>> : NormKernel<T, 1>;
    kernel<<<static_cast<unsigned>(args.rows), kThreads, shared_bytes, context.stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
