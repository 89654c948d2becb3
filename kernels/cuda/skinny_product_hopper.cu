// A projection of a few rows on Hopper: the copy engine streams weights and activations through a
// ring in shared memory, and the weights of the next product are on their way before the kernels
// between two products have ended.
//
// A block has a contiguous range of tiles of 16 outputs, with all their columns, so that nothing is
// summed across blocks, and takes them in groups of two, or one at the end: then blocks differ by
// 16 outputs at most. One thread asks for units: 256 columns of a group and of all rows. Of each
// unit every warp multiplies its 32 columns; at a group's end the block adds the warps' sums in
// their order. So an output's order of summing depends on the number of columns alone.
//
// The columns of a warp are taken in another order, the same for weights and activations, in which
// a thread's fragments are contiguous.
//
// A gate of the outputs may be part of the product: a group is then a tile of gates and the tile of
// what they let pass.
#include <algorithm>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/product_shares.cuh"
#include "kernels/cuda/products.h"
#include "kernels/cuda/tensor_map.h"

namespace kvsweep::cuda {
namespace {

constexpr int kWarps = 8;  // that multiply; one more copies
constexpr int kThreads = kWarp * (kWarps + 1);
constexpr int kTileOutputs = 16;
constexpr int kGroupTiles = 2;
constexpr int kColumns = 32 * kWarps;  // the most that a box can have
constexpr int kUnitRowBytes = kColumns * 2;
constexpr int kTileBytes = kTileOutputs * kUnitRowBytes;
constexpr int kWeightBytes = kGroupTiles * kTileBytes;
// Of the ring: a longer one is next to no faster, but where many rows leave little of it to the
// weights. Beside it and a block of attention there is room for one that selects or gathers.
template <int kTokenTiles>
constexpr int kRingBytes = (kTokenTiles <= 2 ? 120 : 192) * 1024;
template <int kTokenTiles>
constexpr int kJoinedBytes = kGroupTiles* kTileOutputs* kTokenTiles * 8 *
                             kWarps* static_cast<int>(sizeof(float));
// One row in the short ring and 17 in the long one make as many.
constexpr int kMostStages = 7;
static_assert(kRingBytes<1> / (kWeightBytes + kUnitRowBytes) <= kMostStages);
static_assert(kRingBytes<4> / (kWeightBytes + 17 * kUnitRowBytes) <= kMostStages);

struct SkinnyMaps {
  CUtensorMap weight;  // [N, K], boxes of a group's rows
  CUtensorMap tile;    // the same, boxes of a tile's rows
  CUtensorMap in;      // [T, K], boxes of T rows
};

// kTokenTiles tiles of 8 rows of activations. kGated: `gated` [T, N / 2] takes the output's place.
template <int kTokenTiles, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    HopperSkinnyProductKernel(const __grid_constant__ GemmArgs args,
                              const __grid_constant__ Activations gated,
                              const __grid_constant__ SkinnyMaps maps, int tiles, int stages) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[2 * kMostStages];
  constexpr int kSums = kGroupTiles * kTokenTiles * 4;  // of a thread
  constexpr int kElements = kSums * kWarp;              // of a group
  const int unit_bytes = kWeightBytes + args.rows * kUnitRowBytes;
  float* const joined = reinterpret_cast<float*>(shared + stages * unit_bytes);
  const int gates = args.out_columns / 2;  // if kGated
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const uint32_t full = SharedAddress(barriers);
  const uint32_t empty = full + kMostStages * 8;
  ReleaseLaterKernels();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      InitialiseBarrier(full + stage * 8, 1);
      InitialiseBarrier(empty + stage * 8, kWarps);
    }
    PublishBarriers();
  }
  __syncthreads();
  constexpr int kLeastTiles = kTokenTiles <= 2 && !kGated ? 1 : kGroupTiles;
  const int64_t shares = (tiles + kLeastTiles - 1) / kLeastTiles;
  const auto first_tile = static_cast<int>(shares * blockIdx.x / gridDim.x) * kLeastTiles;
  const int end_tile =
      min(static_cast<int>(shares * (blockIdx.x + 1) / gridDim.x) * kLeastTiles, tiles);

  if (warp == kWarps) {
    if (lane != 0) {
      WaitForEarlierKernels();
      return;
    }
    int tile = first_tile;
    int column = 0;
    const auto next_unit = [&] {
      column += kColumns;
      if (column < args.in_columns) return;
      column = 0;
      tile += kGroupTiles;
    };
    const uint64_t policy = ReadOncePolicy();
    const auto copy_weights = [&](int stage) {
      const uint32_t barrier = full + stage * 8;
      if constexpr (kGated) {
        ArriveExpecting(barrier, unit_bytes);
        for (int half = 0; half < kGroupTiles; ++half) {
          CopyMatrixBox(SharedAddress(shared) + stage * unit_bytes + half * kTileBytes, maps.tile,
                        barrier, column, tile / kGroupTiles * kTileOutputs + half * gates, policy);
        }
        return;
      }
      const bool whole = tile + kGroupTiles <= end_tile;
      ArriveExpecting(barrier, unit_bytes - (whole ? 0 : kTileBytes));
      CopyMatrixBox(SharedAddress(shared) + stage * unit_bytes, whole ? maps.weight : maps.tile,
                    barrier, column, tile * kTileOutputs, policy);
    };
    const auto copy_rows = [&](int stage, int from) {
      CopyMatrixBox(SharedAddress(shared) + stage * unit_bytes + kWeightBytes, maps.in,
                    full + stage * 8, from, 0);
    };
    // Weights are constants of the model.
    int filled = 0;
    for (; filled < stages && tile < end_tile; ++filled) {
      copy_weights(filled);
      next_unit();
    }
    WaitForEarlierKernels();
    int from = 0;
    for (int stage = 0; stage < filled; ++stage) {
      copy_rows(stage, from);
      from = from + kColumns < args.in_columns ? from + kColumns : 0;
    }
    uint32_t parity = 0;
    for (int stage = 0; tile < end_tile;) {
      WaitPhase(empty + stage * 8, parity);
      FenceAsyncProxy();  // what the warps have read there came before
      copy_weights(stage);
      copy_rows(stage, column);
      next_unit();
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    return;
  }

  WaitForEarlierKernels();
  int stage = 0;
  uint32_t parity = 0;
  for (int tile = first_tile; tile < end_tile; tile += kGroupTiles) {
    // A group of one tile multiplies also what an earlier unit has left behind it, and stores
    // nothing of that.
    const int group_tiles = min(kGroupTiles, end_tile - tile);
    float sum[kGroupTiles][kTokenTiles][4] = {};
    for (int column = 0; column < args.in_columns; column += kColumns) {
      WaitPhase(full + stage * 8, parity);
      const unsigned char* const weights =
          shared + stage * unit_bytes + (warp * 32 + lane % 4 * 8) * 2;
      const unsigned char* const rows = weights + kWeightBytes;
      uint4 w[2 * kGroupTiles];
      uint4 x[kTokenTiles];
#pragma unroll
      for (int piece = 0; piece < 2 * kGroupTiles; ++piece) {
        w[piece] =
            *reinterpret_cast<const uint4*>(weights + (piece * 8 + lane / 4) * kUnitRowBytes);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int row = min(t * 8 + lane / 4, args.rows - 1);
        x[t] = *reinterpret_cast<const uint4*>(rows + row * kUnitRowBytes);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int m = 0; m < kGroupTiles; ++m) {
          const uint4 low = w[2 * m];
          const uint4 high = w[2 * m + 1];
          Multiply<__nv_bfloat16>(sum[m][t], low.x, high.x, low.y, high.y, x[t].x, x[t].y);
          Multiply<__nv_bfloat16>(sum[m][t], low.z, high.z, low.w, high.w, x[t].z, x[t].w);
        }
      }
      __syncwarp();
      if (lane == 0) Arrive(empty + stage * 8);
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }

    float* const mine = joined + warp * kElements + lane;
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i * kWarp] = (&sum[0][0][0])[i];
    MeetWarps(1, kWarps * kWarp);
    const auto total_of = [&](int i) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += joined[w * kElements + i * kWarp + lane];
      return total;
    };
    // Of a gated group the second tile's sums are used beside the first one's.
    constexpr int kEnds = kGated ? kSums / kGroupTiles : kSums;
    for (int i = warp; i < kEnds; i += kWarps) {
      const int in_group = i / (4 * kTokenTiles);
      const int row = i / 4 % kTokenTiles * 8 + lane % 4 * 2 + i % 2;
      const int in_tile = i % 4 / 2 * 8 + lane / 4;
      if (row >= args.rows) continue;
      if constexpr (kGated) {
        const int column = tile / kGroupTiles * kTileOutputs + in_tile;
        float gate = total_of(i);
        float passed = total_of(i + kEnds);
        if (args.bias != nullptr) {
          gate += args.bias[column];
          passed += args.bias[gates + column];
        }
        static_cast<__nv_bfloat16*>(gated.data)[row * gated.stride + column] =
            FromFloat<__nv_bfloat16>(Gated(gate, passed));
      } else {
        const int output = (tile + in_group) * kTileOutputs + in_tile;
        if (in_group >= group_tiles || output >= args.out_columns) continue;
        StoreSum(args, row, output, total_of(i), args.bias == nullptr ? 0.0f : args.bias[output]);
      }
    }
    MeetWarps(1, kWarps * kWarp);
  }
