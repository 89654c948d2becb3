#include "worker/daemon.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/file.h"
#include "experiments/files.h"
#include "proto/worker.grpc.pb.h"

namespace kvsweep {
namespace {

constexpr uint64_t kAttempt = 7;

// A coordinator with one round to give to each of its worker's slots, which can be told to lose
// things.
class FakeCoordinator final : public WorkerService::Service {
 public:
  grpc::Status Synchronize(grpc::ServerContext*,
                           grpc::ServerReaderWriter<DesiredState, WorkerState>* stream) override {
    WorkerState state;
    while (stream->Read(&state)) {
      DesiredState desired;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (superseded_) return {grpc::StatusCode::FAILED_PRECONDITION, "started again elsewhere"};
        state_ = state;
        incarnations_.insert(state.incarnation());
        desired.set_generation(state.generation());
        desired.set_next_after_ns(20 * kNsPerMs);
        for (const SlotState& slot : state.slots()) AddDesire(slot, &desired);
        changed_.notify_all();
      }
      if (!stream->Write(desired)) break;
    }
    return grpc::Status::OK;
  }

  grpc::Status Report(grpc::ServerContext*,
                      grpc::ServerReaderWriter<ReportReply, ReportBatch>* stream) override {
    ReportBatch batch;
    while (stream->Read(&batch)) {
      ReportReply reply;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        reply.set_attempt(batch.attempt());
        if (!Store(batch)) return {grpc::StatusCode::INTERNAL, "a gap or an unequal repeat"};
        reply.set_acknowledged_through(rows_.size());
        changed_.notify_all();
        if (lose_replies_ > 0) {
          --lose_replies_;
          return {grpc::StatusCode::UNAVAILABLE, "the reply is lost"};
        }
      }
      if (!stream->Write(reply)) break;
    }
    return grpc::Status::OK;
  }

  grpc::Status FetchFile(grpc::ServerContext*, const FetchFileRequest* request,
                         grpc::ServerWriter<FileChunk>* writer) override {
    std::string content;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++fetches_;
      const auto found = files_.find(request->digest());
      if (found == files_.end()) return {grpc::StatusCode::NOT_FOUND, "no such file"};
      content = found->second;
    }
    for (size_t offset = 0; offset < content.size(); offset += 3) {
      FileChunk chunk;
      chunk.set_offset(offset);
      chunk.set_total_bytes(content.size());
      chunk.set_data(content.substr(offset, 3));
      writer->Write(chunk);
    }
    return grpc::Status::OK;
  }

  // ---- what the test sets and reads ----

  FileReference AddFile(const std::string& path, const std::string& content) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Digest digest = Sha256(content);
    FileReference file;
    file.set_path(path);
    file.set_digest(std::string(digest.bytes()));
    file.set_bytes(content.size());
    files_[file.digest()] = content;
    return file;
  }
  void Give(const RoundSpec& round) {
    const std::lock_guard<std::mutex> lock(mutex_);
    round_ = round;
    has_round_ = true;
  }
  void Abandon() {
    const std::lock_guard<std::mutex> lock(mutex_);
    abandon_ = true;
  }
  void LoseReplies(int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lose_replies_ = count;
  }
  void Supersede() {
    const std::lock_guard<std::mutex> lock(mutex_);
    superseded_ = true;
  }

  // Waits until the worker's last state is as wished.
  template <typename Condition>
  WorkerState WaitFor(const Condition& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return state_.slots_size() > 0 && condition(state_); });
    return state_;
  }
  // Waits until the round is over and forgotten; its rows.
  std::vector<Record> WaitForRows() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] {
      return settled_ && state_.slots_size() > 0 && !state_.slots(0).has_holding();
    });
    std::vector<Record> records;
    for (const std::string& row : rows_) {
      KVSWEEP_CHECK(records.emplace_back().ParseFromString(row));
    }
    return records;
  }
  std::string failure() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failure_;
  }
  size_t incarnations() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return incarnations_.size();
  }
  int fetches() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return fetches_;
  }
  std::vector<std::string> raw_rows() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return rows_;
  }

 private:
  void AddDesire(const SlotState& slot, DesiredState* desired) {
    const bool idle = !slot.has_holding();
    if (idle && (!has_round_ || settled_ || slot.devices_size() == 0)) return;
    SlotDesire& desire = *desired->add_slots();
    desire.set_index(slot.index());
    desire.set_attempt(kAttempt);
    const Holding::Phase phase = slot.holding().phase();
    if (!idle &&
        (finished_ || phase == Holding::PHASE_FAILED || phase == Holding::PHASE_ABANDONED)) {
      failure_ = slot.holding().reason();
      desire.set_settled(true);
      settled_ = true;
    } else if (abandon_) {
      desire.set_abandon(true);
    } else {
      desire.set_run(round_.SerializeAsString());
    }
  }

  bool Store(const ReportBatch& batch) {
    if (batch.attempt() != kAttempt || batch.first_sequence() > rows_.size() + 1) return false;
    for (int i = 0; i < batch.records_size(); ++i) {
      const size_t index = batch.first_sequence() - 1 + i;
      if (index == rows_.size()) rows_.push_back(batch.records(i));
      if (rows_[index] != batch.records(i)) return false;
    }
    Record last;
    finished_ = last.ParseFromString(rows_.back()) && last.has_finish();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  WorkerState state_;
  std::set<uint64_t> incarnations_;
  RoundSpec round_;
  bool has_round_ = false;
  bool abandon_ = false;
  bool superseded_ = false;
  bool finished_ = false;
  bool settled_ = false;
  std::string failure_;
  int lose_replies_ = 0;
  int fetches_ = 0;
  std::vector<std::string> rows_;             // [sequence - 1]
  std::map<std::string, std::string> files_;  // by digest
};

