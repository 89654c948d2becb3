// How blocks share a product of few rows, and what becomes of a finished sum: common to the kernels
// that read weights once.
//
// All (tile of outputs, unit of columns) pairs stand in one line, tile after tile, and every block
// has a contiguous share of it, equally long to one unit. A tile that several blocks share is
// summed from their parts by the last of them to arrive, in the order of the columns. So an
// output's order of summing depends on the weights' shape and the number of blocks alone.
#ifndef KVSWEEP_KERNELS_CUDA_PRODUCT_SHARES_CUH_
#define KVSWEEP_KERNELS_CUDA_PRODUCT_SHARES_CUH_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {

struct Shares {
  int64_t units = 0;  // of a tile
  int64_t total = 0;
  int64_t blocks = 1;

  __host__ __device__ int64_t Begin(int64_t block) const { return total * block / blocks; }
  // The block that has `unit`.
  __host__ __device__ int64_t Holder(int64_t unit) const {
    return ((unit + 1) * blocks - 1) / total;
  }
  // The blocks that share a tile.
  __device__ int64_t FirstBlock(int64_t tile) const { return Holder(tile * units); }
  __device__ int64_t LastBlock(int64_t tile) const { return Holder((tile + 1) * units - 1); }
};

struct ProductWorkspace {
  float* part = nullptr;       // [blocks, 2, floats of a part]: of a block's first and last tile
  uint32_t* ticket = nullptr;  // [tiles], zero between launches

  // The part of `block` for a tile that it shares.
  __device__ float* Part(const Shares& shares, int64_t block, int64_t tile, int floats) const {
    const int which = tile == shares.Begin(block) / shares.units ? 0 : 1;
    return part + (block * 2 + which) * floats;
  }
};

// Plans `tiles` of `units` for a device, or fails where the workspace is too small.
inline cudaError_t ShareProduct(int64_t tiles, int64_t units, int64_t floats_of_part,
                                const LaunchContext& context, Shares* shares,
                                ProductWorkspace* workspace) {
  shares->units = units;
  shares->total = tiles * units;
  shares->blocks = std::min<int64_t>(context.multiprocessors, shares->total);
  const int64_t part_bytes = 2 * shares->blocks * floats_of_part * 4;
  if (part_bytes > static_cast<int64_t>(context.workspace_bytes) || tiles > context.ticket_count) {
    return cudaErrorInvalidValue;
  }
  *workspace = {reinterpret_cast<float*>(context.workspace), context.tickets};
  return cudaSuccess;
}

// Takes a ticket for a block's part, which all its threads have written and fenced before the block
// met: whether it is the last of `parts`.
__device__ __forceinline__ bool TakeLastTicket(uint32_t* ticket, int64_t parts) {
  const bool is_last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(parts);
  if (is_last) *ticket = 0;
  return is_last;
}

// Ends a sum: activation(sum + bias), added to what out holds if accumulate.
__device__ __forceinline__ float FinishSum(const GemmArgs& args, float sum, float bias,
                                           float held) {
  sum += bias;
  if (args.relu) sum = fmaxf(sum, 0.0f);
  return sum + held;
}

// Ends output `column` of row `row` and stores it.
__device__ __forceinline__ void StoreSum(const GemmArgs& args, int64_t row, int64_t column,
                                         float sum, float bias) {
  const auto store = [&](auto* out) {
    out += row * args.out.stride + column;
    *out = FromFloat<std::remove_pointer_t<decltype(out)>>(
        FinishSum(args, sum, bias, args.accumulate ? ToFloat(*out) : 0.0f));
  };
  if (args.f32_out) {
    store(static_cast<float*>(args.out.data));
  } else {
    store(static_cast<__nv_bfloat16*>(args.out.data));
  }
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_PRODUCT_SHARES_CUH_
