#include "coordinator/service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/file.h"
#include "base/limits.h"
#include "experiments/spec.h"
#include "proto/control.grpc.pb.h"
#include "storage/sqlite_store.h"
#include "tests/coordinator/fake_worker.h"

namespace kvsweep {
namespace {

using testing::HasSubstr;

// Two rounds (one for each repeat) of two arms, no files, no model to be held.
constexpr char kSpec[] = R"(
schema_version: 1
name: test
model: {shape: llama-3.1-8b, weights: random}
load: {arrivals: {process: burst, requests: 4}, lengths: {input: 32, output: 8}}
kv: {device_bytes: 64MiB}
engine: {time: modelled}
arms:
  - {name: paged, strategy: paged}
  - {name: h2o, strategy: h2o}
repeats: 2
)";

// A store whose disk is slow once: the commit after StallOnce lasts so much longer.
class SlowStore final : public Store {
 public:
  explicit SlowStore(std::unique_ptr<Store> store) : store_(std::move(store)) {}

  void StallOnce(int64_t duration_ns) { stall_ns_ = duration_ns; }

  absl::StatusOr<CommitResult> Commit(const WriteBatch& batch) override {
    const int64_t stall_ns = stall_ns_.exchange(0);
    if (stall_ns > 0) RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + stall_ns);
    return store_->Commit(batch);
  }

  absl::StatusOr<std::unique_ptr<StoreReader>> OpenReader() override {
    return store_->OpenReader();
  }

 private:
  const std::unique_ptr<Store> store_;
  std::atomic<int64_t> stall_ns_ = 0;
};

class ServiceTest : public testing::Test {
 protected:
  ServiceTest() { Start(); }

  void Start() {
    coordinator_.reset();
    absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(folder_.Join("store.db"));
    ASSERT_TRUE(store.ok()) << store.status();
    auto slow = std::make_unique<SlowStore>(*std::move(store));
    store_ = slow.get();
    CoordinatorOptions options;
    options.store = std::move(slow);
    options.scheduler.lease = lease_;
    options.queued_trials = queued_trials_;
    options.store_path = folder_.Join("store.db");
    options.check_invariants = true;
    auto started = Coordinator::Start(std::move(options), RealClock::Get());
    ASSERT_TRUE(started.ok()) << started.status();
    coordinator_ = *std::move(started);
    channel_ = coordinator_->InProcessChannel();
    control_ = ControlService::NewStub(channel_);
  }

  SubmitRequest Request(const std::string& client_id) {
    SubmitRequest request;
    request.set_client_id(client_id);
    request.set_spec_text(kSpec);
    absl::StatusOr<Experiment> experiment = ParseExperiment(kSpec, "test.yaml", {});
    EXPECT_TRUE(experiment.ok()) << experiment.status();
    *request.mutable_experiment() = *std::move(experiment);
    return request;
  }

  SubmitReply Submit(const SubmitRequest& request) {
    grpc::ClientContext context;
    SubmitReply reply;
    const grpc::Status status = control_->Submit(&context, request, &reply);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return reply;
  }

  // The last event of a watch.
  WatchEvent WatchToTheEnd(uint64_t experiment, grpc::Status* status = nullptr) {
    grpc::ClientContext context;
    WatchRequest request;
    request.set_experiment_id(experiment);
    auto reader = control_->Watch(&context, request);
    WatchEvent event;
    while (reader->Read(&event)) {
    }
    const grpc::Status end = reader->Finish();
    if (status != nullptr) *status = end;
    return event;
  }

  uint64_t Cancel(uint64_t experiment) {
    grpc::ClientContext context;
    CancelRequest request;
    request.set_experiment_id(experiment);
    CancelReply reply;
    EXPECT_TRUE(control_->Cancel(&context, request, &reply).ok());
    return reply.rounds_cancelled();
  }

  std::unique_ptr<FakeWorker> NewWorker(const std::string& name, uint64_t incarnation) {
    return std::make_unique<FakeWorker>(channel_, name, incarnation);
  }

  TempDir folder_;
  LeaseOptions lease_;  // as of the next Start
  uint64_t queued_trials_ = limits::kQueuedTrials;
  SlowStore* store_ = nullptr;  // the coordinator's
  std::unique_ptr<Coordinator> coordinator_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<ControlService::Stub> control_;
};

