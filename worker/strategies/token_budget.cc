#include "worker/strategies/token_budget.h"

#include <algorithm>
#include <cmath>

namespace kvsweep {

int32_t BudgetBaseTokens(BudgetBase base, int32_t fixed_tokens, const RequestShape& shape) {
  switch (base) {
    case BUDGET_BASE_PROMPT:
      return shape.prompt_tokens - shape.restarted_tokens;
    case BUDGET_BASE_FIXED:
      return fixed_tokens;
    case BUDGET_BASE_FINAL:
      return shape.oracle_tokens > 0 ? shape.oracle_tokens : shape.limit();
    default:
      return shape.limit();
  }
}

int32_t BudgetTokens(double ratio, int32_t base_tokens, int32_t least) {
  // The small addend keeps products such as 0.2 * 640 from falling a rounding error below an even
  // number.
  const double half = std::floor(ratio * base_tokens / 2 + 1e-9);
  return std::max(least, 2 * static_cast<int32_t>(half));
}

}  // namespace kvsweep
