#include <algorithm>
#include <cstring>

#include "base/status_macros.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// Adds one tile of columns of one KV head: for each tile of rows in order, the sum over its rows
// and their group of heads.
void AddColumns(const ColumnSumArgs& args, int64_t kv_head, int64_t first, Workspace& workspace) {
  const int group = args.query_heads / args.kv_heads;
  const int d = args.head_dim;
  const int64_t end = int64_t{args.history_tokens} + args.rows;
  const int columns = static_cast<int>(std::min<int64_t>(kTileTokens, end - first));
  float* const key = workspace.Take<float>(int64_t{kTileTokens} * d);
  float* const query = workspace.Take<float>(d);
  float* const weight = workspace.Take<float>(kTileTokens);
  float* const sum = workspace.Take<float>(kTileTokens);
  KeyRange{.view = &args.keys, .row = args.table_row, .head = kv_head, .stored = end}.Load(
      key, nullptr, first, columns, d);

  const auto score = [&](int64_t column) -> float& {
    return static_cast<float*>(
        args.score.data)[SlotOffset(args.score, args.table_row, column, kv_head)];
  };
  // The chunk's own columns have received nothing before.
  for (int64_t column = std::max<int64_t>(first, args.history_tokens); column < first + columns;
       ++column) {
    score(column) = 0.0f;
  }

  // Rows before the tile's first column do not see it; positions are absolute.
  const int64_t first_row = std::max<int64_t>(first, args.history_tokens);
  for (int64_t tile = first_row / kColumnSumRows * kColumnSumRows; tile < end;
       tile += kColumnSumRows) {
    std::memset(sum, 0, kTileTokens * sizeof(float));
    const int64_t tile_end = std::min<int64_t>(tile + kColumnSumRows, end);
    for (int64_t position = std::max(tile, first_row); position < tile_end; ++position) {
      const int64_t row = position - args.history_tokens;
      const int visible = static_cast<int>(std::min<int64_t>(columns, position + 1 - first));
      for (int q = 0; q < group; ++q) {
        const int64_t head = kv_head * group + q;
        const float* const from = Row(args.query, row) + head * d;
        for (int i = 0; i < d; ++i) query[i] = from[i] * args.scale;
        DotRow(weight, query, key, d, d, (columns + 7) / 8 * 8);
        const float log_sum_exp = args.log_sum_exp[row * args.query_heads + head];
        for (int t = 0; t < (columns + 7) / 8 * 8; t += kLanes) {
          Store(weight + t, Exp(Load(weight + t) - log_sum_exp));
        }
        for (int t = 0; t < visible; ++t) sum[t] += weight[t];
      }
    }
    for (int t = 0; t < columns; ++t) score(first + t) += sum[t];
  }
}

}  // namespace

absl::Status Run(const ColumnSumArgs& args, Context& context) {
  const int64_t columns = int64_t{args.history_tokens} + args.rows;
  RETURN_IF_ERROR(CheckSlots("keys", args.keys, args.table_row, columns));
  RETURN_IF_ERROR(CheckSlots("score", args.score, args.table_row, columns));
  const int64_t tiles = (columns + kTileTokens - 1) / kTileTokens;
  const int64_t bytes = Workspace::Padded<float>(int64_t{kTileTokens} * args.head_dim) +
                        Workspace::Padded<float>(args.head_dim) +
                        2 * Workspace::Padded<float>(kTileTokens);
  context.ReserveWorkers(bytes);
  context.pool.For(tiles * args.kv_heads, [&](int64_t task, int worker) {
    context.worker[worker].Reset(bytes);
    AddColumns(args, task % args.kv_heads, task / args.kv_heads * kTileTokens,
               context.worker[worker]);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
