// The selected rows of each sequence and head, from a pool that may be pinned host memory: read by
// the kernel as it is, since how many rows there are only the device knows.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/move_rows.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    GatherRowsKernel(const __grid_constant__ GatherRowsArgs args, unsigned long long* link_bytes) {
  MoveHeads<Unit>(
      args.target, args.source, args.rows * args.kv_heads, args.kv_heads, args.head_dim,
      [&](int32_t pair) {
        if (!IsActive(args.row_active, pair / args.kv_heads)) return 0;
        return static_cast<int32_t>(
            min(static_cast<int64_t>(args.selected[pair]), args.index_stride));
      },
      [&](int32_t pair, int32_t i) {
        return Place{pair / args.kv_heads, args.index[pair * args.index_stride + i]};
      },
      link_bytes);
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const GatherRowsArgs& args, const LaunchContext& context) {
  const int64_t batches = (args.index_stride + kRowsInFlight - 1) / kRowsInFlight;
  const int blocks = MoveBlocks(context, int64_t{args.rows} * args.kv_heads * batches);
  const auto kernel = CanMoveWide(args.target, args.source, args.head_dim)
                          ? GatherRowsKernel<uint4>
                          : GatherRowsKernel<uint8_t>;
  return LaunchOrdinary(context, kernel, static_cast<unsigned>(blocks), kMoveThreads, 0, args,
                        context.link_bytes);
}

}  // namespace kvsweep::cuda
