#include "storage/sqlite_reader.h"

#include <zstd.h>

#include <algorithm>
#include <limits>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "storage/record_tables.h"

namespace kvsweep {
namespace {

// Rounds looked at for one content key, newest first.
constexpr int64_t kCandidatesPerKey = 256;

// Everything that a reader does in one call happens between these, so that it sees one state.
class ReadTransaction {
 public:
  static absl::StatusOr<std::unique_ptr<ReadTransaction>> Begin(Database& database) {
    RETURN_IF_ERROR(database.Execute("BEGIN"));
    return std::make_unique<ReadTransaction>(database);
  }
  explicit ReadTransaction(Database& database) : database_(database) {}
  // Nothing was written, so there is nothing that ending could fail to keep.
  ~ReadTransaction() { database_.Execute("COMMIT").IgnoreError(); }
  ReadTransaction(const ReadTransaction&) = delete;
  ReadTransaction& operator=(const ReadTransaction&) = delete;

 private:
  Database& database_;
};

absl::Status Missing(absl::string_view what, uint64_t id) {
  return absl::NotFoundError(absl::StrCat("the store has no ", what, " ", id));
}

StoredAttempt AttemptOf(const Statement& row) {
  StoredAttempt attempt;
  attempt.attempt = Attempt(row.Int(0));
  attempt.round = RoundId(row.Int(1));
  const absl::string_view state = row.Bytes(2);
  attempt.state = state == "open"       ? AttemptState::kOpen
                  : state == "accepted" ? AttemptState::kAccepted
                                        : AttemptState::kVoid;
  attempt.reason = row.String(3);
  attempt.worker_id = row.String(4);
  attempt.incarnation = static_cast<uint64_t>(row.Int(5));
  attempt.machine = row.String(6);
  attempt.slot = static_cast<uint32_t>(row.Int(7));
  attempt.last_sequence = row.Int(8);
  attempt.finished = row.Int(9) != 0;
  return attempt;
}

std::optional<TrialId> OptionalTrial(const Statement& row, int column) {
  if (row.IsNull(column)) return std::nullopt;
  return TrialId(row.Int(column));
}

absl::Status ReadRoundTrials(Database& database, StoredRound* round) {
  ASSIGN_OR_RETURN(Statement * trials,
                   database.Prepare("SELECT trial_id, arm_index, a.name, a.strategy, content_key, "
                                    "spec FROM trial t JOIN arm a USING (arm_index) "
                                    "WHERE round_id = ?1 AND a.experiment_id = ?2 "
                                    "ORDER BY position"));
  const StatementUse use(*trials);
  trials->BindInt(1, round->round.value()).BindInt(2, round->experiment.value());
  while (true) {
    ASSIGN_OR_RETURN(const bool more, trials->Step());
    if (!more) return absl::OkStatus();
    round->trials.push_back({.trial = TrialId(trials->Int(0)),
                             .arm_name = trials->String(2),
                             .arm_index = static_cast<uint32_t>(trials->Int(1)),
                             .strategy = trials->String(3)});
    PlannedTrial* planned = round->spec.add_trials();
    planned->set_trial_id(trials->Int(0));
    planned->set_content_key(trials->String(4));
    const absl::string_view spec = trials->Bytes(5);
    if (!planned->mutable_spec()->ParseFromArray(spec.data(), static_cast<int>(spec.size()))) {
      return absl::DataLossError(absl::StrCat("the spec of trial ", trials->Int(0), " is damaged"));
    }
  }
}

}  // namespace

absl::StatusOr<RoundState> ParseRoundState(absl::string_view name) {
  for (const RoundState state :
       {RoundState::kQueued, RoundState::kRunning, RoundState::kDone, RoundState::kServed,
        RoundState::kFailed, RoundState::kCancelled, RoundState::kPoisoned}) {
    if (RoundStateName(state) == name) return state;
  }
  return absl::DataLossError(absl::StrCat("a round has the unknown state \"", name, "\""));
}

absl::StatusOr<StoredAttempt> ReadAttempt(Database& database, Attempt attempt) {
  ASSIGN_OR_RETURN(Statement * query,
                   database.Prepare("SELECT attempt, round_id, state, reason, worker_id, "
                                    "incarnation, machine, slot, last_sequence, finished "
                                    "FROM attempt WHERE attempt = ?1"));
  const StatementUse use(*query);
  query->BindInt(1, static_cast<int64_t>(attempt.value()));
  ASSIGN_OR_RETURN(const bool found, query->Step());
  if (!found) return Missing("attempt", attempt.value());
  return AttemptOf(*query);
}

absl::StatusOr<StoredRound> ReadRound(Database& database, RoundId id) {
  ASSIGN_OR_RETURN(Statement * query,
                   database.Prepare("SELECT r.experiment_id, cell_index, c.name, repeat, kind, "
                                    "state, reason, devices, uses_host_tier, served_by "
                                    "FROM round r JOIN cell c USING (experiment_id, cell_index) "
                                    "WHERE round_id = ?1"));
  const StatementUse use(*query);
  query->BindInt(1, static_cast<int64_t>(id.value()));
  ASSIGN_OR_RETURN(const bool found, query->Step());
  if (!found) return Missing("round", id.value());
  StoredRound round;
  round.round = id;
  round.experiment = ExperimentId(query->Int(0));
  round.cell_index = static_cast<uint32_t>(query->Int(1));
  round.cell_name = query->String(2);
  round.repeat = static_cast<uint32_t>(query->Int(3));
  round.kind = query->Bytes(4) == "quality" ? TrialSpec::KIND_QUALITY : TrialSpec::KIND_LOAD;
  ASSIGN_OR_RETURN(round.state, ParseRoundState(query->Bytes(5)));
  round.reason = query->String(6);
  round.spec.set_devices(static_cast<uint32_t>(query->Int(7)));
  round.spec.set_uses_host_tier(query->Int(8) != 0);
  if (!query->IsNull(9)) round.served_by = RoundId(query->Int(9));
  RETURN_IF_ERROR(ReadRoundTrials(database, &round));
  return round;
}

absl::StatusOr<RoundState> ReadRoundState(Database& database, RoundId round) {
  ASSIGN_OR_RETURN(Statement * query,
                   database.Prepare("SELECT state FROM round WHERE round_id = ?1"));
  const StatementUse use(*query);
  ASSIGN_OR_RETURN(const bool found, query->BindInt(1, static_cast<int64_t>(round.value())).Step());
  if (!found) return Missing("round", round.value());
  return ParseRoundState(query->Bytes(0));
}

absl::StatusOr<bool> ReadHasFile(Database& database, absl::string_view digest) {
  ASSIGN_OR_RETURN(Statement * query, database.Prepare("SELECT 1 FROM file WHERE digest = ?1"));
  const StatementUse use(*query);
  return query->BindBlob(1, digest).Step();
}

absl::StatusOr<std::vector<TrialId>> ReadTrialIds(Database& database, RoundId round) {
  ASSIGN_OR_RETURN(
      Statement * query,
      database.Prepare("SELECT trial_id FROM trial WHERE round_id = ?1 ORDER BY position"));
  const StatementUse use(*query);
  query->BindInt(1, static_cast<int64_t>(round.value()));
  std::vector<TrialId> trials;
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return trials;
    trials.push_back(TrialId(query->Int(0)));
  }
}

