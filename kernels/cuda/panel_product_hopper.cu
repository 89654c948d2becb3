// A projection of up to 64 rows on Hopper, for more of them than mma.sync keeps up with: the copy
// engine streams weights and activations through two rings in shared memory, a warpgroup multiplies
// what has landed, and the weights of the next product are on their way before the kernels between
// two products have ended.
//
// A block has a contiguous range of tiles of 16 outputs, with all their columns, so that nothing is
// summed across blocks; ranges differ by one tile at most. It takes them in passes of kTiles, the
// last ones perhaps of one less: outputs are the columns of a product (wgmma) whose rows are all
// activations, so one pass reads the activations once. An output's order of summing depends on the
// number of columns alone.
//
// A gate of the outputs may be part of the product: a tile is then eight gates and the eight
// outputs that they let pass, and a pass holds its gates first.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/product_shares.cuh"
#include "kernels/cuda/products.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace kvsweep::cuda {
namespace {

constexpr int kMultiplyingWarps = kWarpgroup / kWarp;
constexpr int kThreads = kWarpgroup + 2 * kWarp;  // and two warps that copy
constexpr int kTileOutputs = 16;
constexpr int kMostTiles = 8;    // of a pass
constexpr int kStagePanels = 2;  // of 64 columns
constexpr int kStageColumns = kStagePanels * kPanelColumns;
constexpr int kMostStages = 24;
constexpr int kAlignment = 1024;  // of panels
constexpr int kRingBytes = 220 * 1024;
// Of it for activations: where they come faster than weights do, more must be on their way.
constexpr int RowRingBytes(int tiles) { return (tiles <= 3 ? 96 : 48) * 1024; }
constexpr int kMostRowStages = 8;
constexpr int kMostBytes = kAlignment + kRingBytes;

struct PanelMaps {
  CUtensorMap whole;  // the weight [N, K], boxes of a pass's rows
  CUtensorMap less;   // the same, boxes of a pass that has one tile less
  CUtensorMap in;     // [T, K], boxes of all rows
};

struct PanelPlan {
  int block_tiles;    // of a block,
  int longer_blocks;  // and one more of the first ones
  int passes;
  int weight_stages;
  int row_stages;
  int box_rows;  // of activations: T, a multiple of 8
};

// What is added to the sums of `column` and the next one of `row`: the bias, and what out holds.
__device__ __forceinline__ void AddedPair(const GemmArgs& args, int64_t row, int64_t column,
                                          float* added) {
  if (args.bias != nullptr) {
    added[0] = args.bias[column];
    added[1] = args.bias[column + 1];
  }
  if (!args.accumulate) return;
  const auto add = [&](const auto* out) {
    out += row * args.out.stride + column;
    added[0] += ToFloat(out[0]);
    added[1] += ToFloat(out[1]);
  };
  if (args.f32_out) {
    add(static_cast<const float*>(args.out.data));
  } else {
    add(static_cast<const __nv_bfloat16*>(args.out.data));
  }
}

template <typename T>
__device__ __forceinline__ void StorePair(const Activations& to, int64_t row, int64_t column,
                                          float first, float second) {
  T* const at = static_cast<T*>(to.data) + row * to.stride + column;
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(at) = {first, second};
  } else {
    *reinterpret_cast<__nv_bfloat162*>(at) = __floats2bfloat162_rn(first, second);
  }
}

