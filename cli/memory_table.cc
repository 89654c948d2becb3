#include "cli/memory_table.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "experiments/trace.h"
#include "experiments/workload.h"
#include "worker/engine/model_config.h"
#include "worker/engine/shape_catalogue.h"
#include "worker/strategies/memory_model.h"

namespace kvsweep {
namespace {

// Of all requests of a trial, by tokens in all: what an arm may know of them.
struct Demand {
  std::vector<RequestShape> shapes;  // sorted
  int32_t max_total = 0;
  const RequestShape& median() const { return shapes[shapes.size() / 2]; }
  const RequestShape& largest() const { return shapes.back(); }
};

// Answers for the trials of one matrix; traces are read once.
class MemoryPlanner {
 public:
  static absl::StatusOr<MemoryPlanner> Create(const Matrix& matrix,
                                              const LoadedExperiment& experiment) {
    MemoryPlanner planner(matrix, experiment);
    const Model& model = experiment.experiment.model();
    if (model.has_shape()) {
      ASSIGN_OR_RETURN(planner.config_, FindShape(model.shape()));
    } else {
      ASSIGN_OR_RETURN(planner.config_,
                       LoadModelConfig(experiment.resolved.local_paths.at(model.path())));
    }
    return planner;
  }

  // The model as the trial's runner has it: a shape's positions reach as far as the trial asks.
  ModelConfig ConfigOf(const TrialSpec& trial) const {
    ModelConfig config = config_;
    if (trial.model().has_shape()) {
      ExtendPositions(static_cast<int32_t>(NamedContext(trial)), &config);
    }
    return config;
  }

  absl::StatusOr<Demand> DemandOf(const TrialSpec& trial) {
    const ModelConfig config = ConfigOf(trial);
    Load load = trial.load();
    // Lengths do not depend on the text.
    load.clear_text();
    WorkloadInputs inputs{.context_tokens = static_cast<uint32_t>(config.max_positions),
                          .vocabulary = static_cast<uint32_t>(config.vocabulary),
                          .bos_id = config.bos_id};
    if (load.lengths().has_trace()) {
      ASSIGN_OR_RETURN(inputs.trace, FindTrace(load.lengths().trace()));
    }
    ASSIGN_OR_RETURN(const Workload workload, Workload::Build(load, trial.seeds(), inputs));
    Demand demand{.max_total = static_cast<int32_t>(workload.max_total())};
    for (const WorkloadRequest& request : workload.requests()) {
      demand.shapes.push_back(
          {.prompt_tokens = static_cast<int32_t>(request.prompt_tokens),
           .max_tokens = static_cast<int32_t>(request.max_tokens),
           .oracle_tokens = static_cast<int32_t>(request.prompt_tokens + request.output_tokens)});
    }
    std::sort(demand.shapes.begin(), demand.shapes.end(), [](const auto& a, const auto& b) {
      return std::pair(a.prompt_tokens, a.limit()) < std::pair(b.prompt_tokens, b.limit());
    });
    return demand;
  }

  absl::StatusOr<MemoryModel> ModelOf(const TrialSpec& trial, const Demand& demand) const {
    const ModelConfig config = ConfigOf(trial);
    const bool cuda = trial.engine().backend() == Engine::BACKEND_CUDA;
    // The CPU computes in f32; a GPU in the model's own type.
    const DType computed = cuda ? config.dtype : DType::kF32;
    const auto sequences = static_cast<int32_t>(trial.engine().max_num_seqs());
    const auto batched = static_cast<int32_t>(trial.engine().max_num_batched_tokens());
    const int32_t decode_rows = PaddedDecodeRows(sequences);
    const StrategySizes sizes{
        .shape = config.shape(),
        .kv_dtype = KvDtype(trial.kv(), config.dtype, computed),
        .activation_dtype = computed,
        .weight_dtype = computed,
        .device_bytes = trial.kv().device_bytes(),
        .host_bytes = trial.kv().host_bytes(),
        .max_sequences = sequences,
        .max_context = demand.max_total,
        // Without chunks a step holds the longest prompt.
        .max_rows = std::max(
            {batched, decode_rows, trial.engine().chunked_prefill() ? 0 : demand.max_total}),
        .max_decode_rows = decode_rows};
    return MemoryModel::Create(trial.arm(), sizes, batched);
  }

  // Calls `visit(trial, demand, model)` for each cell and arm, until it says false.
  template <typename Visit>
  absl::Status ForEachArm(const Visit& visit) {
    for (uint64_t cell = 0; cell < matrix_.cell_count(); ++cell) {
      std::optional<Demand> demand;
      for (size_t arm = 0; arm < matrix_.arms().size(); ++arm) {
        const TrialSpec trial = matrix_.LoadTrial(arm, cell, 0);
        if (!demand.has_value()) {
          ASSIGN_OR_RETURN(demand, DemandOf(trial));
        }
        absl::StatusOr<MemoryModel> model = ModelOf(trial, *demand);
        if (!visit(matrix_.CellAt(cell).name, trial, *demand, model)) return absl::OkStatus();
      }
    }
    return absl::OkStatus();
  }

 private:
  MemoryPlanner(const Matrix& matrix, const LoadedExperiment& experiment)
      : matrix_(matrix), experiment_(experiment) {}

  absl::StatusOr<const Trace*> FindTrace(const std::string& path) {
    const auto found = traces_.find(path);
    if (found != traces_.end()) return &found->second;
    ASSIGN_OR_RETURN(const std::string text,
                     ReadFile(experiment_.resolved.local_paths.at(path), limits::kTraceFileBytes));
    ASSIGN_OR_RETURN(Trace trace, ParseTrace(text, path));
    return &traces_.emplace(path, std::move(trace)).first->second;
  }

