#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// Rows of a task; with a group of g heads, g times as many queries share each tile of keys.
constexpr int kBlockRows = 32;

struct Block {
  int64_t first = 0;  // row of the chunk
  int rows = 0;
  int64_t kv_head = 0;
};

// Query q of a block is row q / group, head kv_head * group + q % group.
struct Prefill {
  const PrefillAttentionArgs& args;
  const int group = args.query_heads / args.kv_heads;
  const int head_dim = args.head_dim;

  int64_t Head(const Block& block, int q) const { return block.kv_head * group + q % group; }
  int64_t HeadIndex(const Block& block, int q) const {
    return (block.first + q / group) * args.query_heads + Head(block, q);
  }

  void Begin(AttentionRows& queries, const Block& block) const {
    for (int q = 0; q < queries.rows; ++q) {
      const float* const query = Row(args.query, block.first + q / group);
      queries.SetQuery(q, query + Head(block, q) * head_dim, args.scale);
    }
  }

  void Attend(AttentionRows& queries, const Block& block) const {
    const bool causal = args.chunk_key.data != nullptr;
    const int64_t column = block.kv_head * head_dim;
    KeyRange keys{.view = &args.history,
                  .row = args.history_row,
                  .head = block.kv_head,
                  .stored = args.history_tokens,
                  .rotation = &args.rotation,
                  .own_position = int64_t{args.history.first_token} + args.history_tokens};
    if (causal) {
      keys.own_key = Row(args.chunk_key, 0) + column;
      keys.own_value = Row(args.chunk_value, 0) + column;
      keys.own_key_stride = args.chunk_key.stride;
      keys.own_value_stride = args.chunk_value.stride;
    }
    const int64_t end = args.history_tokens + (causal ? block.first + block.rows : 0);
    for (int64_t first = 0; first < end; first += kTileTokens) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTileTokens, end - first));
      keys.Load(queries.key, queries.value, first, tokens, head_dim);
      for (int q = 0; q < queries.rows; ++q) {
        const int64_t limit =
            args.history_tokens + (causal ? block.first + q / group + 1 : 0) - first;
        queries.Score(q, tokens, static_cast<int>(std::clamp<int64_t>(limit, 0, tokens)));
        queries.Weigh(q);
      }
      queries.AddValues(tokens);
    }
  }

  void Finish(AttentionRows& queries, const Block& block) const {
    for (int q = 0; q < queries.rows; ++q) {
      float* const output = queries.output + q * head_dim;
      const int64_t index = HeadIndex(block, q);
      const PartialAttention& partial = args.partial;
      if (args.accumulate) {
        MergePartial(output, &queries.maximum[q], &queries.sum[q],
                     partial.output + index * head_dim, partial.maximum[index], partial.sum[index],
                     head_dim);
      }
      if (args.out.data == nullptr) {
        std::copy_n(output, head_dim, partial.output + index * head_dim);
        partial.maximum[index] = queries.maximum[q];
        partial.sum[index] = queries.sum[q];
        continue;
      }
      const float inverse = queries.sum[q] > 0.0f ? 1.0f / queries.sum[q] : 0.0f;
      float* const out = Row(args.out, block.first + q / group) + Head(block, q) * head_dim;
      for (int i = 0; i < head_dim; ++i) out[i] = output[i] * inverse;
      if (args.log_sum_exp == nullptr) continue;
      args.log_sum_exp[index] = queries.maximum[q] + std::log(queries.sum[q]);
    }
  }
};

}  // namespace

absl::Status Run(const PrefillAttentionArgs& args, Context& context) {
  RETURN_IF_ERROR(CheckSlots("history", args.history, args.history_row, args.history_tokens));
  const Prefill prefill{args};
  const int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  const int64_t bytes = AttentionRows::WorkspaceBytes(kBlockRows * prefill.group, args.head_dim);
  context.ReserveWorkers(bytes);
  // The last blocks see the most keys: they are claimed first.
  context.pool.For(blocks * args.kv_heads, [&](int64_t task, int worker) {
    Block block;
    block.first = (blocks - 1 - task / args.kv_heads) * kBlockRows;
    block.rows = static_cast<int>(std::min<int64_t>(kBlockRows, args.rows - block.first));
    block.kv_head = task % args.kv_heads;
    Workspace& workspace = context.worker[worker];
    workspace.Reset(bytes);
    AttentionRows queries(workspace, block.rows * prefill.group, args.head_dim);
    prefill.Begin(queries, block);
    prefill.Attend(queries, block);
    prefill.Finish(queries, block);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
