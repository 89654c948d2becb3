// Prefill attention: the rows of a chunk against history and, causally, the chunk itself. A block
// owns kRows rows of one query head; keys and values pass through shared memory in tiles of kTile
// tokens at absolute slots, two tiles deep, each warp multiplying 32 rows with the whole tile.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = 32;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kTile = 64;

// Tokens that row `row` of the chunk sees.
__device__ __forceinline__ int32_t Visible(const PrefillAttentionArgs& args, int32_t row) {
  return args.history_tokens + (args.chunk_key.data != nullptr ? row + 1 : 0);
}

template <int D>
constexpr int kSharedBytes = (kRows + 4 * kTile) * (D + kRowPadding) * 2 +
                             4 * kTile* static_cast<int>(sizeof(void*));

template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    PrefillAttentionKernel(const __grid_constant__ PrefillAttentionArgs args,
                           const __grid_constant__ AttentionResult result) {
  constexpr int kRow = D + kRowPadding;
  constexpr int kChunks = D / 8;
  constexpr uint32_t kTileBytes = kTile * kRow * sizeof(T);
  extern __shared__ __align__(128) unsigned char shared[];
  T* const queries = reinterpret_cast<T*>(shared);  // [kRows, kRow]
  T* const tiles = queries + kRows * kRow;          // [2][keys, values][kTile, kRow]
  const T** const places =                          // [2][keys, values][kTile]
      reinterpret_cast<const T**>(tiles + 4 * kTile * kRow);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = args.query_heads / args.kv_heads;
  const int head = blockIdx.x % args.query_heads;
  const int kv_head = head / group;
  // The last blocks see the most keys: they start first.
  const int blocks = gridDim.x / args.query_heads;
  const int first_row = (blocks - 1 - static_cast<int>(blockIdx.x) / args.query_heads) * kRows;
  const int rows = min(kRows, args.rows - first_row);
  const int end = Visible(args, first_row + rows - 1);
  const int count = (end + kTile - 1) / kTile;

  // Where token `threadIdx.x` of a tile lies; nullptr past the end.
  const auto find = [&](int tile) {
    if (threadIdx.x >= kTile) return;
    const int32_t token = tile * kTile + threadIdx.x;
    const T* key = nullptr;
    const T* value = nullptr;
    if (token < args.history_tokens) {
      const int64_t at = KvOffset(args.history, args.history_row, token, kv_head);
      key = reinterpret_cast<const T*>(args.history.key) + at;
      value = reinterpret_cast<const T*>(args.history.value) + at;
    } else if (token < end) {
      const int64_t own = token - args.history_tokens;
      const int64_t column = int64_t{kv_head} * D;
      key = static_cast<const T*>(args.chunk_key.data) + own * args.chunk_key.stride + column;
      value = static_cast<const T*>(args.chunk_value.data) + own * args.chunk_value.stride + column;
    }
    const T** const place = places + tile % 2 * 2 * kTile;
    place[threadIdx.x] = key;
    place[kTile + threadIdx.x] = value;
  };
  const auto issue = [&](int tile) {
    const T* const* const place = places + tile % 2 * 2 * kTile;
    const uint32_t target = SharedAddress(tiles) + tile % 2 * 2 * kTileBytes;
    constexpr int kStep = kThreads / kChunks;  // rows that the block copies at once
    const int column = threadIdx.x % kChunks * 8;
#pragma unroll
    for (int r = threadIdx.x / kChunks; r < 2 * kTile; r += kStep) {
      const T* const from = place[r];
      // Without a token there is nothing to read: any address will do.
      CopyAsync(target + (r * kRow + column) * sizeof(T),
                (from == nullptr ? static_cast<const T*>(args.query.data) : from) + column,
                from != nullptr);
    }
  };

  find(0);
  {
    const T* const from = static_cast<const T*>(args.query.data) +
                          int64_t{first_row} * args.query.stride + int64_t{head} * D;
    for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
      const int r = c / kChunks;
      CopyAsync(SharedAddress(queries + r * kRow + c % kChunks * 8),
                from + (r < rows ? r : 0) * args.query.stride + c % kChunks * 8, r < rows);
    }
  }
  __syncthreads();
  if (count > 0) issue(0);
  CommitCopies();
  if (count > 1) find(1);

  const float scale = args.scale * kLog2E;
  float output[2][D / 8][4] = {};
  float maximum[2][2];  // rows lane / 4 and lane / 4 + 8 of each 16
  float sum[2][2] = {};
  for (int m = 0; m < 2; ++m) maximum[m][0] = maximum[m][1] = -INFINITY;
  const uint32_t query_address =
      SharedAddress(queries + (warp * kWarpRows + lane % 16) * kRow + lane / 16 * 8);
  const uint32_t key_address =
      SharedAddress(tiles + (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 8);
  const uint32_t value_address =
      SharedAddress(tiles + (kTile + lane / 8 % 2 * 8 + lane % 8) * kRow + lane / 16 * 8);
  const int warp_row = first_row + warp * kWarpRows;

  for (int tile = 0; tile < count; ++tile) {
    WaitCopies<0>();
    __syncthreads();
    if (tile + 1 < count) issue(tile + 1);
    CommitCopies();
    if (tile + 2 < count) find(tile + 2);
    const uint32_t offset = tile % 2 * 2 * kTileBytes;

    float score[2][kTile / 8][4] = {};
    MultiplyRows<T, D, kTile>(score, query_address, key_address + offset);
    // Only tiles that the first row of this warp does not see whole need a look at each element.
    if (tile * kTile + kTile > Visible(args, warp_row)) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int row = warp_row + m * 16 + c / 2 * 8 + lane / 4;
            const int token = tile * kTile + n * 8 + lane % 4 * 2 + c % 2;
            if (token >= Visible(args, row) || token >= end) score[m][n][c] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = maximum[m][half];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          highest = fmaxf(highest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]) * scale);
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        // A row that has seen nothing yet keeps its zeros.
        const float base = highest == -INFINITY ? 0.0f : highest;
        const float shrink = Exp2(maximum[m][half] - base);
        maximum[m][half] = highest;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            score[m][n][c] = Exp2(score[m][n][c] * scale - base);
            total += score[m][n][c];
          }
        }
        sum[m][half] = sum[m][half] * shrink + total;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          output[m][n][2 * half] *= shrink;
          output[m][n][2 * half + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        a[m][0] = Pack<T>(score[m][2 * t][0], score[m][2 * t][1]);
        a[m][1] = Pack<T>(score[m][2 * t][2], score[m][2 * t][3]);
        a[m][2] = Pack<T>(score[m][2 * t + 1][0], score[m][2 * t + 1][1]);
        a[m][3] = Pack<T>(score[m][2 * t + 1][2], score[m][2 * t + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        LoadMatricesTransposed(b, value_address + offset + (t * 16 * kRow + n * 16) * sizeof(T));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float(&low)[4] = output[m][2 * n];
          float(&high)[4] = output[m][2 * n + 1];
          Multiply<T>(low[0], low[1], low[2], low[3], a[m][0], a[m][1], a[m][2], a[m][3], b[0],
                      b[1]);
          Multiply<T>(high[0], high[1], high[2], high[3], a[m][0], a[m][1], a[m][2], a[m][3], b[2],
                      b[3]);
        }
      }
    }
  }
  WaitCopies<0>();

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      if (row < first_row + rows) {
        Softmax softmax{maximum[m][half], total};
        Softmax merged = softmax;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            merged = result.Write(row, head, n * 8 + lane % 4 * 2 + c, output[m][n][2 * half + c],
                                  softmax);
          }
        }
        softmax = merged;
        __syncwarp(0xfu << (lane & 28));
        if (lane % 4 == 0) result.WriteSums(row, head, softmax);
      }
    }
  }
}