absl::StatusOr<StoredRound> SqliteReader::GetRound(RoundId round) {
  ASSIGN_OR_RETURN(const auto transaction, ReadTransaction::Begin(*database_));
  return ReadRound(*database_, round);
}

absl::StatusOr<StoredAttempt> SqliteReader::GetAttempt(Attempt attempt) {
  return ReadAttempt(*database_, attempt);
}

absl::StatusOr<bool> SqliteReader::IsSubmitted(absl::string_view client_id) {
  ASSIGN_OR_RETURN(Statement * query,
                   database_->Prepare("SELECT 1 FROM experiment WHERE client_id = ?1"));
  const StatementUse use(*query);
  query->BindText(1, client_id);
  return query->Step();
}

absl::StatusOr<bool> SqliteReader::HasFile(absl::string_view digest) {
  return ReadHasFile(*database_, digest);
}

absl::StatusOr<std::string> SqliteReader::GetFile(absl::string_view digest) {
  ASSIGN_OR_RETURN(Statement * query,
                   database_->Prepare("SELECT bytes, content FROM file WHERE digest = ?1"));
  const StatementUse use(*query);
  query->BindBlob(1, digest);
  ASSIGN_OR_RETURN(const bool found, query->Step());
  if (!found) return absl::NotFoundError("the store has no file with that digest");
  const int64_t bytes = query->Int(0);
  if (bytes < 0 || bytes > limits::kTravellingFileBytes) {
    return absl::DataLossError("a stored file is damaged: its length is out of bounds");
  }
  const absl::string_view content = query->Bytes(1);
  std::string file(bytes, '\0');
  const size_t size = ZSTD_decompress(file.data(), file.size(), content.data(), content.size());
  if (ZSTD_isError(size) || size != file.size()) {
    return absl::DataLossError("a stored file is damaged: it cannot be decompressed");
  }
  return file;
}

