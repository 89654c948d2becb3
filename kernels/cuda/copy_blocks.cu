// Whole blocks from pool to pool, on either tier: a kernel reads or writes pinned memory at the
// rate of the link, and needs no copy for each block.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceBytes = 32 * 1024;  // of a block of threads

template <typename Element>
__global__ void CopyBlocksKernel(CopyBlocksArgs args, unsigned long long* link_bytes) {
  const int64_t i = blockIdx.y;
  const int64_t first = int64_t{blockIdx.x} * kPieceBytes;
  const int64_t bytes = min(kPieceBytes, args.block_bytes - first);
  const auto* const source =
      reinterpret_cast<const Element*>(args.source + args.pair[2 * i] * args.block_bytes + first);
  auto* const target =
      reinterpret_cast<Element*>(args.target + args.pair[2 * i + 1] * args.block_bytes + first);
  const int count = static_cast<int>(bytes / static_cast<int64_t>(sizeof(Element)));
#pragma unroll 4
  for (int j = threadIdx.x; j < count; j += kThreads) target[j] = source[j];
  if (link_bytes != nullptr && threadIdx.x == 0) {
    atomicAdd(link_bytes, static_cast<unsigned long long>(bytes));
  }
}

}  // namespace

cudaError_t Launch(const CopyBlocksArgs& args, const LaunchContext& context) {
  if (args.block_bytes == 0) return cudaSuccess;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool wide = args.block_bytes % 16 == 0 && aligned(args.source) && aligned(args.target);
  const auto kernel = wide ? CopyBlocksKernel<uint4> : CopyBlocksKernel<uint8_t>;
  // The grid's second dimension is bounded.
  constexpr int32_t kMostBlocks = 65535;
  for (int32_t begun = 0; begun < args.count; begun += kMostBlocks) {
    CopyBlocksArgs part = args;
    part.pair += 2 * int64_t{begun};
    part.count = args.count - begun < kMostBlocks ? args.count - begun : kMostBlocks;
    const dim3 grid(static_cast<unsigned>(DivideUp(args.block_bytes, kPieceBytes)),
                    static_cast<unsigned>(part.count));
    const cudaError_t error =
        LaunchOrdinary(context, kernel, grid, kThreads, 0, part, context.link_bytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvsweep::cuda
