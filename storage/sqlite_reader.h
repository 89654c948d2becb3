#ifndef KVSWEEP_STORAGE_SQLITE_READER_H_
#define KVSWEEP_STORAGE_SQLITE_READER_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "storage/database.h"
#include "storage/store.h"

// Reading the store's tables. The functions are shared by readers, each with its own connection and
// a transaction around each call, and by the writer, which sees its own unfinished batch.

namespace kvsweep {

// A read-only connection to a store file, known to be one of ours. Defined beside OpenSqliteStore,
// which knows what that means.
absl::StatusOr<std::unique_ptr<Database>> OpenStoreForReading(const std::string& path);

absl::StatusOr<StoredAttempt> ReadAttempt(Database& database, Attempt attempt);
absl::StatusOr<StoredRound> ReadRound(Database& database, RoundId round);
absl::StatusOr<RoundState> ReadRoundState(Database& database, RoundId round);
absl::StatusOr<bool> ReadHasFile(Database& database, absl::string_view digest);

// Ids of the round's trials in running order.
absl::StatusOr<std::vector<TrialId>> ReadTrialIds(Database& database, RoundId round);

// The state of a column; DataLoss for a word that is none.
absl::StatusOr<RoundState> ParseRoundState(absl::string_view name);

class SqliteReader final : public StoreReader {
 public:
  explicit SqliteReader(std::unique_ptr<Database> database) : database_(std::move(database)) {}

  absl::StatusOr<Queue> LoadQueue() override;
  absl::StatusOr<StoredRound> GetRound(RoundId round) override;
  absl::StatusOr<StoredAttempt> GetAttempt(Attempt attempt) override;
  absl::StatusOr<std::vector<AcceptedRound>> FindAccepted(const AcceptedQuery& query) override;
  absl::StatusOr<bool> IsSubmitted(absl::string_view client_id) override;
  absl::StatusOr<bool> HasFile(absl::string_view digest) override;
  absl::StatusOr<std::string> GetFile(absl::string_view digest) override;
  absl::StatusOr<std::vector<std::string>> ReadRecords(Attempt attempt, uint64_t first_sequence,
                                                       size_t limit) override;
  absl::StatusOr<std::optional<std::string>> ReadMeta(absl::string_view key) override;

 private:
  absl::Status LoadExperiments(Queue* queue);
  absl::Status LoadRounds(Queue* queue);
  absl::Status LoadTrials(Queue* queue);
  absl::Status LoadVoidAttempts(Queue* queue);

  // The round as an answer to `query`, or nullopt if it is none.
  absl::StatusOr<std::optional<AcceptedRound>> MatchRound(RoundId round,
                                                          const AcceptedQuery& query);

  std::unique_ptr<Database> database_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_SQLITE_READER_H_
