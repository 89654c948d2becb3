// Paged KV cache (Kwon et al. 2023; vLLM): all keys and values on the device, in pages of
// block_size tokens that any sequence may have.
//
// A page holds block_size tokens of all layers: [L][Hk][key, value][block_size][d], one contiguous
// piece, so that a page is copied or swapped in one transfer. A sequence takes a page when its last
// one is full; when none is free the batcher preempts, and the victim computes its tokens again or
// waits with its pages on the host.
//
// Pages are counted by reference. Two things share them: a prefix cache, in which a full page is
// found again by the digest of its tokens and of all before them; and forks, the continuations of
// one prompt, which begin with the prompt's pages and copy the last, partly filled one when they
// append to it.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGED_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGED_H_

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/page_swaps.h"
#include "worker/strategies/page_transfers.h"
#include "worker/strategies/sequence_tables.h"

namespace kvsweep {

// Sizes of the paged cache: device bytes = fixed + pages * page_bytes, host bytes = host_pages *
// page_bytes.
struct PagedLayout {
  Paged parameters;
  int32_t block_size = 16;   // tokens of a page
  uint64_t token_bytes = 0;  // kappa: of all layers
  uint64_t fixed_bytes = 0;  // block tables and the lists of pages to copy
  int32_t pages = 0;
  int32_t host_pages = 0;       // 0 without swap
  int32_t watermark_pages = 0;  // left free by admission
  int32_t max_context = 0;      // tokens of the longest request, for reservation: max
  int32_t forked_pages = 0;     // copies on write of one step at most
  int32_t swapped_pages = 0;    // pages of one swap at most
  uint64_t page_bytes() const { return token_bytes * static_cast<uint64_t>(block_size); }
};
// Pure: what an arm of these sizes takes. ResourceExhausted when not even one page fits.
absl::StatusOr<PagedLayout> PagedLayoutOf(const Paged& parameters, const StrategySizes& sizes);

// What the hooks need of a manager: where a request's tokens lie, and what must be copied before
// the step that was planned. Copies are taken once, in the order out, forks, in.
class PageManager : public KvManager {
 public:
  virtual std::span<const PageIndex> Pages(RequestId request) const = 0;

  // What goes to the host and comes back; nullptr: nothing ever does.
  virtual PageSwaps* swaps() { return nullptr; }
  virtual std::vector<PagePair> TakeForks() { return {}; }  // inside the device
  virtual bool HasForks() const { return false; }           // to be taken
  // The first batch of swaps under way has landed.
  virtual void SwapInsLanded() {}

  // References of block tables to pages, and pages in use; equal where nothing is shared.
  virtual std::pair<int64_t, int64_t> Sharing() const { return {0, 0}; }
  // Tokens looked up in the prefix cache by admitted requests, and found there.
  virtual std::pair<int64_t, int64_t> CacheLookups() const { return {0, 0}; }
};

class PagedManager : public PageManager {
 public:
  explicit PagedManager(const PagedLayout& layout);

  TierBytes FixedBytes() const override { return {layout_.fixed_bytes, 0}; }
  TierBytes PeakBytes(const RequestShape& shape) const override;
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId request) override;
  void Release(RequestId request) override;
  // kOffload with preemption: swap.
  PreemptionMode preemption_mode() const override;
  void Preempt(RequestId request) override;
  bool CanOffload(RequestId request) const override;
  // Leaves the watermark free, as admission does.
  bool Resume(RequestId request, int32_t tokens) override;
  bool Arrived(RequestId request) const override {
    return !swaps_.Arriving(held_.at(request).stay);
  }
  VictimRule victim_rule() const override;
  void ReadTokensFrom(TokenReader tokens) override { tokens_ = std::move(tokens); }
  int32_t FindCached(RequestId request, const RequestShape& shape) override;
  bool can_fork() const override { return true; }
  void Fork(RequestId parent, RequestId child) override;
  void BeginMeasurement() override;
  // Pages that only remember what they held count as free.
  TierBytes ReservedBytes() const override;
  // Each page once, however many share it.
  TierBytes LiveBytes() const override;
  // All pages of the request, shared ones too.
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> Pages(RequestId request) const override {
    return held_.at(request).pages;
  }
  PageSwaps* swaps() override { return &swaps_; }
  std::vector<PagePair> TakeForks() override { return std::exchange(forks_, {}); }
  bool HasForks() const override { return !forks_.empty(); }
  void SwapInsLanded() override;
  std::pair<int64_t, int64_t> Sharing() const override {
    return {pool_.total_references(), pool_.used_pages()};
  }
  std::pair<int64_t, int64_t> CacheLookups() const override { return {queried_, hit_}; }

