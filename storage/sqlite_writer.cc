#include "storage/sqlite_writer.h"

#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "storage/operation_results.h"
#include "storage/sqlite_reader.h"

namespace kvsweep {
namespace {

// Columns of table summary before those of the metrics.
constexpr int kSummaryContextColumns = 13;

RoundState EndOf(FinishRound::State state) {
  switch (state) {
    case FinishRound::State::kFailed:
      return RoundState::kFailed;
    case FinishRound::State::kCancelled:
      return RoundState::kCancelled;
    case FinishRound::State::kPoisoned:
      return RoundState::kPoisoned;
  }
  return RoundState::kFailed;
}

// Rows of a void attempt stay as long, for whoever wants to know what went wrong.
constexpr int64_t kVoidRowsKeptNs = int64_t{7} * 24 * 3600 * 1'000'000'000;

bool HasEnded(RoundState state) {
  return state != RoundState::kQueued && state != RoundState::kRunning;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SqliteWriter>> SqliteWriter::Create(Database& database) {
  std::unique_ptr<SqliteWriter> writer(new SqliteWriter(database));
  ASSIGN_OR_RETURN(writer->records_, RecordWriter::Create(database));
  RETURN_IF_ERROR(writer->PrepareSummary());
  RETURN_IF_ERROR(writer->FindVoidRows());
  return writer;
}

absl::StatusOr<OperationResult> SqliteWriter::Apply(const Operation& operation) {
  return std::visit([this](const auto& which) { return Do(which); }, operation);
}

// ---------------------------------------------------------------------------------------- attempts

absl::StatusOr<OperationResult> SqliteWriter::Do(const GrantAttempt& operation) {
  const uint64_t attempt = operation.attempt.value();
  ASSIGN_OR_RETURN(const int64_t highest, database_.QueryInt("SELECT max(attempt) FROM attempt"));
  if (attempt <= static_cast<uint64_t>(highest) || attempt > kMaxAttempt) {
    return Refused(absl::FailedPreconditionError(
        absl::StrCat("attempt ", attempt, " is not above ", highest, ", the highest so far")));
  }
  const absl::StatusOr<RoundState> state = ReadRoundState(database_, operation.round);
  if (absl::IsNotFound(state.status())) return Refused(state.status());
  RETURN_IF_ERROR(state.status());
  if (*state != RoundState::kQueued) {
    return Refused(absl::FailedPreconditionError(absl::StrCat(
        "round ", operation.round.value(), " is ", RoundStateName(*state), ", not queued")));
  }
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO attempt (attempt, round_id, worker_id, incarnation, machine, "
                        "slot, neighbours, state, granted_unix_ns) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'open', ?8)"));
  RETURN_IF_ERROR(insert->BindInt(1, static_cast<int64_t>(attempt))
                      .BindInt(2, static_cast<int64_t>(operation.round.value()))
                      .BindText(3, operation.worker_id)
                      .BindInt(4, static_cast<int64_t>(operation.incarnation))
                      .BindText(5, operation.machine)
                      .BindInt(6, operation.slot)
                      .BindInt(7, operation.neighbours)
                      .BindInt(8, operation.granted_unix_ns)
                      .Run());
  RETURN_IF_ERROR(SetRoundState(operation.round, RoundState::kRunning, operation.attempt));
  return Done();
}

absl::Status SqliteWriter::SetRoundState(RoundId round, RoundState state,
                                         std::optional<Attempt> attempt) {
  ASSIGN_OR_RETURN(
      Statement * update,
      database_.Prepare("UPDATE round SET state = ?2, attempt = ?3 WHERE round_id = ?1"));
  update->BindInt(1, static_cast<int64_t>(round.value())).BindText(2, RoundStateName(state));
  BindOptional(*update, 3, attempt);
  return update->Run();
}

absl::StatusOr<SqliteWriter::OpenAttempt*> SqliteWriter::FindOpen(Attempt attempt) {
  const auto found = open_.find(attempt);
  if (found != open_.end()) return &found->second;
  ASSIGN_OR_RETURN(const StoredAttempt stored, ReadAttempt(database_, attempt));
  if (stored.state != AttemptState::kOpen) {
    return absl::FailedPreconditionError(
        absl::StrCat("attempt ", attempt.value(), " is ", AttemptStateName(stored.state),
                     stored.reason.empty() ? "" : ": ", stored.reason));
  }
  ASSIGN_OR_RETURN(std::vector<TrialId> trials, ReadTrialIds(database_, stored.round));
  OpenAttempt open{.round = stored.round,
                   .trials = std::move(trials),
                   .last_sequence = stored.last_sequence,
                   .finished = stored.finished};
  return &open_.emplace(attempt, std::move(open)).first->second;
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const AppendRecords& operation) {
  const absl::StatusOr<OpenAttempt*> found = FindOpen(operation.attempt);
  if (absl::IsNotFound(found.status()) || absl::IsFailedPrecondition(found.status())) {
    return Done(AppendResult{.state = AppendResult::State::kRefused,
                             .acknowledged_through = 0,
                             .finished = false,
                             .reason = std::string(found.status().message())});
  }
  RETURN_IF_ERROR(found.status());
  OpenAttempt& open = **found;
  absl::Status broken = operation.first_sequence == 0
                            ? absl::InvalidArgumentError("sequences start at 1")
                            : absl::OkStatus();
  uint64_t sequence = operation.first_sequence;
  for (const std::string& bytes : operation.records) {
    if (!broken.ok() || sequence > open.last_sequence + 1) break;  // past a gap nothing is stored
    ASSIGN_OR_RETURN(broken, StoreRecord(operation.attempt, open, sequence, bytes));
    ++sequence;
  }
  arena_.Reset();
  RETURN_IF_ERROR(SaveProgress(operation.attempt, open));
  AppendResult result{.state = AppendResult::State::kStored,
                      .acknowledged_through = open.last_sequence,
                      .finished = open.finished,
                      .reason = ""};
  if (!broken.ok()) {
    result.state = AppendResult::State::kVoided;
    result.reason = std::string(broken.message());
    RETURN_IF_ERROR(EndAttempt({.attempt = operation.attempt,
                                .reason = result.reason,
                                .worker_lost = false,
                                .running_trial = std::nullopt,
                                .voided_unix_ns = operation.received_unix_ns}));
  }
  return Done(std::move(result));
}

absl::StatusOr<absl::Status> SqliteWriter::StoreRecord(Attempt attempt, OpenAttempt& open,
                                                       uint64_t sequence,
                                                       const std::string& bytes) {
  if (sequence <= open.last_sequence) {
    ASSIGN_OR_RETURN(const bool equal, IsStored(attempt, sequence, bytes));
    if (equal) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("record ", sequence, " was sent again with other content"));
  }
  if (open.finished) {
    return absl::InvalidArgumentError(absl::StrCat("record ", sequence, " after the finish"));
  }
  if (sequence > kMaxSequence) {
    return absl::InvalidArgumentError("an attempt has more than 2^32 - 1 records");
  }
  Record* record = google::protobuf::Arena::CreateMessage<Record>(&arena_);
  const absl::Status sound = ParseRecord(bytes, record);
  if (!sound.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("record ", sequence, ": ", sound.message()));
  }
  if (!record->has_finish() && !absl::c_linear_search(open.trials, TrialId(record->trial_id()))) {
    return absl::InvalidArgumentError(absl::StrCat(
        "record ", sequence, " is of trial ", record->trial_id(), ", which is not of this round"));
  }
  RETURN_IF_ERROR(records_->Insert(RecordId(attempt, sequence), *record));
  open.last_sequence = sequence;
  open.finished = record->has_finish();
  return absl::OkStatus();
}

