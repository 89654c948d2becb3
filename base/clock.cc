#include "base/clock.h"

#include <time.h>

#include <cerrno>
#include <chrono>

#include "base/check.h"

namespace kvsweep {
namespace {

int64_t ReadNs(clockid_t id) {
  timespec now;
  KVSWEEP_CHECK(clock_gettime(id, &now) == 0);
  return int64_t{now.tv_sec} * kNsPerSecond + now.tv_nsec;
}

}  // namespace

RealClock& RealClock::Get() {
  static RealClock clock;
  return clock;
}

int64_t RealClock::NowNs() const { return ReadNs(CLOCK_MONOTONIC); }

int64_t RealClock::UnixNs() const { return ReadNs(CLOCK_REALTIME); }

void RealClock::SleepUntilNs(int64_t deadline_ns) {
  const timespec deadline = {.tv_sec = static_cast<time_t>(deadline_ns / kNsPerSecond),
                             .tv_nsec = static_cast<long>(deadline_ns % kNsPerSecond)};
  if (deadline_ns <= NowNs()) return;
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, nullptr) == EINTR) {
  }
}

void RealClock::WaitUntilNs(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
                            int64_t deadline_ns) {
  if (deadline_ns == kNeverNs) {
    condition.wait(lock);
    return;
  }
  // steady_clock counts from the same zero as CLOCK_MONOTONIC.
  condition.wait_until(
      lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(deadline_ns)));
}

SimulatedClock::SimulatedClock(int64_t start_ns, int64_t unix_start_ns)
    : unix_offset_ns_(unix_start_ns - start_ns), now_ns_(start_ns) {}

int64_t SimulatedClock::NowNs() const { return now_ns_.load(); }

int64_t SimulatedClock::UnixNs() const { return NowNs() + unix_offset_ns_; }

void SimulatedClock::SleepUntilNs(int64_t deadline_ns) { AdvanceToNs(deadline_ns); }

void SimulatedClock::WaitUntilNs(std::condition_variable& condition,
                                 std::unique_lock<std::mutex>& lock, int64_t deadline_ns) {
  // Short real waits instead of a list of waiters: Advance needs no lock and cannot miss a waiter.
  if (NowNs() < deadline_ns) condition.wait_for(lock, std::chrono::milliseconds(1));
}

void SimulatedClock::AdvanceNs(int64_t duration_ns) {
  KVSWEEP_CHECK_GE(duration_ns, 0);
  now_ns_.fetch_add(duration_ns);
}

void SimulatedClock::AdvanceToNs(int64_t now_ns) {
  int64_t seen = now_ns_.load();
  while (seen < now_ns && !now_ns_.compare_exchange_weak(seen, now_ns)) {
  }
}

}  // namespace kvsweep
