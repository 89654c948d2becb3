#ifndef KVSWEEP_COORDINATOR_SCHEDULER_H_
#define KVSWEEP_COORDINATOR_SCHEDULER_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/node_hash_map.h"
#include "base/clock.h"
#include "base/ids.h"
#include "base/limits.h"
#include "coordinator/roster.h"

// Which slot runs which round, and when a lease is taken back. A planner: values in, a plan out; no
// clock, no lock, no I/O. It sees ids and numbers; what a round measures flows past it.
//
// Events (Submit, Heard, Broken, Accepted, Refused, Cancel, Drain) change the state; Decide(now)
// then lets time pass, hands out work and returns the SchedulerPlan: rows to make durable FIRST,
// then what to tell the workers. Events and Decide carry the instant at which they happen; instants
// never go back.
//
// A round is queued, leased (to one slot, as one attempt) or done; done rounds are forgotten, only
// counted. An attempt is live while its round is leased as this attempt. Invariants, checked by
// CheckInvariants():
//   - a live attempt has one slot, a slot at most one live attempt, a round at most one live
//   attempt;
//   - attempts only grow, and none is handed out twice, restarts included;
//   - at most one round of real time that uses the host tier is live on a machine;
//   - every queued round is in exactly one queue.
//
// Order: rounds are handed out by growing round id (submission order) among those that fit a free
// slot; a round that fits none does not hold up those behind it. Rounds are queued by *requirement
// class* (what a slot must have), slots by *slot kind* (what it has), so that a decision costs
// classes x kinds, not rounds x slots.
//
// A round that failed somewhere (not: whose worker was lost) avoids the workers where it did: it
// goes to one of them only if no other worker that takes work could run it, and waits for one that
// is in use. So a worker where everything fails at once costs each round one attempt, not all of
// them, and a worker that is alone is asked again.

namespace kvsweep {

struct SchedulerOptions {
  LeaseOptions lease;
  uint32_t max_attempts =
      limits::kAttemptsPerRound;  // leases of one round, after which it is given up
  uint32_t max_failures = 3;  // attempts refused or failed by workers, after which it is given up
  int64_t failure_pause_ns =
      5 * kNsPerSecond;  // before a round returns to a worker where it failed
  // How long a slot whose attempt has ended counts as one that is about to be idle, for rounds that
  // wait for it, until its worker says that it is.
  int64_t settling_ns = 15 * kNsPerSecond;
  uint32_t poison_losses = 3;    // workers lost during the same trial ...
  uint32_t poison_machines = 2;  // ... on at least so many machines: poisoned
};

// What a slot and its worker must have. Empty strings: anything will do.
struct RoundRequirement {
  uint32_t devices = 1;
  std::string backend;
  std::string device_class;
  std::string model_digest;    // 32 bytes, or empty (random weights)
  bool model_travels = false;  // small enough to be sent: any worker can have it
  std::string model_name;      // for people
  bool uses_host_tier = false;
  bool modelled_time = false;  // nothing is timed on the machine: neighbours do not disturb

  auto operator<=>(const RoundRequirement&) const = default;
};

struct RoundDescriptor {
  RoundId round;  // grows in the order of submission
  RoundRequirement requirement;
  uint64_t trials = 1;
};

// A worker lost, or an attempt failed, during a round: what decides about giving it up.
struct Mishap {
  enum class Kind { kWorkerLost, kFailed };
  Kind kind = Kind::kWorkerLost;
  WorkerId worker;
  std::string machine;
  TrialId trial;  // running then; 0: unknown
  int64_t time_ns = 0;
  std::string reason;
};

// An attempt that was live when the coordinator stopped.
struct RecoveredLease {
  Attempt attempt;
  RoundId round;
  WorkerId worker;
  uint64_t incarnation = 0;
  std::string machine;
  SlotIndex slot;
};

enum class RoundEnd { kAccepted, kServed, kFailed, kPoisoned, kCancelled };

// ---- rows to make durable, in this order, before anything is told ----

struct VoidRow {
  Attempt attempt;
  RoundId round;
  Mishap mishap;
};

struct FinishRow {
  RoundId round;
  ExperimentId experiment;
  RoundEnd end = RoundEnd::kFailed;  // or kPoisoned
  TrialId poisoned_trial;            // kPoisoned
  std::string reason;
};

struct GrantRow {
  Attempt attempt;
  RoundId round;
  ExperimentId experiment;
  WorkerId worker;
  uint64_t incarnation = 0;
  std::string machine;
  SlotIndex slot;
  uint32_t neighbours = 0;  // other live attempts on the machine at this instant
};

// ---- what to tell ----

struct SlotWish {
  enum class Kind { kRun, kAbandon, kSettled };
  SlotIndex slot;
  Attempt attempt;
  Kind kind = Kind::kRun;
  RoundId round;  // kRun
};

// The whole wish for one worker, in the order in which it is to be obeyed: an attempt is settled
// before its slot is told to run the next. Slots that are not named comply already.
struct WorkerWish {
  WorkerId worker;
  uint64_t incarnation = 0;
  std::vector<SlotWish> slots;
};

// One line of an experiment's log.
struct LogLine {
  ExperimentId experiment;  // 0: concerns all
  std::string text;
};

struct SchedulerPlan {
  std::vector<ExperimentId>
      cancels;  // all their rounds that are not done, and the attempts of these
  std::vector<VoidRow> voids;
  std::vector<FinishRow> finishes;
  std::vector<GrantRow> grants;
  std::vector<WorkerWish> wishes;  // workers that spoke since the last plan, or whose wish changed
  std::vector<ExperimentId> changed;  // progress changed; ascending
  std::vector<LogLine> messages;
  int64_t wake_ns = kNeverNs;  // call Decide again by then even if nothing happens
};

struct ExperimentProgress {
  uint64_t rounds = 0;  // = queued + running + the five ends
  uint64_t queued = 0;
  uint64_t running = 0;
  std::array<uint64_t, 5> ended{};  // by RoundEnd

