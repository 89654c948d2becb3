// H2O: heavy-hitter eviction (Zhang et al. 2023). Each layer and KV head keeps at most C = heavy +
// recent tokens: the most recent ones, and of the others those with the largest attention
// probability accumulated over all queries so far. What is evicted is gone.
//
// A page holds kPageTokens slots of all layers, for each layer [key, value][Hk][slots][d], then
// scores (f32) and original positions (i32), [Hk][slots] each. During the prompt slot = position.
// After it the slots are H2O's closed form: position p < heavy in slot p, a later recent one in
// slot heavy + ((p - heavy) mod recent), heavy hitters where recent ones were displaced. Everything
// a request will ever take is reserved at admission, the prompt's peak included, so an admitted
// request is never preempted.
//
// Rule of eviction: window_compare (the authors' real-drop code): the token that leaves the window
// competes with the heavy ones.
#ifndef KVSWEEP_WORKER_STRATEGIES_H2O_H_
#define KVSWEEP_WORKER_STRATEGIES_H2O_H_

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/sequence_tables.h"

namespace kvsweep {

// Tokens that a request keeps, by its shape.
struct H2oBudget {
  int32_t heavy = 0;
  int32_t recent = 0;
  int32_t total() const { return heavy + recent; }
};
H2oBudget H2oBudgetOf(const H2o& parameters, const RequestShape& shape);

// Device bytes = fixed + pages * page_bytes.
struct H2oLayout {
  static constexpr int32_t kPageTokens = 16;
  H2o parameters;
  uint64_t slot_bytes = 0;   // one token slot of all layers: keys, values, scores, positions
  uint64_t fixed_bytes = 0;  // tables and the emitted probabilities
  int32_t pages = 0;
  uint64_t page_bytes() const { return slot_bytes * kPageTokens; }
};

class H2oManager : public KvManager {
 public:
  explicit H2oManager(const H2oLayout& layout);

  TierBytes FixedBytes() const override { return {layout_.fixed_bytes, 0}; }
  TierBytes PeakBytes(const RequestShape& shape) const override;
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId request) override;
  void Release(RequestId request) override;
  PreemptionMode preemption_mode() const override { return PreemptionMode::kNone; }
  void Preempt(RequestId request) override { Release(request); }
  bool Resume(RequestId request, int32_t tokens) override;
  TierBytes ReservedBytes() const override;
  TierBytes LiveBytes() const override;
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> Pages(RequestId request) const { return held_.at(request).pages; }
  H2oBudget Budget(RequestId request) const { return held_.at(request).budget; }
  const H2oLayout& layout() const { return layout_; }

 private:
  struct Held {
    RequestShape shape;
    H2oBudget budget;
    std::vector<PageIndex> pages;
    int32_t tokens = 0;
    bool prompt_ended = false;
  };
  // Pages while the prompt is computed, and after it.
  int32_t PromptPages(const RequestShape& shape) const;
  int32_t SlabPages(const RequestShape& shape) const;

  H2oLayout layout_;
  PagePool pool_;
  std::map<RequestId, Held> held_;
};

class H2oStrategy : public CacheStrategy {
 public:
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const H2o& parameters,
                                                               const StrategyContext& context);
  ~H2oStrategy() override;

  KvManager& manager() override { return manager_; }
  // The column sums are formed over tiles of this many rows.
  int32_t chunk_alignment() const override { return kColumnSumRows; }
  void BeginStep(const StepView& step) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& step) override {}
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  int32_t PromptEvictions(const RequestShape& shape) const override;
  int32_t TokenBudget(const RequestShape& shape) const override;
  EngagementRule engagement_rule() const override;
  bool EngagementExpected(const RequestShape& shape, int32_t tokens) const override;

 private:
  struct Arrays {
    StepState::Field position;  // [decode rows], of the new token
    StepState::Field heavy;     // [decode rows]
    StepState::Field recent;    // [decode rows]
  };
  struct Memory {
    std::byte* pages = nullptr;
    float* probability = nullptr;    // [decode rows, Hq, probability_stride]
    float* log_sum_exp = nullptr;    // [rows, Hq]
    int64_t probability_stride = 0;  // largest C + 1
  };

  H2oStrategy(const H2oLayout& layout, const StrategyContext& context, SequenceTables tables,
              const Arrays& arrays);
  absl::Status AllocateMemory(int64_t probability_stride);
  KvView View(int32_t layer) const;
  SlotView Scores(int32_t layer) const;
  SlotView Positions(int32_t layer) const;
  void AttendDecode(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                    const Activations& out);
  void AttendPrefill(const Segment& segment, int32_t row, int32_t layer,
                     const AttentionInputs& inputs, const Activations& out);

  StrategyContext context_;
  H2oManager manager_;
  SequenceTables tables_;
  Arrays arrays_;
  Memory memory_;
  AttentionPlan plan_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_H2O_H_
