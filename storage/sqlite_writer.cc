#include "storage/sqlite_writer.h"

#include <zstd.h>

#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "storage/json_text.h"
#include "storage/sqlite_reader.h"

namespace kvsweep {
namespace {

OperationResult Refused(absl::Status status) { return {.status = std::move(status), .value = {}}; }

template <typename Result>
OperationResult Done(Result result) {
  return {.status = absl::OkStatus(), .value = std::move(result)};
}

OperationResult Done() { return {}; }

absl::string_view BackendName(const Engine& engine) {
  switch (engine.backend()) {
    case Engine::BACKEND_CPU:
      return "cpu";
    case Engine::BACKEND_CUDA:
      return "cuda";
    default:
      return "";
  }
}

// Binds an id, or null for none.
template <typename Id>
void BindOptional(Statement& statement, int parameter, const std::optional<Id>& id) {
  if (id.has_value()) {
    statement.BindInt(parameter, static_cast<int64_t>(id->value()));
  } else {
    statement.BindNull(parameter);
  }
}

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

bool HasEnded(RoundState state) {
  return state != RoundState::kQueued && state != RoundState::kRunning;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SqliteWriter>> SqliteWriter::Create(Database& database) {
  std::unique_ptr<SqliteWriter> writer(new SqliteWriter(database));
  ASSIGN_OR_RETURN(writer->records_, RecordWriter::Create(database));
  return writer;
}

absl::StatusOr<OperationResult> SqliteWriter::Apply(const Operation& operation) {
  return std::visit([this](const auto& which) { return Do(which); }, operation);
}

// ----------------------------------------------------------------------------------------
// submitting

absl::StatusOr<OperationResult> SqliteWriter::Do(const SubmitExperiment& operation) {
  ASSIGN_OR_RETURN(std::optional<SubmitResult> known, FindSubmission(operation.client_id));
  if (known.has_value()) return Done(*std::move(known));
  ASSIGN_OR_RETURN(const absl::Status sound, CheckSubmission(operation));
  if (!sound.ok()) return Refused(sound);
  SubmitResult result;
  ASSIGN_OR_RETURN(result.experiment, InsertExperiment(operation));
  result.rounds.reserve(operation.rounds.size());
  for (const NewRound& round : operation.rounds) {
    ASSIGN_OR_RETURN(result.rounds.emplace_back(), InsertRound(result.experiment, round));
  }
  return Done(std::move(result));
}

absl::StatusOr<std::optional<SubmitResult>> SqliteWriter::FindSubmission(
    const std::string& client_id) {
  std::optional<SubmitResult> result;
  ASSIGN_OR_RETURN(
      Statement * query,
      database_.Prepare("SELECT e.experiment_id, r.round_id, r.state = 'served', t.trial_id "
                        "FROM experiment e LEFT JOIN round r USING (experiment_id) "
                        "LEFT JOIN trial t USING (round_id) WHERE e.client_id = ?1 "
                        "ORDER BY r.round_id, t.position"));
  const StatementUse use(*query);
  query->BindText(1, client_id);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return result;
    if (!result.has_value()) {
      result.emplace();
      result->experiment = ExperimentId(query->Int(0));
      result->repeated = true;
    }
    if (query->IsNull(1)) continue;  // an experiment without rounds
    const RoundId round(query->Int(1));
    if (result->rounds.empty() || result->rounds.back().round != round) {
      result->rounds.push_back({.round = round, .trials = {}, .served = query->Int(2) != 0});
    }
    result->rounds.back().trials.push_back(TrialId(query->Int(3)));
  }
}

absl::StatusOr<absl::Status> SqliteWriter::CheckSubmission(const SubmitExperiment& operation) {
  if (operation.client_id.empty()) return absl::InvalidArgumentError("the client id is empty");
  if (operation.reference_arm >= operation.arms.size()) {
    return absl::InvalidArgumentError("the reference arm is none of the arms");
  }
  for (const FileReference& file : operation.files) {
    if (static_cast<int64_t>(file.bytes()) > limits::kTravellingFileBytes) continue;
    ASSIGN_OR_RETURN(const bool known, ReadHasFile(database_, file.digest()));
    if (!known) {
      return absl::InvalidArgumentError(absl::StrCat("file ", file.path(), " is not in the store"));
    }
  }
  for (size_t i = 0; i < operation.rounds.size(); ++i) {
    const NewRound& round = operation.rounds[i];
    if (round.trials.empty() ||
        round.trials.size() != static_cast<size_t>(round.spec.trials_size()) ||
        round.cell_index >= operation.cells.size() ||
        absl::c_any_of(round.trials, [&](const NewTrial& trial) {
          return trial.arm_index >= operation.arms.size();
        })) {
      return absl::InvalidArgumentError(absl::StrCat("round ", i, " does not fit its experiment"));
    }
    ASSIGN_OR_RETURN(const absl::Status served, CheckServed(round));
    if (!served.ok()) return served;
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Status> SqliteWriter::CheckServed(const NewRound& round) {
  if (!round.served_by.has_value()) return absl::OkStatus();
  const absl::Status refused = absl::InvalidArgumentError(
      absl::StrCat("round ", round.served_by->value(), " cannot serve another"));
  const absl::StatusOr<StoredRound> source = ReadRound(database_, *round.served_by);
  if (absl::IsNotFound(source.status())) return refused;
  RETURN_IF_ERROR(source.status());
  if (source->state != RoundState::kDone) return refused;
  for (const NewTrial& trial : round.trials) {
    if (!absl::c_any_of(source->spec.trials(), [&](const PlannedTrial& planned) {
          return planned.content_key() == trial.content_key;
        })) {
      return refused;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ExperimentId> SqliteWriter::InsertExperiment(const SubmitExperiment& operation) {
  ASSIGN_OR_RETURN(Statement * insert,
                   database_.Prepare("INSERT INTO experiment (client_id, name, spec_text, spec, "
                                     "reference_arm, model_name, model_digest, submitted_unix_ns) "
                                     "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"));
  const std::string spec = operation.experiment.SerializeAsString();
  RETURN_IF_ERROR(insert->BindText(1, operation.client_id)
                      .BindText(2, operation.name)
                      .BindText(3, operation.spec_text)
                      .BindBlob(4, spec)
                      .BindInt(5, operation.reference_arm)
                      .BindText(6, operation.model.name())
                      .BindBlob(7, operation.model.digest())
                      .BindInt(8, operation.submitted_unix_ns)
                      .Run());
  const int64_t id = sqlite3_last_insert_rowid(database_.get());
  ASSIGN_OR_RETURN(Statement * file, database_.Prepare("INSERT OR IGNORE INTO experiment_file "
                                                       "VALUES (?1, ?2, ?3, ?4)"));
  for (const FileReference& reference : operation.files) {
    RETURN_IF_ERROR(file->BindInt(1, id)
                        .BindText(2, reference.path())
                        .BindBlob(3, reference.digest())
                        .BindInt(4, static_cast<int64_t>(reference.bytes()))
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement * arm, database_.Prepare("INSERT INTO arm VALUES (?1, ?2, ?3, ?4)"));
  for (size_t i = 0; i < operation.arms.size(); ++i) {
    RETURN_IF_ERROR(arm->BindInt(1, id)
                        .BindInt(2, static_cast<int64_t>(i))
                        .BindText(3, operation.arms[i].name)
                        .BindText(4, operation.arms[i].strategy)
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement * cell, database_.Prepare("INSERT INTO cell VALUES (?1, ?2, ?3, ?4)"));
  for (size_t i = 0; i < operation.cells.size(); ++i) {
    const std::string axes = JsonObject(operation.cells[i].values);
    RETURN_IF_ERROR(cell->BindInt(1, id)
                        .BindInt(2, static_cast<int64_t>(i))
                        .BindText(3, operation.cells[i].name)
                        .BindText(4, axes)
                        .Run());
  }
  return ExperimentId(id);
}

absl::StatusOr<SubmitResult::Round> SqliteWriter::InsertRound(ExperimentId experiment,
                                                              const NewRound& round) {
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO round (experiment_id, cell_index, repeat, kind, devices, "
                        "uses_host_tier, backend, modelled_time, state, served_by) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"));
  const Engine& engine = round.spec.trials(0).spec().engine();
  const bool served = round.served_by.has_value();
  insert->BindInt(1, static_cast<int64_t>(experiment.value()))
      .BindInt(2, round.cell_index)
      .BindInt(3, round.repeat)
      .BindText(4, round.kind == TrialSpec::KIND_QUALITY ? "quality" : "load")
      .BindInt(5, round.spec.devices())
      .BindInt(6, round.spec.uses_host_tier())
      .BindText(7, BackendName(engine))
      .BindInt(8, engine.time() == Engine::TIME_MODELLED)
      .BindText(9, RoundStateName(served ? RoundState::kServed : RoundState::kQueued));
  BindOptional(*insert, 10, round.served_by);
  RETURN_IF_ERROR(insert->Run());
  SubmitResult::Round result{
      .round = RoundId(sqlite3_last_insert_rowid(database_.get())), .trials = {}, .served = served};
  for (size_t i = 0; i < round.trials.size(); ++i) {
    ASSIGN_OR_RETURN(result.trials.emplace_back(), InsertTrial(result.round, round, i));
  }
  return result;
}

absl::StatusOr<TrialId> SqliteWriter::InsertTrial(RoundId round, const NewRound& from,
                                                  size_t position) {
  // Its own rows answer a trial, or those of the equal trial of the round that serves it.
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO trial (round_id, position, arm_index, content_key, "
                        "quality_key, spec, canonical_spec, measured_trial_id) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, "
                        "(SELECT trial_id FROM trial WHERE round_id = ?8 AND content_key = ?4))"));
  const NewTrial& trial = from.trials[position];
  const std::string spec = from.spec.trials(static_cast<int>(position)).spec().SerializeAsString();
  insert->BindInt(1, static_cast<int64_t>(round.value()))
      .BindInt(2, static_cast<int64_t>(position))
      .BindInt(3, trial.arm_index)
      .BindBlob(4, trial.content_key)
      .BindBlob(5, trial.quality_key)
      .BindBlob(6, spec)
      .BindText(7, trial.canonical_spec);
  BindOptional(*insert, 8, from.served_by);
  RETURN_IF_ERROR(insert->Run());
  return TrialId(sqlite3_last_insert_rowid(database_.get()));
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const PutFile& operation) {
  if (static_cast<int64_t>(operation.content.size()) > limits::kTravellingFileBytes) {
    return Refused(absl::InvalidArgumentError(
        absl::StrCat("a file of ", operation.content.size(), " bytes is larger than ",
                     limits::kTravellingFileBytes, ", the most that the store takes")));
  }
  if (Sha256(operation.content).bytes() != operation.digest) {
    return Refused(absl::InvalidArgumentError("the digest is not that of the file's content"));
  }
  ASSIGN_OR_RETURN(const bool known, ReadHasFile(database_, operation.digest));
  if (known) return Done();
  std::string compressed(ZSTD_compressBound(operation.content.size()), '\0');
  const size_t size = ZSTD_compress(compressed.data(), compressed.size(), operation.content.data(),
                                    operation.content.size(), ZSTD_CLEVEL_DEFAULT);
  KVSWEEP_CHECK(!ZSTD_isError(size));  // the buffer is as large as it can need
  ASSIGN_OR_RETURN(Statement * insert, database_.Prepare("INSERT INTO file VALUES (?1, ?2, ?3)"));
  RETURN_IF_ERROR(insert->BindBlob(1, operation.digest)
                      .BindInt(2, static_cast<int64_t>(operation.content.size()))
                      .BindBlob(3, absl::string_view(compressed.data(), size))
                      .Run());
  return Done();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const UpsertWorker& operation) {
  ASSIGN_OR_RETURN(Statement * insert, database_.Prepare("INSERT OR REPLACE INTO worker VALUES "
                                                         "(?1, ?2, ?3, ?4, ?5, ?6, ?7)"));
  const std::string facts = JsonObject(operation.facts);
  RETURN_IF_ERROR(insert->BindText(1, operation.worker_id)
                      .BindInt(2, static_cast<int64_t>(operation.incarnation))
                      .BindText(3, operation.machine)
                      .BindText(4, operation.runner_build)
                      .BindInt(5, operation.method_version)
                      .BindText(6, facts)
                      .BindInt(7, operation.seen_unix_ns)
                      .Run());
  return Done();
}

// -----------------------------------------------------------------------------------------
// attempts

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
    ASSIGN_OR_RETURN(broken, Store(operation.attempt, open, sequence, bytes));
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

absl::StatusOr<absl::Status> SqliteWriter::Store(Attempt attempt, OpenAttempt& open,
                                                 uint64_t sequence, const std::string& bytes) {
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

// ----------------------------------------------------------------------------------------
// accepting

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

absl::Status SqliteWriter::SaveSummary(const TrialAccount& account) {
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO summary (trial_id, outcome, evidence, duration_ns, "
                        "engagement, backend, device, device_class, driver, time_mode, "
                        "runner_build, method_version, executions) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)"));
  const std::string outcome = OutcomeName(account.outcome.outcome());
  RETURN_IF_ERROR(insert->BindInt(1, static_cast<int64_t>(account.trial_id))
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
                      .BindInt(13, account.start.execution())
                      .Run());
  ASSIGN_OR_RETURN(Statement * note,
                   database_.Prepare("INSERT INTO summary_note VALUES (?1, ?2, ?3)"));
  std::string assignments;
  for (const SummaryMetric& metric : account.metrics) {
    if (metric.value.has_value()) {
      absl::StrAppend(&assignments, assignments.empty() ? "" : ", ", "\"", metric.name, "\" = ?");
      continue;
    }
    RETURN_IF_ERROR(note->BindInt(1, static_cast<int64_t>(account.trial_id))
                        .BindText(2, metric.name)
                        .BindText(3, metric.reason)
                        .Run());
  }
  if (assignments.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(
      Statement update,
      database_.Compile(absl::StrCat("UPDATE summary SET ", assignments, " WHERE trial_id = ?")));
  int parameter = 0;
  for (const SummaryMetric& metric : account.metrics) {
    if (metric.value.has_value()) update.BindReal(++parameter, *metric.value);
  }
  return update.BindInt(++parameter, static_cast<int64_t>(account.trial_id)).Run();
}

// -------------------------------------------------------------------------------------------
// ending

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
  return SetRoundState(attempt.round, RoundState::kQueued, std::nullopt);
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
