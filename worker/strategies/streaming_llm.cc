#include "worker/strategies/streaming_llm.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"

namespace kvsweep {
namespace {

// The same tokens in H2O's words: sinks and a window.
H2o BudgetOf(const StreamingLlm& parameters) {
  H2o budget;
  budget.set_sink_tokens(parameters.sink_tokens());
  budget.set_preemption(H2o::PREEMPTION_NONE);
  if (parameters.has_window_size()) {
    budget.set_recent_size(parameters.window_size());
  } else {
    budget.set_recent_ratio(parameters.window_ratio());
    budget.set_budget_base(parameters.budget_base());
    budget.set_budget_tokens(parameters.budget_tokens());
  }
  return budget;
}

bool InCache(const StreamingLlm& parameters, const ModelShape& shape) {
  return shape.rotary && parameters.positions() == StreamingLlm::POSITIONS_CACHE;
}

}  // namespace

absl::StatusOr<H2oLayout> StreamingLlmLayoutOf(const StreamingLlm& parameters,
                                               const StrategySizes& sizes) {
  const ModelShape& shape = sizes.shape;
  H2oLayout layout;
  layout.parameters = BudgetOf(parameters);
  layout.heads = shape.kv_heads;
  layout.slot_bytes = static_cast<uint64_t>(2 * shape.head_dim * DTypeBytes(sizes.kv_dtype)) *
                      static_cast<uint64_t>(shape.kv_heads * shape.layers);
  const RequestShape longest{.prompt_tokens = sizes.max_context - 1, .max_tokens = 1};
  layout.probability_stride =
      std::min(H2oBudgetOf(layout.parameters, longest).total(), sizes.max_context) + 1;
  layout.table_pages = PagesFor(sizes.max_context, layout.page_tokens);
  layout.fixed_bytes = SequenceTables::Bytes(sizes, layout.table_pages);
  if (InCache(parameters, shape)) {
    layout.fixed_bytes +=
        StepState::FieldBytes(sizes.max_rows) +
        StepState::FieldBytes(sizes.max_decode_rows * (layout.probability_stride - 1));
  }
  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(sizes.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "streaming_llm"));
  layout.pages = static_cast<int32_t>(
      std::min<int64_t>(layout.pages, int64_t{sizes.max_sequences} * layout.table_pages));
  return layout;
}

absl::StatusOr<std::unique_ptr<CacheStrategy>> StreamingLlmStrategy::Create(
    const StreamingLlm& parameters, const StrategyContext& context) {
  ASSIGN_OR_RETURN(const H2oLayout layout, StreamingLlmLayoutOf(parameters, context));
  const uint64_t before = context.step_state->device_bytes();
  SequenceTables tables(context, layout.table_pages);
  std::unique_ptr<StreamingLlmStrategy> strategy(new StreamingLlmStrategy(
      layout, context, InCache(parameters, context.shape), std::move(tables)));
  KVSWEEP_CHECK_EQ(context.step_state->device_bytes() - before, layout.fixed_bytes);
  ASSIGN_OR_RETURN(
      strategy->memory_,
      AllocateFor(context, Tier::kDevice, static_cast<uint64_t>(layout.pages) * layout.page_bytes(),
                  "streaming_llm pages"));
  return strategy;
}

StreamingLlmStrategy::StreamingLlmStrategy(const H2oLayout& layout, const StrategyContext& context,
                                           bool in_cache, SequenceTables tables)
    : context_(context), manager_(layout), in_cache_(in_cache), tables_(std::move(tables)) {
  if (!in_cache_) return;
  cache_position_ = context.step_state->Add(context.max_rows);
  rank_ = context.step_state->Add(context.max_decode_rows * (layout.probability_stride - 1));
}

StreamingLlmStrategy::~StreamingLlmStrategy() { context_.backend->Free(memory_); }

