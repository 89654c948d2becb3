// `kvsweep cancel`: ends what an experiment has not run yet.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Cancels the rounds of an experiment that have not ended.";

constexpr char kMore[] =
    "What was measured stays.\n"
    "\n"
    "Example:\n  kvsweep cancel 3 --coordinator 127.0.0.1:7470\n";

absl::Status Cancel(const Source& source, const std::string& name) {
  ASSIGN_OR_RETURN(const ExperimentId experiment, FindExperiment(*source.tables, name));
  ASSIGN_OR_RETURN(const uint64_t rounds, source.client->Cancel(experiment));
  std::printf("experiment %s: %s rounds cancelled\n", absl::StrCat(experiment.value()).c_str(),
              absl::StrCat(rounds).c_str());
  return absl::OkStatus();
}

}  // namespace

void AddCancelCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "cancel", kSummary, kMore);
  auto coordinator = std::make_shared<std::string>();
  auto experiment = std::make_shared<std::string>();
  command->add_option("EXPERIMENT", *experiment, "Its number or name")->required();
  AddCoordinatorFlag(*command, coordinator.get());
  command->callback([=] {
    const absl::StatusOr<Source> source = OpenSource({.store = "", .coordinator = *coordinator});
    const absl::Status status = source.ok() ? Cancel(*source, *experiment) : source.status();
    *exit_code = status.ok() ? kExitOk : Fail(status);
  });
}

}  // namespace kvsweep
