// Equal pages of a memory region and who has them: the accounting under every KV manager. Pure.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_

#include <cstdint>
#include <vector>

namespace kvsweep {

using PageIndex = int32_t;

class PagePool {
 public:
  explicit PagePool(int32_t pages);

  int32_t pages() const { return static_cast<int32_t>(held_.size()); }
  int32_t free_pages() const { return static_cast<int32_t>(free_.size()); }
  int32_t used_pages() const { return pages() - free_pages(); }

  // Appends `count` pages to `taken`. False, and nothing taken, when there are not so many free.
  [[nodiscard]] bool Take(int32_t count, std::vector<PageIndex>* taken);
  // Gives back the last `count` pages of `held`, its tail first, and shortens it.
  void GiveBack(int32_t count, std::vector<PageIndex>* held);

  // Every page is either free, once, or held.
  void CheckInvariants() const;

 private:
  std::vector<PageIndex> free_;  // taken from the back
  std::vector<bool> held_;       // by page
};

// Pages of `page_tokens` tokens that `tokens` tokens need.
constexpr int32_t PagesFor(int32_t tokens, int32_t page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGE_POOL_H_
