#include "worker/strategies/infinigen_manager.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace kvsweep {
namespace {

void GiveBackAll(PagePool* pool, std::vector<PageIndex>* pages) {
  pool->GiveBack(static_cast<int32_t>(pages->size()), pages);
}

}  // namespace

InfinigenManager::InfinigenManager(const InfinigenLayout& layout)
    : layout_(layout), device_(layout.pages), host_(layout.host_pages) {}

// The last output token is never stored.
int32_t InfinigenManager::PeakHostPages(const RequestShape& shape) const {
  return layout_.HostPages(shape.limit() - 1, shape);
}

TierBytes InfinigenManager::FixedBytes() const {
  return {layout_.fixed_device_bytes, layout_.fixed_host_bytes};
}

TierBytes InfinigenManager::PeakBytes(const RequestShape& shape) const {
  const int32_t in_prompt =
      layout_.SlotPages(shape.prompt_tokens, shape) + layout_.HistoryPages(shape);
  const int32_t at_end = layout_.SlotPages(shape.limit() - 1, shape);
  const auto device =
      static_cast<uint64_t>(std::max(in_prompt, at_end) + layout_.FetchPages(shape));
  return {device * layout_.page_bytes,
          static_cast<uint64_t>(PeakHostPages(shape)) * layout_.host_page_bytes()};
}

bool InfinigenManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  const int32_t slots = layout_.SlotPages(tokens, shape);
  const int32_t fetch = layout_.FetchPages(shape);
  const int32_t history = tokens < shape.prompt_tokens ? layout_.HistoryPages(shape) : 0;
  if (device_.free_pages() < slots + fetch + history) return false;
  if (host_.pages() - committed_host_pages_ < PeakHostPages(shape)) return false;
  Held held{.shape = shape, .tokens = tokens};
  KVSWEEP_CHECK(device_.Take(slots, &held.slot));
  KVSWEEP_CHECK(device_.Take(fetch, &held.fetch));
  KVSWEEP_CHECK(device_.Take(history, &held.history));
  KVSWEEP_CHECK(host_.Take(layout_.HostPages(tokens, shape), &held.host));
  committed_host_pages_ += PeakHostPages(shape);
  held_.emplace(request, std::move(held));
  return true;
}

bool InfinigenManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  KVSWEEP_CHECK_LT(tokens, held.shape.limit() + 1);
  const int32_t slots =
      layout_.SlotPages(tokens, held.shape) - static_cast<int32_t>(held.slot.size());
  const int32_t host =
      layout_.HostPages(tokens, held.shape) - static_cast<int32_t>(held.host.size());
  if (!device_.Take(std::max(slots, 0), &held.slot)) return false;
  KVSWEEP_CHECK(host_.Take(std::max(host, 0), &held.host)) << "committed at admission";
  held.tokens = tokens;
  return true;
}

void InfinigenManager::EndPrompt(RequestId request) {
  Held& held = held_.at(request);
  held.prompt_ended = true;
  GiveBackAll(&device_, &held.history);
}

void InfinigenManager::GiveBackDevice(Held* held) {
  GiveBackAll(&device_, &held->slot);
  GiveBackAll(&device_, &held->fetch);
  GiveBackAll(&device_, &held->history);
}

void InfinigenManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  GiveBackDevice(&found->second);
  GiveBackAll(&host_, &found->second.host);
  committed_host_pages_ -= PeakHostPages(found->second.shape);
  held_.erase(found);
}

void InfinigenManager::Preempt(RequestId request) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded) << "request " << request;
  if (!held.prompt_ended) return Release(request);
  if (layout_.remembers()) {
    for (size_t i = 0; i < held.slot.size(); ++i) offloads_.push_back({held.slot[i], held.host[i]});
  }
  GiveBackDevice(&held);
  held.offloaded = true;
}

bool InfinigenManager::Resume(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(held.offloaded) << "request " << request;
  const int32_t slots = layout_.SlotPages(tokens, held.shape);
  const int32_t fetch = layout_.FetchPages(held.shape);
  if (device_.free_pages() < slots + fetch) return false;
  KVSWEEP_CHECK(device_.Take(slots, &held.slot));
  KVSWEEP_CHECK(device_.Take(fetch, &held.fetch));
  const int32_t host =
      layout_.HostPages(tokens, held.shape) - static_cast<int32_t>(held.host.size());
  KVSWEEP_CHECK(host_.Take(std::max(host, 0), &held.host)) << "committed at admission";
  held.tokens = tokens;
  held.offloaded = false;
  return true;
}

TierBytes InfinigenManager::ReservedBytes() const {
  return {
      layout_.fixed_device_bytes + static_cast<uint64_t>(device_.used_pages()) * layout_.page_bytes,
      layout_.fixed_host_bytes +
          static_cast<uint64_t>(host_.used_pages()) * layout_.host_page_bytes()};
}

TierBytes InfinigenManager::LiveBytes() const {
  TierBytes live = FixedBytes();
  for (const auto& [request, held] : held_) {
    const auto slots = static_cast<uint64_t>(layout_.SlotsOf(held.tokens, held.shape));
    live.host += slots * layout_.host_token_bytes();
    if (held.offloaded) continue;
    live.device += slots * layout_.slot_bytes() +
                   (held.fetch.size() + held.history.size()) * layout_.page_bytes;
  }
  return live;
}

TierBytes InfinigenManager::RequestBytes(RequestId request) const {
  const Held& held = held_.at(request);
  return {(held.slot.size() + held.fetch.size() + held.history.size()) * layout_.page_bytes,
          held.host.size() * layout_.host_page_bytes()};
}

void InfinigenManager::CheckInvariants() const {
  device_.CheckInvariants();
  host_.CheckInvariants();
  size_t device_pages = 0;
  size_t host_pages = 0;
  int32_t committed = 0;
  for (const auto& [request, held] : held_) {
    device_pages += held.slot.size() + held.fetch.size() + held.history.size();
    host_pages += held.host.size();
    committed += PeakHostPages(held.shape);
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.slot.size()),
                     held.offloaded ? 0 : layout_.SlotPages(held.tokens, held.shape));
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.host.size()),
                     layout_.HostPages(held.tokens, held.shape));
    KVSWEEP_CHECK(held.history.empty() || !held.prompt_ended);
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(device_pages), device_.used_pages());
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(host_pages), host_.used_pages());
  KVSWEEP_CHECK_EQ(committed, committed_host_pages_);
}

}  // namespace kvsweep
