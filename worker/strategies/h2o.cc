#include "worker/strategies/h2o.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/token_budget.h"

namespace kvsweep {

H2oBudget H2oBudgetOf(const H2o& parameters, const RequestShape& shape) {
  const double ratio = parameters.heavy_ratio() + parameters.recent_ratio();
  const int32_t total =
      BudgetTokens(ratio,
                   BudgetBaseTokens(parameters.budget_base(),
                                    static_cast<int32_t>(parameters.budget_tokens()), shape),
                   2);
  const double heavy_share = ratio > 0 ? parameters.heavy_ratio() / ratio : 0;
  const auto heavy = static_cast<int32_t>(std::lround(heavy_share * total));
  return {.heavy = heavy, .recent = total - heavy};
}

// ------------------------------------------------------------------------------------------------
// manager

H2oManager::H2oManager(const H2oLayout& layout) : layout_(layout), pool_(layout.pages) {}

int32_t H2oManager::PromptPages(const RequestShape& shape) const {
  return std::max(PagesFor(shape.prompt_tokens, H2oLayout::kPageTokens), SlabPages(shape));
}

int32_t H2oManager::SlabPages(const RequestShape& shape) const {
  const int32_t slots = std::min(H2oBudgetOf(layout_.parameters, shape).total(), shape.limit() - 1);
  return PagesFor(std::max(slots, 1), H2oLayout::kPageTokens);
}

TierBytes H2oManager::PeakBytes(const RequestShape& shape) const {
  return {static_cast<uint64_t>(PromptPages(shape)) * layout_.page_bytes(), 0};
}

bool H2oManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  KVSWEEP_CHECK_LE(tokens, shape.prompt_tokens);
  Held held{.shape = shape, .budget = H2oBudgetOf(layout_.parameters, shape), .tokens = tokens};
  if (!pool_.Take(PromptPages(shape), &held.pages)) return false;
  held_.emplace(request, std::move(held));
  return true;
}

bool H2oManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  KVSWEEP_CHECK(held.prompt_ended || tokens <= held.shape.prompt_tokens);
  held.tokens = tokens;
  return true;
}

void H2oManager::EndPrompt(RequestId request) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.prompt_ended);
  held.prompt_ended = true;
  const int32_t spare = static_cast<int32_t>(held.pages.size()) - SlabPages(held.shape);
  pool_.GiveBack(spare, &held.pages);
}

void H2oManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  pool_.GiveBack(static_cast<int32_t>(found->second.pages.size()), &found->second.pages);
  held_.erase(found);
}

bool H2oManager::Resume(RequestId request, int32_t tokens) {
  KVSWEEP_CHECK(false) << "an admitted request is never preempted";
  return false;
}

TierBytes H2oManager::ReservedBytes() const {
  return {layout_.fixed_bytes + static_cast<uint64_t>(pool_.used_pages()) * layout_.page_bytes(),
          0};
}

TierBytes H2oManager::LiveBytes() const {
  uint64_t slots = 0;
  for (const auto& [request, held] : held_) {
    slots += static_cast<uint64_t>(held.prompt_ended ? std::min(held.tokens, held.budget.total())
                                                     : held.tokens);
  }
  return {layout_.fixed_bytes + slots * layout_.slot_bytes, 0};
}

TierBytes H2oManager::RequestBytes(RequestId request) const {
  return {held_.at(request).pages.size() * layout_.page_bytes(), 0};
}

void H2oManager::CheckInvariants() const {
  pool_.CheckInvariants();
  size_t pages = 0;
  for (const auto& [request, held] : held_) {
    pages += held.pages.size();
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.pages.size()),
                     held.prompt_ended ? SlabPages(held.shape) : PromptPages(held.shape));
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(pages), pool_.used_pages());
}

// -----------------------------------------------------------------------------------------------
// strategy

absl::StatusOr<std::unique_ptr<CacheStrategy>> H2oStrategy::Create(const H2o& parameters,
                                                                   const StrategyContext& context) {
  const ModelShape& shape = context.shape;
  const int64_t slot = 2 * shape.head_dim * DTypeBytes(context.kv_dtype) + 8;
  H2oLayout layout;
  layout.parameters = parameters;
  layout.slot_bytes = static_cast<uint64_t>(slot * shape.kv_heads * shape.layers);

  const uint64_t before = context.step_state->device_bytes();
  SequenceTables tables(context, PagesFor(context.max_context, H2oLayout::kPageTokens));
  Arrays arrays;
  for (StepState::Field* field : {&arrays.position, &arrays.heavy, &arrays.recent}) {
    *field = context.step_state->Add(context.max_decode_rows);
  }
  // A ratio of a request's tokens is at most that of the longest request; a fixed base may be
  // larger but no more than max_context is stored.
  const RequestShape longest{.prompt_tokens = context.max_context - 1, .max_tokens = 1};
  const int64_t probability_stride =
      std::min(H2oBudgetOf(parameters, longest).total(), context.max_context) + 1;
  layout.fixed_bytes =
      context.step_state->device_bytes() - before +
      sizeof(float) *
          static_cast<uint64_t>(shape.query_heads *
                                (context.max_decode_rows * probability_stride + context.max_rows));
  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(context.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "h2o"));
  layout.pages = std::min(layout.pages, context.max_sequences * tables.max_pages());

  std::unique_ptr<H2oStrategy> strategy(
      new H2oStrategy(layout, context, std::move(tables), arrays));
  RETURN_IF_ERROR(strategy->AllocateMemory(probability_stride));
  return strategy;
}

