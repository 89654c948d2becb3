#include "worker/session.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace kvsweep {
namespace {

using Phase = HeldAttempt::Phase;

// now + duration, without passing kNeverNs.
int64_t After(int64_t now_ns, int64_t duration_ns) {
  return duration_ns > kNeverNs - now_ns ? kNeverNs : now_ns + duration_ns;
}

std::string DescribeExit(const RunnerExit& exit) {
  if (!exit.reason.empty()) return exit.reason;
  if (exit.signal == 0) return absl::StrCat("exit code ", exit.exit_code);
  const char* name = sigabbrev_np(exit.signal);
  return absl::StrCat("signal ", exit.signal,
                      name == nullptr ? "" : absl::StrCat(" (SIG", name, ")"));
}

bool IsActive(const HeldAttempt& holding) {
  return holding.phase == Phase::kStarting || holding.phase == Phase::kRunning;
}

}  // namespace

Session::Session(const SessionOptions& options, const RecordEncoder& encoder,
                 std::span<SpillFile* const> spills)
    : options_(options), encoder_(encoder), slots_(options.slots) {
  KVSWEEP_CHECK(options.slots > 0);
  KVSWEEP_CHECK_EQ(spills.size(), options.slots);
  for (size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].index = SlotIndex(i);
    slots_[i].spill = spills[i];
  }
}

Session::~Session() = default;

// ------------------------------------------------------------------------------------------ events

SessionPlan Session::Start(int64_t now_ns) {
  for (Slot& slot : slots_) slot.start_at_ns = now_ns;
  plan_.speak = true;
  return Conclude(now_ns);
}

