#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/planted_bug.h"
#include "base/status_macros.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// One tile of columns of one KV head on its way through the tiles of rows.
struct ColumnTile {
  const ColumnSumArgs& args;
  int64_t kv_head = 0;
  int64_t first = 0;  // column
  int columns = 0;
  int padded = 0;  // columns, rounded up to whole vectors
  float* key = nullptr;
  float* query = nullptr;
  float* weight = nullptr;
  float* largest = nullptr;
  float* sum = nullptr;

  static int64_t WorkspaceBytes(int head_dim) {
    return Workspace::Padded<float>(int64_t{kTileTokens} * head_dim) +
           Workspace::Padded<float>(head_dim) + 3 * Workspace::Padded<float>(kTileTokens);
  }

  void Take(Workspace& workspace) {
    key = workspace.Take<float>(int64_t{kTileTokens} * args.head_dim);
    query = workspace.Take<float>(args.head_dim);
    weight = workspace.Take<float>(kTileTokens);
    largest = workspace.Take<float>(kTileTokens);
    sum = workspace.Take<float>(kTileTokens);
  }

  float& score(int64_t column) const {
    return static_cast<float*>(
        args.score.data)[SlotOffset(args.score, args.table_row, column, kv_head)];
  }

  // weight = the probabilities that head `head` of row `row` gives the columns.
  void Weigh(int64_t row, int64_t head) const {
    const float* const from = Row(args.query, row) + head * args.head_dim;
    for (int i = 0; i < args.head_dim; ++i) query[i] = from[i] * args.scale;
    DotRow(weight, query, key, args.head_dim, args.head_dim, padded);
    const float log_sum_exp = args.log_sum_exp[row * args.query_heads + head];
    for (int t = 0; t < padded; t += kLanes) {
      Store(weight + t, Exp(Load(weight + t) - log_sum_exp));
    }
  }

  // Adds what row `row` gives the first `visible` columns.
  void AddRow(int64_t row, int visible) const {
    const int group = args.query_heads / args.kv_heads;
    if (args.scoring.decay != 1.0f) {
      for (int t = 0; t < columns; ++t) sum[t] *= args.scoring.decay;
    }
    for (int q = 0; q < group; ++q) {
      Weigh(row, kv_head * group + q);
      if (!args.scoring.group_maximum) {
        for (int t = 0; t < visible; ++t) sum[t] += weight[t];
      } else if (q == 0) {
        std::copy_n(weight, visible, largest);
      } else {
        for (int t = 0; t < visible; ++t) largest[t] = std::max(largest[t], weight[t]);
      }
    }
    if (args.scoring.group_maximum) {
      for (int t = 0; t < visible; ++t) sum[t] += largest[t];
    }
  }

  void AddSums(int64_t rows) const {
    const float decay = args.scoring.decay;
    const float factor = decay == 1.0f ? 1.0f : std::pow(decay, static_cast<float>(rows));
    for (int t = 0; t < columns; ++t) {
      float& total = score(first + t);
      total = total * factor + sum[t];
      if (args.scoring.half) RoundElements(&total, &total, DType::kF16, 1);
    }
  }

  void Run() const {
    const int64_t begin = args.keys.first_token;
    const int64_t end = int64_t{args.history_tokens} + args.rows;
    KeyRange{.view = &args.keys,
             .row = args.table_row,
             .head = kv_head,
             .stored = end - begin,
             .rotation = &args.rotation}
        .Load(key, nullptr, first - begin, columns, args.head_dim);
    // The chunk's own columns have received nothing before.
    for (int64_t column = std::max<int64_t>(first, args.history_tokens); column < first + columns;
         ++column) {
      score(column) = 0.0f;
    }
    // Rows before the tile's first column do not see it; of scores that do not last, only the last
    // row is seen.
    int64_t first_row = std::max<int64_t>(first, args.history_tokens);
    if (args.scoring.decay == 0.0f) first_row = end - 1;
    for (int64_t tile = first_row / kColumnSumRows * kColumnSumRows; tile < end;
         tile += kColumnSumRows) {
      std::memset(sum, 0, kTileTokens * sizeof(float));
      const int64_t tile_end = std::min<int64_t>(tile + kColumnSumRows, end);
      for (int64_t row = std::max(tile, first_row); row < tile_end; ++row) {
        AddRow(row - args.history_tokens,
               BugPlanted("column_sum_sees_the_future")
                   ? columns
                   : static_cast<int>(std::min<int64_t>(columns, row + 1 - first)));
      }
      AddSums(tile_end - std::max<int64_t>(tile, args.history_tokens));
    }
  }
};

}  // namespace

absl::Status Run(const ColumnSumArgs& args, Context& context) {
  const int64_t end = std::min<int64_t>(int64_t{args.history_tokens} + args.rows,
                                        int64_t{args.keys.first_token} + args.keys.max_tokens);
  const int64_t columns = end - args.keys.first_token;
  if (columns <= 0 || args.rows == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckSlots("keys", args.keys, args.table_row, columns));
  RETURN_IF_ERROR(CheckSlots("score", args.score, args.table_row, end));
  const int64_t tiles = (columns + kTileTokens - 1) / kTileTokens;
  const int64_t bytes = ColumnTile::WorkspaceBytes(args.head_dim);
  context.ReserveWorkers(bytes);
  context.pool.For(tiles * args.kv_heads, [&](int64_t task, int worker) {
    ColumnTile tile{.args = args, .kv_head = task % args.kv_heads};
    tile.first = args.keys.first_token + task / args.kv_heads * kTileTokens;
    tile.columns = static_cast<int>(std::min<int64_t>(kTileTokens, end - tile.first));
    tile.padded = (tile.columns + kLanes - 1) / kLanes * kLanes;
    context.worker[worker].Reset(bytes);
    tile.Take(context.worker[worker]);
    tile.Run();
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