H2oStrategy::H2oStrategy(const H2oLayout& layout, const StrategyContext& context,
                         SequenceTables tables, const Arrays& arrays)
    : context_(context), manager_(layout), tables_(std::move(tables)), arrays_(arrays) {}

absl::Status H2oStrategy::AllocateMemory(int64_t probability_stride) {
  const int64_t query_heads = context_.shape.query_heads;
  const H2oLayout& layout = manager_.layout();
  ASSIGN_OR_RETURN(
      memory_.pages,
      AllocateFor(context_, Tier::kDevice,
                  static_cast<uint64_t>(layout.pages) * layout.page_bytes(), "h2o pages"));
  memory_.probability_stride = probability_stride;
  ASSIGN_OR_RETURN(
      std::byte * probability,
      AllocateFor(context_, Tier::kDevice,
                  sizeof(float) * static_cast<uint64_t>(context_.max_decode_rows * query_heads *
                                                        probability_stride),
                  "h2o probabilities"));
  memory_.probability = reinterpret_cast<float*>(probability);
  ASSIGN_OR_RETURN(
      std::byte * log_sum_exp,
      AllocateFor(context_, Tier::kDevice,
                  sizeof(float) * static_cast<uint64_t>(context_.max_rows * query_heads),
                  "h2o row sums"));
  memory_.log_sum_exp = reinterpret_cast<float*>(log_sum_exp);
  return absl::OkStatus();
}

H2oStrategy::~H2oStrategy() {
  context_.backend->Free(memory_.pages);
  context_.backend->Free(reinterpret_cast<std::byte*>(memory_.probability));
  context_.backend->Free(reinterpret_cast<std::byte*>(memory_.log_sum_exp));
}

// A page: for each layer keys, values, scores, positions. Bytes of one layer: page_bytes / L.
KvView H2oStrategy::View(int32_t layer) const {
  const ModelShape& shape = context_.shape;
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const auto page_bytes = static_cast<int64_t>(manager_.layout().page_bytes());
  const int64_t head = int64_t{H2oLayout::kPageTokens} * shape.head_dim;
  std::byte* key = memory_.pages + page_bytes / shape.layers * layer;
  return {.key = key,
          .value = key + head * shape.kv_heads * bytes,
          .dtype = context_.kv_dtype,
          .block_size = H2oLayout::kPageTokens,
          .block_stride = page_bytes / bytes,
          .token_stride = shape.head_dim,
          .head_stride = head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

SlotView H2oStrategy::Scores(int32_t layer) const {
  const KvView view = View(layer);
  const int64_t side_bytes =
      view.head_stride * context_.shape.kv_heads * DTypeBytes(context_.kv_dtype);
  return {.data = view.value + side_bytes,
          .block_size = H2oLayout::kPageTokens,
          .block_stride = static_cast<int64_t>(manager_.layout().page_bytes() / sizeof(float)),
          .head_stride = H2oLayout::kPageTokens,
          .block_table = view.block_table,
          .block_table_stride = view.block_table_stride};
}

SlotView H2oStrategy::Positions(int32_t layer) const {
  SlotView view = Scores(layer);
  view.data =
      static_cast<float*>(view.data) + int64_t{H2oLayout::kPageTokens} * context_.shape.kv_heads;
  return view;
}

void H2oStrategy::BeginStep(const StepView& step) {
  tables_.Clear(step);
  std::span<int32_t> position = context_.step_state->Host(arrays_.position);
  std::span<int32_t> heavy = context_.step_state->Host(arrays_.heavy);
  std::span<int32_t> recent = context_.step_state->Host(arrays_.recent);
  std::ranges::fill(position, 0);
  std::ranges::fill(heavy, 1);
  std::ranges::fill(recent, 1);
  for (const Segment& segment : step.decode) {
    const auto row = static_cast<size_t>(segment.first_row);
    const H2oBudget budget = manager_.Budget(segment.request);
    position[row] = segment.start_position;
    heavy[row] = budget.heavy;
    recent[row] = budget.recent;
    // Decode tokens are placed by EvictHeavy, not by Append.
    tables_.SetRow(segment.first_row, manager_.Pages(segment.request),
                   std::min(segment.start_position, budget.total()));
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    const Segment& segment = step.prefill[i];
    tables_.SetRow(tables_.PrefillRow(i), manager_.Pages(segment.request), segment.start_position);
    tables_.SetTokens(segment, tables_.PrefillRow(i), segment.start_position);
  }
  plan_ = PlanDecode(context_, step);
}

void H2oStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                         const Activations& out) {
  RotateQueriesAndKeys(context_, step, inputs);
  if (step.decode_rows > 0) AttendDecode(step, layer, inputs, out);
  if (step.prefill.empty()) return;
  context_.backend->Append({.target = View(layer),
                            .key = inputs.key,
                            .value = inputs.value,
                            .table_row = tables_.token_row(),
                            .slot = tables_.token_slot(),
                            .rows = step.rows,
                            .kv_heads = context_.shape.kv_heads,
                            .head_dim = context_.shape.head_dim},
                           Stream::kCompute);
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    AttendPrefill(step.prefill[i], tables_.PrefillRow(i), layer, inputs, out);
  }
}

