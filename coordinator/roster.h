#ifndef KVSWEEP_COORDINATOR_ROSTER_H_
#define KVSWEEP_COORDINATOR_ROSTER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"

// Who is connected: the last whole state that each worker told, when it was heard, and what follows
// from that for its leases. Pure: every function takes the instant at which it happens (monotonic
// ns, never going back).
//
// A worker is *connected* from its first state until its stream breaks. A connected worker that is
// silent for `lost_after_ns` is *shown as lost* and gets no new work; its leases run on until
// `lease_ns` after it was last heard, or `reconnect_ns` after its stream broke, whichever comes
// first. At that instant it *expires*: the scheduler takes its leases back. An expired worker stays
// listed until it returns or `forget_after_ns` has passed.

namespace kvsweep {

struct LeaseOptions {
  int64_t lease_ns = 15 * kNsPerSecond;
  int64_t lost_after_ns = 3 * kNsPerSecond;
  int64_t reconnect_ns = 2 * kNsPerSecond;
  int64_t forget_after_ns = 600 * kNsPerSecond;
};

// One device of a slot, as the worker describes it.
struct DeviceDescription {
  std::string backend;  // "cpu", "cuda"
  std::string name;
  std::string device_class;  // what must be equal for two measurements to compare
  uint64_t memory_bytes = 0;
  std::map<std::string, std::string> facts;  // its limits, the preflight; for people
};

enum class HoldingPhase { kStarting, kRunning, kFinished, kFailed, kAbandoned };

// The attempt that a slot holds, from the moment it was told to run it until it is told that it is
// settled.
struct SlotHolding {
  Attempt attempt;
  HoldingPhase phase = HoldingPhase::kStarting;
  TrialId trial;  // running now; 0: none
  std::string trial_phase;
  uint64_t done = 0;  // of `total` requests or windows of the trial
  uint64_t total = 0;
  std::string reason;  // kFailed: why it cannot be run here
};

struct SlotReport {
  std::vector<DeviceDescription> devices;
  std::optional<SlotHolding> holding;  // none: idle
};

// What a worker says about itself, whole, each time it speaks.
struct WorkerReport {
  WorkerId worker;
  uint64_t incarnation = 0;  // new at each start of the worker
  std::string machine;       // workers of one machine share its host link and memory
  std::map<std::string, std::string> labels;
  std::string build;  // digest of its runner's sources and flags
  uint32_t method_version = 0;
  std::vector<SlotReport> slots;
  std::set<std::string> model_digests;  // models that it holds
  bool draining = false;                // would rather be idle
  std::string unhealthy_reason;         // empty: healthy
};

enum class Presence {
  kConnected,
  kSilent,        // connected, not heard for lost_after_ns
  kDisconnected,  // stream broken, leases not yet taken back
  kGone,          // expired
};

// A few words for listings: "connected", "lost, silent", "lost, disconnected", "gone".
const char* PresenceName(Presence presence);

struct RosterEntry {
  WorkerReport report;
  int64_t heard_ns = 0;
  int64_t broken_ns = kNeverNs;  // kNeverNs: the stream stands
  bool drained_by_people = false;
  Presence presence = Presence::kConnected;

  // Why the worker is to get no new work whether it is heard or not; empty: none.
  std::string RefusalReason() const;

  // Why the worker gets no new work now; empty: it does.
  std::string IdleReason() const;
};

class Roster {
 public:
  // What a report means beyond its content.
  enum class Arrival {
    kFirst,           // not listed before, or listed without ever having been heard
    kAgain,           // the incarnation known
    kReturned,        // the incarnation known, after it was silent, disconnected or gone
    kNewIncarnation,  // the worker was started again: what its old process ran is lost
    kSuperseded,  // of an incarnation that a newer one has replaced: not recorded, must be told to
                  // exit
  };

  explicit Roster(const LeaseOptions& options);

  // Lists a worker that held leases before the coordinator was restarted. Nothing of it expires
  // before `hold_ns`.
  void Expect(int64_t now_ns, int64_t hold_ns, const WorkerId& worker, uint64_t incarnation,
              const std::string& machine);

  // The worker spoke. The report replaces the one before.
  Arrival Heard(int64_t now_ns, WorkerReport report);

  // Its stream ended. Ignored for an unknown worker and for an incarnation that is not the current
  // one.
  void Broken(int64_t now_ns, const WorkerId& worker, uint64_t incarnation);

  // Nobody could be heard for the last `duration_ns`, however loud: that time counts for no lease of
  // a worker that was heard since the last stall. What a living one said meanwhile is heard next; of
  // a dead one a row of stalls shall not put off the end for ever. REQUIRES: no event and no Advance
  // came in within it.
  void Stalled(int64_t duration_ns);
  // What of that would be left out for the worker.
  int64_t Credit(const WorkerId& worker, int64_t duration_ns) const;

  // People's wish, kept over restarts of the worker. False: unknown worker.
  bool Drain(const WorkerId& worker, bool draining);

  // Workers whose presence changed because time passed, each once a change, in order of name.
  // Forgotten workers are dropped here.
  std::vector<WorkerId> Advance(int64_t now_ns);

  // When Advance has something to do next; kNeverNs: never. May be early, is never late.
  int64_t NextDeadlineNs() const;

  // Whether the incarnation was replaced by another one.
  bool IsSuperseded(const WorkerId& worker, uint64_t incarnation) const;

  // Null: unknown. Valid until the next call that changes the roster.
  const RosterEntry* Find(const WorkerId& worker) const;

  // In order of name.
  const std::map<WorkerId, RosterEntry>& entries() const { return entries_; }

 private:
  struct Timer {
    int64_t hold_ns = 0;               // leases are kept at least until here
    int64_t due_ns = kNeverNs;         // its place in deadlines_
    bool credited = false;             // since it was heard (Stalled)
    std::vector<uint64_t> superseded;  // incarnations replaced, newest last, bounded
  };

  int64_t ExpiryNs(const RosterEntry& entry, const Timer& timer) const;
  Presence PresenceAt(int64_t now_ns, const RosterEntry& entry, const Timer& timer) const;
  int64_t NextChangeNs(const RosterEntry& entry, const Timer& timer) const;
  void Schedule(const WorkerId& worker, int64_t due_ns);
  void Forget(const WorkerId& worker);

  const LeaseOptions options_;
  std::map<WorkerId, RosterEntry> entries_;
  std::map<WorkerId, Timer> timers_;                  // same keys as entries_
  std::set<std::pair<int64_t, WorkerId>> deadlines_;  // one for each worker, perhaps early
};

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_ROSTER_H_
