#ifndef KVSWEEP_WORKER_SESSION_H_
#define KVSWEEP_WORKER_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/ids.h"
#include "base/limits.h"
#include "worker/outbox.h"

namespace kvsweep {

// One trial of a round, as far as the session needs to know it.
struct SessionTrial {
  TrialId trial;
  int64_t limit_ns = 0;  // preparing and measuring together, at most
};

// The trials of a round in the order they run. Their specs stay with the executor, which finds them
// by index.
struct SessionRound {
  std::vector<SessionTrial> trials;
};

// What the coordinator wants of one slot (worker.proto, SlotDesire).
struct SessionWish {
  enum class Kind { kRun, kAbandon, kSettled };
  SlotIndex slot;
  Attempt attempt;
  Kind kind = Kind::kRun;
  absl::StatusOr<SessionRound> round =
      SessionRound{};  // of kRun; an error: it could not be understood
};

// What a slot holds (worker.proto, Holding).
struct HeldAttempt {
  enum class Phase { kStarting, kRunning, kFinished, kFailed, kAbandoned };
  Attempt attempt;
  Phase phase = Phase::kStarting;
  TrialId trial;            // 0 between trials
  std::string trial_phase;  // as the runner last said
  uint64_t done = 0;
  uint64_t total = 0;
  uint64_t oldest_unacknowledged = 0;  // 0: none
  uint64_t last_sequence = 0;          // 0: none
  std::string reason;                  // of kFailed
};

struct SessionSlot {
  bool available =
      false;  // its runner is up, or is being replaced after a death that need not repeat
  std::optional<HeldAttempt> holding;
};

// The state that the worker tells the coordinator, less what the session does not know (devices,
// models, labels).
struct SessionReport {
  uint64_t generation = 0;
  bool draining = false;
  std::string unhealthy_reason;    // empty: healthy
  std::vector<SessionSlot> slots;  // [slots]
};

// How a runner ended.
struct RunnerExit {
  int signal = 0;  // 0: it exited by itself
  int exit_code = 0;
  std::string log_tail;  // end of its stderr
  std::string reason;    // what else is known: it could not be started, its frames were malformed
};

// A record as it came from the runner: opaque but for whose it is and whether it is its trial's
// last.
struct RunnerRecord {
  TrialId trial;
  bool is_outcome = false;
  std::string payload;  // as it is stored and sent
};

// The records that the session itself writes, as bytes. The executor knows the schema; the session
// does not.
class RecordEncoder {
 public:
  virtual ~RecordEncoder() = default;

