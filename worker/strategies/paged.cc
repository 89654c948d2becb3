#include "worker/strategies/paged.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"

namespace kvsweep {

// ------------------------------------------------------------------------------------------------
// manager

PagedManager::PagedManager(const PagedLayout& layout) : layout_(layout), pool_(layout.pages) {}

TierBytes PagedManager::PeakBytes(const RequestShape& shape) const {
  // The last token that is produced is never fed back, so it is not stored.
  const int32_t pages = PagesFor(shape.limit() - 1, layout_.block_size) + layout_.watermark_pages;
  return {static_cast<uint64_t>(pages) * layout_.page_bytes(), 0};
}

bool PagedManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  const int32_t pages = PagesFor(tokens, layout_.block_size);
  if (pool_.free_pages() - pages < layout_.watermark_pages) return false;
  Held held{.tokens = tokens};
  KVSWEEP_CHECK(pool_.Take(pages, &held.pages));
  held_.emplace(request, std::move(held));
  return true;
}

bool PagedManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  const int32_t more =
      PagesFor(tokens, layout_.block_size) - static_cast<int32_t>(held.pages.size());
  if (!pool_.Take(std::max(more, 0), &held.pages)) return false;
  held.tokens = tokens;
  return true;
}

void PagedManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  pool_.GiveBack(static_cast<int32_t>(found->second.pages.size()), &found->second.pages);
  held_.erase(found);
}

bool PagedManager::Resume(RequestId request, int32_t tokens) {
  KVSWEEP_CHECK(false) << "recomputed requests are admitted, not resumed";
  return false;
}

TierBytes PagedManager::ReservedBytes() const {
  return {layout_.fixed_bytes + static_cast<uint64_t>(pool_.used_pages()) * layout_.page_bytes(),
          0};
}

TierBytes PagedManager::LiveBytes() const {
  uint64_t tokens = 0;
  for (const auto& [request, held] : held_) tokens += static_cast<uint64_t>(held.tokens);
  return {layout_.fixed_bytes + tokens * layout_.token_bytes, 0};
}

TierBytes PagedManager::RequestBytes(RequestId request) const {
  return {held_.at(request).pages.size() * layout_.page_bytes(), 0};
}

void PagedManager::CheckInvariants() const {
  pool_.CheckInvariants();
  size_t pages = 0;
  for (const auto& [request, held] : held_) {
    pages += held.pages.size();
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.pages.size()),
                     PagesFor(held.tokens, layout_.block_size));
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(pages), pool_.used_pages());
}

// -----------------------------------------------------------------------------------------------
// strategy

absl::StatusOr<std::unique_ptr<CacheStrategy>> PagedStrategy::Create(
    const Paged& parameters, const StrategyContext& context) {
  const ModelShape& shape = context.shape;
  PagedLayout layout;
  layout.block_size = static_cast<int32_t>(parameters.block_size());
  layout.token_bytes = static_cast<uint64_t>(2 * DTypeBytes(context.kv_dtype)) * shape.layers *
                       shape.kv_heads * shape.head_dim;
  const uint64_t before = context.step_state->device_bytes();
  SequenceTables tables(context, PagesFor(context.max_context, layout.block_size));
  layout.fixed_bytes = context.step_state->device_bytes() - before;
  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(context.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "paged"));
  // More pages than all sequences together can fill would never be used.
  layout.pages = std::min(layout.pages, context.max_sequences * tables.max_pages());
  layout.watermark_pages = static_cast<int32_t>(parameters.watermark() * layout.pages);
  ASSIGN_OR_RETURN(
      std::byte * memory,
      AllocateFor(context, Tier::kDevice, static_cast<uint64_t>(layout.pages) * layout.page_bytes(),
                  "paged KV pages"));
  return std::unique_ptr<CacheStrategy>(
      new PagedStrategy(layout, context, std::move(tables), memory));
}

PagedStrategy::PagedStrategy(const PagedLayout& layout, const StrategyContext& context,
                             SequenceTables tables, std::byte* memory)
    : context_(context), manager_(layout), tables_(std::move(tables)), memory_(memory) {}

PagedStrategy::~PagedStrategy() { context_.backend->Free(memory_); }

KvView PagedStrategy::View(int32_t layer) const {
  const ModelShape& shape = context_.shape;
  const int64_t block = manager_.layout().block_size;
  const int64_t head = block * shape.head_dim;  // elements of one head in a page
  const int64_t side = head * shape.kv_heads;   // keys or values of one layer
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  std::byte* key = memory_ + 2 * side * layer * bytes;
  return {.key = key,
          .value = key + side * bytes,
          .dtype = context_.kv_dtype,
          .block_size = static_cast<int32_t>(block),
          .block_stride = 2 * side * shape.layers,
          .token_stride = shape.head_dim,
          .head_stride = head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

void PagedStrategy::BeginStep(const StepView& step) {
  tables_.Clear(step);
  auto set = [&](const Segment& segment, int32_t row) {
    tables_.SetRow(row, manager_.Pages(segment.request), segment.start_position);
    tables_.SetTokens(segment, row, segment.start_position);
  };
  for (const Segment& segment : step.decode) set(segment, segment.first_row);
  for (size_t i = 0; i < step.prefill.size(); ++i) set(step.prefill[i], tables_.PrefillRow(i));
  plan_ = PlanDecode(context_, step);
}

void PagedStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                           const Activations& out) {
  Backend& backend = *context_.backend;
  RotateQueriesAndKeys(context_, step, inputs);
  const KvView view = View(layer);
  backend.Append({.target = view,
                  .key = inputs.key,
                  .value = inputs.value,
                  .table_row = tables_.token_row(),
                  .slot = tables_.token_slot(),
                  .rows = step.rows,
                  .kv_heads = context_.shape.kv_heads,
                  .head_dim = context_.shape.head_dim},
                 Stream::kCompute);
  if (step.decode_rows > 0) {
    backend.DecodeAttention(DecodeCall(context_, step, inputs, out, view, plan_), Stream::kCompute);
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    backend.PrefillAttention(
        PrefillCall(context_, step.prefill[i], inputs, out, view, tables_.PrefillRow(i)),
        Stream::kCompute);
  }
}

DecodeCounts PagedStrategy::CollectDecode(const StepView& step, size_t index,
                                          std::span<double> attended_by_layer) {
  const double attended = step.decode[index].start_position + 1;
  for (double& layer : attended_by_layer) layer = attended;
  return {.attended = attended * context_.shape.layers};
}

}  // namespace kvsweep
