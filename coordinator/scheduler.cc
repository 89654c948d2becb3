#include "coordinator/scheduler.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace kvsweep {
namespace {

const Attempt kNoAttempt;

size_t Index(RoundEnd end) { return static_cast<size_t>(end); }

bool Failed(const Mishap& mishap) { return mishap.kind == Mishap::Kind::kFailed; }

// The attempt is over for the worker too: it only waits to be told to forget it.
bool IsOver(HoldingPhase phase) {
  return phase != HoldingPhase::kStarting && phase != HoldingPhase::kRunning;
}

}  // namespace

uint64_t ExperimentProgress::done() const {
  return std::accumulate(ended.begin(), ended.end(), uint64_t{0});
}

Scheduler::Scheduler(const SchedulerOptions& options, Attempt next_attempt)
    : options_(options), next_attempt_(next_attempt), roster_(options.lease) {
  KVSWEEP_CHECK_GE(next_attempt.value(), 1u);
}

Scheduler::~Scheduler() = default;

// ------------------------------------------------------------------------------------- recovery

void Scheduler::RecoverMishap(RoundId id, Mishap mishap) {
  Round& round = rounds_.at(id);
  KVSWEEP_CHECK(round.live == kNoAttempt);
  Dequeue(id, round);
  ++round.attempts;
  round.mishaps.push_back(std::move(mishap));
  Enqueue(id, round);
}

void Scheduler::RecoverLease(int64_t now_ns, const RecoveredLease& lease) {
  KVSWEEP_CHECK_LT(lease.attempt.value(), next_attempt_.value());
  Round& round = rounds_.at(lease.round);
  roster_.Expect(now_ns, now_ns + options_.lease.lease_ns, lease.worker, lease.incarnation,
                 lease.machine);
  workers_[lease.worker].incarnation = lease.incarnation;
  Dequeue(lease.round, round);
  AddLease(lease.attempt, {.round = lease.round,
                           .slot = {lease.worker, lease.slot},
                           .incarnation = lease.incarnation,
                           .machine = lease.machine,
                           .trial = TrialId(),
                           .missing_ns = now_ns});
}

// --------------------------------------------------------------------------------------- events

void Scheduler::Submit(int64_t, ExperimentId id, std::vector<RoundDescriptor> rounds,
                       const std::array<uint64_t, 5>& ended) {
  Experiment& experiment = experiments_[id];
  for (size_t end = 0; end < ended.size(); ++end) {
    experiment.progress.ended[end] += ended[end];
    experiment.progress.rounds += ended[end];
  }
  experiment.progress.rounds += rounds.size();
  experiment.rounds.reserve(experiment.rounds.size() + rounds.size());
  for (RoundDescriptor& descriptor : rounds) {
    KVSWEEP_CHECK_GT(descriptor.round.value(), last_round_.value());
    last_round_ = descriptor.round;
    Round& round = rounds_[descriptor.round];
    round.experiment = id;
    round.round_class = ClassFor(descriptor.requirement);
    round.trials = descriptor.trials;
    open_trials_ += round.trials;
    ++round.round_class->members;
    experiment.rounds.push_back(descriptor.round);
    Enqueue(descriptor.round, round);
  }
  changed_.insert(id);
}

bool Scheduler::Heard(int64_t now_ns, WorkerReport report) {
  const WorkerId id = report.worker;
  const uint64_t incarnation = report.incarnation;
  const Roster::Arrival arrival = roster_.Heard(now_ns, std::move(report));
  if (arrival == Roster::Arrival::kSuperseded) return false;
  if (arrival == Roster::Arrival::kFirst) {
    Say(ExperimentId(), absl::StrCat("worker ", id.value(), " connected"));
  } else if (arrival == Roster::Arrival::kReturned) {
    Say(ExperimentId(), absl::StrCat("worker ", id.value(), " is back"));
  } else if (arrival == Roster::Arrival::kNewIncarnation) {
    Say(ExperimentId(), absl::StrCat("worker ", id.value(), " was started again"));
    TakeBackAll(now_ns, id, "the worker was started again");
    Review(id);
  }
  Worker& worker = workers_[id];
  worker.incarnation = incarnation;
  TakeReport(now_ns, *roster_.Find(id), worker);
  Review(id);
  return true;
}

