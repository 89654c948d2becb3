#include "worker/strategies/cache_strategy.h"

#include <cmath>

namespace kvsweep {

float ModelShape::attention_scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

}  // namespace kvsweep
