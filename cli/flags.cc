#include "cli/flags.h"

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "cli/exit_code.h"
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

absl::StatusOr<LoadedExperiment> LoadSpec(const SpecFlags& flags) {
  const LoadOptions options{.overrides = flags.overrides, .environment = SystemEnvironment()};
  ASSIGN_OR_RETURN(LoadedExperiment loaded, LoadExperiment(flags.path, options));
  const auto folder = loaded.resolved.local_paths.find(loaded.experiment.model().path());
  if (folder != loaded.resolved.local_paths.end()) {
    const absl::Status sound = CheckModelFolder(folder->second);
    if (!sound.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.path, ": model.path: ", sound.message()));
    }
  }
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
