// A run of tokens of each sequence into a tile: how full layers and prefill history stream from the
// host through a ring.
#include "kernels/cuda/move_rows.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    CopyTileKernel(const __grid_constant__ CopyTileArgs args, unsigned long long* link_bytes) {
  const bool single = args.row >= 0;
  const int64_t warps = int64_t{gridDim.x} * kMoveThreads / 32;
  const int64_t pairs = int64_t{single ? 1 : args.rows} * args.kv_heads;
  const int64_t pieces = (args.tokens + kRowsInFlight - 1) / kRowsInFlight;
  int64_t moved = 0;
  for (int64_t item = int64_t{blockIdx.x} * kMoveThreads / 32 + threadIdx.x / 32;
       item < pairs * pieces; item += warps) {
    const int64_t pair = item % pairs;
    const int64_t row = pair / args.kv_heads;
    const int32_t head = static_cast<int32_t>(pair % args.kv_heads);
    const int32_t first = static_cast<int32_t>(item / pairs) * kRowsInFlight;
    int32_t stored = args.row_tokens;
    if (!single) stored = IsActive(args.row_active, row) ? KvLength(args.source, row, head) : 0;
    const int32_t tokens = min(max(stored - args.first_token, 0), args.tokens);
    const int32_t count = min(kRowsInFlight, tokens - first);
    if (count <= 0) continue;
    const int64_t source_row = single ? args.row : row;
    MoveRows<Unit>(
        args.target, args.source, head, args.head_dim, count,
        [&](int j) {
          return Place{row, first + j};
        },
        [&](int j) {
          return Place{source_row, args.first_token + first + j};
        });
    moved += count;
  }
  CountLinkBytes(link_bytes, moved,
                 int64_t{args.head_dim} * ElementBytes(args.source.dtype) *
                     (args.target.value == nullptr ? 1 : 2));
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const CopyTileArgs& args, const LaunchContext& context) {
  const int64_t rows = args.row >= 0 ? 1 : args.rows;
  const int64_t pieces = (args.tokens + kRowsInFlight - 1) / kRowsInFlight;
  if (pieces == 0) return cudaSuccess;
  const int blocks = MoveBlocks(context, rows * args.kv_heads * pieces);
  if (CanMoveWide(args.target, args.source, args.head_dim)) {
    CopyTileKernel<uint4><<<blocks, kMoveThreads, 0, context.stream>>>(args, context.link_bytes);
  } else {
    CopyTileKernel<uint8_t><<<blocks, kMoveThreads, 0, context.stream>>>(args, context.link_bytes);
  }
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
