// The serving loop: carries a schedule of requests out with an engine and a batcher, under a clock.
//
// Each turn pulls the arrivals that are due, plans a step, begins it, and finishes it, or, if it
// may run one step ahead, the step before; then it books what that brought. Latencies count from
// the scheduled arrival to the instant at which the step that brought a token was seen to be done.
// In real time the loop sleeps when nothing runs; in modelled time the clock is simulated, jumps to
// the next arrival, and moves by what each step lasts on the device profile, so the same schedule
// always gives the same rows.
//
// A session's next turn arrives when the turn before has ended and its person has thought; its
// prompt begins with all that was said, the engine's own output included.
//
// One thread. The engine never waits for whoever takes the rows.
#ifndef KVSWEEP_WORKER_ENGINE_SERVE_H_
#define KVSWEEP_WORKER_ENGINE_SERVE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "proto/experiment.pb.h"
#include "worker/engine/engine.h"

namespace kvsweep {

// One request of the schedule.
struct ServeRequest {
  int64_t arrival_ns = 0;    // since time 0 of the measurement; of a first turn that waits for none
  uint32_t after_ended = 0;  // above 0: arrives when so many sessions have ended
  int64_t think_ns = 0;      // a later turn: from the end of the turn before to the arrival
  int32_t prompt_tokens = 0;
  int32_t history_tokens = 0;  // of these, what the turn before left: its prompt and its output
  int32_t output_tokens = 0;   // replayed length
  int32_t max_tokens = 0;      // what the strategy may know
  uint32_t session = 0;
  uint32_t turn = 0;      // above 0: goes on from the request that stands before it
  bool last_turn = true;  // its end ends the session
  // Above 0: a further sample of the prompt of the request that stands so many places before it;
  // comes with that one, equal in all but its first token. Where memory can be forked, the prompt
  // is computed once. A session with samples has one turn.
  uint32_t sample = 0;
};

// A schedule, borrowed.
struct ServeSchedule {
  // First turns in order of arrival, each followed by its session's further turns.
  std::span<const ServeRequest> requests;
  // Writes the prompt of request `index` behind its history, prompt_tokens - history_tokens tokens.
  std::function<void(size_t index, std::span<int32_t> prompt)> copy_prompt;
  // Arrivals do not depend on the service: a queue that keeps growing means overload.
  bool open_loop = true;
};

// Takes a row as its request ends. Must not block; false: no room, which ends the serving.
using RequestSink = std::function<bool(RequestRow row)>;

struct ServeOptions {
  Clock* clock = nullptr;
  SimulatedClock* modelled = nullptr;  // the same clock in modelled time, else nullptr
  int64_t time_limit_ns = kNeverNs;    // from time 0
  // In modelled time: an instant of the real clock that ends the load as the limit does.
  const Clock* wall = nullptr;
  int64_t wall_deadline_ns = kNeverNs;
  const std::atomic<bool>* cancel = nullptr;  // polled each turn, at least every 20 ms of real time
  std::function<void(size_t done)> progress;  // after each turn in which requests were done
  size_t max_samples = 200;                   // of each series
  // A step is planned and begun while the step before is under way, so that a device that works by
  // itself need not wait for the host; what arrives meanwhile then waits for one step more. The
  // outputs are the same. Not in modelled time.
  bool run_ahead = false;
};

// State at the end of a step.
struct StepSample {
  int64_t time_ns = 0;  // since time 0
  int64_t step_ns = 0;  // from the end of the step before or, if it began later, from its beginning
  TierBytes reserved;
  uint64_t live_device_bytes = 0;
  int32_t running = 0;
  int32_t waiting = 0;
};

// Whether a queue grew, rather than had a bad moment: whether clearly more waited in the last third
// of `requests` arrivals than in either earlier one. Chance moves such means by some root of the
// count, load beyond what is served by a part of it; so the margin is a multiple of the root, and
// more requests tell apart what is closer to the limit. Of 200 Poisson arrivals it says so of 4 %
// at nine tenths of what can be served, of 60 % at 1.2 times and of 95 % at 1.5 times that
// (serve_test).
bool QueueGrows(const std::array<double, 3>& waiting_by_third, size_t requests);

// How and with what figures a serving ended.
struct ServeResult {
  enum class End { kServedAll, kTimeLimit, kCancelled, kSinkFull };
  End end = End::kServedAll;

  int64_t first_step_ns = 0;  // when it began
  int64_t duration_ns = 0;
  int32_t completed = 0;
  int32_t infeasible = 0;
  int32_t unfinished = 0;

  // Requests that waited when one came, in the mean of the first, second and last third of them;
  // and the verdict, of an open loop that served all.
  std::array<double, 3> waiting_by_third = {0, 0, 0};
  bool queue_grows = false;

  int64_t steps = 0;
  int64_t captured_steps = 0;
  int64_t memory_short_steps = 0;   // in which a request left, or could not enter, for lack of it
  uint64_t kv_bytes_to_device = 0;  // over the host link, by the cache
  uint64_t kv_bytes_to_host = 0;
  int64_t prefill_tokens = 0;  // computed, those computed again included
  int64_t decode_tokens = 0;
  int64_t preemptions = 0;
  int64_t recomputed_tokens = 0;
  TierBytes peak;  // reserved
  uint64_t live_device_bytes_peak = 0;
  // Attended fractions (entries read, mean over KV heads, of the tokens so far), summed over
  // decode_tokens.
  std::vector<double> attended_by_layer;

  // How long the device waited for the host before each step that came at once after another, in
  // the order of the steps, and the length of these steps in all; on the device's clock.
  std::vector<float> gap_ns;
  double stepped_ns = 0;

  // Over the steps that only decoded: what the least length of such a step is computed from.
  struct DecodeSteps {
    int64_t steps = 0;
    double ns = 0;        // their length, on the device's clock
    double rows = 0;      // tokens decoded
    double tokens = 0;    // stored by their requests
    double attended = 0;  // entries, as in DecodeCounts
    double fetched = 0;
  };
  DecodeSteps decode_steps;

  // Every k-th step, k being the least power of two that leaves at most max_samples.
  std::vector<StepSample> samples;
};

// Serves the schedule. Every request of it gives exactly one row, unless the sink is full:
// completed or infeasible ones as they end, the rest as unfinished at the end; what would follow an
// infeasible turn is infeasible too. The engine holds no
// sequence afterwards. Request ids are indices into the schedule. An error is the engine's.
// REQUIRES: the engine is idle; no request is longer than its max_context.
absl::StatusOr<ServeResult> ServeLoad(InferenceEngine* engine, const ServeSchedule& schedule,
                                      const ServeOptions& options, const RequestSink& sink);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_SERVE_H_
