// A projection of any shape and alignment: square tiles through shared memory, every output summed
// column after column, so that it depends on its own row alone.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/products.h"

namespace kvsweep::cuda {
namespace {

constexpr int kTile = 32;    // outputs of a block in each direction, and columns at a time
constexpr int kOutputs = 4;  // rows of a thread
constexpr int kThreads = kTile * kTile / kOutputs;

// Stores a finished sum: bias, activation, accumulation.
template <typename Out>
__device__ __forceinline__ void Finish(const GemmArgs& args, int64_t row, int column, float sum) {
  Out* const out = static_cast<Out*>(args.out.data) + row * args.out.stride + column;
  if (args.bias != nullptr) sum += args.bias[column];
  if (args.relu) sum = fmaxf(sum, 0.0f);
  if (args.accumulate) sum += ToFloat(*out);
  *out = FromFloat<Out>(sum);
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) GeneralProductKernel(GemmArgs args) {
  __shared__ float in[kTile][kTile + 1];      // [row, k]
  __shared__ float weight[kTile][kTile + 1];  // [column, k]
  const int lane = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile * kOutputs;
  const int64_t row0 = int64_t{blockIdx.y} * kTile;
  const int64_t column0 = int64_t{blockIdx.x} * kTile;
  float sum[kOutputs] = {};
  for (int k0 = 0; k0 < args.in_columns; k0 += kTile) {
    const int k = k0 + lane;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int line = first + i;
      const bool in_range = k < args.in_columns;
      in[line][lane] =
          in_range && row0 + line < args.rows
              ? ToFloat(static_cast<const T*>(args.in.data)[(row0 + line) * args.in.stride + k])
              : 0.0f;
      weight[line][lane] =
          in_range && column0 + line < args.out_columns
              ? ToFloat(static_cast<const T*>(args.weight)[(column0 + line) * args.in_columns + k])
              : 0.0f;
    }
    __syncthreads();
    for (int k_in = 0; k_in < kTile; ++k_in) {
      const float w = weight[lane][k_in];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) sum[i] += in[first + i][k_in] * w;
    }
    __syncthreads();
  }
  if (column0 + lane >= args.out_columns) return;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int64_t row = row0 + first + i;
    if (row < args.rows) Finish<Out>(args, row, static_cast<int>(column0) + lane, sum[i]);
  }
}

template <typename Out>
__global__ void BiasKernel(GemmArgs args) {
  const int64_t row = blockIdx.y;
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= args.out_columns) return;
  Out* const out = static_cast<Out*>(args.out.data) + row * args.out.stride + column;
  float value = ToFloat(*out);
  if (args.bias != nullptr) value += args.bias[column];
  if (args.relu) value = fmaxf(value, 0.0f);
  *out = FromFloat<Out>(value);
}

}  // namespace

cudaError_t LaunchGeneralProduct(const GemmArgs& args, const LaunchContext& context) {
  const dim3 grid(static_cast<unsigned>(DivideUp(args.out_columns, kTile)),
                  static_cast<unsigned>(DivideUp(args.rows, kTile)));
  if (context.weight_dtype == DType::kF32) {
    GeneralProductKernel<float, float><<<grid, kThreads, 0, context.stream>>>(args);
  } else if (args.f32_out) {
    GeneralProductKernel<__nv_bfloat16, float><<<grid, kThreads, 0, context.stream>>>(args);
  } else {
    GeneralProductKernel<__nv_bfloat16, __nv_bfloat16><<<grid, kThreads, 0, context.stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchBias(const GemmArgs& args, const LaunchContext& context) {
  const dim3 grid(static_cast<unsigned>(DivideUp(args.out_columns, kThreads)),
                  static_cast<unsigned>(args.rows));
  if (args.f32_out || context.activation_dtype == DType::kF32) {
    BiasKernel<float><<<grid, kThreads, 0, context.stream>>>(args);
  } else {
    BiasKernel<__nv_bfloat16><<<grid, kThreads, 0, context.stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
