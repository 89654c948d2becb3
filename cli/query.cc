// `kvsweep query`: SQL over the store's views.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "base/limits.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"
#include "cli/table_format.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Asks the store in SQL, read only.";

constexpr char kMore[] =
    "v_trials has a row for each trial with what was asked, where it ran, what came out and every "
    "metric;\n"
    "docs/STORAGE.md describes all views.\n"
    "\n"
    "Example:\n"
    "  kvsweep query --sql \"SELECT arm, cell, avg(p99_ttft_ms) FROM v_trials GROUP BY arm, "
    "cell\"\n"
    "  kvsweep query --sql \"SELECT * FROM v_requests WHERE trial_id = 7\" --output csv > 7.csv\n";

struct Flags {
  SourceFlags source;
  std::string sql;
  uint64_t limit = 10'000;
  std::string output;
};

int Run(const Flags& flags) {
  const absl::StatusOr<Source> source = OpenSource(flags.source);
  if (!source.ok()) return Fail(source.status());
  QueryLimits limits;
  limits.rows = flags.limit;
  limits.time_ns = limits::kQuerySeconds * kNsPerSecond;
  const absl::StatusOr<Table> table = source->tables->Run(flags.sql, limits);
  if (!table.ok()) return Fail(table.status());
  std::fputs(FormatTable(*table, OutputFormat(flags.output)).c_str(), stdout);
  if (table->truncated) {
    std::fprintf(stderr, "kvsweep: cut after %zu rows; --limit shows more\n", table->rows.size());
  }
  return kExitOk;
}

}  // namespace

void AddQueryCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "query", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  command->add_option("--sql", flags->sql, "One SELECT")->required()->type_name("SELECT");
  command->add_option("--limit", flags->limit, "Rows at most")
      ->check(CLI::Range(int64_t{1}, limits::kQueryRows))
      ->capture_default_str();
  AddOutputFlag(*command, &flags->output);
  AddSourceFlags(*command, &flags->source);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
