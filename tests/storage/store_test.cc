// The rules of the store, held against both of its implementations.
#include "storage/store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <numeric>

#include "base/digest.h"
#include "base/file.h"
#include "base/limits.h"
#include "storage/memory_store.h"
#include "storage/record_tables.h"
#include "storage/sqlite_store.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

using Append = AppendResult::State;
using Accept = AcceptResult::State;

class StoreTest : public testing::TestWithParam<std::string> {
 protected:
  StoreTest() {
    if (GetParam() == "memory") {
      store_ = NewMemoryStore();
    } else {
      absl::StatusOr<std::unique_ptr<Store>> opened = OpenSqliteStore(folder_.Join("store.db"));
      EXPECT_TRUE(opened.ok()) << opened.status();
      store_ = *std::move(opened);
    }
    reader_ = *store_->OpenReader();
  }

  SubmitResult Submit(const TestExperimentOptions& options = {}) {
    const OperationResult result = Apply(*store_, MakeExperiment(options));
    EXPECT_TRUE(result.status.ok()) << result.status;
    return std::get<SubmitResult>(result.value);
  }
  absl::Status Grant(uint64_t attempt, RoundId round) {
    return Apply(*store_, GrantAttempt{.attempt = Attempt(attempt),
                                       .round = round,
                                       .worker_id = "worker-1",
                                       .incarnation = ~uint64_t{0},
                                       .machine = "machine-1",
                                       .slot = 3})
        .status;
  }
  AppendResult Send(uint64_t attempt, uint64_t first, std::vector<std::string> records) {
    const OperationResult result = Apply(*store_, AppendRecords{.attempt = Attempt(attempt),
                                                                .first_sequence = first,
                                                                .records = std::move(records)});
    return std::get<AppendResult>(result.value);
  }
  AcceptResult TryAccept(uint64_t attempt) {
    return std::get<AcceptResult>(Apply(*store_, AcceptAttempt{.attempt = Attempt(attempt)}).value);
  }
  // A round that was run and accepted as `attempt`.
  void Run(uint64_t attempt, const SubmitResult::Round& round) {
    ASSERT_TRUE(Grant(attempt, round.round).ok());
    ASSERT_EQ(Send(attempt, 1, AttemptScript::Whole(round.trials, random_)).state, Append::kStored);
    const AcceptResult accepted = TryAccept(attempt);
    ASSERT_EQ(accepted.state, Accept::kAccepted) << accepted.reason;
  }
  RoundState StateOf(RoundId round) { return reader_->GetRound(round)->state; }

  TempDir folder_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<StoreReader> reader_;
  Random random_{20};
};

TEST_P(StoreTest, SubmitAssignsIdsAndTheQueueShowsIt) {
  const SubmitResult submitted = Submit({.rounds = 3, .arms = 2});
  ASSERT_THAT(submitted.rounds, SizeIs(3));
  EXPECT_FALSE(submitted.repeated);
  const Queue queue = *reader_->LoadQueue();
  ASSERT_THAT(queue.rounds, SizeIs(3));
  EXPECT_EQ(queue.rounds[1].round, submitted.rounds[1].round);
  EXPECT_EQ(queue.rounds[1].trials, submitted.rounds[1].trials);
  EXPECT_TRUE(queue.rounds[1].uses_host_tier);
  EXPECT_TRUE(queue.rounds[1].modelled_time);
  EXPECT_EQ(queue.rounds[1].backend, "cpu");
  ASSERT_THAT(queue.experiments, SizeIs(1));
  EXPECT_EQ(queue.experiments[0].rounds, 3u);
  EXPECT_EQ(queue.highest_attempt, Attempt(0));

  const StoredRound round = *reader_->GetRound(submitted.rounds[2].round);
  EXPECT_EQ(round.repeat, 1u);
  EXPECT_EQ(round.cell_name, "rate=4/s");
  ASSERT_EQ(round.spec.trials_size(), 2);
  EXPECT_EQ(round.spec.trials(1).trial_id(), submitted.rounds[2].trials[1].value());
  EXPECT_EQ(round.spec.trials(1).content_key(), TestKey(6));
  EXPECT_EQ(round.spec.trials(1).spec().arm().name(), "arm-1");
  EXPECT_EQ(round.trials[1].strategy, "h2o");
}

