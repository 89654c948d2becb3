// Equal pages of a memory region and who has them: the accounting under every KV manager. Pure.
//
// A page is free or has a reference count: the number of block tables that name it. Free pages form
// a queue, the page that became free first at its head (vLLM's free queue): what is taken comes
// from the head. A page may remember what it holds; a free one keeps that until it is taken for
// something else, so that whoever needs the same content finds it again, and the content that was
// given back first is lost first.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/hash/hash.h"
#include "base/digest.h"

namespace kvsweep {

using PageIndex = int32_t;

class PagePool {
 public:
  explicit PagePool(int32_t pages);

  int32_t pages() const { return static_cast<int32_t>(references_.size()); }
  int32_t free_pages() const { return free_pages_; }
  int32_t used_pages() const { return pages() - free_pages(); }

  // Appends `count` pages to `taken`, each with one reference; they forget what they held. False,
  // and nothing taken, when there are not so many free.
  [[nodiscard]] bool Take(int32_t count, std::vector<PageIndex>* taken);
  // Drops a reference of each of the last `count` pages of `held`, its tail first, and shortens it;
  // pages without references become free in that order.
  void GiveBack(int32_t count, std::vector<PageIndex>* held);

  // One reference more. A free page leaves the queue and keeps its content.
  void AddReference(PageIndex page);
  int32_t references(PageIndex page) const { return references_[static_cast<size_t>(page)]; }
  // Of all pages.
  int64_t total_references() const { return total_references_; }

  // The page holds this content, named by a digest. Where another page holds the same already, that
  // one stays the one that is found. REQUIRES: it has a reference and remembers nothing yet.
  void Remember(PageIndex page, const Digest& content);
  // The page that holds the content, free or not.
  std::optional<PageIndex> Find(const Digest& content) const;
  // All pages forget what they hold.
  void ForgetContent();

  // Every page is either free, once, or has references; remembered contents name their pages.
  void CheckInvariants() const;

 private:
  void Append(PageIndex page);
  void Remove(PageIndex page);
  void Forget(PageIndex page);

  // The queue: links of each page and, behind them, of a sentinel, whose next is the head.
  std::vector<PageIndex> next_;
  std::vector<PageIndex> previous_;
  std::vector<int32_t> references_;  // by page
  std::vector<Digest> content_;      // by page; empty: none is found here
  std::unordered_map<Digest, PageIndex, absl::Hash<Digest>> page_of_;
  int32_t free_pages_ = 0;
  int64_t total_references_ = 0;
};

// The same pages in contiguous runs, first fit: what a cache that needs one piece for each request
// must do, with the holes that come of it. Pure.
class RunPool {
 public:
  explicit RunPool(int32_t pages);

  int32_t pages() const { return pages_; }
  int32_t free_pages() const { return free_pages_; }
  int32_t used_pages() const { return pages_ - free_pages_; }
  int32_t longest_free_run() const;

  // First page of `count` pages side by side, from the lowest hole that is large enough; nothing if
  // there is none, however many pages are free.
  [[nodiscard]] std::optional<PageIndex> Take(int32_t count);
  // Gives back a run that Take returned.
  void GiveBack(PageIndex first, int32_t count);

  // Holes do not overlap, do not touch, and add up.
  void CheckInvariants() const;

 private:
  int32_t pages_;
  int32_t free_pages_;
  std::map<PageIndex, int32_t> holes_;  // first page to length
};

// Pages of `page_tokens` tokens that `tokens` tokens need.
constexpr int32_t PagesFor(int32_t tokens, int32_t page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_
