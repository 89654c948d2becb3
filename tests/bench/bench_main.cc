// kvsweep-bench: what the machine can carry, and how near to that kernels and whole steps come.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/limits.h"
#include "kernels/measure.h"
#include "tests/bench/bench.h"
#include "tests/bench/cases.h"
#include "tests/bench/results.h"
#include "tests/bench/targets.h"
#ifdef KVSWEEP_BENCH_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace kvsweep {
namespace {

constexpr int64_t kDocumentBytes = int64_t{4} << 20;

struct Options {
  std::string backend = "auto";
  int threads = 0;
  std::vector<std::string> axes;
  std::vector<std::string> only;
  std::vector<std::string> models;
  std::vector<std::string> arms = {"paged"};
  std::string format = "table";
  StopRule rule;
  std::string output;
  std::string peers;
  std::string document;
  std::vector<std::string> results;
  double budget_s = 450;
  bool fresh = false;
  BenchSizes sizes;
};

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const Options& options,
                                                       bool batch_invariant) {
#ifdef KVSWEEP_BENCH_CUDA
  if (options.backend == "cuda" || (options.backend == "auto" && ProbeCuda().ok())) {
    return CreateCudaBackend({.batch_invariant = batch_invariant});
  }
#else
  if (options.backend == "cuda") {
    return absl::FailedPreconditionError("this program was built without the CUDA backend");
  }
#endif
  return CreateCpuBackend({.threads = options.threads, .batch_invariant = batch_invariant});
}

// How limits read the device's memory.
std::function<absl::StatusOr<std::vector<double>>()> ReadDevice() {
#ifdef KVSWEEP_BENCH_CUDA
  return [] { return MeasureCudaReading(); };
#else
  return nullptr;
#endif
}

// Prints rows as they come (table, CSV) or all at the end (JSON).
class Printer {
 public:
  explicit Printer(const std::string& format) : format_(format) {}

  void PrintHead(const BackendInfo& info) {
    if (format_ == "table") {
      std::printf("%s, %s, driver %s\n", info.backend.c_str(), info.device.c_str(),
                  info.driver.c_str());
    } else if (format_ == "csv") {
      std::printf(
          "case,measured,unit,spread,floor,bound,ratio,ratio is,target,met,device bytes,link "
          "bytes,operations,samples,stop or error\n");
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
      std::printf("limit %s,%.6g,%s,%.4f\n", limit.name.c_str(), limit.value, limit.unit.c_str(),
                  limit.spread);
    }
    json_["limits"].push_back({{"name", limit.name},
                               {"value", limit.value},
                               {"unit", limit.unit},
                               {"spread", limit.spread}});
  }
  void PrintRow(const ResultRow& row) {
    const std::string end = row.error.empty() ? row.stop : row.error;
    if (format_ == "table" && !row.error.empty()) {
      std::printf("%-62s %s\n", row.name.c_str(), row.error.c_str());
    } else if (format_ == "table") {
      std::printf("%-62s %9.3f %-2s +- %4.1f %% floor %9.3f (%s) %.3f %s%s  %d %s\n",
                  row.name.c_str(), row.measured, row.unit.c_str(), 100 * row.spread, row.floor,
                  row.bound.c_str(), row.ratio, row.ratio_is.c_str(), Verdict(row).c_str(),
                  row.samples, row.stop.c_str());
      if (!row.note.empty()) std::printf("    %s\n", row.note.c_str());
    } else if (format_ == "csv") {
      std::printf("%s,%.4f,%s,%.4f,%.4f,%s,%.4f,%s,%.4f,%d,%.0f,%.0f,%.0f,%d,%s\n",
                  row.name.c_str(), row.measured, row.unit.c_str(), row.spread, row.floor,
                  row.bound.c_str(), row.ratio, row.ratio_is.c_str(), row.target, row.met(),
                  row.cost.device_bytes, row.cost.link_bytes, row.cost.operations, row.samples,
                  end.c_str());
    }
    std::fflush(stdout);
    json_["rows"].push_back({{"case", row.name},
                             {"measured", row.measured},
                             {"unit", row.unit},
                             {"spread", row.spread},
                             {"floor", row.floor},
                             {"bound", row.bound},
                             {"ratio", row.ratio},
                             {"ratio_is", row.ratio_is},
                             {"target", row.target},
                             {"met", row.met()},
                             {"device_bytes", row.cost.device_bytes},
                             {"link_bytes", row.cost.link_bytes},
                             {"operations", row.cost.operations},
                             {"samples", row.samples},
                             {"stop", row.stop},
                             {"note", row.note},
                             {"error", row.error}});
  }
  void Finish() const {
    if (format_ == "json") std::cout << json_.dump(1) << "\n";
  }