// One block for each (row, query head).
__global__ void __launch_bounds__(kThreads)
    PlainPrefillAttentionKernel(const __grid_constant__ PrefillAttentionArgs args,
                                const __grid_constant__ AttentionResult result) {
  __shared__ PlainScratch scratch;
  const int d = args.head_dim;
  const int head = blockIdx.x % args.query_heads;
  const int kv_head = head / (args.query_heads / args.kv_heads);
  const int row = blockIdx.x / args.query_heads;
  KeySource keys{.view = args.history,
                 .row = args.history_row,
                 .head = kv_head,
                 .stored = args.history_tokens};
  keys.own_dtype = result.dtype;
  keys.rotation = args.rotation;
  keys.own_position = args.history.first_token + args.history_tokens;
  if (args.chunk_key.data != nullptr) {
    const int64_t column = int64_t{kv_head} * d;
    keys.own_key = ElementAt(args.chunk_key.data, result.dtype, column);
    keys.own_value = ElementAt(args.chunk_value.data, result.dtype, column);
    keys.own_key_stride = args.chunk_key.stride;
    keys.own_value_stride = args.chunk_value.stride;
  }
  const Softmax softmax = PlainAttend(scratch, args.query.data, result.dtype,
                                      row * args.query.stride + int64_t{head} * d, keys, 0,
                                      Visible(args, row), d, args.scale, [](int32_t, float) {});
  Softmax merged = softmax;
  for (int i = threadIdx.x; i < d; i += kThreads) {
    merged = result.Write(row, head, i, scratch.output[0][i], softmax);
  }
  __syncthreads();
  if (threadIdx.x == 0) result.WriteSums(row, head, merged);
}

