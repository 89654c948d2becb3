#include "worker/strategies/h2o_manager.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/page_transfers.h"
#include "worker/strategies/sequence_tables.h"
#include "worker/strategies/tile_ring.h"
#include "worker/strategies/token_budget.h"

namespace kvsweep {

H2oBudget H2oBudgetOf(const H2o& parameters, const RequestShape& shape) {
  auto heavy = static_cast<int32_t>(parameters.heavy_size());
  int32_t total = heavy + static_cast<int32_t>(parameters.recent_size());
  if (!parameters.has_heavy_size() && !parameters.has_recent_size()) {
    const double ratio = parameters.heavy_ratio() + parameters.recent_ratio();
    total = BudgetTokens(ratio,
                         BudgetBaseTokens(parameters.budget_base(),
                                          static_cast<int32_t>(parameters.budget_tokens()), shape),
                         2);
    heavy =
        static_cast<int32_t>(std::lround(ratio > 0 ? parameters.heavy_ratio() / ratio * total : 0));
  }
  heavy = std::max(heavy, std::min(static_cast<int32_t>(parameters.sink_tokens()), total));
  int32_t recent = total - heavy;
  if (parameters.evict_rule() == H2o::EVICT_RULE_SLOT_PROMOTE) recent = std::max(recent - 1, 0);
  return {.heavy = heavy, .recent = recent};
}

// ------------------------------------------------------------------------------------------------
// layout

namespace {

// Tiles of the host tier hold at least so many tokens of each decode row.
constexpr int32_t kTileTokensOfARow = 32;
constexpr int32_t kFullBlockTokens = 16;

absl::Status CheckModel(const H2o& parameters, const ModelShape& shape) {
  if (parameters.tier() == H2o::TIER_HOST && parameters.preemption() == H2o::PREEMPTION_SWAP) {
    return absl::InvalidArgumentError(
        "h2o.preemption: swap has nothing to bring to the host with tier: host; use none or "
        "recompute");
  }
  if (parameters.tier() == H2o::TIER_HOST && parameters.full_layers() > 0) {
    return absl::InvalidArgumentError(
        "h2o.full_layers: with tier: host every layer's entries lie on the host; use 0");
  }
  if (static_cast<int32_t>(parameters.full_layers()) >= shape.layers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "h2o.full_layers: ", parameters.full_layers(), " leaves no layer of the model's ",
        shape.layers, " to evict from; use at most ", shape.layers - 1));
  }
  if (parameters.positions() == H2o::POSITIONS_ROLLING && !shape.rotary) {
    return absl::InvalidArgumentError(
        "h2o.positions: rolling needs a model with rotary positions; this one has learned them: "
        "use original");
  }
  return absl::OkStatus();
}

H2oScratch ScratchOf(const H2oLayout& layout, const StrategySizes& sizes) {
  const ModelShape& shape = sizes.shape;
  H2oScratch scratch;
  const auto place = [&](uint64_t* offset, int64_t elements, int64_t element_bytes) {
    *offset = scratch.bytes;
    scratch.bytes += (static_cast<uint64_t>(elements * element_bytes) + 255) / 256 * 256;
  };
  const int64_t head_rows = int64_t{sizes.max_rows} * shape.query_heads;
  place(&scratch.probability,
        int64_t{sizes.max_decode_rows} * shape.query_heads * layout.probability_stride,
        sizeof(float));
  place(&scratch.log_sum_exp, head_rows, sizeof(float));
  if (layout.heads != shape.kv_heads) {
    place(&scratch.repeated, 2 * head_rows * shape.head_dim, DTypeBytes(sizes.activation_dtype));
  }
  if (layout.host_slot_bytes > 0) {
    place(&scratch.ring, int64_t{4} * layout.ring_tokens * layout.heads * shape.head_dim,
          DTypeBytes(sizes.kv_dtype));
    place(&scratch.partial_output, head_rows * shape.head_dim, sizeof(float));
    place(&scratch.partial_maximum, head_rows, sizeof(float));
    place(&scratch.partial_sum, head_rows, sizeof(float));
  }
  place(&scratch.swap_lists, static_cast<int64_t>(PageTransfers::ListBytes(layout.swapped_pages)),
        1);
  return scratch;
}

// Of a key and its value.
uint64_t RowBytes(const StrategySizes& sizes) {
  return static_cast<uint64_t>(2 * sizes.shape.head_dim * DTypeBytes(sizes.kv_dtype));
}