 private:
  static std::string Verdict(const ResultRow& row) {
    if (row.target == 0) return "";
    return absl::StrCat(row.at_least ? ", at least " : ", at most ", row.target,
                        row.met() ? ": met" : ": missed");
  }

  std::string format_;
  nlohmann::json json_;
};

std::string Show(const Point& point) {
  return absl::StrJoin(point.values(), " ", absl::PairFormatter("="));
}

absl::StatusOr<std::vector<BenchAxis>> GivenAxes(const Options& options) {
  std::vector<BenchAxis> given;
  for (const std::string& text : options.axes) {
    ASSIGN_OR_RETURN(given.emplace_back(), ParseAxis(text));
  }
  return given;
}

// All points of `axes`, those that were given in place of the defaults.
std::vector<Point> PointsOf(std::vector<BenchAxis> axes, const std::vector<BenchAxis>& given) {
  for (BenchAxis& axis : axes) {
    for (const BenchAxis& other : given) {
      if (other.name == axis.name) axis = other;
    }
  }
  return Expand(axes);
}

// What the commands that time whole steps vary, with the defaults.
std::vector<BenchAxis> StepAxes() { return {{"B", {8}}, {"context", {1024}}}; }
std::vector<BenchAxis> BurstAxes() {
  return {{"B", {64}}, {"input", {512}}, {"output", {128}}, {"tokens", {2048, 8192}}};
}
std::vector<BenchAxis> OffloadAxes() {
  return {{"B", {8}}, {"context", {1920}}, {"selected", {400}}};
}

// ---------------------------------------------------------------------------------------- commands

// Measures rows one by one; a row's error is its result.
class Command {
 public:
  Command(Bench& bench, const Options& options, Printer& printer)
      : bench_(bench), options_(options), printer_(printer) {}

  absl::Status Limits(bool all) {
    ASSIGN_OR_RETURN(Backend* const backend, bench_.Use());
    ASSIGN_OR_RETURN(bench_.limits(),
                     MeasureLimits(*backend, {.all = all, .read_device = ReadDevice()}));
    for (const Limit& limit : bench_.limits().rows) printer_.PrintLimit(limit);
    return absl::OkStatus();
  }

  absl::Status Kernels() {
    ASSIGN_OR_RETURN(const std::vector<BenchAxis> given, GivenAxes(options_));
    const auto wanted = [&](const KernelCase& kernel) {
      const auto& only = options_.only;
      return only.empty() || std::ranges::find(only, kernel.name) != only.end();
    };
    std::vector<BenchAxis> axes;
    for (const KernelCase& kernel : KernelCases()) {
      if (wanted(kernel)) axes.insert(axes.end(), kernel.axes.begin(), kernel.axes.end());
    }
    RETURN_IF_ERROR(CheckAxes(given, axes));
    RETURN_IF_ERROR(Limits(false));
    for (const KernelCase& kernel : KernelCases()) {
      if (!wanted(kernel)) continue;
      for (const Point& point : PointsOf(kernel.axes, given)) {
        Measure(absl::StrCat(kernel.name, " ", Show(point)), [&](ResultRow* row) {
          return TimeKernel(bench_, kernel.name, point.values(), row);
        });
      }
    }
    return absl::OkStatus();
  }

