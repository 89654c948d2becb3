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
#include <cstddef>
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
  // Attended fractions (entries read, mean over KV heads, of the tokens so far), summed over decode
  // rows, and the number of these.
  std::vector<double> attended_by_layer;
  int64_t decode_rows = 0;
};

// The engine that `task` is compared with: the full cache (paged, with memory for `windows` windows
// side by side), whose logits of a step take at most `logits_bytes`.
EngineOptions ReferenceOptions(const ModelConfig& config, const QualityTask& task, int32_t windows,
                               DType kv_dtype, uint64_t logits_bytes);

// Windows side by side that the arm has memory and sequence slots for; 0: not one.
int32_t WindowsSideBySide(InferenceEngine* arm, const QualityTask& task);

// The full cache's logits at every scored position, kept so that the arms of an experiment pay for
// them once. They belong to one task, number of windows side by side, model and KV format.
class ReferenceLogits {
 public:
  // All positions are there: no reference engine is needed.
  bool complete = false;

  // Makes room for a task's logits, unless they would take more than 512 MiB: then nothing is kept.
  void Begin(const QualityTask& task, int32_t vocabulary);
  // `row` counts the scored positions of a window, from 0.
  void Keep(int32_t window, int32_t row, std::span<const float> logits);
  std::span<const float> Row(int32_t window, int32_t row) const;
  // All rows were given.
  void Finish() { complete = !logits_.empty(); }

 private:
  std::ptrdiff_t Offset(int32_t window, int32_t row) const;

  size_t rows_ = 0;
  size_t vocabulary_ = 0;
  std::vector<float> logits_;  // [windows, rows, V]
};

// Scores the text: a QualityRow for each window, in order, with its sums by eighths of the window.
// `reference` was made with ReferenceOptions for `side_by_side` windows (nullptr if `kept` is
// complete), `arm` with LogitsMode::kLast. A position counts as `dropped` when more tokens were
// there than max(prefill, the strategy's budget). InvalidArgument when the text is too short;
// Internal when logits are not finite; other errors are the engines'.
// REQUIRES: both engines idle, 1 <= side_by_side <= WindowsSideBySide.
absl::StatusOr<QualityResult> ScoreText(InferenceEngine* reference, InferenceEngine* arm,
                                        const QualityTask& task, int32_t side_by_side,
                                        const QualityOptions& options, ReferenceLogits* kept,
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
