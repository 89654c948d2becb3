#include "worker/strategies/page_pool.h"

#include <algorithm>
#include <iterator>

#include "base/check.h"
#include "base/planted_bug.h"

namespace kvsweep {

// ------------------------------------------------------------------------------------------------
// pages

PagePool::PagePool(int32_t pages)
    : next_(static_cast<size_t>(pages) + 1),
      previous_(static_cast<size_t>(pages) + 1),
      references_(static_cast<size_t>(pages)),
      content_(static_cast<size_t>(pages)) {
  next_.back() = previous_.back() = pages;
  for (PageIndex page = 0; page < pages; ++page) Append(page);
}

void PagePool::Append(PageIndex page) {
  const PageIndex last = previous_.back();
  next_[static_cast<size_t>(page)] = pages();
  previous_[static_cast<size_t>(page)] = last;
  next_[static_cast<size_t>(last)] = page;
  previous_.back() = page;
  ++free_pages_;
}

void PagePool::Remove(PageIndex page) {
  const PageIndex before = previous_[static_cast<size_t>(page)];
  const PageIndex after = next_[static_cast<size_t>(page)];
  next_[static_cast<size_t>(before)] = after;
  previous_[static_cast<size_t>(after)] = before;
  --free_pages_;
}

void PagePool::Forget(PageIndex page) {
  Digest& content = content_[static_cast<size_t>(page)];
  if (content.empty()) return;
  page_of_.erase(content);
  content = Digest();
}

bool PagePool::Take(int32_t count, std::vector<PageIndex>* taken) {
  KVSWEEP_CHECK_GE(count, 0);
  if (count > free_pages()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const PageIndex page = next_.back();
    if (!BugPlanted("content_outlives_page")) Forget(page);
    AddReference(page);
    taken->push_back(page);
  }
  return true;
}

void PagePool::GiveBack(int32_t count, std::vector<PageIndex>* held) {
  KVSWEEP_CHECK_LE(count, static_cast<int32_t>(held->size()));
  for (int32_t i = 0; i < count; ++i) {
    const PageIndex page = held->back();
    held->pop_back();
    int32_t& references = references_[static_cast<size_t>(page)];
    KVSWEEP_CHECK_GE(references, 1) << "page " << page << " given back twice";
    --total_references_;
    if (--references == 0 || BugPlanted("shared_page_freed")) Append(page);
  }
}

void PagePool::AddReference(PageIndex page) {
  if (references_[static_cast<size_t>(page)]++ == 0) Remove(page);
  ++total_references_;
}

void PagePool::Remember(PageIndex page, const Digest& content) {
  KVSWEEP_CHECK_GE(references(page), 1);
  KVSWEEP_CHECK(content_[static_cast<size_t>(page)].empty()) << "page " << page;
  if (page_of_.emplace(content, page).second) content_[static_cast<size_t>(page)] = content;
}

std::optional<PageIndex> PagePool::Find(const Digest& content) const {
  const auto found = page_of_.find(content);
  if (found == page_of_.end()) return std::nullopt;
  return found->second;
}

void PagePool::ForgetContent() {
  page_of_.clear();
  std::ranges::fill(content_, Digest());
}

void PagePool::CheckInvariants() const {
  int32_t queued = 0;
  for (PageIndex page = next_.back(); page != pages(); page = next_[static_cast<size_t>(page)]) {
    KVSWEEP_CHECK_EQ(references(page), 0) << "page " << page << " is free and held";
    KVSWEEP_CHECK_LE(++queued, free_pages_) << "page " << page << " is free twice";
  }
  KVSWEEP_CHECK_EQ(queued, free_pages_);
  int64_t references = 0;
  int32_t without = 0;
  for (const int32_t count : references_) {
    references += count;
    without += count == 0;
  }
  KVSWEEP_CHECK_EQ(without, free_pages_);
  KVSWEEP_CHECK_EQ(references, total_references_);
  for (const auto& [content, page] : page_of_) {
    KVSWEEP_CHECK(content_[static_cast<size_t>(page)] == content) << "page " << page;
  }
}

// ------------------------------------------------------------------------------------------------
// runs

RunPool::RunPool(int32_t pages) : pages_(pages), free_pages_(pages) {
  if (pages > 0) holes_[0] = pages;
}

int32_t RunPool::longest_free_run() const {
  int32_t longest = 0;
  for (const auto& [first, length] : holes_) longest = std::max(longest, length);
  return longest;
}

std::optional<PageIndex> RunPool::Take(int32_t count) {
  KVSWEEP_CHECK_GE(count, 1);
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    const auto [first, length] = *hole;
    if (length < count) continue;
    holes_.erase(hole);
    if (length > count) holes_[first + count] = length - count;
    free_pages_ -= count;
    return first;
  }
  return std::nullopt;
}

void RunPool::GiveBack(PageIndex first, int32_t count) {
  KVSWEEP_CHECK(count >= 1 && first >= 0 && first + count <= pages_);
  free_pages_ += count;
  auto after = holes_.lower_bound(first);
  KVSWEEP_CHECK(after == holes_.end() || after->first >= first + count)
      << "page " << first << " given back twice";
  if (after != holes_.end() && after->first == first + count) {
    count += after->second;
    after = holes_.erase(after);
  }
  if (after != holes_.begin()) {
    auto& [before, length] = *std::prev(after);
    KVSWEEP_CHECK_LE(before + length, first) << "page " << first << " given back twice";
    if (before + length == first) {
      length += count;
      return;
    }
  }
  holes_[first] = count;
}

void RunPool::CheckInvariants() const {
  int32_t free = 0;
  PageIndex end = -1;
  for (const auto& [first, length] : holes_) {
    KVSWEEP_CHECK(first > end && length >= 1) << "hole at " << first;
    end = first + length;
    free += length;
  }
  KVSWEEP_CHECK(end <= pages_);
  KVSWEEP_CHECK_EQ(free, free_pages_);
}

}  // namespace kvsweep