absl::StatusOr<bool> SqliteWriter::IsStored(Attempt attempt, uint64_t sequence,
                                            const std::string& bytes) {
  const int64_t id = RecordId(attempt, sequence);
  ASSIGN_OR_RETURN(RecordCursor cursor, RecordCursor::Open(database_, id, id));
  Record record;
  int64_t record_id = 0;
  ASSIGN_OR_RETURN(const bool found, cursor.Next(&record_id, &record));
  std::string stored;
  SerializeRecord(record, &stored);
  return found && stored == bytes;
}

absl::Status SqliteWriter::SaveProgress(Attempt attempt, const OpenAttempt& open) {
  ASSIGN_OR_RETURN(Statement * update,
                   database_.Prepare("UPDATE attempt SET last_sequence = ?2, finished = ?3 "
                                     "WHERE attempt = ?1"));
  return update->BindInt(1, static_cast<int64_t>(attempt.value()))
      .BindInt(2, static_cast<int64_t>(open.last_sequence))
      .BindInt(3, open.finished)
      .Run();
}

// --------------------------------------------------------------------------------------- accepting

absl::StatusOr<OperationResult> SqliteWriter::Do(const AcceptAttempt& operation) {
  const auto answer = [](AcceptResult::State state, absl::string_view reason) {
    return Done(AcceptResult{.state = state, .reason = std::string(reason)});
  };
  const absl::StatusOr<StoredAttempt> attempt = ReadAttempt(database_, operation.attempt);
  if (absl::IsNotFound(attempt.status())) {
    return answer(AcceptResult::State::kRefused, attempt.status().message());
  }
  RETURN_IF_ERROR(attempt.status());
  if (attempt->state != AttemptState::kOpen) {
    return answer(AcceptResult::State::kRefused,
                  absl::StrCat("attempt ", operation.attempt.value(), " is ",
                               AttemptStateName(attempt->state)));
  }
  if (!attempt->finished) {
    return answer(AcceptResult::State::kUnfinished, "the finish record has not arrived");
  }
  ASSIGN_OR_RETURN(const absl::StatusOr<std::vector<TrialAccount>> accounts, Audit(*attempt));
  if (!accounts.ok()) {
    RETURN_IF_ERROR(EndAttempt({.attempt = operation.attempt,
                                .reason = std::string(accounts.status().message()),
                                .worker_lost = false,
                                .running_trial = std::nullopt,
                                .voided_unix_ns = operation.accepted_unix_ns}));
    return answer(AcceptResult::State::kVoided, accounts.status().message());
  }
  for (const TrialAccount& account : *accounts) {
    RETURN_IF_ERROR(SaveAccount(operation.attempt, account));
  }
  ASSIGN_OR_RETURN(Statement * accept,
                   database_.Prepare("UPDATE attempt SET state = 'accepted', ended_unix_ns = ?2 "
                                     "WHERE attempt = ?1"));
  RETURN_IF_ERROR(accept->BindInt(1, static_cast<int64_t>(operation.attempt.value()))
                      .BindInt(2, operation.accepted_unix_ns)
                      .Run());
  ASSIGN_OR_RETURN(Statement * finish, database_.Prepare("UPDATE round SET state = 'done', "
                                                         "finished_unix_ns = ?2 "
                                                         "WHERE round_id = ?1"));
  RETURN_IF_ERROR(finish->BindInt(1, static_cast<int64_t>(attempt->round.value()))
                      .BindInt(2, operation.accepted_unix_ns)
                      .Run());
  open_.erase(operation.attempt);
  RETURN_IF_ERROR(Prune(operation.accepted_unix_ns));
  return answer(AcceptResult::State::kAccepted, "");
}