// ----------------------------------------------------------------------------------------
// launchers

template <typename T, int D>
cudaError_t LaunchFast(const PrefillAttentionArgs& args, const AttentionResult& result,
                       cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<D>;
  static const cudaError_t configured = cudaFuncSetAttribute(
      PrefillAttentionKernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (configured != cudaSuccess) return configured;
  const int blocks = (args.rows + kRows - 1) / kRows * args.query_heads;
  PrefillAttentionKernel<T, D><<<blocks, kThreads, kBytes, stream>>>(args, result);
  return cudaGetLastError();
}

bool IsFast(const PrefillAttentionArgs& args, DType dtype) {
  const bool history = args.history_tokens > 0;
  const bool chunk = args.chunk_key.data == nullptr ||
                     (IsAligned(args.chunk_key, dtype) && IsAligned(args.chunk_value, dtype));
  // Without history nothing is rounded if the view's type holds the activations'.
  const bool same = args.history.dtype == dtype || (!history && args.history.dtype == DType::kF32);
  return dtype == DType::kBf16 && same && args.rotation.inverse_frequency == nullptr &&
         (args.head_dim == 64 || args.head_dim == 128) && (!history || IsAligned(args.history)) &&
         IsAligned(args.query, dtype) && chunk;
}

}  // namespace

cudaError_t Launch(const PrefillAttentionArgs& args, const LaunchContext& context) {
  if (IsForHopper(args, context)) return LaunchOnHopper(args, context);
  const AttentionResult result{.out = args.out,
                               .dtype = context.activation_dtype,
                               .partial = args.partial,
                               .accumulate = args.accumulate,
                               .log_sum_exp = args.log_sum_exp,
                               .query_heads = args.query_heads,
                               .head_dim = args.head_dim};
  if (IsFast(args, context.activation_dtype)) {
    if (args.head_dim == 64) {
      return LaunchFast<__nv_bfloat16, 64>(args, result, context.stream);
    }
    return LaunchFast<__nv_bfloat16, 128>(args, result, context.stream);
  }
  if (args.head_dim > 256) return cudaErrorInvalidValue;
  PlainPrefillAttentionKernel<<<args.rows * args.query_heads, kThreads, 0, context.stream>>>(
      args, result);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
