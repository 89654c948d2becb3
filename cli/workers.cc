// `kvsweep workers`: who is connected to a coordinator.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/control_client.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/table_format.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Lists the workers of a coordinator.";

constexpr char kMore[] =
    "Whether they are connected and willing, their slots and what runs on them.\n"
    "\n"
    "Example:\n  kvsweep workers --coordinator 127.0.0.1:7470\n";

int Run(const std::string& coordinator, const std::string& output) {
  const absl::StatusOr<std::unique_ptr<ControlClient>> client = ControlClient::Dial(coordinator);
  if (!client.ok()) return Fail(client.status());
  const absl::StatusOr<Table> table = (*client)->Workers();
  if (!table.ok()) return Fail(table.status());
  std::fputs(FormatTable(*table, OutputFormat(output)).c_str(), stdout);
  return kExitOk;
}

}  // namespace

void AddWorkersCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "workers", kSummary, kMore);
  auto coordinator = std::make_shared<std::string>();
  auto output = std::make_shared<std::string>();
  AddCoordinatorFlag(*command, coordinator.get());
  AddOutputFlag(*command, output.get());
  command->callback([=] { *exit_code = Run(*coordinator, *output); });
}

}  // namespace kvsweep