  enum class Verdict { kTimeout, kCrashed, kRecorderOverflow };
  struct Outcome {
    TrialId trial;
    Verdict verdict = Verdict::kCrashed;
    std::string evidence;
    std::string phase;
    int signal = 0;
    std::string log_tail;
  };
  virtual std::string EncodeOutcome(const Outcome& outcome) const = 0;
  virtual std::string EncodeDiscard(TrialId trial, const std::string& reason) const = 0;
  virtual std::string EncodeFinish(const RecordDigest& digest) const = 0;
};

// One thing for the executor to do, in the order of the plan.
struct SessionAction {
  enum class Kind {
    kStartRunner,   // start the slot's runner; answered by OnRunnerReady or OnRunnerExited
    kStopRunner,    // kill it and all its children; answered by OnRunnerExited
    kPrepareRound,  // see to it that files and model are here; answered by OnRoundPrepared
    kSendTrial,     // send trial `trial_index` of the round to the runner
    kCancelTrial,   // ask the runner to end the trial soon
    kForgetRound,   // the attempt's spec and files are no longer needed
  };
  Kind kind = Kind::kStartRunner;
  SlotIndex slot;
  Attempt attempt;         // 0 for runners
  TrialId trial;           // of kSendTrial, kCancelTrial
  size_t trial_index = 0;  // of kSendTrial: index in SessionRound::trials
  uint32_t execution = 0;  // of kSendTrial: 1, or more after the runner died during this trial
  std::string reason;      // of kStopRunner
};

struct SessionPlan {
  std::vector<SessionAction> actions;
  bool speak = false;  // the report changed in a way that the coordinator should hear of at once
  bool exit = false;   // nothing is left to do: stop the runners and end
  int64_t wake_at_ns = kNeverNs;  // call OnTick then, at the latest
};

struct SessionOptions {
  size_t slots = 1;
  int64_t start_limit_ns = 120 * kNsPerSecond;  // a runner says hello within this
  int64_t trial_grace_ns =
      30 * kNsPerSecond;  // beyond a trial's own limits; the runner enforces those itself
  int64_t cancel_grace_ns = 10 * kNsPerSecond;  // between asking to cancel and killing
  int64_t kill_grace_ns =
      30 * kNsPerSecond;  // a killed runner is gone within this, or its slot is lost
  int64_t restart_backoff_ns = kNsPerSecond / 2;  // after a failed start, doubled up to 32-fold
  int64_t drain_notice_ns = 3 * kNsPerSecond;     // wait at most so long for draining to be heard
  uint32_t max_executions = limits::kRunnerDeathsPerTrial;  // of a trial
  uint32_t max_start_failures = 3;  // in a row, before the slot gives up its attempt
  OutboxLimits outbox;
};

// The worker's side of both wires, as a state machine: what the coordinator wants, what runners say
// and how they end go in; starts and kills, trials to send, rows to send and the state to report
// come out. No clock, lock, I/O (but the spill files) or schema inside; every event carries its
// time, and payloads are opaque.
//
// Each slot holds at most one attempt, until the coordinator says that it is settled:
//
//   idle → starting → running → finished → idle        settled: rows accepted, or refused for ever
//             └────────┴→ failed (cannot be run here)  any → abandoned (as told; rows forgotten)
//
// and owns one runner, which stays warm between trials and rounds:
//
//   absent → starting → ready ⇄ busy (with a trial); each → stopping (killed) → absent
//
// A runner that dies during a trial costs that trial: a discard record, a new runner, the same
// trial again, at most max_executions times in all; then the outcome `crashed`. A trial past its
// limits is killed: outcome `timeout`, not repeated. Rows past the outbox's limits: outcome
// `recorder_overflow`. None of the three stops the round.
//
// Every event returns the plan that follows from it; the executor carries plans out in order, and
// may hand in further events meanwhile. Runner events are those of the slot's one runner: its
// frames come before its exit, and kStartRunner only after that. Not thread-safe.
class Session {
 public:
  // `spills` has one file for each slot. Everything passed by reference must outlive the session.
  Session(const SessionOptions& options, const RecordEncoder& encoder,
          std::span<SpillFile* const> spills);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Starts the runners. Call once, first.
  SessionPlan Start(int64_t now_ns);

  // The coordinator answered report `generation`. Wishes are taken in order; repeated, stale and
  // unknown ones have no effect, and a slot that is not named is left as it is.
  SessionPlan OnWishes(int64_t now_ns, uint64_t generation, std::span<const SessionWish> wishes);

  // Files and model of the attempt are here, or why they cannot be had. Ignored if it is no longer
  // held.
  SessionPlan OnRoundPrepared(int64_t now_ns, SlotIndex slot, Attempt attempt,
                              const absl::Status& status);

  // The runner said hello.
  SessionPlan OnRunnerReady(int64_t now_ns, SlotIndex slot);

  SessionPlan OnRunnerProgress(int64_t now_ns, SlotIndex slot, TrialId trial,
                               const std::string& phase, uint64_t done, uint64_t total);
  SessionPlan OnRunnerRecords(int64_t now_ns, SlotIndex slot, std::vector<RunnerRecord> records);
  SessionPlan OnTrialDone(int64_t now_ns, SlotIndex slot, TrialId trial);

  // The runner broke the protocol in a way the executor saw (`reason`): it is killed.
  SessionPlan OnRunnerMisbehaved(int64_t now_ns, SlotIndex slot, const std::string& reason);

  // The runner is gone, all its frames have been delivered.
  SessionPlan OnRunnerExited(int64_t now_ns, SlotIndex slot, const RunnerExit& exit);

  SessionPlan OnTick(int64_t now_ns);

  // First call: take no new round, finish and settle what is held, then exit. Second: stop
  // everything and exit.
  SessionPlan OnShutdown(int64_t now_ns);

  // A new Report stream is up: all that is not acknowledged will be sent again.
  void OnReportConnected();

  // The coordinator acknowledged the attempt's rows up to `through`. InvalidArgument when they were
  // never sent. An attempt that is not held has no effect.
  absl::StatusOr<SessionPlan> OnAcknowledged(int64_t now_ns, Attempt attempt, uint64_t through);

  // The coordinator will not take rows of this attempt over this connection; what to do about it
  // comes as a wish.
  void OnRefused(Attempt attempt);