// The inner status is the audit's verdict.
absl::StatusOr<absl::StatusOr<std::vector<TrialAccount>>> SqliteWriter::Audit(
    const StoredAttempt& attempt) {
  using Verdict = absl::StatusOr<std::vector<TrialAccount>>;
  ASSIGN_OR_RETURN(StoredRound round, ReadRound(database_, attempt.round));
  std::vector<AuditedTrial> trials;
  for (PlannedTrial& planned : *round.spec.mutable_trials()) {
    trials.push_back({planned.trial_id(), std::move(*planned.mutable_spec())});
  }
  AttemptAudit audit(std::move(trials));
  ASSIGN_OR_RETURN(RecordCursor cursor,
                   RecordCursor::Open(database_, RecordId(attempt.attempt, 0),
                                      RecordId(attempt.attempt, kMaxSequence)));
  Record record;
  std::string bytes;
  uint64_t expected = 1;
  for (int64_t record_id = 0;; ++expected) {
    ASSIGN_OR_RETURN(const bool more, cursor.Next(&record_id, &record));
    if (!more) return Verdict(audit.Judge());
    if (record_id != RecordId(attempt.attempt, expected)) {
      return Verdict(absl::InvalidArgumentError(absl::StrCat("record ", expected, " is missing")));
    }
    SerializeRecord(record, &bytes);
    const absl::Status fits = audit.Add(bytes, record);
    if (!fits.ok()) return Verdict(fits);
  }
}