SessionPlan Session::OnWishes(int64_t now_ns, uint64_t generation,
                              std::span<const SessionWish> wishes) {
  answered_generation_ = std::max(answered_generation_, generation);
  for (const SessionWish& wish : wishes) {
    if (wish.slot.value() >= slots_.size()) continue;
    Slot& slot = At(wish.slot);
    const bool held = slot.held.has_value() && slot.held->report.attempt == wish.attempt;
    if (wish.kind == SessionWish::Kind::kRun) {
      Take(slot, wish);
    } else if (!held) {
      continue;
    } else if (wish.kind == SessionWish::Kind::kAbandon) {
      StopHeld(now_ns, slot, Phase::kAbandoned, "");
    } else if (IsActive(slot.held->report)) {
      slot.held->forget_at_end = true;
      StopHeld(now_ns, slot, Phase::kAbandoned, "");
    } else {
      Forget(slot);
    }
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnRoundPrepared(int64_t now_ns, SlotIndex index, Attempt attempt,
                                     const absl::Status& status) {
  Slot& slot = At(index);
  if (slot.held.has_value() && slot.held->report.attempt == attempt &&
      IsActive(slot.held->report)) {
    slot.held->prepared = status.ok();
    if (!status.ok()) StopHeld(now_ns, slot, Phase::kFailed, std::string(status.message()));
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnRunnerReady(int64_t now_ns, SlotIndex index) {
  Slot& slot = At(index);
  if (slot.runner == RunnerState::kStarting) {
    slot.runner = RunnerState::kReady;
    slot.runner_deadline_ns = kNeverNs;
    slot.greeted = slot.ever_greeted = true;
    slot.start_failures = 0;
    plan_.speak = true;
  } else if (slot.runner == RunnerState::kReady) {
    Kill(now_ns, slot, "the runner said hello twice");
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnRunnerProgress(int64_t now_ns, SlotIndex index, TrialId trial,
                                      const std::string& phase, uint64_t done, uint64_t total) {
  Slot& slot = At(index);
  // Progress is for people; a late or odd report is not worth a trial.
  if (slot.held.has_value() && slot.held->running.has_value() && slot.held->report.trial == trial) {
    slot.held->report.trial_phase = phase;
    slot.held->report.done = done;
    slot.held->report.total = total;
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnRunnerRecords(int64_t now_ns, SlotIndex index,
                                     std::vector<RunnerRecord> records) {
  Slot& slot = At(index);
  for (RunnerRecord& record : records) AddRecord(now_ns, slot, std::move(record));
  return Conclude(now_ns);
}

SessionPlan Session::OnTrialDone(int64_t now_ns, SlotIndex index, TrialId trial) {
  Slot& slot = At(index);
  if (slot.runner != RunnerState::kReady) return Conclude(now_ns);  // it is being killed
  Held* held = slot.held.has_value() && slot.held->running.has_value() ? &*slot.held : nullptr;
  if (held == nullptr || held->report.trial != trial) {
    Kill(now_ns, slot,
         absl::StrCat("the runner ended trial ", trial.value(), ", which it was not running"));
  } else if (held->ending.has_value()) {
    held->running.reset();
    EndHeld(slot);
  } else if (held->running->verdict.has_value()) {
    held->outbox->AddOwn(encoder_.EncodeOutcome(*held->running->verdict));
    EndTrial(slot);
  } else if (held->running->outcome_seen) {
    EndTrial(slot);
  } else {
    Kill(now_ns, slot, "the runner ended the trial without an outcome");
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnRunnerMisbehaved(int64_t now_ns, SlotIndex index,
                                        const std::string& reason) {
  Kill(now_ns, At(index), reason);
  return Conclude(now_ns);
}

SessionPlan Session::OnRunnerExited(int64_t now_ns, SlotIndex index, const RunnerExit& exit) {
  Slot& slot = At(index);
  KVSWEEP_CHECK(slot.runner != RunnerState::kAbsent) << "slot " << index;
  RunnerExit known = exit;
  if (!slot.kill_reason.empty()) known.reason = std::exchange(slot.kill_reason, "");
  slot.runner = RunnerState::kAbsent;
  slot.runner_deadline_ns = kNeverNs;
  slot.stuck = false;
  plan_.speak = true;
  const bool running = slot.held.has_value() && slot.held->running.has_value();
  // A trial bounds how often its runner is replaced; an idle runner that keeps dying has only the
  // delay.
  slot.start_at_ns = running ? now_ns : After(now_ns, options_.restart_backoff_ns);
  if (!std::exchange(slot.greeted, false)) {
    StartFailed(now_ns, slot, known);
  } else if (running) {
    TrialDied(slot, known);
  }
  return Conclude(now_ns);
}

SessionPlan Session::OnTick(int64_t now_ns) {
  for (Slot& slot : slots_) CheckDeadlines(now_ns, slot);
  return Conclude(now_ns);
}

SessionPlan Session::OnShutdown(int64_t now_ns) {
  plan_.speak = true;
  if (++shutdowns_ == 1) drain_exit_at_ns_ = After(now_ns, options_.drain_notice_ns);
  return Conclude(now_ns);
}

void Session::OnReportConnected() {
  for (Slot& slot : slots_) {
    if (!slot.held.has_value() || slot.held->outbox == nullptr) continue;
    slot.held->outbox->Rewind();
    slot.held->refused = false;
  }
}

absl::StatusOr<SessionPlan> Session::OnAcknowledged(int64_t now_ns, Attempt attempt,
                                                    uint64_t through) {
  Held* held = FindHeld(attempt);
  if (held != nullptr && held->outbox != nullptr) {
    const absl::Status status = held->outbox->Acknowledge(through);
    if (!status.ok()) return status;
  }
  return Conclude(now_ns);
}

void Session::OnRefused(Attempt attempt) {
  if (Held* held = FindHeld(attempt); held != nullptr) held->refused = true;
}

std::optional<Session::Batch> Session::NextBatch() {
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[next_slot_to_send_];
    next_slot_to_send_ = (next_slot_to_send_ + 1) % slots_.size();
    if (!slot.held.has_value() || slot.held->outbox == nullptr || slot.held->refused) continue;
    if (!slot.held->outbox->HasUnsent()) continue;
    absl::StatusOr<OutboxBatch> rows = slot.held->outbox->NextBatch();
    if (rows.ok()) return Batch{slot.held->report.attempt, *std::move(rows)};
    slot.held->refused = true;
    slot.held->spill_status = rows.status();
  }
  return std::nullopt;
}

SessionReport Session::TakeReport() {
  SessionReport report{.generation = ++generation_, .draining = shutdowns_ > 0};
  if (report.draining && drain_generation_ == 0) drain_generation_ = generation_;
  size_t broken = 0;
  for (const Slot& slot : slots_) {
    SessionSlot& out = report.slots.emplace_back();
    out.available = slot.ever_greeted && !IsBroken(slot);
    if (IsBroken(slot)) {
      ++broken;
      report.unhealthy_reason =
          absl::StrCat("slot ", slot.index.value(), ": ",
                       slot.stuck ? "its runner cannot be killed" : slot.start_failure);
    }
    if (!slot.held.has_value()) continue;
    out.holding = slot.held->report;
    if (slot.held->outbox == nullptr) continue;
    out.holding->oldest_unacknowledged = slot.held->outbox->oldest_unacknowledged();
    out.holding->last_sequence = slot.held->outbox->last_sequence();
  }
  // One broken slot says so by having no devices; the worker is unhealthy when none is left.
  if (broken < slots_.size()) report.unhealthy_reason.clear();
  return report;
}

Attempt Session::AttemptOf(SlotIndex index) const {
  KVSWEEP_CHECK(index.value() < slots_.size());
  const Slot& slot = slots_[index.value()];
  return slot.held.has_value() ? slot.held->report.attempt : Attempt();
}

// ------------------------------------------------------------------------------ the coordinator's
// wishes

Session::Slot& Session::At(SlotIndex slot) {
  KVSWEEP_CHECK(slot.value() < slots_.size());
  return slots_[slot.value()];
}

Session::Held* Session::FindHeld(Attempt attempt) {
  for (Slot& slot : slots_) {
    if (slot.held.has_value() && slot.held->report.attempt == attempt) return &*slot.held;
  }
  return nullptr;
}

void Session::Take(Slot& slot, const SessionWish& wish) {
  if (wish.attempt <= slot.newest) return;  // repeated, or stale
  if (slot.held.has_value()) {
    // What has failed or was abandoned has no rows: a newer attempt says that it is settled.
    const Phase phase = slot.held->report.phase;
    if (phase != Phase::kFailed && phase != Phase::kAbandoned) return;
    Forget(slot);
  }
  slot.newest = wish.attempt;
  plan_.speak = true;
  Held& held = slot.held.emplace();
  held.report.attempt = wish.attempt;
  std::string refusal;
  if (!wish.round.ok()) {
    refusal = std::string(wish.round.status().message());
  } else if (wish.round->trials.empty()) {
    refusal = "the round has no trials";
  } else if (shutdowns_ > 0) {
    refusal = "the worker is draining";
  }
  if (!refusal.empty()) {
    held.report.phase = Phase::kFailed;
    held.report.reason = std::move(refusal);
    return;
  }
  held.round = *wish.round;
  held.outbox = std::make_unique<Outbox>(options_.outbox, *slot.spill);
  Act(SessionAction::Kind::kPrepareRound, slot);
}

// The attempt comes to nothing: its rows go now, and `phase` is reached when its trial has stopped.
void Session::StopHeld(int64_t now_ns, Slot& slot, Phase phase, std::string reason) {
  Held& held = *slot.held;
  if (held.report.phase == phase || held.ending.has_value()) return;
  if (!reason.empty()) held.report.reason = std::move(reason);
  held.ending = phase;
  held.outbox.reset();
  slot.spill->Clear();
  if (held.running.has_value()) {
    CancelTrial(now_ns, slot);
  } else {
    EndHeld(slot);
  }
}

void Session::EndHeld(Slot& slot) {
  Held& held = *slot.held;
  KVSWEEP_CHECK(held.ending.has_value() && !held.running.has_value());
  held.report.phase = *std::exchange(held.ending, std::nullopt);
  held.report.trial = TrialId();
  plan_.speak = true;
  if (held.forget_at_end) Forget(slot);
}

void Session::Forget(Slot& slot) {
  KVSWEEP_CHECK(!slot.held->running.has_value());
  Act(SessionAction::Kind::kForgetRound, slot);
  slot.held.reset();
  slot.spill->Clear();
  plan_.speak = true;
}

// ----------------------------------------------------------------------------------- the runner's
// life

bool Session::WantsRunner(const Slot& slot) const {
  return shutdowns_ == 0 ||
         (shutdowns_ == 1 && slot.held.has_value() && IsActive(slot.held->report));
}

bool Session::IsBroken(const Slot& slot) const {
  return slot.stuck || slot.start_failures >= options_.max_start_failures;
}

void Session::Kill(int64_t now_ns, Slot& slot, std::string reason) {
  if (slot.runner != RunnerState::kStarting && slot.runner != RunnerState::kReady) return;
  slot.runner = RunnerState::kStopping;
  slot.runner_deadline_ns = After(now_ns, options_.kill_grace_ns);
  Act(SessionAction::Kind::kStopRunner, slot);
  plan_.actions.back().reason = reason;
  slot.kill_reason = std::move(reason);
}

void Session::StartFailed(int64_t now_ns, Slot& slot, const RunnerExit& exit) {
  ++slot.start_failures;
  const uint32_t doublings = std::min<uint32_t>(slot.start_failures - 1, 5);
  slot.start_at_ns = After(now_ns, options_.restart_backoff_ns << doublings);
  slot.start_failure = absl::StrCat("the runner does not start: ", DescribeExit(exit));
  if (!exit.log_tail.empty()) absl::StrAppend(&slot.start_failure, "; it wrote: ", exit.log_tail);
  if (IsBroken(slot) && slot.held.has_value() && IsActive(slot.held->report)) {
    StopHeld(now_ns, slot, Phase::kFailed, slot.start_failure);
  }
}

// ------------------------------------------------------------------------------------- a trial's
// life

void Session::SendTrial(int64_t now_ns, Slot& slot) {
  Held& held = *slot.held;
  const SessionTrial& trial = held.round.trials[held.trial_index];
  held.wait_for_room = false;
  held.outbox->BeginTrial();
  held.running.emplace().deadline_ns =
      After(After(now_ns, trial.limit_ns), options_.trial_grace_ns);
  ++held.executions;
  held.report.phase = Phase::kRunning;
  held.report.trial = trial.trial;
  held.report.trial_phase.clear();
  held.report.done = held.report.total = 0;
  Act(SessionAction::Kind::kSendTrial, slot);
  plan_.speak = true;
}

void Session::AddRecord(int64_t now_ns, Slot& slot, RunnerRecord record) {
  if (slot.runner != RunnerState::kReady) return;  // it is being killed
  Held* held = slot.held.has_value() && slot.held->running.has_value() ? &*slot.held : nullptr;
  if (held == nullptr || held->report.trial != record.trial || held->running->outcome_seen) {
    Kill(now_ns, slot,
         absl::StrCat("the runner sent a record of trial ", record.trial.value(),
                      ", which it was not running or had ended"));
    return;
  }
  Running& running = *held->running;
  running.outcome_seen = record.is_outcome;
  if (running.verdict.has_value() || held->ending.has_value()) return;
  const absl::Status status = held->outbox->Add(std::move(record.payload));
  if (status.ok()) return;
  running.verdict = {.trial = record.trial,
                     .verdict = RecordEncoder::Verdict::kRecorderOverflow,
                     .evidence = std::string(status.message()),
                     .phase = held->report.trial_phase};
  held->wait_for_room = true;
  CancelTrial(now_ns, slot);
}

void Session::CancelTrial(int64_t now_ns, Slot& slot) {
  Running& running = *slot.held->running;
  if (slot.runner != RunnerState::kReady || running.kill_at_ns != kNeverNs) return;
  running.kill_at_ns = After(now_ns, options_.cancel_grace_ns);
  Act(SessionAction::Kind::kCancelTrial, slot);
}

// The runner is gone while it was busy with a trial.
void Session::TrialDied(Slot& slot, const RunnerExit& exit) {
  Held& held = *slot.held;
  const Running running = *std::exchange(held.running, std::nullopt);
  if (held.ending.has_value()) {
    EndHeld(slot);
    return;
  }
  const std::string phase = held.report.trial_phase;
  if (running.verdict.has_value()) {
    held.outbox->AddOwn(encoder_.EncodeOutcome(*running.verdict));
  } else if (!running.outcome_seen && held.executions < options_.max_executions) {
    held.outbox->AddDiscard(encoder_.EncodeDiscard(
        held.report.trial, absl::StrCat("the runner died in phase \"", phase, "\" of execution ",
                                        held.executions, ": ", DescribeExit(exit))));
    return;
  } else if (!running.outcome_seen) {
    held.outbox->AddOwn(encoder_.EncodeOutcome(
        {.trial = held.report.trial,
         .verdict = RecordEncoder::Verdict::kCrashed,
         .evidence = absl::StrCat("the runner died in each of ", held.executions,
                                  " executions of this trial, at last in phase \"", phase,
                                  "\": ", DescribeExit(exit)),
         .phase = phase,
         .signal = exit.signal,
         .log_tail = exit.log_tail}));
  }
  EndTrial(slot);
}

void Session::EndTrial(Slot& slot) {
  Held& held = *slot.held;
  held.running.reset();
  ++held.trial_index;
  held.executions = 0;
  held.report.trial = TrialId();
  held.report.trial_phase.clear();
  plan_.speak = true;
}

// ---------------------------------------------------------------------------------------- moving
// on

// A killed process that stays (a driver that never returns) keeps its slot, but not the attempt.
void Session::GiveUpKilling(int64_t now_ns, Slot& slot) {
  slot.runner_deadline_ns = kNeverNs;
  slot.stuck = true;
  plan_.speak = true;
  if (!slot.held.has_value() || !IsActive(slot.held->report)) return;
  slot.held->running.reset();
  if (slot.held->ending.has_value()) {
    EndHeld(slot);
  } else {
    StopHeld(now_ns, slot, Phase::kFailed, "the slot's runner cannot be killed");
  }
}

void Session::TimeOut(int64_t now_ns, Slot& slot) {
  Held& held = *slot.held;
  // When only the end mark is missing, the runner's own outcome stands.
  if (!held.running->outcome_seen) {
    held.running->verdict = {
        .trial = held.report.trial,
        .verdict = RecordEncoder::Verdict::kTimeout,
        .evidence =
            absl::StrCat("the runner did not end the trial within ",
                         held.round.trials[held.trial_index].limit_ns / kNsPerMs, " ms and ",
                         options_.trial_grace_ns / kNsPerMs, " ms of grace, and was killed"),
        .phase = held.report.trial_phase};
  }
  Kill(now_ns, slot, "the trial passed its limits");
}

void Session::CheckDeadlines(int64_t now_ns, Slot& slot) {
  if (slot.held.has_value() && !slot.held->spill_status.ok()) {
    const absl::Status status = std::exchange(slot.held->spill_status, absl::OkStatus());
    StopHeld(now_ns, slot, Phase::kFailed, std::string(status.message()));
  }
  if (now_ns >= slot.runner_deadline_ns) {
    if (slot.runner == RunnerState::kStopping) {
      GiveUpKilling(now_ns, slot);
    } else {
      Kill(now_ns, slot,
           absl::StrCat("no hello within ", options_.start_limit_ns / kNsPerSecond, " s"));
    }
  }
  if (slot.runner != RunnerState::kReady || now_ns < WakeAtNs(slot)) return;
  if (now_ns >= slot.held->running->kill_at_ns) {
    Kill(now_ns, slot, "the trial went on after it was cancelled");
  } else {
    TimeOut(now_ns, slot);
  }
}

// Takes every step that is possible now.
void Session::Advance(int64_t now_ns, Slot& slot) {
  if (slot.runner == RunnerState::kAbsent && WantsRunner(slot) && now_ns >= slot.start_at_ns) {
    slot.runner = RunnerState::kStarting;
    slot.runner_deadline_ns = After(now_ns, options_.start_limit_ns);
    Act(SessionAction::Kind::kStartRunner, slot);
  }
  if (!slot.held.has_value() || !IsActive(slot.held->report) || !slot.held->prepared) return;
  Held& held = *slot.held;
  if (held.ending.has_value() || held.running.has_value()) return;
  if (held.trial_index == held.round.trials.size()) {
    held.outbox->AddFinish(encoder_.EncodeFinish(held.outbox->Remaining()));
    held.report.phase = Phase::kFinished;
    plan_.speak = true;
  } else if (slot.runner == RunnerState::kReady &&
             (!held.wait_for_room || held.outbox->HasRoom())) {
    SendTrial(now_ns, slot);
  }
}

int64_t Session::WakeAtNs(const Slot& slot) const {
  int64_t wake_at_ns = slot.runner_deadline_ns;
  if (slot.runner == RunnerState::kAbsent && WantsRunner(slot)) wake_at_ns = slot.start_at_ns;
  if (slot.runner == RunnerState::kReady && slot.held.has_value() &&
      slot.held->running.has_value()) {
    const Running& running = *slot.held->running;
    wake_at_ns = std::min(wake_at_ns, running.kill_at_ns);
    if (!slot.held->ending.has_value() && !running.verdict.has_value()) {
      wake_at_ns = std::min(wake_at_ns, running.deadline_ns);
    }
  }
  return wake_at_ns;
}

bool Session::MayExit(int64_t now_ns) const {
  if (shutdowns_ >= 2) return true;
  const bool heard = drain_generation_ > 0 && answered_generation_ >= drain_generation_;
  if (shutdowns_ == 0 || (!heard && now_ns < drain_exit_at_ns_)) return false;
  return std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) {
    if (!slot.held.has_value()) return true;
    const Phase phase = slot.held->report.phase;
    return phase == Phase::kFailed || phase == Phase::kAbandoned;
  });
}

void Session::Act(SessionAction::Kind kind, const Slot& slot) {
  SessionAction& action = plan_.actions.emplace_back();
  action.kind = kind;
  action.slot = slot.index;
  if (kind == SessionAction::Kind::kStartRunner || kind == SessionAction::Kind::kStopRunner) return;
  action.attempt = slot.held->report.attempt;
  action.trial = slot.held->report.trial;
  action.trial_index = slot.held->trial_index;
  action.execution = slot.held->executions;
}

SessionPlan Session::Conclude(int64_t now_ns) {
  for (Slot& slot : slots_) Advance(now_ns, slot);
  plan_.exit = MayExit(now_ns);
  plan_.wake_at_ns = shutdowns_ == 1 && now_ns < drain_exit_at_ns_ ? drain_exit_at_ns_ : kNeverNs;
  for (const Slot& slot : slots_) {
    plan_.wake_at_ns = std::min(plan_.wake_at_ns, WakeAtNs(slot));
  }
  return std::exchange(plan_, {});
}

void Session::CheckInvariants() const {
  for (const Slot& slot : slots_) {
    const bool awaited = slot.runner == RunnerState::kStarting ||
                         (slot.runner == RunnerState::kStopping && !slot.stuck);
    KVSWEEP_CHECK_EQ(awaited, slot.runner_deadline_ns != kNeverNs) << "slot " << slot.index;
    KVSWEEP_CHECK(slot.greeted || slot.runner != RunnerState::kReady) << "slot " << slot.index;
    if (!slot.held.has_value()) continue;
    const Held& held = *slot.held;
    const Phase phase = held.report.phase;
    KVSWEEP_CHECK(held.report.attempt <= slot.newest);
    KVSWEEP_CHECK(!held.running.has_value() || phase == Phase::kRunning);
    KVSWEEP_CHECK(!held.running.has_value() || slot.runner == RunnerState::kReady ||
                  slot.runner == RunnerState::kStopping);
    KVSWEEP_CHECK(!held.ending.has_value() || held.running.has_value());
    const bool has_rows =
        IsActive(held.report) ? !held.ending.has_value() : phase == Phase::kFinished;
    KVSWEEP_CHECK_EQ(has_rows, held.outbox != nullptr) << "attempt " << held.report.attempt;
    KVSWEEP_CHECK_LE(held.trial_index, held.round.trials.size());
    KVSWEEP_CHECK_LE(held.executions, options_.max_executions);
  }
}

}  // namespace kvsweep