// `gated` [T, N / 2] takes the output's place if kGated.
template <int kTiles, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    PanelProductKernel(const __grid_constant__ GemmArgs args,
                       const __grid_constant__ Activations gated,
                       const __grid_constant__ PanelMaps maps,
                       const __grid_constant__ PanelPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[4 * kMostStages];
  constexpr int kTileRows = kGated ? kTileOutputs / 2 : kTileOutputs;  // of a box
  constexpr int kPanelBytes = kTiles * kTileOutputs * kPanelRowBytes;
  constexpr int kWeightBytes = kStagePanels * kPanelBytes;
  const int rows_panel_bytes = plan.box_rows * kPanelRowBytes;
  const int rows_bytes = kStagePanels * rows_panel_bytes;
  // Activations first: a product takes 64 rows, and what is behind those that are there.
  const uint32_t row_ring = (SharedAddress(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t weight_ring = row_ring + plan.row_stages * rows_bytes;
  const uint32_t weights_full = SharedAddress(barriers);
  const uint32_t weights_empty = weights_full + kMostStages * 8;
  const uint32_t rows_full = weights_empty + kMostStages * 8;
  const uint32_t rows_empty = rows_full + kMostStages * 8;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int gates = args.out_columns / 2;  // if kGated
  const auto block = static_cast<int>(blockIdx.x);
  const int first_tile = block * plan.block_tiles + min(block, plan.longer_blocks);
  const int whole_passes =
      plan.block_tiles + (block < plan.longer_blocks ? 1 : 0) - plan.passes * (kTiles - 1);

  ReleaseLaterKernels();
  if (warp == kMultiplyingWarps) {
    if (lane < plan.weight_stages) {
      InitialiseBarrier(weights_full + lane * 8, 1);
      InitialiseBarrier(weights_empty + lane * 8, kMultiplyingWarps);
      PublishBarriers();
    }
    __syncwarp();
    ArriveAtMeeting(1, kThreads);
    if (lane == 0) {
      // Weights are constants of the model.
      const uint64_t policy = ReadOncePolicy();
      RingPlace place{plan.weight_stages};
      int row = first_tile * kTileRows;
      for (int pass = 0; pass < plan.passes; ++pass) {
        const int size = pass < whole_passes ? kTiles : kTiles - 1;
        const CUtensorMap& map = size == kTiles ? maps.whole : maps.less;
        for (int column = 0; column < args.in_columns; column += kStageColumns) {
          WaitPhase(weights_empty + place.stage * 8, place.parity ^ 1);
          const uint32_t barrier = weights_full + place.stage * 8;
          const uint32_t target = weight_ring + place.stage * kWeightBytes;
          ArriveExpecting(barrier, kStagePanels * kPanelRowBytes * kTileOutputs * size);
#pragma unroll
          for (int panel = 0; panel < kStagePanels; ++panel) {
            const uint32_t to = target + panel * kPanelBytes;
            const int from = column + panel * kPanelColumns;
            CopyMatrixBox(to, map, barrier, from, row, policy);
            if constexpr (kGated) {
              CopyMatrixBox(to + kPanelBytes / 2, map, barrier, from, row + gates, policy);
            }
          }
          place.Advance();
        }
        row += size * kTileRows;
      }
    }
    WaitForEarlierKernels();
    return;
  }
  if (warp == kMultiplyingWarps + 1) {
    if (lane < plan.row_stages) {
      InitialiseBarrier(rows_full + lane * 8, 1);
      InitialiseBarrier(rows_empty + lane * 8, kMultiplyingWarps);
      PublishBarriers();
    }
    if (lane == 0) PrefetchMap(maps.in);
    __syncwarp();
    ArriveAtMeeting(1, kThreads);
    WaitForEarlierKernels();
    if (lane != 0) return;
    RingPlace place{plan.row_stages};
    for (int pass = 0; pass < plan.passes; ++pass) {
      for (int column = 0; column < args.in_columns; column += kStageColumns) {
        WaitPhase(rows_empty + place.stage * 8, place.parity ^ 1);
        const uint32_t barrier = rows_full + place.stage * 8;
        const uint32_t target = row_ring + place.stage * rows_bytes;
        ArriveExpecting(barrier, rows_bytes);
#pragma unroll
        for (int panel = 0; panel < kStagePanels; ++panel) {
          CopyMatrixBox(target + panel * rows_panel_bytes, maps.in, barrier,
                        column + panel * kPanelColumns, 0);
        }
        place.Advance();
      }
    }
    return;
  }

  MeetWarps(1, kThreads);
  WaitForEarlierKernels();
  RingPlace weights_place{plan.weight_stages};
  RingPlace rows_place{plan.row_stages};
  int tile = first_tile;
  for (int pass = 0; pass < plan.passes; ++pass) {
    const int size = pass < whole_passes ? kTiles : kTiles - 1;
    const int first_row = warp * 16 + lane / 4;
    const int first_column = tile * kTileRows + lane % 4 * 2;
    // Calls what(register, row, column) for each pair of results in columns that are next to each
    // other, where there is one: the two registers from `register` on.
    const auto for_each_pair = [&](auto what) {
#pragma unroll
      for (int eight = 0; eight < (kGated ? kTiles : 2 * kTiles); ++eight) {
        const int column = first_column + eight * 8;
        if (eight * 8 >= size * kTileRows || column >= (kGated ? gates : args.out_columns)) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + half * 8;
          if (row < args.rows) what(eight * 4 + half * 2, row, column);
        }
      }
    };
    // On their way while the sum is made.
    float added[8 * kTiles] = {};
    if (args.bias != nullptr || args.accumulate) {
      for_each_pair([&](int i, int row, int column) {
        AddedPair(args, row, column, added + i);
        if constexpr (kGated) AddedPair(args, row, column + gates, added + i + 4 * kTiles);
      });
    }
    float sum[8 * kTiles] = {};
    int weights_read = 0;
    int rows_read = 0;
    const auto give_back = [&] {
      if (lane != 0) return;
      Arrive(weights_empty + weights_read * 8);
      Arrive(rows_empty + rows_read * 8);
    };
    for (int column = 0; column < args.in_columns; column += kStageColumns) {
      WaitPhase(weights_full + weights_place.stage * 8, weights_place.parity);
      WaitPhase(rows_full + rows_place.stage * 8, rows_place.parity);
      const uint64_t weights = RowOperand(weight_ring + weights_place.stage * kWeightBytes);
      const uint64_t rows = RowOperand(row_ring + rows_place.stage * rows_bytes);
      BeginProducts();
#pragma unroll
      for (int panel = 0; panel < kStagePanels; ++panel) {
#pragma unroll
        for (int k = 0; k < kPanelColumns / 16; ++k) {
          StartProduct<true>(sum, Further(rows, panel * rows_panel_bytes + k * 32),
                             Further(weights, panel * kPanelBytes + k * 32));
        }
      }
      CommitProducts();
      if (column > 0) {
        WaitProducts<1>();
        give_back();
      }
      weights_read = weights_place.stage;
      rows_read = rows_place.stage;
      weights_place.Advance();
      rows_place.Advance();
    }
    WaitProducts<0>();
    Settle(sum);
    give_back();
    for_each_pair([&](int i, int row, int column) {
      const float first = sum[i] + added[i];
      const float second = sum[i + 1] + added[i + 1];
      if constexpr (kGated) {
        const int j = i + 4 * kTiles;
        StorePair<__nv_bfloat16>(gated, row, column, Gated(first, sum[j] + added[j]),
                                 Gated(second, sum[j + 1] + added[j + 1]));
      } else if (args.f32_out) {
        StorePair<float>(args.out, row, column, first, second);
      } else if (args.relu) {
        StorePair<__nv_bfloat16>(args.out, row, column, fmaxf(first, 0.0f), fmaxf(second, 0.0f));
      } else {
        StorePair<__nv_bfloat16>(args.out, row, column, first, second);
      }
    });
    tile += size;
  }
#endif
}

template <int kTiles, bool kGated>
cudaError_t LaunchTiles(const GemmArgs& args, const Activations& gated, PanelPlan plan, int blocks,
                        const LaunchContext& context) {
  const int tile_rows = kGated ? kTileOutputs / 2 : kTileOutputs;
  PanelMaps maps;
  MatrixShape weight{.data = args.weight,
                     .rows = args.out_columns,
                     .columns = args.in_columns,
                     .row_stride = args.in_columns,
                     .box_rows = static_cast<uint32_t>(kTiles * tile_rows),
                     .box_columns = kPanelColumns,
                     .is_panel = true};
  cudaError_t error = MakeMatrixMap(weight, maps.whole);
  if (error != cudaSuccess) return error;
  weight.box_rows = static_cast<uint32_t>(std::max(kTiles - 1, 1) * tile_rows);
  error = MakeMatrixMap(weight, maps.less);
  if (error != cudaSuccess) return error;
  error = MakeMatrixMap({.data = args.in.data,
                         .rows = args.rows,
                         .columns = args.in_columns,
                         .row_stride = args.in.stride,
                         .box_rows = static_cast<uint32_t>(plan.box_rows),
                         .box_columns = kPanelColumns,
                         .is_panel = true},
                        maps.in);
  if (error != cudaSuccess) return error;
  const int rows_bytes = kStagePanels * plan.box_rows * kPanelRowBytes;
  const int weight_bytes = kStagePanels * kTiles * kTileOutputs * kPanelRowBytes;
  plan.row_stages = std::min(RowRingBytes(kTiles) / rows_bytes, kMostRowStages);
  plan.weight_stages =
      std::min(kMostStages, (kRingBytes - plan.row_stages * rows_bytes) / weight_bytes);
  const auto kernel = PanelProductKernel<kTiles, kGated>;
  // Once, and for all row counts: two launches of one capture must not set it for each other.
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  const int bytes = kAlignment + plan.row_stages * rows_bytes + plan.weight_stages * weight_bytes;
  return LaunchDependent(context, kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
                         static_cast<size_t>(bytes), args, gated, maps, plan);
}

template <bool kGated>
cudaError_t LaunchPasses(const GemmArgs& args, const Activations& gated,
                         const LaunchContext& context) {
  const auto tiles = static_cast<int>(DivideUp(args.out_columns, kTileOutputs));
  const int blocks = std::min(context.multiprocessors, tiles);
  PanelPlan plan = {};
  plan.block_tiles = tiles / blocks;
  plan.longer_blocks = tiles % blocks;
  plan.box_rows = static_cast<int>(DivideUp(args.rows, 8)) * 8;
  const auto most = static_cast<int>(DivideUp(tiles, blocks));
  plan.passes = static_cast<int>(DivideUp(most, kMostTiles));
  switch (DivideUp(most, plan.passes)) {
    case 1:
      return LaunchTiles<1, kGated>(args, gated, plan, blocks, context);
    case 2:
      return LaunchTiles<2, kGated>(args, gated, plan, blocks, context);
    case 3:
      return LaunchTiles<3, kGated>(args, gated, plan, blocks, context);
    case 4:
      return LaunchTiles<4, kGated>(args, gated, plan, blocks, context);
    case 5:
      return LaunchTiles<5, kGated>(args, gated, plan, blocks, context);
    case 6:
      return LaunchTiles<6, kGated>(args, gated, plan, blocks, context);
    case 7:
      return LaunchTiles<7, kGated>(args, gated, plan, blocks, context);
    default:
      return LaunchTiles<8, kGated>(args, gated, plan, blocks, context);
  }
}

bool IsPair(const void* data, int64_t stride, uintptr_t pair_bytes) {
  return reinterpret_cast<uintptr_t>(data) % pair_bytes == 0 && stride % 2 == 0;
}

}  // namespace

