// What a strategy costs in quality: a text is scored token by token with the strategy's real state,
// in lockstep with the full cache over the same weights.
//
// The text is cut into windows. Of each, the first `prefill` tokens (BOS among them) are a prompt;
// the rest is fed one by one, whatever the model would have said, several windows side by side as a
// decode batch. The full cache runs over the same rows as a prefill, a few positions ahead at a
// time, so that only those positions' logits live. Each position's next-token distributions are
// compared.
//
// One thread.
#ifndef KVSWEEP_WORKER_ENGINE_QUALITY_H_
#define KVSWEEP_WORKER_ENGINE_QUALITY_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "proto/experiment.pb.h"
#include "worker/engine/engine.h"

namespace kvsweep {

// What is scored.
struct QualityTask {
  std::span<const int32_t> text_ids;  // without BOS
  std::optional<int32_t> bos_id;      // first token of each window
  int32_t windows = 0;
  int32_t context = 0;  // tokens of a window
  int32_t prefill = 0;  // of them, prefilled; 1 <= prefill < context
};

// Windows of `task` that make up `text_tokens` scored tokens: the number rounded up.
int32_t QualityWindows(uint32_t text_tokens, int32_t context, int32_t prefill);

struct QualityOptions {
  Clock* clock = nullptr;
  SimulatedClock* modelled = nullptr;  // the same clock in modelled time, else nullptr
  int64_t time_limit_ns = kNeverNs;
  const std::atomic<bool>* cancel = nullptr;  // polled at each position
  std::function<void(size_t done)> progress;  // windows
};

// Takes a window's row; false: no room, which ends the scoring.
using QualitySink = std::function<bool(QualityRow row)>;

struct QualityResult {
  enum class End { kScoredAll, kTimeLimit, kCancelled, kSinkFull };
  End end = End::kScoredAll;
  int64_t duration_ns = 0;
  int64_t steps = 0;                      // of the arm
  std::vector<double> attended_by_layer;  // entries read by decode steps, mean over KV heads
  double full_per_layer = 0;              // what a full cache would have read in each layer
};

// The engine that `task` is compared with: the full cache (paged, with memory for `windows` windows
// side by side), whose logits of a step take at most `logits_bytes`.
EngineOptions ReferenceOptions(const ModelConfig& config, const QualityTask& task, int32_t windows,
                               DType kv_dtype, uint64_t logits_bytes);

// Windows side by side that the arm has memory and sequence slots for; 0: not one.
int32_t WindowsSideBySide(InferenceEngine* arm, const QualityTask& task);

// Scores the text: a QualityRow for each window, in order. `reference` was made with
// ReferenceOptions for `side_by_side` windows, `arm` with LogitsMode::kLast. A position counts as
// `dropped` when more tokens were there than max(prefill, the strategy's budget). InvalidArgument
// when the text is too short; Internal when logits are not finite; other errors are the engines'.
// REQUIRES: both engines idle, 1 <= side_by_side <= WindowsSideBySide.
absl::StatusOr<QualityResult> ScoreText(InferenceEngine* reference, InferenceEngine* arm, const QualityTask& task,
                                        int32_t side_by_side, const QualityOptions& options,
                                        const QualitySink& sink);

// Two next-token distributions at one position, `target` being the token that came: sums in nats.
struct PositionScore {
  double nll = 0;
  double reference_nll = 0;
  double kl = 0;  // KL(reference || arm)
  bool top1_match = false;
};

// Computed in double. InvalidArgument when a logit is not finite. REQUIRES: equal sizes > target.
absl::StatusOr<PositionScore> ScorePosition(std::span<const float> reference_logits,
                                            std::span<const float> arm_logits, int32_t target);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_QUALITY_H_