TEST_F(ServiceTest, TheWholeWayThenServedFromTheStore) {
  auto worker = NewWorker("w", 1);
  ASSERT_TRUE(worker->Exchange());
  const SubmitReply reply = Submit(Request("first"));
  EXPECT_EQ(reply.rounds(), 2u);
  EXPECT_EQ(reply.trials(), 4u);
  EXPECT_EQ(reply.rounds_served(), 0u);
  ASSERT_TRUE(worker->RunRounds(2));
  const WatchEvent end = WatchToTheEnd(reply.experiment_id());
  EXPECT_TRUE(end.finished());
  EXPECT_EQ(end.rounds_done(), 2u);

  // The same client id: the same answer, nothing new.
  EXPECT_EQ(Submit(Request("first")).experiment_id(), reply.experiment_id());
  // The same question asked again: answered by what is stored.
  const SubmitReply again = Submit(Request("second"));
  EXPECT_NE(again.experiment_id(), reply.experiment_id());
  EXPECT_EQ(again.rounds_served(), 2u);
  EXPECT_EQ(WatchToTheEnd(again.experiment_id()).rounds_served(), 2u);
  // Unless asked not to.
  SubmitRequest fresh = Request("third");
  fresh.set_fresh(true);
  EXPECT_EQ(Submit(fresh).rounds_served(), 0u);
}

TEST_F(ServiceTest, ARestartGoesOnWhereTheWorkerIs) {
  auto worker = NewWorker("w", 1);
  const SubmitReply submitted = Submit(Request("a"));
  ASSERT_TRUE(worker->WaitForRound());
  const uint64_t attempt = worker->attempt();
  EXPECT_EQ(worker->Report(1, 3).acknowledged_through(), 3u);

  const std::vector<std::string> records = worker->records();
  const WorkerState state = worker->state();
  Start();

  // The same incarnation, still holding the attempt, resends from its last acknowledgement.
  auto returned = NewWorker("w", 1);
  returned->state() = state;
  ASSERT_TRUE(returned->Exchange());
  ASSERT_TRUE(returned->holds());
  EXPECT_EQ(returned->attempt(), attempt);
  ReportBatch batch;
  batch.set_worker_id("w");
  batch.set_incarnation(1);
  batch.set_attempt(attempt);
  batch.set_first_sequence(3);  // one more than needed
  for (size_t i = 2; i < records.size(); ++i) batch.add_records(records[i]);
  const ReportReply reply = returned->Send(batch);
  EXPECT_FALSE(reply.refused()) << reply.reason();
  EXPECT_EQ(reply.acknowledged_through(), records.size());
  returned->state().mutable_slots(0)->mutable_holding()->set_phase(Holding::PHASE_FINISHED);
  while (returned->holds() && returned->attempt() == attempt) ASSERT_TRUE(returned->Exchange());
  ASSERT_TRUE(returned->RunRounds(1));
  EXPECT_EQ(WatchToTheEnd(submitted.experiment_id()).rounds_done(), 2u);
}

TEST_F(ServiceTest, ACommitLongerThanALeaseIsNotTheWorkersSilence) {
  lease_ = {.lease_ns = kNsPerSecond, .lost_after_ns = kNsPerSecond / 2};
  Start();
  auto worker = NewWorker("w", 1);
  ASSERT_TRUE(worker->Exchange());
  Submit(Request("a"));
  ASSERT_TRUE(worker->WaitForRound());
  const uint64_t attempt = worker->attempt();
  ASSERT_TRUE(worker->Exchange());
  store_->StallOnce(3 * kNsPerSecond);
  EXPECT_EQ(worker->Report(1, 3).acknowledged_through(), 3u);
  // Were its lease taken back, this would be refused.
  ASSERT_TRUE(worker->Exchange());
  EXPECT_EQ(worker->attempt(), attempt);
  EXPECT_FALSE(worker->Report(4, 4).refused());
}

TEST_F(ServiceTest, TheQueueOfAllExperimentsIsBounded) {
  const auto refused = [&](const std::string& client_id) {
    grpc::ClientContext context;
    SubmitReply reply;
    const grpc::Status status = control_->Submit(&context, Request(client_id), &reply);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    return status.error_message();
  };
  queued_trials_ = 8;
  Start();
  const SubmitReply first = Submit(Request("first"));
  Submit(Request("second"));  // 4 trials each: exactly as many as it holds
  EXPECT_THAT(refused("third"), HasSubstr("at most 8"));
  EXPECT_THAT(refused("third"), HasSubstr("kvsweep cancel"));
  EXPECT_EQ(Submit(Request("first")).experiment_id(), first.experiment_id()) << "adds nothing";
  Start();
  EXPECT_THAT(refused("third"), HasSubstr("8 of all experiments"));
  EXPECT_EQ(Cancel(first.experiment_id()), 2u);
  EXPECT_EQ(Submit(Request("third")).rounds(), 2u);
  // One that is too large for the empty queue has another remedy.
  EXPECT_EQ(Cancel(first.experiment_id()), 0u);
  queued_trials_ = 3;
  Start();
  EXPECT_THAT(refused("fourth"), HasSubstr("at most 3"));
}

