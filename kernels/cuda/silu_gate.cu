// out = silu(gate) * up, element by element.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    SiluGateKernel(const __grid_constant__ SiluGateArgs args) {
  using Elements = Vector<T, kWidth>;
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (column >= args.columns) return;
  const T* const in = static_cast<const T*>(args.in.data) + row * args.in.stride + column;
  const Elements gate = *reinterpret_cast<const Elements*>(in);
  const Elements up = *reinterpret_cast<const Elements*>(in + args.columns);
  Elements out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    out.element[i] = FromFloat<T>(Gated(ToFloat(gate.element[i]), ToFloat(up.element[i])));
  }
  *reinterpret_cast<Elements*>(static_cast<T*>(args.out.data) + row * args.out.stride + column) =
      out;
}

}  // namespace

cudaError_t Launch(const SiluGateArgs& args, const LaunchContext& context) {
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = CanVectorise<T>(args.out.data, args.out.stride, args.columns) &&
                      CanVectorise<T>(args.in.data, args.in.stride, args.columns);
    const int width = wide ? kVectorElements<T> : 1;
    const auto kernel = wide ? SiluGateKernel<T, kVectorElements<T>> : SiluGateKernel<T, 1>;
    // Rows may be more than a grid's y can count.
    const dim3 grid(static_cast<unsigned>(args.rows),
                    static_cast<unsigned>(DivideUp(args.columns, int64_t{kThreads} * width)));
    return LaunchDependent(context, kernel, grid, kThreads, 0, args);
  });
}

}  // namespace kvsweep::cuda
