// `kvsweep logs`: what happened to a trial's round.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Prints what happened to a trial.";

constexpr char kMore[] =
    "The leases, failures and repetitions of its round and, if the runner crashed, the end of its "
    "log.\n"
    "\n"
    "Example:\n  kvsweep logs 7\n";

absl::Status Print(TableSource& tables, const std::string& text) {
  ASSIGN_OR_RETURN(const TrialId trial, ParseTrial(text));
  ASSIGN_OR_RETURN(const std::string logs, tables.Logs(trial));
  std::fputs(logs.c_str(), stdout);
  return absl::OkStatus();
}

}  // namespace

void AddLogsCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "logs", kSummary, kMore);
  auto source_flags = std::make_shared<SourceFlags>();
  auto trial = std::make_shared<std::string>();
  command->add_option("TRIAL", *trial, "Its number")->required();
  AddSourceFlags(*command, source_flags.get());
  command->callback([=] {
    const absl::StatusOr<Source> source = OpenSource(*source_flags);
    const absl::Status status = source.ok() ? Print(*source->tables, *trial) : source.status();
    *exit_code = status.ok() ? kExitOk : Fail(status);
  });
}

}  // namespace kvsweep
