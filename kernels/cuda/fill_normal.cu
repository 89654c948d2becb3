// Random numbers by index (normal_value.h).
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/normal_value.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void FillNormalKernel(void* __restrict__ out,  // [count], dtype
                                 DType dtype, int64_t count, uint64_t seed, float deviation) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    // The product must not be joined with the one inside, to give the same bits everywhere.
    StoreElement(out, dtype, i, __fmul_rn(deviation, NormalValue(seed, static_cast<uint64_t>(i))));
  }
}

}  // namespace

cudaError_t Launch(const FillNormalArgs& args, const LaunchContext& context) {
  if (args.count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(DivideUp(args.count, kThreads), int64_t{16} * context.multiprocessors));
  FillNormalKernel<<<blocks, kThreads, 0, context.stream>>>(args.out, args.dtype, args.count,
                                                            args.seed, args.deviation);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
