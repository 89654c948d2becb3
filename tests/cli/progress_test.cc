#include "cli/progress.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "base/file.h"

namespace kvsweep {
namespace {

WatchEvent Event(uint64_t rounds, uint64_t done) {
  WatchEvent event;
  event.set_rounds(rounds);
  event.set_rounds_done(done);
  event.set_eta_ns(-1);
  return event;
}

TEST(ProgressLine, SaysWhatRunsAndHowLong) {
  WatchEvent event = Event(12, 3);
  event.set_rounds_served(2);
  event.set_rounds_failed(1);
  event.set_eta_ns(200 * kNsPerSecond - 1);
  RunningTrial& trial = *event.add_running();
  trial.set_trial("h2o-20 rate=4/s");
  trial.set_phase("measure");
  trial.set_done(12);
  trial.set_total(24);
  event.add_running();
  EXPECT_EQ(ProgressLine(event),
            "6/12 rounds (2 from the store, 1 failed), about 3 min 20 s left; h2o-20 rate=4/s: "
            "measure 12/24 (+1 more)");
}

TEST(ProgressLine, CountsCancelledRoundsApart) {
  WatchEvent event = Event(4, 1);
  event.set_rounds_failed(3);
  event.set_finished(true);
  EXPECT_EQ(ProgressLine(event), "4/4 rounds (3 failed)");
  EXPECT_EQ(ProgressLine(event, 2), "4/4 rounds (1 failed, 2 cancelled)");
  EXPECT_EQ(ProgressLine(event, 3), "4/4 rounds (3 cancelled)");
}

TEST(ProgressLine, LeavesOutTheCellThatIsNone) {
  WatchEvent event = Event(1, 0);
  event.add_running()->set_trial("paged -");
  EXPECT_EQ(ProgressLine(event), "0/1 rounds; paged");
}

TEST(ProgressLine, SaysWhyNothingRuns) {
  WatchEvent event = Event(4, 0);
  event.set_waiting_for("no worker has model X");
  EXPECT_EQ(ProgressLine(event), "0/4 rounds; waiting: no worker has model X");
  event.set_rounds_done(4);
  event.set_finished(true);
  EXPECT_EQ(ProgressLine(event), "4/4 rounds");
}

// Into a file: a line at once, then one for rounds that ended, but not for every event.
TEST(ProgressDisplay, WritesPlainLinesNowAndThen) {
  const TempDir folder;
  const std::string path = folder.Join("log");
  std::FILE* file = std::fopen(path.c_str(), "w");
  ASSERT_NE(file, nullptr);
  SimulatedClock clock(1);
  {
    ProgressDisplay display(file, clock);
    display.Show(Event(9, 0));
    display.Show(Event(9, 1));  // too soon
    display.Say("a failure");
    clock.AdvanceNs(6 * kNsPerSecond);
    display.Show(Event(9, 2));
    clock.AdvanceNs(6 * kNsPerSecond);
    display.Show(Event(9, 2));  // nothing new
    clock.AdvanceNs(30 * kNsPerSecond);
    display.Show(Event(9, 2));  // still there
  }
  std::fclose(file);
  const auto text = ReadFile(path, 1 << 20);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(*text, "0/9 rounds\na failure\n2/9 rounds\n2/9 rounds\n");
}

}  // namespace
}  // namespace kvsweep
