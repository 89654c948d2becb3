#include "base/clock.h"

#include <gtest/gtest.h>

#include <thread>

namespace kvsweep {
namespace {

TEST(RealClock, NeverStepsBackAndSleepsAtLeastAsLongAsAsked) {
  RealClock& clock = RealClock::Get();
  const int64_t before_ns = clock.NowNs();
  const int64_t deadline_ns = before_ns + 2 * kNsPerMs;
  clock.SleepUntilNs(deadline_ns);
  EXPECT_GE(clock.NowNs(), deadline_ns);
  clock.SleepUntilNs(0);  // long past: returns at once
  EXPECT_GT(clock.UnixNs(), int64_t{1'600'000'000} * kNsPerSecond);
}

// NowNs and the deadline of WaitUntilNs must count from the same zero, or the wait would end at
// once or never.
TEST(RealClock, WaitEndsAtTheDeadlineOfItsOwnTime) {
  RealClock& clock = RealClock::Get();
  std::mutex mutex;
  std::condition_variable condition;
  std::unique_lock<std::mutex> lock(mutex);
  const int64_t deadline_ns = clock.NowNs() + 2 * kNsPerMs;
  while (clock.NowNs() < deadline_ns) clock.WaitUntilNs(condition, lock, deadline_ns);
  EXPECT_GE(clock.NowNs(), deadline_ns);
}

TEST(SimulatedClock, SleepingMovesItAndWallTimeFollows) {
  SimulatedClock clock(5, 1005);
  clock.SleepUntilNs(50);
  EXPECT_EQ(clock.NowNs(), 50);
  EXPECT_EQ(clock.UnixNs(), 1050);
  clock.SleepUntilNs(20);
  EXPECT_EQ(clock.NowNs(), 50);
  clock.AdvanceNs(7);
  EXPECT_EQ(clock.NowNs(), 57);
}

TEST(SimulatedClock, AWaiterLeavesWhenAnotherThreadPassesTheDeadline) {
  SimulatedClock clock;
  std::mutex mutex;
  std::condition_variable condition;
  std::thread waiter([&] {
    std::unique_lock<std::mutex> lock(mutex);
    while (clock.NowNs() < kNsPerSecond) clock.WaitUntilNs(condition, lock, kNsPerSecond);
  });
  clock.AdvanceNs(kNsPerSecond);
  waiter.join();
  EXPECT_EQ(clock.NowNs(), kNsPerSecond);
}

TEST(SimulatedClock, ThreadsThatRaceToAdvanceKeepTheLatest) {
  SimulatedClock clock;
  std::thread other([&] {
    for (int64_t i = 0; i <= 20'000; i += 2) clock.AdvanceToNs(i);
  });
  for (int64_t i = 1; i <= 19'999; i += 2) clock.AdvanceToNs(i);
  other.join();
  EXPECT_EQ(clock.NowNs(), 20'000);
}

}  // namespace
}  // namespace kvsweep
