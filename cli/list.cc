// `kvsweep list`: the experiments of a store.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"
#include "cli/table_format.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Lists the experiments of a store, newest first.";

constexpr char kMore[] =
    "Example:\n"
    "  kvsweep list\n"
    "  kvsweep list --coordinator 127.0.0.1:7470 --output json\n";

struct Flags {
  SourceFlags source;
  uint64_t limit = 50;
  std::string output;
};

int Run(const Flags& flags) {
  const absl::StatusOr<Source> source = OpenSource(flags.source);
  if (!source.ok()) return Fail(source.status());
  const absl::StatusOr<Table> table = source->tables->Experiments(flags.limit);
  if (!table.ok()) return Fail(table.status());
  std::fputs(FormatTable(*table, OutputFormat(flags.output)).c_str(), stdout);
  return kExitOk;
}

}  // namespace

void AddListCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "list", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  command->add_option("--limit", flags->limit, "Rows at most")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  AddOutputFlag(*command, &flags->output);
  AddSourceFlags(*command, &flags->source);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
