#include "coordinator/roster.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace kvsweep {
namespace {

// Replaced incarnations remembered for each worker. An older one that still runs would be taken for
// a fresh start.
constexpr size_t kSupersededKept = 16;

int64_t Later(int64_t time_ns, int64_t duration_ns) {
  return time_ns > kNeverNs - duration_ns ? kNeverNs : time_ns + duration_ns;
}

}  // namespace

const char* PresenceName(Presence presence) {
  switch (presence) {
    case Presence::kConnected:
      return "connected";
    case Presence::kSilent:
      return "lost, silent";
    case Presence::kDisconnected:
      return "lost, disconnected";
    case Presence::kGone:
      return "gone";
  }
  return "unknown";
}

std::string RosterEntry::RefusalReason() const {
  if (!report.unhealthy_reason.empty()) return absl::StrCat("unhealthy: ", report.unhealthy_reason);
  if (report.draining || drained_by_people) return "draining";
  return "";
}

std::string RosterEntry::IdleReason() const {
  return presence == Presence::kConnected ? RefusalReason() : PresenceName(presence);
}

Roster::Roster(const LeaseOptions& options) : options_(options) {
  KVSWEEP_CHECK_GT(options.lease_ns, 0);
  KVSWEEP_CHECK_GT(options.lost_after_ns, 0);
  KVSWEEP_CHECK_GE(options.reconnect_ns, 0);
}

void Roster::Expect(int64_t now_ns, int64_t hold_ns, const WorkerId& worker, uint64_t incarnation,
                    const std::string& machine) {
  RosterEntry& entry = entries_[worker];
  entry.report.worker = worker;
  entry.report.incarnation = incarnation;
  entry.report.machine = machine;
  entry.heard_ns = now_ns;
  entry.broken_ns = now_ns;
  entry.presence = Presence::kDisconnected;
  Timer& timer = timers_[worker];
  timer.hold_ns = hold_ns;
  timer.credited = false;
  Schedule(worker, NextChangeNs(entry, timer));
}

Roster::Arrival Roster::Heard(int64_t now_ns, WorkerReport report) {
  const auto [found, inserted] = entries_.try_emplace(report.worker);
  RosterEntry& entry = found->second;
  Timer& timer = timers_[report.worker];
  Arrival arrival = Arrival::kFirst;
  if (!inserted) {
    if (IsSuperseded(report.worker, report.incarnation)) return Arrival::kSuperseded;
    arrival = entry.presence == Presence::kConnected ? Arrival::kAgain : Arrival::kReturned;
    if (entry.report.incarnation != report.incarnation) {
      arrival = Arrival::kNewIncarnation;
      if (timer.superseded.size() == kSupersededKept)
        timer.superseded.erase(timer.superseded.begin());
      timer.superseded.push_back(entry.report.incarnation);
      timer.hold_ns = 0;
    }
  }
  entry.report = std::move(report);
  entry.heard_ns = now_ns;
  timer.credited = false;
  entry.broken_ns = kNeverNs;
  entry.presence = Presence::kConnected;
  // A place that is already in the list and early is left: Advance looks again when it comes up.
  if (arrival != Arrival::kAgain) Schedule(entry.report.worker, NextChangeNs(entry, timer));
  return arrival;
}

void Roster::Broken(int64_t now_ns, const WorkerId& worker, uint64_t incarnation) {
  const auto found = entries_.find(worker);
  if (found == entries_.end() || found->second.report.incarnation != incarnation) return;
  RosterEntry& entry = found->second;
  if (entry.broken_ns != kNeverNs) return;
  entry.broken_ns = now_ns;
  if (entry.presence != Presence::kGone) entry.presence = Presence::kDisconnected;
  Schedule(worker, NextChangeNs(entry, timers_[worker]));
}