TEST_P(StoreTest, TheSameClientIdAnswersAsTheFirstTime) {
  EXPECT_FALSE(*reader_->IsSubmitted("client-1"));
  const SubmitResult first = Submit();
  EXPECT_TRUE(*reader_->IsSubmitted("client-1"));
  const SubmitResult again = Submit({.rounds = 7});
  EXPECT_TRUE(again.repeated);
  EXPECT_EQ(again.experiment, first.experiment);
  ASSERT_THAT(again.rounds, SizeIs(2));
  EXPECT_EQ(again.rounds[1].trials, first.rounds[1].trials);
  EXPECT_THAT(reader_->LoadQueue()->rounds, SizeIs(2));
}

TEST_P(StoreTest, SubmissionsThatDoNotFitAreRefusedWhole) {
  SubmitExperiment missing_file = MakeExperiment({});
  missing_file.files.emplace_back().set_digest(TestKey(99));
  SubmitExperiment wrong_arm = MakeExperiment({});
  wrong_arm.rounds[1].trials[0].arm_index = 2;
  SubmitExperiment wrong_cell = MakeExperiment({});
  wrong_cell.rounds[1].cell_index = 2;
  SubmitExperiment missing_spec = MakeExperiment({});
  missing_spec.rounds[1].spec.mutable_trials()->RemoveLast();
  SubmitExperiment unknown_server = MakeExperiment({});
  unknown_server.rounds[1].served_by = RoundId(77);
  for (const SubmitExperiment& broken :
       {missing_file, wrong_arm, wrong_cell, missing_spec, unknown_server}) {
    EXPECT_EQ(Apply(*store_, broken).status.code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_THAT(reader_->LoadQueue()->rounds, IsEmpty());
  EXPECT_FALSE(Submit().repeated);
}

TEST_P(StoreTest, FilesAreKeptByDigest) {
  std::string content(100'000, 'x');
  content += std::string("\0\xff", 2);
  const std::string digest(Sha256(content).bytes());
  EXPECT_FALSE(*reader_->HasFile(digest));
  EXPECT_TRUE(absl::IsNotFound(reader_->GetFile(digest).status()));
  EXPECT_TRUE(Apply(*store_, PutFile{digest, content}).status.ok());
  EXPECT_TRUE(Apply(*store_, PutFile{digest, content}).status.ok());
  EXPECT_TRUE(*reader_->HasFile(digest));
  EXPECT_EQ(*reader_->GetFile(digest), content);
  EXPECT_TRUE(absl::IsInvalidArgument(Apply(*store_, PutFile{digest, content + "y"}).status));
  const std::string large(limits::kTravellingFileBytes + 1, 'x');
  EXPECT_TRUE(absl::IsInvalidArgument(
      Apply(*store_, PutFile{std::string(Sha256(large).bytes()), large}).status));
  const std::string nothing(Sha256("").bytes());
  EXPECT_TRUE(Apply(*store_, PutFile{nothing, ""}).status.ok());
  EXPECT_EQ(*reader_->GetFile(nothing), "");
}

TEST_P(StoreTest, AttemptsOnlyGrowAndARoundHasOne) {
  const SubmitResult submitted = Submit();
  const RoundId first = submitted.rounds[0].round;
  EXPECT_TRUE(Grant(5, first).ok());
  EXPECT_EQ(StateOf(first), RoundState::kRunning);
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(6, first)));
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(5, submitted.rounds[1].round)));
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(4, submitted.rounds[1].round)));
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(0, submitted.rounds[1].round)));
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(kMaxAttempt + 1, submitted.rounds[1].round)));
  EXPECT_TRUE(absl::IsNotFound(Grant(9, RoundId(1234))));
  const Queue queue = *reader_->LoadQueue();
  ASSERT_TRUE(queue.rounds[0].open_attempt.has_value());
  EXPECT_EQ(queue.rounds[0].open_attempt->attempt, Attempt(5));
  EXPECT_EQ(queue.rounds[0].open_attempt->incarnation, ~uint64_t{0});
  EXPECT_EQ(queue.rounds[0].open_attempt->slot, 3u);
  EXPECT_EQ(queue.highest_attempt, Attempt(5));
}