  absl::Status Step() {
    ASSIGN_OR_RETURN(const std::vector<Point> points, Points(StepAxes()));
    RETURN_IF_ERROR(Limits(false));
    for (const std::string& model : options_.models) {
      for (const Point& point : points) {
        for (const OffloadArm& choice : StepArms(point.at("context"))) {
          const auto& wanted = options_.arms;
          if (std::ranges::find(wanted, choice.arm.name()) == wanted.end()) continue;
          Measure(absl::StrCat("step ", model, " ", Show(point), " ", choice.arm.name()),
                  [&](ResultRow* row) {
                    return TimeArmStep(bench_, model, choice.arm, point.at("B"),
                                       point.at("context"), choice.fetched, false, row);
                  });
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status Burst() {
    ASSIGN_OR_RETURN(const std::vector<Point> points, Points(BurstAxes()));
    RETURN_IF_ERROR(Limits(false));
    for (const std::string& model : options_.models) {
      for (const Point& point : points) {
        Measure(absl::StrCat("burst ", model, " ", Show(point)), [&](ResultRow* row) {
          return TimeBurst(bench_, model, point.at("B"), point.at("input"), point.at("output"),
                           point.at("tokens"), row);
        });
      }
    }
    return absl::OkStatus();
  }

  absl::Status Offload() {
    ASSIGN_OR_RETURN(const std::vector<Point> points, Points(OffloadAxes()));
    RETURN_IF_ERROR(Limits(true));
    for (const std::string& model : options_.models) {
      for (const Point& point : points) {
        for (const OffloadArm& choice : OffloadArms(point.at("context"), point.at("selected"))) {
          const std::string name = absl::StrCat(model, " ", Show(point), " ", choice.arm.name());
          Measure("offload " + name, [&](ResultRow* row) {
            return TimeArmStep(bench_, model, choice.arm, point.at("B"), point.at("context"),
                               choice.fetched, true, row);
          });
          if (choice.target == 0 || choice.arm.name() == "h2o-device") continue;
          Measure("hidden " + name, [&](ResultRow* row) {
            return TimeHidden(bench_, model, choice.arm, point.at("B"), point.at("context"),
                              choice.fetched, true, row);
          });
        }
      }
    }
    return absl::OkStatus();
  }

  // Rows were asked for, outside a table, and none could be measured.
  bool AllFailed() const { return rows_ > 0 && failed_ == rows_; }

  // A table that is kept in a file and gone on with.
  absl::Status Table(const std::string& name, const std::vector<BenchRow>& rows,
                     const std::string& command) {
    const int64_t begun_ns = RealClock::Get().NowNs();
    ASSIGN_OR_RETURN(Backend* const backend, bench_.Use());
    const ResultHeader header{.table = name, .device = backend->info(), .command = command};
    ASSIGN_OR_RETURN(ResultFile file, ResultFile::Open(options_.output, header, options_.fresh));
    if (!options_.peers.empty()) {
      ASSIGN_OR_RETURN(bench_.peers(), ReadPeers(options_.peers));
      RETURN_IF_ERROR(file.SetPeers(bench_.peers()));
    } else {
      bench_.peers() = file.peers();
    }
    if (file.limits().profile.device_bytes_per_s > 0) {
      bench_.limits() = file.limits();
    } else {
      RETURN_IF_ERROR(Limits(true));
      RETURN_IF_ERROR(file.SetLimits(bench_.limits()));
    }
    size_t left = 0;
    for (const BenchRow& todo : rows) {
      if (!Wanted(todo.row.name) || file.Has(todo.row.name)) continue;
      const int64_t spent_ns = RealClock::Get().NowNs() - begun_ns;
      if (static_cast<double>(spent_ns) > options_.budget_s * kNsPerSecond) {
        ++left;
        continue;
      }
      RETURN_IF_ERROR(
          file.Add(Measure(todo.row, [&](ResultRow* row) { return todo.measure(bench_, row); })));
    }
    if (left == 0) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat("the budget of ", options_.budget_s, " s is spent, ", left,
                     " rows are left: run the same command again to go on"));
  }

 private:
  // The arms of `step`: those of the offloading table are over given counts too.
  static std::vector<OffloadArm> StepArms(int64_t context) {
    std::vector<OffloadArm> arms = OffloadArms(context, context / 20);
    OffloadArm paged;
    paged.arm.set_name("paged");
    paged.arm.set_strategy("paged");
    paged.arm.mutable_paged();
    arms.insert(arms.begin(), paged);
    return arms;
  }

  // Of a command with these axes. InvalidArgument for a given axis that it does not have.
  absl::StatusOr<std::vector<Point>> Points(const std::vector<BenchAxis>& axes) const {
    ASSIGN_OR_RETURN(const std::vector<BenchAxis> given, GivenAxes(options_));
    RETURN_IF_ERROR(CheckAxes(given, axes));
    return PointsOf(axes, given);
  }

  bool Wanted(const std::string& name) const {
    if (options_.only.empty()) return true;
    return std::ranges::any_of(options_.only, [&](const std::string& part) {
      return name.find(part) != std::string::npos;
    });
  }

  ResultRow Measure(ResultRow row, const std::function<absl::Status(ResultRow*)>& measure) {
    const absl::Status status = measure(&row);
    if (!status.ok()) row.error = std::string(status.message());
    printer_.PrintRow(row);
    return row;
  }
  void Measure(const std::string& name, const std::function<absl::Status(ResultRow*)>& measure) {
    ++rows_;
    if (!Measure(ResultRow{.name = name}, measure).error.empty()) ++failed_;
  }

  Bench& bench_;
  const Options& options_;
  Printer& printer_;
  size_t rows_ = 0;    // but those of tables
  size_t failed_ = 0;  // of them
};

// Prints the tables of result files, or puts them into a document.
absl::Status PrintTables(const Options& options) {
  std::string document;
  if (!options.document.empty()) {
    ASSIGN_OR_RETURN(document, ReadFile(options.document, kDocumentBytes));
  }
  for (const std::string& path : options.results) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kDocumentBytes));
    ASSIGN_OR_RETURN(const std::string table, Annotate(MarkdownTable(text), path));
    if (options.document.empty()) {
      std::cout << table;
      continue;
    }
    const std::string name = nlohmann::json::parse(text).value("table", "");
    ASSIGN_OR_RETURN(document, Annotate(ReplaceTable(document, name, table), options.document));
  }
  if (options.document.empty()) return absl::OkStatus();
  return WriteFileAtomic(options.document, document);
}

