#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <unordered_set>

#include "base/check.h"
#include "base/planted_bug.h"
#include "worker/strategies/paged.h"

namespace kvsweep {

PagedManager::PagedManager(const PagedLayout& layout)
    : layout_(layout), pool_(layout.pages), swaps_(layout.host_pages) {}

TierBytes PagedManager::PeakBytes(const RequestShape& shape) const {
  // The last token that is produced is never fed back, so it is not stored.
  const int32_t pages = PagesOf(shape.limit() - 1) + layout_.watermark_pages;
  return {static_cast<uint64_t>(pages) * layout_.page_bytes(), 0};
}

PreemptionMode PagedManager::preemption_mode() const {
  return layout_.parameters.preemption() == Paged::PREEMPTION_SWAP ? PreemptionMode::kOffload
                                                                   : PreemptionMode::kRecompute;
}

VictimRule PagedManager::victim_rule() const {
  switch (layout_.parameters.victim()) {
    case Paged::VICTIM_LEAST_COMPUTED:
      return VictimRule::kLeastComputed;
    case Paged::VICTIM_MOST_BLOCKS:
      return VictimRule::kMostBlocks;
    default:
      return VictimRule::kLastIn;
  }
}

// --------------------------------------------------------------------------------------- life

bool PagedManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  const bool found = lookup_.request == request && std::exchange(lookup_.fresh, false);
  const std::span<const PageIndex> cached = found ? lookup_.pages : std::span<PageIndex>();
  const auto hits = static_cast<int32_t>(cached.size());
  // Pages that are found free leave the queue as well.
  const auto revived = static_cast<int32_t>(
      std::ranges::count_if(cached, [&](PageIndex page) { return pool_.references(page) == 0; }));
  const int32_t more = PagesOf(tokens) - hits;
  const int32_t wanted = layout_.parameters.admit_whole_prompt()
                             ? std::max(more, PagesOf(shape.prompt_tokens) - hits)
                             : more;
  if (pool_.free_pages() - revived - wanted < layout_.watermark_pages) return false;
  Held held{.tokens = tokens};
  for (const PageIndex page : cached) {
    pool_.AddReference(page);
    held.pages.push_back(page);
  }
  KVSWEEP_CHECK(pool_.Take(more, &held.pages));
  if (found) {
    held.contents.assign(lookup_.contents.begin(), lookup_.contents.begin() + hits);
    queried_ += shape.prompt_tokens;
    hit_ += int64_t{hits} * layout_.block_size;
  }
  RememberFullPages(request, held_.emplace(request, std::move(held)).first->second);
  return true;
}

bool PagedManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  const int32_t more = PagesOf(tokens) - static_cast<int32_t>(held.pages.size());
  // The next token goes into a page that others still read: it gets a copy of its own.
  const auto last = static_cast<size_t>(held.tokens / layout_.block_size);
  const bool copies = tokens > held.tokens && held.tokens % layout_.block_size != 0 &&
                      pool_.references(held.pages[last]) > 1 &&
                      !BugPlanted("fork_written_in_place");
  if (pool_.free_pages() < std::max(more, 0) + copies) return false;
  if (copies) {
    std::vector<PageIndex> own;
    KVSWEEP_CHECK(pool_.Take(1, &own));
    forks_.push_back({.source = held.pages[last], .target = own[0]});
    std::vector<PageIndex> shared = {std::exchange(held.pages[last], own[0])};
    pool_.GiveBack(1, &shared);
  }
  KVSWEEP_CHECK(pool_.Take(std::max(more, 0), &held.pages));
  held.tokens = tokens;
  RememberFullPages(request, held);
  return true;
}

void PagedManager::EndPrompt(RequestId request) { held_.at(request).prompt_ended = true; }

void PagedManager::GiveBackDevicePages(Held& held) {
  pool_.GiveBack(static_cast<int32_t>(held.pages.size()), &held.pages);
}

void PagedManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  Held& held = found->second;
  GiveBackDevicePages(held);
  swaps_.End(&held.stay);
  held_.erase(found);
}

