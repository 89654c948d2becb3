// Keys and values of a group once for each of its query heads.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void RepeatHeadsKernel(const __grid_constant__ RepeatHeadsArgs args) {
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const T* const in = static_cast<const T*>(args.in.data) + row * args.in.stride;
  T* const out = static_cast<T*>(args.out.data) + row * args.out.stride;
  const int count = args.heads * args.repeat * args.head_dim;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int head = i / args.head_dim;
    out[i] = in[head / args.repeat * args.head_dim + i - head * args.head_dim];
  }
}

}  // namespace

cudaError_t Launch(const RepeatHeadsArgs& args, const LaunchContext& context) {
  return WithActivations(context.activation_dtype, [&](auto element) {
    return LaunchDependent(context, RepeatHeadsKernel<decltype(element)>,
                           static_cast<unsigned>(args.rows), kThreads, 0, args);
  });
}

}  // namespace kvsweep::cuda