void Scheduler::Broken(int64_t now_ns, const WorkerId& worker, uint64_t incarnation) {
  const RosterEntry* entry = roster_.Find(worker);
  if (entry == nullptr) return;
  const Presence before = entry->presence;
  roster_.Broken(now_ns, worker, incarnation);
  if (entry->presence == before) return;
  Say(ExperimentId(), absl::StrCat("worker ", worker.value(), " lost its connection"));
  Review(worker);
}

void Scheduler::Stalled(int64_t duration_ns) {
  for (auto& [attempt, lease] : leases_) {
    if (lease.missing_ns == kNeverNs) continue;
    lease.missing_ns += roster_.Credit(lease.slot.first, duration_ns);
  }
  roster_.Stalled(duration_ns);
}

void Scheduler::Accepted(int64_t now_ns, Attempt attempt) {
  if (!leases_.contains(attempt)) return;
  const Lease lease = RemoveLease(now_ns, attempt);
  workers_.at(lease.slot.first).slots.at(lease.slot.second).settled = attempt;
  EndRound(lease.round, RoundEnd::kAccepted);
  Review(lease.slot.first);
}

void Scheduler::Refused(int64_t now_ns, Attempt attempt, const std::string& reason) {
  if (!leases_.contains(attempt)) return;
  TakeBack(now_ns, attempt, Mishap::Kind::kFailed, reason, /*stored=*/true);
}

uint64_t Scheduler::Cancel(int64_t now_ns, ExperimentId id) {
  const auto found = experiments_.find(id);
  if (found == experiments_.end() || found->second.progress.finished()) return 0;
  plan_.cancels.push_back(id);
  uint64_t cancelled = 0;
  const std::vector<RoundId> rounds = std::move(found->second.rounds);
  for (const RoundId round_id : rounds) {
    const auto round = rounds_.find(round_id);
    if (round == rounds_.end()) continue;
    if (round->second.live != kNoAttempt) {
      Review(RemoveLease(now_ns, round->second.live).slot.first);
    } else {
      Dequeue(round_id, round->second);
    }
    EndRound(round_id, RoundEnd::kCancelled);
    ++cancelled;
  }
  return cancelled;
}

bool Scheduler::Drain(int64_t, const WorkerId& worker, bool draining) {
  if (!roster_.Drain(worker, draining)) return false;
  Review(worker);
  return true;
}

SchedulerPlan Scheduler::Decide(int64_t now_ns) {
  PassTime(now_ns);
  HandOut(now_ns);
  for (const WorkerId& worker : touched_) {
    if (roster_.Find(worker) != nullptr) plan_.wishes.push_back(WishFor(worker));
  }
  plan_.changed.assign(changed_.begin(), changed_.end());
  plan_.wake_ns = std::min(roster_.NextDeadlineNs(), retry_ns_);
  touched_.clear();
  changed_.clear();
  return std::exchange(plan_, SchedulerPlan());
}

// -------------------------------------------------------------------------------------- queues

Scheduler::Class* Scheduler::ClassFor(const RoundRequirement& requirement) {
  std::unique_ptr<Class>& found = classes_[requirement];
  if (found == nullptr) {
    found = std::make_unique<Class>();
    found->requirement = requirement;
  }
  return found.get();
}

void Scheduler::UpdateHead(Class* round_class, std::optional<RoundId> old_head) {
  if (old_head.has_value()) heads_.erase(*old_head);
  if (!round_class->queue.empty()) heads_[*round_class->queue.begin()] = round_class;
}

void Scheduler::Enqueue(RoundId id, Round& round) {
  Class* round_class = round.round_class;
  if (std::any_of(round.mishaps.begin(), round.mishaps.end(), Failed)) {
    troubled_.insert(id);
  } else {
    std::optional<RoundId> head;
    if (!round_class->queue.empty()) head = *round_class->queue.begin();
    round_class->queue.insert(id);
    if (!head.has_value() || id < *head) UpdateHead(round_class, head);
  }
  Experiment& experiment = experiments_.at(round.experiment);
  ++experiment.queued[round_class];
  ++experiment.progress.queued;
  work_changed_ = true;
}

