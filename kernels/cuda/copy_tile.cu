// A run of tokens of each sequence into a tile: how full layers and prefill history stream from the
// host through a ring.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/move_rows.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    CopyTileKernel(const __grid_constant__ CopyTileArgs args, unsigned long long* link_bytes) {
  const bool single = args.row >= 0;
  MoveHeads<Unit>(
      args.target, args.source, (single ? 1 : args.rows) * args.kv_heads, args.kv_heads,
      args.head_dim,
      [&](int32_t pair) {
        const int32_t row = pair / args.kv_heads;
        int32_t stored = args.row_tokens;
        if (!single) {
          stored = IsActive(args.row_active, row)
                       ? KvLength(args.source, row, pair - row * args.kv_heads)
                       : 0;
        }
        return min(max(stored - args.first_token, 0), args.tokens);
      },
      [&](int32_t pair, int32_t i) {
        return Place{single ? args.row : pair / args.kv_heads, args.first_token + i};
      },
      link_bytes);
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const CopyTileArgs& args, const LaunchContext& context) {
  if (args.tokens <= 0) return cudaSuccess;
  const int64_t rows = args.row >= 0 ? 1 : args.rows;
  const int64_t batches = (args.tokens + kRowsInFlight - 1) / kRowsInFlight;
  const int blocks = MoveBlocks(context, rows * args.kv_heads * batches);
  const auto kernel = CanMoveWide(args.target, args.source, args.head_dim)
                          ? CopyTileKernel<uint4>
                          : CopyTileKernel<uint8_t>;
  return LaunchOrdinary(context, kernel, static_cast<unsigned>(blocks), kMoveThreads, 0, args,
                        context.link_bytes);
}

}  // namespace kvsweep::cuda
