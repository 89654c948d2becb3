// A projection of few rows, bound by reading the weights once: a kernel for every architecture, and
// the choice between it and Hopper's own (skinny_product_hopper.cu, panel_product_hopper.cu).
//
// A unit is 128 outputs x 64 columns; product_shares.cuh says who multiplies which. Weights stream
// through a ring in shared memory in which each thread copies and reads its own sixteen bytes:
// deep, and without a barrier. They feed the tensor cores as they lie: the columns inside a group
// of 32 are taken in another order, the same for weights and activations, in which a thread's
// fragments are contiguous.
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/product_shares.cuh"
#include "kernels/cuda/products.h"

namespace kvsweep::cuda {
namespace {

constexpr int kTileOutputs = 128;
constexpr int kUnitColumns = 64;
constexpr int kOutputWarps = 4;  // 32 outputs each
constexpr int kColumnWarps = 2;  // 32 columns of a unit each
constexpr int kThreads = kWarp * kOutputWarps * kColumnWarps;
constexpr int kPieces = 4;  // rows lane / 4 + {0, 8, 16, 24} of the warp's 32
constexpr int kStages = 8;

// kTokenTiles tiles of 8 rows of activations.
template <int kTokenTiles>
struct Accumulators {
  float sum[2][kTokenTiles][4];  // [16 outputs, 8 rows] of a warp's 32 outputs
  static constexpr int kFloats = 2 * kTokenTiles * 4;

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) (&sum[0][0][0])[i] = 0.0f;
  }
};

template <int kTokenTiles>
__device__ __forceinline__ void StoreTile(const GemmArgs& args, int64_t tile,
                                          const Accumulators<kTokenTiles>& all, int output_warp,
                                          int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int64_t column =
          tile * kTileOutputs + output_warp * 32 + half * 16 + pair * 8 + lane / 4;
      if (column >= args.out_columns) continue;
      const float bias = args.bias == nullptr ? 0.0f : args.bias[column];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = t * 8 + lane % 4 * 2 + i;
          if (row >= args.rows) continue;
          StoreSum(args, row, column, all.sum[half][t][pair * 2 + i], bias);
        }
      }
    }
  }
}

