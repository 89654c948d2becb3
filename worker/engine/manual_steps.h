// Steps made by hand, without a batcher, for sequences whose course is known beforehand: what
// quality trials are made of. A sequence's request id is its sequence slot too, and memory for all
// of them was made sure of before (SequencesSideBySide).
//
// One thread.
#ifndef KVSWEEP_WORKER_ENGINE_MANUAL_STEPS_H_
#define KVSWEEP_WORKER_ENGINE_MANUAL_STEPS_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/engine.h"

namespace kvsweep {

// How many sequences of `shape` the engine has memory and slots for side by side, at most `most`;
// 0: not one.
int32_t SequencesSideBySide(InferenceEngine* engine, const RequestShape& shape, int32_t most);

// Makes room for `more` tokens of a sequence that holds `held`; admits it when it holds none.
// ResourceExhausted if there is none, which SequencesSideBySide rules out.
absl::Status HoldTokens(InferenceEngine* engine, RequestId sequence, const RequestShape& shape,
                        int32_t held, int32_t more);

// Called after each executed step.
using StepObserver = std::function<void(const StepResult&)>;

// Computes the prompt of a sequence, chunk by chunk, and ends it. Returns the step of the last
// chunk. REQUIRES: its tokens were added.
absl::StatusOr<StepResult> PrefillPrompt(InferenceEngine* engine, RequestId sequence,
                                         const RequestShape& shape, const StepObserver& observer);

// Gives back all that a sequence has.
void RemoveSequence(InferenceEngine* engine, RequestId sequence);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_MANUAL_STEPS_H_