absl::Status SqliteWriter::SaveAccount(Attempt attempt, const TrialAccount& account) {
  ASSIGN_OR_RETURN(Statement * update,
                   database_.Prepare("UPDATE trial SET first_record = ?2, last_record = ?3 "
                                     "WHERE trial_id = ?1"));
  RETURN_IF_ERROR(update->BindInt(1, static_cast<int64_t>(account.trial_id))
                      .BindInt(2, RecordId(attempt, account.first_sequence))
                      .BindInt(3, RecordId(attempt, account.last_sequence))
                      .Run());
  return SaveSummary(account);
}

absl::Status SqliteWriter::PrepareSummary() {
  std::string columns =
      "trial_id, outcome, evidence, duration_ns, engagement, backend, device, "
      "device_class, driver, time_mode, runner_build, method_version, executions";
  std::string parameters = "?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13";
  int parameter = kSummaryContextColumns;
  for (const std::vector<MetricInfo>* metrics : {&Metrics(), &QualityMetrics()}) {
    for (const MetricInfo& metric : *metrics) {
      metric_parameters_[metric.name] = ++parameter;
      absl::StrAppend(&columns, ", \"", metric.name, "\"");
      absl::StrAppend(&parameters, ", ?", parameter);
    }
  }
  ASSIGN_OR_RETURN(summary_, database_.Compile(absl::StrCat("INSERT INTO summary (", columns,
                                                            ") VALUES (", parameters, ")")));
  return absl::OkStatus();
}

absl::Status SqliteWriter::SaveSummary(const TrialAccount& account) {
  const std::string outcome = OutcomeName(account.outcome.outcome());
  sqlite3_clear_bindings(summary_->get());  // a metric without value is null
  summary_->BindInt(1, static_cast<int64_t>(account.trial_id))
      .BindText(2, outcome)
      .BindText(3, account.outcome.evidence())
      .BindInt(4, account.outcome.duration_ns())
      .BindText(5, EngagementName(account.engagement))
      .BindText(6, account.start.backend())
      .BindText(7, account.start.device())
      .BindText(8, account.start.device_class())
      .BindText(9, account.start.driver())
      .BindText(10, account.start.time_mode())
      .BindText(11, account.start.runner_build())
      .BindInt(12, account.start.method_version())
      .BindInt(13, account.start.execution());
  ASSIGN_OR_RETURN(Statement * note,
                   database_.Prepare("INSERT INTO summary_note VALUES (?1, ?2, ?3)"));
  for (const SummaryMetric& metric : account.metrics) {
    if (metric.value.has_value()) {
      summary_->BindReal(metric_parameters_.at(metric.name), *metric.value);
      continue;
    }
    RETURN_IF_ERROR(note->BindInt(1, static_cast<int64_t>(account.trial_id))
                        .BindText(2, metric.name)
                        .BindText(3, metric.reason)
                        .Run());
  }
  return summary_->Run();
}

