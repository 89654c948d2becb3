#include "worker/strategies/paged.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"

namespace kvsweep {

absl::StatusOr<PagedLayout> PagedLayoutOf(const Paged& parameters, const StrategySizes& sizes) {
  const ModelShape& shape = sizes.shape;
  PagedLayout layout;
  layout.parameters = parameters;
  layout.block_size = static_cast<int32_t>(parameters.block_size());
  layout.max_context = sizes.max_context;
  layout.token_bytes = static_cast<uint64_t>(2 * DTypeBytes(sizes.kv_dtype)) * shape.layers *
                       shape.kv_heads * shape.head_dim;
  const int32_t table_pages = PagesFor(sizes.max_context, layout.block_size);
  // What all sequences together can fill.
  const auto held_pages = static_cast<uint64_t>(sizes.max_sequences) * table_pages;
  const auto pages_in = [&](uint64_t bytes) {
    return static_cast<int32_t>(std::min(held_pages, bytes / layout.page_bytes()));
  };
  const bool swaps = parameters.preemption() == Paged::PREEMPTION_SWAP;
  layout.forked_pages = sizes.max_sequences;
  layout.host_pages = swaps ? pages_in(sizes.host_bytes) : 0;
  // Victims list the pages that they share once each, so that no device bounds them; each takes a
  // page of the host.
  layout.swapped_pages = layout.host_pages;
  layout.fixed_bytes = SequenceTables::Bytes(sizes, table_pages) +
                       sizeof(PagePair) * static_cast<uint64_t>(layout.forked_pages) +
                       PageTransfers::ListBytes(layout.swapped_pages);
  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(sizes.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "paged"));
  // Pages beyond that serve only to remember what finished requests left for others.
  if (parameters.prefix_caching() != Paged::PREFIX_CACHING_SHARED) {
    layout.pages =
        static_cast<int32_t>(std::min<uint64_t>(static_cast<uint64_t>(layout.pages), held_pages));
  }
  layout.watermark_pages = static_cast<int32_t>(parameters.watermark() * layout.pages);
  return layout;
}

// ---------------------------------------------------------------------------------- creation

absl::StatusOr<std::unique_ptr<CacheStrategy>> PagedStrategy::Create(
    const Paged& parameters, const StrategyContext& context) {
  ASSIGN_OR_RETURN(const PagedLayout layout, PagedLayoutOf(parameters, context));
  SequenceTables tables(context, PagesFor(context.max_context, layout.block_size));
  std::unique_ptr<PagedStrategy> strategy(new PagedStrategy(layout, context, std::move(tables)));
  RETURN_IF_ERROR(strategy->AllocateMemory());
  return strategy;
}

PagedStrategy::PagedStrategy(const PagedLayout& layout, const StrategyContext& context,
                             SequenceTables tables)
    : context_(context),
      layout_(layout),
      manager_(MakePagedManager(layout)),
      tables_(std::move(tables)) {}

absl::Status PagedStrategy::AllocateMemory() {
  const uint64_t page_bytes = layout_.page_bytes();
  ASSIGN_OR_RETURN(
      memory_, AllocateFor(context_, Tier::kDevice,
                           static_cast<uint64_t>(layout_.pages) * page_bytes, "paged KV pages"));
  if (layout_.host_pages > 0) {
    ASSIGN_OR_RETURN(
        host_memory_,
        AllocateFor(context_, Tier::kHost, static_cast<uint64_t>(layout_.host_pages) * page_bytes,
                    "swapped KV pages"));
  }
  const uint64_t fork_bytes = sizeof(PagePair) * static_cast<uint64_t>(layout_.forked_pages);
  const uint64_t list_bytes = fork_bytes + PageTransfers::ListBytes(layout_.swapped_pages);
  ASSIGN_OR_RETURN(list_memory_,
                   AllocateFor(context_, Tier::kDevice, list_bytes, "lists of pages"));
  if (layout_.host_pages > 0) {
    transfers_.emplace(context_.backend,
                       PageTransfers::Memory{.device = memory_,
                                             .host = host_memory_,
                                             .lists = list_memory_ + fork_bytes,
                                             .page_bytes = static_cast<int64_t>(page_bytes),
                                             .most_pages = layout_.swapped_pages});
  }
  return absl::OkStatus();
}

PagedStrategy::~PagedStrategy() {
  transfers_.reset();  // before the memory that its copies use
  for (std::byte* memory : {memory_, host_memory_, list_memory_}) context_.backend->Free(memory);
}