  const Matrix& matrix_;
  const LoadedExperiment& experiment_;
  ModelConfig config_;
  std::map<std::string, Trace> traces_;
};

std::string InWords(uint64_t bytes) { return FormatBytes(static_cast<int64_t>(bytes)); }

TableCell BytesCell(uint64_t bytes, bool in_words) {
  if (in_words) return InWords(bytes);
  return static_cast<int64_t>(bytes);
}

// Requests that can never run.
int64_t CountInfeasible(const Demand& demand, const MemoryModel& model) {
  return std::count_if(demand.shapes.begin(), demand.shapes.end(),
                       [&](const RequestShape& shape) { return !model.CanRun(shape); });
}

std::string ShapeText(const RequestShape& shape) {
  return absl::StrCat(shape.prompt_tokens, "+", shape.max_tokens);
}

}  // namespace

absl::StatusOr<Table> MemoryTable(const Matrix& matrix, const LoadedExperiment& experiment,
                                  bool in_words, uint64_t limit) {
  ASSIGN_OR_RETURN(MemoryPlanner planner, MemoryPlanner::Create(matrix, experiment));
  Table table;
  table.columns = {
      "cell",          "arm",       "device_budget", "fixed_device",     "fixed_host",
      "request",       "tokens",    "device_peak",   "device_in_prompt", "device_after_prompt",
      "device_at_end", "host_peak", "fit_at_once",   "never_fit",        "note"};
  RETURN_IF_ERROR(planner.ForEachArm([&](const std::string& cell, const TrialSpec& trial,
                                         const Demand& demand, absl::StatusOr<MemoryModel>& model) {
    const auto bytes = [&](uint64_t value) { return BytesCell(value, in_words); };
    for (const bool largest : {false, true}) {
      if (table.rows.size() >= limit) {
        table.truncated = true;
        return false;
      }
      const RequestShape& shape = largest ? demand.largest() : demand.median();
      std::vector<TableCell> row = {cell, trial.arm().name(), bytes(trial.kv().device_bytes())};
      const std::string name = largest ? "largest" : "median";
      if (!model.ok()) {
        row.insert(row.end(), {std::monostate{}, std::monostate{}, name, ShapeText(shape)});
        row.resize(table.columns.size() - 2, std::monostate{});
        row.push_back(static_cast<int64_t>(demand.shapes.size()));
        row.push_back(std::string(model.status().message()));
        table.rows.push_back(std::move(row));
        continue;
      }
      const TierBytes peak = model->PeakBytes(shape);
      row.insert(row.end(), {bytes(model->fixed().device), bytes(model->fixed().host), name,
                             ShapeText(shape), bytes(peak.device)});
      if (model->CanRun(shape)) {
        const RequestMemory memory = model->Follow(shape);
        row.insert(row.end(), {bytes(memory.prompt_peak.device), bytes(memory.after_prompt.device),
                               bytes(memory.at_end.device)});
      } else {
        row.insert(row.end(), {std::monostate{}, std::monostate{}, std::monostate{}});
      }
      row.insert(row.end(), {bytes(peak.host), int64_t{model->FitAtOnce(shape)},
                             CountInfeasible(demand, *model), std::string()});
      table.rows.push_back(std::move(row));
    }
    return true;
  }));
  return table;
}

absl::StatusOr<std::vector<std::string>> MemoryWarnings(const Matrix& matrix,
                                                        const LoadedExperiment& experiment) {
  ASSIGN_OR_RETURN(MemoryPlanner planner, MemoryPlanner::Create(matrix, experiment));
  std::vector<std::string> warnings;
  RETURN_IF_ERROR(planner.ForEachArm([&](const std::string& cell, const TrialSpec& trial,
                                         const Demand& demand, absl::StatusOr<MemoryModel>& model) {
    const std::string place =
        absl::StrCat("arm ", trial.arm().name(), cell == "-" ? "" : absl::StrCat(", ", cell));
    const Lengths& lengths = trial.load().lengths();
    const uint64_t asked = uint64_t{lengths.input()} + lengths.output();
    if (asked > static_cast<uint64_t>(demand.max_total)) {
      warnings.push_back(absl::StrCat(place, ": load.lengths: ", lengths.input(), " and ",
                                      lengths.output(), " tokens are clipped to the model's ",
                                      demand.max_total, "; lower them"));
    }
    if (!model.ok()) {
      warnings.push_back(absl::StrCat(place, ": ", model.status().message()));
      return true;
    }
    const int64_t never = CountInfeasible(demand, *model);
    if (never == 0) return true;
    TierBytes needed = model->fixed();
    for (const RequestShape& shape : demand.shapes) {
      TierBytes with = model->fixed();
      with += model->PeakBytes(shape);
      needed = {std::max(needed.device, with.device), std::max(needed.host, with.host)};
    }
    const bool device = needed.device > trial.kv().device_bytes();
    warnings.push_back(absl::StrCat(
        place, ": ", never, " of ", demand.shapes.size(),
        " requests can never fit: the largest takes ",
        InWords(device ? needed.device : needed.host), " of the ", device ? "device" : "host",
        "'s ", InWords(device ? trial.kv().device_bytes() : trial.kv().host_bytes()), "; raise kv.",
        device ? "device" : "host", "_bytes or lower load.lengths.max_total"));
    return true;
  }));
  return warnings;
}

}  // namespace kvsweep
