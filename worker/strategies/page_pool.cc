#include "worker/strategies/page_pool.h"

#include "base/check.h"

namespace kvsweep {

PagePool::PagePool(int32_t pages) : held_(static_cast<size_t>(pages), false) {
  free_.reserve(static_cast<size_t>(pages));
  for (PageIndex page = pages - 1; page >= 0; --page) free_.push_back(page);
}

bool PagePool::Take(int32_t count, std::vector<PageIndex>* taken) {
  KVSWEEP_CHECK_GE(count, 0);
  if (count > free_pages()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const PageIndex page = free_.back();
    free_.pop_back();
    held_[static_cast<size_t>(page)] = true;
    taken->push_back(page);
  }
  return true;
}

void PagePool::GiveBack(int32_t count, std::vector<PageIndex>* held) {
  KVSWEEP_CHECK_LE(count, static_cast<int32_t>(held->size()));
  for (int32_t i = 0; i < count; ++i) {
    const PageIndex page = held->back();
    held->pop_back();
    KVSWEEP_CHECK(held_[static_cast<size_t>(page)]) << "page " << page << " given back twice";
    held_[static_cast<size_t>(page)] = false;
    free_.push_back(page);
  }
}

void PagePool::CheckInvariants() const {
  std::vector<bool> seen(held_.size(), false);
  for (PageIndex page : free_) {
    KVSWEEP_CHECK(!held_[static_cast<size_t>(page)]) << "page " << page << " is free and held";
    KVSWEEP_CHECK(!seen[static_cast<size_t>(page)]) << "page " << page << " is free twice";
    seen[static_cast<size_t>(page)] = true;
  }
}

}  // namespace kvsweep