void PagedManager::Fork(RequestId parent, RequestId child) {
  const Held& held = held_.at(parent);
  KVSWEEP_CHECK(held.prompt_ended && held.stay.pages.empty()) << "request " << parent;
  for (const PageIndex page : held.pages) pool_.AddReference(page);
  KVSWEEP_CHECK(held_.emplace(child, held).second) << "request " << child;
}

void PagedManager::BeginMeasurement() {
  KVSWEEP_CHECK(held_.empty());
  pool_.ForgetContent();
  lookup_ = {};
  queried_ = hit_ = 0;
}

// --------------------------------------------------------------------------------------- swap

bool PagedManager::CanOffload(RequestId request) const {
  const Held& held = held_.at(request);
  return swaps_.Arriving(held.stay) || PagesOf(held.tokens) <= swaps_.free_pages();
}

void PagedManager::Preempt(RequestId request) {
  Held& held = held_.at(request);
  if (preemption_mode() != PreemptionMode::kOffload || !held.prompt_ended) return Release(request);
  KVSWEEP_CHECK(CanOffload(request)) << "request " << request;
  if (swaps_.Arriving(held.stay)) {
    swaps_.GiveUpArrival(&held.stay);
  } else {
    held.stored = held.tokens;
    const auto pages = static_cast<size_t>(PagesOf(held.stored));
    swaps_.MoveOut(std::span(held.pages).first(pages), &held.stay);
  }
  held.tokens = held.stored;
  held.offloaded = true;
  GiveBackDevicePages(held);
}

bool PagedManager::Resume(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(held.offloaded && tokens >= held.tokens) << "request " << request;
  const int32_t pages = PagesOf(tokens);
  if (!swaps_.CanMoveIn() || pool_.free_pages() - pages < layout_.watermark_pages) return false;
  KVSWEEP_CHECK(pool_.Take(pages, &held.pages));
  swaps_.MoveIn(held.pages, &held.stay);
  held.tokens = tokens;
  held.offloaded = false;
  return true;
}

void PagedManager::SwapInsLanded() {
  swaps_.Landed();
  for (auto& [request, held] : held_) {
    if (!held.offloaded && !swaps_.Arriving(held.stay)) swaps_.End(&held.stay);
  }
}

// --------------------------------------------------------------------------------------- content

bool PagedManager::caches() const {
  return tokens_ && layout_.parameters.prefix_caching() != Paged::PREFIX_CACHING_OFF;
}

// Names the content of a full page: its tokens and, through `before`, all that precede them. The
// first page of a request that shares with nobody is salted with the request's id.
Digest PagedManager::ContentOf(RequestId request, std::span<const int32_t> tokens, int32_t page,
                               const Digest& before) const {
  const bool own = layout_.parameters.prefix_caching() == Paged::PREFIX_CACHING_OWN;
  const int64_t salt = page == 0 && own ? int64_t{request} + 1 : 0;
  const auto block = tokens.subspan(static_cast<size_t>(page) * layout_.block_size,
                                    static_cast<size_t>(layout_.block_size));
  std::string bytes(BugPlanted("hash_without_prefix") ? absl::string_view() : before.bytes());
  bytes.append(reinterpret_cast<const char*>(&salt), sizeof(salt));
  bytes.append(reinterpret_cast<const char*>(block.data()), block.size_bytes());
  return Sha256(bytes);
}

int32_t PagedManager::FindCached(RequestId request, const RequestShape& shape) {
  lookup_.fresh = false;
  if (!caches()) return 0;
  const std::span<const int32_t> tokens = tokens_(request);
  KVSWEEP_CHECK_LE(shape.prompt_tokens, static_cast<int32_t>(tokens.size()));
  if (lookup_.request != request || lookup_.prompt_tokens != shape.prompt_tokens) {
    lookup_ = {.request = request, .prompt_tokens = shape.prompt_tokens};
  }
  lookup_.pages.clear();
  // The last token must be computed, for its logits.
  const int32_t full = (shape.prompt_tokens - 1) / layout_.block_size;
  for (int32_t page = 0; page < full; ++page) {
    if (static_cast<size_t>(page) == lookup_.contents.size()) {
      const Digest before = page == 0 ? Digest() : lookup_.contents.back();
      lookup_.contents.push_back(ContentOf(request, tokens, page, before));
    }
    const std::optional<PageIndex> found = pool_.Find(lookup_.contents[static_cast<size_t>(page)]);
    if (!found) break;
    lookup_.pages.push_back(*found);
  }
  lookup_.fresh = true;
  return static_cast<int32_t>(lookup_.pages.size()) * layout_.block_size;
}

