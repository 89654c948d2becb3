// One trial, phase by phase: check, load, prepare, warm up, measure, profile, drain, summarise.
// Whatever happens, its records begin with a TrialStart and end with a TrialOutcome that says how
// it went.
#ifndef KVSWEEP_WORKER_RUNNER_TRIAL_H_
#define KVSWEEP_WORKER_RUNNER_TRIAL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "experiments/workload.h"
#include "proto/runner.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/passkey.h"
#include "worker/engine/quality.h"
#include "worker/engine/serve.h"
#include "worker/runner/input_cache.h"
#include "worker/runner/node.h"
#include "worker/runner/recorder.h"
#include "worker/runner/step_profile.h"
#include "worker/runner/warm_device.h"
#include "worker/telemetry/device_sampler.h"
#include "worker/telemetry/time_stack.h"

namespace kvsweep {

// What the full cache said to the latest quality question, for the arms that are asked the same.
struct KnownReference {
  std::string question;  // all that its answers depend on
  ReferenceLogits logits;
  std::vector<std::vector<int32_t>> passkeys;  // its answer to each prompt, so far
};

// What a trial runs in; all of it outlives the trial.
struct TrialContext {
  WarmDevice* device = nullptr;
  InputCache* inputs = nullptr;
  KnownReference* reference = nullptr;
  Recorder* recorder = nullptr;
  const std::atomic<bool>* cancel = nullptr;
  const Node* node = nullptr;             // nullptr: nothing is known of it
  const Clock* wall = &RealClock::Get();  // bounds loads whose time is modelled
  std::string slot_device_class;  // as the runner introduced itself; empty: the backend's own
};

// How an error of a phase is told: memory is `oom` with the two figures that the message names
// ("asked N", "available N"), what was asked for and cannot be is `infeasible`, a deadline is
// `timeout`, the rest (a failed operation of the backend) `crashed`.
TrialOutcome OutcomeOfError(const absl::Status& status);

// Runs one trial on the calling thread. Records go to the recorder; the caller calls Finish.
class Trial {
 public:
  Trial(const RunTrial& request, const TrialContext& context);

  void Run();

 private:
  // The phases. An error ends the trial with OutcomeOfError; a verdict that is no error is set in
  // outcome_.
  absl::Status Check();
  absl::Status Load();
  absl::Status Prepare();
  absl::Status WarmUp();
  absl::Status Measure();
  absl::Status Profile();
  absl::Status Drain();
  absl::Status Summarise();

  bool is_quality() const { return request_.spec().kind() == TrialSpec::KIND_QUALITY; }
  uint32_t samples() const { return std::max(request_.spec().load().samples(), 1u); }
  // Where the host and the device are one, it would gain nothing; modelled time has no host.
  bool runs_ahead() const {
    return request_.spec().engine().run_ahead() && backend_->info().beside_host && !is_modelled();
  }
  bool is_modelled() const { return request_.spec().engine().time() == Engine::TIME_MODELLED; }
  Clock& clock() { return is_modelled() ? static_cast<Clock&>(modelled_clock_) : RealClock::Get(); }
  SimulatedClock* modelled() { return is_modelled() ? &modelled_clock_ : nullptr; }

  absl::StatusOr<std::span<const int32_t>> TextIds(const std::string& path);
  absl::Status LoadWorkload();
  absl::Status LoadQualityTask();
  absl::Status LoadCalibration();
  EngineOptions ArmOptions() const;
  absl::Status ServeWarmup();
  absl::Status CaptureSteps();
  absl::Status MeasureLoad();
  absl::Status PrepareReference();
  absl::Status MeasureQuality();
  absl::Status MeasurePasskeys();
  void JudgeQuality(absl::string_view what, size_t of);
  const char* OfWhichClock(int64_t duration_ns) const;
  void JudgeLoad();
  void SummariseLoad();
  void SummariseHost();
  void SummariseLayers(std::span<const double> attended_by_layer, int64_t decode_rows);

  // trial_telemetry.cc
  std::unique_ptr<DeviceSampler> SampleDevice() const;
  std::vector<int32_t> ProfileText(int32_t tokens) const;
  void SummariseDevice();
  void SummariseSteps();
  std::optional<DeviceProfile> Machine() const;
  double PredictedDecodeStepNs(const DeviceProfile& machine) const;
  void EmitStack(absl::string_view prefix, const TimeStack& stack);
  void AddNodeFacts(TrialStart* start) const;

  void EnterPhase(absl::string_view phase, uint64_t total);
  absl::Status CheckPreparation() const;
  void ReportProgress(uint64_t done);
  Record NewRecord() const;
  void EmitStart();
  void EmitCounter(absl::string_view name, int32_t layer, double value);
  void EmitSample(absl::string_view name, int64_t time_ns, double value);
  void EmitOutcome();
  void AddFacts(TrialStart* start) const;

  const RunTrial& request_;
  const TrialContext& context_;
  SimulatedClock modelled_clock_;
  int64_t begun_ns_ = 0;  // real time
  int64_t start_ns_ = 0;  // from there to the first step
  int64_t capture_ns_ = 0;
  size_t captured_graphs_ = 0;  // before the measurement
  Progress progress_;

  Backend* backend_ = nullptr;
  const LoadedModel* model_ = nullptr;
  std::vector<int32_t> calibration_;
  std::unique_ptr<Workload> workload_;
  std::unique_ptr<Workload> warmup_;
  QualityTask quality_;
  std::vector<PasskeyPrompt> passkeys_;
  int32_t side_by_side_ = 0;           // windows
  int32_t passkeys_side_by_side_ = 0;  // prompts
  DType kv_dtype_ = DType::kF32;
  std::unique_ptr<InferenceEngine> engine_;
  // Of a quality trial, unless its answers are known: the full cache for the windows and for the
  // pass keys.
  std::unique_ptr<InferenceEngine> reference_;
  std::unique_ptr<InferenceEngine> passkey_reference_;

  ServeResult served_;
  std::vector<CacheStrategy::Figure> figures_;
  QualityResult scored_;
  DeviceUse device_use_;                // during the measurement
  std::optional<StepProfile> profile_;  // of steps made after it
  bool started_ = false;
  TrialOutcome outcome_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_TRIAL_H_
