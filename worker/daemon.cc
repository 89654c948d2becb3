#include "worker/daemon.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "worker/coordinator_link.h"
#include "worker/round_files.h"
#include "worker/spill_file.h"
#include "worker/wire.h"

namespace kvsweep {
namespace {

// Exit codes of a program that does not take its arguments: the usual one, and CLI11's own, which
// kvsweep-runner ends with.
bool IsUsageExit(const RunnerExit& exit) {
  return exit.signal == 0 &&
         (exit.exit_code == 2 || (exit.exit_code >= 100 && exit.exit_code <= 114));
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> DialCoordinator(const std::string& address) {
  return OpenCoordinatorChannel(address);
}

class Worker::Daemon {
 public:
  Daemon(const WorkerOptions& options, std::shared_ptr<grpc::Channel> channel, Clock& clock);
  ~Daemon();

  void Shutdown();
  absl::Status WaitUntilDone();

 private:
  // A round that the session holds: its spec, and where its files are once it has been prepared.
  struct Round {
    RoundSpec spec;
    std::vector<TrialFiles> files;  // [trials]
    std::atomic<bool> forgotten = false;
  };

  struct Slot {
    std::optional<RunnerHello> hello;       // of its latest runner; guarded by mutex_
    std::unique_ptr<RunnerProcess> runner;  // of the thread that carries out
    std::thread preparer;                   // of the same
  };

  // Hands an event to the session: `event` gets session and time, and returns the plan.
  template <typename Event>
  void Enter(const Event& event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Absorb(event(*session_, clock_.NowNs()));
  }
  void Absorb(SessionPlan plan);
  void BeginEnd();
  void End(const absl::Status& status);

  // Carrying out.
  void CarryOutAll();
  void CarryOut(const SessionAction& action);
  void StartRunner(SlotIndex slot);
  bool EndOnUsage(SlotIndex slot, const RunnerExit& exit);
  void OnFrame(SlotIndex slot, const FromRunner& frame);
  void SendFrame(const SessionAction& action, const ToRunner& frame);
  void SendTrial(const SessionAction& action);
  void PrepareRound(const SessionAction& action);
  std::shared_ptr<Round> FindRound(Attempt attempt);

  // Talking.
  CoordinatorLinkEvents LinkEvents();
  WorkerState ComposeState();
  void OnDesired(const DesiredState& desired);
  std::optional<ReportBatch> NextBatch();
  absl::Status OnReply(const ReportReply& reply);
  void ScanModels();

  Slot& At(SlotIndex slot) { return slots_[slot.value()]; }

  const WorkerOptions options_;
  Clock& clock_;
  const uint64_t incarnation_;
  const ProtoRecordEncoder encoder_;
  ModelShelf shelf_;
  FileCache cache_;
  std::vector<std::unique_ptr<DiskSpillFile>> spills_;  // [slots]
  std::vector<Slot> slots_;

  std::mutex mutex_;
  // For the thread that carries out, and for all that wait for the end; both with mutex_.
  std::condition_variable actions_changed_;
  std::condition_variable ending_;

  // Guarded by mutex_.
  std::unique_ptr<Session> session_;
  std::deque<SessionAction> actions_;
  std::map<Attempt, std::shared_ptr<Round>> rounds_;
  int64_t wake_at_ns_ = kNeverNs;
  bool exiting_ = false;
  bool done_ = false;
  absl::Status end_status_;

  std::unique_ptr<CoordinatorLink> link_;
  std::vector<std::thread> threads_;
};

Worker::Daemon::Daemon(const WorkerOptions& options, std::shared_ptr<grpc::Channel> channel,
                       Clock& clock)
    : options_(options),
      clock_(clock),
      incarnation_(EntropySeed()),
      shelf_(options.model_folders, options.cache_folder),
      cache_(options.cache_folder),
      slots_(options.runners.size()) {
  SessionOptions session_options = options.session;
  session_options.slots = slots_.size();
  std::vector<SpillFile*> spills;
  for (size_t i = 0; i < slots_.size(); ++i) {
    spills_.push_back(std::make_unique<DiskSpillFile>(options.cache_folder));
    spills.push_back(spills_.back().get());
  }
  session_ = std::make_unique<Session>(session_options, encoder_, spills);
  {
    // Its events wait until it is there.
    const std::lock_guard<std::mutex> lock(mutex_);
    link_ = std::make_unique<CoordinatorLink>(
        CoordinatorLink::Options{.heartbeat_ns = options.heartbeat_ns,
                                 .silence_limit_ns = options.silence_limit_ns},
        std::move(channel), LinkEvents(), clock);
  }
  Enter([](Session& session, int64_t now_ns) { return session.Start(now_ns); });
  threads_.emplace_back([this] { CarryOutAll(); });
  threads_.emplace_back([this] { ScanModels(); });
}

Worker::Daemon::~Daemon() {
  End(absl::OkStatus());
  for (std::thread& thread : threads_) thread.join();
}

void Worker::Daemon::Shutdown() {
  Enter([](Session& session, int64_t now_ns) { return session.OnShutdown(now_ns); });
}

absl::Status Worker::Daemon::WaitUntilDone() {
  std::unique_lock<std::mutex> lock(mutex_);
  ending_.wait(lock, [this] { return done_; });
  return end_status_;
}

// mutex_ is held.
void Worker::Daemon::Absorb(SessionPlan plan) {
  actions_.insert(actions_.end(), plan.actions.begin(), plan.actions.end());
  wake_at_ns_ = plan.wake_at_ns;
  actions_changed_.notify_one();
  link_->AnnounceRows();
  if (plan.speak) link_->AnnounceState();
  if (plan.exit) BeginEnd();
}

// mutex_ is held.
void Worker::Daemon::BeginEnd() {
  exiting_ = true;
  link_->Close();
  actions_changed_.notify_all();
  ending_.notify_all();
}

// Ends the daemon; the first status counts.
void Worker::Daemon::End(const absl::Status& status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!exiting_) end_status_ = status;
  BeginEnd();
}

// ------------------------------------------------------------------------------------ carrying out

void Worker::Daemon::CarryOutAll() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!exiting_) {
    if (!actions_.empty()) {
      const SessionAction action = actions_.front();
      actions_.pop_front();
      lock.unlock();
      CarryOut(action);
      lock.lock();
    } else if (const int64_t now_ns = clock_.NowNs(); now_ns >= wake_at_ns_) {
      Absorb(session_->OnTick(now_ns));
    } else {
      clock_.WaitUntilNs(actions_changed_, lock, wake_at_ns_);
    }
  }
  for (auto& [attempt, round] : rounds_) round->forgotten = true;
  std::vector<bool> busy;
  for (size_t i = 0; i < slots_.size(); ++i) {
    busy.push_back(session_->AttemptOf(SlotIndex(i)) != Attempt());
  }
  lock.unlock();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].runner == nullptr) continue;
    // A runner that still has work is not waited for: nobody wants the result.
    if (busy[i]) slots_[i].runner->Kill();
    slots_[i].runner->Stop();
  }
  for (Slot& slot : slots_) {
    if (slot.preparer.joinable()) slot.preparer.join();
    slot.runner.reset();
  }
  lock.lock();
  done_ = true;
  ending_.notify_all();
}

