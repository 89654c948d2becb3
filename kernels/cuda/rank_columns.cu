// The columns that speculation keeps for one prompt: once a prompt, in double, one block for each
// KV head. A thread owns a column for every kRowLanes-th row; sums join in a fixed order.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kMostColumns = 256;
constexpr int kRowLanes = 4;

// Sum over all rows of |(in[t, head] - mean) A| for the thread's column, joined over the row lanes;
// valid in lane 0.
__device__ double Energy(const Activations& in, DType dtype, int64_t head, int32_t rows, int32_t d,
                         const float* matrix, const double* mean, float (*vector)[kMostColumns],
                         double (*joined)[kMostColumns]) {
  const int32_t c = threadIdx.x;
  const int32_t lane = threadIdx.y;
  double energy = 0.0;
  for (int32_t base = 0; base < rows; base += kRowLanes) {
    const int32_t t = base + lane;
    if (c < d && t < rows) {
      vector[lane][c] = LoadElement(in.data, dtype, t * in.stride + head * d + c);
    }
    __syncthreads();
    if (c < d && t < rows) {
      double product = 0.0;
      for (int32_t j = 0; j < d; ++j) {
        const double element =
            static_cast<double>(vector[lane][j]) - (mean == nullptr ? 0.0 : mean[j]);
        product += element * matrix[j * d + c];
      }
      energy += fabs(product);
    }
    __syncthreads();
  }
  if (c < d) joined[lane][c] = energy;
  __syncthreads();
  double all = 0.0;
  if (lane == 0 && c < d) {
    for (int l = 0; l < kRowLanes; ++l) all += joined[l][c];
  }
  __syncthreads();
  return all;
}

__global__ void __launch_bounds__(kMostColumns* kRowLanes)
    RankColumnsKernel(const __grid_constant__ RankColumnsArgs args, DType dtype) {
  __shared__ float vector[kRowLanes][kMostColumns];
  __shared__ double joined[kRowLanes][kMostColumns];
  __shared__ double mean[kMostColumns];
  __shared__ double energy[kMostColumns];
  __shared__ bool kept[kMostColumns];
  const int32_t d = args.head_dim;
  const int32_t head = blockIdx.x;
  const int32_t group = args.query_heads / args.kv_heads;
  const int32_t c = threadIdx.x;
  const bool owns = threadIdx.y == 0 && c < d;
  const float* const matrix = args.matrix + int64_t{head} * d * d;
  double total = 0.0;
  for (int32_t q = 0; q < group; ++q) {
    total += Energy(args.query, dtype, int64_t{head} * group + q, args.rows, d, matrix, nullptr,
                    vector, joined);
  }
  if (!args.query_alone) {
    // What all keys share cancels in the softmax and must not win columns.
    if (owns) {
      double sum = 0.0;
      for (int32_t t = 0; t < args.rows; ++t) {
        sum += LoadElement(args.key.data, dtype, t * args.key.stride + int64_t{head} * d + c);
      }
      mean[c] = sum / args.rows;
    }
    __syncthreads();
    total *= Energy(args.key, dtype, head, args.rows, d, matrix, mean, vector, joined);
  }
  if (owns) energy[c] = total;
  __syncthreads();
  if (owns) {
    int32_t larger = 0;
    for (int32_t other = 0; other < d; ++other) {
      larger += energy[other] > total || (energy[other] == total && other < c) ? 1 : 0;
    }
    kept[c] = larger < args.partial_dim;
  }
  __syncthreads();
  if (!owns || !kept[c]) return;
  int32_t place = 0;
  for (int32_t other = 0; other < c; ++other) place += kept[other] ? 1 : 0;
  args.column[int64_t{head} * args.partial_dim + place] = c;
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const RankColumnsArgs& args, const LaunchContext& context) {
  if (args.head_dim > kMostColumns) return cudaErrorInvalidValue;
  RankColumnsKernel<<<args.kv_heads, dim3(kMostColumns, kRowLanes), 0, context.stream>>>(
      args, context.activation_dtype);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
