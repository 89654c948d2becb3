// Column sums of the attention matrix, without the matrix: a block owns kColumns columns of one KV
// head, keeps their keys in shared memory and lets the chunk's queries pass in tiles of
// kColumnSumRows rows at absolute positions. The sum over a tile and its group of heads is formed
// in registers and then added to the score, tile by tile in order; no atomics, so no two runs
// differ.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 128;
constexpr int kHalf = 64;  // columns of one pass over a tile of queries
static_assert(kColumnSumRows == 32 * kWarps);

template <int D>
constexpr int kSharedBytes = (kColumns + 2 * kColumnSumRows) * (D + kRowPadding) * 2;

// [T, Hq, d] x [n, Hk, d] -> weights [128 rows, 64 columns] in registers -> sums [128 columns].
template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    ColumnSumKernel(const __grid_constant__ ColumnSumArgs args) {
  constexpr int kRow = D + kRowPadding;
  constexpr int kChunks = D / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float warp_sum[kWarps][kColumns];
  T* const keys = reinterpret_cast<T*>(shared);  // [kColumns, kRow]
  T* const queries = keys + kColumns * kRow;     // [2][kColumnSumRows, kRow]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = args.query_heads / args.kv_heads;
  const int kv_head = blockIdx.x % args.kv_heads;
  const int end = args.history_tokens + args.rows;
  const int first = args.keys.first_token + blockIdx.x / args.kv_heads * kColumns;
  const int columns = min(kColumns, LastColumn(args) - first);

  for (int c = threadIdx.x; c < kColumns * kChunks; c += kThreads) {
    const int t = c / kChunks;
    const int64_t at = KvOffset(args.keys, args.table_row,
                                first - args.keys.first_token + min(t, columns - 1), kv_head);
    CopyAsync(SharedAddress(keys + t * kRow + c % kChunks * 8),
              reinterpret_cast<const T*>(args.keys.key) + at + c % kChunks * 8, t < columns);
  }
  const int first_tile = FirstTile(args, first);
  const int tiles = (end + kColumnSumRows - 1) / kColumnSumRows - first_tile;
  const int passes = tiles * group;
  const auto issue = [&](int pass) {
    const int row = (first_tile + pass / group) * kColumnSumRows - args.history_tokens;
    const int64_t column = (int64_t{kv_head} * group + pass % group) * D;
    const uint32_t target = SharedAddress(queries + pass % 2 * kColumnSumRows * kRow);
    for (int c = threadIdx.x; c < kColumnSumRows * kChunks; c += kThreads) {
      const int r = c / kChunks;
      const bool valid = row + r >= 0 && row + r < args.rows;
      CopyAsync(target + (r * kRow + c % kChunks * 8) * sizeof(T),
                static_cast<const T*>(args.query.data) +
                    int64_t{valid ? row + r : 0} * args.query.stride + column + c % kChunks * 8,
                valid);
    }
  };
  issue(0);
  CommitCopies();

  // The column that this thread keeps the score of.
  const int own = first + threadIdx.x;
  const bool owns = threadIdx.x < columns;
  float* const place = static_cast<float*>(args.score.data) +
                       (owns ? SlotOffset(args.score, args.table_row, own, kv_head) : 0);
  float score = owns && own < args.history_tokens ? *place : 0.0f;

  const float scale = args.scale * kLog2E;
  const uint32_t key_address =
      SharedAddress(keys + (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 8);
  float sum[kColumns / 8][2] = {};  // of this lane's rows; columns n * 8 + lane % 4 * 2 + {0, 1}
  for (int pass = 0; pass < passes; ++pass) {
    WaitCopies<0>();
    __syncthreads();
    if (pass + 1 < passes) issue(pass + 1);
    CommitCopies();
    const int tile_row = (first_tile + pass / group) * kColumnSumRows - args.history_tokens;
    const int head = kv_head * group + pass % group;
    float offset[2][2];  // log-sum-exp of the lane's four rows, in units of log 2
    int position[2][2];
    for (int m = 0; m < 2; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row + warp * 32 + m * 16 + half * 8 + lane / 4;
        const bool valid = row >= 0 && row < args.rows;
        position[m][half] = valid ? args.history_tokens + row : -1;
        offset[m][half] = valid
                              ? args.log_sum_exp[int64_t{row} * args.query_heads + head] * kLog2E -
                                    Fading(args, tile_row, row)
                              : 0.0f;
      }
    }
    const uint32_t query_address = SharedAddress(
        queries + (pass % 2 * kColumnSumRows + warp * 32 + lane % 16) * kRow + lane / 16 * 8);
#pragma unroll
    for (int part = 0; part < kColumns / kHalf; ++part) {
      float weight[2][kHalf / 8][4] = {};
      MultiplyRows<T, D, kHalf>(weight, query_address,
                                key_address + part * kHalf * kRow * sizeof(T));
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = first + part * kHalf + n * 8 + lane % 4 * 2 + c;
          float total = 0.0f;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float w = Exp2(weight[m][n][2 * half + c] * scale - offset[m][half]);
              total += column <= position[m][half] ? w : 0.0f;
            }
          }
          sum[part * kHalf / 8 + n][c] += total;
        }
      }
    }
    if (pass % group < group - 1) continue;
      // All heads of the tile are in: rows of the warp, then warps, then the score.
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float total = sum[n][c];
        sum[n][c] = 0.0f;
        total += __shfl_xor_sync(~0u, total, 4);
        total += __shfl_xor_sync(~0u, total, 8);
        total += __shfl_xor_sync(~0u, total, 16);
        if (lane / 4 == 0) warp_sum[warp][n * 8 + lane % 4 * 2 + c] = total;
      }
    }
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += warp_sum[w][threadIdx.x];
    score = AddTile(args, tile_row, score, total);
  }
  WaitCopies<0>();
  if (owns) *place = score;
}

