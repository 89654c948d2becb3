// H2O's memory: what a request keeps, what that takes, and when. Pure.
//
// Device and host are cut into pages of `page_tokens` slots; page i of the device and page i of the
// host are one page when keys and values lie on the host (tier: host). A request has slab pages,
// for the layers that evict, and, with full_layers, pages of the layers that keep everything, which
// are as large and hold as many tokens as fit.
//
// Slots of a request: while its prompt is computed one for each token so far (prefill_evict: end)
// or the kept ones and the chunk's (chunk); after it at most its budget C.
#ifndef KVSWEEP_WORKER_STRATEGIES_H2O_MANAGER_H_
#define KVSWEEP_WORKER_STRATEGIES_H2O_MANAGER_H_

#include <map>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/page_swaps.h"

namespace kvsweep {

// Tokens that a request keeps, by its shape; sinks are among the heavy ones.
struct H2oBudget {
  int32_t heavy = 0;
  int32_t recent = 0;
  int32_t total() const { return heavy + recent; }
};
// Sizes, or ratios of the base: C = 2 * floor(ratio * base / 2), split by the ratios. Sinks beyond
// the heavy tokens take from the recent ones. slot_promote keeps one recent token fewer.
H2oBudget H2oBudgetOf(const H2o& parameters, const RequestShape& shape);

// Pieces of one device allocation, in bytes from its start; what is not needed has no bytes.
struct H2oScratch {
  uint64_t probability = 0;     // f32 [decode rows, Hq, probability_stride]
  uint64_t log_sum_exp = 0;     // f32 [rows, Hq]
  uint64_t repeated = 0;        // activations [rows, 2 Hq d], group_aggregation: query_head
  uint64_t ring = 0;            // 2 x [ring_tokens][heads][key, value][d], tier: host
  uint64_t partial_output = 0;  // f32 [rows, Hq, d], tier: host
  uint64_t partial_maximum = 0;
  uint64_t partial_sum = 0;
  uint64_t swap_lists = 0;  // PageTransfers::ListBytes, preemption: swap
  uint64_t bytes = 0;
};

// Device bytes = fixed + pages * page_bytes; host bytes = pages * host_page_bytes + swapped pages *
// page_bytes.
struct H2oLayout {
  H2o parameters;
  uint64_t slot_bytes = 0;   // on the device, of one token slot of all evicting layers
  uint64_t fixed_bytes = 0;  // tables and scratch
  int32_t pages = 0;
  int32_t page_tokens = 16;
  uint64_t host_slot_bytes = 0;   // on the host, tier: host
  int32_t swap_pages = 0;         // pages of the host that victims wait in, preemption: swap
  int32_t swapped_pages = 0;      // pages of one swap at most
  int32_t full_page_tokens = 0;   // tokens of the full layers that a page holds; 0: no such layers
  uint64_t full_token_bytes = 0;  // of one token, all full layers
  int32_t chunk_tokens = 0;       // of the longest chunk, prefill_evict: chunk

  int32_t heads = 0;        // stored in each slot: KV heads, or query heads where they vote alone
  int32_t table_pages = 0;  // slab pages of the longest request
  int32_t full_table_pages = 0;    // likewise, of the full layers
  int64_t probability_stride = 0;  // largest C + 1
  int32_t ring_tokens = 0;         // tokens of one of the ring's two tiles, all rows together
  H2oScratch scratch;

  uint64_t page_bytes() const { return slot_bytes * static_cast<uint64_t>(page_tokens); }
  uint64_t host_page_bytes() const { return host_slot_bytes * static_cast<uint64_t>(page_tokens); }
};

// The arm's memory, without a backend. InvalidArgument for parameters that the model cannot have
// (rolling positions with learned ones, no layer that evicts); ResourceExhausted when fixed
// structures and one page exceed a budget.
absl::StatusOr<H2oLayout> H2oLayoutOf(const H2o& parameters, const StrategySizes& sizes);

class H2oManager : public KvManager {
 public:
  explicit H2oManager(const H2oLayout& layout);

  TierBytes FixedBytes() const override { return {layout_.fixed_bytes, 0}; }
  TierBytes PeakBytes(const RequestShape& shape) const override;
  // preemption: none reserves the peak, so that an admitted request goes through to its end.
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId request) override;
  void Release(RequestId request) override;
  PreemptionMode preemption_mode() const override;
  bool CanOffload(RequestId request) const override;
  void Preempt(RequestId request) override;
  bool Resume(RequestId request, int32_t tokens) override;
  bool Arrived(RequestId request) const override {
    return !swaps_.Arriving(held_.at(request).stay);
  }
  TierBytes ReservedBytes() const override;
  TierBytes LiveBytes() const override;
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> Pages(RequestId request) const { return held_.at(request).pages; }
  std::span<const PageIndex> FullPages(RequestId request) const { return held_.at(request).full; }
  H2oBudget Budget(RequestId request) const { return held_.at(request).budget; }
  const H2oLayout& layout() const { return layout_; }

  // Slots that a request of this budget holds before a chunk of its prompt that starts at `tokens`.
  int32_t HistorySlots(const H2oBudget& budget, int32_t tokens) const;

  // What goes to the host and comes back, and word that the first batch under way has landed.
  PageSwaps& swaps() { return swaps_; }
  const PageSwaps& swaps() const { return swaps_; }
  void SwapInsLanded();

 private:
  struct Held {
    RequestShape shape;
    H2oBudget budget;
    std::vector<PageIndex> pages;  // slab
    std::vector<PageIndex> full;   // of the full layers
    PageSwaps::Stay stay;          // while offloaded or arriving: slab, then full layers
    int32_t tokens = 0;
    int32_t slots = 0;   // of them, stored by the evicting layers
    int32_t stored = 0;  // tokens that stay on the host
    bool prompt_ended = false;
    bool offloaded = false;
  };
  bool chunked() const { return layout_.parameters.prefill_evict() == H2o::PREFILL_EVICT_CHUNK; }
  bool reserves() const { return layout_.parameters.preemption() == H2o::PREEMPTION_NONE; }
  int32_t SlotPages(int32_t slots) const { return PagesFor(slots, layout_.page_tokens); }
  int32_t FullPagesFor(int32_t tokens) const;
  // Slots at the worst moment of a prompt of `prompt` tokens, and after it.
  int32_t PromptSlots(const H2oBudget& budget, int32_t prompt) const;
  int32_t SlabSlots(const H2oBudget& budget, const RequestShape& shape) const;
  // Lets the request have at least so many pages. False: nothing changed.
  bool Extend(Held* held, int32_t slab_pages, int32_t full_pages);
  void GiveBackAll(Held* held);

  H2oLayout layout_;
  PagePool pool_;
  PageSwaps swaps_;
  std::map<RequestId, Held> held_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_H2O_MANAGER_H_
