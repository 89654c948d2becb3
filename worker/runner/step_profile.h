// Steps made once more, after a trial has been measured, to see where their time goes: the prompts
// of a batch like the trial's mean one, then decode steps of it with every operation noted.
#ifndef KVSWEEP_WORKER_RUNNER_STEP_PROFILE_H_
#define KVSWEEP_WORKER_RUNNER_STEP_PROFILE_H_

#include <atomic>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "worker/engine/engine.h"
#include "worker/telemetry/time_stack.h"

namespace kvsweep {

struct StepProfileOptions {
  int32_t sequences = 1;          // wished; fewer where memory has no room for so many
  RequestShape shape;             // of each; its max_tokens hold kProfileTokens at least
  std::span<const int32_t> text;  // what prompts are made of
  bool fetches = false;           // the arm brings rows from the host in decode steps
  const std::atomic<bool>* cancel = nullptr;
};

// Tokens that the decode steps of a profile add to each sequence.
inline constexpr int32_t kProfileTokens = 24;

// Lengths are means over steps, on the device's clock.
struct StepProfile {
  int32_t sequences = 0;
  double tokens = 0;       // stored by each sequence
  double step_ns = 0;      // of a decode step as it was measured
  double hidden_ns = 0;    // the same with no row brought from the host: all transfers hidden
  double transfer_ns = 0;  // how long the link was busy in a decode step
  double exposed_ns() const { return step_ns > hidden_ns ? step_ns - hidden_ns : 0; }
  // The parts of a step with all transfers hidden, scaled to its length without notes, and what
  // transfers add to it: adds up to step_ns.
  TimeStack decode;
  TimeStack prefill;  // of the steps that computed the prompts
  int32_t prefill_steps = 0;
};

// REQUIRES: the engine holds no sequence and no step is under way. Leaves it so, its graphs
// dropped. ResourceExhausted when not one sequence fits.
absl::StatusOr<StepProfile> ProfileSteps(Backend* backend, InferenceEngine* engine,
                                         const StepProfileOptions& options);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_STEP_PROFILE_H_