// One warp for each column: lanes take rows of a tile, then the lanes are added.
__global__ void __launch_bounds__(kThreads)
    PlainColumnSumKernel(const __grid_constant__ ColumnSumArgs args, DType dtype) {
  extern __shared__ float turned[];  // [kWarps, d]: the column's key
  const int lane = threadIdx.x % 32;
  const int d = args.head_dim;
  float* const key = turned + threadIdx.x / 32 * d;
  const int group = args.query_heads / args.kv_heads;
  const int end = args.history_tokens + args.rows;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int kv_head = index % args.kv_heads;
  const int column = args.keys.first_token + static_cast<int>(index / args.kv_heads);
  if (column >= LastColumn(args)) return;
  const KeySource keys{.view = args.keys,
                       .row = args.table_row,
                       .head = kv_head,
                       .stored = end,
                       .rotation = args.rotation};
  const int slot = column - args.keys.first_token;
  const ElementRow row_of_key = KeyRow(keys, slot);
  for (int i = lane; i < d; i += 32) {
    key[i] = args.rotation.inverse_frequency == nullptr
                 ? row_of_key(i)
                 : Turned(row_of_key, args.rotation.inverse_frequency, keys.Position(slot), i, d);
  }
  __syncwarp();
  float* const place = static_cast<float*>(args.score.data) +
                       SlotOffset(args.score, args.table_row, column, kv_head);
  float score = column < args.history_tokens ? *place : 0.0f;
  for (int tile = FirstTile(args, column); tile * kColumnSumRows < end; ++tile) {
    const int tile_row = tile * kColumnSumRows - args.history_tokens;
    float sum = 0.0f;
    for (int row = tile_row + lane; row < TileEnd(args, tile_row); row += 32) {
      if (row < 0 || args.history_tokens + row < column) continue;
      float received = 0.0f;
      for (int q = 0; q < group; ++q) {
        const int head = kv_head * group + q;
        const int64_t query = row * args.query.stride + int64_t{head} * d;
        float dot = 0.0f;
        for (int i = 0; i < d; ++i) {
          dot += LoadElement(args.query.data, dtype, query + i) * key[i];
        }
        const float weight =
            expf(dot * args.scale - args.log_sum_exp[int64_t{row} * args.query_heads + head]);
        received = args.scoring.group_maximum ? fmaxf(received, weight) : received + weight;
      }
      sum += received * exp2f(Fading(args, tile_row, row));
    }
    score = AddTile(args, tile_row, score, WarpSum(sum));
  }
  __syncwarp();
  if (lane == 0) *place = score;
}

// ----------------------------------------------------------------------------------------
// launchers

template <typename T, int D>
cudaError_t LaunchFast(const ColumnSumArgs& args, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<D>;
  static const cudaError_t configured = cudaFuncSetAttribute(
      ColumnSumKernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (configured != cudaSuccess) return configured;
  const int tiles = (LastColumn(args) - args.keys.first_token + kColumns - 1) / kColumns;
  ColumnSumKernel<T, D><<<tiles * args.kv_heads, kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

bool IsFast(const ColumnSumArgs& args, DType dtype) {
  const bool plain = args.scoring.group_maximum && args.query_heads > args.kv_heads;
  return !plain && args.rotation.inverse_frequency == nullptr && dtype == DType::kBf16 &&
         args.keys.dtype == dtype && (args.head_dim == 64 || args.head_dim == 128) &&
         IsAligned(args.keys) && IsAligned(args.query, dtype);
}

}  // namespace

cudaError_t Launch(const ColumnSumArgs& args, const LaunchContext& context) {
  const int64_t columns = LastColumn(args) - args.keys.first_token;
  if (columns <= 0) return cudaSuccess;
  if (IsForHopper(args, context)) return LaunchOnHopper(args, context);
  if (IsFast(args, context.activation_dtype)) {
    if (args.head_dim == 64) {
      return LaunchFast<__nv_bfloat16, 64>(args, context.stream);
    }
    return LaunchFast<__nv_bfloat16, 128>(args, context.stream);
  }
  const int64_t blocks = (columns * args.kv_heads + kWarps - 1) / kWarps;
  PlainColumnSumKernel<<<static_cast<unsigned>(blocks), kThreads,
                         kWarps * args.head_dim * sizeof(float), context.stream>>>(
      args, context.activation_dtype);
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