RoundSpec RoundOf(const std::vector<std::string>& arms) {
  RoundSpec round;
  uint64_t id = 11;
  for (const std::string& arm : arms) {
    PlannedTrial& trial = *round.add_trials();
    trial.set_trial_id(id++);
    trial.mutable_spec()->mutable_arm()->set_name(arm);
  }
  return round;
}

class DaemonTest : public testing::Test {
 protected:
  void SetUp() override { Serve(); }
  void TearDown() override {
    worker_.reset();  // before the coordinator: its streams end with it
    server_->Shutdown();
  }

  void Serve() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address_, grpc::InsecureServerCredentials());
    builder.RegisterService(&coordinator_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }

  WorkerOptions Options() const {
    WorkerOptions options;
    options.worker_id = "worker";
    options.machine = "machine";
    options.runners = {{.path = absl::StrCat(KVSWEEP_BIN_DIR, "/fake_runner")}};
    options.cache_folder = folder_.Join("cache");
    options.session.restart_backoff_ns = kNsPerMs;
    options.session.cancel_grace_ns = 200 * kNsPerMs;
    options.session.trial_grace_ns = 100 * kNsPerMs;
    return options;
  }
  void Start(const WorkerOptions& options) {
    auto channel = DialCoordinator(address_);
    ASSERT_TRUE(channel.ok()) << channel.status();
    auto worker = Worker::Start(options, *std::move(channel), RealClock::Get());
    ASSERT_TRUE(worker.ok()) << worker.status();
    worker_ = *std::move(worker);
  }

  // Rows of a round, as "row 11", "outcome 11 ok", …; checks the finish record by recomputing it.
  std::vector<std::string> RowsOf(const std::vector<Record>& records) {
    const std::vector<std::string> raw = coordinator_.raw_rows();
    std::vector<std::string> rows;
    std::vector<std::string> kept;
    size_t trial_start = 0;
    for (size_t i = 0; i < records.size(); ++i) {
      const Record& record = records[i];
      const uint64_t trial = record.trial_id();
      if (record.has_finish()) {
        rows.push_back("finish");
        DigestBuilder digest;
        for (const std::string& row : kept) digest.Add(row);
        EXPECT_EQ(record.finish().count(), kept.size());
        EXPECT_EQ(record.finish().digest(), std::string(digest.Finish().bytes()));
        continue;
      }
      if (record.has_discard()) {
        kept.resize(trial_start);
        rows.push_back(absl::StrCat("discard ", trial));
        continue;
      }
      kept.push_back(raw[i]);
      if (record.has_outcome()) {
        trial_start = kept.size();
        rows.push_back(
            absl::StrCat("outcome ", trial, " ", Outcome_Name(record.outcome().outcome())));
      } else {
        rows.push_back(absl::StrCat("row ", trial));
      }
    }
    return rows;
  }

  const TempDir folder_;
  const std::string address_ = "unix:" + folder_.Join("socket");
  FakeCoordinator coordinator_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Worker> worker_;
};

