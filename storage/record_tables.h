#ifndef KVSWEEP_STORAGE_RECORD_TABLES_H_
#define KVSWEEP_STORAGE_RECORD_TABLES_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "proto/experiment.pb.h"
#include "storage/database.h"

// Records as rows of typed columns, and back: a record that ParseRecord passed is rebuilt so that
// it serialises to the very same bytes. One table for each kind of record (schema.sql).

namespace kvsweep {

inline constexpr uint64_t kMaxSequence = (uint64_t{1} << 32) - 1;
inline constexpr uint64_t kMaxAttempt = (uint64_t{1} << 31) - 1;

// attempt * 2^32 + sequence. REQUIRES: attempt <= kMaxAttempt, sequence <= kMaxSequence.
int64_t RecordId(Attempt attempt, uint64_t sequence);

// Deletes the records of an attempt, with what hangs on them.
absl::Status DeleteRecords(Database& database, Attempt attempt);

class RecordWriter {
 public:
  static absl::StatusOr<RecordWriter> Create(Database& database);

  // Inserts a record that is not there yet.
  absl::Status Insert(int64_t record_id, const Record& record);

 private:
  RecordWriter() = default;
  absl::Status InsertStart(int64_t record_id, const Record& record);
  absl::Status InsertRequest(int64_t record_id, const Record& record);
  absl::Status InsertQuality(int64_t record_id, const Record& record);
  absl::Status InsertPasskey(int64_t record_id, const Record& record);
  absl::Status InsertOutcome(int64_t record_id, const Record& record);

  Statement* start_ = nullptr;
  Statement* fact_ = nullptr;
  Statement* request_ = nullptr;
  Statement* counter_ = nullptr;
  Statement* sample_ = nullptr;
  Statement* quality_ = nullptr;
  Statement* position_ = nullptr;
  Statement* passkey_ = nullptr;
  Statement* outcome_ = nullptr;
  Statement* discard_ = nullptr;
  Statement* finish_ = nullptr;
  std::string token_gaps_;  // reused
};

// Reads the records of a range of keys in order, merging the tables. A database has one cursor at a
// time, since its statements are kept.
class RecordCursor {
 public:
  // Keys from `first` to `last`, both included. `database` must outlive the cursor.
  static absl::StatusOr<RecordCursor> Open(Database& database, int64_t first, int64_t last);

  // The next record; false at the end.
  absl::StatusOr<bool> Next(int64_t* record_id, Record* record);

 private:
  struct Source {
    explicit Source(Statement& rows) : use(rows), statement(&rows) {}
    StatementUse use;
    Statement* statement;
    size_t table = 0;
    bool has_row = false;
  };

  explicit RecordCursor(Database& database) : database_(&database) {}

  Database* database_;
  std::vector<std::unique_ptr<Source>> sources_;
};

// The record's serialised form: what the worker sent, and what digests cover.
void SerializeRecord(const Record& record, std::string* bytes);

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_RECORD_TABLES_H_
