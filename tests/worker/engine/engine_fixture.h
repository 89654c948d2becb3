// What tests of the engine and the strategies share: arms, models, and a batch of requests run to
// the end.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_ENGINE_FIXTURE_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_ENGINE_FIXTURE_H_

#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "kernels/cpu/cpu_backend.h"
#ifdef KVSWEEP_TEST_ON_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif
#include "proto/experiment.pb.h"
#include "worker/engine/batcher.h"
#include "worker/engine/engine.h"

namespace kvsweep {

inline Arm PagedArm(uint32_t block_size = 16) {
  Arm arm;
  arm.set_strategy("paged");
  arm.mutable_paged()->set_block_size(block_size);
  return arm;
}

inline Arm H2oArm(double heavy_ratio, double recent_ratio) {
  Arm arm;
  arm.set_strategy("h2o");
  arm.mutable_h2o()->set_heavy_ratio(heavy_ratio);
  arm.mutable_h2o()->set_recent_ratio(recent_ratio);
  arm.mutable_h2o()->set_preemption(H2o::PREEMPTION_NONE);
  return arm;
}

// Victims wait on the host with all that they keep.
inline Arm SwappingH2oArm(double heavy_ratio, double recent_ratio) {
  Arm arm = H2oArm(heavy_ratio, recent_ratio);
  arm.mutable_h2o()->set_preemption(H2o::PREEMPTION_SWAP);
  return arm;
}

inline Arm StreamingLlmArm(double window_ratio, uint32_t sink_tokens = 4) {
  Arm arm;
  arm.set_strategy("streaming_llm");
  arm.mutable_streaming_llm()->set_window_ratio(window_ratio);
  arm.mutable_streaming_llm()->set_sink_tokens(sink_tokens);
  return arm;
}

struct InfinigenSettings {
  double partial_weight_ratio = 0.3;
  double alpha = 4;
  double max_kv_ratio = 0.2;
  uint32_t n_full_layers = 2;
  bool prefetch = true;
};

inline Arm InfinigenArm(const InfinigenSettings& settings) {
  Arm arm;
  arm.set_strategy("infinigen");
  Infinigen& infinigen = *arm.mutable_infinigen();
  infinigen.set_partial_weight_ratio(settings.partial_weight_ratio);
  infinigen.set_alpha(settings.alpha);
  infinigen.set_max_kv_ratio(settings.max_kv_ratio);
  infinigen.set_n_full_layers(settings.n_full_layers);
  infinigen.set_prefetch(settings.prefetch);
  infinigen.set_calibration_tokens(256);
  infinigen.set_capacity(1);
  return arm;
}

// InfiniGen that fetches everything: the full cache by another way.
inline Arm AmpleInfinigenArm() {
  return InfinigenArm({.alpha = std::numeric_limits<double>::infinity(), .max_kv_ratio = 1});
}

// The backend under test: this program's.
inline std::unique_ptr<Backend> MakeBackend(const CpuBackendOptions& options = {.threads = 2}) {
#ifdef KVSWEEP_TEST_ON_CUDA
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      CreateCudaBackend({.dtype = DType::kF32,
                         .batch_invariant = options.batch_invariant,
                         .device_memory_bytes = options.device_memory_bytes,
                         .host_memory_bytes = options.host_memory_bytes});
#else
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCpuBackend(options);
#endif
  KVSWEEP_CHECK_OK(backend);
  return *std::move(backend);
}

inline std::unique_ptr<LoadedModel> LoadModel(Backend* backend, const std::string& name) {
  absl::StatusOr<std::unique_ptr<LoadedModel>> model =
      LoadedModel::Load(backend, "experiments/models/" + name);
  KVSWEEP_CHECK_OK(model);
  return *std::move(model);
}

inline std::vector<int32_t> RandomIds(Random& random, size_t count, int32_t vocabulary) {
  std::vector<int32_t> ids = {1};
  while (ids.size() < count) {
    ids.push_back(static_cast<int32_t>(3 + random.Uniform(static_cast<uint64_t>(vocabulary - 3))));
  }
  return ids;
}

inline EngineOptions SmallEngine(int32_t max_context) {
  return {.max_sequences = 8,
          .max_batched_tokens = 256,
          .max_context = max_context,
          .device_bytes = uint64_t{256} << 20,
          .host_bytes = uint64_t{256} << 20};
}

struct TestRequest {
  std::vector<int32_t> prompt;
  int32_t output_tokens = 1;
  int32_t max_tokens = 0;  // 0: output_tokens
  int32_t arrival_step = 0;
};

struct TestRun {
  std::vector<std::vector<int32_t>> outputs;  // by request
  std::vector<double> attended;               // by request, summed over decode steps and layers
  std::vector<int32_t> preemptions;           // by request
  TierBytes peak;
  LinkBytes traffic;
  int32_t steps = 0;
  int32_t steps_ahead = 0;  // of these, begun while another was under way
};

// Called after each executed step.
using StepHook = std::function<void(const StepPlan&, const StepResult&)>;

struct TestManner {
  // Each step begins before the one before is finished, unless the strategy needs the host.
  bool run_ahead = false;
  bool capture_first = false;  // all graphs, and none later
};

// Serves the requests, checking the planner's invariants after every step.
inline absl::StatusOr<TestRun> RunRequests(Backend* backend, const LoadedModel& model,
                                           const Arm& arm, const EngineOptions& options,
                                           const std::vector<TestRequest>& requests,
                                           const std::vector<int32_t>& calibration,
                                           const StepHook& hook = {},
                                           const TestManner& manner = {}) {
  absl::StatusOr<std::unique_ptr<InferenceEngine>> created =
      InferenceEngine::Create(backend, &model, arm, options, calibration);
  if (!created.ok()) return created.status();
  InferenceEngine& engine = **created;
  Batcher batcher({.max_sequences = options.max_sequences,
                   .max_batched_tokens = options.max_batched_tokens,
                   .chunk_alignment = engine.chunk_alignment(),
                   .budget = {options.device_bytes, options.host_bytes}},
                  &engine.manager());
  if (manner.capture_first) {
    if (absl::Status status = engine.CaptureSteps(); !status.ok()) return status;
  }
  const size_t captured = engine.captured_graphs();
  TestRun run;
  run.outputs.resize(requests.size());
  run.attended.resize(requests.size());
  size_t arrived = 0;
  auto arrive = [&] {
    while (arrived < requests.size() && requests[arrived].arrival_step <= run.steps) {
      const TestRequest& request = requests[arrived];
      const auto id = static_cast<RequestId>(arrived++);
      engine.AddSequence(id, request.prompt, static_cast<int32_t>(request.prompt.size()));
      const RequestShape shape{static_cast<int32_t>(request.prompt.size()),
                               std::max(request.max_tokens, request.output_tokens)};
      KVSWEEP_CHECK(batcher.Add(id, shape, request.output_tokens))
          << "request " << id << " cannot fit";
    }
  };
  std::deque<std::vector<RequestId>> ended;  // by the steps under way
  const auto read_outputs = [&] {
    for (const RequestId id : ended.front()) {
      const std::span<const int32_t> tokens = engine.Tokens(id);
      const TestRequest& request = requests[static_cast<size_t>(id)];
      const auto first = static_cast<std::ptrdiff_t>(request.prompt.size());
      run.outputs[static_cast<size_t>(id)].assign(tokens.begin() + first, tokens.end());
      engine.RemoveSequence(id);
    }
    ended.pop_front();
  };
  const auto finish = [&]() -> absl::Status {
    const absl::StatusOr<StepResult> result = engine.Finish();
    if (!result.ok()) return result.status();
    for (size_t i = 0; i < result->plan->decode.size(); ++i) {
      run.attended[static_cast<size_t>(result->plan->decode[i].request)] +=
          engine.CollectDecode(i, {}).attended;
    }
    if (hook) hook(*result->plan, *result);
    return absl::OkStatus();
  };
  const auto finish_early = [&]() -> absl::Status {
    while (engine.steps_under_way() > 0) {
      if (absl::Status status = finish(); !status.ok()) return status;
      read_outputs();
    }
    return absl::OkStatus();
  };
  for (arrive(); !batcher.idle() || arrived < requests.size(); arrive(), ++run.steps) {
    if (engine.strategy().NeedsHost()) {
      if (absl::Status status = finish_early(); !status.ok()) return status;
    }
    const StepPlan& plan = batcher.Plan();
    bool ahead = false;
    if (!plan.empty()) {
      if (engine.strategy().NeedsHost()) {
        if (absl::Status status = finish_early(); !status.ok()) return status;
      }
      run.steps_ahead += engine.steps_under_way();
      if (absl::Status status = engine.Begin(plan); !status.ok()) return status;
      ahead = manner.run_ahead && !engine.strategy().NeedsHost();
      while (engine.steps_under_way() > 1) {
        if (absl::Status status = finish(); !status.ok()) return status;
        read_outputs();
      }
      if (!ahead) {
        if (absl::Status status = finish(); !status.ok()) return status;
      }
    }
    const StepEffects& effects = batcher.Complete();
    ended.push_back(effects.finished);
    if (!ahead) read_outputs();
    batcher.CheckInvariants();
    const TierBytes reserved = engine.manager().ReservedBytes();
    KVSWEEP_CHECK_LE(reserved.device, options.device_bytes);
    KVSWEEP_CHECK_LE(reserved.host, options.host_bytes);
    run.peak.device = std::max(run.peak.device, reserved.device);
    run.peak.host = std::max(run.peak.host, reserved.host);
    KVSWEEP_CHECK_LT(run.steps, 1'000'000) << "no end in sight";
  }
  if (absl::Status status = finish_early(); !status.ok()) return status;
  KVSWEEP_CHECK(!manner.capture_first || engine.captured_graphs() == captured);
  run.traffic = engine.CacheTraffic().value();
  for (size_t i = 0; i < requests.size(); ++i) {
    run.preemptions.push_back(batcher.tally(static_cast<RequestId>(i)).preemptions);
  }
  return run;
}

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_ENGINE_FIXTURE_H_