TEST_P(StoreTest, AWholeAttemptIsAccepted) {
  const SubmitResult submitted = Submit();
  const std::vector<std::string> records =
      AttemptScript::Whole(submitted.rounds[0].trials, random_);
  ASSERT_TRUE(Grant(1, submitted.rounds[0].round).ok());
  const AppendResult sent = Send(1, 1, records);
  EXPECT_EQ(sent.state, Append::kStored);
  EXPECT_EQ(sent.acknowledged_through, records.size());
  EXPECT_TRUE(sent.finished);
  EXPECT_EQ(TryAccept(1).state, Accept::kAccepted);
  EXPECT_EQ(TryAccept(1).state, Accept::kRefused);
  EXPECT_EQ(StateOf(submitted.rounds[0].round), RoundState::kDone);
  EXPECT_EQ(*reader_->ReadRecords(Attempt(1), 1, 1000), records);
  EXPECT_THAT(*reader_->ReadRecords(Attempt(1), 3, 2), ElementsAre(records[2], records[3]));
  EXPECT_EQ(Send(1, 1, records).state, Append::kRefused);
  EXPECT_THAT(reader_->LoadQueue()->rounds, SizeIs(1));
}

TEST_P(StoreTest, NothingIsStoredPastAGap) {
  const SubmitResult submitted = Submit();
  const std::vector<std::string> records =
      AttemptScript::Whole(submitted.rounds[0].trials, random_);
  ASSERT_TRUE(Grant(1, submitted.rounds[0].round).ok());
  EXPECT_EQ(Send(1, 2, {records[1]}).acknowledged_through, 0u);
  EXPECT_EQ(Send(1, 1, {records[0], records[1]}).acknowledged_through, 2u);
  const AppendResult gap = Send(1, 4, {records[3]});
  EXPECT_EQ(gap.state, Append::kStored);
  EXPECT_EQ(gap.acknowledged_through, 2u);
  EXPECT_THAT(*reader_->ReadRecords(Attempt(1), 1, 1000), SizeIs(2));
  EXPECT_EQ(TryAccept(1).state, Accept::kUnfinished);
}

TEST_P(StoreTest, EqualRepeatsAreIgnoredAndUnequalOnesVoid) {
  const SubmitResult submitted = Submit();
  const std::vector<std::string> records =
      AttemptScript::Whole(submitted.rounds[0].trials, random_);
  ASSERT_TRUE(Grant(1, submitted.rounds[0].round).ok());
  Send(1, 1, {records[0], records[1], records[2]});
  EXPECT_EQ(Send(1, 2, {records[1], records[2], records[3]}).acknowledged_through, 4u);
  EXPECT_THAT(*reader_->ReadRecords(Attempt(1), 1, 1000), SizeIs(4));
  const AppendResult unequal = Send(1, 2, {records[2]});
  EXPECT_EQ(unequal.state, Append::kVoided);
  EXPECT_NE(unequal.reason, "");
  EXPECT_EQ(reader_->GetAttempt(Attempt(1))->state, AttemptState::kVoid);
  EXPECT_EQ(Send(1, 5, {records[4]}).state, Append::kRefused);
  EXPECT_EQ(TryAccept(1).state, Accept::kRefused);
  EXPECT_EQ(StateOf(submitted.rounds[0].round), RoundState::kQueued);
}

