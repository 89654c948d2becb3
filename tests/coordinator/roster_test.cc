#include "coordinator/roster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvsweep {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr int64_t kSecond = kNsPerSecond;

WorkerReport Report(const char* worker, uint64_t incarnation) {
  WorkerReport report;
  report.worker = WorkerId(worker);
  report.incarnation = incarnation;
  return report;
}

TEST(RosterTest, SilenceGoesThroughItsStagesEachToldOnce) {
  const WorkerId w("w");
  Roster roster({.forget_after_ns = 100 * kSecond});
  EXPECT_EQ(roster.Heard(0, Report("w", 1)), Roster::Arrival::kFirst);
  EXPECT_THAT(roster.Advance(3 * kSecond - 1), IsEmpty());
  EXPECT_THAT(roster.Advance(3 * kSecond), ElementsAre(w));
  EXPECT_EQ(roster.Find(w)->presence, Presence::kSilent);
  EXPECT_THAT(roster.Advance(15 * kSecond - 1), IsEmpty());
  EXPECT_THAT(roster.Advance(15 * kSecond), ElementsAre(w));
  EXPECT_EQ(roster.Find(w)->presence, Presence::kGone);
  EXPECT_THAT(roster.Advance(115 * kSecond), ElementsAre(w));
  EXPECT_EQ(roster.Find(w), nullptr);
  EXPECT_EQ(roster.NextDeadlineNs(), kNeverNs);
}

TEST(RosterTest, AStepOverSeveralStagesEndsInTheLast) {
  Roster roster((LeaseOptions()));
  roster.Heard(0, Report("w", 1));
  EXPECT_THAT(roster.Advance(20 * kSecond), ElementsAre(WorkerId("w")));
  EXPECT_EQ(roster.Find(WorkerId("w"))->presence, Presence::kGone);
  EXPECT_EQ(roster.Heard(21 * kSecond, Report("w", 1)), Roster::Arrival::kReturned);
  EXPECT_EQ(roster.Find(WorkerId("w"))->presence, Presence::kConnected);
}

TEST(RosterTest, HeartbeatsKeepAWorkerForEver) {
  Roster roster((LeaseOptions()));
  for (int64_t second = 0; second < 1000; second += 2) {
    roster.Heard(second * kSecond, Report("w", 1));
    ASSERT_THAT(roster.Advance(second * kSecond + kSecond), IsEmpty());
    ASSERT_GT(roster.NextDeadlineNs(), second * kSecond);
  }
}

TEST(RosterTest, OnlyTheCurrentStreamCanBreak) {
  const WorkerId w("w");
  Roster roster((LeaseOptions()));
  roster.Heard(0, Report("w", 1));
  roster.Broken(0, w, 2);
  EXPECT_EQ(roster.Find(w)->presence, Presence::kConnected);
  roster.Broken(kSecond, w, 1);
  EXPECT_EQ(roster.Find(w)->presence, Presence::kDisconnected);
  roster.Broken(2 * kSecond, w, 1);  // said twice: the time of the first counts
  EXPECT_THAT(roster.Advance(3 * kSecond), ElementsAre(w));
  EXPECT_EQ(roster.Find(w)->presence, Presence::kGone);
}

TEST(RosterTest, TimeInWhichNobodyCouldBeHeardCountsForNoLease) {
  const WorkerId silent("silent");
  const WorkerId broken("broken");
  const WorkerId expected("expected");
  Roster roster((LeaseOptions()));
  roster.Heard(0, Report("silent", 1));
  roster.Heard(0, Report("broken", 1));
  roster.Broken(0, broken, 1);
  roster.Expect(0, 15 * kSecond, expected, 1, "machine");
  roster.Advance(kSecond);
  roster.Stalled(60 * kSecond);  // until 61 s
  EXPECT_THAT(roster.Advance(61 * kSecond), IsEmpty());
  EXPECT_THAT(roster.Advance(62 * kSecond), ElementsAre(broken));
  EXPECT_THAT(roster.Advance(63 * kSecond), ElementsAre(silent));
  EXPECT_THAT(roster.Advance(75 * kSecond - 1), IsEmpty());
  EXPECT_THAT(roster.Advance(75 * kSecond), ElementsAre(expected, silent));
  EXPECT_EQ(roster.Find(silent)->presence, Presence::kGone);
}

TEST(RosterTest, ARowOfStallsKeepsNobodyWhoIsNotHeard) {
  const WorkerId dead("dead");
  const WorkerId living("living");
  Roster roster((LeaseOptions()));
  roster.Heard(0, Report("dead", 1));
  int64_t now_ns = 0;
  for (int turn = 0; turn < 20; ++turn) {
    now_ns += 2 * kSecond;
    roster.Stalled(2 * kSecond);
    roster.Heard(now_ns, Report("living", 1));
    roster.Advance(now_ns);
  }
  EXPECT_EQ(roster.Find(dead)->presence, Presence::kGone);
  EXPECT_EQ(roster.Find(living)->presence, Presence::kConnected);
}

TEST(RosterTest, ExpectedWorkersAreHeldForOneLength) {
  const WorkerId w("w");
  Roster roster((LeaseOptions()));
  roster.Expect(kSecond, 16 * kSecond, w, 7, "machine");
  EXPECT_THAT(roster.Advance(16 * kSecond - 1), IsEmpty());
  EXPECT_EQ(roster.Heard(16 * kSecond - 1, Report("w", 7)), Roster::Arrival::kReturned);
  EXPECT_THAT(roster.Advance(16 * kSecond), IsEmpty());
}

TEST(RosterTest, AReplacedIncarnationIsNotListenedTo) {
  Roster roster((LeaseOptions()));
  roster.Heard(0, Report("w", 7));
  EXPECT_EQ(roster.Heard(1, Report("w", 3)), Roster::Arrival::kNewIncarnation);
  EXPECT_EQ(roster.Heard(2, Report("w", 7)), Roster::Arrival::kSuperseded);
  EXPECT_EQ(roster.Find(WorkerId("w"))->report.incarnation, 3u);
}

TEST(RosterTest, AWishOfPeopleOutlivesTheWorker) {
  const WorkerId w("w");
  Roster roster((LeaseOptions()));
  EXPECT_FALSE(roster.Drain(w, true));
  roster.Heard(0, Report("w", 1));
  EXPECT_EQ(roster.Find(w)->IdleReason(), "");
  EXPECT_TRUE(roster.Drain(w, true));
  roster.Advance(10'000 * kSecond);
  roster.Heard(10'000 * kSecond, Report("w", 2));
  EXPECT_EQ(roster.Find(w)->IdleReason(), "draining");
}

}  // namespace
}  // namespace kvsweep
