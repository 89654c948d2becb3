#ifndef KVSWEEP_BASE_CLOCK_H_
#define KVSWEEP_BASE_CLOCK_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>

// The only door to time and to sleeping. Everything that needs an instant takes it as an argument
// (planners) or is handed a Clock (executors), so that tests and modelled trials run at their own
// pace.
//
// Two times exist and are never mixed: *monotonic* (NowNs: intervals, leases, latencies; its zero
// means nothing) and *wall* (UnixNs: what is shown to people and stored as a date). Both are int64
// nanoseconds.

namespace kvsweep {

inline constexpr int64_t kNsPerUs = 1'000;
inline constexpr int64_t kNsPerMs = 1'000'000;
inline constexpr int64_t kNsPerSecond = 1'000'000'000;

// A deadline that never comes.
inline constexpr int64_t kNeverNs = std::numeric_limits<int64_t>::max();

// All functions may be called from many threads.
class Clock {
 public:
  virtual ~Clock() = default;

  // Monotonic time in ns.
  virtual int64_t NowNs() const = 0;

  // Wall time in ns since 1970-01-01 UTC. May jump.
  virtual int64_t UnixNs() const = 0;

  // Returns when NowNs() >= deadline_ns; at once if it has passed.
  virtual void SleepUntilNs(int64_t deadline_ns) = 0;

  // Waits on `condition` (whose mutex `lock` holds) until it is notified or NowNs() >= deadline_ns
  // (kNeverNs: no deadline). May wake without reason, so call it in a loop that tests the condition
  // and the time itself.
  virtual void WaitUntilNs(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
                           int64_t deadline_ns) = 0;
};

// The machine's clocks.
class RealClock final : public Clock {
 public:
  // The one instance; it has no state.
  static RealClock& Get();

  int64_t NowNs() const override;
  int64_t UnixNs() const override;
  void SleepUntilNs(int64_t deadline_ns) override;
  void WaitUntilNs(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
                   int64_t deadline_ns) override;
};

// A clock that moves only when told. Sleeping *is* telling: SleepUntilNs moves it to the deadline
// and returns at once, which is what makes a modelled trial deterministic and fast. A thread in
// WaitUntilNs does not move it; it waits for another thread to notify the condition or to move the
// clock past the deadline.
class SimulatedClock final : public Clock {
 public:
  // Starts at monotonic `start_ns`; wall time runs in step from `unix_start_ns`.
  explicit SimulatedClock(int64_t start_ns = 0,
                          int64_t unix_start_ns = 1'700'000'000 * kNsPerSecond);

  int64_t NowNs() const override;
  int64_t UnixNs() const override;
  void SleepUntilNs(int64_t deadline_ns) override;
  void WaitUntilNs(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
                   int64_t deadline_ns) override;

  // Moves the clock forward by duration_ns >= 0.
  void AdvanceNs(int64_t duration_ns);

  // Moves the clock to `now_ns` if that lies ahead; otherwise leaves it alone.
  void AdvanceToNs(int64_t now_ns);

 private:
  const int64_t unix_offset_ns_;  // UnixNs() - NowNs()
  std::atomic<int64_t> now_ns_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_CLOCK_H_