void Scheduler::Dequeue(RoundId id, Round& round) {
  Class* round_class = round.round_class;
  if (troubled_.erase(id) == 0) {
    const RoundId head = *round_class->queue.begin();
    KVSWEEP_CHECK_EQ(round_class->queue.erase(id), 1u);
    if (head == id) UpdateHead(round_class, head);
  }
  Experiment& experiment = experiments_.at(round.experiment);
  if (--experiment.queued.at(round_class) == 0) experiment.queued.erase(round_class);
  --experiment.progress.queued;
}

// REQUIRES: the round is neither queued nor leased.
void Scheduler::EndRound(RoundId id, RoundEnd end) {
  const auto found = rounds_.find(id);
  KVSWEEP_CHECK(found != rounds_.end() && found->second.live == kNoAttempt);
  const ExperimentId experiment_id = found->second.experiment;
  Class* round_class = found->second.round_class;
  open_trials_ -= found->second.trials;
  rounds_.erase(found);
  if (--round_class->members == 0) classes_.erase(RoundRequirement(round_class->requirement));

  Experiment& experiment = experiments_.at(experiment_id);
  ++experiment.progress.ended[Index(end)];
  changed_.insert(experiment_id);
  if (experiment.progress.finished()) experiment.rounds.clear();
}

// -------------------------------------------------------------------------------------- leases

void Scheduler::AddLease(Attempt attempt, const Lease& lease) {
  Round& round = rounds_.at(lease.round);
  Slot& slot = workers_.at(lease.slot.first).slots[lease.slot.second];
  KVSWEEP_CHECK(slot.live == kNoAttempt && round.live == kNoAttempt);
  slot.live = attempt;
  round.live = attempt;
  ++round.attempts;
  leases_[attempt] = lease;
  live_on_machine_[lease.machine].insert(attempt);
  if (round.round_class->exclusive()) host_tier_user_[lease.machine] = attempt;
  Experiment& experiment = experiments_.at(round.experiment);
  experiment.live.insert(attempt);
  ++experiment.progress.running;
  changed_.insert(round.experiment);
}

Scheduler::Lease Scheduler::RemoveLease(int64_t now_ns, Attempt attempt) {
  const auto found = leases_.find(attempt);
  KVSWEEP_CHECK(found != leases_.end());
  const Lease lease = found->second;
  leases_.erase(found);
  Round& round = rounds_.at(lease.round);
  round.live = kNoAttempt;
  Slot& slot = workers_.at(lease.slot.first).slots.at(lease.slot.second);
  slot.live = kNoAttempt;
  slot.settles_ns = now_ns + options_.settling_ns;
  const auto machine = live_on_machine_.find(lease.machine);
  machine->second.erase(attempt);
  if (machine->second.empty()) live_on_machine_.erase(machine);
  const auto user = host_tier_user_.find(lease.machine);
  if (user != host_tier_user_.end() && user->second == attempt) host_tier_user_.erase(user);
  Experiment& experiment = experiments_.at(round.experiment);
  experiment.live.erase(attempt);
  --experiment.progress.running;
  changed_.insert(round.experiment);
  work_changed_ = true;
  return lease;
}

void Scheduler::TakeBack(int64_t now_ns, Attempt attempt, Mishap::Kind kind,
                         const std::string& reason, bool stored) {
  const Lease lease = RemoveLease(now_ns, attempt);
  const WorkerId worker = lease.slot.first;
  Round& round = rounds_.at(lease.round);
  round.mishaps.push_back({.kind = kind,
                           .worker = worker,
                           .machine = lease.machine,
                           .trial = lease.trial,
                           .time_ns = now_ns,
                           .reason = reason});
  if (!stored) {
    plan_.voids.push_back(
        {.attempt = attempt, .round = lease.round, .mishap = round.mishaps.back()});
  }
  Say(round.experiment, absl::StrCat("round ", lease.round.value(), " taken back from worker ",
                                     worker.value(), ": ", reason));
  if (std::optional<FinishRow> finish = GiveUp(lease.round, round)) {
    Say(round.experiment,
        absl::StrCat("round ", lease.round.value(), " given up: ", finish->reason));
    const RoundEnd end = finish->end;
    plan_.finishes.push_back(*std::move(finish));
    EndRound(lease.round, end);
  } else {
    Enqueue(lease.round, round);
  }
  Review(worker);
}

