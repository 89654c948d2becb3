// `kvsweep watch`: an experiment of a coordinator, live.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/follow.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/source.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Shows an experiment live until it has finished.";

constexpr char kMore[] =
    "Progress, what runs, why nothing runs, every failure as it happens. Ctrl-C ends the watching, "
    "not the experiment.\n"
    "\n"
    "Example:\n"
    "  kvsweep watch 3 --coordinator 127.0.0.1:7470 && kvsweep compare 3 --coordinator "
    "127.0.0.1:7470\n";

absl::StatusOr<Standing> Watch(const Source& source, const std::string& name,
                               Interrupt& interrupt) {
  ASSIGN_OR_RETURN(const ExperimentId experiment, FindExperiment(*source.tables, name));
  ProgressDisplay display(stderr, RealClock::Get());
  interrupt.OnSignal([&source] { source.client->Interrupt(); });
  const absl::Status status =
      Follow(*source.client, *source.tables, experiment, &display, RealClock::Get());
  interrupt.OnSignal(nullptr);
  RETURN_IF_ERROR(status);
  ASSIGN_OR_RETURN(const Standing standing, ReadStanding(*source.tables, experiment));
  std::printf("experiment %s: %s\n", absl::StrCat(experiment.value()).c_str(),
              FormatStanding(standing).c_str());
  return standing;
}

int Run(const std::string& coordinator, const std::string& experiment) {
  Interrupt interrupt;
  const absl::StatusOr<Source> source = OpenSource({.store = "", .coordinator = coordinator});
  if (!source.ok()) return Fail(source.status());
  const absl::StatusOr<Standing> standing = Watch(*source, experiment, interrupt);
  if (absl::IsCancelled(standing.status())) {
    std::fputs("no longer watching; the experiment goes on\n", stderr);
    return kExitInterrupted;
  }
  if (!standing.ok()) return Fail(standing.status());
  return standing->has_failures() ? kExitFailed : kExitOk;
}

}  // namespace

void AddWatchCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "watch", kSummary, kMore);
  auto coordinator = std::make_shared<std::string>();
  auto experiment = std::make_shared<std::string>();
  command->add_option("EXPERIMENT", *experiment,
                      "Its number, or its name (the newest of that name); by default the newest");
  AddCoordinatorFlag(*command, coordinator.get());
  command->callback([=] { *exit_code = Run(*coordinator, *experiment); });
}

}  // namespace kvsweep
