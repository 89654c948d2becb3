// The commands that talk to a coordinator, with the real coordinator and worker beside them.

#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/file.h"
#include "tests/cli/process.h"

namespace kvsweep {
namespace {

constexpr char kSpec[] = "tests/cli/tiny.yaml";

class RemoteTest : public testing::Test {
 protected:
  RemoteTest()
      : address_(absl::StrCat("unix:", folder_.Join("socket"))),
        coordinator_("kvsweep-coordinator",
                     {"--store", folder_.Join("store.db"), "--listen", address_}) {
    // Its first line says that it listens.
    while (!absl::StrContains(coordinator_.Out(), "\n")) Pause();
  }

  static void Pause() { RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + 10 * kNsPerMs); }

  ProcessResult Ask(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--coordinator", address_});
    return RunProgram("kvsweep", arguments);
  }

  TempDir folder_;
  const std::string address_;
  Process coordinator_;
};

TEST_F(RemoteTest, SubmitsWatchesAndCompares) {
  const std::vector<std::string> submit = {"submit", kSpec, "-S", "repeats=2"};
  const ProcessResult submitted = Ask(submit);
  ASSERT_EQ(submitted.exit_code, 0) << submitted.err;
  const std::string id(absl::StripAsciiWhitespace(submitted.out));
  EXPECT_EQ(Ask(submit).out, submitted.out) << "submitting again is the same experiment";

  Process worker("kvsweep-worker", {"--coordinator", address_, "--cache", folder_.Join("cache"),
                                    "--id", "box", "--threads", "1"});
  const ProcessResult watched = Ask({"watch", id});
  EXPECT_EQ(watched.exit_code, 0) << watched.err;
  EXPECT_TRUE(absl::StrContains(watched.out, "4 of 4 rounds: 4 measured")) << watched.out;

  const ProcessResult compared = Ask({"compare", id, "--output", "json"});
  EXPECT_EQ(compared.exit_code, 0) << compared.err;
  EXPECT_TRUE(nlohmann::json::accept(compared.out)) << compared.out;
  const ProcessResult workers = Ask({"workers"});
  EXPECT_EQ(workers.exit_code, 0) << workers.err;
  EXPECT_TRUE(absl::StrContains(workers.out, "box")) << workers.out;

  // A row limit is told over the wire.
  const ProcessResult cut =
      Ask({"query", "--sql", "SELECT trial_id FROM v_trials", "--limit", "3"});
  EXPECT_TRUE(absl::StrContains(cut.err, "cut after 3 rows")) << cut.err;

  // The store answers what is asked under another name, without the worker.
  worker.Signal(SIGTERM);
  worker.Wait();
  ASSERT_EQ(Ask({"submit", kSpec, "-S", "repeats=2", "-S", "name=again", "--reuse", "same-method"})
                .exit_code,
            0);
  const ProcessResult again = Ask({"watch", "again"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_TRUE(absl::StrContains(again.out, "4 from the store")) << again.out;
}

TEST_F(RemoteTest, CancelledIsAFailedExperiment) {
  ASSERT_EQ(Ask({"submit", kSpec}).exit_code, 0);
  const ProcessResult cancelled = Ask({"cancel", "tiny"});
  EXPECT_EQ(cancelled.exit_code, 0) << cancelled.err;
  EXPECT_TRUE(absl::StrContains(cancelled.out, "4 rounds cancelled")) << cancelled.out;
  const ProcessResult watched = Ask({"watch", "tiny"});
  EXPECT_EQ(watched.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(watched.err, "4/4 rounds (4 cancelled)")) << watched.err;
  EXPECT_EQ(Ask({"cancel", "unheard-of"}).exit_code, 2);

  // Submitting it again is another try.
  const ProcessResult again = Ask({"submit", kSpec});
  EXPECT_EQ(again.out, "2\n") << again.err;
}

TEST_F(RemoteTest, CtrlCEndsTheWatchingAlone) {
  ASSERT_EQ(Ask({"submit", kSpec}).exit_code, 0);
  Process watch("kvsweep", {"watch", "--coordinator", address_});
  Pause();
  watch.Signal(SIGINT);
  EXPECT_EQ(watch.Wait().exit_code, 130);
  EXPECT_TRUE(absl::StrContains(Ask({"list"}).out, "queued"));
}

TEST(WrongStart, IsRefusedAsUsage) {
  const TempDir folder;
  for (const char* program : {"kvsweep-coordinator", "kvsweep-worker"}) {
    EXPECT_EQ(RunProgram(program, {"--help"}).exit_code, 0) << program;
    EXPECT_EQ(RunProgram(program, {"--no-such-flag"}).exit_code, 2) << program;
    EXPECT_EQ(RunProgram(program, {"--log-level", "loud"}).exit_code, 2) << program;
  }
  const ProcessResult models = RunProgram("kvsweep-worker", {"--models", folder.Join("none")});
  EXPECT_EQ(models.exit_code, 2);
  EXPECT_TRUE(absl::StrContains(models.err, folder.Join("none") + ": no such folder"))
      << models.err;
  const ProcessResult slot = RunProgram(
      "kvsweep-worker", {"--coordinator", absl::StrCat("unix:", folder.Join("nobody")), "--cache",
                         folder.Join("cache"), "--runner",
                         absl::StrCat(KVSWEEP_BIN_DIR, "/kvsweep-runner"), "--slot", "--foo 3"});
  EXPECT_EQ(slot.exit_code, 2);
  EXPECT_TRUE(absl::StrContains(slot.err, "does not take its arguments")) << slot.err;
}

TEST(TakenPort, IsSaidOnceAndLeavesNoStoreBehind) {
  const TempDir folder;
  const Process first("kvsweep-coordinator",
                      {"--store", folder.Join("first.db"), "--listen", "127.0.0.1:0"});
  while (!absl::StrContains(first.Out(), "\n")) {
    RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + 10 * kNsPerMs);
  }
  const std::string address(absl::StripAsciiWhitespace(first.Out()));
  const std::string store = folder.Join("second.db");
  const ProcessResult second =
      RunProgram("kvsweep-coordinator", {"--store", store, "--listen", address});
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_EQ(second.err, absl::StrCat("kvsweep-coordinator: cannot listen on ", address,
                                     ": is another coordinator running?\n"));
  EXPECT_FALSE(std::filesystem::exists(store));
}

TEST(NoCoordinator, IsSaid) {
  const TempDir folder;
  const ProcessResult result = RunProgram(
      "kvsweep", {"list", "--coordinator", absl::StrCat("unix:", folder.Join("nobody"))});
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_TRUE(absl::StrContains(result.err, "no coordinator answers")) << result.err;
}

}  // namespace
}  // namespace kvsweep
