// kvsweep-bench: what the machine can carry, and how near to that the kernels and whole steps come.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/cases.h"
#include "tests/bench/limits.h"
#include "tests/bench/measure.h"
#include "tests/bench/step.h"
#include "worker/engine/model_config.h"
#include "worker/engine/shape_catalogue.h"
#ifdef KVSWEEP_BENCH_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace kvsweep {
namespace {

struct Options {
  std::string backend = "auto";
  int threads = 0;
  std::vector<std::string> axes;
  std::vector<std::string> cases;
  std::vector<std::string> models;
  std::string format = "table";
  StopRule rule;
};

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const Options& options) {
#ifdef KVSWEEP_BENCH_CUDA
  if (options.backend == "cuda") return CreateCudaBackend({});
  if (options.backend == "auto" && ProbeCuda().ok()) return CreateCudaBackend({});
#else
  if (options.backend == "cuda") {
    return absl::FailedPreconditionError("this program was built without the CUDA backend");
  }
#endif
  return CreateCpuBackend({.threads = options.threads});
}

// One line of the output.
struct Row {
  std::string name;
  std::string point;
  Timing timing;
  Cost cost;
  double floor_ns = 0;
  std::string bound;  // which limit the floor comes from
  std::string error;
};

void SetFloor(const DeviceProfile& limits, Row* row) {
  const double device = row->cost.device_bytes / limits.device_bytes_per_s * 1e9;
  const double link = row->cost.link_bytes / limits.link_bytes_per_s * 1e9;
  const double operations = row->cost.operations / limits.operations_per_s * 1e9;
  row->floor_ns = std::max({device, link, operations});
  row->bound = row->floor_ns == device ? "read" : row->floor_ns == link ? "link" : "matrix";
}

// Prints rows as they come (table, CSV) or all at the end (JSON).
class Printer {
 public:
  explicit Printer(const std::string& format) : format_(format) {}

  void PrintHead(const BackendInfo& info) {
    if (format_ == "table") {
      std::printf("%s, %s, driver %s\n", info.backend.c_str(), info.device.c_str(),
                  info.driver.c_str());
    }
    json_["device"] = info.device;
    json_["driver"] = info.driver;
    json_["backend"] = info.backend;
  }
  void PrintLimit(const Limit& limit) {
    if (format_ == "table") {
      std::printf("limit  %-40s %12.5g %-5s +- %.1f %%\n", limit.name.c_str(), limit.value,
                  limit.unit.c_str(), 100 * limit.spread);
    } else if (format_ == "csv") {
      std::printf("limit,%s,%.6g,%s,%.4f\n", limit.name.c_str(), limit.value, limit.unit.c_str(),
                  limit.spread);
    }
    json_["limits"].push_back({{"name", limit.name},
                               {"value", limit.value},
                               {"unit", limit.unit},
                               {"spread", limit.spread}});
  }
  void PrintRow(const Row& row) {
    const double ratio = row.timing.median_ns > 0 ? row.floor_ns / row.timing.median_ns : 0;
    if (format_ == "table") {
      if (!row.error.empty()) {
        std::printf("%-18s %-60s %s\n", row.name.c_str(), row.point.c_str(), row.error.c_str());
      } else {
        std::printf(
            "%-18s %-60s %10.2f us +- %4.1f %% floor %10.2f us (%s) %5.1f %%  %8.2f GB/s %8.2f "
            "TFLOP/s  %d %s\n",
            row.name.c_str(), row.point.c_str(), row.timing.median_ns / 1e3,
            100 * row.timing.spread, row.floor_ns / 1e3, row.bound.c_str(), 100 * ratio,
            (row.cost.device_bytes + row.cost.link_bytes) / row.timing.median_ns,
            row.cost.operations / row.timing.median_ns / 1e3, row.timing.samples,
            row.timing.stop.c_str());
      }
    } else if (format_ == "csv") {
      std::printf("%s,%s,%.3f,%.4f,%.3f,%s,%.4f,%.0f,%.0f,%.0f,%d,%s\n", row.name.c_str(),
                  row.point.c_str(), row.timing.median_ns / 1e3, row.timing.spread,
                  row.floor_ns / 1e3, row.bound.c_str(), ratio, row.cost.device_bytes,
                  row.cost.link_bytes, row.cost.operations, row.timing.samples,
                  row.error.empty() ? row.timing.stop.c_str() : row.error.c_str());
    }
    std::fflush(stdout);
    json_["rows"].push_back({{"case", row.name},
                             {"point", row.point},
                             {"measured", row.timing.median_ns / 1e3},
                             {"unit", "us"},
                             {"spread", row.timing.spread},
                             {"floor", row.floor_ns / 1e3},
                             {"bound", row.bound},
                             {"ratio", ratio},
                             {"device_bytes", row.cost.device_bytes},
                             {"link_bytes", row.cost.link_bytes},
                             {"operations", row.cost.operations},
                             {"samples", row.timing.samples},
                             {"stop", row.timing.stop},
                             {"error", row.error}});
  }
  void Finish() const {
    if (format_ == "json") std::cout << json_.dump(1) << "\n";
  }

 private:
  std::string format_;
  nlohmann::json json_;
};

std::string Show(const Point& point) {
  std::string text;
  for (const auto& [name, value] : point.values()) {
    absl::StrAppend(&text, text.empty() ? "" : " ", name, "=", value);
  }
  return text;
}

// Calls in one graph: a millisecond's worth and every set of data at least once.
int Operations(const PreparedCase& prepared, double floor_ns) {
  const double wanted = std::clamp(1e6 / std::max(floor_ns, 1000.0), 1.0, 200.0);
  const int rounds = std::max(1, static_cast<int>(wanted) / prepared.sets);
  return std::min(rounds * prepared.sets, 512);
}

