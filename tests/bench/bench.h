#ifndef KVSWEEP_TESTS_BENCH_BENCH_H_
#define KVSWEEP_TESTS_BENCH_BENCH_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "kernels/limits.h"
#include "kernels/measure.h"
#include "tests/bench/cases.h"
#include "tests/bench/results.h"
#include "worker/engine/engine.h"

// What measurements share: a backend, the limits, the model in use; and how a row is measured.

namespace kvsweep {

using BenchBackendFactory =
    std::function<absl::StatusOr<std::unique_ptr<Backend>>(bool batch_invariant)>;

class Bench {
 public:
  Bench(BenchBackendFactory factory, StopRule rule) : factory_(std::move(factory)), rule_(rule) {}

  // The backend in one of its modes. The other mode's goes, and with it the model.
  absl::StatusOr<Backend*> Use(bool batch_invariant = false);
  // Random weights of a shape of the catalogue (or of a model folder's config), on the backend in
  // use, with positions for so many tokens. REQUIRES: Use has been called.
  absl::StatusOr<const LoadedModel*> UseModel(const std::string& name, int64_t tokens);

  const StopRule& rule() const { return rule_; }
  MachineLimits& limits() { return limits_; }
  Peers& peers() { return peers_; }

 private:
  BenchBackendFactory factory_;
  StopRule rule_;
  MachineLimits limits_;
  Peers peers_;
  bool batch_invariant_ = false;  // of backend_
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LoadedModel> model_;  // after the backend: goes before it
  std::string model_name_;
};

// A catalogue name, or a model folder.
absl::StatusOr<ModelConfig> FindBenchModel(const std::string& name);

// Times one point of a kernel's case on the plain backend: measured in microseconds, floor and
// ratio by the limits. Axes that `point` leaves out have the first of their defaults.
absl::Status TimeKernel(Bench& bench, const std::string& kernel,
                        const std::vector<std::pair<std::string, int64_t>>& point, ResultRow* row);

// Times a case that is prepared already.
absl::Status TimePrepared(Backend& backend, const StopRule& rule, const DeviceProfile& limits,
                          absl::StatusOr<PreparedCase> prepared, ResultRow* row);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_BENCH_H_
