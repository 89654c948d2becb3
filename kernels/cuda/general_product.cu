// A projection of any shape and alignment: square tiles through shared memory, every output summed
// column after column, so that it depends on its own row alone.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/products.h"

namespace kvsweep::cuda {
namespace {

constexpr int kTile = 32;    // outputs of a block in each direction, and columns at a time
constexpr int kOutputs = 4;  // rows of a thread
constexpr int kThreads = kTile * kTile / kOutputs;

// What a finished sum makes of an output: bias, activation, accumulation.
template <typename Out>
__device__ __forceinline__ void FinishOutput(const GemmArgs& args, int column, float sum,
                                             Out* out) {
  if (args.bias != nullptr) sum += args.bias[column];
  if (args.relu) sum = fmaxf(sum, 0.0f);
  if (args.accumulate) sum += ToFloat(*out);
  *out = FromFloat<Out>(sum);
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) GeneralProductKernel(GemmArgs args) {
  __shared__ float in[kTile][kTile + 1];      // [row, k]
  __shared__ float weight[kTile][kTile + 1];  // [column, k]
  ReleaseLaterKernels();
  WaitForEarlierKernels();
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
    if (row >= args.rows) break;
    const int column = static_cast<int>(column0) + lane;
    FinishOutput(args, column, sum[i],
                 static_cast<Out*>(args.out.data) + row * args.out.stride + column);
  }
}

// kWidth neighbouring outputs a thread.
template <typename Out, int kWidth>
__global__ void __launch_bounds__(kThreads)
    FinishKernel(GemmArgs args, const float* sums, int64_t sums_stride) {
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (column >= args.out_columns) return;
  using Sums = Vector<float, kWidth>;
  using Outputs = Vector<Out, kWidth>;
  const Sums sum = *reinterpret_cast<const Sums*>(sums + row * sums_stride + column);
  auto* const out =
      reinterpret_cast<Outputs*>(static_cast<Out*>(args.out.data) + row * args.out.stride + column);
  Outputs outputs = {};
  if (args.accumulate) outputs = *out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    FinishOutput(args, column + i, sum.element[i], &outputs.element[i]);
  }
  *out = outputs;
}

template <typename Out>
cudaError_t LaunchFinishAs(const GemmArgs& args, const float* sums, int64_t sums_stride,
                           const LaunchContext& context) {
  constexpr int kWide = 4;
  const bool wide = args.out_columns % kWide == 0 && args.out.stride % kWide == 0 &&
                    reinterpret_cast<uintptr_t>(args.out.data) % (kWide * sizeof(Out)) == 0;
  // Rows may be more than a grid's y can count.
  const dim3 grid(
      static_cast<unsigned>(args.rows),
      static_cast<unsigned>(DivideUp(args.out_columns, int64_t{kThreads} * (wide ? kWide : 1))));
  const auto kernel = wide ? FinishKernel<Out, kWide> : FinishKernel<Out, 1>;
  return LaunchDependent(context, kernel, grid, kThreads, 0, args, sums, sums_stride);
}

}  // namespace

cudaError_t LaunchGeneralProduct(const GemmArgs& args, const LaunchContext& context) {
  const dim3 grid(static_cast<unsigned>(DivideUp(args.out_columns, kTile)),
                  static_cast<unsigned>(DivideUp(args.rows, kTile)));
  const auto kernel = context.weight_dtype == DType::kF32 ? GeneralProductKernel<float, float>
                      : args.f32_out ? GeneralProductKernel<__nv_bfloat16, float>
                                     : GeneralProductKernel<__nv_bfloat16, __nv_bfloat16>;
  return LaunchDependent(context, kernel, grid, kThreads, 0, args);
}

cudaError_t LaunchFinish(const GemmArgs& args, const float* sums, int64_t sums_stride,
                         const LaunchContext& context) {
  return args.f32_out ? LaunchFinishAs<float>(args, sums, sums_stride, context)
                      : LaunchFinishAs<__nv_bfloat16>(args, sums, sums_stride, context);
}

}  // namespace kvsweep::cuda
