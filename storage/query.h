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

// The reading side for people: tables of a store file, by SQL over its documented views
// (docs/STORAGE.md). Everything that the command line and the web page show of the past comes
// through here.

namespace kvsweep {

struct Blob {
  std::string bytes;
  bool operator==(const Blob&) const = default;
};

// A value of a table; monostate is null.
using TableValue = std::variant<std::monostate, int64_t, double, std::string, Blob>;

// INVARIANT: every row has as many values as there are columns.
struct Table {
  std::vector<std::string> columns;
  std::vector<std::vector<TableValue>> rows;
  bool truncated = false;  // there were more rows than the limit
};

struct QueryLimits {
  uint64_t rows = 10'000;
  uint64_t bytes = 64u << 20;  // of all values
  int64_t time_ns = 10 * kNsPerSecond;
};

// A read-only connection to a store file. One thread at a time; open one for each thread. It never
// blocks the writer, and an authorizer keeps statements from anything but reading (no ATTACH, no
// pragma that writes, no extensions), so that it may serve people far away.
class StoreQuery {
 public:
  // NotFound if there is no file, DataLoss or FailedPrecondition (with the reason) if it is no
  // store of ours.
  static absl::StatusOr<std::unique_ptr<StoreQuery>> Open(const std::string& path,
                                                          const Clock& clock);
  virtual ~StoreQuery() = default;

  // Runs one SELECT. InvalidArgument with SQLite's words for a statement that is wrong,
  // PermissionDenied for one that would do more than read, DeadlineExceeded past limits.time_ns.
  virtual absl::StatusOr<Table> Run(absl::string_view sql, const QueryLimits& limits) = 0;

  // One row for each experiment, newest first: id, name, state, rounds (in all, done, served,
  // failed, running), date.
  virtual absl::StatusOr<Table> Experiments(uint64_t limit) = 0;

  // All about a trial as a JSON object: spec, provenance, outcome with evidence, summary, counters.
  virtual absl::StatusOr<std::string> ShowTrial(TrialId trial) = 0;

  // What happened to the trial's round, a line each, oldest first, and the end of a crashed
  // runner's log.
  virtual absl::StatusOr<std::string> Logs(TrialId trial) = 0;

  // One row for each trial of the experiment: arm, cell, repeat, round, outcome, context and every
  // summary. A comparison is computed from these.
  virtual absl::StatusOr<Table> Results(ExperimentId experiment) = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_QUERY_H_
