// What the kernels of column sums share: which tiles of rows a column takes from, how a row's
// weight fades inside its tile, and how a tile's sum joins the score.
#ifndef KVSWEEP_KERNELS_CUDA_COLUMN_SUM_CUH_
#define KVSWEEP_KERNELS_CUDA_COLUMN_SUM_CUH_

#include "kernels/arguments.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {

// One past the last column.
__host__ __device__ __forceinline__ int LastColumn(const ColumnSumArgs& args) {
  const int64_t end = int64_t{args.keys.first_token} + args.keys.max_tokens;
  const int64_t seen = int64_t{args.history_tokens} + args.rows;
  return static_cast<int>(end < seen ? end : seen);
}

// The first tile of rows that columns from `first` on take from. Rows before the column do not see
// it; of scores that do not last, only the last row is seen.
__host__ __device__ __forceinline__ int FirstTile(const ColumnSumArgs& args, int first) {
  if (args.scoring.decay == 0.0f) {
    return (args.history_tokens + args.rows - 1) / kColumnSumRows;
  }
  return (first > args.history_tokens ? first : args.history_tokens) / kColumnSumRows;
}

// Row one past the last of the tile that begins at row `tile_row` (which may lie before row 0).
__device__ __forceinline__ int TileEnd(const ColumnSumArgs& args, int tile_row) {
  return min(tile_row + kColumnSumRows, args.rows);
}

// Logarithm to base 2 of what a row's weight shrinks to by the end of its tile.
__device__ __forceinline__ float Fading(const ColumnSumArgs& args, int tile_row, int row) {
  if (args.scoring.decay == 1.0f) return 0.0f;
  const int later = TileEnd(args, tile_row) - 1 - row;
  return later == 0 ? 0.0f : static_cast<float>(later) * log2f(args.scoring.decay);
}

// The score after a tile of rows whose sum is `sum`.
__device__ __forceinline__ float AddTile(const ColumnSumArgs& args, int tile_row, float score,
                                         float sum) {
  const float decay = args.scoring.decay;
  if (decay != 1.0f) {
    score *= powf(decay, static_cast<float>(TileEnd(args, tile_row) - max(tile_row, 0)));
  }
  return args.scoring.half ? RoundTo(DType::kF16, score + sum) : score + sum;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_COLUMN_SUM_CUH_