TEST_F(DaemonTest, ARoundRunsFromWishToSettled) {
  coordinator_.Give(RoundOf({"rows-2", "rows-1"}));
  Start(Options());
  EXPECT_EQ(RowsOf(coordinator_.WaitForRows()),
            (std::vector<std::string>{"row 11", "row 11", "outcome 11 OUTCOME_OK", "row 12",
                                      "outcome 12 OUTCOME_OK", "finish"}));
  const WorkerState state = coordinator_.WaitFor([](const WorkerState&) { return true; });
  EXPECT_EQ(state.worker_id(), "worker");
  EXPECT_EQ(state.build(), "fake-build");
  ASSERT_EQ(state.slots(0).devices_size(), 1);
  EXPECT_EQ(state.slots(0).devices(0).device_class(), "fake-cpu");
}

TEST_F(DaemonTest, ATrialWhoseRunnerDiedIsRepeated) {
  coordinator_.Give(RoundOf({"die-once"}));
  Start(Options());
  EXPECT_EQ(RowsOf(coordinator_.WaitForRows()),
            (std::vector<std::string>{"row 11", "discard 11", "row 11", "row 11", "row 11",
                                      "outcome 11 OUTCOME_OK", "finish"}));
}

TEST_F(DaemonTest, TheThirdDeathIsTheOutcomeAndTheRoundGoesOn) {
  coordinator_.Give(RoundOf({"die", "rows-1"}));
  Start(Options());
  const std::vector<Record> records = coordinator_.WaitForRows();
  EXPECT_EQ(RowsOf(records),
            (std::vector<std::string>{"row 11", "discard 11", "row 11", "discard 11", "row 11",
                                      "outcome 11 OUTCOME_CRASHED", "row 12",
                                      "outcome 12 OUTCOME_OK", "finish"}));
  const TrialOutcome& outcome = records[5].outcome();
  EXPECT_EQ(outcome.signal(), 9);
  EXPECT_EQ(outcome.phase(), "measure");
  EXPECT_EQ(outcome.log_tail(), "about to die in execution 3\n");
}

TEST_F(DaemonTest, ARunnerThatHangsIsATimeout) {
  RoundSpec round = RoundOf({"hang", "rows-1"});
  round.mutable_trials(0)->mutable_spec()->mutable_limits()->set_trial(50 * kNsPerMs);
  round.mutable_trials(0)->mutable_spec()->mutable_limits()->set_prepare(50 * kNsPerMs);
  coordinator_.Give(round);
  Start(Options());
  EXPECT_EQ(RowsOf(coordinator_.WaitForRows()),
            (std::vector<std::string>{"outcome 11 OUTCOME_TIMEOUT", "row 12",
                                      "outcome 12 OUTCOME_OK", "finish"}));
}

TEST_F(DaemonTest, WhatARunnerMayNotSendCostsItsTrial) {
  coordinator_.Give(RoundOf({"garbage", "wrong-trial"}));
  Start(Options());
  const std::vector<std::string> rows = RowsOf(coordinator_.WaitForRows());
  EXPECT_EQ(rows, (std::vector<std::string>{"discard 11", "discard 11",
                                            "outcome 11 OUTCOME_CRASHED", "discard 12",
                                            "discard 12", "outcome 12 OUTCOME_CRASHED", "finish"}));
}

TEST_F(DaemonTest, LostRepliesAreMadeUpForByResending) {
  coordinator_.Give(RoundOf({"slow-30", "rows-600"}));
  coordinator_.LoseReplies(4);
  Start(Options());
  EXPECT_EQ(RowsOf(coordinator_.WaitForRows()).size(), 30u + 1 + 600 + 1 + 1);
}

TEST_F(DaemonTest, ARestartedCoordinatorFindsTheRoundStillRunning) {
  coordinator_.Give(RoundOf({"slow-100"}));
  Start(Options());
  coordinator_.WaitFor(
      [](const WorkerState& state) { return state.slots(0).holding().trial_id() == 11; });
  server_->Shutdown(std::chrono::system_clock::time_point());
  Serve();
  EXPECT_EQ(RowsOf(coordinator_.WaitForRows()).size(), 100u + 1 + 1);
  EXPECT_EQ(coordinator_.incarnations(), 1u);
}

