#include <algorithm>

#include "base/planted_bug.h"
#include "base/status_macros.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// Parts of one operation: (row, KV head) pairs, each cut into splits of tokens whose partial
// results are merged in a second pass.
struct Decode {
  const DecodeAttentionArgs& args;
  const int group = args.query_heads / args.kv_heads;
  const int head_dim = args.head_dim;
  PartialAttention part = {};  // [rows, Hk, splits, g], in the shared workspace

  int64_t Stored(int64_t row, int64_t kv_head) const {
    return IsActive(args.row_active, row) ? KvLength(args.view, row, kv_head) : 0;
  }
  // The row's stored tokens, whatever part of them this call attends to.
  int64_t Whole(int64_t row, int64_t kv_head) const {
    if (args.view.length == nullptr || !IsActive(args.row_active, row)) return 0;
    return args.view.length[row * args.view.length_stride + kv_head * args.view.length_head_stride];
  }
  // Stored tokens and the current one.
  int64_t Attended(int64_t row, int64_t kv_head) const {
    const bool current = args.current_key.data != nullptr && IsActive(args.row_active, row) &&
                         !BugPlanted("current_token_missing");
    return Stored(row, kv_head) + (current ? 1 : 0);
  }
  float* Probability(int64_t row, int64_t head) const {
    return args.probability + (row * args.query_heads + head) * args.probability_stride;
  }

  void Attend(int64_t task, Workspace& workspace) const;
  void LeaveScores(const AttentionRows& queries, int q, int64_t row, int64_t kv_head, int64_t first,
                   int tokens) const;
  void Merge(int64_t task) const;
  void Normalise(int64_t row, int64_t kv_head, int64_t head, float maximum, float sum) const;
};

// Puts the scores of entries first .. first + tokens - 1 where their probabilities belong: a tile's
// slots behind those of earlier tiles, the current token behind all of them.
void Decode::LeaveScores(const AttentionRows& queries, int q, int64_t row, int64_t kv_head,
                         int64_t first, int tokens) const {
  const float* const scores = queries.score + q * kTileTokens;
  float* const line = Probability(row, kv_head * group + q);
  const auto stored =
      static_cast<int>(std::clamp<int64_t>(Stored(row, kv_head) - first, 0, tokens));
  std::copy_n(scores, stored, line + args.view.first_token + first);
  if (stored < tokens) line[Whole(row, kv_head)] = scores[stored];
}

// One split of one (row, KV head).
void Decode::Attend(int64_t task, Workspace& workspace) const {
  const int64_t split = task % args.plan.splits;
  const int64_t kv_head = task / args.plan.splits % args.kv_heads;
  const int64_t row = task / args.plan.splits / args.kv_heads;
  const int64_t attended = Attended(row, kv_head);
  const bool last = split == args.plan.splits - 1;
  const int64_t begin = split * args.plan.split_tokens;
  const int64_t end = last ? attended : std::min<int64_t>(attended, begin + args.plan.split_tokens);

  AttentionRows queries(workspace, group, head_dim);
  for (int q = 0; q < group; ++q) {
    queries.SetQuery(q, Row(args.query, row) + (kv_head * group + q) * head_dim, args.scale);
  }
  KeyRange keys{.view = &args.view,
                .row = row,
                .head = kv_head,
                .stored = Stored(row, kv_head),
                .rotation = &args.rotation,
                .own_position = Whole(row, kv_head)};
  if (args.current_key.data != nullptr) {
    keys.own_key = Row(args.current_key, row) + kv_head * head_dim;
    keys.own_value = Row(args.current_value, row) + kv_head * head_dim;
  }
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTileTokens, end - first));
    keys.Load(queries.key, queries.value, first, tokens, head_dim);
    for (int q = 0; q < group; ++q) {
      queries.Score(q, tokens, tokens);
      if (args.probability != nullptr) LeaveScores(queries, q, row, kv_head, first, tokens);
      queries.Weigh(q);
    }
    queries.AddValues(tokens);
  }
  std::copy_n(queries.output, group * head_dim, part.output + task * group * head_dim);
  std::copy_n(queries.maximum, group, part.maximum + task * group);
  std::copy_n(queries.sum, group, part.sum + task * group);
}

