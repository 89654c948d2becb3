// Each head of a row through a thin matrix of its KV head. The matrices are small and stay in the
// caches; a block takes one head and kRows rows, a thread one column of all of them.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kRows = 8;
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    ProjectHeadsKernel(const __grid_constant__ ProjectHeadsArgs args, DType dtype) {
  extern __shared__ float in[];  // [kRows, d]
  const int32_t head = blockIdx.x % args.heads;
  const int32_t first = blockIdx.x / args.heads * kRows;
  const int32_t rows = min(kRows, args.rows - first);
  for (int32_t i = threadIdx.x; i < kRows * args.in_dim; i += kThreads) {
    const int32_t r = i / args.in_dim;
    const int64_t column = int64_t{head} * args.in_dim + i % args.in_dim;
    in[i] =
        r < rows ? LoadElement(args.in.data, dtype, (first + r) * args.in.stride + column) : 0.0f;
  }
  __syncthreads();
  const float* const matrix = args.matrix + int64_t{head / args.group} * args.in_dim * args.out_dim;
  for (int32_t c = threadIdx.x; c < args.out_dim; c += kThreads) {
    float sum[kRows] = {};
    for (int32_t k = 0; k < args.in_dim; ++k) {
      const float weight = matrix[int64_t{k} * args.out_dim + c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += in[r * args.in_dim + k] * weight;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) {
        StoreElement(args.out.data, dtype,
                     (first + r) * args.out.stride + int64_t{head} * args.out_dim + c, sum[r]);
      }
    }
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const ProjectHeadsArgs& args, const LaunchContext& context) {
  const int blocks = (args.rows + kRows - 1) / kRows * args.heads;
  const size_t bytes = kRows * args.in_dim * sizeof(float);
  if (bytes > 48 * 1024) return cudaErrorInvalidValue;
  ProjectHeadsKernel<<<blocks, kThreads, bytes, context.stream>>>(args, context.activation_dtype);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