TEST_F(DaemonTest, FilesAndModelsComeByDigest) {
  const std::string shelf = folder_.Join("models");
  std::filesystem::create_directories(shelf + "/held");
  ASSERT_TRUE(WriteFileAtomic(shelf + "/held/config.json", "{}").ok());
  RoundSpec round = RoundOf({"facts", "facts"});
  *round.mutable_trials(0)->mutable_spec()->mutable_model_reference() =
      *DescribeModelFolder(shelf + "/held");
  *round.mutable_trials(0)->mutable_spec()->add_files() =
      coordinator_.AddFile("data/trace.csv", "a trace");
  // The second model is on no shelf, but small.
  ModelReference& small = *round.mutable_trials(1)->mutable_spec()->mutable_model_reference();
  small.set_name("small");
  *small.add_files() = coordinator_.AddFile("config.json", "{\"small\": 1}");
  small.set_bytes(small.files(0).bytes());
  small.set_digest(ModelDigest(small));

  WorkerOptions options = Options();
  options.model_folders = {shelf};
  Start(options);
  // As a coordinator does, which knows what its workers hold.
  coordinator_.WaitFor([](const WorkerState& state) { return state.models_size() == 1; });
  coordinator_.Give(round);
  const std::vector<Record> records = coordinator_.WaitForRows();
  ASSERT_EQ(records.size(), 3u + 1 + 3 + 1 + 1) << coordinator_.failure();
  const std::string trace = options.cache_folder + "/files/" + Sha256("a trace").Hex();
  EXPECT_EQ(records[3].outcome().evidence(),
            absl::StrCat("model ", shelf, "/held; data/trace.csv at ", trace));
  EXPECT_EQ(ReadFile(trace, 100).value(), "a trace");
  const std::string travelled =
      options.cache_folder + "/travelled/" + Digest::FromBytes(small.digest())->Hex();
  EXPECT_EQ(records[7].outcome().evidence(), absl::StrCat("model ", travelled));
  EXPECT_EQ(ReadFile(travelled + "/config.json", 100).value(), "{\"small\": 1}");
  EXPECT_EQ(coordinator_.fetches(), 2);
}

TEST_F(DaemonTest, AModelThatIsNotHereFailsTheAttemptWithItsName) {
  RoundSpec round = RoundOf({"rows-1"});
  round.mutable_trials(0)->mutable_spec()->mutable_model_reference()->set_name("llama-3.1-8b");
  round.mutable_trials(0)->mutable_spec()->mutable_model_reference()->set_digest(
      std::string(32, 'x'));
  coordinator_.Give(round);
  Start(Options());
  coordinator_.WaitForRows();
  EXPECT_TRUE(absl::StrContains(coordinator_.failure(), "holds model llama-3.1-8b"))
      << coordinator_.failure();
}

TEST_F(DaemonTest, AnAbandonedRoundStopsAndLeavesNoRows) {
  coordinator_.Give(RoundOf({"flood"}));
  Start(Options());
  coordinator_.WaitFor(
      [](const WorkerState& state) { return state.slots(0).holding().last_sequence() > 100; });
  coordinator_.Abandon();
  coordinator_.WaitForRows();
  const WorkerState state = coordinator_.WaitFor([](const WorkerState&) { return true; });
  EXPECT_TRUE(state.unhealthy_reason().empty());
}

TEST_F(DaemonTest, DrainingFinishesTheRoundAndEnds) {
  coordinator_.Give(RoundOf({"slow-20"}));
  Start(Options());
  coordinator_.WaitFor(
      [](const WorkerState& state) { return state.slots(0).holding().trial_id() == 11; });
  worker_->Shutdown();
  EXPECT_TRUE(worker_->WaitUntilDone().ok());
  const std::vector<std::string> rows = coordinator_.raw_rows();
  EXPECT_EQ(rows.size(), 20u + 1 + 1);
}

TEST_F(DaemonTest, ASecondShutdownDoesNotWait) {
  coordinator_.Give(RoundOf({"hang"}));
  Start(Options());
  coordinator_.WaitFor(
      [](const WorkerState& state) { return state.slots(0).holding().trial_id() == 11; });
  worker_->Shutdown();
  worker_->Shutdown();
  EXPECT_TRUE(worker_->WaitUntilDone().ok());
}

