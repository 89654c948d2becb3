#include "storage/memory_store.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "storage/record_audit.h"
#include "storage/record_tables.h"

namespace kvsweep {
namespace {

struct MemoryTrial {
  TrialId trial;
  std::string content_key;
  std::optional<TrialAccount> account;  // once accepted
};

struct MemoryRound {
  StoredRound stored;
  std::vector<MemoryTrial> trials;
  std::optional<Attempt> attempt;
  std::string backend;
  bool modelled_time = false;
};

struct MemoryAttempt {
  StoredAttempt stored;
  VoidedAttempt ending;  // of a void one
  std::vector<std::string> records;
};

struct MemoryExperiment {
  QueuedExperiment about;
  SubmitResult submitted;
};

// Everything that the store knows. Ids count from 1.
struct State {
  std::mutex mutex;
  std::map<uint64_t, MemoryExperiment> experiments;
  std::map<std::string, uint64_t> clients;
  std::map<RoundId, MemoryRound> rounds;
  std::map<Attempt, MemoryAttempt> attempts;
  std::map<std::string, std::string, std::less<>> files;
  std::map<std::string, std::string, std::less<>> meta;
  uint64_t trials = 0;
};

OperationResult Refuse(absl::Status status) { return {.status = std::move(status), .value = {}}; }

template <typename Result>
OperationResult Answer(Result result) {
  return {.status = absl::OkStatus(), .value = std::move(result)};
}

bool HasEnded(const MemoryRound& round) {
  return round.stored.state != RoundState::kQueued && round.stored.state != RoundState::kRunning;
}

class Applier {
 public:
  explicit Applier(State& state) : state_(state) {}

  OperationResult operator()(const SubmitExperiment& operation);
  OperationResult operator()(const PutFile& operation);
  OperationResult operator()(const UpsertWorker&) { return {}; }
  OperationResult operator()(const GrantAttempt& operation);
  OperationResult operator()(const AppendRecords& operation);
  OperationResult operator()(const AcceptAttempt& operation);
  OperationResult operator()(const VoidAttempt& operation);
  OperationResult operator()(const FinishRound& operation);
  OperationResult operator()(const CancelExperiment& operation);
  OperationResult operator()(const AddLogLine& operation);
  OperationResult operator()(const PutMeta& operation);

 private:
  absl::Status CheckSubmission(const SubmitExperiment& operation) const;
  absl::Status Append(MemoryAttempt& attempt, uint64_t sequence, const std::string& bytes);
  absl::StatusOr<std::vector<TrialAccount>> Audit(const MemoryAttempt& attempt);
  void End(MemoryAttempt& attempt, const VoidAttempt& how);

