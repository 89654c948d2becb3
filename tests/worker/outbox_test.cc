#include "worker/outbox.h"

#include <gtest/gtest.h>

#include <deque>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "tests/worker/memory_spill_file.h"

namespace kvsweep {
namespace {

// Small enough that every limit is met within a few records.
constexpr OutboxLimits kSmall = {.memory_records = 4,
                                 .memory_bytes = 100,
                                 .spill_records = 3,
                                 .spill_bytes = 60,
                                 .batch_records = 3,
                                 .batch_bytes = 40};

std::vector<std::string> SendAll(Outbox& outbox) {
  std::vector<std::string> sent;
  while (outbox.HasUnsent()) {
    const absl::StatusOr<OutboxBatch> batch = outbox.NextBatch();
    EXPECT_TRUE(batch.ok()) << batch.status();
    if (!batch.ok()) break;
    sent.insert(sent.end(), batch->records.begin(), batch->records.end());
  }
  return sent;
}

TEST(OutboxTest, SequencesCountFromOneWithoutGap) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  EXPECT_EQ(outbox.last_sequence(), 0u);
  EXPECT_EQ(outbox.oldest_unacknowledged(), 0u);
  for (const char* record : {"a", "b", "c", "d"}) ASSERT_TRUE(outbox.Add(record).ok());
  EXPECT_EQ(outbox.oldest_unacknowledged(), 1u);
  EXPECT_EQ(outbox.last_sequence(), 4u);

  absl::StatusOr<OutboxBatch> batch = outbox.NextBatch();
  ASSERT_TRUE(batch.ok());
  EXPECT_EQ(batch->first_sequence, 1u);
  EXPECT_EQ(batch->records, (std::vector<std::string>{"a", "b", "c"}));
  batch = outbox.NextBatch();
  ASSERT_TRUE(batch.ok());
  EXPECT_EQ(batch->first_sequence, 4u);
  EXPECT_EQ(batch->records, (std::vector<std::string>{"d"}));
  EXPECT_FALSE(outbox.HasUnsent());
}

TEST(OutboxTest, ABatchHoldsNoMoreBytesThanAMessage) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  ASSERT_TRUE(outbox.Add(std::string(30, 'a')).ok());
  ASSERT_TRUE(outbox.Add(std::string(11, 'b')).ok());
  EXPECT_EQ(outbox.NextBatch()->records.size(), 1u);
  EXPECT_EQ(outbox.NextBatch()->records.size(), 1u);
  EXPECT_EQ(outbox.Add(std::string(41, 'c')).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(outbox.last_sequence(), 2u);
}

TEST(OutboxTest, PastMemoryItSpillsInOrderAndPastThatItRefuses) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  std::vector<std::string> added;
  for (int i = 0; i < 7; ++i) {
    added.push_back(absl::StrCat("record ", i));
    ASSERT_TRUE(outbox.Add(added.back()).ok());
  }
  EXPECT_EQ(spill.size(), 3 * added[0].size());
  EXPECT_EQ(outbox.Add("x").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(outbox.HasRoom());
  outbox.AddOwn("the session's own record always fits");
  added.push_back("the session's own record always fits");
  EXPECT_EQ(SendAll(outbox), added);

  // Acknowledging in the middle keeps what is spilled; acknowledging it all gives the disk back.
  ASSERT_TRUE(outbox.Acknowledge(5).ok());
  EXPECT_GT(spill.size(), 0u);
  ASSERT_TRUE(outbox.Acknowledge(7).ok());
  EXPECT_EQ(spill.size(), 0u);
  EXPECT_TRUE(outbox.HasRoom());
  ASSERT_TRUE(outbox.Add("y").ok());
  EXPECT_EQ(SendAll(outbox), (std::vector<std::string>{"y"}));
}

TEST(OutboxTest, ARefusedRecordLeavesNoTrace) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(outbox.Add("r").ok());
  const RecordDigest before = outbox.Remaining();
  spill.fail_writes = true;
  EXPECT_EQ(outbox.Add("lost").code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(outbox.Remaining().digest, before.digest);
  EXPECT_EQ(outbox.last_sequence(), 4u);
}

TEST(OutboxTest, AReadErrorIsReportedAndNothingIsSkipped) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(outbox.Add("r").ok());
  ASSERT_TRUE(outbox.NextBatch().ok());
  spill.fail_reads = true;
  EXPECT_EQ(outbox.NextBatch().status().code(), absl::StatusCode::kDataLoss);
  spill.fail_reads = false;
  EXPECT_EQ(outbox.NextBatch()->first_sequence, 4u);
}

