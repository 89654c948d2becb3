// Rows of the embedding tables, and rows of activations by index.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

// One block a row; kWidth elements an access.
template <typename T, int kWidth>
__global__ void EmbedKernel(const __grid_constant__ EmbedArgs args) {
  using Elements = Vector<T, kWidth>;
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const int32_t named = args.token_id[row];
  const int64_t token = named >= 0 ? named : args.sampled[-1 - named];
  const T* const embedding = static_cast<const T*>(args.table) + token * args.columns;
  const T* added = nullptr;
  if (args.position_table != nullptr) {
    const int64_t position = args.position[row] + args.position_offset;
    added = static_cast<const T*>(args.position_table) + position * args.columns;
  }
  T* const out = static_cast<T*>(args.out.data) + row * args.out.stride;
  for (int column = threadIdx.x * kWidth; column < args.columns; column += kThreads * kWidth) {
    Elements values = *reinterpret_cast<const Elements*>(embedding + column);
    if (added != nullptr) {
      const Elements more = *reinterpret_cast<const Elements*>(added + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values.element[i] = FromFloat<T>(ToFloat(values.element[i]) + ToFloat(more.element[i]));
      }
    }
    *reinterpret_cast<Elements*>(out + column) = values;
  }
}

template <typename T, int kWidth>
__global__ void TakeRowsKernel(const __grid_constant__ TakeRowsArgs args) {
  using Elements = Vector<T, kWidth>;
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const int64_t source = args.row[row];
  const T* const in = static_cast<const T*>(args.in.data) + source * args.in.stride;
  T* const out = static_cast<T*>(args.out.data) + row * args.out.stride;
  for (int column = threadIdx.x * kWidth; column < args.columns; column += kThreads * kWidth) {
    Elements values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values.element[i] = FromFloat<T>(0.0f);
    if (source >= 0) values = *reinterpret_cast<const Elements*>(in + column);
    *reinterpret_cast<Elements*>(out + column) = values;
  }
}

}  // namespace

cudaError_t Launch(const EmbedArgs& args, const LaunchContext& context) {
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = CanVectorise<T>(args.out.data, args.out.stride, args.columns) &&
                      CanVectorise<T>(args.table, args.columns, args.columns) &&
                      CanVectorise<T>(args.position_table, args.columns, args.columns);
    const auto kernel = wide ? EmbedKernel<T, kVectorElements<T>> : EmbedKernel<T, 1>;
    return LaunchDependent(context, kernel, static_cast<unsigned>(args.rows), kThreads, 0, args);
  });
}

cudaError_t Launch(const TakeRowsArgs& args, const LaunchContext& context) {
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = CanVectorise<T>(args.out.data, args.out.stride, args.columns) &&
                      CanVectorise<T>(args.in.data, args.in.stride, args.columns);
    const auto kernel = wide ? TakeRowsKernel<T, kVectorElements<T>> : TakeRowsKernel<T, 1>;
    return LaunchDependent(context, kernel, static_cast<unsigned>(args.rows), kThreads, 0, args);
  });
}

}  // namespace kvsweep::cuda