TEST_F(DaemonTest, AWorkerWhoseNameWasTakenEnds) {
  coordinator_.Supersede();
  Start(Options());
  EXPECT_EQ(worker_->WaitUntilDone().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(DaemonTest, ARunnerThatDoesNotStartMakesTheWorkerUnhealthyWithTheReason) {
  WorkerOptions options = Options();
  options.runners[0].environment = {"KVSWEEP_FAKE_START=exit"};
  Start(options);
  const WorkerState state = coordinator_.WaitFor(
      [](const WorkerState& state) { return !state.unhealthy_reason().empty(); });
  EXPECT_EQ(state.unhealthy_reason(),
            "slot 0: the runner does not start: exit code 9; it wrote: no device\n");
  EXPECT_EQ(state.slots(0).devices_size(), 0);
}

TEST_F(DaemonTest, ARunnerThatDoesNotTakeItsArgumentsEndsTheWorkerIfAsked) {
  WorkerOptions options = Options();
  options.runners[0].environment = {"KVSWEEP_FAKE_START=usage"};
  Start(options);
  coordinator_.WaitFor([](const WorkerState& state) { return !state.unhealthy_reason().empty(); });
  worker_.reset();

  options.end_on_runner_usage = true;
  options.runners[0].arguments = {"--foo", "3"};
  Start(options);
  const absl::Status status = worker_->WaitUntilDone();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "does not take its arguments (--foo 3)"))
      << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "it wrote: unknown flag")) << status;
}

TEST_F(DaemonTest, TwoSlotsHaveTwoRunners) {
  WorkerOptions options = Options();
  options.runners.push_back(options.runners[0]);
  Start(options);
  const WorkerState state = coordinator_.WaitFor([](const WorkerState& state) {
    return state.slots_size() == 2 && state.slots(0).devices_size() == 1 &&
           state.slots(1).devices_size() == 1;
  });
  EXPECT_EQ(state.slots(1).index(), 1u);
}

// The program itself: one SIGTERM drains it.
TEST_F(DaemonTest, TheProgramFinishesItsRoundWhenToldToEnd) {
  coordinator_.Give(RoundOf({"slow-20"}));
  std::vector<std::string> words = {absl::StrCat(KVSWEEP_BIN_DIR, "/kvsweep-worker"),
                                    "--coordinator",
                                    address_,
                                    "--runner",
                                    absl::StrCat(KVSWEEP_BIN_DIR, "/fake_runner"),
                                    "--cache",
                                    folder_.Join("cache"),
                                    "--slot",
                                    "--threads 1"};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t pid = 0;
  ASSERT_EQ(posix_spawn(&pid, arguments[0], nullptr, nullptr, arguments.data(), environ), 0);
  coordinator_.WaitFor(
      [](const WorkerState& state) { return state.slots(0).holding().trial_id() == 11; });
  ASSERT_EQ(kill(pid, SIGTERM), 0);
  int status = -1;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status)) << status;
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(coordinator_.raw_rows().size(), 20u + 1 + 1);
}

TEST(DialCoordinatorTest, OnlyThisMachineIsDialled) {
  for (const char* address :
       {"127.0.0.1:7470", "localhost:7470", "[::1]:7470", "unix:/run/kvsweep.sock"}) {
    EXPECT_TRUE(DialCoordinator(address).ok()) << address;
  }
  for (const char* address : {"gpu-7:7470", "10.0.0.1:7470", "127.0.0.1", "1270.0.0.1:7470", ""}) {
    EXPECT_EQ(DialCoordinator(address).status().code(), absl::StatusCode::kInvalidArgument)
        << address;
  }
}

TEST(WorkerStartTest, OptionsAreChecked) {
  const TempDir folder;
  WorkerOptions options;
  options.cache_folder = folder.path();
  options.worker_id = "worker";
  EXPECT_EQ(Worker::Start(options, *DialCoordinator("unix:/nowhere"), RealClock::Get())
                .status()
                .message(),
            "0 slots; a worker has 1 to 64");
  options.runners = {{.path = "/nowhere/runner"}};
  options.worker_id = "";
  EXPECT_FALSE(Worker::Start(options, *DialCoordinator("unix:/nowhere"), RealClock::Get()).ok());
}

}  // namespace
}  // namespace kvsweep
