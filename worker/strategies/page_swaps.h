// Pages whose content waits on the host: which host pages hold what, and what must be copied before
// a step. The account under the KV managers that swap. Pure.
//
// A victim's pages go out before the step that gives them to others. They come back in batches, one
// for each step that resumes somebody; a batch is under way until it has landed, in the order in
// which they were begun. The host keeps its copy until then, so whoever is preempted while he
// arrives loses nothing and moves nothing.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGE_SWAPS_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGE_SWAPS_H_

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "worker/strategies/page_pool.h"

namespace kvsweep {

// A page to copy: from one pool to another, or inside one.
struct PagePair {
  PageIndex source = 0;
  PageIndex target = 0;
  bool operator==(const PagePair&) const = default;
};

class PageSwaps {
 public:
  // Batches under way at most: the link is busy with the first, so more would only wait.
  static constexpr int32_t kMostBatches = 4;

  // What one request has on the host; without pages nothing.
  struct Stay {
    std::vector<PageIndex> pages;
    int64_t batch = -1;  // that brings them back; -1: none does
  };

  explicit PageSwaps(int32_t host_pages) : pool_(host_pages) {}

  int32_t free_pages() const { return pool_.free_pages(); }
  int32_t used_pages() const { return pool_.used_pages(); }

  // The content of `device` goes to as many host pages. REQUIRES: they are free, the stay is empty.
  void MoveOut(std::span<const PageIndex> device, Stay* stay);
  // Whether a batch of this step could be begun.
  bool CanMoveIn() const { return begun_ - landed_ < kMostBatches; }
  // What stayed comes back, into the first of `device`. REQUIRES: CanMoveIn().
  void MoveIn(std::span<const PageIndex> device, Stay* stay);
  bool Arriving(const Stay& stay) const { return stay.batch >= landed_; }
  // The request loses its device pages again before the batch has landed; its stay goes on.
  void GiveUpArrival(Stay* stay);
  // The stay is over, because its batch has landed or because the request is released.
  void End(Stay* stay);

  // Something is to be done before the next step.
  bool pending() const { return given_up_ || !outs_.empty() || !ins_.empty(); }

  // For whoever carries it out, before each step, in this order.
  //
  // Pages that a batch under way reads or writes have been given up since the last call: nobody may
  // use them before it has landed.
  bool TakeGivenUp() { return std::exchange(given_up_, false); }
  std::vector<PagePair> TakeOuts() { return std::exchange(outs_, {}); }
  // A batch that begins now; empty: none does.
  std::vector<PagePair> TakeIns();
  // The first batch under way has landed. Stays that it ends are the managers' to end.
  void Landed();

  void CheckInvariants() const { pool_.CheckInvariants(); }

 private:
  void Forget(const Stay& stay);

  PagePool pool_;
  std::vector<PagePair> outs_;
  std::vector<PagePair> ins_;
  int64_t begun_ = 0;  // batches so far
  int64_t landed_ = 0;
  bool given_up_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGE_SWAPS_H_
