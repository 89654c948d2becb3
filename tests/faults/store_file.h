#ifndef KVSWEEP_TESTS_FAULTS_STORE_FILE_H_
#define KVSWEEP_TESTS_FAULTS_STORE_FILE_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace kvsweep {

// A store file as a stranger sees it: opened read-only with SQLite alone, while the coordinator
// writes it or after it was killed. Aborts on a statement that is wrong.
class StoreFile {
 public:
  explicit StoreFile(std::string path) : path_(std::move(path)) {}

  // The rows of one SELECT, the values of each joined by '|': blobs as hexadecimal digits, numbers
  // with all digits. Empty while there is no file yet.
  std::vector<std::string> Rows(absl::string_view sql) const;

  // The one number that `sql` selects; 0 if it selects none.
  int64_t Number(absl::string_view sql) const;

  // All that the accepted trials of `experiment` say, by part ("requests", "counters", ...), each
  // in a fixed order. Trials are named by cell, repeat and arm. Left out is only what tells one
  // execution from another: ids, worker, machine, slot, neighbours, number of executions, whether
  // it was served.
  std::map<std::string, std::vector<std::string>> Accepted(int64_t experiment) const;

  // Keys of all records that are stored, whatever became of their attempt.
  std::set<int64_t> RecordIds() const;

  // What is wrong with the file, a line each; none if nothing is:
  //   - SQLite's integrity and foreign key checks;
  //   - an (attempt, sequence) that is stored twice, or a gap in the sequences of an attempt;
  //   - an accepted attempt whose finish record counts other than what remains after discards;
  //   - a round with more than one accepted attempt, or a finished one without.
  std::vector<std::string> Violations() const;

 private:
  const std::string path_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_FAULTS_STORE_FILE_H_
