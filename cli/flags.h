#ifndef KVSWEEP_CLI_FLAGS_H_
#define KVSWEEP_CLI_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "experiments/report.h"
#include "experiments/spec.h"

// Flags that several commands share, so that they read the same everywhere.

namespace CLI {
class App;
}

namespace kvsweep {

// Adds a command: one sentence for the list of commands; then, below its flags, `more` (details and
// an example) and the exit codes.
CLI::App* AddCommand(CLI::App& app, const std::string& name, const std::string& summary,
                     const std::string& more);

// SPEC and -S key=value.
struct SpecFlags {
  std::string path;
  std::vector<std::string> overrides;
};
void AddSpecFlags(CLI::App& command, SpecFlags* flags);

// -S alone, for commands that take several specs.
void AddOverrideFlag(CLI::App& command, std::vector<std::string>* overrides);

// Reads the spec, overrides applied, and finds its files. The overrides are added to its text as
// comments, so that the stored text tells all. Errors as of LoadExperiment.
absl::StatusOr<LoadedExperiment> LoadSpec(const SpecFlags& flags);

// --output table|markdown|json|csv.
void AddOutputFlag(CLI::App& command, std::string* output);

// REQUIRES: a value that AddOutputFlag let through.
ReportFormat OutputFormat(const std::string& output);

// --store FILE or --coordinator ADDRESS: where results are read from.
struct SourceFlags {
  std::string store = "kvsweep.db";
  std::string coordinator;  // empty: the store
};
void AddSourceFlags(CLI::App& command, SourceFlags* flags);

// --coordinator ADDRESS alone, for what only a running coordinator can do.
void AddCoordinatorFlag(CLI::App& command, std::string* coordinator);

// --fresh and --reuse: what of the store may answer a submission.
struct ReuseFlags {
  bool fresh = false;
  std::string reuse = "same-build";
};
void AddReuseFlags(CLI::App& command, ReuseFlags* flags);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_FLAGS_H_