#endif
}

template <int kTokenTiles, bool kGated>
cudaError_t LaunchTiles(const GemmArgs& args, const Activations& gated,
                        const LaunchContext& context) {
  SkinnyMaps maps;
  MatrixShape weight{.data = args.weight,
                     .rows = args.out_columns,
                     .columns = args.in_columns,
                     .row_stride = args.in_columns,
                     .box_rows = kGroupTiles * kTileOutputs,
                     .box_columns = kColumns};
  cudaError_t error = MakeMatrixMap(weight, maps.weight);
  if (error != cudaSuccess) return error;
  weight.box_rows = kTileOutputs;
  error = MakeMatrixMap(weight, maps.tile);
  if (error != cudaSuccess) return error;
  error = MakeMatrixMap({.data = args.in.data,
                         .rows = args.rows,
                         .columns = args.in_columns,
                         .row_stride = args.in.stride,
                         .box_rows = static_cast<uint32_t>(args.rows),
                         .box_columns = kColumns},
                        maps.in);
  if (error != cudaSuccess) return error;
  const int unit_bytes = kWeightBytes + args.rows * kUnitRowBytes;
  const int stages = kRingBytes<kTokenTiles> / unit_bytes;
  const auto kernel = HopperSkinnyProductKernel<kTokenTiles, kGated>;
  // Once, and for all row counts: two launches of one capture must not set it for each other.
  constexpr int kMostBytes = kRingBytes<kTokenTiles> + kJoinedBytes<kTokenTiles>;
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  const int bytes = stages * unit_bytes + kJoinedBytes<kTokenTiles>;
  const auto tiles = static_cast<int>(DivideUp(args.out_columns, kTileOutputs));
  const int blocks = std::min(context.multiprocessors, tiles);
  return LaunchDependent(context, kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
                         static_cast<size_t>(bytes), args, gated, maps, tiles, stages);
}

template <bool kGated>
cudaError_t LaunchRows(const GemmArgs& args, const Activations& gated,
                       const LaunchContext& context) {
  if (args.rows <= 8) return LaunchTiles<1, kGated>(args, gated, context);
  if (args.rows <= 16) return LaunchTiles<2, kGated>(args, gated, context);
  return LaunchTiles<4, kGated>(args, gated, context);
}

}  // namespace

bool HasHopperSkinnyProduct() {
  static const bool built = IsBuilt(HopperSkinnyProductKernel<1, false>);
  return built;
}

cudaError_t LaunchHopperSkinnyProduct(const GemmArgs& args, const LaunchContext& context) {
  return LaunchRows<false>(args, {}, context);
}

cudaError_t LaunchHopperSkinnyProduct(const GatedGemmArgs& args, const LaunchContext& context) {
  return LaunchRows<true>(args.product, args.gated, context);
}

}  // namespace kvsweep::cuda
