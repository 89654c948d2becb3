// `kvsweep validate`: whether specs are sound, without running anything.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/expansion.h"
#include "cli/flags.h"
#include "cli/memory_table.h"
#include "experiments/matrix.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Checks specs and the files that they name.";

constexpr char kMore[] =
    "Every field, what the fields mean together, every cell and arm of the matrix. Each problem is "
    "printed with its\n"
    "place and what to do. Arms in whose memory some of the requests can never run are sound, but "
    "warned of.\n"
    "\n"
    "Example:\n"
    "  kvsweep validate experiments/specs/*.yaml\n"
    "  kvsweep validate experiments/specs/quickstart.yaml -S kv.device_bytes=64MiB\n";

absl::Status Validate(const SpecFlags& spec) {
  ASSIGN_OR_RETURN(const LoadedExperiment loaded, LoadSpec(spec));
  const absl::StatusOr<Matrix> matrix = Matrix::Create(loaded.experiment, loaded.resolved.inputs);
  RETURN_IF_ERROR(Annotate(matrix.status(), spec.path));
  const absl::StatusOr<std::vector<std::string>> warnings = MemoryWarnings(*matrix, loaded);
  RETURN_IF_ERROR(Annotate(warnings.status(), spec.path));
  const std::optional<ModelReference>& model = loaded.resolved.inputs.model;
  std::printf(
      "%s: sound; %s; model %s\n", spec.path.c_str(), FormatCounts(*matrix).c_str(),
      model.has_value()
          ? (model->name() + ", " + FormatBytes(static_cast<int64_t>(model->bytes()))).c_str()
          : (loaded.experiment.model().shape() + ", random weights").c_str());
  for (const std::string& warning : *warnings) {
    std::fprintf(stderr, "%s: warning: %s\n", spec.path.c_str(), warning.c_str());
  }
  return absl::OkStatus();
}

int Run(const std::vector<std::string>& paths, const std::vector<std::string>& overrides) {
  int exit_code = kExitOk;
  for (const std::string& path : paths) {
    const absl::Status status = Validate({.path = path, .overrides = overrides});
    if (!status.ok()) exit_code = FailSpec(status);
  }
  return exit_code;
}

}  // namespace

void AddValidateCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "validate", kSummary, kMore);
  auto paths = std::make_shared<std::vector<std::string>>();
  auto overrides = std::make_shared<std::vector<std::string>>();
  command->add_option("SPEC", *paths, "Experiments in YAML or JSON")->required();
  AddOverrideFlag(*command, overrides.get());
  command->callback([paths, overrides, exit_code] { *exit_code = Run(*paths, *overrides); });
}

}  // namespace kvsweep