  // The next rows to send, of each slot in turn; nothing when all have been sent. If rows cannot be
  // read back from disk, their attempt fails at the next OnTick.
  struct Batch {
    Attempt attempt;
    OutboxBatch rows;
  };
  std::optional<Batch> NextBatch();

  // The state to send now; each call is a new generation.
  SessionReport TakeReport();

  // The attempt that a slot holds; 0: none.
  Attempt AttemptOf(SlotIndex slot) const;

  size_t slot_count() const { return slots_.size(); }

  // Aborts when an invariant does not hold. For tests and simulations, after every event.
  void CheckInvariants() const;

 private:
  enum class RunnerState { kAbsent, kStarting, kReady, kStopping };

  // The trial that the runner is busy with.
  struct Running {
    int64_t deadline_ns = kNeverNs;
    int64_t kill_at_ns = kNeverNs;  // after a cancellation
    bool outcome_seen = false;      // the runner has sent its outcome
    std::optional<RecordEncoder::Outcome>
        verdict;  // ours: rows are dropped from here on, and it is recorded at the end
  };

  // An attempt.
  struct Held {
    HeldAttempt report;  // its sequences are filled in when it is taken
    SessionRound round;
    bool prepared = false;
    size_t trial_index = 0;   // trial that runs, or comes next; round.trials.size(): none is left
    uint32_t executions = 0;  // of that trial, begun
    std::optional<Running> running;
    std::optional<HeldAttempt::Phase> ending;  // told to stop: the phase once nothing runs any more
    bool forget_at_end = false;                // settled while something was still running
    bool wait_for_room = false;                // after an overflow
    bool refused = false;
    absl::Status spill_status;
    std::unique_ptr<Outbox> outbox;  // absent once its rows are forgotten
  };

  struct Slot {
    SlotIndex index;
    SpillFile* spill = nullptr;
    RunnerState runner = RunnerState::kAbsent;
    bool greeted = false;         // this runner has said hello
    bool ever_greeted = false;    // some runner of this slot has
    uint32_t start_failures = 0;  // in a row
    std::string start_failure;    // the last one
    std::string kill_reason;      // why we killed this runner, if it was the runner's fault
    int64_t start_at_ns = 0;      // of the next runner, while absent
    int64_t runner_deadline_ns = kNeverNs;  // starting: for its hello; stopping: for its exit
    bool stuck = false;                     // killed, but still there after kill_grace_ns
    std::optional<Held> held;
    Attempt newest;  // the largest attempt ever held; older ones are stale
  };

  Slot& At(SlotIndex slot);
  Held* FindHeld(Attempt attempt);

  // The coordinator's wishes.
  void Take(Slot& slot, const SessionWish& wish);
  void StopHeld(int64_t now_ns, Slot& slot, HeldAttempt::Phase phase, std::string reason);
  void EndHeld(Slot& slot);
  void Forget(Slot& slot);

  // The runner's life.
  bool WantsRunner(const Slot& slot) const;
  bool IsBroken(const Slot& slot) const;
  void Kill(int64_t now_ns, Slot& slot, std::string reason);
  void StartFailed(int64_t now_ns, Slot& slot, const RunnerExit& exit);

  // A trial's life.
  void SendTrial(int64_t now_ns, Slot& slot);
  void AddRecord(int64_t now_ns, Slot& slot, RunnerRecord record);
  void CancelTrial(int64_t now_ns, Slot& slot);
  void TrialDied(Slot& slot, const RunnerExit& exit);
  void EndTrial(Slot& slot);
  void TimeOut(int64_t now_ns, Slot& slot);

  void GiveUpKilling(int64_t now_ns, Slot& slot);
  void CheckDeadlines(int64_t now_ns, Slot& slot);
  void Advance(int64_t now_ns, Slot& slot);
  int64_t WakeAtNs(const Slot& slot) const;
  bool MayExit(int64_t now_ns) const;
  void Act(SessionAction::Kind kind, const Slot& slot);
  SessionPlan Conclude(int64_t now_ns);

  const SessionOptions options_;
  const RecordEncoder& encoder_;
  std::vector<Slot> slots_;
  size_t next_slot_to_send_ = 0;
  SessionPlan plan_;  // of the event in hand
  uint64_t generation_ = 0;
  uint32_t shutdowns_ = 0;
  uint64_t drain_generation_ = 0;  // first report that said draining; 0: none yet
  uint64_t answered_generation_ = 0;
  int64_t drain_exit_at_ns_ = kNeverNs;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_SESSION_H_
