// kvsweep-runner as the worker sees it: a child at the other end of a socket.

#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "experiments/matrix.h"
#include "experiments/spec.h"
#include "worker/runner_process.h"

namespace kvsweep {
namespace {

constexpr char kSpec[] = R"(
schema_version: 1
name: test
model: {path: experiments/models/stories260K}
load:
  arrivals: {process: burst, requests: 8, seed: 7}
  lengths: {input: 40, output: 60, max_total: 200}
kv: {device_bytes: 4MiB, dtype: f32}
engine: {time: modelled, device_profile: laptop}
arms: [{name: paged, strategy: paged}]
repeats: 1
)";

class RunnerMainTest : public testing::Test {
 protected:
  void Start() {
    RunnerEvents events;
    events.on_frame = [this](FromRunner frame) {
      const std::lock_guard<std::mutex> lock(mutex_);
      frames_.push_back(std::move(frame));
      changed_.notify_all();
    };
    events.on_malformed = [](const absl::Status& status) { ADD_FAILURE() << status; };
    events.on_log = [](absl::string_view) {};
    events.on_exit = [this](const RunnerExit&) {
      const std::lock_guard<std::mutex> lock(mutex_);
      exited_ = true;
      changed_.notify_all();
    };
    auto runner = RunnerProcess::Start(
        {.path = KVSWEEP_BIN_DIR "/kvsweep-runner", .arguments = {"--threads", "1"}}, events);
    ASSERT_TRUE(runner.ok()) << runner.status();
    runner_ = *std::move(runner);
    Await([this] { return !frames_.empty() && frames_[0].has_hello(); });
  }

  // Waits until the frames so far satisfy `condition`; CTest's timeout bounds it.
  void Await(const std::function<bool()>& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return condition() || exited_; });
    ASSERT_TRUE(condition()) << "the runner ended";
  }

  static ToRunner Run(uint64_t trial_id, uint32_t requests) {
    const Experiment experiment = *ParseExperiment(kSpec, "test", {});
    TrialSpec spec = Matrix::Create(experiment, {})->LoadTrial(0, 0, 0);
    spec.mutable_load()->mutable_arrivals()->set_requests(requests);
    ToRunner frame;
    frame.mutable_run()->set_trial_id(trial_id);
    frame.mutable_run()->set_execution(1);
    frame.mutable_run()->set_model_path("experiments/models/stories260K");
    *frame.mutable_run()->mutable_spec() = spec;
    return frame;
  }

  bool IsDone(uint64_t trial_id) const {
    for (const FromRunner& frame : frames_) {
      if (frame.has_done() && frame.done().trial_id() == trial_id) return true;
    }
    return false;
  }

  std::vector<Record> Records(uint64_t trial_id) const {
    std::vector<Record> records;
    for (const FromRunner& frame : frames_) {
      for (const Record& record : frame.records().records()) {
        if (record.trial_id() == trial_id) records.push_back(record);
      }
    }
    return records;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<FromRunner> frames_;
  bool exited_ = false;
  std::unique_ptr<RunnerProcess> runner_;  // last: its thread uses the others
};

TEST_F(RunnerMainTest, ServesTrialAfterTrialAndCancels) {
  Start();
  ASSERT_TRUE(runner_->Send(Run(1, 8)).ok());
  Await([this] { return IsDone(1); });
  ASSERT_TRUE(runner_->Send(Run(2, 8)).ok());
  Await([this] { return IsDone(2); });
  for (const uint64_t trial : {1, 2}) {
    const std::vector<Record> records = Records(trial);
    ASSERT_FALSE(records.empty());
    EXPECT_TRUE(records.front().has_start());
    EXPECT_EQ(records.back().outcome().outcome(), OUTCOME_OK) << records.back().DebugString();
  }
  // So many requests that it would take minutes.
  ASSERT_TRUE(runner_->Send(Run(3, 100'000)).ok());
  Await([this] {
    for (const FromRunner& frame : frames_) {
      if (frame.progress().trial_id() == 3 && frame.progress().phase() == "measure") return true;
    }
    return false;
  });
  ToRunner cancel;
  cancel.mutable_cancel()->set_trial_id(3);
  ASSERT_TRUE(runner_->Send(cancel).ok());
  Await([this] { return IsDone(3); });
  EXPECT_EQ(Records(3).back().outcome().outcome(), OUTCOME_CANCELLED);

  // A round that was taken away comes back: the cancellation was not for this execution.
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    frames_.clear();
  }
  ASSERT_TRUE(runner_->Send(Run(3, 8)).ok());
  Await([this] { return IsDone(3); });
  EXPECT_EQ(Records(3).back().outcome().outcome(), OUTCOME_OK);
}

TEST_F(RunnerMainTest, EndsWhenItIsToldTo) {
  Start();
  ToRunner shutdown;
  shutdown.mutable_shutdown();
  ASSERT_TRUE(runner_->Send(shutdown).ok());
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return exited_; });
}

}  // namespace
}  // namespace kvsweep