// Deadlines only move away, so that those in the list are early, which they may be.
void Roster::Stalled(int64_t duration_ns) {
  for (auto& [worker, entry] : entries_) {
    const int64_t credit_ns = Credit(worker, duration_ns);
    entry.heard_ns = Later(entry.heard_ns, credit_ns);
    entry.broken_ns = Later(entry.broken_ns, credit_ns);
    Timer& timer = timers_.at(worker);
    timer.hold_ns = Later(timer.hold_ns, credit_ns);
    timer.credited = true;
  }
}

int64_t Roster::Credit(const WorkerId& worker, int64_t duration_ns) const {
  const auto timer = timers_.find(worker);
  return timer == timers_.end() || timer->second.credited ? 0 : duration_ns;
}

bool Roster::Drain(const WorkerId& worker, bool draining) {
  const auto found = entries_.find(worker);
  if (found == entries_.end()) return false;
  found->second.drained_by_people = draining;
  return true;
}

std::vector<WorkerId> Roster::Advance(int64_t now_ns) {
  std::vector<WorkerId> changed;
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_ns) {
    const WorkerId worker = deadlines_.begin()->second;
    RosterEntry& entry = entries_.at(worker);
    const Timer& timer = timers_.at(worker);
    const Presence presence = PresenceAt(now_ns, entry, timer);
    if (presence != entry.presence) changed.push_back(worker);
    entry.presence = presence;
    const int64_t next_ns = NextChangeNs(entry, timer);
    if (next_ns > now_ns) {
      Schedule(worker, next_ns);
    } else {
      changed.push_back(worker);
      Forget(worker);
    }
  }
  std::sort(changed.begin(), changed.end());
  changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
  return changed;
}

int64_t Roster::NextDeadlineNs() const {
  return deadlines_.empty() ? kNeverNs : deadlines_.begin()->first;
}

bool Roster::IsSuperseded(const WorkerId& worker, uint64_t incarnation) const {
  const auto timer = timers_.find(worker);
  if (timer == timers_.end()) return false;
  const std::vector<uint64_t>& old = timer->second.superseded;
  return std::find(old.begin(), old.end(), incarnation) != old.end();
}

const RosterEntry* Roster::Find(const WorkerId& worker) const {
  const auto found = entries_.find(worker);
  return found == entries_.end() ? nullptr : &found->second;
}

int64_t Roster::ExpiryNs(const RosterEntry& entry, const Timer& timer) const {
  const int64_t silent_ns = Later(entry.heard_ns, options_.lease_ns);
  const int64_t broken_ns = Later(entry.broken_ns, options_.reconnect_ns);
  return std::max(timer.hold_ns, std::min(silent_ns, broken_ns));
}

Presence Roster::PresenceAt(int64_t now_ns, const RosterEntry& entry, const Timer& timer) const {
  if (now_ns >= ExpiryNs(entry, timer)) return Presence::kGone;
  if (entry.broken_ns != kNeverNs) return Presence::kDisconnected;
  if (now_ns >= Later(entry.heard_ns, options_.lost_after_ns)) return Presence::kSilent;
  return Presence::kConnected;
}

// A worker that people drained is never forgotten: their wish must hold when it returns.
int64_t Roster::NextChangeNs(const RosterEntry& entry, const Timer& timer) const {
  const int64_t expiry_ns = ExpiryNs(entry, timer);
  switch (entry.presence) {
    case Presence::kConnected:
      return std::min(expiry_ns, Later(entry.heard_ns, options_.lost_after_ns));
    case Presence::kSilent:
    case Presence::kDisconnected:
      return expiry_ns;
    case Presence::kGone:
      return entry.drained_by_people ? kNeverNs : Later(expiry_ns, options_.forget_after_ns);
  }
  return kNeverNs;
}

void Roster::Schedule(const WorkerId& worker, int64_t due_ns) {
  Timer& timer = timers_.at(worker);
  deadlines_.erase({timer.due_ns, worker});
  timer.due_ns = due_ns;
  if (due_ns != kNeverNs) deadlines_.insert({due_ns, worker});
}

void Roster::Forget(const WorkerId& worker) {
  deadlines_.erase({timers_.at(worker).due_ns, worker});
  timers_.erase(worker);
  entries_.erase(worker);
}

}  // namespace kvsweep
