// How fast request rows become durable: prints rows per second by rows in a commit, and checks that
// all of them are there. Speeds are for people to read; nothing here fails for being slow.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <numeric>

#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "storage/record_tables.h"
#include "storage/sqlite_store.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

// A row as a serving trial has it: plausible times, 24 token gaps, some 200 bytes.
Record PlausibleRequest(Random& random, uint64_t trial_id, uint32_t index) {
  Record record;
  record.set_trial_id(trial_id);
  RequestRow& row = *record.mutable_request();
  row.set_index(index);
  row.set_prompt_tokens(static_cast<uint32_t>(100 + random.Uniform(1000)));
  row.set_output_tokens(25);
  row.set_scheduled_ns(static_cast<int64_t>(random.Uniform(100 * kNsPerSecond)));
  row.set_issued_ns(row.scheduled_ns() + 20 * kNsPerUs);
  row.set_admitted_ns(row.issued_ns() + kNsPerMs);
  row.set_first_token_ns(row.admitted_ns() + 50 * kNsPerMs);
  for (int i = 0; i < 24; ++i) row.add_token_gap_ns(10 * kNsPerMs + random.Uniform(5 * kNsPerMs));
  row.set_finished_ns(row.first_token_ns() + 24 * 12 * kNsPerMs);
  row.set_entries_attended(random.Uniform(1'000'000));
  row.set_entries_full(1'000'000);
  row.set_kv_device_bytes_peak(random.Uniform(1 << 22));
  row.set_output_digest(random.Next64());
  return record;
}

void Measure(uint64_t rows_per_commit, uint64_t rows) {
  const TempDir folder;
  const std::unique_ptr<Store> store = *OpenSqliteStore(folder.Join("store.db"));
  const SubmitResult submitted =
      std::get<SubmitResult>(Apply(*store, MakeExperiment({.rounds = 1, .arms = 1})).value);
  Apply(*store, GrantAttempt{.attempt = Attempt(1), .round = RoundId(1)});
  Random random(1);
  std::vector<WriteBatch> batches;
  uint64_t bytes = 0;
  for (uint64_t sequence = 1; sequence <= rows;) {
    WriteBatch& batch = batches.emplace_back();
    for (uint64_t end = sequence + rows_per_commit; sequence < end;) {
      AppendRecords append{.attempt = Attempt(1), .first_sequence = sequence};
      for (uint64_t last = std::min(end, sequence + 256); sequence < last; ++sequence) {
        SerializeRecord(PlausibleRequest(random, submitted.rounds[0].trials[0].value(),
                                         static_cast<uint32_t>(sequence)),
                        &append.records.emplace_back());
        bytes += append.records.back().size();
      }
      batch.operations.push_back(std::move(append));
    }
  }
  const Clock& clock = RealClock::Get();
  const int64_t start_ns = clock.NowNs();
  for (const WriteBatch& batch : batches) ASSERT_TRUE(store->Commit(batch).ok());
  const double seconds = static_cast<double>(clock.NowNs() - start_ns) / kNsPerSecond;
  const uint64_t stored = (*store->OpenReader())->GetAttempt(Attempt(1))->last_sequence;
  EXPECT_EQ(stored, batches.size() * rows_per_commit);
  std::printf("%6lu rows a commit: %8.0f rows/s (%lu rows of %.0f bytes in %.2f s)\n",
              rows_per_commit, static_cast<double>(stored) / seconds, stored,
              static_cast<double>(bytes) / static_cast<double>(stored), seconds);
}

TEST(AppendSpeedTest, RowsPerSecond) {
  Measure(1, 100);
  Measure(32, 3'200);
  Measure(1'024, 100'000);
  Measure(8'192, 200'000);
}

}  // namespace
}  // namespace kvsweep