  State& state_;
};

absl::Status Applier::CheckSubmission(const SubmitExperiment& operation) const {
  if (operation.client_id.empty() || operation.reference_arm >= operation.arms.size()) {
    return absl::InvalidArgumentError("submission");
  }
  for (const FileReference& file : operation.files) {
    if (static_cast<int64_t>(file.bytes()) <= limits::kTravellingFileBytes &&
        !state_.files.contains(file.digest())) {
      return absl::InvalidArgumentError("file");
    }
  }
  for (const NewRound& round : operation.rounds) {
    bool fits = !round.trials.empty() && round.cell_index < operation.cells.size() &&
                round.trials.size() == static_cast<size_t>(round.spec.trials_size());
    const auto source =
        round.served_by ? state_.rounds.find(*round.served_by) : state_.rounds.end();
    if (round.served_by &&
        (source == state_.rounds.end() || source->second.stored.state != RoundState::kDone)) {
      fits = false;
    }
    for (const NewTrial& trial : round.trials) {
      fits = fits && trial.arm_index < operation.arms.size() &&
             (!round.served_by ||
              absl::c_any_of(source->second.trials, [&](const MemoryTrial& measured) {
                return measured.content_key == trial.content_key;
              }));
    }
    if (!fits) return absl::InvalidArgumentError("round");
  }
  return absl::OkStatus();
}

OperationResult Applier::operator()(const SubmitExperiment& operation) {
  if (const auto known = state_.clients.find(operation.client_id); known != state_.clients.end()) {
    SubmitResult again = state_.experiments[known->second].submitted;
    again.repeated = true;
    return Answer(again);
  }
  if (const absl::Status sound = CheckSubmission(operation); !sound.ok()) return Refuse(sound);
  MemoryExperiment experiment;
  experiment.about.experiment = ExperimentId(state_.experiments.size() + 1);
  experiment.about.name = operation.name;
  experiment.about.model_name = operation.model.name();
  experiment.about.model_digest = operation.model.digest();
  experiment.submitted.experiment = experiment.about.experiment;
  for (const NewRound& from : operation.rounds) {
    MemoryRound round;
    round.stored = {.round = RoundId(state_.rounds.size() + 1),
                    .experiment = experiment.about.experiment,
                    .cell_index = from.cell_index,
                    .cell_name = operation.cells[from.cell_index].name,
                    .repeat = from.repeat,
                    .kind = from.kind,
                    .state = from.served_by ? RoundState::kServed : RoundState::kQueued,
                    .reason = "",
                    .spec = from.spec,
                    .trials = {},
                    .served_by = from.served_by};
    const Engine& engine = from.spec.trials(0).spec().engine();
    round.backend = engine.backend() == Engine::BACKEND_CPU    ? "cpu"
                    : engine.backend() == Engine::BACKEND_CUDA ? "cuda"
                                                               : "";
    round.modelled_time = engine.time() == Engine::TIME_MODELLED;
    SubmitResult::Round& result = experiment.submitted.rounds.emplace_back();
    result = {.round = round.stored.round, .trials = {}, .served = from.served_by.has_value()};
    for (size_t i = 0; i < from.trials.size(); ++i) {
      const NewTrial& trial = from.trials[i];
      const NewArm& arm = operation.arms[trial.arm_index];
      const TrialId id(++state_.trials);
      result.trials.push_back(id);
      round.trials.push_back({id, trial.content_key, std::nullopt});
      round.stored.trials.push_back({id, arm.name, trial.arm_index, arm.strategy});
      PlannedTrial* planned = round.stored.spec.mutable_trials(static_cast<int>(i));
      planned->set_trial_id(id.value());
      planned->set_content_key(trial.content_key);
    }
    state_.rounds[round.stored.round] = std::move(round);
  }
  const SubmitResult submitted = experiment.submitted;
  state_.clients[operation.client_id] = submitted.experiment.value();
  state_.experiments[submitted.experiment.value()] = std::move(experiment);
  return Answer(submitted);
}

OperationResult Applier::operator()(const PutFile& operation) {
  if (static_cast<int64_t>(operation.content.size()) > limits::kTravellingFileBytes ||
      Sha256(operation.content).bytes() != operation.digest) {
    return Refuse(absl::InvalidArgumentError("file"));
  }
  state_.files[operation.digest] = operation.content;
  return {};
}

OperationResult Applier::operator()(const GrantAttempt& operation) {
  const Attempt highest = state_.attempts.empty() ? Attempt(0) : state_.attempts.rbegin()->first;
  if (operation.attempt <= highest || operation.attempt.value() > kMaxAttempt) {
    return Refuse(absl::FailedPreconditionError("attempt"));
  }
  const auto round = state_.rounds.find(operation.round);
  if (round == state_.rounds.end()) return Refuse(absl::NotFoundError("round"));
  if (round->second.stored.state != RoundState::kQueued) {
    return Refuse(absl::FailedPreconditionError("round"));
  }
  state_.attempts[operation.attempt].stored = {.attempt = operation.attempt,
                                               .round = operation.round,
                                               .state = AttemptState::kOpen,
                                               .reason = "",
                                               .worker_id = operation.worker_id,
                                               .incarnation = operation.incarnation,
                                               .machine = operation.machine,
                                               .slot = operation.slot};
  round->second.attempt = operation.attempt;
  round->second.stored.state = RoundState::kRunning;
  return {};
}

absl::Status Applier::Append(MemoryAttempt& attempt, uint64_t sequence, const std::string& bytes) {
  if (sequence <= attempt.records.size()) {
    return attempt.records[sequence - 1] == bytes ? absl::OkStatus()
                                                  : absl::InvalidArgumentError("unequal repeat");
  }
  if (attempt.stored.finished) return absl::InvalidArgumentError("after the finish");
  Record record;
  RETURN_IF_ERROR(ParseRecord(bytes, &record));
  const MemoryRound& round = state_.rounds[attempt.stored.round];
  if (!record.has_finish() && !absl::c_any_of(round.trials, [&](const MemoryTrial& trial) {
        return trial.trial == TrialId(record.trial_id());
      })) {
    return absl::InvalidArgumentError("not of this round");
  }
  attempt.records.push_back(bytes);
  attempt.stored.last_sequence = sequence;
  attempt.stored.finished = record.has_finish();
  return absl::OkStatus();
}

OperationResult Applier::operator()(const AppendRecords& operation) {
  const auto found = state_.attempts.find(operation.attempt);
  if (found == state_.attempts.end() || found->second.stored.state != AttemptState::kOpen) {
    return Answer(AppendResult{});
  }
  MemoryAttempt& attempt = found->second;
  absl::Status broken =
      operation.first_sequence == 0 ? absl::InvalidArgumentError("sequence 0") : absl::OkStatus();
  for (size_t i = 0; i < operation.records.size() && broken.ok(); ++i) {
    const uint64_t sequence = operation.first_sequence + i;
    if (sequence > attempt.records.size() + 1) break;
    broken = Append(attempt, sequence, operation.records[i]);
  }
  AppendResult result{.state = AppendResult::State::kStored,
                      .acknowledged_through = attempt.records.size(),
                      .finished = attempt.stored.finished,
                      .reason = ""};
  if (!broken.ok()) {
    result.state = AppendResult::State::kVoided;
    result.reason = std::string(broken.message());
    End(attempt, {.attempt = operation.attempt,
                  .reason = std::string(broken.message()),
                  .worker_lost = false,
                  .running_trial = std::nullopt,
                  .voided_unix_ns = operation.received_unix_ns});
  }
  return Answer(result);
}

absl::StatusOr<std::vector<TrialAccount>> Applier::Audit(const MemoryAttempt& attempt) {
  std::vector<AuditedTrial> trials;
  for (const PlannedTrial& planned : state_.rounds[attempt.stored.round].stored.spec.trials()) {
    trials.push_back({planned.trial_id(), planned.spec()});
  }
  AttemptAudit audit(std::move(trials));
  for (const std::string& bytes : attempt.records) {
    Record record;
    RETURN_IF_ERROR(ParseRecord(bytes, &record));
    RETURN_IF_ERROR(audit.Add(bytes, record));
  }
  return audit.Judge();
}

OperationResult Applier::operator()(const AcceptAttempt& operation) {
  const auto found = state_.attempts.find(operation.attempt);
  if (found == state_.attempts.end() || found->second.stored.state != AttemptState::kOpen) {
    return Answer(AcceptResult{});
  }
  MemoryAttempt& attempt = found->second;
  if (!attempt.stored.finished) {
    return Answer(AcceptResult{.state = AcceptResult::State::kUnfinished, .reason = ""});
  }
  absl::StatusOr<std::vector<TrialAccount>> accounts = Audit(attempt);
  if (!accounts.ok()) {
    End(attempt, {.attempt = operation.attempt,
                  .reason = std::string(accounts.status().message()),
                  .worker_lost = false,
                  .running_trial = std::nullopt,
                  .voided_unix_ns = operation.accepted_unix_ns});
    return Answer(
        AcceptResult{.state = AcceptResult::State::kVoided, .reason = attempt.stored.reason});
  }
  MemoryRound& round = state_.rounds[attempt.stored.round];
  for (TrialAccount& account : *accounts) {
    for (MemoryTrial& trial : round.trials) {
      if (trial.trial == TrialId(account.trial_id)) trial.account = account;
    }
  }
  attempt.stored.state = AttemptState::kAccepted;
  round.stored.state = RoundState::kDone;
  return Answer(AcceptResult{.state = AcceptResult::State::kAccepted, .reason = ""});
}

void Applier::End(MemoryAttempt& attempt, const VoidAttempt& how) {
  attempt.stored.state = AttemptState::kVoid;
  attempt.stored.reason = how.reason;
  attempt.ending = {.attempt = how.attempt,
                    .worker_id = attempt.stored.worker_id,
                    .machine = attempt.stored.machine,
                    .worker_lost = how.worker_lost,
                    .running_trial = how.running_trial,
                    .reason = how.reason,
                    .voided_unix_ns = how.voided_unix_ns};
  MemoryRound& round = state_.rounds[attempt.stored.round];
  round.stored.state = RoundState::kQueued;
  round.attempt.reset();
}

OperationResult Applier::operator()(const VoidAttempt& operation) {
  const auto found = state_.attempts.find(operation.attempt);
  if (found == state_.attempts.end()) return Refuse(absl::NotFoundError("attempt"));
  if (found->second.stored.state != AttemptState::kOpen) {
    return Refuse(absl::FailedPreconditionError("attempt"));
  }
  End(found->second, operation);
  return {};
}

OperationResult Applier::operator()(const FinishRound& operation) {
  const auto found = state_.rounds.find(operation.round);
  if (found == state_.rounds.end()) return Refuse(absl::NotFoundError("round"));
  MemoryRound& round = found->second;
  if (HasEnded(round)) return Refuse(absl::FailedPreconditionError("round"));
  if (round.attempt.has_value()) {
    End(state_.attempts[*round.attempt], {.attempt = *round.attempt,
                                          .reason = operation.reason,
                                          .worker_lost = false,
                                          .running_trial = std::nullopt,
                                          .voided_unix_ns = operation.finished_unix_ns});
  }
  round.stored.reason = operation.reason;
  round.stored.state = operation.state == FinishRound::State::kFailed      ? RoundState::kFailed
                       : operation.state == FinishRound::State::kCancelled ? RoundState::kCancelled
                                                                           : RoundState::kPoisoned;
  return {};
}

OperationResult Applier::operator()(const CancelExperiment& operation) {
  if (!state_.experiments.contains(operation.experiment.value())) {
    return Refuse(absl::NotFoundError("experiment"));
  }
  CancelResult result;
  for (auto& [id, round] : state_.rounds) {
    if (round.stored.experiment != operation.experiment || HasEnded(round)) continue;
    result.rounds.push_back(id);
    if (round.attempt.has_value()) result.attempts.push_back(*round.attempt);
    (*this)(FinishRound{.round = id,
                        .state = FinishRound::State::kCancelled,
                        .poisoned_trial = std::nullopt,
                        .reason = "cancelled",
                        .finished_unix_ns = operation.cancelled_unix_ns});
  }
  return Answer(result);
}

OperationResult Applier::operator()(const AddLogLine& operation) {
  return state_.rounds.contains(operation.round) ? OperationResult()
                                                 : Refuse(absl::NotFoundError("round"));
}

OperationResult Applier::operator()(const PutMeta& operation) {
  state_.meta[operation.key] = operation.value;
  return {};
}

// ----------------------------------------------------------------------------------------- reading

class MemoryReader final : public StoreReader {
 public:
  explicit MemoryReader(State& state) : state_(state) {}

