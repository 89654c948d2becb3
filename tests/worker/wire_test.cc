#include "worker/wire.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "base/limits.h"

namespace kvsweep {
namespace {

TEST(WireTest, EqualRecordsHaveEqualBytes) {
  // Maps have no order of their own; enough entries that hashing would show.
  Record a;
  Record b;
  for (int i = 0; i < 50; ++i)
    (*a.mutable_start()->mutable_facts())[absl::StrCat("fact ", i)] = "x";
  for (int i = 50; i-- > 0;) (*b.mutable_start()->mutable_facts())[absl::StrCat("fact ", i)] = "x";
  EXPECT_EQ(SerializeRecord(a), SerializeRecord(b));
  EXPECT_FALSE(SerializeRecord(a).empty());
}

TEST(WireTest, OwnRecordsSayWhatTheSessionSaid) {
  const ProtoRecordEncoder encoder;
  Record record;
  ASSERT_TRUE(
      record.ParseFromString(encoder.EncodeOutcome({.trial = TrialId(11),
                                                    .verdict = RecordEncoder::Verdict::kCrashed,
                                                    .evidence = "three deaths",
                                                    .phase = "measure",
                                                    .signal = 6,
                                                    .log_tail = "abort"})));
  EXPECT_EQ(record.trial_id(), 11u);
  EXPECT_EQ(record.outcome().outcome(), OUTCOME_CRASHED);
  EXPECT_EQ(record.outcome().signal(), 6);
  EXPECT_EQ(record.outcome().log_tail(), "abort");
  ASSERT_TRUE(record.ParseFromString(encoder.EncodeDiscard(TrialId(11), "died")));
  EXPECT_EQ(record.discard().reason(), "died");
  ASSERT_TRUE(record.ParseFromString(encoder.EncodeFinish({.count = 3, .digest = Sha256("x")})));
  EXPECT_EQ(record.finish().count(), 3u);
  EXPECT_EQ(record.finish().digest(), std::string(Sha256("x").bytes()));
}

// A runner may write anything to stderr; what is sent is text, and bounded.
TEST(WireTest, TextOfARunnerIsBoundedAndValid) {
  Record record;
  ASSERT_TRUE(record.ParseFromString(ProtoRecordEncoder().EncodeOutcome(
      {.trial = TrialId(1), .log_tail = std::string(100'000, 'x') + "\xff\xc3 end"})));
  EXPECT_LE(record.outcome().log_tail().size(), static_cast<size_t>(limits::kEvidenceBytes));
  EXPECT_TRUE(record.outcome().log_tail().ends_with("x?? end"));
}

TEST(WireTest, ARunnerMayNotFinishOrDiscard) {
  RecordBatch batch;
  batch.add_records()->mutable_request();
  batch.add_records()->mutable_outcome();
  const auto records = RecordsFromRunner(batch);
  ASSERT_TRUE(records.ok());
  EXPECT_FALSE((*records)[0].is_outcome);
  EXPECT_TRUE((*records)[1].is_outcome);
  batch.add_records()->mutable_finish();
  EXPECT_FALSE(RecordsFromRunner(batch).ok());
  batch.mutable_records(2)->mutable_discard();
  EXPECT_FALSE(RecordsFromRunner(batch).ok());
  batch.mutable_records(2)->clear_discard();
  EXPECT_FALSE(RecordsFromRunner(batch).ok());
}

TEST(WireTest, LimitsHaveTheSchemasDefaults) {
  RoundSpec round;
  round.add_trials()->set_trial_id(1);
  round.add_trials()->set_trial_id(2);
  round.mutable_trials(1)->mutable_spec()->mutable_limits()->set_trial(5 * kNsPerSecond);
  round.add_trials()->set_trial_id(3);
  round.mutable_trials(2)->mutable_spec()->mutable_limits()->set_trial(~uint64_t{0});
  const SessionRound session_round = RoundFromWire(round);
  EXPECT_EQ(session_round.trials[0].limit_ns, 1200 * kNsPerSecond);
  EXPECT_EQ(session_round.trials[1].limit_ns, 605 * kNsPerSecond);
  EXPECT_GT(session_round.trials[2].limit_ns, 0);
}

TEST(WireTest, ARoundThatIsNoneIsRefused) {
  EXPECT_FALSE(ParseRound("\xff\xff").ok());
  RoundSpec round;
  round.add_trials();
  EXPECT_FALSE(ParseRound(round.SerializeAsString()).ok());
  round.mutable_trials(0)->set_trial_id(1);
  EXPECT_TRUE(ParseRound(round.SerializeAsString()).ok());
}

TEST(WireTest, ReportsKeepEveryField) {
  SessionReport report{.generation = 4, .draining = true, .unhealthy_reason = "no device"};
  report.slots.resize(2);
  report.slots[1].holding = HeldAttempt{.attempt = Attempt(5),
                                        .phase = HeldAttempt::Phase::kAbandoned,
                                        .trial = TrialId(11),
                                        .trial_phase = "measure",
                                        .done = 2,
                                        .total = 9,
                                        .oldest_unacknowledged = 3,
                                        .last_sequence = 8,
                                        .reason = "told"};
  WorkerState state;
  ReportToWire(report, &state);
  EXPECT_EQ(state.generation(), 4u);
  EXPECT_TRUE(state.draining());
  EXPECT_EQ(state.unhealthy_reason(), "no device");
  ASSERT_EQ(state.slots_size(), 2);
  EXPECT_FALSE(state.slots(0).has_holding());
  const Holding& holding = state.slots(1).holding();
  EXPECT_EQ(holding.attempt(), 5u);
  EXPECT_EQ(holding.phase(), Holding::PHASE_ABANDONED);
  EXPECT_EQ(holding.trial_phase(), "measure");
  EXPECT_EQ(holding.oldest_unacknowledged(), 3u);
  EXPECT_EQ(holding.last_sequence(), 8u);
  EXPECT_EQ(holding.reason(), "told");
}

}  // namespace
}  // namespace kvsweep