KvView StreamingLlmStrategy::View(int32_t layer) const {
  const H2oLayout& layout = manager_.layout();
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int64_t head = int64_t{layout.page_tokens} * context_.shape.head_dim;
  const int64_t side = head * context_.shape.kv_heads;
  std::byte* key = memory_ + 2 * side * layer * bytes;
  return {.key = key,
          .value = key + head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = layout.page_tokens,
          .block_stride = 2 * side * context_.shape.layers,
          .token_stride = context_.shape.head_dim,
          .head_stride = 2 * head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

// One number for each slot of a decode row, the same for all heads and layers.
SlotView StreamingLlmStrategy::Ranks() const {
  const auto slots = static_cast<int32_t>(manager_.layout().probability_stride - 1);
  return {.data = context_.step_state->Device(rank_), .block_size = slots, .block_stride = slots};
}

void StreamingLlmStrategy::BeginStep(const StepView& step) {
  StepState& state = *context_.step_state;
  const auto slots = static_cast<size_t>(manager_.layout().probability_stride - 1);
  std::vector<int32_t>& budgets = decode_budget_[static_cast<size_t>(step.parity)];
  budgets.clear();
  tables_.Clear(step);
  const auto set = [&](const Segment& segment, int32_t row, int32_t stored) {
    tables_.SetRow(row, manager_.Pages(segment.request), stored);
    for (int32_t i = 0; in_cache_ && i < segment.rows; ++i) {
      state.Host(cache_position_)[static_cast<size_t>(segment.first_row + i)] = stored + i;
    }
  };
  if (in_cache_)
    std::ranges::fill(state.Host(cache_position_).first(static_cast<size_t>(step.rows)), 0);
  for (const Segment& segment : step.decode) {
    const auto [sinks, window] = manager_.Budget(segment.request);
    budgets.push_back(sinks + window);
    const int32_t position = segment.start_position;
    const int32_t stored = std::min(position, sinks + window);
    set(segment, segment.first_row, stored);
    // The new token takes the slot of the one that leaves; without a window it is not kept.
    const bool full = position >= sinks + window;
    const int32_t oldest = full && window > 0 ? sinks + (position - sinks) % window : sinks;
    if (!full || window > 0)
      tables_.SetTokens(segment, segment.first_row, full ? oldest : position);
    for (int32_t slot = 0; in_cache_ && slot < stored; ++slot) {
      state.Host(
          rank_)[static_cast<size_t>(segment.first_row) * slots + static_cast<size_t>(slot)] =
          slot < sinks ? slot : sinks + (slot - oldest + window) % window;
    }
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    const Segment& segment = step.prefill[i];
    set(segment, tables_.PrefillRow(i), segment.start_position);
    tables_.SetTokens(segment, tables_.PrefillRow(i), segment.start_position);
  }
  plan_ = context_.backend->PlanAttention(step.decode_rows, static_cast<int32_t>(slots),
                                          context_.shape.kv_heads);
}

// Turns queries to their places in the cache; keys are stored as they are and turned when they are
// read. With original positions both are turned now.
void StreamingLlmStrategy::Position(const StepView& step, const AttentionInputs& inputs) {
  if (!in_cache_) return RotateQueriesAndKeys(context_, step, inputs);
  context_.backend->Rotary({.data = inputs.query,
                            .position = context_.step_state->Device(cache_position_),
                            .inverse_frequency = context_.shape.inverse_frequency,
                            .rows = step.rows,
                            .heads = context_.shape.query_heads,
                            .head_dim = context_.shape.head_dim},
                           Stream::kCompute);
}

void StreamingLlmStrategy::Attend(const StepView& step, int32_t layer,
                                  const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  Position(step, inputs);
  const KvView view = View(layer);
  // Slots of a prompt are in order of position: their ranks are their numbers.
  KeyRotation rotation;
  if (in_cache_) rotation.inverse_frequency = context_.shape.inverse_frequency;
  if (step.decode_rows > 0) {
    DecodeAttentionArgs attention = DecodeCall(context_, step, inputs, out, view, plan_);
    attention.rotation = rotation;
    if (in_cache_) attention.rotation.rank = Ranks();
    backend.DecodeAttention(attention, Stream::kCompute);
  }
  // Behind the decode rows' attention: a new token overwrites the one that leaves the window, which
  // is attended to once more.
  backend.Append({.target = view,
                  .key = inputs.key,
                  .value = inputs.value,
                  .table_row = tables_.token_row(),
                  .slot = tables_.token_slot(),
                  .rows = step.rows,
                  .kv_heads = context_.shape.kv_heads,
                  .head_dim = context_.shape.head_dim},
                 Stream::kCompute);
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    const Segment& segment = step.prefill[i];
    const int32_t row = tables_.PrefillRow(i);
    PrefillAttentionArgs attention = PrefillCall(context_, segment, inputs, out, view, row);
    attention.rotation = rotation;
    backend.PrefillAttention(attention, Stream::kCompute);
    if (!segment.last_chunk) continue;
    const H2oBudget budget = manager_.Budget(segment.request);
    backend.PruneHeavy({.view = view,
                        .table_row = row,
                        .tokens = segment.start_position + segment.rows,
                        .heavy = budget.heavy,
                        .recent = budget.recent,
                        .sinks = budget.heavy,
                        .kv_heads = context_.shape.kv_heads,
                        .head_dim = context_.shape.head_dim},
                       Stream::kCompute);
  }
}

DecodeCounts StreamingLlmStrategy::CollectDecode(const StepView& step, size_t index,
                                                 std::span<double> attended_by_layer) {
  const Segment& segment = step.decode[index];
  const int32_t budget = decode_budget_[static_cast<size_t>(step.parity)][index];
  const double attended = std::min(segment.start_position, budget) + 1;
  for (double& layer : attended_by_layer) layer = attended;
  const bool evicts = segment.start_position >= budget;
  return {.attended = attended * context_.shape.layers, .evicted = evicts, .engaged = evicts};
}

int32_t StreamingLlmStrategy::PromptEvictions(const RequestShape& shape, int32_t tokens) const {
  return std::max(0, tokens - TokenBudget(shape));
}

int32_t StreamingLlmStrategy::TokenBudget(const RequestShape& shape) const {
  return H2oBudgetOf(manager_.layout().parameters, shape).total();
}

EngagementRule StreamingLlmStrategy::engagement_rule() const {
  return {"tokens left the window in at least half of the requests longer than it"};
}

bool StreamingLlmStrategy::EngagementExpected(const RequestShape& shape, int32_t tokens) const {
  // The last token is never stored: of one more than the window none can leave.
  return tokens > TokenBudget(shape) + 1;
}

}  // namespace kvsweep
