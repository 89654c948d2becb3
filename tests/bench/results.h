#ifndef KVSWEEP_TESTS_BENCH_RESULTS_H_
#define KVSWEEP_TESTS_BENCH_RESULTS_H_

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "kernels/limits.h"
#include "kernels/measure.h"

// What was measured, as rows that a file keeps: a run that was cut short goes on where it ended,
// and the tables of the documents are printed from the file, not by hand.

namespace kvsweep {

// The error of a row that has no place in the machine's memory: a result, which is kept.
inline constexpr char kDoesNotFit[] = "does not fit";

struct ResultRow {
  std::string name;  // unique in its file: the case and its point
  std::string what;  // for people
  double measured = 0;
  std::string unit;      // of measured and floor: "us", "ms", "s", "TFLOP/s", ""
  double spread = 0;     // interquartile range over the median
  double floor = 0;      // 0: none
  std::string bound;     // the limit that the floor comes from
  double ratio = 0;      // what the target is for
  std::string ratio_is;  // "floor / measured", "measured / floor", …
  double target = 0;     // 0: none, the row is shown only
  bool at_least = true;  // else the ratio is to be at most the target
  Cost cost;             // of one call or step
  int samples = 0;
  std::string stop;
  std::string note;
  std::string peer;  // the peers' name of the same case; empty: none
  std::string error;

  bool met() const;
  // Fills measured, spread, samples and stop: nanoseconds in `unit`.
  void SetTime(const Timing& timing, absl::string_view time_unit);
  // Floor and bound of `cost`, and ratio = floor / measured. REQUIRES: SetTime has been called.
  void SetFloor(const DeviceProfile& limits);
};

// Another program's time of a case, by scripts/bench-peers.
struct PeerRow {
  std::string name;
  std::string peer;
  double measured_us = 0;
  std::string error;
};

struct Peers {
  std::string about;  // the programs and their versions
  std::vector<PeerRow> rows;

  // The fastest in a case; nullptr if there is none.
  const PeerRow* Best(absl::string_view name) const;
};

// Reads what scripts/bench-peers wrote. NotFound; InvalidArgument if it is not such a file.
absl::StatusOr<Peers> ReadPeers(const std::string& path);

// Where and from what the rows of a file are.
struct ResultHeader {
  std::string table;  // which table of the documents it is: "targets", "shapes"
  BackendInfo device;
  std::string command;
};

class ResultFile {
 public:
  // Rows of `path` that are of the same table, device and build are taken over, unless `fresh`;
  // rows with an error are not. An empty path: nothing is kept.
  static absl::StatusOr<ResultFile> Open(const std::string& path, const ResultHeader& header,
                                         bool fresh);
  ResultFile(ResultFile&&);
  ~ResultFile();

  bool Has(absl::string_view name) const;
  // The limits that kept rows were held against; empty if there are none yet.
  const MachineLimits& limits() const { return limits_; }
  const Peers& peers() const { return peers_; }

  // These write the file anew.
  absl::Status SetLimits(const MachineLimits& limits);
  absl::Status SetPeers(const Peers& peers);
  absl::Status Add(const ResultRow& row);

 private:
  explicit ResultFile(const std::string& path);
  absl::Status Write() const;

  std::string path_;
  MachineLimits limits_;
  Peers peers_;
  std::unique_ptr<nlohmann::json> content_;
};

// The file's table in Markdown: device and date, limits, rows, and peers beside the rows that they
// are of. InvalidArgument if it is not such a file.
absl::StatusOr<std::string> MarkdownTable(absl::string_view json_text);

// Puts `table` between the lines "<!-- NAME: begin -->" and "<!-- NAME: end -->" of a document,
// NAME being the table's. NotFound if there are none.
absl::StatusOr<std::string> ReplaceTable(absl::string_view document, absl::string_view name,
                                         absl::string_view table);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_RESULTS_H_