// Full pages can be found from the step on that fills them: whoever finds one computes a prompt in
// that step or a later one, and a step with a prompt stores all its tokens before it attends.
void PagedManager::RememberFullPages(RequestId request, Held& held) {
  if (!caches()) return;
  const std::span<const int32_t> tokens = tokens_(request);
  const int32_t known = std::min(held.tokens, static_cast<int32_t>(tokens.size()));
  for (auto page = static_cast<int32_t>(held.contents.size()); page < known / layout_.block_size;
       ++page) {
    const Digest before = page == 0 ? Digest() : held.contents.back();
    held.contents.push_back(ContentOf(request, tokens, page, before));
    pool_.Remember(held.pages[static_cast<size_t>(page)], held.contents.back());
  }
}

// --------------------------------------------------------------------------------------- accounts

TierBytes PagedManager::ReservedBytes() const {
  return {layout_.fixed_bytes + static_cast<uint64_t>(pool_.used_pages()) * layout_.page_bytes(),
          static_cast<uint64_t>(swaps_.used_pages()) * layout_.page_bytes()};
}

TierBytes PagedManager::LiveBytes() const {
  uint64_t tokens = 0;
  uint64_t host_tokens = 0;
  const bool shares = pool_.total_references() > pool_.used_pages();
  std::vector<int32_t> filled(shares ? static_cast<size_t>(pool_.pages()) : 0);
  for (const auto& [request, held] : held_) {
    if (!held.stay.pages.empty()) host_tokens += static_cast<uint64_t>(held.stored);
    if (held.offloaded) continue;
    if (!shares) {
      tokens += static_cast<uint64_t>(held.tokens);
      continue;
    }
    int32_t left = held.tokens;
    for (const PageIndex page : held.pages) {
      int32_t& most = filled[static_cast<size_t>(page)];
      most = std::max(most, std::min(left, layout_.block_size));
      left -= layout_.block_size;
    }
  }
  for (const int32_t page : filled) tokens += static_cast<uint64_t>(page);
  return {layout_.fixed_bytes + tokens * layout_.token_bytes, host_tokens * layout_.token_bytes};
}

TierBytes PagedManager::RequestBytes(RequestId request) const {
  const Held& held = held_.at(request);
  return {held.pages.size() * layout_.page_bytes(), held.stay.pages.size() * layout_.page_bytes()};
}

void PagedManager::CheckInvariants() const {
  pool_.CheckInvariants();
  swaps_.CheckInvariants();
  std::vector<int32_t> references(static_cast<size_t>(pool_.pages()));
  size_t host_pages = 0;
  for (const auto& [request, held] : held_) {
    for (const PageIndex page : held.pages) ++references[static_cast<size_t>(page)];
    host_pages += held.stay.pages.size();
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.pages.size()),
                     held.offloaded ? 0 : PagesOf(held.tokens));
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.stay.pages.size()),
                     held.offloaded || swaps_.Arriving(held.stay) ? PagesOf(held.stored) : 0);
  }
  // The sum of reference counts over live tables is the sum of their references, page by page.
  for (PageIndex page = 0; page < pool_.pages(); ++page) {
    KVSWEEP_CHECK_EQ(references[static_cast<size_t>(page)], pool_.references(page))
        << "page " << page;
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(host_pages), swaps_.used_pages());
}

std::vector<size_t> IndependentGroups(std::span<const PagePair> pairs) {
  std::vector<size_t> ends;
  std::unordered_set<PageIndex> touched;
  for (size_t i = 0; i < pairs.size(); ++i) {
    // A page may be copied to several others at once, but not be written beside that.
    const bool conflicts = touched.contains(-1 - pairs[i].source) ||
                           touched.contains(-1 - pairs[i].target) ||
                           touched.contains(pairs[i].target);
    if (conflicts) {
      ends.push_back(i);
      touched.clear();
    }
    touched.insert(pairs[i].source);
    touched.insert(-1 - pairs[i].target);  // targets lie below 0
  }
  if (!pairs.empty()) ends.push_back(pairs.size());
  return ends;
}

