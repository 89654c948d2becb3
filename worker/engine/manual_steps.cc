#include "worker/engine/manual_steps.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace kvsweep {

int32_t SequencesSideBySide(InferenceEngine* engine, const RequestShape& shape, int32_t most) {
  const EngineOptions& options = engine->options();
  const TierBytes fixed = engine->manager().FixedBytes();
  const TierBytes peak = engine->manager().PeakBytes(shape);
  int64_t sequences = std::min(options.max_sequences, most);
  const auto bound = [&sequences](uint64_t budget, uint64_t fixed_bytes, uint64_t peak_bytes) {
    if (fixed_bytes > budget) sequences = 0;
    if (peak_bytes == 0) return;
    sequences = std::min<int64_t>(
        sequences, static_cast<int64_t>((budget - std::min(budget, fixed_bytes)) / peak_bytes));
  };
  bound(options.device_bytes, fixed.device, peak.device);
  bound(options.host_bytes, fixed.host, peak.host);
  return static_cast<int32_t>(sequences);
}

absl::Status HoldTokens(InferenceEngine* engine, RequestId sequence, const RequestShape& shape,
                        int32_t held, int32_t more) {
  KvManager& manager = engine->manager();
  const bool fits =
      held == 0 ? manager.Admit(sequence, shape, more) : manager.Grow(sequence, held + more);
  if (fits) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("no KV memory for token ", held + more,
                                                   " of sequence ", sequence,
                                                   " although its peak fits the budget"));
}

absl::StatusOr<StepResult> PrefillPrompt(InferenceEngine* engine, RequestId sequence,
                                         const RequestShape& shape, const StepObserver& observer) {
  const int32_t alignment = engine->chunk_alignment();
  const int32_t chunk = engine->options().max_batched_tokens / alignment * alignment;
  KVSWEEP_CHECK_GE(chunk, 1);
  for (int32_t row = 0;; row += chunk) {
    const int32_t rows = std::min(chunk, shape.prompt_tokens - row);
    const bool last = row + rows == shape.prompt_tokens;
    RETURN_IF_ERROR(HoldTokens(engine, sequence, shape, row, rows));
    StepPlan plan;
    plan.prefill.push_back({.request = sequence,
                            .slot = sequence,
                            .rows = rows,
                            .start_position = row,
                            .last_chunk = last});
    ASSIGN_OR_RETURN(const StepResult step, engine->Execute(plan));
    if (observer) observer(step);
    if (!last) continue;
    engine->manager().EndPrompt(sequence);
    return step;
  }
}

void RemoveSequence(InferenceEngine* engine, RequestId sequence) {
  engine->manager().Release(sequence);
  engine->RemoveSequence(sequence);
}

}  // namespace kvsweep
