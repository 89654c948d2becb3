// The device side that outlives a trial: the backend, and the model whose weights lie on it. Trials
// that ask for the same ones get them warm; a different backend drops the model first.
//
// One thread.
#ifndef KVSWEEP_WORKER_RUNNER_WARM_DEVICE_H_
#define KVSWEEP_WORKER_RUNNER_WARM_DEVICE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "proto/experiment.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/tokenizer.h"

namespace kvsweep {

// What makes two backends the same.
struct BackendOptions {
  int threads = 1;
  bool batch_invariant = false;
  uint64_t stream_seed = 0;
  std::string profile;  // of modelled time; empty: real time
  // Modelled time of random weights, whose numbers mean nothing: they are not computed.
  bool costs_alone = false;
  bool operator==(const BackendOptions&) const = default;
};

// Makes the backend that this program was linked with.
using BackendFactory =
    std::function<absl::StatusOr<std::unique_ptr<Backend>>(const BackendOptions&)>;

class WarmDevice {
 public:
  // `threads`: of the CPU backend when a spec leaves it open.
  WarmDevice(BackendFactory factory, int threads);

  // The options that a spec's engine settings come down to on this machine; of a measurement that
  // nobody asks for numbers, `weights` too.
  BackendOptions OptionsOf(const Engine& settings,
                           Model::Weights weights = Model::WEIGHTS_TRAINED) const;

  absl::StatusOr<Backend*> UseBackend(const BackendOptions& options);

  // Whether the device still works: an error of a kernel leaves a CUDA process without one for
  // good. The error says so. Waits for all work.
  absl::Status CheckDevice();

  // The model of `folder`, whose digest must be `reference`'s (checked when it is loaded).
  // FailedPrecondition when it is another one, else the errors of LoadedModel::Load.
  // REQUIRES: a backend is in use.
  absl::StatusOr<const LoadedModel*> UseFolder(const std::string& folder,
                                               const ModelReference& reference);
  // Random weights for a shape of the catalogue, whose positions reach `context_tokens` at least.
  absl::StatusOr<const LoadedModel*> UseShape(const std::string& shape, uint64_t seed,
                                              int32_t context_tokens);

  // The tokenizer of the model in use; an error for random weights and unsupported kinds.
  absl::StatusOr<const Tokenizer*> UseTokenizer();

  // Names the model in use: its digest, or its shape and seed.
  const std::string& model_key() const { return model_key_; }

 private:
  void DropModel();

  BackendFactory factory_;
  int threads_;
  std::unique_ptr<Backend> backend_;
  std::optional<BackendOptions> options_;
  Event alive_;                         // recorded and awaited by CheckDevice
  std::unique_ptr<LoadedModel> model_;  // after the backend: goes before it
  std::string model_key_;               // empty: none
  std::string folder_;                  // of the model in use; empty: random weights
  std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_WARM_DEVICE_H_