  absl::StatusOr<Queue> LoadQueue() override;
  absl::StatusOr<std::vector<AcceptedRound>> FindAccepted(const AcceptedQuery& query) override;
  absl::StatusOr<std::vector<std::string>> ReadRecords(Attempt attempt, uint64_t first_sequence,
                                                       size_t limit) override;

  absl::StatusOr<StoredRound> GetRound(RoundId id) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    const auto round = state_.rounds.find(id);
    if (round == state_.rounds.end()) return absl::NotFoundError("round");
    return round->second.stored;
  }
  absl::StatusOr<StoredAttempt> GetAttempt(Attempt id) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    const auto attempt = state_.attempts.find(id);
    if (attempt == state_.attempts.end()) return absl::NotFoundError("attempt");
    return attempt->second.stored;
  }
  absl::StatusOr<bool> IsSubmitted(absl::string_view client_id) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    return state_.clients.contains(std::string(client_id));
  }
  absl::StatusOr<bool> HasFile(absl::string_view digest) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    return state_.files.contains(std::string(digest));
  }
  absl::StatusOr<std::string> GetFile(absl::string_view digest) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    const auto file = state_.files.find(std::string(digest));
    if (file == state_.files.end()) return absl::NotFoundError("file");
    return file->second;
  }
  absl::StatusOr<std::optional<std::string>> ReadMeta(absl::string_view key) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    const auto value = state_.meta.find(std::string(key));
    if (value == state_.meta.end()) return std::optional<std::string>();
    return std::optional<std::string>(value->second);
  }

 private:
  static bool Matches(const MemoryRound& round, const AcceptedQuery& query);

  State& state_;
};

