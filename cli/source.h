#ifndef KVSWEEP_CLI_SOURCE_H_
#define KVSWEEP_CLI_SOURCE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "cli/control_client.h"
#include "cli/flags.h"
#include "storage/query.h"

namespace kvsweep {

// Where results are read from: a store file, or a coordinator's store.
struct Source {
  std::unique_ptr<ControlClient> client;  // of a coordinator; null for a file
  std::unique_ptr<TableSource> tables;
};

// Errors are kUnavailable (exit code 3) whatever the reason.
absl::StatusOr<Source> OpenSource(const SourceFlags& flags);

// The experiment that a person names: by number, by name (the newest of that name), or by "" (the
// newest). NotFound says how to list them.
absl::StatusOr<ExperimentId> FindExperiment(TableSource& tables, const std::string& text);

// A trial number. InvalidArgument otherwise.
absl::StatusOr<TrialId> ParseTrial(const std::string& text);

// `text` as a literal of SQL.
std::string SqlText(const std::string& text);

// Integers and texts of a table; 0 and "" for null.
int64_t IntAt(const Table& table, size_t row, size_t column);
std::string TextAt(const Table& table, size_t row, size_t column);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_SOURCE_H_
