// `kvsweep compare`: the answer.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"
#include "experiments/report.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Compares the arms of an experiment, cell by cell.";

constexpr char kMore[] =
    "Each arm with its interval over repeats, its paired difference to the reference with its "
    "interval, quality and\n"
    "engagement in the same row. An experiment that still runs is compared as far as it is.\n"
    "\n"
    "Example:\n"
    "  kvsweep compare                       # the newest experiment of kvsweep.db\n"
    "  kvsweep compare quickstart --metrics median_ttft_ms,output_throughput --output markdown\n"
    "`kvsweep spec --metrics` lists the metrics.\n";

struct Flags {
  SourceFlags source;
  std::string experiment;
  std::vector<std::string> metrics;
  double confidence = 0.95;
  std::string output;
};

absl::Status CompareExperiment(const Flags& flags, TableSource& tables) {
  ASSIGN_OR_RETURN(const ExperimentId experiment, FindExperiment(tables, flags.experiment));
  ASSIGN_OR_RETURN(const ReportInput input, tables.Report(experiment));
  ASSIGN_OR_RETURN(const Comparison comparison,
                   Compare(input, {.metrics = flags.metrics, .confidence = flags.confidence}));
  std::fputs(FormatComparison(comparison, OutputFormat(flags.output)).c_str(), stdout);
  return absl::OkStatus();
}

int Run(const Flags& flags) {
  const absl::StatusOr<Source> source = OpenSource(flags.source);
  if (!source.ok()) return Fail(source.status());
  const absl::Status status = CompareExperiment(flags, *source->tables);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddCompareCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "compare", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  command->add_option("EXPERIMENT", flags->experiment,
                      "Its number, or its name (the newest of that name); by default the newest");
  command->add_option("--metrics", flags->metrics, "Metrics to show, separated by commas")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("NAME,...");
  command->add_option("--confidence", flags->confidence, "Of the intervals")
      ->check(CLI::Range(0.5, 0.9999))
      ->capture_default_str();
  AddOutputFlag(*command, &flags->output);
  AddSourceFlags(*command, &flags->source);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