KvView PagedStrategy::View(int32_t layer) const {
  const ModelShape& shape = context_.shape;
  const int64_t block = layout_.block_size;
  const int64_t head = block * shape.head_dim;  // elements: keys or values of one head in a page
  const int64_t side = head * shape.kv_heads;   // keys or values of one layer
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  std::byte* key = memory_ + 2 * side * layer * bytes;
  return {.key = key,
          .value = key + head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = static_cast<int32_t>(block),
          .block_stride = 2 * side * shape.layers,
          .token_stride = shape.head_dim,
          .head_stride = 2 * head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

void PagedStrategy::BeginStep(const StepView& step) {
  tables_.Clear(step);
  auto set = [&](const Segment& segment, int32_t row) {
    tables_.SetRow(row, manager_->Pages(segment.request), segment.start_position);
    tables_.SetTokens(segment, row, segment.start_position);
  };
  for (const Segment& segment : step.decode) set(segment, segment.first_row);
  for (size_t i = 0; i < step.prefill.size(); ++i) set(step.prefill[i], tables_.PrefillRow(i));
  plan_ = PlanDecode(context_, step);
  const auto [references, used_pages] = manager_->Sharing();
  references_ += references;
  used_pages_ += used_pages;
}

// ------------------------------------------------------------------------------------ copies

// In the order in which pages change hands: what leaves must be read before its pages are written,
// and what comes may take pages that a fork has read.
void PagedStrategy::MoveMemory(const StepView& step) {
  if (transfers_) transfers_->EnqueueOuts(manager_->swaps());
  EnqueueForks();
  if (!transfers_) return;
  transfers_->EnqueueIns(manager_->swaps());
  // Decodes overlap the copies, but those of what they bring.
  const auto arrived = [&](const Segment& segment) { return manager_->Arrived(segment.request); };
  if (!std::ranges::all_of(step.decode, arrived)) transfers_->AwaitArrivals();
}

void PagedStrategy::EnqueueForks() {
  Backend& backend = *context_.backend;
  forks_ = manager_->TakeForks();
  if (forks_.empty()) return;
  forked_pages_ += static_cast<int64_t>(forks_.size());
  backend.Copy(list_memory_, forks_.data(), forks_.size() * sizeof(PagePair), Stream::kCompute);
  size_t first = 0;
  for (const size_t end : IndependentGroups(forks_)) {
    backend.CopyBlocks({.target = memory_,
                        .source = memory_,
                        .pair = reinterpret_cast<const int32_t*>(list_memory_) + 2 * first,
                        .block_bytes = static_cast<int64_t>(layout_.page_bytes()),
                        .count = static_cast<int32_t>(end - first)},
                       Stream::kCompute);
    first = end;
  }
}

bool PagedStrategy::NeedsHost() const {
  if (!forks_.empty() || manager_->HasForks()) return true;
  return transfers_ && (transfers_->under_way() || manager_->swaps()->pending());
}

void PagedStrategy::StepDone() {
  forks_.clear();
  const int32_t landed = transfers_ ? transfers_->StepDone() : 0;
  for (int32_t batch = 0; batch < landed; ++batch) manager_->SwapInsLanded();
}

// ------------------------------------------------------------------------------------ figures

void PagedStrategy::BeginMeasurement() {
  manager_->BeginMeasurement();
  forked_pages_ = references_ = used_pages_ = 0;
  if (transfers_) transfers_->BeginMeasurement();
}

std::vector<CacheStrategy::Figure> PagedStrategy::Figures() const {
  std::vector<Figure> figures;
  const auto add = [&](const char* name, double value) {
    figures.push_back({.name = name, .value = value});
  };
  const auto [queried, hit] = manager_->CacheLookups();
  add("prefix_queried_tokens", static_cast<double>(queried));
  add("prefix_hit_tokens", static_cast<double>(hit));
  add("forked_pages", static_cast<double>(forked_pages_));
  if (references_ > 0) {
    add("shared_fraction", 1 - static_cast<double>(used_pages_) / static_cast<double>(references_));
  }
  if (transfers_) transfers_->AddFigures(&figures);
  return figures;
}

// ---------------------------------------------------------------------------------- attention

void PagedStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                           const Activations& out) {
  Backend& backend = *context_.backend;
  const KvView view = View(layer);
  const AppendArgs append = AppendCall(context_, step, inputs, view, tables_);
  const DecodeAttentionArgs decode = DecodeCall(context_, step, inputs, out, view, plan_);
  // A prompt may read pages that other rows fill in this very step (PagedManager), so with one all
  // is stored first. Rows that decode read nothing that another row stores.
  if (step.decode_rows == step.rows) {
    backend.AppendAndAttend({.append = append, .attention = decode}, Stream::kCompute);
    return;
  }
  backend.Append(append, Stream::kCompute);
  if (step.decode_rows > 0) backend.DecodeAttention(decode, Stream::kCompute);
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
