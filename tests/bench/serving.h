#ifndef KVSWEEP_TESTS_BENCH_SERVING_H_
#define KVSWEEP_TESTS_BENCH_SERVING_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/measure.h"
#include "proto/experiment.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/serve.h"

// Requests through the engine and the serving loop as trials run them: admission, batching,
// sampling and bookkeeping are inside what is timed.

namespace kvsweep {

// Equal requests that all arrive at once, under one arm with as much memory as they need.
struct ServedLoad {
  Arm arm;  // defaults are filled in
  int64_t rows = 1;
  int64_t input = 512;
  int64_t output = 128;
  int64_t max_batched_tokens = 2048;
  bool prefilled = false;  // prompts count as computed (prefilled.h)
};

// An engine that is ready for a load, and the load.
class LoadServer {
 public:
  // Backend and model must outlive it. Errors as of InferenceEngine::Create.
  static absl::StatusOr<std::unique_ptr<LoadServer>> Create(Backend* backend,
                                                            const LoadedModel* model,
                                                            ServedLoad load);

  // Serves all requests once, ahead of the device where that works beside the host. InternalError
  // if one did not complete.
  absl::StatusOr<ServeResult> Serve(const RequestSink& sink);

  InferenceEngine& engine() { return *engine_; }

 private:
  LoadServer(Backend* backend, const LoadedModel* model, ServedLoad load)
      : backend_(backend), model_(*model), load_(std::move(load)) {}
  absl::Status MakeEngine();

  Backend* backend_;
  const LoadedModel& model_;
  ServedLoad load_;
  std::unique_ptr<InferenceEngine> engine_;
};

// Decode steps of `rows` requests whose caches hold about `context` tokens.
struct DecodeQuestion {
  Arm arm;
  int64_t rows = 1;
  int64_t context = 1024;
  int64_t steps = 32;         // of one serving
  bool real_prompts = false;  // computed, not taken as computed
};

struct ServedSteps {
  Timing timing;              // of one step: from token to token, as a client sees it
  double tokens = 0;          // stored, of each request, mean over the timed steps
  double first_token_ns = 0;  // of the last request, from its arrival
  Timing gap;            // for which the device waited for the host between steps, on its own clock
  double gap_share = 0;  // of these and the steps together
};

// Serves until the steps' median stands or the rule's time is up; with real prompts once.
absl::StatusOr<ServedSteps> TimeDecode(Backend* backend, const LoadedModel* model,
                                       const DecodeQuestion& question, const StopRule& rule);

// The whole load, from the arrivals to the last token; `rule.least_samples` servings at least,
// after one that warms up.
absl::StatusOr<Timing> TimeServing(LoadServer* server, const RequestSink& sink,
                                   const StopRule& rule);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_SERVING_H_