void Scheduler::TakeBackAll(int64_t now_ns, const WorkerId& worker, const std::string& reason) {
  const auto found = workers_.find(worker);
  if (found == workers_.end()) return;
  std::vector<Attempt> attempts;
  for (const auto& [index, slot] : found->second.slots) {
    if (slot.live != kNoAttempt) attempts.push_back(slot.live);
  }
  for (const Attempt attempt : attempts) {
    TakeBack(now_ns, attempt, Mishap::Kind::kWorkerLost, reason);
  }
}

std::optional<FinishRow> Scheduler::GiveUp(RoundId id, const Round& round) const {
  FinishRow row{.round = id, .experiment = round.experiment, .end = RoundEnd::kFailed};
  const Mishap& last = round.mishaps.back();
  uint32_t losses = 0;
  std::set<std::string> machines;
  for (const Mishap& mishap : round.mishaps) {
    if (Failed(mishap) || mishap.trial != last.trial) continue;
    ++losses;
    machines.insert(mishap.machine);
  }
  if (!Failed(last) && last.trial != TrialId() && losses >= options_.poison_losses &&
      machines.size() >= options_.poison_machines) {
    row.end = RoundEnd::kPoisoned;
    row.poisoned_trial = last.trial;
    row.reason = absl::StrCat(losses, " workers on ", machines.size(),
                              " machines were lost during trial ", last.trial.value());
    return row;
  }
  const auto failures = std::count_if(round.mishaps.begin(), round.mishaps.end(), Failed);
  if (failures >= options_.max_failures) {
    row.reason = absl::StrCat("failed ", failures, " times, last on worker ", last.worker.value(),
                              ": ", last.reason);
    return row;
  }
  if (round.attempts >= options_.max_attempts) {
    row.reason = absl::StrCat("leased ", round.attempts, " times, last to worker ",
                              last.worker.value(), ": ", last.reason);
    return row;
  }
  return std::nullopt;
}

// --------------------------------------------------------------------------------------- slots

// Takes in what the worker says of its attempts; what it does not say has `lease_ns` to appear.
void Scheduler::TakeReport(int64_t now_ns, const RosterEntry& entry, Worker& worker) {
  const std::vector<SlotReport>& slots = entry.report.slots;
  for (size_t index = 0; index < slots.size(); ++index) worker.slots[SlotIndex(index)];

  std::vector<std::pair<Attempt, std::string>> failed;
  for (auto& [index, slot] : worker.slots) {
    if (slot.live == kNoAttempt) continue;
    Lease& lease = leases_.at(slot.live);
    const SlotReport* report = index.value() < slots.size() ? &slots[index.value()] : nullptr;
    if (report == nullptr) {
      failed.emplace_back(slot.live, "the worker no longer has the slot");
    } else if (!report->holding.has_value() || report->holding->attempt != slot.live) {
      if (lease.missing_ns == kNeverNs) lease.missing_ns = now_ns;
      if (now_ns - lease.missing_ns >= options_.lease.lease_ns) {
        failed.emplace_back(slot.live, "the worker does not run what it was handed");
      }
    } else if (report->holding->phase == HoldingPhase::kFailed) {
      failed.emplace_back(slot.live, report->holding->reason);
    } else if (report->holding->phase == HoldingPhase::kAbandoned) {
      failed.emplace_back(slot.live, "the worker gave it back");
    } else {
      lease.missing_ns = kNeverNs;
      lease.trial = report->holding->trial;
    }
  }
  for (const auto& [attempt, reason] : failed) {
    TakeBack(now_ns, attempt, Mishap::Kind::kFailed, reason);
  }
}

