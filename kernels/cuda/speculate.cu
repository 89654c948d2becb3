// InfiniGen's speculation in two passes: scores of all stored tokens and the largest of each piece,
// then margins and how many exceed -alpha. A row is cut into pieces of kPiece tokens, one block
// each, so that also a single long row fills the device; counts are integers, so adding them needs
// no order.
#include <algorithm>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPiece = 1024;

// Between the passes: scores [B, Hq, margin_stride] (with one query a group in the margins' place)
// and the largest of each piece [B, Hq, pieces].
struct Between {
  float* score;
  float* largest;
  int32_t pieces;
};

// Dot products of one key with kQueries queries [kQueries, d'] in shared memory.
template <int kQueries, bool kWide>
__device__ __forceinline__ void Score(float (&sum)[kQueries], const float* query,
                                      const std::byte* pool, int64_t offset, int32_t d,
                                      DType dtype) {
#pragma unroll
  for (int q = 0; q < kQueries; ++q) sum[q] = 0.0f;
  if constexpr (kWide) {
    // bf16, eight elements at a time.
    const uint4* const key =
        reinterpret_cast<const uint4*>(reinterpret_cast<const __nv_bfloat16*>(pool) + offset);
    // All of a key of up to kMostPieces * 8 elements is under way before the first is used.
    constexpr int kMostPieces = 5;
    uint4 pieces[kMostPieces];
    const int32_t count = d / 8;
    for (int32_t base = 0; base < count; base += kMostPieces) {
#pragma unroll
      for (int p = 0; p < kMostPieces; ++p) {
        if (base + p < count) pieces[p] = __ldcs(key + base + p);
      }
#pragma unroll
      for (int p = 0; p < kMostPieces; ++p) {
        const int32_t i = base + p;
        if (i >= count) continue;
        const uint4 piece = pieces[p];
        const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float low = __uint_as_float(word[w] << 16);
          const float high = __uint_as_float(word[w] & 0xffff0000u);
#pragma unroll
          for (int q = 0; q < kQueries; ++q) {
            const float2 pair = *reinterpret_cast<const float2*>(query + q * d + i * 8 + w * 2);
            sum[q] += low * pair.x + high * pair.y;
          }
        }
      }
    }
  } else {
    for (int32_t i = 0; i < d; ++i) {
      const float element = LoadElement(pool, dtype, offset + i);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) sum[q] += element * query[q * d + i];
    }
  }
}

template <int kQueries, bool kWide>
__global__ void __launch_bounds__(kThreads)
    ScoreKernel(const __grid_constant__ SpeculateArgs args, const __grid_constant__ Between between,
                DType dtype) {
  extern __shared__ float query[];  // [kQueries, d']
  __shared__ float warp_largest[kWarps][kQueries];
  const int32_t group = args.query_heads / args.kv_heads;
  const int32_t piece = blockIdx.x % between.pieces;
  const int32_t pair = blockIdx.x / between.pieces;
  const int32_t head = pair % args.kv_heads;
  const int64_t row = pair / args.kv_heads;
  if (piece == 0 && threadIdx.x == 0) args.count[pair] = 0;
  const int32_t stored =
      IsActive(args.row_active, row)
          ? static_cast<int32_t>(min(static_cast<int64_t>(KvLength(args.partial_key, row, head)),
                                     args.margin_stride))
          : 0;
  const int32_t begin = piece * kPiece;
  const int32_t end = min(stored, begin + kPiece);
  if (begin >= end) return;
  const int32_t d = args.partial_dim;
  // More queries than kQueries pass one handful after the other.
  for (int32_t first = 0; first < group; first += kQueries) {
    const int32_t queries = min(kQueries, group - first);
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kQueries * d; i += kThreads) {
      const int64_t column = (int64_t{head} * group + first) * d + i;
      query[i] = i < queries * d
                     ? LoadElement(args.query.data, dtype, row * args.query.stride + column)
                     : 0.0f;
    }
    __syncthreads();
    float largest[kQueries];
    for (int q = 0; q < kQueries; ++q) largest[q] = -INFINITY;
    float* const out = between.score + (row * args.query_heads + int64_t{head} * group + first) *
                                           args.margin_stride;
    for (int32_t t = begin + threadIdx.x; t < end; t += kThreads) {
      float score[kQueries];
      Score<kQueries, kWide>(score, query, args.partial_key.key,
                             KvOffset(args.partial_key, row, t, head), d, args.partial_key.dtype);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        if (q < queries) out[q * args.margin_stride + t] = score[q];
        largest[q] = fmaxf(largest[q], score[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const float of_warp = WarpMax(largest[q]);
      if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32][q] = of_warp;
    }
    __syncthreads();
    if (threadIdx.x < queries) {
      float all = -INFINITY;
      for (int w = 0; w < kWarps; ++w) all = fmaxf(all, warp_largest[w][threadIdx.x]);
      const int64_t index = row * args.query_heads + int64_t{head} * group + first + threadIdx.x;
      between.largest[index * between.pieces + piece] = all;
    }
  }
}

