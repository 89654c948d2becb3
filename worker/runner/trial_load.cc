// The load phase of a trial: model, texts, traces, and what is drawn from them.

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "worker/engine/token_file.h"
#include "worker/runner/trial.h"
#include "worker/strategies/memory_model.h"

namespace kvsweep {
namespace {

// Ids that a strategy may calibrate itself on: the most that a spec can ask for.
constexpr size_t kCalibrationIds = 65'536;
constexpr uint64_t kCalibrationSeed = 0x63616c6962;

}  // namespace

// Token files need no tokenizer, texts do.
absl::StatusOr<std::span<const int32_t>> Trial::TextIds(const std::string& path) {
  if (IsTokenFile(path)) {
    return context_.inputs->TokenIds(request_, path, model_->config().vocabulary);
  }
  ASSIGN_OR_RETURN(const Tokenizer* tokenizer, context_.device->UseTokenizer());
  ASSIGN_OR_RETURN(
      const std::span<const int32_t> ids,
      context_.inputs->TextIds(request_, path, *tokenizer, context_.device->model_key()));
  RETURN_IF_ERROR(CheckTokenIds(ids, model_->config().vocabulary));
  return ids;
}

absl::Status Trial::Load() {
  context_.inputs->Trim();
  const TrialSpec& spec = request_.spec();
  ASSIGN_OR_RETURN(backend_, context_.device->UseBackend(context_.device->OptionsOf(
                                 spec.engine(), spec.model().weights())));
  const std::string& backend = backend_->info().backend;
  const Engine::Backend asked = spec.engine().backend();
  if (asked != Engine::BACKEND_AUTO && (asked == Engine::BACKEND_CUDA) != (backend == "cuda")) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine.backend: this runner has the ", backend, " backend; ask for auto"));
  }
  if (spec.model().has_shape()) {
    ASSIGN_OR_RETURN(model_,
                     context_.device->UseShape(spec.model().shape(), spec.model().weights_seed(),
                                               static_cast<int32_t>(NamedContext(spec))));
  } else {
    ASSIGN_OR_RETURN(model_,
                     context_.device->UseFolder(request_.model_path(), spec.model_reference()));
  }
  kv_dtype_ = KvDtype(spec.kv(), model_->config().dtype, backend_->info().activation_dtype);
  RETURN_IF_ERROR(is_quality() ? LoadQualityTask() : LoadWorkload());
  RETURN_IF_ERROR(LoadCalibration());
  return CheckPreparation();
}

absl::Status Trial::LoadWorkload() {
  const kvsweep::Load& load = request_.spec().load();
  const ModelConfig& config = model_->config();
  WorkloadInputs inputs{.context_tokens = static_cast<uint32_t>(config.max_positions),
                        .vocabulary = static_cast<uint32_t>(config.vocabulary),
                        .bos_id = config.bos_id};
  if (load.has_text()) {
    ASSIGN_OR_RETURN(inputs.text_ids, TextIds(load.text()));
  }
  if (load.lengths().has_trace()) {
    ASSIGN_OR_RETURN(inputs.trace, context_.inputs->FindTrace(request_, load.lengths().trace()));
  }
  const Seeds& seeds = request_.spec().seeds();
  ASSIGN_OR_RETURN(Workload workload, Workload::Build(load, seeds, inputs));
  workload_ = std::make_unique<Workload>(std::move(workload));
  const uint32_t requests = request_.spec().engine().warmup_requests();
  if (requests == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(Workload warmup, Workload::BuildWarmup(load, seeds, inputs, requests));
  warmup_ = std::make_unique<Workload>(std::move(warmup));
  return absl::OkStatus();
}

absl::Status Trial::LoadQualityTask() {
  const TrialSpec& spec = request_.spec();
  const Quality& quality = spec.quality();
  const std::string& text = quality.has_text() ? quality.text() : spec.load().text();
  ASSIGN_OR_RETURN(quality_.text_ids, TextIds(text));
  quality_.bos_id = model_->config().bos_id;
  quality_.context = static_cast<int32_t>(quality.context());
  quality_.prefill = static_cast<int32_t>(quality.prefill());
  quality_.windows = QualityWindows(quality.text_tokens(), quality_.context, quality_.prefill);
  if (quality.has_passkey()) {
    ASSIGN_OR_RETURN(const Tokenizer* tokenizer, context_.device->UseTokenizer());
    ASSIGN_OR_RETURN(passkeys_, MakePasskeyPrompts(quality.passkey(), *tokenizer, quality_.text_ids,
                                                   quality_.bos_id, quality_.context));
    for (const PasskeyPrompt& prompt : passkeys_) {
      RETURN_IF_ERROR(CheckTokenIds(prompt.tokens, model_->config().vocabulary));
      RETURN_IF_ERROR(CheckTokenIds(prompt.answer, model_->config().vocabulary));
    }
  }
  return absl::OkStatus();
}

// What strategies prepare themselves on: the second half of the load's text (of the scored one, if
// that is all there is), away from the windows that quality is measured on; without a text, random
// ids.
absl::Status Trial::LoadCalibration() {
  const ModelConfig& config = model_->config();
  if (config.bos_id.has_value()) calibration_.push_back(*config.bos_id);
  std::span<const int32_t> text = quality_.text_ids;
  const kvsweep::Load& load = request_.spec().load();
  if (load.has_text()) {
    ASSIGN_OR_RETURN(text, TextIds(load.text()));
  }
  const size_t count = std::min(kCalibrationIds, static_cast<size_t>(config.max_positions));
  if (!text.empty()) {
    text = text.subspan(text.size() / 2);
    const size_t taken = std::min(text.size(), count - calibration_.size());
    calibration_.insert(calibration_.end(), text.begin(),
                        text.begin() + static_cast<std::ptrdiff_t>(taken));
    return absl::OkStatus();
  }
  Random random(kCalibrationSeed);
  while (calibration_.size() < count) {
    calibration_.push_back(
        static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(config.vocabulary))));
  }
  return absl::OkStatus();
}

}  // namespace kvsweep