  uint64_t done() const;  // all that will not run any more
  bool finished() const { return done() == rounds; }
};

struct RunningAttempt {
  WorkerId worker;
  SlotIndex slot;
  Attempt attempt;
  RoundId round;
  std::optional<SlotHolding> holding;  // none: not yet reported by the worker
};

class Scheduler {
 public:
  // `next_attempt` >= 1 is larger than every attempt ever granted.
  Scheduler(const SchedulerOptions& options, Attempt next_attempt);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // ---- after a restart, before any other event ----

  // Mishaps that a queued or leased round had before. REQUIRES: the round was submitted (Submit) in
  // this life.
  void RecoverMishap(RoundId round, Mishap mishap);

  // An attempt that was live when the coordinator stopped goes on: its worker has one full lease to
  // return. REQUIRES: the round was submitted in this life and is queued.
  void RecoverLease(int64_t now_ns, const RecoveredLease& lease);

  // ---- events ----

  // Queues the rounds of an experiment. REQUIRES: ids ascend and are larger than any submitted
  // before. `ended` counts rounds of the experiment that are done already (served, or ended before
  // a restart).
  void Submit(int64_t now_ns, ExperimentId experiment, std::vector<RoundDescriptor> rounds,
              const std::array<uint64_t, 5>& ended);

  // A worker spoke. False: the incarnation was superseded; close its stream.
  bool Heard(int64_t now_ns, WorkerReport report);

  // The stream of this incarnation ended.
  void Broken(int64_t now_ns, const WorkerId& worker, uint64_t incarnation);

  // The coordinator itself was held up and heard nobody for the last `duration_ns`: that time
  // counts against no worker that was heard since the last time. REQUIRES: no event and no Decide
  // came in within it.
  void Stalled(int64_t duration_ns);

  // The store accepted the attempt: its round is done. Ignored for an attempt that is not live.
  void Accepted(int64_t now_ns, Attempt attempt);

  // The store voided the attempt (unequal repeat, digest mismatch, lying worker). Ignored if it is
  // not live.
  void Refused(int64_t now_ns, Attempt attempt, const std::string& reason);

  // Ends all rounds of an experiment that are not done. Returns how many; 0 also for an unknown
  // experiment.
  uint64_t Cancel(int64_t now_ns, ExperimentId experiment);

  // People want the worker to get no new work. False: unknown worker.
  bool Drain(int64_t now_ns, const WorkerId& worker, bool draining);

  // Lets time pass until now, hands out work, and returns what changed since the last call.
  SchedulerPlan Decide(int64_t now_ns);

  // ---- questions; none changes anything ----

  // Counts of an experiment that was submitted in this life; null: unknown.
  const ExperimentProgress* FindProgress(ExperimentId experiment) const;

  // Trials of all rounds, of any experiment, that are not done.
  uint64_t open_trials() const { return open_trials_; }

  // What an experiment runs now, by worker and slot.
  std::vector<RunningAttempt> Running(ExperimentId experiment) const;

  // Why nothing of the experiment runs, for people: "no worker is connected", "no worker has model
  // X", ... Empty: something runs or nothing is left to run.
  std::string WaitingFor(ExperimentId experiment) const;

  // Whether a batch of this attempt may come from this worker incarnation: false if it is live for
  // another. Of attempts that are not live nothing is known here; the store refuses or recognises
  // their rows.
  bool MayReport(const WorkerId& worker, uint64_t incarnation, Attempt attempt) const;

  const Roster& roster() const { return roster_; }

  // Aborts if an invariant of the class comment does not hold. Costs as much as the state is large.
  void CheckInvariants() const;

 private:
  using SlotKey = std::pair<WorkerId, SlotIndex>;

  // Rounds with equal requirements.
  struct Class {
    RoundRequirement requirement;
    std::set<RoundId> queue;  // queued, without those in troubled_
    uint64_t members = 0;     // queued or leased; the class goes with the last one
    // Workers that could run its rounds, now or soon: enough of them that one is left for a round
    // that failed on others. Found once for each HandOut.
    std::optional<std::vector<WorkerId>> able;