void Worker::Daemon::CarryOut(const SessionAction& action) {
  switch (action.kind) {
    case SessionAction::Kind::kStartRunner:
      StartRunner(action.slot);
      break;
    case SessionAction::Kind::kStopRunner:
      LogWarning("slot ", action.slot.value(), ": its runner is killed: ", action.reason);
      if (At(action.slot).runner != nullptr) At(action.slot).runner->Kill();
      break;
    case SessionAction::Kind::kPrepareRound:
      PrepareRound(action);
      break;
    case SessionAction::Kind::kSendTrial:
      SendTrial(action);
      break;
    case SessionAction::Kind::kCancelTrial: {
      ToRunner frame;
      frame.mutable_cancel()->set_trial_id(action.trial.value());
      SendFrame(action, frame);
      break;
    }
    case SessionAction::Kind::kForgetRound: {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = rounds_.find(action.attempt);
      if (found == rounds_.end()) break;
      found->second->forgotten = true;
      rounds_.erase(found);
      break;
    }
  }
}

void Worker::Daemon::StartRunner(SlotIndex slot) {
  const RunnerEvents events = {
      .on_frame = [this, slot](const FromRunner& frame) { OnFrame(slot, frame); },
      .on_malformed =
          [this, slot](const absl::Status& status) {
            Enter([&](Session& session, int64_t now_ns) {
              return session.OnRunnerMisbehaved(now_ns, slot, std::string(status.message()));
            });
          },
      .on_log =
          [slot](absl::string_view line) { LogInfo("slot ", slot.value(), " runner: ", line); },
      .on_exit =
          [this, slot](const RunnerExit& exit) {
            LogInfo("slot ", slot.value(), ": its runner has ended, signal ", exit.signal,
                    ", exit code ", exit.exit_code);
            if (EndOnUsage(slot, exit)) return;
            Enter([&](Session& session, int64_t now_ns) {
              return session.OnRunnerExited(now_ns, slot, exit);
            });
          }};
  At(slot).runner.reset();
  absl::StatusOr<std::unique_ptr<RunnerProcess>> runner =
      RunnerProcess::Start(options_.runners[slot.value()], events);
  if (runner.ok()) {
    At(slot).runner = *std::move(runner);
    return;
  }
  LogError("slot ", slot.value(), ": ", runner.status().message());
  Enter([&](Session& session, int64_t now_ns) {
    return session.OnRunnerExited(now_ns, slot, {.reason = std::string(runner.status().message())});
  });
}