// Lists exactly those slots of the worker as idle that may be handed a round now.
void Scheduler::Review(const WorkerId& id) {
  const auto worker = workers_.find(id);
  const RosterEntry* entry = roster_.Find(id);
  if (worker == workers_.end()) return;
  touched_.insert(id);
  const bool available = entry != nullptr && entry->IdleReason().empty();
  const bool willing = entry != nullptr && entry->RefusalReason().empty();
  // Rounds may have waited for this worker rather than go to another one.
  if (std::exchange(worker->second.willing, willing) != willing) work_changed_ = true;
  for (auto& [index, slot] : worker->second.slots) {
    std::optional<SlotKind> kind;
    if (available && slot.live == kNoAttempt && index.value() < entry->report.slots.size()) {
      const SlotReport& report = entry->report.slots[index.value()];
      const bool empty = !report.holding.has_value() || report.holding->attempt == slot.settled;
      if (empty && !report.devices.empty()) {
        kind = SlotKind{.devices = static_cast<uint32_t>(report.devices.size()),
                        .backend = report.devices[0].backend,
                        .device_class = report.devices[0].device_class,
                        .model_digests = entry->report.model_digests};
      }
    }
    Offer({id, index}, slot, std::move(kind));
  }
}

void Scheduler::Offer(const SlotKey& key, Slot& slot, std::optional<SlotKind> kind) {
  if (slot.offer == kind) return;
  if (slot.offer.has_value()) {
    const auto listed = idle_.find(*slot.offer);
    listed->second.erase(key);
    if (listed->second.empty()) idle_.erase(listed);
  }
  slot.offer = std::move(kind);
  if (slot.offer.has_value()) {
    idle_[*slot.offer].insert(key);
    work_changed_ = true;
  }
}

WorkerWish Scheduler::WishFor(const WorkerId& id) const {
  const RosterEntry& entry = *roster_.Find(id);
  const Worker& worker = workers_.at(id);
  WorkerWish wish{.worker = id, .incarnation = worker.incarnation, .slots = {}};
  for (const auto& [index, slot] : worker.slots) {
    if (index.value() >= entry.report.slots.size()) continue;
    const std::optional<SlotHolding>& holding = entry.report.slots[index.value()].holding;
    bool empty = !holding.has_value();
    if (!empty && holding->attempt != slot.live) {
      empty = holding->attempt == slot.settled || IsOver(holding->phase);
      wish.slots.push_back({index, holding->attempt,
                            empty ? SlotWish::Kind::kSettled : SlotWish::Kind::kAbandon,
                            RoundId()});
    }
    if (empty && slot.live != kNoAttempt) {
      wish.slots.push_back({index, slot.live, SlotWish::Kind::kRun, leases_.at(slot.live).round});
    }
  }
  return wish;
}

// ---------------------------------------------------------------------------------- handing out

void Scheduler::PassTime(int64_t now_ns) {
  for (const WorkerId& id : roster_.Advance(now_ns)) {
    const RosterEntry* entry = roster_.Find(id);
    const absl::string_view name = id.value();
    if (entry != nullptr && entry->presence == Presence::kSilent) {
      Say(ExperimentId(), absl::StrCat("worker ", name, " is silent: shown as lost"));
    } else if (entry == nullptr || entry->presence == Presence::kGone) {
      if (entry != nullptr) Say(ExperimentId(), absl::StrCat("worker ", name, " is lost"));
      TakeBackAll(now_ns, id, "the worker was lost");
    }
    Review(id);
    if (entry == nullptr) workers_.erase(id);
  }
  if (retry_ns_ <= now_ns) work_changed_ = true;
}

void Scheduler::HandOut(int64_t now_ns) {
  if (!work_changed_) return;
  work_changed_ = false;
  retry_ns_ = kNeverNs;
  for (auto& [requirement, round_class] : classes_) round_class->able.reset();
  const std::vector<RoundId> troubled(troubled_.begin(), troubled_.end());
  for (const RoundId id : troubled) {
    if (idle_.empty()) break;
    TryRound(now_ns, id);
  }
  // A class whose head was handed out comes up again with its next round, which is younger.
  for (auto head = heads_.begin(); head != heads_.end() && !idle_.empty();) {
    const RoundId id = head->first;
    TryRound(now_ns, id);
    head = heads_.upper_bound(id);
  }
}

void Scheduler::TryRound(int64_t now_ns, RoundId id) {
  if (const std::optional<SlotKey> slot = FindSlot(now_ns, rounds_.at(id)))
    Grant(now_ns, id, *slot);
}