absl::Status TimeCase(Backend& backend, const StopRule& rule, const DeviceProfile& limits,
                      CaseMemory& memory, absl::StatusOr<PreparedCase> prepared, Row* row) {
  if (!prepared.ok()) return prepared.status();
  RETURN_IF_ERROR(memory.backend().WaitAll());
  row->cost = prepared->cost;
  SetFloor(limits, row);
  ASSIGN_OR_RETURN(row->timing,
                   Measure(backend, Operations(*prepared, row->floor_ns), prepared->enqueue, rule));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Axis>> GivenAxes(const Options& options) {
  std::vector<Axis> given;
  for (const std::string& text : options.axes) {
    ASSIGN_OR_RETURN(given.emplace_back(), ParseAxis(text));
  }
  return given;
}

void Override(const std::vector<Axis>& given, std::vector<Axis>* axes) {
  for (Axis& axis : *axes) {
    for (const Axis& other : given) {
      if (other.name == axis.name) axis = other;
    }
  }
}

absl::Status RunLimits(Backend& backend, const Options&, Printer& printer) {
  ASSIGN_OR_RETURN(const Limits limits, MeasureLimits(backend, /*all=*/true));
  for (const Limit& limit : limits.rows) printer.PrintLimit(limit);
  return absl::OkStatus();
}

absl::Status RunKernels(Backend& backend, const Options& options, Printer& printer) {
  ASSIGN_OR_RETURN(const std::vector<Axis> given, GivenAxes(options));
  ASSIGN_OR_RETURN(const Limits limits, MeasureLimits(backend, /*all=*/false));
  for (const Limit& limit : limits.rows) printer.PrintLimit(limit);
  for (const KernelCase& kernel : KernelCases()) {
    const auto& wanted = options.cases;
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), kernel.name) == wanted.end()) {
      continue;
    }
    std::vector<Axis> axes = kernel.axes;
    Override(given, &axes);
    for (const Point& point : Expand(axes)) {
      CaseMemory memory(backend);
      Row row{.name = kernel.name, .point = Show(point)};
      const absl::Status status = TimeCase(backend, options.rule, limits.profile, memory,
                                           kernel.prepare(memory, point), &row);
      if (!status.ok()) row.error = std::string(status.message());
      printer.PrintRow(row);
    }
  }
  return absl::OkStatus();
}

// A catalogue name, or a model folder.
absl::StatusOr<ModelConfig> FindModel(const std::string& name) {
  if (name.find('/') != std::string::npos) return LoadModelConfig(name);
  return FindShape(name);
}

absl::Status RunStep(Backend& backend, const Options& options, Printer& printer) {
  ASSIGN_OR_RETURN(const std::vector<Axis> given, GivenAxes(options));
  ASSIGN_OR_RETURN(const Limits limits, MeasureLimits(backend, /*all=*/false));
  for (const Limit& limit : limits.rows) printer.PrintLimit(limit);
  for (const std::string& name : options.models) {
    ASSIGN_OR_RETURN(const ModelConfig model, FindModel(name));
    std::vector<Axis> axes = {{"B", {8}}, {"context", {1024}}};
    Override(given, &axes);
    for (const Point& point : Expand(axes)) {
      CaseMemory memory(backend);
      Row row{.name = "step", .point = absl::StrCat(name, " ", Show(point))};
      const absl::Status status =
          TimeCase(backend, options.rule, limits.profile, memory,
                   PrepareStep(memory, model, point.at("B"), point.at("context")), &row);
      if (!status.ok()) row.error = std::string(status.message());
      printer.PrintRow(row);
    }
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  CLI::App app("Times kernels and steps against limits measured in the same run", "kvsweep-bench");
  app.require_subcommand(1);
  Options options;
  const auto add_common = [&](CLI::App* command) {
    command->add_option("--backend", options.backend, "cpu, cuda, or auto: cuda where a device is")
        ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
    command->add_option("--threads", options.threads, "of the CPU backend; 0: one for each core");
    command->add_option("--format", options.format)->check(CLI::IsMember({"table", "csv", "json"}));
    command->add_option("--seconds", options.rule.seconds, "at most, for each row");
    command->add_option("--noise", options.rule.relative_error, "relative error to stop at");
  };
  CLI::App* const limits = app.add_subcommand("limits", "what the machine can carry");
  CLI::App* const kernels = app.add_subcommand("kernels", "single kernels over axes");
  CLI::App* const step = app.add_subcommand("step", "whole decode steps of model shapes");
  for (CLI::App* command : {limits, kernels, step}) add_common(command);
  for (CLI::App* command : {kernels, step}) {
    command->add_option("-a,--axis", options.axes, "NAME=[NUMBER,...], for example B=[1,8,32]");
  }
  kernels->add_option("--case", options.cases, "only these kernels");
  step->add_option("--model", options.models, "name of a shape, or a model folder")->required();
  CLI11_PARSE(app, argc, argv);

  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend(options);
  absl::Status status = backend.status();
  if (status.ok()) {
    Printer printer(options.format);
    printer.PrintHead((*backend)->info());
    status = limits->parsed()    ? RunLimits(**backend, options, printer)
             : kernels->parsed() ? RunKernels(**backend, options, printer)
                                 : RunStep(**backend, options, printer);
    printer.Finish();
  }
  if (status.ok()) return 0;
  std::cerr << "kvsweep-bench: " << status.message() << "\n";
  return 1;
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) { return kvsweep::Main(argc, argv); }
