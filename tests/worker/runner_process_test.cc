#include "worker/runner_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/file.h"

namespace kvsweep {
namespace {

// Collects what a runner does; tests wait for it to have happened, for as long as it takes.
class Observer {
 public:
  RunnerEvents Events() {
    return {.on_frame =
                [this](FromRunner frame) { Note([&] { frames_.push_back(std::move(frame)); }); },
            .on_malformed = [this](absl::Status status) { Note([&] { malformed_ = status; }); },
            .on_log = [this](absl::string_view line) { Note([&] { lines_.emplace_back(line); }); },
            .on_exit = [this](RunnerExit exit) { Note([&] { exit_ = std::move(exit); }); }};
  }

  RunnerExit WaitForExit() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return exit_.has_value(); });
    return *exit_;
  }
  FromRunner WaitForFrame(size_t index) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return frames_.size() > index || exit_.has_value(); });
    KVSWEEP_CHECK(frames_.size() > index) << "it ended before frame " << index;
    return frames_[index];
  }
  absl::Status WaitForMalformed() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !malformed_.ok() || exit_.has_value(); });
    return malformed_;
  }
  size_t frame_count() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return frames_.size();
  }
  std::vector<std::string> lines() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return lines_;
  }

 private:
  template <typename Change>
  void Note(const Change& change) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      KVSWEEP_CHECK(!exit_.has_value()) << "something after the end";
      change();
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<FromRunner> frames_;
  std::vector<std::string> lines_;
  absl::Status malformed_;
  std::optional<RunnerExit> exit_;
};

RunnerCommand FakeRunner(std::vector<std::string> environment = {}) {
  return {.path = absl::StrCat(KVSWEEP_BIN_DIR, "/fake_runner"),
          .environment = std::move(environment)};
}

ToRunner Trial(uint64_t id, const std::string& arm, uint32_t execution = 1) {
  ToRunner frame;
  frame.mutable_run()->set_trial_id(id);
  frame.mutable_run()->set_execution(execution);
  frame.mutable_run()->mutable_spec()->mutable_arm()->set_name(arm);
  return frame;
}

bool Exists(pid_t pid) { return kill(pid, 0) == 0; }

// A killed orphan is there until the system's first process has taken its status: wait for its
// memory to go instead.
bool IsDead(pid_t pid) {
  const absl::StatusOr<std::string> status = ReadFile(absl::StrCat("/proc/", pid, "/stat"), 4096);
  return !status.ok() || absl::StrContains(*status, ") Z ") || absl::StrContains(*status, ") X ");
}

TEST(RunnerProcessTest, RunsATrialFromHelloToDone) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner(), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_EQ(observer.WaitForFrame(0).hello().device(), "fake");
  ASSERT_TRUE((*process)->Send(Trial(11, "rows-2")).ok());
  EXPECT_EQ(observer.WaitForFrame(1).progress().phase(), "measure");
  EXPECT_EQ(observer.WaitForFrame(2).records().records(0).request().index(), 0u);
  EXPECT_EQ(observer.WaitForFrame(3).records().records(0).request().index(), 1u);
  EXPECT_EQ(observer.WaitForFrame(4).records().records(0).outcome().outcome(), OUTCOME_OK);
  EXPECT_EQ(observer.WaitForFrame(5).done().trial_id(), 11u);

  // Asked to stop, it ends by itself.
  process->reset();
  const RunnerExit exit = observer.WaitForExit();
  EXPECT_EQ(exit.signal, 0);
  EXPECT_EQ(exit.exit_code, 0);
}

TEST(RunnerProcessTest, TellsHowItDiedAndWhatItWroteLast) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner(), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->Send(Trial(11, "die", 2)).ok());
  const RunnerExit exit = observer.WaitForExit();
  EXPECT_EQ(exit.signal, SIGKILL);
  EXPECT_EQ(exit.log_tail, "about to die in execution 2\n");
  EXPECT_EQ(observer.lines(), (std::vector<std::string>{"about to die in execution 2"}));
  // Hello, progress and the row it sent before: nothing that it said is lost.
  EXPECT_EQ(observer.frame_count(), 3u);
  (*process)->Kill();  // after its end: no effect
  EXPECT_FALSE((*process)->Send(Trial(12, "rows-1")).ok());
}

TEST(RunnerProcessTest, TellsTheExitCode) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner({"KVSWEEP_FAKE_START=exit"}), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  const RunnerExit exit = observer.WaitForExit();
  EXPECT_EQ(exit.signal, 0);
  EXPECT_EQ(exit.exit_code, 9);
  EXPECT_EQ(exit.log_tail, "no device\n");
}

TEST(RunnerProcessTest, KillsOneThatHangs) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner(), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->Send(Trial(11, "hang")).ok());
  observer.WaitForFrame(1);
  (*process)->Kill();
  EXPECT_EQ(observer.WaitForExit().signal, SIGKILL);
}

TEST(RunnerProcessTest, TakesItsChildrenAlong) {
  const TempDir folder;
  const std::string note = folder.Join("child");
  Observer observer;
  auto process =
      RunnerProcess::Start(FakeRunner({"KVSWEEP_FAKE_CHILD=" + note}), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->Send(Trial(11, "child")).ok());
  EXPECT_EQ(observer.WaitForExit().signal, SIGKILL);
  int child = 0;
  ASSERT_TRUE(absl::SimpleAtoi(ReadFile(note, 100).value(), &child));
  RealClock& clock = RealClock::Get();
  while (Exists(child) && !IsDead(child)) clock.SleepUntilNs(clock.NowNs() + kNsPerMs);
}

TEST(RunnerProcessTest, AFloodDoesNotKeepItFromBeingStopped) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner(), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->Send(Trial(11, "flood")).ok());
  observer.WaitForFrame(200);
  process->reset();
  observer.WaitForExit();
}

TEST(RunnerProcessTest, AFrameBeyondTheLimitIsReportedOnce) {
  Observer observer;
  auto process = RunnerProcess::Start(FakeRunner(), observer.Events());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->Send(Trial(11, "garbage")).ok());
  EXPECT_EQ(observer.WaitForMalformed().code(), absl::StatusCode::kInvalidArgument);
  (*process)->Kill();
  EXPECT_EQ(observer.WaitForExit().signal, SIGKILL);
}

TEST(RunnerProcessTest, AProgramThatIsNotThereIsNamed) {
  Observer observer;
  const auto process = RunnerProcess::Start({.path = "/nowhere/runner"}, observer.Events());
  EXPECT_EQ(process.status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(absl::StartsWith(process.status().message(), "/nowhere/runner: cannot start"))
      << process.status();
}

}  // namespace
}  // namespace kvsweep
