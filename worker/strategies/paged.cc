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
  // More pages than all sequences together can fill would never be used.
  const auto most_pages = static_cast<uint64_t>(sizes.max_sequences) * table_pages;
  const auto pages_in = [&](uint64_t bytes) {
    return static_cast<int32_t>(std::min(most_pages, bytes / layout.page_bytes()));
  };
  const bool swaps = parameters.preemption() == Paged::PREEMPTION_SWAP;
  layout.forked_pages = sizes.max_sequences;
  layout.swapped_pages = swaps ? pages_in(sizes.device_bytes) : 0;
  layout.host_pages = swaps ? pages_in(sizes.host_bytes) : 0;
  layout.fixed_bytes =
      SequenceTables::Bytes(sizes, table_pages) +
      sizeof(PagePair) * static_cast<uint64_t>(layout.forked_pages + 2 * layout.swapped_pages);
  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(sizes.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "paged"));
  layout.pages =
      static_cast<int32_t>(std::min<uint64_t>(static_cast<uint64_t>(layout.pages), most_pages));
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
      tables_(std::move(tables)) {
  Backend& backend = *context_.backend;
  for (Event* event : {&out_.begun, &out_.done, &in_.begun, &in_.done, &forked_}) {
    *event = backend.CreateEvent();
  }
}

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
  const int64_t pairs = int64_t{layout_.forked_pages} + 2 * int64_t{layout_.swapped_pages};
  ASSIGN_OR_RETURN(std::byte * lists,
                   AllocateFor(context_, Tier::kDevice,
                               sizeof(PagePair) * static_cast<uint64_t>(pairs), "lists of pages"));
  list_memory_ = reinterpret_cast<int32_t*>(lists);
  fork_list_.device = list_memory_;
  out_list_.device = fork_list_.device + 2 * int64_t{layout_.forked_pages};
  in_list_.device = out_list_.device + 2 * int64_t{layout_.swapped_pages};
  return absl::OkStatus();
}

PagedStrategy::~PagedStrategy() {
  // A swap-in may still be queued; an error of that work belongs to whoever waits for it.
  if (in_.under_way) context_.backend->WaitAll().IgnoreError();
  context_.backend->Free(memory_);
  context_.backend->Free(host_memory_);
  context_.backend->Free(reinterpret_cast<std::byte*>(list_memory_));
}

KvView PagedStrategy::View(int32_t layer) const {
  const ModelShape& shape = context_.shape;
  const int64_t block = layout_.block_size;
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
    tables_.SetRow(row, manager_->Pages(segment.request), segment.start_position);
    tables_.SetTokens(segment, row, segment.start_position);
  };
  for (const Segment& segment : step.decode) set(segment, segment.first_row);
  for (size_t i = 0; i < step.prefill.size(); ++i) set(step.prefill[i], tables_.PrefillRow(i));
  plan_ = PlanDecode(context_, step);
  EnqueueCopies(step);
  const auto [references, used_pages] = manager_->Sharing();
  references_ += references;
  used_pages_ += used_pages;
}

// ------------------------------------------------------------------------------------ copies

void PagedStrategy::CopyPages(std::vector<PagePair> pairs, PageList* list, std::byte* target,
                              const std::byte* source, Stream stream) {
  list->pairs = std::move(pairs);
  context_.backend->Copy(list->device, list->pairs.data(), list->pairs.size() * sizeof(PagePair),
                         stream);
  size_t first = 0;
  // Pages of two pools never meet.
  const std::vector<size_t> ends =
      target == source ? IndependentGroups(list->pairs) : std::vector<size_t>{list->pairs.size()};
  for (const size_t end : ends) {
    context_.backend->CopyBlocks({.target = target,
                                  .source = source,
                                  .pair = list->device + 2 * first,
                                  .block_bytes = static_cast<int64_t>(layout_.page_bytes()),
                                  .count = static_cast<int32_t>(end - first)},
                                 stream);
    first = end;
  }
}

void PagedStrategy::Swap(std::vector<PagePair> pairs, PageList* list, Transfer* transfer,
                         std::byte* target, const std::byte* source, Stream stream) {
  Backend& backend = *context_.backend;
  transfer->pages += static_cast<int64_t>(pairs.size());
  transfer->under_way = true;
  backend.RecordEvent(transfer->begun, stream);
  CopyPages(std::move(pairs), list, target, source, stream);
  backend.RecordEvent(transfer->done, stream);
}

// In the order in which pages change hands: what leaves must be read before its pages are written,
// and what comes may take pages that a fork has read.
void PagedStrategy::EnqueueCopies(const StepView& step) {
  Backend& backend = *context_.backend;
  if (manager_->TakeSwapInGivenUp() && in_.under_way) {
    backend.WaitEvent(in_.done, Stream::kCompute);
    backend.WaitEvent(in_.done, Stream::kDeviceToHost);
  }
  std::vector<PagePair> outs = manager_->TakeSwapOuts();
  if (!outs.empty()) {
    // The victims' pages are wanted in this very step: it waits.
    Swap(std::move(outs), &out_list_, &out_, host_memory_, memory_, Stream::kDeviceToHost);
    backend.WaitEvent(out_.done, Stream::kCompute);
  }
  EnqueueForks();
  std::vector<PagePair> ins = manager_->TakeSwapIns();
  if (!ins.empty()) {
    backend.RecordEvent(forked_, Stream::kCompute);
    backend.WaitEvent(forked_, Stream::kHostToDevice);
    Swap(std::move(ins), &in_list_, &in_, memory_, host_memory_, Stream::kHostToDevice);
  }
  // Decodes overlap the copy, but those of what it brings.
  for (const Segment& segment : step.decode) {
    if (!manager_->Arrived(segment.request)) {
      backend.WaitEvent(in_.done, Stream::kCompute);
      break;
    }
  }
}

void PagedStrategy::EnqueueForks() {
  std::vector<PagePair> forks = manager_->TakeForks();
  if (forks.empty()) return;
  forked_pages_ += static_cast<int64_t>(forks.size());
  CopyPages(std::move(forks), &fork_list_, memory_, memory_, Stream::kCompute);
}

void PagedStrategy::Book(Transfer* transfer) {
  transfer->under_way = false;
  transfer->ns += context_.backend->ElapsedNs(transfer->begun, transfer->done);
}

void PagedStrategy::StepDone() {
  if (out_.under_way) Book(&out_);
  if (!in_.under_way || !context_.backend->Reached(in_.done)) return;
  Book(&in_);
  manager_->SwapInsLanded();
}

// ------------------------------------------------------------------------------------ figures

void PagedStrategy::BeginMeasurement() {
  manager_->BeginMeasurement();
  forked_pages_ = references_ = used_pages_ = 0;
  out_.pages = in_.pages = 0;
  out_.ns = in_.ns = 0;
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
  const auto swap = [&](const char* bytes, const char* rate, const Transfer& transfer) {
    const double moved =
        static_cast<double>(transfer.pages) * static_cast<double>(layout_.page_bytes());
    add(bytes, moved);
    if (transfer.ns > 0) add(rate, moved / transfer.ns);
  };
  if (layout_.host_pages > 0) {
    swap("swapped_out_bytes", "swap_out_gb_per_s", out_);
    swap("swapped_in_bytes", "swap_in_gb_per_s", in_);
  }
  return figures;
}

// ---------------------------------------------------------------------------------- attention

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