absl::StatusOr<std::vector<std::string>> SqliteReader::ReadRecords(Attempt attempt,
                                                                   uint64_t first_sequence,
                                                                   size_t limit) {
  std::vector<std::string> records;
  if (attempt.value() > kMaxAttempt || first_sequence > kMaxSequence) return records;
  ASSIGN_OR_RETURN(const auto transaction, ReadTransaction::Begin(*database_));
  ASSIGN_OR_RETURN(RecordCursor cursor,
                   RecordCursor::Open(*database_, RecordId(attempt, first_sequence),
                                      RecordId(attempt, kMaxSequence)));
  Record record;
  int64_t record_id = 0;
  while (records.size() < limit) {
    ASSIGN_OR_RETURN(const bool more, cursor.Next(&record_id, &record));
    if (!more) break;
    SerializeRecord(record, &records.emplace_back());
  }
  return records;
}

absl::StatusOr<std::optional<std::string>> SqliteReader::ReadMeta(absl::string_view key) {
  ASSIGN_OR_RETURN(Statement * query, database_->Prepare("SELECT value FROM meta WHERE key = ?1"));
  const StatementUse use(*query);
  ASSIGN_OR_RETURN(const bool found, query->BindText(1, key).Step());
  if (!found) return std::optional<std::string>();
  return std::optional<std::string>(query->String(0));
}

absl::StatusOr<Queue> SqliteReader::LoadQueue() {
  ASSIGN_OR_RETURN(const auto transaction, ReadTransaction::Begin(*database_));
  Queue queue;
  RETURN_IF_ERROR(LoadExperiments(&queue));
  RETURN_IF_ERROR(LoadRounds(&queue));
  RETURN_IF_ERROR(LoadTrials(&queue));
  RETURN_IF_ERROR(LoadVoidAttempts(&queue));
  ASSIGN_OR_RETURN(const int64_t highest, database_->QueryInt("SELECT max(attempt) FROM attempt"));
  queue.highest_attempt = Attempt(highest);
  return queue;
}

absl::Status SqliteReader::LoadExperiments(Queue* queue) {
  ASSIGN_OR_RETURN(Statement * query,
                   database_->Prepare(
                       "SELECT e.experiment_id, e.name, e.model_name, e.model_digest, count(*), "
                       "sum(r.state = 'done'), sum(r.state = 'served'), sum(r.state = 'failed'), "
                       "sum(r.state = 'cancelled'), sum(r.state = 'poisoned') "
                       "FROM experiment e JOIN round r USING (experiment_id) "
                       "WHERE e.experiment_id IN (SELECT experiment_id FROM round WHERE state IN "
                       "('queued', 'running')) GROUP BY e.experiment_id ORDER BY e.experiment_id"));
  const StatementUse use(*query);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return absl::OkStatus();
    queue->experiments.push_back({.experiment = ExperimentId(query->Int(0)),
                                  .name = query->String(1),
                                  .model_name = query->String(2),
                                  .model_digest = query->String(3),
                                  .rounds = static_cast<uint64_t>(query->Int(4)),
                                  .rounds_done = static_cast<uint64_t>(query->Int(5)),
                                  .rounds_served = static_cast<uint64_t>(query->Int(6)),
                                  .rounds_failed = static_cast<uint64_t>(query->Int(7)),
                                  .rounds_cancelled = static_cast<uint64_t>(query->Int(8)),
                                  .rounds_poisoned = static_cast<uint64_t>(query->Int(9))});
  }
}

absl::Status SqliteReader::LoadRounds(Queue* queue) {
  ASSIGN_OR_RETURN(Statement * query,
                   database_->Prepare("SELECT round_id, experiment_id, devices, uses_host_tier, "
                                      "backend, modelled_time, attempt FROM round "
                                      "WHERE state IN ('queued', 'running') ORDER BY round_id"));
  const StatementUse use(*query);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return absl::OkStatus();
    QueuedRound round;
    round.round = RoundId(query->Int(0));
    round.experiment = ExperimentId(query->Int(1));
    round.devices = static_cast<uint32_t>(query->Int(2));
    round.uses_host_tier = query->Int(3) != 0;
    round.backend = query->String(4);
    round.modelled_time = query->Int(5) != 0;
    if (!query->IsNull(6)) {
      ASSIGN_OR_RETURN(round.open_attempt, ReadAttempt(*database_, Attempt(query->Int(6))));
    }
    queue->rounds.push_back(std::move(round));
  }
}

