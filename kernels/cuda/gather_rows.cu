// The selected rows of each sequence and head, from a pool that may be pinned host memory: read by
// the kernel as it is, since how many rows there are only the device knows.
#include "kernels/cuda/move_rows.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    GatherRowsKernel(const __grid_constant__ GatherRowsArgs args, unsigned long long* link_bytes) {
  const int64_t warps = int64_t{gridDim.x} * kMoveThreads / 32;
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  const int64_t pieces = (args.index_stride + kRowsInFlight - 1) / kRowsInFlight;
  int64_t moved = 0;
  // The first pieces of all heads come before the second ones: warps stay evenly loaded.
  for (int64_t item = int64_t{blockIdx.x} * kMoveThreads / 32 + threadIdx.x / 32;
       item < pairs * pieces; item += warps) {
    const int64_t pair = item % pairs;
    const int64_t row = pair / args.kv_heads;
    const int32_t head = static_cast<int32_t>(pair % args.kv_heads);
    const int32_t first = static_cast<int32_t>(item / pairs) * kRowsInFlight;
    if (!IsActive(args.row_active, row)) continue;
    const int32_t selected =
        static_cast<int32_t>(min(static_cast<int64_t>(args.selected[pair]), args.index_stride));
    const int32_t count = min(kRowsInFlight, selected - first);
    if (count <= 0) continue;
    const int32_t* const index = args.index + pair * args.index_stride + first;
    // One lane for each row asks for its index; the others get it from there.
    const int lane = threadIdx.x % 32;
    const int32_t own = lane < count ? index[lane] : 0;
    int32_t token[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) token[j] = __shfl_sync(~0u, own, j);
    MoveRows<Unit>(
        args.target, args.source, head, args.head_dim, count,
        [&](int j) {
          return Place{row, first + j};
        },
        [&](int j) {
          return Place{row, token[j]};
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

cudaError_t Launch(const GatherRowsArgs& args, const LaunchContext& context) {
  const int64_t pieces = (args.index_stride + kRowsInFlight - 1) / kRowsInFlight;
  const int blocks = MoveBlocks(context, int64_t{args.rows} * args.kv_heads * pieces);
  if (CanMoveWide(args.target, args.source, args.head_dim)) {
    GatherRowsKernel<uint4><<<blocks, kMoveThreads, 0, context.stream>>>(args, context.link_bytes);
  } else {
    GatherRowsKernel<uint8_t>
        <<<blocks, kMoveThreads, 0, context.stream>>>(args, context.link_bytes);
  }
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
