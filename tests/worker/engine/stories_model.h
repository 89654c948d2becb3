// The stories260K model on a CPU backend, for tests that run an engine.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_STORIES_MODEL_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_STORIES_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/file.h"
#include "kernels/cpu/cpu_backend.h"
#include "worker/engine/engine.h"

namespace kvsweep {

struct StoriesModel {
  // With a profile of modelled time, or "" for real time.
  explicit StoriesModel(const std::string& profile) {
    CpuBackendOptions options{.threads = 1, .batch_invariant = true};
    if (!profile.empty()) options.modelled = *FindDeviceProfile(profile);
    backend = *CreateCpuBackend(options);
    model = *LoadedModel::Load(backend.get(), "experiments/models/stories260K");
  }

  std::unique_ptr<InferenceEngine> MakeEngine(const Arm& arm, const EngineOptions& options,
                                              std::span<const int32_t> calibration = {}) {
    auto engine = InferenceEngine::Create(backend.get(), model.get(), arm, options, calibration);
    KVSWEEP_CHECK_OK(engine);
    return *std::move(engine);
  }

  std::unique_ptr<Backend> backend;
  std::unique_ptr<LoadedModel> model;
};

// The 64 rows of 512 ids that were drawn from the model, each beginning with BOS.
inline std::vector<int32_t> StoriesSamples() {
  const std::string bytes =
      *ReadFile("experiments/models/stories260K/samples_64x512.u16", int64_t{1} << 20);
  std::vector<int32_t> ids;
  for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
    ids.push_back(static_cast<uint8_t>(bytes[i]) | static_cast<uint8_t>(bytes[i + 1]) << 8);
  }
  return ids;
}

inline Arm PagedArm() {
  Arm arm;
  arm.set_name("paged");
  arm.set_strategy("paged");
  arm.mutable_paged()->set_block_size(16);
  arm.mutable_paged()->set_watermark(0);
  return arm;
}

inline Arm H2oArm(double heavy, double recent, BudgetBase base, uint32_t budget_tokens) {
  Arm arm;
  arm.set_name("h2o");
  arm.set_strategy("h2o");
  H2o* h2o = arm.mutable_h2o();
  h2o->set_heavy_ratio(heavy);
  h2o->set_recent_ratio(recent);
  h2o->set_budget_base(base);
  h2o->set_budget_tokens(budget_tokens);
  h2o->set_preemption(H2o::PREEMPTION_NONE);
  return arm;
}

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_STORIES_MODEL_H_
