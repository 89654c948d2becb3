// StreamingLLM: the first tokens and a window of the most recent ones (Xiao et al. 2023). What lies
// between is dropped, whatever attention it received. With positions inside the cache (the paper's)
// keys are stored before rotary embedding and stand at their ranks among the kept tokens, so that
// distances stay those of the window however long the text is.
//
// It is H2O without scores: the same budget, closed form of slots and memory plan, with every heavy
// slot a sink. So its manager is H2O's, over slots that hold keys and values alone. A page holds 16
// slots of all layers, [L][Hk][key, value][16][d]; all that a request will ever take is reserved at
// admission.
#ifndef KVSWEEP_WORKER_STRATEGIES_STREAMING_LLM_H_
#define KVSWEEP_WORKER_STRATEGIES_STREAMING_LLM_H_

#include <array>
#include <memory>
#include <span>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/h2o_manager.h"
#include "worker/strategies/sequence_tables.h"

namespace kvsweep {

// The arm's memory, without a backend. ResourceExhausted when fixed structures and one page exceed
// the budget.
absl::StatusOr<H2oLayout> StreamingLlmLayoutOf(const StreamingLlm& parameters,
                                               const StrategySizes& sizes);

class StreamingLlmStrategy : public CacheStrategy {
 public:
  // Errors as of StreamingLlmLayoutOf; ResourceExhausted too when the machine has not the memory.
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const StreamingLlm& parameters,
                                                               const StrategyContext& context);
  ~StreamingLlmStrategy() override;

  KvManager& manager() override { return manager_; }
  void BeginStep(const StepView& step) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& /*step*/) override {}
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  int32_t PromptEvictions(const RequestShape& shape, int32_t tokens) const override;
  int32_t TokenBudget(const RequestShape& shape) const override;
  EngagementRule engagement_rule() const override;
  bool EngagementExpected(const RequestShape& shape, int32_t tokens) const override;

 private:
  StreamingLlmStrategy(const H2oLayout& layout, const StrategyContext& context, bool in_cache,
                       SequenceTables tables);
  KvView View(int32_t layer) const;
  SlotView Ranks() const;
  void Position(const StepView& step, const AttentionInputs& inputs);

  StrategyContext context_;
  H2oManager manager_;
  bool in_cache_;  // positions are ranks inside the cache
  SequenceTables tables_;
  StepState::Field cache_position_;  // [rows], the place of each row's own key
  StepState::Field rank_;            // [decode rows, longest budget], of the stored slots
  std::byte* memory_ = nullptr;
  AttentionPlan plan_;
  std::array<std::vector<int32_t>, 2> decode_budget_;  // of each decode segment, by step parity
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_STREAMING_LLM_H_