  const PagedLayout& layout() const { return layout_; }

 private:
  struct Held {
    std::vector<PageIndex> pages;
    PageSwaps::Stay stay;          // while offloaded or arriving: of the first `stored` tokens
    std::vector<Digest> contents;  // chained, of the full pages so far
    int32_t tokens = 0;
    int32_t stored = 0;
    bool prompt_ended = false;
    bool offloaded = false;
  };
  // What the last FindCached found, until the next call.
  struct Lookup {
    RequestId request = -1;
    int32_t prompt_tokens = 0;
    std::vector<Digest> contents;
    std::vector<PageIndex> pages;
    bool fresh = false;
  };

  bool caches() const;
  int32_t PagesOf(int32_t tokens) const { return PagesFor(tokens, layout_.block_size); }
  Digest ContentOf(RequestId request, std::span<const int32_t> tokens, int32_t page,
                   const Digest& before) const;
  void RememberFullPages(RequestId request, Held& held);
  void GiveBackDevicePages(Held& held);

  PagedLayout layout_;
  PagePool pool_;
  PageSwaps swaps_;
  std::map<RequestId, Held> held_;
  TokenReader tokens_;
  Lookup lookup_;
  std::vector<PagePair> forks_;
  int64_t queried_ = 0;
  int64_t hit_ = 0;
};

// The control of Kwon et al. (section 3): one contiguous run of pages for each request, reserved at
// its admission for the longest it might become. First fit, kinder than the buddy allocator that
// they assume. Nothing is ever preempted or shared.
class ContiguousManager : public PageManager {
 public:
  explicit ContiguousManager(const PagedLayout& layout);

  // Tokens reserved for a request.
  int32_t ReservedTokens(const RequestShape& shape) const;

  TierBytes FixedBytes() const override { return {layout_.fixed_bytes, 0}; }
  TierBytes PeakBytes(const RequestShape& shape) const override;
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId /*request*/) override {}
  void Release(RequestId request) override;
  PreemptionMode preemption_mode() const override { return PreemptionMode::kNone; }
  void Preempt(RequestId request) override { Release(request); }
  bool Resume(RequestId request, int32_t tokens) override;
  TierBytes ReservedBytes() const override;
  TierBytes LiveBytes() const override;
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> Pages(RequestId request) const override {
    return held_.at(request).pages;
  }

 private:
  struct Held {
    std::vector<PageIndex> pages;
    int32_t tokens = 0;
  };

  PagedLayout layout_;
  RunPool pool_;
  std::map<RequestId, Held> held_;
};

// The manager that the layout's reservation asks for.
std::unique_ptr<PageManager> MakePagedManager(const PagedLayout& layout);

class PagedStrategy : public CacheStrategy {
 public:
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const Paged& parameters,
                                                               const StrategyContext& context);
  ~PagedStrategy() override;

  KvManager& manager() override { return *manager_; }
  // Swaps and forks are ordered by the host.
  bool NeedsHost() const override;
  void BeginStep(const StepView& step) override;
  void MoveMemory(const StepView& step) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& step) override {}
  void StepDone() override;
  void BeginMeasurement() override;
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  std::vector<Figure> Figures() const override;

 private:
  PagedStrategy(const PagedLayout& layout, const StrategyContext& context, SequenceTables tables);
  absl::Status AllocateMemory();
  KvView View(int32_t layer) const;
  void EnqueueForks();

  StrategyContext context_;
  PagedLayout layout_;
  std::unique_ptr<PageManager> manager_;
  SequenceTables tables_;
  std::byte* memory_ = nullptr;
  std::byte* host_memory_ = nullptr;
  std::byte* list_memory_ = nullptr;  // of forks, then of transfers
  std::vector<PagePair> forks_;       // of this step, read by the device
  std::optional<PageTransfers> transfers_;
  AttentionPlan plan_;
  int64_t forked_pages_ = 0;
  int64_t references_ = 0;  // of block tables, summed over steps
  int64_t used_pages_ = 0;  // summed over steps
};

// Splits page copies inside one pool into groups in which no page is both a source and a target, so
// that the copies of a group may run in any order: ends of the groups.
std::vector<size_t> IndependentGroups(std::span<const PagePair> pairs);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGED_H_