// Shared memory: the ring, then room to add what the column warps have summed.
template <int kTokenTiles>
constexpr size_t SharedBytes() {
  return size_t{kStages} * kPieces * kThreads * 16 +
         size_t{Accumulators<kTokenTiles>::kFloats} * kWarp * kOutputWarps * sizeof(float);
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    SkinnyProductKernel(GemmArgs args, Shares shares, ProductWorkspace workspace) {
  using Sums = Accumulators<kTokenTiles>;
  extern __shared__ __align__(16) unsigned char shared[];
  uint4* const ring = reinterpret_cast<uint4*>(shared);  // [stages, pieces, threads]
  float* const joined = reinterpret_cast<float*>(shared + kStages * kPieces * kThreads * 16);
  __shared__ bool is_last;
  ReleaseLaterKernels();

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int output_warp = warp % kOutputWarps;
  const int column_warp = warp / kOutputWarps;
  const int64_t begin = shares.Begin(blockIdx.x);
  const int64_t end = shares.Begin(blockIdx.x + 1);
  const auto* const weight = static_cast<const __nv_bfloat16*>(args.weight);
  const auto* const in = static_cast<const __nv_bfloat16*>(args.in.data);

  // The unit that is copied next, ahead of the one that is multiplied.
  int64_t copy_unit = begin;
  int64_t copy_tile = begin / shares.units;
  int copy_column = static_cast<int>(begin - copy_tile * shares.units) * kUnitColumns;
  const int thread_column = column_warp * 32 + lane % 4 * 8;
  const int thread_output = output_warp * 32 + lane / 4;
  auto copy_next = [&](int stage) {
    if (copy_unit < end) {
      const int column = copy_column + thread_column;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int64_t output = copy_tile * kTileOutputs + thread_output + piece * 8;
        const bool valid = output < args.out_columns && column < args.in_columns;
        const auto* const source = valid ? weight + output * args.in_columns + column : weight;
        CopyAsync(SharedAddress(ring + (stage * kPieces + piece) * kThreads + threadIdx.x), source,
                  valid);
      }
      ++copy_unit;
      copy_column += kUnitColumns;
      if (copy_column >= args.in_columns) {
        copy_column = 0;
        ++copy_tile;
      }
    }
    CommitCopies();
  };

  // Activations of a unit: a thread's fragments are contiguous in the row.
  auto load_rows = [&](uint4(&rows)[kTokenTiles], int column) {
    column += thread_column;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int row = t * 8 + lane / 4;
      rows[t] = row < args.rows && column < args.in_columns
                    ? *reinterpret_cast<const uint4*>(in + row * args.in.stride + column)
                    : uint4{0, 0, 0, 0};
    }
  };

  // Weights are constants of the model.
  for (int stage = 0; stage < kStages - 1; ++stage) copy_next(stage);
  WaitForEarlierKernels();
  Sums all;
  all.Clear();
  int64_t tile = begin / shares.units;
  int column = static_cast<int>(begin - tile * shares.units) * kUnitColumns;
  uint4 rows[kTokenTiles];
  load_rows(rows, column);
  int stage = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    WaitCopies<kStages - 2>();
    uint4 w[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      w[piece] = ring[(stage * kPieces + piece) * kThreads + threadIdx.x];
    }
    copy_next((stage + kStages - 1) % kStages);
    stage = (stage + 1) % kStages;
    uint4 current[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) current[t] = rows[t];
    int next_column = column + kUnitColumns;
    const bool tile_ends = next_column >= args.in_columns;
    if (tile_ends) next_column = 0;
    if (unit + 1 < end) load_rows(rows, next_column);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const uint4 x = current[t];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 low = w[2 * half];
        const uint4 high = w[2 * half + 1];
        Multiply<__nv_bfloat16>(all.sum[half][t], low.x, high.x, low.y, high.y, x.x, x.y);
        Multiply<__nv_bfloat16>(all.sum[half][t], low.z, high.z, low.w, high.w, x.z, x.w);
      }
    }
    column = next_column;
    if (!tile_ends && unit + 1 < end) continue;

    // The block's part of the tile is complete: add the column warps.
    float* const mine = joined + output_warp * kWarp + lane;
    if (column_warp == 1) {
#pragma unroll
      for (int i = 0; i < Sums::kFloats; ++i) {
        mine[i * kWarp * kOutputWarps] = (&all.sum[0][0][0])[i];
      }
    }
    __syncthreads();
    constexpr int kPartFloats = Sums::kFloats * kWarp * kOutputWarps;
    const int64_t first_block = shares.FirstBlock(tile);
    const int64_t last_block = shares.LastBlock(tile);
    const bool shared_tile = first_block != last_block;
    if (column_warp == 0) {
#pragma unroll
      for (int i = 0; i < Sums::kFloats; ++i) {
        (&all.sum[0][0][0])[i] += mine[i * kWarp * kOutputWarps];
      }
      if (!shared_tile) {
        StoreTile(args, tile, all, output_warp, lane);
      } else {
        float* const part =
            workspace.Part(shares, blockIdx.x, tile, kPartFloats) + output_warp * kWarp + lane;
#pragma unroll
        for (int i = 0; i < Sums::kFloats; ++i) {
          __stcg(part + i * kWarp * kOutputWarps, (&all.sum[0][0][0])[i]);
        }
        __threadfence();
      }
    }
    __syncthreads();
    if (shared_tile) {
      if (threadIdx.x == 0) {
        is_last = TakeLastTicket(workspace.ticket + tile, last_block - first_block + 1);
      }
      __syncthreads();
      if (is_last && column_warp == 0) {
        __threadfence();
        all.Clear();
        for (int64_t block = first_block; block <= last_block; ++block) {
          const float* const part =
              workspace.Part(shares, block, tile, kPartFloats) + output_warp * kWarp + lane;
#pragma unroll
          for (int i = 0; i < Sums::kFloats; ++i) {
            (&all.sum[0][0][0])[i] += __ldcg(part + i * kWarp * kOutputWarps);
          }
        }
        StoreTile(args, tile, all, output_warp, lane);
      }
      __syncthreads();
    }
    all.Clear();
    ++tile;
  }
}

