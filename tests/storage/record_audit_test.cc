#include "storage/record_audit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/limits.h"
#include "storage/record_tables.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string Bytes(const Record& record) {
  std::string bytes;
  SerializeRecord(record, &bytes);
  return bytes;
}

absl::Status Parse(const std::string& bytes) {
  Record record;
  return ParseRecord(bytes, &record);
}

TEST(ParseRecordTest, NamesWhatIsWrong) {
  Record record;
  record.set_trial_id(1);
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("no body"));
  record.mutable_request()->set_status(static_cast<RequestRow::Status>(9));
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("request status"));
  record.mutable_outcome()->set_outcome(static_cast<Outcome>(99));
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("outcome"));
  record.mutable_finish()->set_digest("short");
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("32-byte digest"));
  record.mutable_sample()->set_name("step_ns");
  record.mutable_sample()->set_value(HUGE_VAL);
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("inf in step_ns"));
  record.mutable_quality()->set_dropped_kl_sum(std::nan(""));
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("finite"));
  record.mutable_outcome()->set_asked_bytes(uint64_t{1} << 63);
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("9223372036854775808"));
  record.mutable_discard();
  record.set_trial_id(uint64_t{1} << 63);
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("trial id"));
  record.set_trial_id(1);
  EXPECT_TRUE(Parse(Bytes(record)).ok());
  // Field 1000, unknown here: a later version's worker, whose record we could not give back.
  EXPECT_THAT(std::string(Parse(Bytes(record) + "\xc0\x3e\x01").message()),
              HasSubstr("does not know"));
  EXPECT_THAT(std::string(Parse(Bytes(record) + Bytes(record)).message()),
              HasSubstr("deterministic form"));
  record.mutable_discard()->set_reason(std::string(limits::kMessageBytes, 'x'));
  EXPECT_THAT(std::string(Parse(Bytes(record)).message()), HasSubstr("longer than"));
}

// A map whose entries come in another order is the same message, but not the same bytes.
TEST(ParseRecordTest, MapsMustBeSorted) {
  Record record;
  record.set_trial_id(1);
  (*record.mutable_start()->mutable_facts())["a"] = "1";
  const std::string first = Bytes(record).substr(4);  // the entry behind the tags and lengths
  record.mutable_start()->clear_facts();
  (*record.mutable_start()->mutable_facts())["b"] = "2";
  const std::string second = Bytes(record).substr(4);
  const std::string head = std::string("\x08\x01\x12") + static_cast<char>(2 * first.size());
  EXPECT_TRUE(Parse(head + first + second).ok());
  EXPECT_FALSE(Parse(head + second + first).ok());
}

class AttemptAuditTest : public testing::Test {
 protected:
  static TrialSpec Spec(TrialSpec::Kind kind) {
    TrialSpec spec;
    spec.set_kind(kind);
    spec.mutable_arm()->set_strategy("h2o");
    return spec;
  }
  absl::StatusOr<std::vector<TrialAccount>> Audit(const std::vector<std::string>& records) {
    AttemptAudit audit({{5, Spec(TrialSpec::KIND_LOAD)}, {6, Spec(TrialSpec::KIND_LOAD)}});
    for (const std::string& bytes : records) {
      Record record;
      EXPECT_TRUE(ParseRecord(bytes, &record).ok());
      if (const absl::Status fits = audit.Add(bytes, record); !fits.ok()) return fits;
    }
    return audit.Judge();
  }
  Random random_{1};
};

TEST_F(AttemptAuditTest, TrialsRunInAnyOrderAndKeepTheirRange) {
  const auto accounts = Audit(AttemptScript::Whole({TrialId(6), TrialId(5)}, random_, 3));
  ASSERT_TRUE(accounts.ok()) << accounts.status();
  ASSERT_THAT(*accounts, SizeIs(2));
  EXPECT_EQ((*accounts)[0].trial_id, 6u);
  EXPECT_EQ((*accounts)[0].first_sequence, 1u);
  EXPECT_EQ((*accounts)[0].last_sequence, 5u);
  EXPECT_EQ((*accounts)[1].first_sequence, 6u);
  EXPECT_EQ((*accounts)[1].metrics.size(), Metrics().size());
}

// What was measured before a discard is neither counted, nor digested, nor summed up.
TEST_F(AttemptAuditTest, ADiscardedExecutionLeavesNoTrace) {
  AttemptScript script;
  script.Start(5);
  script.Outcome(5);
  script.Start(6);
  script.Requests(6, random_, 4);
  script.Discard(6);
  script.Start(6, 2);
  script.Requests(6, random_, 2);
  script.Outcome(6);
  script.Finish();
  const auto accounts = Audit(script.records);
  ASSERT_TRUE(accounts.ok()) << accounts.status();
  EXPECT_EQ((*accounts)[1].first_sequence, 9u);
  EXPECT_EQ((*accounts)[1].start.execution(), 2u);

  Random again(7), once(7);
  AttemptScript plain;
  plain.Start(5);
  plain.Outcome(5);
  plain.Start(6);
  plain.Requests(6, once, 2);
  plain.Outcome(6);
  plain.Finish();
  AttemptScript repeated;
  repeated.Start(5);
  repeated.Outcome(5);
  repeated.Start(6);
  repeated.Requests(6, random_, 9);
  repeated.Discard(6);
  repeated.Start(6, 2);
  repeated.Requests(6, again, 2);
  repeated.Outcome(6);
  repeated.Finish();
  EXPECT_EQ((*Audit(repeated.records))[1].metrics, (*Audit(plain.records))[1].metrics);
}

TEST_F(AttemptAuditTest, QualityTrialsAreSummedByWindow) {
  AttemptAudit audit({{5, Spec(TrialSpec::KIND_QUALITY)}});
  AttemptScript script;
  script.Start(5);
  Record window;
  window.set_trial_id(5);
  window.mutable_quality()->set_scored_tokens(10);
  window.mutable_quality()->set_nll_sum(20);
  window.mutable_quality()->set_reference_nll_sum(20);
  script.Add(window);
  script.Outcome(5);
  script.Finish();
  for (const std::string& bytes : script.records) {
    Record record;
    ASSERT_TRUE(ParseRecord(bytes, &record).ok());
    ASSERT_TRUE(audit.Add(bytes, record).ok());
  }
  const auto accounts = audit.Judge();
  ASSERT_TRUE(accounts.ok()) << accounts.status();
  const auto& metrics = (*accounts)[0].metrics;
  const auto ppl = std::find_if(metrics.begin(), metrics.end(),
                                [](const SummaryMetric& metric) { return metric.name == "ppl"; });
  ASSERT_NE(ppl, metrics.end());
  EXPECT_NEAR(ppl->value.value(), std::exp(2.0), 1e-9);
}

// The end of a crashed trial may come without any start; everything else needs its context.
TEST_F(AttemptAuditTest, OnlyAnOutcomeMayComeWithoutAStart) {
  AttemptScript script;
  script.Start(5);
  script.Outcome(5);
  script.Discard(6);
  script.Outcome(6, OUTCOME_CRASHED);
  script.Finish();
  // A discard as a trial's first record has nothing to drop.
  EXPECT_TRUE(absl::IsInvalidArgument(Audit({script.records.back()}).status()));
  AttemptScript bare;
  bare.Start(5);
  bare.Outcome(5);
  bare.Outcome(6, OUTCOME_CRASHED);
  bare.Finish();
  EXPECT_TRUE(Audit(bare.records).ok());
}

}  // namespace
}  // namespace kvsweep
