#include "tests/bench/bench.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "worker/engine/shape_catalogue.h"

namespace kvsweep {
namespace {

constexpr int64_t kLeastPositions = 33024;
// Before a kernel that the matrix rate bounds: rows before it leave a board at its power limit,
// where clocks fall, and each shall be timed from the same state.
constexpr int64_t kRestNs = kNsPerSecond;

// Calls in one graph: a millisecond's worth and every set of data at least once.
int Operations(const PreparedCase& prepared, double floor_ns) {
  const double wanted = std::clamp(1e6 / std::max(floor_ns, 1000.0), 1.0, 200.0);
  const int rounds = std::max(1, static_cast<int>(wanted) / prepared.sets);
  return std::min(rounds * prepared.sets, 512);
}

}  // namespace

absl::StatusOr<Backend*> Bench::Use(bool batch_invariant) {
  if (backend_ != nullptr && batch_invariant_ == batch_invariant) return backend_.get();
  model_.reset();
  model_name_.clear();
  backend_.reset();
  ASSIGN_OR_RETURN(backend_, factory_(batch_invariant));
  batch_invariant_ = batch_invariant;
  return backend_.get();
}

absl::StatusOr<const LoadedModel*> Bench::UseModel(const std::string& name, int64_t tokens) {
  KVSWEEP_CHECK(backend_ != nullptr);
  // Rows of different lengths share a model.
  tokens = std::max(tokens, kLeastPositions);
  if (model_ != nullptr && model_name_ == name && model_->config().max_positions >= tokens) {
    return model_.get();
  }
  model_.reset();
  model_name_.clear();
  ASSIGN_OR_RETURN(ModelConfig config, FindBenchModel(name));
  ExtendPositions(static_cast<int32_t>(tokens), &config);
  ASSIGN_OR_RETURN(model_, LoadedModel::Random(backend_.get(), config, /*seed=*/1));
  model_name_ = name;
  return model_.get();
}

absl::StatusOr<ModelConfig> FindBenchModel(const std::string& name) {
  if (name.find('/') != std::string::npos) return LoadModelConfig(name);
  return FindShape(name);
}

absl::Status TimePrepared(Backend& backend, const StopRule& rule, const DeviceProfile& limits,
                          absl::StatusOr<PreparedCase> prepared, ResultRow* row) {
  if (!prepared.ok()) return prepared.status();
  RETURN_IF_ERROR(backend.WaitAll());
  row->cost = prepared->cost;
  row->unit = "us";
  row->SetFloor(limits);
  if (backend.info().beside_host && row->bound == "matrix") {
    RealClock& clock = RealClock::Get();
    clock.SleepUntilNs(clock.NowNs() + kRestNs);
  }
  ASSIGN_OR_RETURN(const Timing timing, Measure(backend, Operations(*prepared, row->floor * 1e3),
                                                prepared->enqueue, rule));
  row->SetTime(timing, "us");
  row->SetFloor(limits);
  return absl::OkStatus();
}

absl::Status TimeKernel(Bench& bench, const std::string& kernel,
                        const std::vector<std::pair<std::string, int64_t>>& point, ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  for (const KernelCase& known : KernelCases()) {
    if (known.name != kernel) continue;
    Point full;
    for (const BenchAxis& axis : known.axes) {
      int64_t value = axis.values[0];
      for (const auto& [name, given] : point) {
        if (name == axis.name) value = given;
      }
      full.Set(axis.name, value);
    }
    CaseMemory memory(*backend);
    return TimePrepared(*backend, bench.rule(), bench.limits().profile, known.prepare(memory, full),
                        row);
  }
  return absl::NotFoundError(absl::StrCat("no kernel case ", kernel));
}

}  // namespace kvsweep
