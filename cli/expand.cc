// `kvsweep expand`: the matrix of a spec.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/expansion.h"
#include "cli/flags.h"
#include "cli/memory_table.h"
#include "cli/table_format.h"
#include "experiments/matrix.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Shows what a spec expands to.";

constexpr char kMore[] =
    "Counts, and the list of its arms, cells, rounds or trials. Nothing is run.\n"
    "--memory shows what each arm takes instead, by its strategy's own formula: fixed bytes; of "
    "the "
    "median and of the\n"
    "largest request the bytes reserved at its peak, at most during its prompt, after the prompt "
    "and "
    "at its end; how many\n"
    "such requests fit at once; and how many of the requests can never fit.\n"
    "\n"
    "Example:\n"
    "  kvsweep expand experiments/specs/quickstart.yaml\n"
    "  kvsweep expand experiments/specs/quickstart.yaml --list trials --output csv\n"
    "  kvsweep expand experiments/specs/quickstart.yaml --memory -S kv.device_bytes=64MiB\n";

struct Flags {
  SpecFlags spec;
  std::string list = "cells";
  bool memory = false;
  uint64_t limit = 1000;
  std::string output;
};

Table ListOf(const Flags& flags, const Matrix& matrix) {
  if (flags.list == "arms") return ArmsTable(matrix);
  if (flags.list == "rounds") return RoundsTable(matrix, flags.limit);
  if (flags.list == "trials") return TrialsTable(matrix, flags.limit);
  return CellsTable(matrix, flags.limit);
}

int Run(const Flags& flags) {
  const absl::StatusOr<LoadedExperiment> loaded = LoadSpec(flags.spec);
  if (!loaded.ok()) return FailSpec(loaded.status());
  const absl::StatusOr<Matrix> matrix = Matrix::Create(loaded->experiment, loaded->resolved.inputs);
  if (!matrix.ok()) return FailSpec(matrix.status());
  const ReportFormat format = OutputFormat(flags.output);
  if (format == ReportFormat::kTable || format == ReportFormat::kMarkdown) {
    std::printf("%s: %s\n\n", loaded->experiment.name().c_str(), FormatCounts(*matrix).c_str());
  }
  const bool in_words = format == ReportFormat::kTable || format == ReportFormat::kMarkdown;
  const absl::StatusOr<Table> table =
      flags.memory ? MemoryTable(*matrix, *loaded, in_words, flags.limit) : ListOf(flags, *matrix);
  if (!table.ok()) return FailSpec(table.status());
  std::fputs(FormatTable(*table, format).c_str(), stdout);
  if (table->truncated) {
    std::fprintf(stderr, "the first %zu; --limit shows more\n", table->rows.size());
  }
  return kExitOk;
}

}  // namespace

void AddExpandCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "expand", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  AddSpecFlags(*command, &flags->spec);
  command->add_option("--list", flags->list, "arms, cells, rounds or trials")
      ->check(CLI::IsMember({"arms", "cells", "rounds", "trials"}))
      ->capture_default_str();
  command->add_flag("--memory", flags->memory, "What each arm takes of device and host, instead");
  command->add_option("--limit", flags->limit, "Rows at most")->capture_default_str();
  AddOutputFlag(*command, &flags->output);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
