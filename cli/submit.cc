// `kvsweep submit`: hands an experiment to a coordinator.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/control_client.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/submit_spec.h"
#include "experiments/matrix.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Hands an experiment to a running coordinator.";

constexpr char kMore[] =
    "Files that the coordinator lacks are sent along. Prints the experiment's number; submitting "
    "the same again gives the\n"
    "same number and runs nothing twice.\n"
    "\n"
    "Example:\n"
    "  id=$(kvsweep submit experiments/specs/quickstart.yaml --coordinator 127.0.0.1:7470)\n"
    "  kvsweep watch $id\n";

struct Flags {
  SpecFlags spec;
  ReuseFlags reuse;
  std::string coordinator;
  std::string client_id;
};

absl::Status Submit(const Flags& flags, const LoadedExperiment& loaded) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ControlClient> client,
                   ControlClient::Dial(flags.coordinator));
  const std::unique_ptr<TableSource> tables = NewRemoteSource(*client);
  SubmitRequest request = MakeSubmitRequest(loaded, flags.reuse);
  std::string client_id = flags.client_id;
  if (client_id.empty()) {
    ASSIGN_OR_RETURN(client_id,
                     NextTry(*tables, DeriveClientId(loaded, flags.reuse, "submit", "")));
  }
  request.set_client_id(client_id);
  ASSIGN_OR_RETURN(const SubmitReply reply, SubmitWithFiles(*client, loaded, request));
  const std::string id = absl::StrCat(reply.experiment_id());
  std::printf("%s\n", id.c_str());
  std::fprintf(stderr,
               "%s is experiment %s: %s trials in %s rounds, %s answered by the store; follow it "
               "with\n  kvsweep watch %s --coordinator %s\n",
               loaded.experiment.name().c_str(), id.c_str(), absl::StrCat(reply.trials()).c_str(),
               absl::StrCat(reply.rounds()).c_str(), absl::StrCat(reply.rounds_served()).c_str(),
               id.c_str(), flags.coordinator.c_str());
  return absl::OkStatus();
}

int Run(const Flags& flags) {
  const absl::StatusOr<LoadedExperiment> loaded = LoadSpec(flags.spec);
  if (!loaded.ok()) return FailSpec(loaded.status());
  const absl::Status matrix = Matrix::Create(loaded->experiment, loaded->resolved.inputs).status();
  if (!matrix.ok()) return FailSpec(matrix);
  const absl::Status status = Submit(flags, *loaded);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddSubmitCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "submit", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  AddSpecFlags(*command, &flags->spec);
  AddCoordinatorFlag(*command, &flags->coordinator);
  AddReuseFlags(*command, &flags->reuse);
  command->add_option("--client-id", flags->client_id,
                      "Under which submitting again is the same experiment; by default derived "
                      "from the spec and its files");
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
