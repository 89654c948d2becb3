// Root-mean-square and layer norm: one block a row, which its threads hold in registers. At one row
// the time is that of a load, a reduction and a store in turn, so weights are read ahead of the
// earlier kernel's end and each sum takes one barrier.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 512;

// The same threads sum the same columns in the same order whatever the number of rows. kItems
// vectors of kWidth elements a thread.
template <typename T, int kWidth, int kItems, bool kCentred>
__global__ void __launch_bounds__(kThreads) NormKernel(const __grid_constant__ NormArgs args) {
  using Elements = Vector<T, kWidth>;
  using Factors = Vector<float, kWidth>;
  __shared__ float reduced[2][kThreads / kWarp];
  ReleaseLaterKernels();
  const int columns = args.columns;
  const auto column = [](int item) {
    return (item * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
  };
  // Weights wait in registers unless there are many.
  constexpr bool kAhead = kWidth > 1 && kItems <= 2;
  Factors weight[kAhead ? kItems : 1];
  Factors bias[kAhead && kCentred ? kItems : 1];
  if constexpr (kAhead) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (column(item) >= columns) continue;
      weight[item] = *reinterpret_cast<const Factors*>(args.weight + column(item));
      if constexpr (kCentred) {
        bias[item] = *reinterpret_cast<const Factors*>(args.bias + column(item));
      }
    }
  }
  WaitForEarlierKernels();

  const int64_t row = blockIdx.x;
  const T* const in = static_cast<const T*>(args.in.data) + row * args.in.stride;
  T* const out = static_cast<T*>(args.out.data) + row * args.out.stride;
  Elements x[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    if (column(item) < columns) x[item] = *reinterpret_cast<const Elements*>(in + column(item));
  }
  // Sum of term(x) over the row.
  const auto sum_of = [&](float* shared, auto term) {
    float sum = 0.0f;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (column(item) >= columns) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += term(ToFloat(x[item].element[i]));
    }
    sum = WarpSum(sum);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[w];
    return sum;
  };
  float mean = 0.0f;
  if constexpr (kCentred) {
    mean = sum_of(reduced[0], [](float value) { return value; }) / columns;
  }
  const float square_sum =
      sum_of(reduced[1], [&](float value) { return (value - mean) * (value - mean); });
  const float scale = 1.0f / sqrtf(square_sum / columns + args.epsilon);
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    if (column(item) >= columns) continue;
    Elements values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float factor =
          kAhead ? weight[kAhead ? item : 0].element[i] : args.weight[column(item) + i];
      float value = (ToFloat(x[item].element[i]) - mean) * scale * factor;
      if constexpr (kCentred) {
        value += kAhead ? bias[kAhead ? item : 0].element[i] : args.bias[column(item) + i];
      }
      values.element[i] = FromFloat<T>(value);
    }
    *reinterpret_cast<Elements*>(out + column(item)) = values;
  }
}

template <typename T, int kWidth, int kItems>
cudaError_t LaunchNorm(const NormArgs& args, const LaunchContext& context) {
  const auto kernel = args.bias != nullptr ? NormKernel<T, kWidth, kItems, true>
                                           : NormKernel<T, kWidth, kItems, false>;
  return LaunchDependent(context, kernel, static_cast<unsigned>(args.rows), kThreads, 0, args);
}

}  // namespace

// Rows of up to 16,384 columns.
cudaError_t Launch(const NormArgs& args, const LaunchContext& context) {
  const auto aligned = [](const float* data) {
    return reinterpret_cast<uintptr_t>(data) % 32 == 0;
  };
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kVectorElements<T>;
    const bool wide = CanVectorise<T>(args.out.data, args.out.stride, args.columns) &&
                      CanVectorise<T>(args.in.data, args.in.stride, args.columns) &&
                      aligned(args.weight) && aligned(args.bias);
    const int64_t items = DivideUp(args.columns, int64_t{kThreads} * (wide ? kWidth : 1));
    if (wide && items <= 1) return LaunchNorm<T, kWidth, 1>(args, context);
    if (wide && items <= 2) return LaunchNorm<T, kWidth, 2>(args, context);
    if (wide && items <= 8) return LaunchNorm<T, kWidth, 8>(args, context);
    if (!wide && items <= 32) return LaunchNorm<T, 1, 32>(args, context);
    return cudaErrorInvalidValue;
  });
}

}  // namespace kvsweep::cuda