// ------------------------------------------------------------------------------------ command line

struct Commands {
  CLI::App* limits = nullptr;
  CLI::App* kernels = nullptr;
  CLI::App* step = nullptr;
  CLI::App* burst = nullptr;
  CLI::App* offload = nullptr;
  CLI::App* targets = nullptr;
  CLI::App* shapes = nullptr;
  CLI::App* table = nullptr;
};

void DefineMeasuring(CLI::App* command, Options& options) {
  command->add_option("--backend", options.backend, "cpu, cuda, or auto: cuda where a device is")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--threads", options.threads, "of the CPU backend; 0: one for each core");
  command->add_option("--format", options.format)->check(CLI::IsMember({"table", "csv", "json"}));
  command->add_option("--seconds", options.rule.seconds, "at most, for each timing");
  command->add_option("--noise", options.rule.relative_error, "relative error to stop at");
}

void DefineTable(CLI::App* command, Options& options) {
  command->add_option("-o,--output", options.output,
                      "JSON file of the rows; those that it has, of this device and build, are not "
                      "measured again");
  command->add_flag("--fresh", options.fresh, "measure them all again");
  command->add_option("--only", options.only, "rows whose name has this part; repeatable");
  command->add_option("--budget", options.budget_s, "seconds after which no row is begun")
      ->capture_default_str();
  command
      ->add_option("--shrink", options.sizes.shrink,
                   "divide batches and lengths by it, and use tiny models: to try the command "
                   "where there is no GPU")
      ->check(CLI::Range(1, 1024));
}