// Bytes of a slot on each tier, pages that hold at least a block of the full layers.
void SizePages(const StrategySizes& sizes, H2oLayout* layout) {
  const ModelShape& shape = sizes.shape;
  const auto full_layers = static_cast<int32_t>(layout->parameters.full_layers());
  const uint64_t numbers =
      layout->parameters.positions() == H2o::POSITIONS_ROLLING ? 3 : 2;  // score, position, rank
  const uint64_t row_bytes = RowBytes(sizes);
  const uint64_t entries =
      static_cast<uint64_t>(layout->heads) * static_cast<uint64_t>(shape.layers - full_layers);
  layout->slot_bytes = entries * numbers * sizeof(float);
  (layout->parameters.tier() == H2o::TIER_HOST ? layout->host_slot_bytes : layout->slot_bytes) +=
      entries * row_bytes;
  if (full_layers == 0) return;
  layout->full_token_bytes = row_bytes * static_cast<uint64_t>(shape.kv_heads * full_layers);
  const uint64_t block_bytes = layout->full_token_bytes * kFullBlockTokens;
  while (layout->page_bytes() < block_bytes) layout->page_tokens *= 2;
  layout->full_page_tokens =
      static_cast<int32_t>(layout->page_bytes() / block_bytes) * kFullBlockTokens;
}

uint64_t TableBytes(const H2oLayout& layout, const StrategySizes& sizes) {
  uint64_t bytes = SequenceTables::Bytes(sizes, layout.table_pages) +
                   3 * StepState::FieldBytes(sizes.max_decode_rows);
  if (layout.full_page_tokens > 0) {
    bytes += SequenceTables::Bytes(sizes, layout.full_table_pages);
  }
  if (layout.parameters.positions() == H2o::POSITIONS_ROLLING) {
    bytes += StepState::FieldBytes(sizes.max_rows);
  }
  return bytes;
}

}  // namespace

absl::StatusOr<H2oLayout> H2oLayoutOf(const H2o& parameters, const StrategySizes& sizes) {
  const ModelShape& shape = sizes.shape;
  RETURN_IF_ERROR(CheckModel(parameters, shape));
  H2oLayout layout;
  layout.parameters = parameters;
  layout.heads = parameters.group_aggregation() == H2o::GROUP_AGGREGATION_QUERY_HEAD
                     ? shape.query_heads
                     : shape.kv_heads;
  SizePages(sizes, &layout);

  // A ratio of a request's tokens is at most that of the longest request; no more than max_context
  // is stored, whatever a fixed base or size says.
  const RequestShape longest{
      .prompt_tokens = sizes.max_context - 1, .max_tokens = 1, .oracle_tokens = sizes.max_context};
  const int32_t budget = std::min(H2oBudgetOf(parameters, longest).total(), sizes.max_context);
  int32_t slots = sizes.max_context;
  if (parameters.prefill_evict() == H2o::PREFILL_EVICT_CHUNK) {
    layout.chunk_tokens = sizes.max_rows;
    slots = std::min(slots, budget + layout.chunk_tokens);
  }
  layout.table_pages = PagesFor(slots, layout.page_tokens);
  layout.probability_stride = budget + 1;
  if (layout.full_page_tokens > 0) {
    layout.full_table_pages = PagesFor(sizes.max_context, layout.full_page_tokens);
  }
  if (parameters.tier() == H2o::TIER_HOST) {
    layout.ring_tokens =
        RingTokens(std::max(256, sizes.max_decode_rows * std::min(kTileTokensOfARow, budget)),
                   int64_t{sizes.max_decode_rows} * budget,
                   static_cast<uint64_t>(layout.heads) * RowBytes(sizes), sizes.device_bytes);
  }
  const int64_t useful =
      int64_t{sizes.max_sequences} * (layout.table_pages + layout.full_table_pages);
  if (parameters.preemption() == H2o::PREEMPTION_SWAP) {
    layout.swapped_pages = static_cast<int32_t>(
        std::min(static_cast<uint64_t>(useful), sizes.device_bytes / layout.page_bytes()));
  }
  layout.scratch = ScratchOf(layout, sizes);
  layout.fixed_bytes = TableBytes(layout, sizes) + layout.scratch.bytes;

  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(sizes.device_bytes, layout.fixed_bytes,
                                               layout.page_bytes(), "h2o"));
  layout.pages = static_cast<int32_t>(std::min<int64_t>(layout.pages, useful));
  if (parameters.tier() == H2o::TIER_HOST) {
    ASSIGN_OR_RETURN(
        const int32_t pages,
        PagesInBudget(sizes.host_bytes, 0, layout.host_page_bytes(), "h2o", "kv.host_bytes"));
    layout.pages = std::min(layout.pages, pages);
  }
  if (parameters.preemption() == H2o::PREEMPTION_SWAP) {
    // More than every waiting request could fill is never used; there may be more of them than run.
    layout.swap_pages = static_cast<int32_t>(
        std::min<uint64_t>(sizes.host_bytes / layout.page_bytes(),
                           std::min<uint64_t>(4 * static_cast<uint64_t>(useful),
                                              std::numeric_limits<int32_t>::max() / 2)));
  }
  return layout;
}