void H2oStrategy::AttendDecode(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                               const Activations& out) {
  const KvView view = View(layer);
  DecodeAttentionArgs attention = DecodeCall(context_, step, inputs, out, view, plan_);
  attention.probability = memory_.probability;
  attention.probability_stride = memory_.probability_stride;
  context_.backend->DecodeAttention(attention, Stream::kCompute);
  context_.backend->EvictHeavy({.view = view,
                                .score = Scores(layer),
                                .slot_position = Positions(layer),
                                .probability = memory_.probability,
                                .probability_stride = memory_.probability_stride,
                                .key = inputs.key,
                                .value = inputs.value,
                                .position = context_.step_state->Device(arrays_.position),
                                .heavy = context_.step_state->Device(arrays_.heavy),
                                .recent = context_.step_state->Device(arrays_.recent),
                                .row_active = step.row_active,
                                .rows = step.decode_rows,
                                .query_heads = context_.shape.query_heads,
                                .kv_heads = context_.shape.kv_heads,
                                .head_dim = context_.shape.head_dim},
                               Stream::kCompute);
}

void H2oStrategy::AttendPrefill(const Segment& segment, int32_t row, int32_t layer,
                                const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const KvView view = View(layer);
  PrefillAttentionArgs attention = PrefillCall(context_, segment, inputs, out, view, row);
  attention.log_sum_exp = memory_.log_sum_exp;
  backend.PrefillAttention(attention, Stream::kCompute);
  backend.ColumnSum({.score = Scores(layer),
                     .query = attention.query,
                     .log_sum_exp = memory_.log_sum_exp,
                     .keys = view,
                     .table_row = row,
                     .history_tokens = segment.start_position,
                     .rows = segment.rows,
                     .query_heads = shape.query_heads,
                     .kv_heads = shape.kv_heads,
                     .head_dim = shape.head_dim,
                     .scale = attention.scale},
                    Stream::kCompute);
  if (!segment.last_chunk) return;
  const H2oBudget budget = manager_.Budget(segment.request);
  backend.PruneHeavy({.view = view,
                      .score = Scores(layer),
                      .position = Positions(layer),
                      .table_row = row,
                      .tokens = segment.start_position + segment.rows,
                      .heavy = budget.heavy,
                      .recent = budget.recent,
                      .kv_heads = shape.kv_heads,
                      .head_dim = shape.head_dim},
                     Stream::kCompute);
}

DecodeCounts H2oStrategy::CollectDecode(const StepView& step, size_t index,
                                        std::span<double> attended_by_layer) {
  const Segment& segment = step.decode[index];
  const int32_t capacity = manager_.Budget(segment.request).total();
  const double attended = std::min(segment.start_position, capacity) + 1;
  for (double& layer : attended_by_layer) layer = attended;
  const bool evicts = segment.start_position >= capacity;
  return {.attended = attended * context_.shape.layers, .evicted = evicts, .engaged = evicts};
}

int32_t H2oStrategy::PromptEvictions(const RequestShape& shape) const {
  return std::max(0, shape.prompt_tokens - TokenBudget(shape));
}

int32_t H2oStrategy::TokenBudget(const RequestShape& shape) const {
  return H2oBudgetOf(manager_.layout().parameters, shape).total();
}

EngagementRule H2oStrategy::engagement_rule() const {
  return {"tokens were evicted in at least half of the requests longer than their budget"};
}

bool H2oStrategy::EngagementExpected(const RequestShape& shape, int32_t tokens) const {
  return tokens > TokenBudget(shape);
}

}  // namespace kvsweep