Commands Define(CLI::App& app, Options& options) {
  Commands all;
  all.limits = app.add_subcommand("limits", "what the machine can carry");
  all.kernels = app.add_subcommand("kernels", "single kernels over axes");
  all.step = app.add_subcommand("step", "whole decode steps through the engine");
  all.burst = app.add_subcommand("burst", "requests that all arrive at once, served to the end");
  all.offload = app.add_subcommand("offload", "decode steps whose cache lies on the host");
  all.targets = app.add_subcommand("targets", "the table of targets, kept in a file");
  all.shapes = app.add_subcommand("shapes", "decode steps of model shapes, kept in a file");
  all.table = app.add_subcommand("table", "print the table of result files, without measuring");
  for (CLI::App* command :
       {all.limits, all.kernels, all.step, all.burst, all.offload, all.targets, all.shapes}) {
    DefineMeasuring(command, options);
  }
  for (CLI::App* command : {all.kernels, all.step, all.burst, all.offload}) {
    command->add_option("-a,--axis", options.axes, "NAME=[NUMBER,...], for example B=[1,8,32]");
  }
  for (CLI::App* command : {all.step, all.burst, all.offload}) {
    command->add_option("--model", options.models, "name of a shape, or a model folder")
        ->required();
  }
  std::string kernels = "Kernels and their axes:\n";
  for (const KernelCase& kernel : KernelCases()) {
    absl::StrAppend(&kernels, "  ", kernel.name, ": ", kernel.meaning, "\n    ",
                    FormatAxes(kernel.axes), "\n");
  }
  all.kernels->footer(kernels);
  all.step->footer("Axes: " + FormatAxes(StepAxes()));
  all.burst->footer("Axes: " + FormatAxes(BurstAxes()));
  all.offload->footer("Axes: " + FormatAxes(OffloadAxes()));
  all.kernels->add_option("--case", options.only, "only these kernels");
  all.step->add_option("--arm", options.arms,
                       "paged, infinigen, infinigen-resident, infinigen-no-prefetch, fetch-all, "
                       "h2o-device, h2o-host; repeatable");
  for (CLI::App* command : {all.targets, all.shapes}) DefineTable(command, options);
  all.targets->add_option("--peers", options.peers, "what scripts/bench-peers wrote");
  all.table->add_option("results", options.results, "JSON files of targets or shapes")->required();
  all.table->add_option("--into", options.document,
                        "document to put the tables into, between its markers");
  return all;
}

absl::Status Run(const Commands& commands, Options& options, const std::string& line) {
  if (commands.table->parsed()) return PrintTables(options);
  if (options.sizes.shrink > 1) {
    options.sizes.grouped = "tiny-llama";
    options.sizes.plain = "tiny-opt";
    options.sizes.shapes = {"tiny-opt", "tiny-llama"};
  }
  Bench bench([&](bool invariant) { return CreateBackend(options, invariant); }, options.rule);
  Printer printer(options.format);
  ASSIGN_OR_RETURN(const Backend* const backend, bench.Use());
  printer.PrintHead(backend->info());
  Command command(bench, options, printer);
  const absl::Status status = commands.limits->parsed()    ? command.Limits(true)
                              : commands.kernels->parsed() ? command.Kernels()
                              : commands.step->parsed()    ? command.Step()
                              : commands.burst->parsed()   ? command.Burst()
                              : commands.offload->parsed() ? command.Offload()
                              : commands.targets->parsed()
                                  ? command.Table("targets", TargetRows(options.sizes), line)
                                  : command.Table("shapes", ShapeRows(options.sizes), line);
  printer.Finish();
  if (status.ok() && command.AllFailed()) return absl::UnknownError("no row could be measured");
  return status;
}

int Main(int argc, char** argv) {
  CLI::App app("Times kernels and steps against limits measured in the same run", "kvsweep-bench");
  app.require_subcommand(1);
  Options options;
  const Commands commands = Define(app, options);
  CLI11_PARSE(app, argc, argv);
  std::vector<std::string> words = {"kvsweep-bench"};
  words.insert(words.end(), argv + 1, argv + argc);
  const absl::Status status = Run(commands, options, absl::StrJoin(words, " "));
  if (status.ok()) return 0;
  std::cerr << "kvsweep-bench: " << status.message() << "\n";
  return 1;
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) { return kvsweep::Main(argc, argv); }