absl::Status SqliteReader::LoadTrials(Queue* queue) {
  ASSIGN_OR_RETURN(Statement * query,
                   database_->Prepare("SELECT round_id, trial_id FROM round JOIN trial USING "
                                      "(round_id) WHERE state IN ('queued', 'running') "
                                      "ORDER BY round_id, position"));
  const StatementUse use(*query);
  auto round = queue->rounds.begin();
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return absl::OkStatus();
    while (round->round != RoundId(query->Int(0))) ++round;  // every round has trials
    round->trials.push_back(TrialId(query->Int(1)));
  }
}

absl::Status SqliteReader::LoadVoidAttempts(Queue* queue) {
  ASSIGN_OR_RETURN(
      Statement * query,
      database_->Prepare("SELECT r.round_id, a.attempt, a.worker_id, a.machine, a.worker_lost, "
                         "a.running_trial_id, a.reason, a.ended_unix_ns "
                         "FROM round r JOIN attempt a USING (round_id) "
                         "WHERE r.state IN ('queued', 'running') AND a.state = 'void' "
                         "ORDER BY r.round_id, a.attempt"));
  const StatementUse use(*query);
  auto round = queue->rounds.begin();
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return absl::OkStatus();
    while (round->round != RoundId(query->Int(0))) ++round;
    round->void_attempts.push_back({.attempt = Attempt(query->Int(1)),
                                    .worker_id = query->String(2),
                                    .machine = query->String(3),
                                    .worker_lost = query->Int(4) != 0,
                                    .running_trial = OptionalTrial(*query, 5),
                                    .reason = query->String(6),
                                    .voided_unix_ns = query->Int(7)});
  }
}

absl::StatusOr<std::vector<AcceptedRound>> SqliteReader::FindAccepted(const AcceptedQuery& query) {
  ASSIGN_OR_RETURN(const auto transaction, ReadTransaction::Begin(*database_));
  std::set<RoundId> candidates;
  ASSIGN_OR_RETURN(Statement * by_key,
                   database_->Prepare("SELECT round_id FROM trial WHERE content_key = ?1 AND "
                                      "first_record IS NOT NULL ORDER BY trial_id DESC LIMIT ?2"));
  for (const std::string& key : query.content_keys) {
    const StatementUse use(*by_key);
    by_key->BindBlob(1, key).BindInt(2, kCandidatesPerKey);
    while (true) {
      ASSIGN_OR_RETURN(const bool more, by_key->Step());
      if (!more) break;
      candidates.insert(RoundId(by_key->Int(0)));
    }
  }
  std::vector<AcceptedRound> matches;
  for (auto round = candidates.rbegin(); round != candidates.rend(); ++round) {
    ASSIGN_OR_RETURN(std::optional<AcceptedRound> match, MatchRound(*round, query));
    if (match.has_value()) matches.push_back(*std::move(match));
  }
  std::stable_sort(matches.begin(), matches.end(),
                   [](const auto& a, const auto& b) { return a.trials.size() > b.trials.size(); });
  return matches;
}

absl::StatusOr<std::optional<AcceptedRound>> SqliteReader::MatchRound(RoundId round,
                                                                      const AcceptedQuery& query) {
  ASSIGN_OR_RETURN(
      Statement * trials,
      database_->Prepare("SELECT t.trial_id, t.content_key, s.outcome, s.runner_build, "
                         "s.method_version, s.device_class "
                         "FROM trial t JOIN summary s USING (trial_id) WHERE t.round_id = ?1 "
                         "ORDER BY t.position"));
  const StatementUse use(*trials);
  trials->BindInt(1, static_cast<int64_t>(round.value()));
  AcceptedRound match{.round = round, .trials = {}};
  while (true) {
    ASSIGN_OR_RETURN(const bool more, trials->Step());
    if (!more) return match;
    const absl::string_view outcome = trials->Bytes(2);
    const bool again = outcome == "ok" || outcome == "oom" || outcome == "infeasible" ||
                       outcome == "unstable" || outcome == "timeout";
    if (!again || !absl::c_linear_search(query.content_keys, trials->Bytes(1)) ||
        (query.runner_build.has_value() && trials->Bytes(3) != *query.runner_build) ||
        trials->Int(4) != query.method_version ||
        (!query.device_classes.empty() &&
         !absl::c_linear_search(query.device_classes, trials->Bytes(5)))) {
      return std::optional<AcceptedRound>();
    }
    match.trials.push_back({TrialId(trials->Int(0)), trials->String(1)});
  }
}

}  // namespace kvsweep
