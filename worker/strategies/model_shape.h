// What a strategy knows of the model that it serves.
#ifndef KVSWEEP_WORKER_STRATEGIES_MODEL_SHAPE_H_
#define KVSWEEP_WORKER_STRATEGIES_MODEL_SHAPE_H_

#include <cmath>
#include <cstdint>

namespace kvsweep {

// The dimensions a strategy needs.
struct ModelShape {
  int32_t layers = 0;       // L
  int32_t hidden_size = 0;  // D
  int32_t query_heads = 0;  // Hq
  int32_t kv_heads = 0;     // Hk
  int32_t head_dim = 0;     // d
  int32_t max_positions = 0;
  bool rotary = false;
  const float* inverse_frequency = nullptr;  // [d/2], device; of rotary models (RotaryArgs)

  // 1 / sqrt(d)
  float attention_scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_MODEL_SHAPE_H_