    bool exclusive() const { return requirement.uses_host_tier && !requirement.modelled_time; }
  };

  // A round that is not done.
  struct Round {
    ExperimentId experiment;
    Class* round_class = nullptr;
    uint64_t trials = 1;
    Attempt live;  // 0: queued
    uint32_t attempts = 0;
    std::vector<Mishap> mishaps;
  };

  // A live attempt. INVARIANT: rounds_[round].live is its number; the slot, if listed, has it too.
  struct Lease {
    RoundId round;
    SlotKey slot;
    uint64_t incarnation = 0;
    std::string machine;
    TrialId trial;           // last reported as running; 0: none yet
    int64_t missing_ns = 0;  // since when the worker does not report it; kNeverNs: it does
  };

  // Idle slots with equal offers. Ordered by devices first, so that small rounds take small slots.
  struct SlotKind {
    uint32_t devices = 0;
    std::string backend;
    std::string device_class;
    std::set<std::string> model_digests;

    auto operator<=>(const SlotKind&) const = default;
  };

  struct Slot {
    Attempt live;                   // 0: none
    Attempt settled;                // accepted last: to be forgotten by the worker
    std::optional<SlotKind> offer;  // the kind it is listed under as idle
    int64_t settles_ns = 0;         // until when it counts as about to be idle
  };

  struct Worker {
    uint64_t incarnation = 0;
    bool willing = false;  // takes new work, now or when it is heard again
    std::map<SlotIndex, Slot> slots;
  };

  struct Experiment {
    ExperimentProgress progress;
    std::map<Class*, uint64_t> queued;  // rounds queued by class, troubled ones included
    std::set<Attempt> live;
    std::vector<RoundId> rounds;  // all submitted in this life; done ones are not in rounds_
  };

  // Rounds and classes.
  Class* ClassFor(const RoundRequirement& requirement);
  void UpdateHead(Class* round_class, std::optional<RoundId> old_head);
  void Enqueue(RoundId id, Round& round);
  void Dequeue(RoundId id, Round& round);
  void EndRound(RoundId id, RoundEnd end);

  // Leases.
  void AddLease(Attempt attempt, const Lease& lease);
  Lease RemoveLease(int64_t now_ns, Attempt attempt);
  void TakeBack(int64_t now_ns, Attempt attempt, Mishap::Kind kind, const std::string& reason,
                bool stored = false);
  void TakeBackAll(int64_t now_ns, const WorkerId& worker, const std::string& reason);
  std::optional<FinishRow> GiveUp(RoundId id, const Round& round) const;

  // Slots.
  void TakeReport(int64_t now_ns, const RosterEntry& entry, Worker& worker);
  void Review(const WorkerId& worker);
  void Offer(const SlotKey& key, Slot& slot, std::optional<SlotKind> kind);
  WorkerWish WishFor(const WorkerId& worker) const;

  // Handing out.
  void PassTime(int64_t now_ns);
  void HandOut(int64_t now_ns);
  void TryRound(int64_t now_ns, RoundId id);
  std::optional<SlotKey> FindSlot(int64_t now_ns, const Round& round);
  static bool Fits(const RoundRequirement& requirement, const SlotKind& kind);
  static bool Fits(const RoundRequirement& requirement, const RosterEntry& entry,
                   const SlotReport& slot);
  static uint32_t FailuresOn(const Round& round, const WorkerId& worker);
  bool IsAnotherAble(int64_t now_ns, const Round& round);
  int64_t PausedUntilNs(const Round& round, const WorkerId& worker) const;
  void Grant(int64_t now_ns, RoundId id, const SlotKey& key);
  std::string WhyWaiting(const RoundRequirement& requirement) const;
  void Say(ExperimentId experiment, std::string text);

  void CheckLeases() const;
  void CheckQueues() const;

  const SchedulerOptions options_;
  Attempt next_attempt_;
  Roster roster_;

  std::map<RoundRequirement, std::unique_ptr<Class>> classes_;
  std::map<RoundId, Class*> heads_;  // first queued round of each class that has one
  std::set<RoundId> troubled_;       // queued rounds that failed somewhere: tried first, one by one
  absl::node_hash_map<RoundId, Round> rounds_;
  RoundId last_round_;
  uint64_t open_trials_ = 0;  // of rounds_
  std::map<Attempt, Lease> leases_;
  std::map<WorkerId, Worker> workers_;  // heard in this life, or holders of recovered leases
  std::map<SlotKind, std::set<SlotKey>> idle_;
  std::map<std::string, std::set<Attempt>> live_on_machine_;
  std::map<std::string, Attempt> host_tier_user_;  // by machine
  std::map<ExperimentId, Experiment> experiments_;

  bool work_changed_ = false;    // a slot came free or a round was queued since the last Decide
  int64_t retry_ns_ = kNeverNs;  // when a pause after a failure ends, or a slot settles
  std::set<WorkerId> touched_;   // to be told their wish
  std::set<ExperimentId> changed_;
  SchedulerPlan plan_;  // being gathered
};

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_SCHEDULER_H_
