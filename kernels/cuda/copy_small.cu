// A few bytes over the host link by a kernel. The copy engine is faster at many, but a stream that
// is handed over to it and back stands still, and twice between two steps: for what the host reads
// of one, and for what it has filled in for the next (10 to 15 us a step, H200).
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint64_t kMostBytes = 256 * 1024;

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    CopySmallKernel(Element* target, const Element* source, int count) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < count) target[i] = source[i];
}

bool IsMultiple(const void* target, const void* source, uint64_t bytes, uint64_t unit) {
  return (reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source) | bytes) %
             unit ==
         0;
}

template <typename Element>
cudaError_t LaunchAs(void* target, const void* source, uint64_t bytes,
                     const LaunchContext& context) {
  const auto count = static_cast<int>(bytes / sizeof(Element));
  return LaunchOrdinary(context, CopySmallKernel<Element>,
                        static_cast<unsigned>(DivideUp(count, kThreads)), kThreads, 0,
                        static_cast<Element*>(target), static_cast<const Element*>(source), count);
}

}  // namespace

bool IsSmallCopy(const void* target, const void* source, uint64_t bytes) {
  return bytes <= kMostBytes && IsMultiple(target, source, bytes, sizeof(uint32_t));
}

cudaError_t LaunchSmallCopy(void* target, const void* source, uint64_t bytes,
                            const LaunchContext& context) {
  return IsMultiple(target, source, bytes, sizeof(uint4))
             ? LaunchAs<uint4>(target, source, bytes, context)
             : LaunchAs<uint32_t>(target, source, bytes, context);
}

}  // namespace kvsweep::cuda