// On the runner's thread. Whether the worker ends because its runner does not take its arguments:
// starting it again would not help.
bool Worker::Daemon::EndOnUsage(SlotIndex slot, const RunnerExit& exit) {
  if (!options_.end_on_runner_usage || !IsUsageExit(exit)) return false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (At(slot).hello.has_value()) return false;
  }
  const RunnerCommand& command = options_.runners[slot.value()];
  End(absl::InvalidArgumentError(absl::StrCat(
      "slot ", slot.value(), ": ", command.path, " does not take its arguments (",
      absl::StrJoin(command.arguments, " "), "), exit code ", exit.exit_code, "; mend --slot",
      exit.log_tail.empty() ? "" : "; it wrote: ", absl::StripAsciiWhitespace(exit.log_tail))));
  return true;
}

// On the runner's thread.
void Worker::Daemon::OnFrame(SlotIndex slot, const FromRunner& frame) {
  std::string misbehaviour;
  switch (frame.body_case()) {
    case FromRunner::kHello: {
      const std::lock_guard<std::mutex> lock(mutex_);
      At(slot).hello = frame.hello();
      Absorb(session_->OnRunnerReady(clock_.NowNs(), slot));
      return;
    }
    case FromRunner::kProgress: {
      const Progress& progress = frame.progress();
      Enter([&](Session& session, int64_t now_ns) {
        return session.OnRunnerProgress(now_ns, slot, TrialId(progress.trial_id()),
                                        progress.phase().substr(0, limits::kNameLength),
                                        progress.done(), progress.total());
      });
      return;
    }
    case FromRunner::kRecords: {
      absl::StatusOr<std::vector<RunnerRecord>> records = RecordsFromRunner(frame.records());
      if (records.ok()) {
        Enter([&](Session& session, int64_t now_ns) {
          return session.OnRunnerRecords(now_ns, slot, *std::move(records));
        });
        return;
      }
      misbehaviour = std::string(records.status().message());
      break;
    }
    case FromRunner::kDone:
      Enter([&](Session& session, int64_t now_ns) {
        return session.OnTrialDone(now_ns, slot, TrialId(frame.done().trial_id()));
      });
      return;
    case FromRunner::BODY_NOT_SET:
      misbehaviour = "the runner sent a frame without content";
      break;
  }
  Enter([&](Session& session, int64_t now_ns) {
    return session.OnRunnerMisbehaved(now_ns, slot, misbehaviour);
  });
}

void Worker::Daemon::SendFrame(const SessionAction& action, const ToRunner& frame) {
  RunnerProcess* runner = At(action.slot).runner.get();
  if (runner == nullptr) return;
  const absl::Status status = runner->Send(frame);
  if (status.ok()) return;
  // It has gone, or does not read; either way its end is what the session hears.
  LogWarning("slot ", action.slot.value(), ": its runner cannot be told: ", status.message());
  runner->Kill();
}

