#ifndef KVSWEEP_STORAGE_QUERY_H_
#define KVSWEEP_STORAGE_QUERY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/ids.h"
#include "experiments/report.h"

// The reading side for people: tables, by SQL over a store's documented views (docs/STORAGE.md).
// Everything that the command line and the web page show of the past comes through here.

namespace kvsweep {

struct Blob {
  std::string bytes;
  bool operator==(const Blob&) const = default;
};

// A value of a table; monostate is null.
using TableCell = std::variant<std::monostate, int64_t, double, std::string, Blob>;

// INVARIANT: every row has as many values as there are columns.
struct Table {
  std::vector<std::string> columns;
  std::vector<std::vector<TableCell>> rows;
  bool truncated = false;  // there were more rows than the limit
};

// A value as text: "" for null, numbers in their shortest form, blobs in hexadecimal digits.
std::string TableCellText(const TableCell& cell);

struct QueryLimits {
  uint64_t rows = 10'000;
  uint64_t bytes = 64u << 20;  // of all values; past it the table is truncated
  int64_t time_ns = 10 * kNsPerSecond;
};

// Somewhere that SQL over the store's views can be asked: a file here, or a coordinator far away.
// What people ask most often is asked in SQL too, so that it works the same from both.
// One thread at a time.
class TableSource {
 public:
  virtual ~TableSource() = default;

  // Runs one SELECT. InvalidArgument with SQLite's words for a statement that is wrong,
  // PermissionDenied for one that would do more than read, DeadlineExceeded past limits.time_ns.
  virtual absl::StatusOr<Table> Run(absl::string_view sql, const QueryLimits& limits) = 0;

  // One row for each experiment, newest first: id, name, state, rounds (in all, done, served,
  // failed, poisoned, cancelled, running), model, date.
  absl::StatusOr<Table> Experiments(uint64_t limit);

  // All about a trial as a JSON object: what v_trials says of it under "trial", then "spec",
  // "metrics", "reasons" (of metrics without a value), "outcome", "facts", "counters". NotFound
  // for an unknown trial.
  absl::StatusOr<std::string> ShowTrial(TrialId trial);

  // What happened to the trial's round, a line each, oldest first, and the end of a crashed
  // runner's log. NotFound for an unknown trial.
  absl::StatusOr<std::string> Logs(TrialId trial);

  // What v_trials says of each trial of the experiment that has ended. A comparison is computed
  // from these.
  absl::StatusOr<Table> Results(ExperimentId experiment);

  // Everything that Compare needs. NotFound for an unknown experiment.
  absl::StatusOr<ReportInput> Report(ExperimentId experiment);

 private:
  // All rows of "select WHERE where", of which trial_id is the first column, in pages, so that no
  // limit cuts them.
  absl::StatusOr<Table> RunByTrial(absl::string_view select, absl::string_view where);
  absl::Status ReadTrials(ExperimentId experiment, ReportInput* input);
  absl::Status ReadWindows(ExperimentId experiment, ReportInput* input);
};

// A read-only connection to a store file. It never blocks the writer, and an authorizer keeps
// statements from anything but reading (no ATTACH, no pragma, no extensions), so that it may serve
// people far away. One thread at a time; open one for each thread.
class StoreQuery final : public TableSource {
 public:
  // NotFound if there is no file, DataLoss or FailedPrecondition (with the reason) if it is no
  // store of ours.
  static absl::StatusOr<std::unique_ptr<StoreQuery>> Open(const std::string& path,
                                                          const Clock& clock);
  ~StoreQuery() override;

  absl::StatusOr<Table> Run(absl::string_view sql, const QueryLimits& limits) override;

 private:
  struct Connection;
  explicit StoreQuery(std::unique_ptr<Connection> connection);

  const std::unique_ptr<Connection> connection_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_QUERY_H_