std::unique_ptr<PageManager> MakePagedManager(const PagedLayout& layout) {
  if (layout.parameters.reservation() == Paged::RESERVATION_PAGED) {
    return std::make_unique<PagedManager>(layout);
  }
  return std::make_unique<ContiguousManager>(layout);
}

// ------------------------------------------------------------------------------------------------
// contiguous

ContiguousManager::ContiguousManager(const PagedLayout& layout)
    : layout_(layout), pool_(layout.pages) {}

int32_t ContiguousManager::ReservedTokens(const RequestShape& shape) const {
  // Where nobody knows the true length, it is the limit. The last token that is produced is never
  // stored.
  const int32_t final_tokens = shape.oracle_tokens > 0 ? shape.oracle_tokens : shape.limit();
  switch (layout_.parameters.reservation()) {
    case Paged::RESERVATION_MAX:
      return layout_.max_context;
    case Paged::RESERVATION_POW2: {
      const int32_t output = std::max(final_tokens - shape.prompt_tokens, 1);
      const auto rounded = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(output)));
      return std::min(shape.prompt_tokens + rounded, std::max(shape.limit() - 1, 1));
    }
    default:
      return std::max(final_tokens - 1, shape.prompt_tokens);
  }
}

TierBytes ContiguousManager::PeakBytes(const RequestShape& shape) const {
  const int32_t pages = PagesFor(ReservedTokens(shape), layout_.block_size);
  return {static_cast<uint64_t>(pages) * layout_.page_bytes(), 0};
}

bool ContiguousManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  const int32_t count = PagesFor(ReservedTokens(shape), layout_.block_size);
  const std::optional<PageIndex> first = pool_.Take(count);
  if (!first) return false;
  Held held{.tokens = tokens};
  for (int32_t i = 0; i < count; ++i) held.pages.push_back(*first + i);
  held_.emplace(request, std::move(held));
  return true;
}

bool ContiguousManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK_LE(PagesFor(tokens, layout_.block_size), static_cast<int32_t>(held.pages.size()))
      << "request " << request << " outgrows its reservation";
  held.tokens = tokens;
  return true;
}

void ContiguousManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  const std::vector<PageIndex>& pages = found->second.pages;
  pool_.GiveBack(pages.front(), static_cast<int32_t>(pages.size()));
  held_.erase(found);
}

bool ContiguousManager::Resume(RequestId /*request*/, int32_t /*tokens*/) {
  KVSWEEP_CHECK(false) << "a reserved request is never preempted";
  return false;
}

TierBytes ContiguousManager::ReservedBytes() const {
  return {layout_.fixed_bytes + static_cast<uint64_t>(pool_.used_pages()) * layout_.page_bytes(),
          0};
}

TierBytes ContiguousManager::LiveBytes() const {
  uint64_t tokens = 0;
  for (const auto& [request, held] : held_) tokens += static_cast<uint64_t>(held.tokens);
  return {layout_.fixed_bytes + tokens * layout_.token_bytes, 0};
}

TierBytes ContiguousManager::RequestBytes(RequestId request) const {
  return {held_.at(request).pages.size() * layout_.page_bytes(), 0};
}

void ContiguousManager::CheckInvariants() const {
  pool_.CheckInvariants();
  std::vector<bool> taken(static_cast<size_t>(pool_.pages()));
  int32_t pages = 0;
  for (const auto& [request, held] : held_) {
    for (size_t i = 0; i < held.pages.size(); ++i) {
      KVSWEEP_CHECK_EQ(held.pages[i], held.pages[0] + static_cast<int32_t>(i));
      KVSWEEP_CHECK(!taken[static_cast<size_t>(held.pages[i])]) << "page " << held.pages[i];
      taken[static_cast<size_t>(held.pages[i])] = true;
      ++pages;
    }
  }
  KVSWEEP_CHECK_EQ(pages, pool_.used_pages());
}

}  // namespace kvsweep