void Worker::Daemon::SendTrial(const SessionAction& action) {
  const std::shared_ptr<Round> round = FindRound(action.attempt);
  if (round == nullptr) return;
  KVSWEEP_CHECK_LT(action.trial_index, round->files.size());
  const PlannedTrial& trial = round->spec.trials(static_cast<int>(action.trial_index));
  const TrialFiles& files = round->files[action.trial_index];
  ToRunner frame;
  RunTrial& run = *frame.mutable_run();
  run.set_trial_id(trial.trial_id());
  run.set_execution(action.execution);
  *run.mutable_spec() = trial.spec();
  run.set_model_path(files.model_path);
  run.mutable_file_paths()->insert(files.file_paths.begin(), files.file_paths.end());
  LogInfo("slot ", action.slot.value(), ": attempt ", action.attempt.value(), ", trial ",
          trial.trial_id(), " (", trial.spec().arm().name(), "), execution ", action.execution);
  SendFrame(action, frame);
}

std::shared_ptr<Worker::Daemon::Round> Worker::Daemon::FindRound(Attempt attempt) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = rounds_.find(attempt);
  return found == rounds_.end() ? nullptr : found->second;
}

// Beside the thread that carries out: fetching takes its time.
void Worker::Daemon::PrepareRound(const SessionAction& action) {
  Slot& slot = At(action.slot);
  // The round before has been forgotten, so that this ends soon.
  if (slot.preparer.joinable()) slot.preparer.join();
  const std::shared_ptr<Round> round = FindRound(action.attempt);
  if (round == nullptr) return;
  slot.preparer = std::thread([this, action, round] {
    absl::StatusOr<std::vector<TrialFiles>> files = PrepareRoundFiles(
        round->spec, shelf_, cache_,
        [this, &round](const FileReference& file) { return link_->Fetch(file, round->forgotten); });
    Enter([&](Session& session, int64_t now_ns) {
      if (files.ok()) round->files = *std::move(files);
      return session.OnRoundPrepared(now_ns, action.slot, action.attempt, files.status());
    });
  });
}

// ----------------------------------------------------------------------------------------- talking

CoordinatorLinkEvents Worker::Daemon::LinkEvents() {
  return {.compose_state = [this] { return ComposeState(); },
          .on_desired = [this](const DesiredState& desired) { OnDesired(desired); },
          .on_report_connected =
              [this] {
                const std::lock_guard<std::mutex> lock(mutex_);
                session_->OnReportConnected();
              },
          .next_batch = [this] { return NextBatch(); },
          .on_reply = [this](const ReportReply& reply) { return OnReply(reply); },
          .on_refused =
              [this](const absl::Status& status) {
                LogError("the coordinator refuses this worker: ", status.message());
                End(status);
              }};
}

void Worker::Daemon::OnDesired(const DesiredState& desired) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<SessionWish> wishes;
  for (const SlotDesire& desire : desired.slots()) {
    if (desire.index() >= slots_.size()) continue;
    SessionWish wish{.slot = SlotIndex(desire.index()), .attempt = Attempt(desire.attempt())};
    if (desire.has_abandon()) wish.kind = SessionWish::Kind::kAbandon;
    if (desire.has_settled()) wish.kind = SessionWish::Kind::kSettled;
    // Wishes are repeated until the worker complies; a round is parsed once.
    if (desire.has_run() && session_->AttemptOf(wish.slot) != wish.attempt) {
      absl::StatusOr<RoundSpec> spec = ParseRound(desire.run());
      if (spec.ok()) {
        wish.round = RoundFromWire(*spec);
        const auto round = std::make_shared<Round>();
        round->spec = *std::move(spec);
        rounds_[wish.attempt] = round;
      } else {
        wish.round = spec.status();
      }
    }
    wishes.push_back(std::move(wish));
  }
  Absorb(session_->OnWishes(clock_.NowNs(), desired.generation(), wishes));
  for (const SessionWish& wish : wishes) {
    if (wish.kind == SessionWish::Kind::kRun && session_->AttemptOf(wish.slot) != wish.attempt) {
      rounds_.erase(wish.attempt);
    }
  }
}

