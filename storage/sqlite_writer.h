#ifndef KVSWEEP_STORAGE_SQLITE_WRITER_H_
#define KVSWEEP_STORAGE_SQLITE_WRITER_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "google/protobuf/arena.h"
#include "storage/database.h"
#include "storage/record_audit.h"
#include "storage/record_tables.h"
#include "storage/store.h"

namespace kvsweep {

// Applies operations to the tables, inside a transaction that the store opens and commits. An
// operation judges first and writes after, so one that is refused has written nothing.
//
// Each function returns what the operation's comment in store.h says as OperationResult; a status
// of the *function* that is not OK means that SQLite failed and the transaction must be given up.
class SqliteWriter {
 public:
  // `database` must outlive the writer and have the store's tables.
  static absl::StatusOr<std::unique_ptr<SqliteWriter>> Create(Database& database);

  absl::StatusOr<OperationResult> Apply(const Operation& operation);

 private:
  // What appending needs to know of an open attempt, so that it asks no table for each record.
  // Equal to the attempt's row, since there is only one writer and a failed transaction ends it.
  struct OpenAttempt {
    RoundId round;
    std::vector<TrialId> trials;
    uint64_t last_sequence = 0;
    bool finished = false;
  };

  // A void attempt that still has rows.
  struct VoidRows {
    Attempt attempt;
    int64_t ended_unix_ns = 0;
  };

  explicit SqliteWriter(Database& database) : database_(database) {}
  absl::Status FindVoidRows();

  absl::StatusOr<OperationResult> Do(const SubmitExperiment& operation);
  absl::StatusOr<OperationResult> Do(const PutFile& operation);
  absl::StatusOr<OperationResult> Do(const UpsertWorker& operation);
  absl::StatusOr<OperationResult> Do(const GrantAttempt& operation);
  absl::StatusOr<OperationResult> Do(const AppendRecords& operation);
  absl::StatusOr<OperationResult> Do(const AcceptAttempt& operation);
  absl::StatusOr<OperationResult> Do(const VoidAttempt& operation);
  absl::StatusOr<OperationResult> Do(const FinishRound& operation);
  absl::StatusOr<OperationResult> Do(const CancelExperiment& operation);
  absl::StatusOr<OperationResult> Do(const AddLogLine& operation);
  absl::StatusOr<OperationResult> Do(const PutMeta& operation);

  // ---- submitting
  absl::StatusOr<std::optional<SubmitResult>> FindSubmission(const std::string& client_id);
  absl::StatusOr<absl::Status> CheckSubmission(const SubmitExperiment& operation);
  absl::StatusOr<absl::Status> CheckServed(const NewRound& round);
  absl::StatusOr<ExperimentId> InsertExperiment(const SubmitExperiment& operation);
  absl::StatusOr<SubmitResult::Round> InsertRound(ExperimentId experiment, const NewRound& round);
  absl::StatusOr<TrialId> InsertTrial(RoundId round, const NewRound& from, size_t position);

  // ---- appending
  absl::StatusOr<OpenAttempt*> FindOpen(Attempt attempt);
  // Stores or compares one record; a non-OK inner status is the broken rule.
  absl::StatusOr<absl::Status> StoreRecord(Attempt attempt, OpenAttempt& open, uint64_t sequence,
                                           const std::string& bytes);
  absl::StatusOr<bool> IsStored(Attempt attempt, uint64_t sequence, const std::string& bytes);
  absl::Status SaveProgress(Attempt attempt, const OpenAttempt& open);

  // ---- accepting
  absl::StatusOr<absl::StatusOr<std::vector<TrialAccount>>> Audit(const StoredAttempt& attempt);
  absl::Status SaveAccount(Attempt attempt, const TrialAccount& account);
  absl::Status SaveSummary(const TrialAccount& account);
  absl::Status PrepareSummary();

  // ---- ending
  absl::Status EndAttempt(const VoidAttempt& how);
  // A round has ended: of the void attempts the oldest loses its rows, if it has been void for
  // long.
  absl::Status Prune(int64_t now_unix_ns);
  absl::Status SetRoundState(RoundId round, RoundState state, std::optional<Attempt> attempt);

  Database& database_;
  std::optional<RecordWriter> records_;
  std::optional<Statement> summary_;                         // inserts a summary
  absl::flat_hash_map<std::string, int> metric_parameters_;  // of that statement, by metric
  absl::flat_hash_map<Attempt, OpenAttempt> open_;
  std::deque<VoidRows> void_;      // in the order in which they ended
  google::protobuf::Arena arena_;  // of the records being appended
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_SQLITE_WRITER_H_