absl::StatusOr<Queue> MemoryReader::LoadQueue() {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  Queue queue;
  std::map<ExperimentId, QueuedExperiment> counts;
  std::set<ExperimentId> unfinished;
  for (const auto& [id, round] : state_.rounds) {
    const ExperimentId experiment = round.stored.experiment;
    QueuedExperiment& count =
        counts.emplace(experiment, state_.experiments[experiment.value()].about).first->second;
    ++count.rounds;
    count.rounds_done += round.stored.state == RoundState::kDone;
    count.rounds_served += round.stored.state == RoundState::kServed;
    count.rounds_failed += round.stored.state == RoundState::kFailed;
    count.rounds_cancelled += round.stored.state == RoundState::kCancelled;
    count.rounds_poisoned += round.stored.state == RoundState::kPoisoned;
    if (HasEnded(round)) continue;
    unfinished.insert(experiment);
    QueuedRound& queued = queue.rounds.emplace_back();
    queued.round = id;
    queued.experiment = experiment;
    queued.devices = round.stored.spec.devices();
    queued.uses_host_tier = round.stored.spec.uses_host_tier();
    queued.backend = round.backend;
    queued.modelled_time = round.modelled_time;
    for (const MemoryTrial& trial : round.trials) queued.trials.push_back(trial.trial);
    if (round.attempt) queued.open_attempt = state_.attempts[*round.attempt].stored;
    for (const auto& [number, attempt] : state_.attempts) {
      if (attempt.stored.round == id && attempt.stored.state == AttemptState::kVoid) {
        queued.void_attempts.push_back(attempt.ending);
      }
    }
  }
  for (const ExperimentId id : unfinished) queue.experiments.push_back(counts[id]);
  if (!state_.attempts.empty()) queue.highest_attempt = state_.attempts.rbegin()->first;
  return queue;
}

