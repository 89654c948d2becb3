#include "worker/runner/warm_device.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "experiments/files.h"
#include "worker/engine/shape_catalogue.h"

namespace kvsweep {

WarmDevice::WarmDevice(BackendFactory factory, int threads)
    : factory_(std::move(factory)), threads_(threads) {}

BackendOptions WarmDevice::OptionsOf(const Engine& settings, Model::Weights weights) const {
  const bool modelled = settings.time() == Engine::TIME_MODELLED;
  return {.threads = settings.threads() > 0 ? static_cast<int>(settings.threads()) : threads_,
          .batch_invariant = settings.batch_invariant(),
          .stream_seed = settings.stream_seed(),
          .profile = modelled ? settings.device_profile() : std::string(),
          .costs_alone = modelled && weights == Model::WEIGHTS_RANDOM};
}

absl::StatusOr<Backend*> WarmDevice::UseBackend(const BackendOptions& options) {
  if (backend_ != nullptr && options_ == options) return backend_.get();
  DropModel();
  backend_.reset();
  ASSIGN_OR_RETURN(backend_, factory_(options));
  options_ = options;
  alive_ = backend_->CreateEvent();
  return backend_.get();
}

absl::Status WarmDevice::CheckDevice() {
  if (backend_ == nullptr) return absl::OkStatus();
  // What earlier work left behind has been told by whoever waited for it.
  backend_->WaitAll().IgnoreError();
  backend_->RecordEvent(alive_, Stream::kCompute);
  return Annotate(backend_->Wait(alive_), "the device is lost to this process");
}

void WarmDevice::DropModel() {
  tokenizer_.reset();
  model_.reset();
  model_key_.clear();
  folder_.clear();
}

absl::StatusOr<const LoadedModel*> WarmDevice::UseFolder(const std::string& folder,
                                                         const ModelReference& reference) {
  KVSWEEP_CHECK(backend_ != nullptr);
  const std::string key = absl::StrCat(folder, " ", absl::BytesToHexString(reference.digest()));
  if (model_key_ == key) return model_.get();
  DropModel();
  if (!reference.digest().empty()) {
    ASSIGN_OR_RETURN(const ModelReference found, DescribeModelFolder(folder));
    if (found.digest() != reference.digest()) {
      return absl::FailedPreconditionError(
          absl::StrCat("model.path: ", folder, " is not the model that was submitted (digest ",
                       absl::BytesToHexString(found.digest()), ", not ",
                       absl::BytesToHexString(reference.digest()), ")"));
    }
  }
  ASSIGN_OR_RETURN(model_, LoadedModel::Load(backend_.get(), folder));
  model_key_ = key;
  folder_ = folder;
  return model_.get();
}

absl::StatusOr<const LoadedModel*> WarmDevice::UseShape(const std::string& shape, uint64_t seed,
                                                        int32_t context_tokens) {
  KVSWEEP_CHECK(backend_ != nullptr);
  ASSIGN_OR_RETURN(ModelConfig config, FindShape(shape));
  ExtendPositions(context_tokens, &config);
  const std::string key = absl::StrCat("random ", shape, " ", seed, " ", config.max_positions);
  if (model_key_ == key) return model_.get();
  DropModel();
  ASSIGN_OR_RETURN(model_, LoadedModel::Random(backend_.get(), config, seed));
  model_key_ = key;
  return model_.get();
}

absl::StatusOr<const Tokenizer*> WarmDevice::UseTokenizer() {
  KVSWEEP_CHECK(model_ != nullptr);
  if (tokenizer_ == nullptr) {
    if (folder_.empty()) {
      return absl::InvalidArgumentError(
          "load.text: random weights have no tokenizer; leave the text out, or give token ids "
          "(.npy, .u16)");
    }
    ASSIGN_OR_RETURN(tokenizer_, LoadTokenizer(folder_));
  }
  return tokenizer_.get();
}

}  // namespace kvsweep
