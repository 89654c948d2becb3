// Each head of a row through a thin matrix of its KV head. A block takes one head and kRows rows;
// its threads share the sum of each output among them, so that one short wait for memory, that for
// the matrix, comes before the last. Slices of a sum join in a fixed order.
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kRows = 8;
constexpr size_t kSharedBytes = 48 * 1024;

// What of a sum a thread adds up: slice `slice` of the `slices` of the rows' product with column
// `column` of the output.
struct Slice {
  int32_t column;
  int32_t slice;
  int32_t slices;
  int32_t begin;
  int32_t end;

  __device__ Slice(const ProjectHeadsArgs& args, int32_t first_column) {
    const int32_t columns = min(args.out_dim - first_column, kThreads);
    slices = kThreads / columns;
    slice = static_cast<int32_t>(threadIdx.x) / columns;
    column = first_column + static_cast<int32_t>(threadIdx.x) % columns;
    const int32_t share = (args.in_dim + slices - 1) / slices;
    begin = min(slice * share, args.in_dim);
    end = slice < slices ? min(begin + share, args.in_dim) : begin;
  }
};

// kPicked: rows have columns of their own, a block takes one row. Otherwise the matrix is copied to
// shared memory while the rows are still under way, where it fits.
template <bool kPicked>
__global__ void __launch_bounds__(kThreads)
    ProjectHeadsKernel(const __grid_constant__ ProjectHeadsArgs args, DType dtype, bool staged) {
  constexpr int kBlockRows = kPicked ? 1 : kRows;
  // [kBlockRows, d] of rows, [kBlockRows, kThreads] of sums, [d, d'] of the matrix.
  extern __shared__ __align__(16) float shared[];
  float* const in = shared;
  float* const joined = in + kBlockRows * args.in_dim;
  float* const copied = joined + kBlockRows * kThreads;
  const int32_t head = blockIdx.x % args.heads;
  const int32_t kv_head = head / args.group;
  const int64_t first = blockIdx.x / args.heads * kBlockRows;
  const int32_t rows = static_cast<int32_t>(min(int64_t{kBlockRows}, args.rows - first));
  const int32_t width = kPicked ? args.in_dim : args.out_dim;  // of the matrix
  const float* matrix = args.matrix + int64_t{kv_head} * args.in_dim * width;
  ReleaseLaterKernels();
  if (staged) {
#pragma unroll 8
    for (int32_t i = threadIdx.x; i < args.in_dim * width; i += kThreads) copied[i] = matrix[i];
    matrix = copied;
  }
  WaitForEarlierKernels();
  for (int32_t i = threadIdx.x; i < kBlockRows * args.in_dim; i += kThreads) {
    const int32_t r = i / args.in_dim;
    const int64_t column = int64_t{head} * args.in_dim + i % args.in_dim;
    in[i] =
        r < rows ? LoadElement(args.in.data, dtype, (first + r) * args.in.stride + column) : 0.0f;
  }
  const int32_t set = kPicked ? args.column_set[first] : 0;
  for (int32_t first_column = 0; first_column < args.out_dim; first_column += kThreads) {
    const Slice part(args, first_column);
    int32_t source = part.column;
    if constexpr (kPicked) {
      source = set < 0 ? -1
                       : args.column[set * args.column_stride + int64_t{kv_head} * args.out_dim +
                                     part.column];
    }
    __syncthreads();
    float sum[kBlockRows] = {};
    if (source >= 0) {
#pragma unroll 8
      for (int32_t k = part.begin; k < part.end; ++k) {
        const float weight = matrix[int64_t{k} * width + source];
#pragma unroll
        for (int r = 0; r < kBlockRows; ++r) sum[r] += in[r * args.in_dim + k] * weight;
      }
    }
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) joined[r * kThreads + threadIdx.x] = sum[r];
    __syncthreads();
    // Output i is one of the rows' columns.
    const int32_t columns = min(args.out_dim - first_column, kThreads);
    for (int32_t i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int32_t r = i / columns;
      const int32_t c = i - r * columns;
      float all = 0.0f;
      for (int32_t s = 0; s < part.slices; ++s) all += joined[r * kThreads + s * columns + c];
      StoreElement(args.out.data, dtype,
                   (first + r) * args.out.stride + int64_t{head} * args.out_dim + first_column + c,
                   all * args.scale);
    }
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const ProjectHeadsArgs& args, const LaunchContext& context) {
  const bool picked = args.column != nullptr;
  const int32_t block_rows = picked ? 1 : kRows;
  const auto blocks = static_cast<unsigned>((args.rows + block_rows - 1) / block_rows * args.heads);
  size_t bytes = static_cast<size_t>(block_rows) * (args.in_dim + kThreads) * sizeof(float);
  const size_t matrix_bytes = static_cast<size_t>(args.in_dim) * args.out_dim * sizeof(float);
  const bool staged = !picked && bytes + matrix_bytes <= kSharedBytes;
  if (staged) bytes += matrix_bytes;
  if (bytes > kSharedBytes) return cudaErrorInvalidValue;
  return LaunchDependent(context, picked ? ProjectHeadsKernel<true> : ProjectHeadsKernel<false>,
                         blocks, kThreads, bytes, args, context.activation_dtype, staged);
}

}  // namespace kvsweep::cuda