// ------------------------------------------------------------------------------------------------
// manager

H2oManager::H2oManager(const H2oLayout& layout)
    : layout_(layout), pool_(layout.pages), swaps_(layout.swap_pages) {}

int32_t H2oManager::FullPagesFor(int32_t tokens) const {
  return layout_.full_page_tokens == 0 ? 0 : PagesFor(tokens, layout_.full_page_tokens);
}

int32_t H2oManager::HistorySlots(const H2oBudget& budget, int32_t tokens) const {
  return chunked() ? std::min(tokens, budget.total()) : tokens;
}

int32_t H2oManager::PromptSlots(const H2oBudget& budget, int32_t prompt) const {
  return chunked() ? std::min(prompt, budget.total() + layout_.chunk_tokens) : prompt;
}

int32_t H2oManager::SlabSlots(const H2oBudget& budget, const RequestShape& shape) const {
  // The last token that is produced is never fed back, so it is not stored.
  return std::max(1, std::min(budget.total(), shape.limit() - 1));
}

TierBytes H2oManager::PeakBytes(const RequestShape& shape) const {
  const H2oBudget budget = H2oBudgetOf(layout_.parameters, shape);
  // A victim that starts anew computes its output so far as part of its prompt.
  const int32_t prompt =
      reserves() ? shape.prompt_tokens : std::max(shape.prompt_tokens, shape.limit() - 1);
  const int32_t slots = std::max(PromptSlots(budget, prompt), SlabSlots(budget, shape));
  const auto slab = static_cast<uint64_t>(SlotPages(slots));
  const auto full =
      static_cast<uint64_t>(FullPagesFor(std::max(shape.prompt_tokens, shape.limit() - 1)));
  return {(slab + full) * layout_.page_bytes(), slab * layout_.host_page_bytes()};
}

bool H2oManager::Extend(Held* held, int32_t slab_pages, int32_t full_pages) {
  const int32_t slab = std::max(0, slab_pages - static_cast<int32_t>(held->pages.size()));
  const int32_t full = std::max(0, full_pages - static_cast<int32_t>(held->full.size()));
  if (pool_.free_pages() < slab + full) return false;
  return pool_.Take(slab, &held->pages) && pool_.Take(full, &held->full);
}

bool H2oManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  KVSWEEP_CHECK_LE(tokens, shape.prompt_tokens);
  Held held{.shape = shape,
            .budget = H2oBudgetOf(layout_.parameters, shape),
            .tokens = tokens,
            .slots = tokens};
  int32_t slots = tokens;
  int32_t full_tokens = tokens;
  if (reserves()) {
    slots = std::max(PromptSlots(held.budget, shape.prompt_tokens), SlabSlots(held.budget, shape));
    full_tokens = std::max(shape.prompt_tokens, shape.limit() - 1);
  }
  if (!Extend(&held, SlotPages(slots), FullPagesFor(full_tokens))) return false;
  held_.emplace(request, std::move(held));
  return true;
}

bool H2oManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  KVSWEEP_CHECK(held.prompt_ended || tokens <= held.shape.prompt_tokens);
  const int32_t slots = held.prompt_ended
                            ? std::min(tokens, held.budget.total())
                            : HistorySlots(held.budget, held.tokens) + tokens - held.tokens;
  if (!Extend(&held, SlotPages(slots), FullPagesFor(tokens))) return false;
  held.tokens = tokens;
  held.slots = slots;
  return true;
}

void H2oManager::EndPrompt(RequestId request) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.prompt_ended);
  held.prompt_ended = true;
  held.slots = std::min(held.tokens, held.budget.total());
  const int32_t keeps = SlotPages(reserves() ? SlabSlots(held.budget, held.shape) : held.slots);
  pool_.GiveBack(std::max(0, static_cast<int32_t>(held.pages.size()) - keeps), &held.pages);
}

void H2oManager::GiveBackAll(Held* held) {
  for (std::vector<PageIndex>* pages : {&held->full, &held->pages}) {
    pool_.GiveBack(static_cast<int32_t>(pages->size()), pages);
  }
}

void H2oManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  Held& held = found->second;
  GiveBackAll(&held);
  swaps_.End(&held.stay);
  held_.erase(found);
}

