// Attention by tiles of keys with an online softmax, shared by prefill and decode. Tiles start at
// absolute slots that are multiples of kTileTokens and each row's sums run over them in order, so a
// row's result depends on its keys alone: not on its neighbours, on chunk borders, or on whether it
// was computed as a prompt or as a decode row.
#ifndef KVSWEEP_KERNELS_CPU_ATTENTION_TILE_H_
#define KVSWEEP_KERNELS_CPU_ATTENTION_TILE_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/products.h"
#include "kernels/cpu/workspace.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // every function here is inlined

namespace kvsweep::cpu {

inline constexpr int kTileTokens = 64;

// Query rows on their way through the tiles, and one tile of keys and values. All pointers lie in
// one worker's workspace.
struct AttentionRows {
  int rows = 0;
  int head_dim = 0;
  float* query = nullptr;    // [rows, d], scaled
  float* output = nullptr;   // [rows, d], not yet divided by sum
  float* maximum = nullptr;  // [rows]
  float* sum = nullptr;      // [rows]
  float* score = nullptr;    // [rows, kTileTokens]
  float* key = nullptr;      // [kTileTokens, d]
  float* value = nullptr;    // [kTileTokens, d]

  static int64_t WorkspaceBytes(int rows, int head_dim) {
    return 2 * Workspace::Padded<float>(int64_t{rows} * head_dim) +
           2 * Workspace::Padded<float>(rows) +
           Workspace::Padded<float>(int64_t{rows} * kTileTokens) +
           2 * Workspace::Padded<float>(int64_t{kTileTokens} * head_dim);
  }

  // Takes WorkspaceBytes(rows, head_dim) from `workspace`, which has been reset, and starts with
  // empty sums.
  AttentionRows(Workspace& workspace, int rows, int head_dim) : rows(rows), head_dim(head_dim) {
    query = workspace.Take<float>(int64_t{rows} * head_dim);
    output = workspace.Take<float>(int64_t{rows} * head_dim);
    maximum = workspace.Take<float>(rows);
    sum = workspace.Take<float>(rows);
    score = workspace.Take<float>(int64_t{rows} * kTileTokens);
    key = workspace.Take<float>(int64_t{kTileTokens} * head_dim);
    value = workspace.Take<float>(int64_t{kTileTokens} * head_dim);
    std::memset(output, 0, int64_t{rows} * head_dim * sizeof(float));
    for (int r = 0; r < rows; ++r) {
      maximum[r] = -std::numeric_limits<float>::infinity();
      sum[r] = 0.0f;
    }
  }

  void SetQuery(int row, const float* from, float scale) {
    for (int i = 0; i < head_dim; ++i) query[row * head_dim + i] = from[i] * scale;
  }

  // score[row] = query[row] . key[0 .. tokens), -inf from `visible` on.
  void Score(int row, int tokens, int visible) {
    float* const out = score + row * kTileTokens;
    DotRow(out, query + row * head_dim, key, head_dim, head_dim, (tokens + 7) / 8 * 8);
    for (int t = visible; t < kTileTokens; ++t) out[t] = -std::numeric_limits<float>::infinity();
  }

  // Turns score[row] into exp(score - maximum), after bringing the row's sums to the new maximum.
  void Weigh(int row) {
    float* const line = score + row * kTileTokens;
    F8 highest = Load(line);
    for (int t = kLanes; t < kTileTokens; t += kLanes) highest = Max(highest, Load(line + t));
    const float tile_maximum = MaxLane(highest);
    if (tile_maximum > maximum[row]) {
      const float shrink = Exp(maximum[row] - tile_maximum);
      float* const out = output + row * head_dim;
      for (int i = 0; i < head_dim; ++i) out[i] *= shrink;
      sum[row] *= shrink;
      maximum[row] = tile_maximum;
    }
    if (maximum[row] == -std::numeric_limits<float>::infinity()) {
      std::memset(line, 0, kTileTokens * sizeof(float));
      return;
    }
    F8 total = {};
    for (int t = 0; t < kTileTokens; t += kLanes) {
      const F8 weight = Exp(Load(line + t) - maximum[row]);
      Store(line + t, weight);
      total += weight;
    }
    sum[row] += Sum(total);
  }

  // output += score * value over the tile's first `tokens` slots.
  void AddValues(int tokens) {
    AddProduct(output, head_dim, score, kTileTokens, value, head_dim, rows, tokens, head_dim);
  }
};

// Brings the partial result (output [d], maximum, sum) and another one under their common maximum
// and adds them. Empty parts add nothing.
inline void MergePartial(float* output, float* maximum, float* sum, const float* other_output,
                         float other_maximum, float other_sum, int head_dim) {
  if (other_sum == 0.0f) return;
  const float common = *maximum > other_maximum ? *maximum : other_maximum;
  const float mine = *sum == 0.0f ? 0.0f : Exp(*maximum - common);
  const float others = Exp(other_maximum - common);
  for (int i = 0; i < head_dim; ++i) output[i] = output[i] * mine + other_output[i] * others;
  *sum = *sum * mine + other_sum * others;
  *maximum = common;
}

}  // namespace kvsweep::cpu

#pragma GCC diagnostic pop

#endif  // KVSWEEP_KERNELS_CPU_ATTENTION_TILE_H_