bool IsPanelProduct(const GemmArgs& args, const LaunchContext& context) {
  static const bool built = IsBuilt(PanelProductKernel<1, false>);
  return built && IsSkinnyProduct(args, context) && args.out_columns % 2 == 0 &&
         IsPair(args.out.data, args.out.stride, args.f32_out ? 8 : 4) &&
         !(args.relu && (args.accumulate || args.f32_out));
}

bool IsPanelProductFaster(const GemmArgs& args, const LaunchContext& context) {
  if (args.rows > kPanelRows) return false;
  if (args.rows > kHopperSkinnyRows) return true;
  // Of fewer outputs a block, mma.sync keeps up with 32 rows.
  return args.rows > 8 && DivideUp(args.out_columns, kTileOutputs) > 2 * context.multiprocessors;
}

cudaError_t LaunchPanelProduct(const GemmArgs& args, const LaunchContext& context) {
  for (int32_t row = 0; row < args.rows; row += kPanelRows) {
    const cudaError_t error =
        LaunchPasses<false>(RowsOf(args, row, std::min(kPanelRows, args.rows - row)), {},
                            row == 0 ? context : AfterKernel(context));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchPanelProduct(const GatedGemmArgs& args, const LaunchContext& context) {
  return LaunchPasses<true>(args.product, args.gated, context);
}

}  // namespace kvsweep::cuda