PreemptionMode H2oManager::preemption_mode() const {
  switch (layout_.parameters.preemption()) {
    case H2o::PREEMPTION_SWAP:
      return PreemptionMode::kOffload;
    case H2o::PREEMPTION_RECOMPUTE:
      return PreemptionMode::kRecompute;
    default:
      return PreemptionMode::kNone;
  }
}

bool H2oManager::CanOffload(RequestId request) const {
  const Held& held = held_.at(request);
  return swaps_.Arriving(held.stay) ||
         static_cast<size_t>(swaps_.free_pages()) >= held.pages.size() + held.full.size();
}

void H2oManager::Preempt(RequestId request) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded) << "request " << request;
  if (!held.prompt_ended || preemption_mode() != PreemptionMode::kOffload) return Release(request);
  if (swaps_.Arriving(held.stay)) {
    swaps_.GiveUpArrival(&held.stay);
    held.tokens = held.stored;
    held.slots = std::min(held.tokens, held.budget.total());
  } else {
    std::vector<PageIndex> pages = held.pages;
    pages.insert(pages.end(), held.full.begin(), held.full.end());
    swaps_.MoveOut(pages, &held.stay);
    held.stored = held.tokens;
  }
  GiveBackAll(&held);
  held.offloaded = true;
}

bool H2oManager::Resume(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(held.offloaded) << "request " << request;
  const int32_t slots = std::min(tokens, held.budget.total());
  if (!swaps_.CanMoveIn() || !Extend(&held, SlotPages(slots), FullPagesFor(tokens))) return false;
  // What stayed is the pages of the tokens so far; the new token may have brought another.
  const auto slab = static_cast<size_t>(SlotPages(held.slots));
  std::vector<PageIndex> pages(held.pages.begin(), held.pages.begin() + slab);
  pages.insert(pages.end(), held.full.begin(), held.full.end());
  swaps_.MoveIn(pages, &held.stay);
  held.tokens = tokens;
  held.slots = slots;
  held.offloaded = false;
  return true;
}

void H2oManager::SwapInsLanded() {
  swaps_.Landed();
  for (auto& [request, held] : held_) {
    if (!held.offloaded && !swaps_.Arriving(held.stay)) swaps_.End(&held.stay);
  }
}

TierBytes H2oManager::ReservedBytes() const {
  const auto used = static_cast<uint64_t>(pool_.used_pages());
  const auto swapped = static_cast<uint64_t>(swaps_.used_pages());
  return {layout_.fixed_bytes + used * layout_.page_bytes(),
          used * layout_.host_page_bytes() + swapped * layout_.page_bytes()};
}

TierBytes H2oManager::LiveBytes() const {
  TierBytes live = FixedBytes();
  for (const auto& [request, held] : held_) {
    const auto bytes = [&](int32_t slots, int32_t tokens) {
      return static_cast<uint64_t>(slots) * layout_.slot_bytes +
             static_cast<uint64_t>(tokens) * layout_.full_token_bytes;
    };
    if (!held.offloaded) live.device += bytes(held.slots, held.tokens);
    if (!held.stay.pages.empty()) {
      live.host += bytes(std::min(held.stored, held.budget.total()), held.stored);
    }
    live.host += static_cast<uint64_t>(held.slots) * layout_.host_slot_bytes;
  }
  return live;
}

TierBytes H2oManager::RequestBytes(RequestId request) const {
  const Held& held = held_.at(request);
  return {(held.pages.size() + held.full.size()) * layout_.page_bytes(),
          held.pages.size() * layout_.host_page_bytes() +
              held.stay.pages.size() * layout_.page_bytes()};
}

void H2oManager::CheckInvariants() const {
  pool_.CheckInvariants();
  swaps_.CheckInvariants();
  size_t pages = 0;
  size_t swapped = 0;
  for (const auto& [request, held] : held_) {
    pages += held.pages.size() + held.full.size();
    swapped += held.stay.pages.size();
    const size_t slab = static_cast<size_t>(SlotPages(held.slots));
    const size_t full = static_cast<size_t>(FullPagesFor(held.tokens));
    if (held.offloaded) {
      KVSWEEP_CHECK(held.pages.empty() && held.full.empty());
      KVSWEEP_CHECK_EQ(held.stay.pages.size(), slab + full);
    } else {
      KVSWEEP_CHECK_EQ(held.stay.pages.empty(), !swaps_.Arriving(held.stay));
      KVSWEEP_CHECK(held.pages.size() >= slab && held.full.size() >= full);
    }
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(pages), pool_.used_pages());
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(swapped), swaps_.used_pages());
}

}  // namespace kvsweep
