// How well speculation chose, measured against the true scores: what a quality trial records of
// InfiniGen for each layer. Plain C++ over rows that the host has read; slow, so it looks at
// samples.
#ifndef KVSWEEP_WORKER_STRATEGIES_INFINIGEN_DIAGNOSIS_H_
#define KVSWEEP_WORKER_STRATEGIES_INFINIGEN_DIAGNOSIS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

// One decode row at one layer, f32, rotated as attention sees it.
struct SelectionSample {
  std::span<const float> query;                // [Hq, d]
  std::span<const float> keys;                 // [Hk, n, d], stored tokens
  std::span<const float> current_key;          // [Hk, d]
  std::vector<std::vector<int32_t>> selected;  // by KV head: slots
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

struct SelectionMatch {
  double recall = 0;  // of the m slots with the largest true margins (m: as many as were selected),
                      // the share that was selected; mean over KV heads
  double covered_mass = 0;  // attention that falls on selected slots and the current token; mean
                            // over query heads
};
// REQUIRES: at least one stored token, and a selected slot for each KV head.
SelectionMatch MatchSelection(const SelectionSample& sample);

// Cosine of two vectors; 0 if one is zero.
double Cosine(std::span<const float> a, std::span<const float> b);

// Means by layer, of whatever was added.
class LayerMeans {
 public:
  explicit LayerMeans(int32_t layers) : sum_(static_cast<size_t>(layers)), count_(sum_.size()) {}
  void Add(int32_t layer, double value, int64_t count = 1);
  void Clear();
  // A figure for each layer that has values.
  void AppendTo(const char* name, std::vector<CacheStrategy::Figure>* figures) const;

 private:
  std::vector<double> sum_;
  std::vector<int64_t> count_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_INFINIGEN_DIAGNOSIS_H_
