// How many tokens a budget given as a ratio comes to: the same rule for every kind of arm, so that
// equal ratios are equal tokens.
#ifndef KVSWEEP_WORKER_STRATEGIES_TOKEN_BUDGET_H_
#define KVSWEEP_WORKER_STRATEGIES_TOKEN_BUDGET_H_

#include <cstdint>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

// What the ratio is a ratio of, in tokens: the request's limit (prompt + max_tokens), its prompt, a
// fixed number, or its true final length (the limit where that is not known).
int32_t BudgetBaseTokens(BudgetBase base, int32_t fixed_tokens, const RequestShape& shape);

// C = 2 * floor(ratio * base / 2), at least `least`.
int32_t BudgetTokens(double ratio, int32_t base_tokens, int32_t least);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_TOKEN_BUDGET_H_