// The first idle slot of a worker where the round has not failed. One where it has only if there is
// no other worker to wait for; then one where it failed least.
std::optional<Scheduler::SlotKey> Scheduler::FindSlot(int64_t now_ns, const Round& round) {
  const RoundRequirement& requirement = round.round_class->requirement;
  std::optional<SlotKey> avoided;
  uint32_t least = 0;
  for (const auto& [kind, slots] : idle_) {
    if (!Fits(requirement, kind)) continue;
    for (const SlotKey& key : slots) {
      if (round.round_class->exclusive() &&
          host_tier_user_.contains(roster_.Find(key.first)->report.machine)) {
        continue;
      }
      const int64_t pause_ns = PausedUntilNs(round, key.first);
      if (pause_ns > now_ns) {
        retry_ns_ = std::min(retry_ns_, pause_ns);
        continue;
      }
      const uint32_t failures = FailuresOn(round, key.first);
      if (failures == 0) return key;
      if (avoided.has_value() && least <= failures) continue;
      avoided = key;
      least = failures;
    }
  }
  if (avoided.has_value() && IsAnotherAble(now_ns, round)) return std::nullopt;
  return avoided;
}

uint32_t Scheduler::FailuresOn(const Round& round, const WorkerId& worker) {
  return static_cast<uint32_t>(std::count_if(
      round.mishaps.begin(), round.mishaps.end(),
      [&](const Mishap& mishap) { return Failed(mishap) && mishap.worker == worker; }));
}

// Whether a worker where the round has not failed has a slot that fits and is idle, or will be:
// after its live attempt, since attempts end, also of a worker that is silent, or when its worker
// has settled the last one. What else a slot may hold might be held for ever.
bool Scheduler::IsAnotherAble(int64_t now_ns, const Round& round) {
  std::optional<std::vector<WorkerId>>& able = round.round_class->able;
  if (!able.has_value()) {
    able.emplace();
    for (const auto& [id, worker] : workers_) {
      if (!worker.willing) continue;
      const RosterEntry& entry = *roster_.Find(id);
      const auto fits = [&](const auto& indexed) {
        const auto& [index, slot] = indexed;
        const bool settling = slot.settles_ns > now_ns;
        if (slot.live == kNoAttempt && !slot.offer.has_value() && !settling) return false;
        if (index.value() >= entry.report.slots.size() ||
            !Fits(round.round_class->requirement, entry, entry.report.slots[index.value()])) {
          return false;
        }
        if (settling) retry_ns_ = std::min(retry_ns_, slot.settles_ns);
        return true;
      };
      if (std::ranges::any_of(worker.slots, fits)) able->push_back(id);
      // A round that has failed on so many workers is given up.
      if (able->size() > options_.max_failures) break;
    }
  }
  return std::ranges::any_of(
      *able, [&](const WorkerId& worker) { return FailuresOn(round, worker) == 0; });
}

namespace {

bool FitsSlot(const RoundRequirement& requirement, size_t devices, const std::string& backend,
              const std::string& device_class, const std::set<std::string>& model_digests) {
  return devices >= requirement.devices &&
         (requirement.backend.empty() || requirement.backend == backend) &&
         (requirement.device_class.empty() || requirement.device_class == device_class) &&
         (requirement.model_travels || requirement.model_digest.empty() ||
          model_digests.contains(requirement.model_digest));
}

}  // namespace

bool Scheduler::Fits(const RoundRequirement& requirement, const SlotKind& kind) {
  return FitsSlot(requirement, kind.devices, kind.backend, kind.device_class, kind.model_digests);
}

bool Scheduler::Fits(const RoundRequirement& requirement, const RosterEntry& entry,
                     const SlotReport& slot) {
  return !slot.devices.empty() &&
         FitsSlot(requirement, slot.devices.size(), slot.devices[0].backend,
                  slot.devices[0].device_class, entry.report.model_digests);
}

int64_t Scheduler::PausedUntilNs(const Round& round, const WorkerId& worker) const {
  int64_t until_ns = 0;
  for (const Mishap& mishap : round.mishaps) {
    if (!Failed(mishap) || mishap.worker != worker) continue;
    until_ns = std::max(until_ns, mishap.time_ns + options_.failure_pause_ns);
  }
  return until_ns;
}

