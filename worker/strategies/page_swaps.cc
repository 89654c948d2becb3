#include "worker/strategies/page_swaps.h"

#include <algorithm>

#include "base/check.h"

namespace kvsweep {

void PageSwaps::MoveOut(std::span<const PageIndex> device, Stay* stay) {
  KVSWEEP_CHECK(stay->pages.empty());
  KVSWEEP_CHECK(pool_.Take(static_cast<int32_t>(device.size()), &stay->pages));
  for (size_t i = 0; i < device.size(); ++i) {
    outs_.push_back({.source = device[i], .target = stay->pages[i]});
  }
}

void PageSwaps::MoveIn(std::span<const PageIndex> device, Stay* stay) {
  KVSWEEP_CHECK(CanMoveIn() && !Arriving(*stay) && device.size() >= stay->pages.size());
  for (size_t i = 0; i < stay->pages.size(); ++i) {
    ins_.push_back({.source = stay->pages[i], .target = device[i]});
  }
  stay->batch = begun_;
}

void PageSwaps::GiveUpArrival(Stay* stay) {
  KVSWEEP_CHECK(Arriving(*stay));
  Forget(*stay);
  given_up_ = true;
  stay->batch = -1;
}

void PageSwaps::End(Stay* stay) {
  given_up_ = given_up_ || Arriving(*stay);
  Forget(*stay);
  pool_.GiveBack(static_cast<int32_t>(stay->pages.size()), &stay->pages);
  stay->batch = -1;
}

// What was to move in this step need not move any more.
void PageSwaps::Forget(const Stay& stay) {
  const auto on_host = [&](PageIndex page) {
    return std::ranges::find(stay.pages, page) != stay.pages.end();
  };
  std::erase_if(outs_, [&](const PagePair& pair) { return on_host(pair.target); });
  std::erase_if(ins_, [&](const PagePair& pair) { return on_host(pair.source); });
}

std::vector<PagePair> PageSwaps::TakeIns() {
  if (!ins_.empty()) ++begun_;
  return std::exchange(ins_, {});
}

void PageSwaps::Landed() {
  KVSWEEP_CHECK_LT(landed_, begun_);
  ++landed_;
}

}  // namespace kvsweep
