#include "worker/runner/step_profile.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/engine/manual_steps.h"

namespace kvsweep {
namespace {

// Decode steps of each kind, after one that may capture and one that finds everything warm.
constexpr int32_t kSteps = 4;
constexpr int32_t kUncounted = 2;
constexpr int32_t kKinds = 4;
static_assert(kKinds * (kSteps + kUncounted) == kProfileTokens);

class Profiler {
 public:
  Profiler(Backend* backend, InferenceEngine* engine, const StepProfileOptions& options)
      : backend_(*backend), engine_(*engine), options_(options) {}

  absl::StatusOr<StepProfile> Run() {
    profile_.sequences = SequencesSideBySide(&engine_, options_.shape, options_.sequences);
    if (profile_.sequences == 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no room to profile a request of ", options_.shape.limit(), " tokens"));
    }
    const absl::Status status = RunSteps();
    backend_.SkipFetches(false);
    backend_.EndProfile();
    for (int32_t id = 0; id < held_; ++id) RemoveSequence(&engine_, id);
    engine_.DropGraphs();
    RETURN_IF_ERROR(status);
    return profile_;
  }

 private:
  absl::Status RunSteps() {
    RETURN_IF_ERROR(Prefill());
    row_ = options_.shape.prompt_tokens;
    profile_.tokens = row_ + kProfileTokens / 2.0;
    ASSIGN_OR_RETURN(profile_.step_ns, DecodeSteps(nullptr));
    profile_.hidden_ns = profile_.step_ns;
    if (options_.fetches) {
      RETURN_IF_ERROR(NotedSteps());
      backend_.SkipFetches(true);
      engine_.DropGraphs();
      ASSIGN_OR_RETURN(profile_.hidden_ns, DecodeSteps(nullptr));
      profile_.hidden_ns = std::min(profile_.hidden_ns, profile_.step_ns);
    }
    RETURN_IF_ERROR(NotedSteps());
    TimeStack& stack = profile_.decode;
    if (stack.total_ns() > 0) stack *= profile_.hidden_ns / stack.total_ns();
    stack[StackPart::kTransfer] += profile_.exposed_ns();
    return absl::OkStatus();
  }

  absl::Status Prefill() {
    backend_.BeginProfile();
    std::vector<int32_t> prompt(static_cast<size_t>(options_.shape.prompt_tokens));
    for (int32_t id = 0; id < profile_.sequences; ++id) {
      // Each begins elsewhere in the text.
      size_t at = static_cast<size_t>(id) * 37;
      for (int32_t& token : prompt) token = options_.text[at++ % options_.text.size()];
      engine_.AddSequence(id, prompt, options_.shape.prompt_tokens);
      held_ = id + 1;
      absl::Status noted;
      const auto note = [&](const StepResult&) {
        const absl::StatusOr<std::vector<OperationTime>> times = backend_.TakeProfile();
        noted.Update(times.status());
        if (!times.ok()) return;
        profile_.prefill += StackOf(*times);
        ++profile_.prefill_steps;
      };
      RETURN_IF_ERROR(PrefillPrompt(&engine_, id, options_.shape, note).status());
      RETURN_IF_ERROR(noted);
      RETURN_IF_ERROR(CheckCancelled());
    }
    backend_.EndProfile();
    if (profile_.prefill_steps > 0) profile_.prefill *= 1.0 / profile_.prefill_steps;
    return absl::OkStatus();
  }

  // Decode steps with every operation noted: fills the decode stack and transfer_ns.
  absl::Status NotedSteps() {
    backend_.BeginProfile();
    engine_.DropGraphs();
    profile_.decode = TimeStack();
    double transfer_ns = 0;
    RETURN_IF_ERROR(DecodeSteps([&](std::span<const OperationTime> times) {
                      profile_.decode += StackOf(times);
                      transfer_ns += TransferNs(times);
                    }).status());
    profile_.transfer_ns = std::max(profile_.transfer_ns, transfer_ns / kSteps);
    backend_.EndProfile();
    engine_.DropGraphs();
    return absl::OkStatus();
  }

  // Mean length of the counted steps, each of whose operations `take` is given, if there is one.
  absl::StatusOr<double> DecodeSteps(
      const std::function<void(std::span<const OperationTime>)>& take) {
    double sum_ns = 0;
    for (int32_t step = 0; step < kUncounted + kSteps; ++step) {
      RETURN_IF_ERROR(CheckCancelled());
      ASSIGN_OR_RETURN(const double step_ns, DecodeStep());
      std::vector<OperationTime> times;
      if (take) {
        ASSIGN_OR_RETURN(times, backend_.TakeProfile());
      }
      if (step < kUncounted) continue;
      sum_ns += step_ns;
      if (take) take(times);
    }
    return sum_ns / kSteps;
  }

  absl::StatusOr<double> DecodeStep() {
    StepPlan plan;
    for (int32_t id = 0; id < profile_.sequences; ++id) {
      RETURN_IF_ERROR(HoldTokens(&engine_, id, options_.shape, row_, 1));
      plan.decode.push_back(
          {.request = id, .slot = id, .first_row = id, .rows = 1, .start_position = row_});
    }
    ++row_;
    ASSIGN_OR_RETURN(const StepResult step, engine_.Execute(plan));
    return step.step_ns;
  }

  absl::Status CheckCancelled() const {
    const bool cancelled =
        options_.cancel != nullptr && options_.cancel->load(std::memory_order_relaxed);
    return cancelled ? absl::CancelledError("cancelled") : absl::OkStatus();
  }

  Backend& backend_;
  InferenceEngine& engine_;
  const StepProfileOptions& options_;
  StepProfile profile_;
  int32_t held_ = 0;  // sequences
  int32_t row_ = 0;   // tokens that each of them holds
};

}  // namespace

absl::StatusOr<StepProfile> ProfileSteps(Backend* backend, InferenceEngine* engine,
                                         const StepProfileOptions& options) {
  KVSWEEP_CHECK_GE(options.shape.max_tokens, kProfileTokens);
  KVSWEEP_CHECK(!options.text.empty());
  return Profiler(backend, engine, options).Run();
}

}  // namespace kvsweep