void Scheduler::Grant(int64_t now_ns, RoundId id, const SlotKey& key) {
  const auto& [worker_id, index] = key;
  Worker& worker = workers_.at(worker_id);
  Round& round = rounds_.at(id);
  const std::string& machine = roster_.Find(worker_id)->report.machine;
  const Attempt attempt = next_attempt_;
  next_attempt_ = Attempt(attempt.value() + 1);
  const auto neighbours = live_on_machine_.find(machine);
  plan_.grants.push_back({.attempt = attempt,
                          .round = id,
                          .experiment = round.experiment,
                          .worker = worker_id,
                          .incarnation = worker.incarnation,
                          .machine = machine,
                          .slot = index,
                          .neighbours = neighbours == live_on_machine_.end()
                                            ? 0
                                            : static_cast<uint32_t>(neighbours->second.size())});
  Dequeue(id, round);
  AddLease(attempt, {.round = id,
                     .slot = key,
                     .incarnation = worker.incarnation,
                     .machine = machine,
                     .trial = TrialId(),
                     .missing_ns = now_ns});
  Offer(SlotKey(key), worker.slots.at(index), std::nullopt);
  touched_.insert(worker_id);
}

void Scheduler::Say(ExperimentId experiment, std::string text) {
  plan_.messages.push_back({experiment, std::move(text)});
}

// ------------------------------------------------------------------------------------ questions

const ExperimentProgress* Scheduler::FindProgress(ExperimentId experiment) const {
  const auto found = experiments_.find(experiment);
  return found == experiments_.end() ? nullptr : &found->second.progress;
}

std::vector<RunningAttempt> Scheduler::Running(ExperimentId experiment) const {
  std::vector<RunningAttempt> running;
  const auto found = experiments_.find(experiment);
  if (found == experiments_.end()) return running;
  for (const Attempt attempt : found->second.live) {
    const Lease& lease = leases_.at(attempt);
    RunningAttempt& row = running.emplace_back();
    row = {.worker = lease.slot.first,
           .slot = lease.slot.second,
           .attempt = attempt,
           .round = lease.round,
           .holding = std::nullopt};
    const std::vector<SlotReport>& slots = roster_.Find(row.worker)->report.slots;
    if (row.slot.value() < slots.size()) {
      const std::optional<SlotHolding>& holding = slots[row.slot.value()].holding;
      if (holding.has_value() && holding->attempt == attempt) row.holding = holding;
    }
  }
  std::sort(running.begin(), running.end(), [](const RunningAttempt& a, const RunningAttempt& b) {
    return std::tie(a.worker, a.slot) < std::tie(b.worker, b.slot);
  });
  return running;
}

std::string Scheduler::WaitingFor(ExperimentId experiment) const {
  const auto found = experiments_.find(experiment);
  if (found == experiments_.end() || found->second.progress.running > 0) return "";
  std::set<std::string> reasons;
  for (const auto& [round_class, count] : found->second.queued) {
    reasons.insert(WhyWaiting(round_class->requirement));
  }
  return absl::StrJoin(reasons, "; ");
}

// The obstacle of the worker that comes closest to running such a round.
std::string Scheduler::WhyWaiting(const RoundRequirement& requirement) const {
  enum Obstacle { kNobody, kUnavailable, kNoModel, kNoSlot, kBusy };
  Obstacle closest = kNobody;
  std::string unavailable;
  for (const auto& [id, entry] : roster_.entries()) {
    if (entry.presence != Presence::kConnected) continue;
    Obstacle obstacle = kBusy;
    const std::string idle_reason = entry.IdleReason();
    // What a slot would be that lacks nothing but perhaps the model.
    const SlotKind with_model{.devices = requirement.devices,
                              .backend = requirement.backend,
                              .device_class = requirement.device_class,
                              .model_digests = entry.report.model_digests};
    if (!idle_reason.empty()) {
      obstacle = kUnavailable;
      unavailable = absl::StrCat(id.value(), " is ", idle_reason);
    } else if (!Fits(requirement, with_model)) {
      obstacle = kNoModel;
    } else {
      obstacle = kNoSlot;
      for (const SlotReport& slot : entry.report.slots) {
        if (Fits(requirement, entry, slot)) obstacle = kBusy;
      }
    }
    closest = std::max(closest, obstacle);
  }
  switch (closest) {
    case kNobody:
      return "no worker is connected";
    case kUnavailable:
      return absl::StrCat("no worker takes new work: ", unavailable);
    case kNoModel:
      return absl::StrCat("no worker has model ", requirement.model_name);
    case kNoSlot:
      return absl::StrCat(
          "no worker has a slot with ", requirement.devices,
          requirement.backend.empty() ? "" : absl::StrCat(" ", requirement.backend),
          requirement.devices == 1 ? " device" : " devices",
          requirement.device_class.empty() ? "" : absl::StrCat(" of ", requirement.device_class));
    case kBusy:
      return "all fitting slots are in use, or avoided after a failure";
  }
  return "";
}