TEST(OutboxTest, ResendsFromTheLastAcknowledgement) {
  MemorySpillFile spill;
  Outbox outbox(kSmall, spill);
  for (const char* record : {"a", "b", "c"}) ASSERT_TRUE(outbox.Add(record).ok());
  SendAll(outbox);
  ASSERT_TRUE(outbox.Acknowledge(1).ok());
  ASSERT_TRUE(outbox.Acknowledge(0).ok());  // late, and without effect
  outbox.Rewind();
  EXPECT_EQ(SendAll(outbox), (std::vector<std::string>{"b", "c"}));
  EXPECT_EQ(outbox.Acknowledge(4).code(), absl::StatusCode::kInvalidArgument);
}

TEST(OutboxTest, TheDigestCoversWhatRemainsAfterDiscards) {
  MemorySpillFile spill;
  Outbox outbox({}, spill);
  outbox.BeginTrial();
  ASSERT_TRUE(outbox.Add("first trial").ok());
  outbox.BeginTrial();
  ASSERT_TRUE(outbox.Add("lost").ok());
  outbox.AddDiscard("discard");
  outbox.BeginTrial();
  ASSERT_TRUE(outbox.Add("second trial").ok());
  const RecordDigest remaining = outbox.Remaining();
  EXPECT_EQ(remaining.count, 2u);
  EXPECT_EQ(remaining.digest, DigestBuilder().Add("first trial").Add("second trial").Finish());
  outbox.AddFinish("finish");
  EXPECT_EQ(outbox.last_sequence(), 5u);
}

// Against a plain list of everything ever added: a random run of adds, sends, losses and
// acknowledgements.
TEST(OutboxTest, RandomRunsAgreeWithAPlainList) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    MemorySpillFile spill;
    Outbox outbox(kSmall, spill);
    std::vector<std::string> all;   // [sequence - 1]
    std::vector<std::string> kept;  // what Remaining covers
    size_t kept_at_start = 0;
    uint64_t acknowledged = 0;
    uint64_t sent = 0;
    for (int step = 0; step < 300; ++step) {
      switch (random.Uniform(7)) {
        case 0:
        case 1:
        case 2: {
          const std::string record(1 + random.Uniform(30), static_cast<char>('a' + step % 26));
          if (outbox.Add(record).ok()) {
            all.push_back(record);
            kept.push_back(record);
          } else {
            // Refused only with memory full by count or bytes.
            EXPECT_GE(all.size() - acknowledged, 3u);
          }
          break;
        }
        case 3: {
          const absl::StatusOr<OutboxBatch> batch = outbox.NextBatch();
          ASSERT_TRUE(batch.ok());
          ASSERT_EQ(batch->first_sequence, sent + 1);
          for (const std::string& record : batch->records) ASSERT_EQ(record, all[sent++]);
          break;
        }
        case 4:
          if (sent > acknowledged) acknowledged += random.Uniform(sent - acknowledged + 1);
          ASSERT_TRUE(outbox.Acknowledge(acknowledged).ok());
          break;
        case 5:
          if (random.Bernoulli(0.3)) {
            outbox.Rewind();
            sent = acknowledged;
          }
          break;
        case 6:
          if (random.Bernoulli(0.3)) {
            outbox.AddDiscard("discard");
            all.push_back("discard");
            kept.resize(kept_at_start);
          } else {
            outbox.BeginTrial();
            kept_at_start = kept.size();
          }
          break;
      }
      ASSERT_EQ(outbox.last_sequence(), all.size());
      ASSERT_EQ(outbox.oldest_unacknowledged(), acknowledged == all.size() ? 0 : acknowledged + 1);
    }
    DigestBuilder digest;
    for (const std::string& record : kept) digest.Add(record);
    EXPECT_EQ(outbox.Remaining().count, kept.size());
    EXPECT_EQ(outbox.Remaining().digest, digest.Finish());
  }
}

}  // namespace
}  // namespace kvsweep
