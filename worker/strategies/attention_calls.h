// The backend calls that all strategies make in the same way, filled in from the context.
#ifndef KVSWEEP_WORKER_STRATEGIES_ATTENTION_CALLS_H_
#define KVSWEEP_WORKER_STRATEGIES_ATTENTION_CALLS_H_

#include "kernels/backend.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/sequence_tables.h"

namespace kvsweep {

// `data` from its row `row` on.
Activations FromRow(const StrategyContext& context, const Activations& data, int32_t row);

// Rotates queries and keys of all rows at their positions; nothing for models with learned
// positions.
void RotateQueriesAndKeys(const StrategyContext& context, const StepView& step,
                          const AttentionInputs& inputs);

// What turns them so, and stores all rows' keys and values in their slots of `view`.
AppendArgs AppendCall(const StrategyContext& context, const StepView& step,
                      const AttentionInputs& inputs, const KvView& view,
                      const SequenceTables& tables);

// Decode attention of the step's decode rows over `view` and each row's own key and value; the
// caller adds what differs.
DecodeAttentionArgs DecodeCall(const StrategyContext& context, const StepView& step,
                               const AttentionInputs& inputs, const Activations& out,
                               const KvView& view, const AttentionPlan& plan);

// Attention of a prompt's chunk over `history` (its first start_position slots in table row `row`)
// and itself.
PrefillAttentionArgs PrefillCall(const StrategyContext& context, const Segment& segment,
                                 const AttentionInputs& inputs, const Activations& out,
                                 const KvView& history, int32_t row);

// How this step's decode attention is split. A captured step is planned for the longest sequence
// there can be, since its plan is fixed.
AttentionPlan PlanDecode(const StrategyContext& context, const StepView& step);

// Memory for an arm: ResourceExhausted names what it was for, with the asked and available bytes,
// as the backend says.
absl::StatusOr<std::byte*> AllocateFor(const StrategyContext& context, Tier tier, uint64_t bytes,
                                       absl::string_view what);

// Pages that fit a budget, named by its field, after fixed bytes; ResourceExhausted with both
// figures when the fixed bytes alone exceed it or not even one page is left.
absl::StatusOr<int32_t> PagesInBudget(uint64_t budget_bytes, uint64_t fixed_bytes,
                                      uint64_t page_bytes, absl::string_view arm,
                                      absl::string_view field = "kv.device_bytes");

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_ATTENTION_CALLS_H_
