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
                     (first + r) * args.out.stride + int64_t{head} * args.out_dim + c,
                     sum[r] * args.scale);
      }
    }
  }
}

// Each token through the columns of its own set: one block for each token and head.
__global__ void __launch_bounds__(kThreads)
    ProjectPickedKernel(const __grid_constant__ ProjectHeadsArgs args, DType dtype) {
  extern __shared__ float in[];  // [d]
  const int32_t head = blockIdx.x % args.heads;
  const int64_t row = blockIdx.x / args.heads;
  for (int32_t i = threadIdx.x; i < args.in_dim; i += kThreads) {
    in[i] =
        LoadElement(args.in.data, dtype, row * args.in.stride + int64_t{head} * args.in_dim + i);
  }
  __syncthreads();
  const int32_t set = args.column_set[row];
  const int32_t kv_head = head / args.group;
  const float* const matrix = args.matrix + int64_t{kv_head} * args.in_dim * args.in_dim;
  for (int32_t c = threadIdx.x; c < args.out_dim; c += kThreads) {
    float sum = 0.0f;
    if (set >= 0) {
      const int32_t column =
          args.column[set * args.column_stride + int64_t{kv_head} * args.out_dim + c];
      for (int32_t k = 0; k < args.in_dim; ++k)
        sum += in[k] * matrix[int64_t{k} * args.in_dim + column];
    }
    StoreElement(args.out.data, dtype, row * args.out.stride + int64_t{head} * args.out_dim + c,
                 sum * args.scale);
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const ProjectHeadsArgs& args, const LaunchContext& context) {
  if (args.column != nullptr) {
    ProjectPickedKernel<<<args.rows * args.heads, kThreads, args.in_dim * sizeof(float),
                          context.stream>>>(args, context.activation_dtype);
    return cudaGetLastError();
  }
  const int blocks = (args.rows + kRows - 1) / kRows * args.heads;
  const size_t bytes = kRows * args.in_dim * sizeof(float);
  if (bytes > 48 * 1024) return cudaErrorInvalidValue;
  ProjectHeadsKernel<<<blocks, kThreads, bytes, context.stream>>>(args, context.activation_dtype);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