TEST_P(StoreTest, AStaleAttemptCannotWrite) {
  const SubmitResult submitted = Submit();
  const SubmitResult::Round& round = submitted.rounds[0];
  const std::vector<std::string> records = AttemptScript::Whole(round.trials, random_);
  ASSERT_TRUE(Grant(1, round.round).ok());
  Send(1, 1, records);
  EXPECT_TRUE(Apply(*store_, VoidAttempt{.attempt = Attempt(1),
                                         .reason = "lease expired",
                                         .worker_lost = true,
                                         .running_trial = round.trials[1],
                                         .voided_unix_ns = 17})
                  .status.ok());
  const Queue queue = *reader_->LoadQueue();
  ASSERT_THAT(queue.rounds[0].void_attempts, SizeIs(1));
  const VoidedAttempt& lost = queue.rounds[0].void_attempts[0];
  EXPECT_TRUE(lost.worker_lost);
  EXPECT_EQ(lost.running_trial, round.trials[1]);
  EXPECT_EQ(lost.machine, "machine-1");
  EXPECT_EQ(lost.reason, "lease expired");
  EXPECT_EQ(lost.voided_unix_ns, 17);

  ASSERT_TRUE(Grant(2, round.round).ok());
  EXPECT_EQ(Send(1, 1, records).state, Append::kRefused);
  EXPECT_EQ(TryAccept(1).state, Accept::kRefused);
  EXPECT_EQ(Send(3, 1, records).state, Append::kRefused) << "an attempt that was never granted";
  EXPECT_EQ(Send(2, 1, records).state, Append::kStored);
  EXPECT_EQ(TryAccept(2).state, Accept::kAccepted);
  EXPECT_TRUE(
      absl::IsFailedPrecondition(Apply(*store_, VoidAttempt{.attempt = Attempt(2)}).status));
}