absl::Status SqliteWriter::EndAttempt(const VoidAttempt& how) {
  ASSIGN_OR_RETURN(const StoredAttempt attempt, ReadAttempt(database_, how.attempt));
  ASSIGN_OR_RETURN(
      Statement * update,
      database_.Prepare("UPDATE attempt SET state = 'void', reason = ?2, worker_lost = ?3, "
                        "running_trial_id = ?4, ended_unix_ns = ?5 WHERE attempt = ?1"));
  update->BindInt(1, static_cast<int64_t>(how.attempt.value()))
      .BindText(2, how.reason)
      .BindInt(3, how.worker_lost)
      .BindInt(5, how.voided_unix_ns);
  BindOptional(*update, 4, how.running_trial);
  RETURN_IF_ERROR(update->Run());
  open_.erase(how.attempt);
  void_.push_back({.attempt = how.attempt, .ended_unix_ns = how.voided_unix_ns});
  return SetRoundState(attempt.round, RoundState::kQueued, std::nullopt);
}

absl::Status SqliteWriter::FindVoidRows() {
  ASSIGN_OR_RETURN(Statement rows,
                   database_.Compile("SELECT attempt, ended_unix_ns FROM attempt WHERE state = "
                                     "'void' AND last_sequence > 0 ORDER BY ended_unix_ns"));
  while (true) {
    ASSIGN_OR_RETURN(const bool more, rows.Step());
    if (!more) return absl::OkStatus();
    void_.push_back({.attempt = Attempt(rows.Int(0)), .ended_unix_ns = rows.Int(1)});
  }
}

