// Rotary embedding in place.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rotary.cuh"

namespace kvsweep::cuda {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRotaryThreads)
    RotaryKernel(const __grid_constant__ RotaryArgs args) {
  __shared__ RotaryAngles angles;
  ReleaseLaterKernels();
  FindAngles(angles, args);
  WaitForEarlierKernels();
  __syncthreads();
  RotateRow<T, kWidth>(angles, args, [](int, int, const Vector<T, kWidth>&) {});
}

}  // namespace

cudaError_t Launch(const RotaryArgs& args, const LaunchContext& context) {
  if (args.head_dim > 2 * kMostRotaryHalf) return cudaErrorInvalidValue;
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        CanRotateWide<T>(args) ? RotaryKernel<T, kVectorElements<T>> : RotaryKernel<T, 1>;
    return LaunchDependent(context, kernel, RotaryGrid(args.rows), kRotaryThreads, 0, args);
  });
}

}  // namespace kvsweep::cuda