bool MemoryReader::Matches(const MemoryRound& round, const AcceptedQuery& query) {
  constexpr std::array kRepeatable = {OUTCOME_OK, OUTCOME_OOM, OUTCOME_INFEASIBLE, OUTCOME_UNSTABLE,
                                      OUTCOME_TIMEOUT};
  return absl::c_all_of(round.trials, [&](const MemoryTrial& trial) {
    if (!trial.account.has_value()) return false;
    const TrialStart& start = trial.account->start;
    return absl::c_linear_search(query.content_keys, trial.content_key) &&
           absl::c_linear_search(kRepeatable, trial.account->outcome.outcome()) &&
           start.method_version() == query.method_version &&
           (!query.runner_build || start.runner_build() == *query.runner_build) &&
           (query.device_classes.empty() ||
            absl::c_linear_search(query.device_classes, start.device_class()));
  });
}

absl::StatusOr<std::vector<AcceptedRound>> MemoryReader::FindAccepted(const AcceptedQuery& query) {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  std::vector<AcceptedRound> found;
  for (auto round = state_.rounds.rbegin(); round != state_.rounds.rend(); ++round) {
    if (round->second.stored.state != RoundState::kDone || !Matches(round->second, query)) continue;
    AcceptedRound& match = found.emplace_back();
    match.round = round->first;
    for (const MemoryTrial& trial : round->second.trials) {
      match.trials.push_back({trial.trial, trial.content_key});
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return a.trials.size() > b.trials.size(); });
  return found;
}

absl::StatusOr<std::vector<std::string>> MemoryReader::ReadRecords(Attempt attempt,
                                                                   uint64_t first_sequence,
                                                                   size_t limit) {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  std::vector<std::string> records;
  const auto found = state_.attempts.find(attempt);
  if (found == state_.attempts.end()) return records;
  const std::vector<std::string>& all = found->second.records;
  for (uint64_t i = std::max<uint64_t>(first_sequence, 1) - 1;
       i < all.size() && records.size() < limit; ++i) {
    records.push_back(all[i]);
  }
  return records;
}

class MemoryStore final : public Store {
 public:
  absl::StatusOr<CommitResult> Commit(const WriteBatch& batch) override {
    const std::lock_guard<std::mutex> lock(state_.mutex);
    CommitResult result;
    Applier applier(state_);
    for (const Operation& operation : batch.operations) {
      result.operations.push_back(std::visit(applier, operation));
    }
    return result;
  }
  absl::StatusOr<std::unique_ptr<StoreReader>> OpenReader() override {
    return std::make_unique<MemoryReader>(state_);
  }

 private:
  State state_;
};

}  // namespace

std::unique_ptr<Store> NewMemoryStore() { return std::make_unique<MemoryStore>(); }

}  // namespace kvsweep