bool Scheduler::MayReport(const WorkerId& worker, uint64_t incarnation, Attempt attempt) const {
  const auto found = leases_.find(attempt);
  return found == leases_.end() ||
         (found->second.slot.first == worker && found->second.incarnation == incarnation);
}

// ------------------------------------------------------------------------------------ invariants

void Scheduler::CheckInvariants() const {
  CheckLeases();
  CheckQueues();
  for (const auto& [kind, slots] : idle_) {
    KVSWEEP_CHECK(!slots.empty());
    for (const SlotKey& key : slots) {
      const Slot& slot = workers_.at(key.first).slots.at(key.second);
      KVSWEEP_CHECK(slot.live == kNoAttempt && slot.offer == kind);
      KVSWEEP_CHECK(roster_.Find(key.first)->IdleReason().empty());
    }
  }
}

void Scheduler::CheckLeases() const {
  size_t live_slots = 0;
  for (const auto& [id, worker] : workers_) {
    KVSWEEP_CHECK(roster_.Find(id) != nullptr) << id.value();
    for (const auto& [index, slot] : worker.slots) {
      if (slot.live == kNoAttempt) continue;
      ++live_slots;
      KVSWEEP_CHECK(leases_.at(slot.live).slot == SlotKey(id, index));
    }
  }
  KVSWEEP_CHECK_EQ(live_slots, leases_.size());
  std::map<std::string, uint32_t> exclusive;
  for (const auto& [attempt, lease] : leases_) {
    KVSWEEP_CHECK_LT(attempt.value(), next_attempt_.value());
    const Round& round = rounds_.at(lease.round);
    KVSWEEP_CHECK(round.live == attempt);
    KVSWEEP_CHECK(workers_.at(lease.slot.first).incarnation == lease.incarnation);
    KVSWEEP_CHECK(live_on_machine_.at(lease.machine).contains(attempt));
    if (round.round_class->exclusive()) KVSWEEP_CHECK_EQ(++exclusive[lease.machine], 1u);
  }
  KVSWEEP_CHECK_EQ(exclusive.size(), host_tier_user_.size());
}

void Scheduler::CheckQueues() const {
  size_t queued = 0;
  uint64_t trials = 0;
  std::map<const Class*, uint64_t> members;
  for (const auto& [id, round] : rounds_) {
    trials += round.trials;
    ++members[round.round_class];
    const bool in_class = round.round_class->queue.contains(id);
    const bool in_troubled = troubled_.contains(id);
    KVSWEEP_CHECK_EQ(in_class + in_troubled, round.live == kNoAttempt ? 1 : 0) << id.value();
    queued += in_class;
  }
  KVSWEEP_CHECK_EQ(trials, open_trials_);
  size_t heads = 0;
  for (const auto& [requirement, round_class] : classes_) {
    KVSWEEP_CHECK_EQ(members[round_class.get()], round_class->members);
    queued -= round_class->queue.size();
    if (round_class->queue.empty()) continue;
    ++heads;
    KVSWEEP_CHECK(heads_.at(*round_class->queue.begin()) == round_class.get());
  }
  KVSWEEP_CHECK_EQ(queued, 0u);
  KVSWEEP_CHECK_EQ(heads, heads_.size());
  for (const auto& [id, experiment] : experiments_) {
    const ExperimentProgress& progress = experiment.progress;
    KVSWEEP_CHECK_EQ(progress.rounds, progress.queued + progress.running + progress.done());
    KVSWEEP_CHECK_EQ(progress.running, experiment.live.size());
  }
}

}  // namespace kvsweep