// All splits of one (row, KV head), in order, and what partial held.
void Decode::Merge(int64_t task) const {
  const int64_t kv_head = task % args.kv_heads;
  const int64_t row = task / args.kv_heads;
  const int splits = args.plan.splits;
  for (int q = 0; q < group; ++q) {
    const int64_t first = task * splits * group + q;
    float* const output = part.output + first * head_dim;
    float* const maximum = part.maximum + first;
    float* const sum = part.sum + first;
    for (int split = 1; split < splits; ++split) {
      const int64_t other = first + split * group;
      MergePartial(output, maximum, sum, part.output + other * head_dim, part.maximum[other],
                   part.sum[other], head_dim);
    }
    const int64_t head = kv_head * group + q;
    const int64_t index = row * args.query_heads + head;
    if (args.accumulate) {
      MergePartial(output, maximum, sum, args.partial.output + index * head_dim,
                   args.partial.maximum[index], args.partial.sum[index], head_dim);
    }
    if (args.out.data == nullptr) {
      std::copy_n(output, head_dim, args.partial.output + index * head_dim);
      args.partial.maximum[index] = *maximum;
      args.partial.sum[index] = *sum;
      continue;
    }
    const float inverse = *sum > 0.0f ? 1.0f / *sum : 0.0f;
    float* const out = Row(args.out, row) + head * head_dim;
    for (int i = 0; i < head_dim; ++i) out[i] = output[i] * inverse;
    if (args.probability != nullptr) Normalise(row, kv_head, head, *maximum, *sum);
  }
}

// Turns the scores that Attend has left in the probabilities' place into probabilities.
void Decode::Normalise(int64_t row, int64_t kv_head, int64_t head, float maximum, float sum) const {
  float* const line = Probability(row, head);
  const int64_t attended = Whole(row, kv_head) + Attended(row, kv_head) - Stored(row, kv_head);
  const float inverse = 1.0f / sum;
  int64_t t = 0;
  for (; t + kLanes <= attended; t += kLanes) {
    Store(line + t, Exp(Load(line + t) - maximum) * inverse);
  }
  for (; t < attended; ++t) line[t] = Exp(line[t] - maximum) * inverse;
}

}  // namespace

absl::Status Run(const DecodeAttentionArgs& given, Context& context) {
  DecodeAttentionArgs args = given;
  if (args.plan.splits <= 1) args.plan = {.splits = 1, .split_tokens = 0};
  RETURN_IF_ERROR(CheckLengths("view", args.view, args.row_active, args.rows, args.kv_heads));

  Decode decode{args};
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  const int64_t tasks = pairs * args.plan.splits;
  const int64_t parts = tasks * decode.group;
  context.shared.Reset(Workspace::Padded<float>(parts * args.head_dim) +
                       2 * Workspace::Padded<float>(parts));
  decode.part.output = context.shared.Take<float>(parts * args.head_dim);
  decode.part.maximum = context.shared.Take<float>(parts);
  decode.part.sum = context.shared.Take<float>(parts);

  const int64_t bytes = AttentionRows::WorkspaceBytes(decode.group, args.head_dim);
  context.ReserveWorkers(bytes);
  context.pool.For(tasks, [&](int64_t task, int worker) {
    context.worker[worker].Reset(bytes);
    decode.Attend(task, context.worker[worker]);
  });
  // Without probabilities the merge is a few vectors for each head.
  const int64_t work = int64_t{decode.group} * args.plan.splits * args.head_dim +
                       (args.probability == nullptr ? 0 : decode.group * args.probability_stride);
  ForRows(context, pairs, work, [&](int64_t task, int) { decode.Merge(task); });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