__global__ void __launch_bounds__(kThreads) MarginKernel(const __grid_constant__ SpeculateArgs args,
                                                         const __grid_constant__ Between between) {
  extern __shared__ float largest[];  // [g]
  __shared__ int32_t warp_count[kWarps];
  const int32_t group = args.query_heads / args.kv_heads;
  const int32_t piece = blockIdx.x % between.pieces;
  const int32_t pair = blockIdx.x / between.pieces;
  const int32_t head = pair % args.kv_heads;
  const int64_t row = pair / args.kv_heads;
  const int32_t stored =
      IsActive(args.row_active, row)
          ? static_cast<int32_t>(min(static_cast<int64_t>(KvLength(args.partial_key, row, head)),
                                     args.margin_stride))
          : 0;
  const int32_t begin = piece * kPiece;
  const int32_t end = min(stored, begin + kPiece);
  if (begin >= end) return;
  const int64_t first = row * args.query_heads + int64_t{head} * group;
  const int32_t used = (stored + kPiece - 1) / kPiece;
  for (int32_t q = threadIdx.x / 32; q < group; q += kWarps) {
    float all = -INFINITY;
    for (int32_t p = threadIdx.x % 32; p < used; p += 32) {
      all = fmaxf(all, between.largest[(first + q) * between.pieces + p]);
    }
    all = WarpMax(all);
    if (threadIdx.x % 32 == 0) largest[q] = all;
  }
  __syncthreads();
  float* const margin = args.margin + int64_t{pair} * args.margin_stride;
  int32_t count = 0;
  for (int32_t t = begin + threadIdx.x; t < end; t += kThreads) {
    float best = -INFINITY;
    for (int32_t q = 0; q < group; ++q) {
      best = fmaxf(best, between.score[(first + q) * args.margin_stride + t] - largest[q]);
    }
    margin[t] = best;
    count += best > -args.alpha ? 1 : 0;
  }
  for (int offset = 16; offset > 0; offset /= 2) count += __shfl_xor_sync(~0u, count, offset);
  if (threadIdx.x % 32 == 0) warp_count[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += warp_count[w];
    atomicAdd(&args.count[pair], total);
  }
}

// ----------------------------------------------------------------------------------------
// launchers

template <int kQueries>
cudaError_t LaunchScores(const SpeculateArgs& args, const Between& between, bool wide,
                         const LaunchContext& context) {
  const int blocks = args.rows * args.kv_heads * between.pieces;
  // Whole vectors: the compiler reads the remainder of a row by one.
  const size_t bytes = (kQueries * args.partial_dim * sizeof(float) + 15) / 16 * 16;
  if (wide) {
    ScoreKernel<kQueries, true>
        <<<blocks, kThreads, bytes, context.stream>>>(args, between, context.activation_dtype);
  } else {
    ScoreKernel<kQueries, false>
        <<<blocks, kThreads, bytes, context.stream>>>(args, between, context.activation_dtype);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t Launch(const SpeculateArgs& args, const LaunchContext& context) {
  const int32_t group = args.query_heads / args.kv_heads;
  const int64_t heads = int64_t{args.rows} * args.query_heads;
  const int64_t longest = std::min<int64_t>(args.margin_stride, args.partial_key.max_tokens);
  Between between;
  between.pieces = static_cast<int32_t>(std::max<int64_t>(1, (longest + kPiece - 1) / kPiece));
  between.largest = reinterpret_cast<float*>(context.workspace);
  between.score = group == 1 ? args.margin : between.largest + heads * between.pieces;
  const int64_t floats = heads * between.pieces + (group == 1 ? 0 : heads * args.margin_stride);
  if (floats * sizeof(float) > context.workspace_bytes) return cudaErrorMemoryAllocation;
  const bool wide = args.partial_key.dtype == DType::kBf16 && args.partial_dim % 8 == 0 &&
                    IsAligned(args.partial_key);
  cudaError_t status;
  if (group == 1) {
    status = LaunchScores<1>(args, between, wide, context);
  } else if (group == 2) {
    status = LaunchScores<2>(args, between, wide, context);
  } else if (group <= 4) {
    status = LaunchScores<4>(args, between, wide, context);
  } else {
    status = LaunchScores<8>(args, between, wide, context);
  }
  if (status != cudaSuccess) return status;
  const int blocks = args.rows * args.kv_heads * between.pieces;
  // Whole 16 bytes: the compiler may load four at a time, ahead of knowing that they are wanted.
  const size_t bytes = (group + 3) / 4 * 4 * sizeof(float);
  MarginKernel<<<blocks, kThreads, bytes, context.stream>>>(args, between);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