// At most one attempt for each round that ends, so that no transaction grows long. The attempt
// itself stays, with its reason.
absl::Status SqliteWriter::Prune(int64_t now_unix_ns) {
  if (void_.empty() || now_unix_ns - void_.front().ended_unix_ns < kVoidRowsKeptNs) {
    return absl::OkStatus();
  }
  const Attempt attempt = void_.front().attempt;
  void_.pop_front();
  RETURN_IF_ERROR(DeleteRecords(database_, attempt));
  ASSIGN_OR_RETURN(Statement * update,
                   database_.Prepare("UPDATE attempt SET last_sequence = 0 WHERE attempt = ?1"));
  return update->BindInt(1, static_cast<int64_t>(attempt.value())).Run();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const VoidAttempt& operation) {
  const absl::StatusOr<StoredAttempt> attempt = ReadAttempt(database_, operation.attempt);
  if (absl::IsNotFound(attempt.status())) return Refused(attempt.status());
  RETURN_IF_ERROR(attempt.status());
  if (attempt->state != AttemptState::kOpen) {
    return Refused(absl::FailedPreconditionError(absl::StrCat(
        "attempt ", operation.attempt.value(), " is ", AttemptStateName(attempt->state))));
  }
  RETURN_IF_ERROR(EndAttempt(operation));
  return Done();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const FinishRound& operation) {
  const absl::StatusOr<RoundState> state = ReadRoundState(database_, operation.round);
  if (absl::IsNotFound(state.status())) return Refused(state.status());
  RETURN_IF_ERROR(state.status());
  if (HasEnded(*state)) {
    return Refused(absl::FailedPreconditionError(absl::StrCat(
        "round ", operation.round.value(), " is ", RoundStateName(*state), " already")));
  }
  ASSIGN_OR_RETURN(Statement * open,
                   database_.Prepare("SELECT attempt FROM round WHERE round_id = ?1"));
  ASSIGN_OR_RETURN(const bool found,
                   open->BindInt(1, static_cast<int64_t>(operation.round.value())).Step());
  const std::optional<int64_t> attempt = found ? open->OptionalInt(0) : std::nullopt;
  open->Reset();
  if (attempt.has_value()) {
    RETURN_IF_ERROR(EndAttempt({.attempt = Attempt(*attempt),
                                .reason = operation.reason,
                                .worker_lost = false,
                                .running_trial = std::nullopt,
                                .voided_unix_ns = operation.finished_unix_ns}));
  }
  ASSIGN_OR_RETURN(
      Statement * update,
      database_.Prepare("UPDATE round SET state = ?2, reason = ?3, poisoned_trial_id = ?4, "
                        "finished_unix_ns = ?5, attempt = NULL WHERE round_id = ?1"));
  update->BindInt(1, static_cast<int64_t>(operation.round.value()))
      .BindText(2, RoundStateName(EndOf(operation.state)))
      .BindText(3, operation.reason)
      .BindInt(5, operation.finished_unix_ns);
  BindOptional(*update, 4, operation.poisoned_trial);
  RETURN_IF_ERROR(update->Run());
  RETURN_IF_ERROR(Prune(operation.finished_unix_ns));
  return Done();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const CancelExperiment& operation) {
  const int64_t experiment = static_cast<int64_t>(operation.experiment.value());
  ASSIGN_OR_RETURN(Statement * exists,
                   database_.Prepare("SELECT 1 FROM experiment WHERE experiment_id = ?1"));
  ASSIGN_OR_RETURN(const bool known, exists->BindInt(1, experiment).Step());
  exists->Reset();
  if (!known) {
    return Refused(absl::NotFoundError(absl::StrCat("the store has no experiment ", experiment)));
  }
  CancelResult result;
  ASSIGN_OR_RETURN(Statement * rounds,
                   database_.Prepare("SELECT round_id, attempt FROM round WHERE experiment_id = ?1 "
                                     "AND state IN ('queued', 'running') ORDER BY round_id"));
  rounds->BindInt(1, experiment);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, rounds->Step());
    if (!more) break;
    result.rounds.push_back(RoundId(rounds->Int(0)));
    if (!rounds->IsNull(1)) result.attempts.push_back(Attempt(rounds->Int(1)));
  }
  for (const RoundId round : result.rounds) {
    ASSIGN_OR_RETURN(const OperationResult finished,
                     Do(FinishRound{.round = round,
                                    .state = FinishRound::State::kCancelled,
                                    .poisoned_trial = std::nullopt,
                                    .reason = "cancelled",
                                    .finished_unix_ns = operation.cancelled_unix_ns}));
    KVSWEEP_CHECK_OK(finished.status);
  }
  return Done(std::move(result));
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const AddLogLine& operation) {
  const absl::StatusOr<RoundState> state = ReadRoundState(database_, operation.round);
  if (absl::IsNotFound(state.status())) return Refused(state.status());
  RETURN_IF_ERROR(state.status());
  ASSIGN_OR_RETURN(Statement * insert,
                   database_.Prepare("INSERT INTO log_line (round_id, trial_id, attempt, unix_ns, "
                                     "text) VALUES (?1, ?2, ?3, ?4, ?5)"));
  insert->BindInt(1, static_cast<int64_t>(operation.round.value()))
      .BindInt(4, operation.unix_ns)
      .BindText(5, operation.text);
  BindOptional(*insert, 2, operation.trial);
  BindOptional(*insert, 3, operation.attempt);
  RETURN_IF_ERROR(insert->Run());
  return Done();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const PutMeta& operation) {
  ASSIGN_OR_RETURN(Statement * insert,
                   database_.Prepare("INSERT OR REPLACE INTO meta VALUES (?1, ?2)"));
  RETURN_IF_ERROR(insert->BindText(1, operation.key).BindBlob(2, operation.value).Run());
  return Done();
}

}  // namespace kvsweep