TEST_F(ServiceTest, OnlyTheHolderWritesAndOnlyWhatItMay) {
  auto worker = NewWorker("w", 1);
  auto liar = NewWorker("liar", 7);
  ASSERT_TRUE(worker->Exchange());
  Submit(Request("a"));
  ASSERT_TRUE(worker->WaitForRound());
  ReportBatch batch = worker->Batch(1, 2);

  batch.set_worker_id("liar");
  EXPECT_TRUE(liar->Send(batch).refused());
  batch.set_worker_id("w");
  batch.set_incarnation(2);
  EXPECT_TRUE(liar->Send(batch).refused());
  batch.set_incarnation(1);
  batch.set_attempt(batch.attempt() + 100);
  EXPECT_TRUE(liar->Send(batch).refused()) << "an attempt that nobody was given";

  EXPECT_EQ(worker->Report(2, 3).acknowledged_through(), 0u) << "a gap";
  EXPECT_EQ(worker->Report(1, 2).acknowledged_through(), 2u);
  EXPECT_EQ(worker->Report(1, 2).acknowledged_through(), 2u) << "an equal repeat";

  // An unequal repeat voids the attempt: it is stopped, and the round is leased again.
  const uint64_t attempt = worker->attempt();
  batch = worker->Batch(1, 1);
  batch.set_records(0, worker->records()[1]);
  EXPECT_TRUE(worker->Send(batch).refused());
  EXPECT_TRUE(worker->Report(3, 4).refused());
  while (worker->holds() && worker->attempt() == attempt) ASSERT_TRUE(worker->Exchange());
  ASSERT_TRUE(worker->RunRounds(1));
}