template <int kTokenTiles>
cudaError_t LaunchTiles(const GemmArgs& args, const LaunchContext& context) {
  Shares shares;
  ProductWorkspace workspace;
  cudaError_t error = ShareProduct(
      DivideUp(args.out_columns, kTileOutputs), DivideUp(args.in_columns, kUnitColumns),
      Accumulators<kTokenTiles>::kFloats * kWarp * kOutputWarps, context, &shares, &workspace);
  if (error != cudaSuccess) return error;
  constexpr size_t kShared = SharedBytes<kTokenTiles>();
  const auto kernel = SkinnyProductKernel<kTokenTiles>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kShared));
  if (error != cudaSuccess) return error;
  return LaunchDependent(context, kernel, dim3(static_cast<unsigned>(shares.blocks)), kThreads,
                         kShared, args, shares, workspace);
}

constexpr int32_t kMostRows = 64;  // of a pass

cudaError_t LaunchRows(const GemmArgs& args, const LaunchContext& context) {
  if (args.rows <= 8) return LaunchTiles<1>(args, context);
  if (args.rows <= 16) return LaunchTiles<2>(args, context);
  if (args.rows <= 32) return LaunchTiles<4>(args, context);
  return LaunchTiles<8>(args, context);
}

}  // namespace

bool IsSkinnyProduct(const GemmArgs& args, const LaunchContext& context) {
  return context.weight_dtype == DType::kBf16 &&
         CanVectorise<__nv_bfloat16>(args.weight, args.in_columns, args.in_columns) &&
         CanVectorise<__nv_bfloat16>(args.in.data, args.in.stride, args.in_columns);
}

bool IsSkinnyProductFaster(const GemmArgs& args) {
  return args.rows <= kHopperSkinnyRows && HasHopperSkinnyProduct();
}

GemmArgs RowsOf(GemmArgs args, int32_t row, int32_t rows) {
  args.rows = rows;
  args.in.data = static_cast<std::byte*>(args.in.data) + row * args.in.stride * 2;
  args.out.data =
      static_cast<std::byte*>(args.out.data) + row * args.out.stride * (args.f32_out ? 4 : 2);
  return args;
}

cudaError_t LaunchSkinnyProduct(const GemmArgs& args, const LaunchContext& context) {
  const bool on_hopper = HasHopperSkinnyProduct();
  const int32_t most = on_hopper ? kHopperSkinnyRows : kMostRows;
  for (int32_t row = 0; row < args.rows; row += most) {
    const GemmArgs part = RowsOf(args, row, std::min(most, args.rows - row));
    const LaunchContext behind = row == 0 ? context : AfterKernel(context);
    const cudaError_t error =
        on_hopper ? LaunchHopperSkinnyProduct(part, behind) : LaunchRows(part, behind);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool CanGate(const GatedGemmArgs& args, const LaunchContext& context) {
  const GemmArgs& product = args.product;
  constexpr int32_t kGatedTile = 2 * 16;  // outputs of either kernel's smallest gated part
  return IsSkinnyProduct(product, context) && context.activation_dtype == DType::kBf16 &&
         !product.relu && !product.accumulate && !product.f32_out &&
         product.out_columns % kGatedTile == 0 && args.gated.stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(args.gated.data) % 4 == 0 &&
         (IsSkinnyProductFaster(product) ||
          (IsPanelProduct(product, context) && IsPanelProductFaster(product, context)));
}

cudaError_t Launch(const GatedGemmArgs& args, const LaunchContext& context) {
  const GemmArgs& product = args.product;
  return IsPanelProduct(product, context) && IsPanelProductFaster(product, context)
             ? LaunchPanelProduct(args, context)
             : LaunchHopperSkinnyProduct(args, context);
}

}  // namespace kvsweep::cuda
