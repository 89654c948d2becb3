#include "worker/strategies/attention_calls.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace kvsweep {

Activations FromRow(const StrategyContext& context, const Activations& data, int32_t row) {
  const int64_t bytes = DTypeBytes(context.backend->info().activation_dtype);
  return {static_cast<std::byte*>(data.data) + int64_t{row} * data.stride * bytes, data.stride};
}

namespace {

// Of queries and keys, which lie side by side.
RotaryArgs RotaryCall(const StrategyContext& context, const StepView& step,
                      const AttentionInputs& inputs) {
  return {.data = inputs.query,
          .position = step.position,
          .inverse_frequency = context.shape.inverse_frequency,
          .rows = step.rows,
          .heads = context.shape.query_heads + context.shape.kv_heads,
          .head_dim = context.shape.head_dim};
}

}  // namespace

void RotateQueriesAndKeys(const StrategyContext& context, const StepView& step,
                          const AttentionInputs& inputs) {
  if (!context.shape.rotary) return;
  context.backend->Rotary(RotaryCall(context, step, inputs), Stream::kCompute);
}

AppendArgs AppendCall(const StrategyContext& context, const StepView& step,
                      const AttentionInputs& inputs, const KvView& view,
                      const SequenceTables& tables) {
  AppendArgs append{.target = view,
                    .key = inputs.key,
                    .value = inputs.value,
                    .table_row = tables.token_row(),
                    .slot = tables.token_slot(),
                    .rows = step.rows,
                    .kv_heads = context.shape.kv_heads,
                    .head_dim = context.shape.head_dim};
  if (context.shape.rotary) append.rotary = RotaryCall(context, step, inputs);
  return append;
}

DecodeAttentionArgs DecodeCall(const StrategyContext& context, const StepView& step,
                               const AttentionInputs& inputs, const Activations& out,
                               const KvView& view, const AttentionPlan& plan) {
  return {.out = out,
          .query = inputs.query,
          .current_key = inputs.key,
          .current_value = inputs.value,
          .view = view,
          .row_active = step.row_active,
          .plan = plan,
          .rows = step.decode_rows,
          .query_heads = context.shape.query_heads,
          .kv_heads = context.shape.kv_heads,
          .head_dim = context.shape.head_dim,
          .scale = context.shape.attention_scale()};
}

PrefillAttentionArgs PrefillCall(const StrategyContext& context, const Segment& segment,
                                 const AttentionInputs& inputs, const Activations& out,
                                 const KvView& history, int32_t row) {
  return {.out = FromRow(context, out, segment.first_row),
          .query = FromRow(context, inputs.query, segment.first_row),
          .chunk_key = FromRow(context, inputs.key, segment.first_row),
          .chunk_value = FromRow(context, inputs.value, segment.first_row),
          .history = history,
          .history_row = row,
          .history_tokens = segment.start_position,
          .rows = segment.rows,
          .query_heads = context.shape.query_heads,
          .kv_heads = context.shape.kv_heads,
          .head_dim = context.shape.head_dim,
          .scale = context.shape.attention_scale()};
}

AttentionPlan PlanDecode(const StrategyContext& context, const StepView& step) {
  int32_t longest = step.captured ? context.max_context : 0;
  for (const Segment& segment : step.decode) longest = std::max(longest, segment.start_position);
  return context.backend->PlanAttention(step.decode_rows, longest, context.shape.kv_heads);
}

absl::StatusOr<std::byte*> AllocateFor(const StrategyContext& context, Tier tier, uint64_t bytes,
                                       absl::string_view what) {
  return Annotate(context.backend->Allocate(tier, bytes), what);
}

absl::StatusOr<int32_t> PagesInBudget(uint64_t budget_bytes, uint64_t fixed_bytes,
                                      uint64_t page_bytes, absl::string_view arm,
                                      absl::string_view field) {
  if (budget_bytes < fixed_bytes + page_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(field, ": ", arm, " takes ", fixed_bytes,
                     " bytes of fixed structures and at least one page of ", page_bytes, ", asked ",
                     fixed_bytes + page_bytes, ", available ", budget_bytes, "; raise ", field,
                     " or lower engine.max_num_seqs"));
  }
  const uint64_t pages = (budget_bytes - fixed_bytes) / page_bytes;
  return static_cast<int32_t>(std::min<uint64_t>(pages, std::numeric_limits<int32_t>::max() / 2));
}

}  // namespace kvsweep