TEST_F(ServiceTest, ANewerStreamOrIncarnationReplacesTheOlder) {
  auto first = NewWorker("w", 1);
  Submit(Request("a"));
  ASSERT_TRUE(first->WaitForRound());
  const uint64_t attempt = first->attempt();
  auto second = NewWorker("w", 2);
  ASSERT_TRUE(second->WaitForRound());
  EXPECT_GT(second->attempt(), attempt);
  EXPECT_TRUE(first->Report(1, 1).refused());
  while (first->Exchange()) {
  }
  EXPECT_EQ(first->Finish().error_code(), grpc::StatusCode::ABORTED);
  auto third = NewWorker("w", 1);
  EXPECT_FALSE(third->Exchange());
  EXPECT_EQ(third->Finish().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(ServiceTest, StatesThatNoHonestWorkerSaysEndTheirStream) {
  const auto refused = [&](auto change) {
    auto worker = NewWorker("w", 1);
    change(worker->state());
    EXPECT_FALSE(worker->Exchange());
    return worker->Finish();
  };
  EXPECT_THAT(refused([](WorkerState& s) { s.set_worker_id(""); }).error_message(),
              HasSubstr("worker id"));
  EXPECT_THAT(refused([](WorkerState& s) { s.set_worker_id("a\nb"); }).error_message(),
              HasSubstr("plain characters"));
  EXPECT_THAT(refused([](WorkerState& s) { s.set_protocol_version(9); }).error_message(),
              HasSubstr("protocol version 9"));
  EXPECT_THAT(refused([](WorkerState& s) { s.mutable_slots(0)->set_index(5); }).error_message(),
              HasSubstr("slot 5"));
  EXPECT_THAT(refused([](WorkerState& s) { s.add_models()->set_digest("short"); }).error_message(),
              HasSubstr("32 bytes"));
  EXPECT_THAT(refused([](WorkerState& s) {
                for (int i = 0; i < 100; ++i) s.add_slots();
              }).error_message(),
              HasSubstr("slots"));
  EXPECT_TRUE(NewWorker("w", 1)->Exchange()) << "the coordinator must have survived";
}

TEST_F(ServiceTest, PeopleSeeWhyNothingRunsAndCanCancel) {
  const SubmitReply reply = Submit(Request("a"));
  grpc::ClientContext context;
  WatchRequest request;
  request.set_experiment_id(reply.experiment_id());
  auto reader = control_->Watch(&context, request);
  WatchEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.waiting_for(), "no worker is connected");
  EXPECT_EQ(Cancel(reply.experiment_id()), 2u);
  EXPECT_EQ(Cancel(reply.experiment_id()), 0u);
  while (reader->Read(&event)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_TRUE(event.finished());
  EXPECT_EQ(event.rounds_failed(), 2u);
  grpc::Status status;
  WatchToTheEnd(12345, &status);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServiceTest, ADrainingWorkerGetsNothingAlsoAfterARestart) {
  auto worker = NewWorker("w", 1);
  ASSERT_TRUE(worker->Exchange());
  DrainRequest request;
  request.set_worker_id("w");
  request.set_draining(true);
  DrainReply reply;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(control_->Drain(&context, request, &reply).ok());
    EXPECT_TRUE(reply.known());
  }
  Submit(Request("a"));
  worker.reset();
  Start();
  worker = NewWorker("w", 2);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(worker->Exchange());
  EXPECT_FALSE(worker->holds());
  request.set_draining(false);
  grpc::ClientContext context;
  ASSERT_TRUE(control_->Drain(&context, request, &reply).ok());
  EXPECT_TRUE(worker->WaitForRound());
}

TEST_F(ServiceTest, FilesTravelByDigest) {
  const std::string content(700'000, 'x');
  const std::string digest(Sha256(content).bytes());
  SubmitRequest request = Request("a");
  FileReference* file = request.add_files();
  file->set_path("some/text.txt");
  file->set_digest(digest);
  file->set_bytes(content.size());
  ASSERT_EQ(Submit(request).missing_files_size(), 1);
  EXPECT_EQ(Submit(request).missing_files(0), digest);

  const auto upload = [&](const std::string& named) {
    grpc::ClientContext context;
    UploadReply reply;
    auto writer = control_->UploadFile(&context, &reply);
    for (size_t offset = 0; offset < content.size(); offset += 400'000) {
      FileChunk chunk;
      chunk.set_data(content.substr(offset, 400'000));
      chunk.set_offset(offset);
      chunk.set_digest(named);
      writer->Write(chunk);
    }
    writer->WritesDone();
    return writer->Finish();
  };
  EXPECT_EQ(upload(std::string(32, 'z')).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(upload(digest).ok());
  EXPECT_EQ(Submit(request).missing_files_size(), 0);

  auto stub = WorkerService::NewStub(channel_);
  grpc::ClientContext context;
  FetchFileRequest fetch;
  fetch.set_digest(digest);
  auto reader = stub->FetchFile(&context, fetch);
  std::string fetched;
  FileChunk chunk;
  while (reader->Read(&chunk)) fetched += chunk.data();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(fetched, content);
}

TEST_F(ServiceTest, SubmissionsThatAreNotSoundStoreNothing) {
  const auto refused = [&](auto change) {
    SubmitRequest request = Request("a");
    change(request);
    grpc::ClientContext context;
    SubmitReply reply;
    const grpc::Status status = control_->Submit(&context, request, &reply);
    EXPECT_FALSE(status.ok());
    return status.error_message();
  };
  EXPECT_THAT(refused([](SubmitRequest& r) { r.set_client_id(""); }), HasSubstr("client_id"));
  EXPECT_THAT(refused([](SubmitRequest& r) { r.mutable_experiment()->clear_arms(); }),
              HasSubstr("arms"));
  EXPECT_THAT(refused([](SubmitRequest& r) { r.add_files()->set_path("x"); }),
              HasSubstr("32 bytes"));
  grpc::ClientContext context;
  TableReply table;
  ASSERT_TRUE(control_->List(&context, ListRequest(), &table).ok());
  EXPECT_EQ(table.rows_size(), 0);
}

TEST(ListenAddressTest, OnlyLoopbackAndUnixSockets) {
  for (const char* good :
       {"127.0.0.1:7470", "127.1.2.3:0", "localhost:1", "[::1]:65535", "unix:/run/kvsweep.sock"}) {
    EXPECT_TRUE(CheckListenAddress(good).ok()) << good;
  }
  for (const char* bad : {"0.0.0.0:7470", "[::]:7470", "10.0.0.1:80", "example.org:80",
                          "127.0.0.1.example.org:80", "127.0.0.1", "127.0.0.1:70000", ":80", ""}) {
    EXPECT_EQ(CheckListenAddress(bad).code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

}  // namespace
}  // namespace kvsweep