// Each a way in which a worker may lie; the records before the lie are sound.
TEST_P(StoreTest, LiesVoidTheAttempt) {
  const SubmitResult submitted = Submit({.rounds = 20});
  const auto start = [](uint64_t trial) {
    AttemptScript script;
    script.Start(trial);
    return script;
  };
  const auto with_nan = [](Record record, double value) {
    record.mutable_counter()->set_value(value);
    std::string bytes;
    SerializeRecord(record, &bytes);
    return bytes;
  };
  uint64_t attempt = 0;
  const auto expect_void = [&](const std::function<void(uint64_t, AttemptScript&)>& lie) {
    const SubmitResult::Round& round = submitted.rounds[attempt];
    ++attempt;
    ASSERT_TRUE(Grant(attempt, round.round).ok());
    AttemptScript script = start(round.trials[0].value());
    lie(round.trials[0].value(), script);
    EXPECT_EQ(Send(attempt, 1, script.records).state, Append::kVoided) << "lie " << attempt;
    EXPECT_EQ(StateOf(round.round), RoundState::kQueued);
  };
  Record counter;
  counter.set_trial_id(1);
  expect_void([&](uint64_t, AttemptScript& script) { script.Start(99'999); });  // no such trial
  expect_void([&](uint64_t, AttemptScript& script) {                            // of another round
    script.Start(submitted.rounds[19].trials[0].value());
  });
  for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    expect_void([&](uint64_t trial, AttemptScript& script) {
      counter.set_trial_id(trial);
      script.records.push_back(with_nan(counter, value));
    });
  }
  expect_void([](uint64_t, AttemptScript& script) { script.records.push_back("\xff\xff"); });
  expect_void([](uint64_t, AttemptScript& script) { script.records.push_back(""); });
  expect_void([](uint64_t trial, AttemptScript& script) {  // behind the finish
    script.Outcome(trial);
    script.Finish();
    script.Outcome(trial);
  });
  expect_void([](uint64_t trial, AttemptScript& script) {  // not in deterministic form
    Record record;
    record.set_trial_id(trial);
    record.mutable_discard();
    std::string bytes;
    SerializeRecord(record, &bytes);
    script.records.push_back(bytes + bytes);
  });
  expect_void([](uint64_t trial, AttemptScript& script) {  // a count that no column can hold
    Record record;
    record.set_trial_id(trial);
    record.mutable_request()->set_entries_full(uint64_t{1} << 63);
    SerializeRecord(record, &script.records.emplace_back());
  });
  ASSERT_TRUE(Grant(attempt + 1, submitted.rounds[attempt].round).ok());
  const AppendResult zero = Send(attempt + 1, 0, {"x"});
  EXPECT_EQ(zero.state, Append::kVoided);
}

// What only the whole attempt shows.
TEST_P(StoreTest, AnAttemptThatIsNotWholeIsVoidedAtAcceptance) {
  const SubmitResult submitted = Submit({.rounds = 12});
  uint64_t attempt = 0;
  const auto expect_void = [&](const std::string& reason,
                               const std::function<void(AttemptScript&, uint64_t, uint64_t)>& run) {
    const SubmitResult::Round& round = submitted.rounds[attempt];
    ++attempt;
    ASSERT_TRUE(Grant(attempt, round.round).ok());
    AttemptScript script;
    run(script, round.trials[0].value(), round.trials[1].value());
    ASSERT_EQ(Send(attempt, 1, script.records).state, Append::kStored);
    const AcceptResult result = TryAccept(attempt);
    EXPECT_EQ(result.state, Accept::kVoided);
    EXPECT_THAT(result.reason, HasSubstr(reason));
    EXPECT_EQ(StateOf(round.round), RoundState::kQueued);
  };
  expect_void("has no outcome", [](AttemptScript& script, uint64_t a, uint64_t) {
    script.Start(a);
    script.Outcome(a);
    script.Finish();
  });
  expect_void("has no outcome yet", [](AttemptScript& script, uint64_t a, uint64_t b) {
    script.Start(a);
    script.Start(b);
    script.Finish();
  });
  expect_void("has ended already", [](AttemptScript& script, uint64_t a, uint64_t) {
    script.Start(a);
    script.Outcome(a);
    script.Outcome(a);
    script.Finish();
  });
  expect_void("before its start", [&](AttemptScript& script, uint64_t a, uint64_t) {
    script.Requests(a, random_, 1);
    script.Finish();
  });
  expect_void("second row of request", [&](AttemptScript& script, uint64_t a, uint64_t) {
    script.Start(a);
    script.Requests(a, random_, 1);
    script.Requests(a, random_, 1);
    script.Finish();
  });
  expect_void("counts", [&](AttemptScript& script, uint64_t a, uint64_t b) {
    AttemptScript other;
    for (const uint64_t trial : {a, b}) {
      script.Start(trial);
      script.Requests(trial, random_, 2);
      script.Outcome(trial);
      other.Start(trial);
      other.Outcome(trial);
    }
    other.Finish();
    script.records.push_back(other.records.back());
  });
  expect_void("digest", [&](AttemptScript& script, uint64_t a, uint64_t b) {
    AttemptScript other;
    for (AttemptScript* each : {&script, &other}) {
      for (const uint64_t trial : {a, b}) {
        each->Start(trial);
        each->Requests(trial, random_, 2);
        each->Outcome(trial);
      }
    }
    other.Finish();
    script.records.push_back(other.records.back());
  });
}

TEST_P(StoreTest, ADiscardDropsTheRowsOfTheExecutionBefore) {
  const SubmitResult submitted = Submit();
  const SubmitResult::Round& round = submitted.rounds[0];
  AttemptScript script;
  script.Start(round.trials[0].value());
  script.Requests(round.trials[0].value(), random_, 2);
  script.Outcome(round.trials[0].value());
  script.Start(round.trials[1].value());
  script.Requests(round.trials[1].value(), random_, 2);
  script.Discard(round.trials[1].value());
  script.Start(round.trials[1].value(), 2);
  script.Requests(round.trials[1].value(), random_, 3);
  script.Discard(round.trials[1].value());
  script.Outcome(round.trials[1].value(), OUTCOME_CRASHED);
  script.Finish();
  ASSERT_TRUE(Grant(1, round.round).ok());
  ASSERT_EQ(Send(1, 1, script.records).state, Append::kStored);
  const AcceptResult accepted = TryAccept(1);
  EXPECT_EQ(accepted.state, Accept::kAccepted) << accepted.reason;
}

TEST_P(StoreTest, RoundsAreServedWhole) {
  const SubmitResult first = Submit({.rounds = 2, .arms = 3});
  AcceptedQuery query{.content_keys = {TestKey(1), TestKey(2), TestKey(3)},
                      .runner_build = "build-1",
                      .method_version = 1,
                      .device_classes = {"class-0", "class-1"}};
  EXPECT_THAT(*reader_->FindAccepted(query), IsEmpty());
  Run(1, first.rounds[0]);
  const std::vector<AcceptedRound> found = *reader_->FindAccepted(query);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_EQ(found[0].round, first.rounds[0].round);
  ASSERT_THAT(found[0].trials, SizeIs(3));
  EXPECT_EQ(found[0].trials[2], std::make_pair(first.rounds[0].trials[2], TestKey(3)));

  AcceptedQuery more = query;
  more.content_keys.push_back(TestKey(50));
  EXPECT_THAT(*reader_->FindAccepted(more), SizeIs(1)) << "a round that answers a part of the arms";
  AcceptedQuery fewer = query;
  fewer.content_keys.pop_back();
  EXPECT_THAT(*reader_->FindAccepted(fewer), IsEmpty());
  AcceptedQuery other_build = query;
  other_build.runner_build = "build-2";
  EXPECT_THAT(*reader_->FindAccepted(other_build), IsEmpty());
  other_build.runner_build = std::nullopt;
  EXPECT_THAT(*reader_->FindAccepted(other_build), SizeIs(1));
  AcceptedQuery other_method = query;
  other_method.method_version = 2;
  EXPECT_THAT(*reader_->FindAccepted(other_method), IsEmpty());
  AcceptedQuery other_device = query;
  other_device.device_classes = {"class-2"};
  EXPECT_THAT(*reader_->FindAccepted(other_device), IsEmpty());

  SubmitExperiment second = MakeExperiment({.client_id = "client-2", .rounds = 1, .arms = 3});
  second.rounds[0].served_by = found[0].round;
  const SubmitResult served = std::get<SubmitResult>(Apply(*store_, second).value);
  EXPECT_TRUE(served.rounds[0].served);
  EXPECT_EQ(StateOf(served.rounds[0].round), RoundState::kServed);
  EXPECT_EQ(reader_->GetRound(served.rounds[0].round)->served_by, found[0].round);
  EXPECT_THAT(*reader_->FindAccepted(query), SizeIs(1)) << "a served round serves no other";
  second.client_id = "client-3";
  second.rounds[0].trials[0].content_key = TestKey(60);
  EXPECT_TRUE(absl::IsInvalidArgument(Apply(*store_, second).status));
}

TEST_P(StoreTest, FailedRowsAreNotServed) {
  const SubmitResult submitted = Submit({.rounds = 1, .arms = 1});
  const uint64_t trial = submitted.rounds[0].trials[0].value();
  AttemptScript script;
  script.Start(trial);
  script.Outcome(trial, OUTCOME_CRASHED);
  script.Finish();
  ASSERT_TRUE(Grant(1, submitted.rounds[0].round).ok());
  Send(1, 1, script.records);
  ASSERT_EQ(TryAccept(1).state, Accept::kAccepted);
  EXPECT_THAT(*reader_->FindAccepted({.content_keys = {TestKey(1)}, .method_version = 1}),
              IsEmpty());
}

TEST_P(StoreTest, RoundsEndWithoutAResult) {
  const SubmitResult submitted = Submit({.rounds = 4});
  ASSERT_TRUE(Grant(1, submitted.rounds[0].round).ok());
  const auto finish = [&](size_t round, FinishRound::State state) {
    return Apply(*store_, FinishRound{.round = submitted.rounds[round].round,
                                      .state = state,
                                      .reason = "the reason"})
        .status;
  };
  EXPECT_TRUE(finish(0, FinishRound::State::kFailed).ok());
  EXPECT_EQ(reader_->GetAttempt(Attempt(1))->state, AttemptState::kVoid);
  EXPECT_EQ(reader_->GetAttempt(Attempt(1))->reason, "the reason");
  EXPECT_TRUE(absl::IsFailedPrecondition(finish(0, FinishRound::State::kFailed)));
  EXPECT_TRUE(finish(1, FinishRound::State::kPoisoned).ok());
  EXPECT_EQ(StateOf(submitted.rounds[0].round), RoundState::kFailed);
  EXPECT_EQ(StateOf(submitted.rounds[1].round), RoundState::kPoisoned);
  EXPECT_EQ(reader_->GetRound(submitted.rounds[1].round)->reason, "the reason");
  const Queue queue = *reader_->LoadQueue();
  EXPECT_EQ(queue.experiments[0].rounds_failed, 1u);
  EXPECT_EQ(queue.experiments[0].rounds_poisoned, 1u);
  EXPECT_TRUE(
      absl::IsNotFound(Apply(*store_, FinishRound{.round = RoundId(999), .reason = ""}).status));
  EXPECT_TRUE(absl::IsFailedPrecondition(Grant(2, submitted.rounds[0].round)));
}

TEST_P(StoreTest, CancelEndsWhatHasNotEnded) {
  const SubmitResult submitted = Submit({.rounds = 3});
  Run(1, submitted.rounds[0]);
  ASSERT_TRUE(Grant(2, submitted.rounds[1].round).ok());
  const OperationResult cancelled =
      Apply(*store_, CancelExperiment{.experiment = submitted.experiment});
  const CancelResult& result = std::get<CancelResult>(cancelled.value);
  EXPECT_THAT(result.rounds, ElementsAre(submitted.rounds[1].round, submitted.rounds[2].round));
  EXPECT_THAT(result.attempts, ElementsAre(Attempt(2)));
  EXPECT_EQ(StateOf(submitted.rounds[0].round), RoundState::kDone);
  EXPECT_EQ(StateOf(submitted.rounds[2].round), RoundState::kCancelled);
  EXPECT_THAT(reader_->LoadQueue()->rounds, IsEmpty());
  EXPECT_THAT(reader_->LoadQueue()->experiments, IsEmpty());
  EXPECT_TRUE(
      absl::IsNotFound(Apply(*store_, CancelExperiment{.experiment = ExperimentId(999)}).status));
}

TEST_P(StoreTest, ARefusedOperationLeavesTheOthersAlone) {
  const SubmitExperiment submit = MakeExperiment({});
  WriteBatch batch;
  batch.operations = {
      submit,
      GrantAttempt{.attempt = Attempt(1), .round = RoundId(1)},
      GrantAttempt{.attempt = Attempt(2), .round = RoundId(1)},  // refused: it runs already
      PutFile{TestKey(1), "not of that digest"},                 // refused
      GrantAttempt{.attempt = Attempt(3), .round = RoundId(2)},
      PutMeta{"key", "value"}};
  const absl::StatusOr<CommitResult> result = store_->Commit(batch);
  ASSERT_TRUE(result.ok()) << result.status();
  std::vector<bool> applied;
  for (const OperationResult& operation : result->operations) {
    applied.push_back(operation.status.ok());
  }
  EXPECT_THAT(applied, ElementsAre(true, true, false, false, true, true));
  EXPECT_EQ(result->Get<SubmitResult>(0).rounds[0].round, RoundId(1));
  EXPECT_EQ(reader_->LoadQueue()->highest_attempt, Attempt(3));
  EXPECT_EQ(*reader_->ReadMeta("key"), std::optional<std::string>("value"));
  EXPECT_EQ(*reader_->ReadMeta("other"), std::nullopt);
}

TEST_P(StoreTest, LogLinesNeedTheirRound) {
  Submit();
  EXPECT_TRUE(Apply(*store_, AddLogLine{.round = RoundId(1), .text = "begun"}).status.ok());
  EXPECT_TRUE(
      absl::IsNotFound(Apply(*store_, AddLogLine{.round = RoundId(9), .text = "x"}).status));
}

INSTANTIATE_TEST_SUITE_P(Both, StoreTest, testing::Values("memory", "sqlite"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvsweep
