#include "cli/flags.h"

#include <CLI/CLI.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "cli/exit_code.h"
#include "kernels/cost.h"
#include "worker/engine/model_config.h"
#include "worker/engine/shape_catalogue.h"
#include "worker/engine/weights.h"

namespace kvsweep {

CLI::App* AddCommand(CLI::App& app, const std::string& name, const std::string& summary,
                     const std::string& more) {
  CLI::App* command = app.add_subcommand(name, summary);
  command->footer(absl::StrCat(more, "\n", kExitCodesHelp));
  return command;
}

void AddOverrideFlag(CLI::App& command, std::vector<std::string>* overrides) {
  command
      .add_option("-S,--set", *overrides,
                  "KEY=VALUE: sets a field of the spec, for example -S kv.device_bytes=6MiB; "
                  "repeatable")
      ->allow_extra_args(false)
      ->type_name("KEY=VALUE");
}

void AddSpecFlags(CLI::App& command, SpecFlags* flags) {
  command.add_option("SPEC", flags->path, "Experiment in YAML or JSON; `kvsweep spec` explains it")
      ->required();
  AddOverrideFlag(command, &flags->overrides);
}

namespace {

// What the engine must know by name or hold: the shape, the profile of modelled time, requests as
// long as the spec says.
void CheckEngineKnows(const Experiment& experiment, const ResolvedInputs& resolved,
                      ProblemList* problems) {
  const auto add = [&](absl::string_view field, const absl::Status& status) {
    if (!status.ok()) {
      problems->Add({.field = std::string(field), .what = std::string(status.message())});
    }
  };
  const Model& model = experiment.model();
  if (model.has_shape()) add("model.shape", FindShape(model.shape()).status());
  if (experiment.engine().has_device_profile()) {
    add("engine.device_profile", FindDeviceProfile(experiment.engine().device_profile()).status());
  }
  const auto folder = resolved.local_paths.find(model.path());
  const Lengths& lengths = experiment.load().lengths();
  if (folder == resolved.local_paths.end() || !lengths.has_max_total()) return;
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(folder->second);
  if (!config.ok() || lengths.max_total() <= static_cast<uint32_t>(config->max_positions)) return;
  problems->Add(
      {.field = "load.lengths.max_total",
       .value = absl::StrCat(lengths.max_total()),
       .what = absl::StrCat("exceeds the model's context of ", config->max_positions, " tokens"),
       .remedy = "lower it"});
}

}  // namespace

absl::StatusOr<LoadedExperiment> LoadSpec(const SpecFlags& flags) {
  const LoadOptions options{
      .overrides = flags.overrides, .environment = SystemEnvironment(), .check = CheckEngineKnows};
  ASSIGN_OR_RETURN(LoadedExperiment loaded, LoadExperiment(flags.path, options));
  const auto folder = loaded.resolved.local_paths.find(loaded.experiment.model().path());
  if (folder != loaded.resolved.local_paths.end()) {
    const absl::Status sound = CheckModelFolder(folder->second);
    if (!sound.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.path, ": model.path: ", sound.message()));
    }
  }
  if (!flags.overrides.empty() && !absl::EndsWith(loaded.text, "\n")) loaded.text += "\n";
  for (const std::string& override : flags.overrides) {
    absl::StrAppend(&loaded.text, "# -S ", override, "\n");
  }
  return loaded;
}

void AddOutputFlag(CLI::App& command, std::string* output) {
  *output = "table";
  command.add_option("-o,--output", *output, "table, markdown, json or csv")
      ->check(CLI::IsMember({"table", "markdown", "json", "csv"}))
      ->type_name("FORMAT")
      ->capture_default_str();
}

ReportFormat OutputFormat(const std::string& output) {
  const absl::StatusOr<ReportFormat> format = ParseReportFormat(output);
  KVSWEEP_CHECK_OK(format);
  return *format;
}

void AddSourceFlags(CLI::App& command, SourceFlags* flags) {
  CLI::Option* store = command.add_option("--store", flags->store, "Store file to read")
                           ->type_name("FILE")
                           ->capture_default_str();
  command
      .add_option("--coordinator", flags->coordinator,
                  "Ask a running coordinator instead, for example 127.0.0.1:7470")
      ->type_name("ADDRESS")
      ->excludes(store);
}

void AddCoordinatorFlag(CLI::App& command, std::string* coordinator) {
  *coordinator = "127.0.0.1:7470";
  command.add_option("--coordinator", *coordinator, "Where kvsweep-coordinator listens")
      ->type_name("ADDRESS")
      ->capture_default_str();
}

void AddReuseFlags(CLI::App& command, ReuseFlags* flags) {
  command.add_flag("--fresh", flags->fresh, "Run everything, whatever the store holds");
  command
      .add_option("--reuse", flags->reuse,
                  "same-build: rounds that this build of the runner measured answer from the "
                  "store; same-method: those of other builds too")
      ->check(CLI::IsMember({"same-build", "same-method"}))
      ->type_name("RULE")
      ->capture_default_str();
}

}  // namespace kvsweep