WorkerState Worker::Daemon::ComposeState() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Absorb(session_->OnTick(clock_.NowNs()));
  WorkerState state;
  state.set_worker_id(options_.worker_id);
  state.set_incarnation(incarnation_);
  state.set_machine(options_.machine);
  state.mutable_labels()->insert(options_.labels.begin(), options_.labels.end());
  state.set_protocol_version(kWorkerProtocolVersion);
  const SessionReport report = session_->TakeReport();
  ReportToWire(report, &state);
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!report.slots[i].available || !slots_[i].hello.has_value()) continue;
    const RunnerHello& hello = *slots_[i].hello;
    state.set_build(hello.runner_build());
    state.set_method_version(hello.method_version());
    Device& device = *state.mutable_slots(static_cast<int>(i))->add_devices();
    device.set_backend(hello.backend());
    device.set_name(hello.device());
    device.set_device_class(hello.device_class());
    device.set_memory_bytes(hello.device_memory_bytes());
    *device.mutable_facts() = hello.facts();
  }
  for (const ShelvedModel& model : shelf_.models()) {
    HeldModel& held = *state.add_models();
    held.set_name(model.name);
    held.set_digest(std::string(model.digest.bytes()));
  }
  return state;
}

std::optional<ReportBatch> Worker::Daemon::NextBatch() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::optional<Session::Batch> batch = session_->NextBatch();
  if (!batch.has_value()) return std::nullopt;
  ReportBatch message;
  message.set_worker_id(options_.worker_id);
  message.set_incarnation(incarnation_);
  message.set_attempt(batch->attempt.value());
  message.set_first_sequence(batch->rows.first_sequence);
  for (std::string& record : batch->rows.records) message.add_records(std::move(record));
  return message;
}

absl::Status Worker::Daemon::OnReply(const ReportReply& reply) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (reply.refused()) {
    LogWarning("attempt ", reply.attempt(), ": its rows are refused: ", reply.reason());
    session_->OnRefused(Attempt(reply.attempt()));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(SessionPlan plan,
                   session_->OnAcknowledged(clock_.NowNs(), Attempt(reply.attempt()),
                                            reply.acknowledged_through()));
  Absorb(std::move(plan));
  return absl::OkStatus();
}

void Worker::Daemon::ScanModels() {
  while (true) {
    const bool changed = shelf_.Scan();
    std::unique_lock<std::mutex> lock(mutex_);
    if (changed) link_->AnnounceState();
    const int64_t again_ns = clock_.NowNs() + options_.rescan_ns;
    while (!exiting_ && clock_.NowNs() < again_ns) clock_.WaitUntilNs(ending_, lock, again_ns);
    if (exiting_) return;
  }
}

// ------------------------------------------------------------------------------------------ worker

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(const WorkerOptions& options,
                                                      std::shared_ptr<grpc::Channel> channel,
                                                      Clock& clock) {
  if (options.worker_id.empty() ||
      options.worker_id.size() > static_cast<size_t>(limits::kNameLength)) {
    return absl::InvalidArgumentError(absl::StrCat("worker id \"", options.worker_id,
                                                   "\" must have 1 to ", limits::kNameLength,
                                                   " characters"));
  }
  if (options.runners.empty() ||
      options.runners.size() > static_cast<size_t>(limits::kSlotsPerWorker)) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.runners.size(), " slots; a worker has 1 to ", limits::kSlotsPerWorker));
  }
  std::error_code error;
  std::filesystem::create_directories(options.cache_folder, error);
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("cache folder \"", options.cache_folder, "\": ", error.message()));
  }
  return std::unique_ptr<Worker>(
      new Worker(std::make_unique<Daemon>(options, std::move(channel), clock)));
}

Worker::Worker(std::unique_ptr<Daemon> daemon) : daemon_(std::move(daemon)) {}
Worker::~Worker() = default;
void Worker::Shutdown() { daemon_->Shutdown(); }
absl::Status Worker::WaitUntilDone() { return daemon_->WaitUntilDone(); }

}  // namespace kvsweep
