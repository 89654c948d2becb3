// Paged KV cache (Kwon et al. 2023; vLLM): all keys and values on the device, in pages of
// block_size tokens that any sequence may have.
//
// A page holds block_size tokens of all layers: [L][key, value][Hk][block_size][d]. A sequence
// takes a page when its last one is full; when none is free the batcher preempts, and the victim
// computes its tokens again.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGED_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGED_H_

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/sequence_tables.h"

namespace kvsweep {

// Sizes of the paged cache: device bytes = fixed + pages * page_bytes.
struct PagedLayout {
  int32_t block_size = 16;   // tokens of a page
  uint64_t token_bytes = 0;  // kappa: of all layers
  uint64_t fixed_bytes = 0;  // block tables
  int32_t pages = 0;
  int32_t watermark_pages = 0;  // left free by admission
  uint64_t page_bytes() const { return token_bytes * static_cast<uint64_t>(block_size); }
};

class PagedManager : public KvManager {
 public:
  explicit PagedManager(const PagedLayout& layout);

  TierBytes FixedBytes() const override { return {layout_.fixed_bytes, 0}; }
  TierBytes PeakBytes(const RequestShape& shape) const override;
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId request) override {}
  void Release(RequestId request) override;
  PreemptionMode preemption_mode() const override { return PreemptionMode::kRecompute; }
  void Preempt(RequestId request) override { Release(request); }
  bool Resume(RequestId request, int32_t tokens) override;
  TierBytes ReservedBytes() const override;
  TierBytes LiveBytes() const override;
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> Pages(RequestId request) const { return held_.at(request).pages; }
  const PagedLayout& layout() const { return layout_; }

 private:
  struct Held {
    std::vector<PageIndex> pages;
    int32_t tokens = 0;
  };

  PagedLayout layout_;
  PagePool pool_;
  std::map<RequestId, Held> held_;
};

class PagedStrategy : public CacheStrategy {
 public:
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const Paged& parameters,
                                                               const StrategyContext& context);
  ~PagedStrategy() override;

  KvManager& manager() override { return manager_; }
  void BeginStep(const StepView& step) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& step) override {}
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;

 private:
  PagedStrategy(const PagedLayout& layout, const StrategyContext& context, SequenceTables tables,
                std::byte* memory);
  KvView View(int32_t layer) const;

  StrategyContext context_;
  PagedManager manager_;
  SequenceTables tables_;
  std::byte* memory_;
  AttentionPlan plan_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGED_H_
