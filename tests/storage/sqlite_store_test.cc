// What only the store in a file can do: survive, be refused, and be read by others meanwhile.
#include "storage/sqlite_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/random.h"
#include "experiments/metrics.h"
#include "storage/query.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

std::unique_ptr<Store> OpenStore(const std::string& path) {
  absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(path);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? *std::move(store) : nullptr;
}

// Copies the database with its write-ahead log, as a crash of the machine would leave it.
void CopyStore(const std::string& from, const std::string& to) {
  for (const std::string suffix : {"", "-wal"}) {
    std::filesystem::copy_file(from + suffix, to + suffix,
                               std::filesystem::copy_options::overwrite_existing);
  }
}

TEST(SqliteStoreTest, WhatWasCommittedIsInACopyTakenAtAnyTurn) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  const std::unique_ptr<Store> store = OpenStore(path);
  const SubmitResult submitted =
      std::get<SubmitResult>(Apply(*store, MakeExperiment({.rounds = 1})).value);
  Apply(*store, GrantAttempt{.attempt = Attempt(1), .round = RoundId(1), .worker_id = "worker"});
  Random random(3);
  const std::vector<std::string> records = AttemptScript::Whole(submitted.rounds[0].trials, random);
  for (size_t i = 0; i < records.size(); ++i) {
    const OperationResult result = Apply(
        *store,
        AppendRecords{.attempt = Attempt(1), .first_sequence = i + 1, .records = {records[i]}});
    ASSERT_EQ(std::get<AppendResult>(result.value).acknowledged_through, i + 1);
    const std::string copy = folder.Join(absl::StrCat("copy-", i, ".db"));
    CopyStore(path, copy);
    const std::unique_ptr<Store> later = OpenStore(copy);
    const std::unique_ptr<StoreReader> reader = *later->OpenReader();
    EXPECT_EQ(*reader->ReadRecords(Attempt(1), 1, 1000),
              std::vector<std::string>(records.begin(), records.begin() + i + 1));
    // It goes on from there, and accepts what it and its predecessor stored.
    const OperationResult rest = Apply(
        *later, AppendRecords{.attempt = Attempt(1), .first_sequence = 1, .records = records});
    EXPECT_EQ(std::get<AppendResult>(rest.value).acknowledged_through, records.size());
    const OperationResult accepted = Apply(*later, AcceptAttempt{.attempt = Attempt(1)});
    EXPECT_EQ(std::get<AcceptResult>(accepted.value).state, AcceptResult::State::kAccepted);
  }
}

// Rows of a void attempt stay for a week; then the rounds that end take them away, one attempt
// each, also after a restart. The attempt itself stays.
TEST(SqliteStoreTest, RowsOfVoidAttemptsArePrunedAfterAWeek) {
  constexpr int64_t kDayNs = int64_t{24} * 3600 * 1'000'000'000;
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  std::unique_ptr<Store> store = OpenStore(path);
  const SubmitResult submitted =
      std::get<SubmitResult>(Apply(*store, MakeExperiment({.rounds = 4})).value);
  Random random(3);
  const auto append = [&](uint64_t attempt, uint64_t round) {
    Apply(*store, GrantAttempt{
                      .attempt = Attempt(attempt), .round = RoundId(round), .worker_id = "worker"});
    Apply(*store, AppendRecords{
                      .attempt = Attempt(attempt),
                      .first_sequence = 1,
                      .records = AttemptScript::Whole(submitted.rounds[round - 1].trials, random)});
  };
  for (uint64_t attempt = 1; attempt <= 2; ++attempt) {
    append(attempt, 1);
    Apply(*store, VoidAttempt{.attempt = Attempt(attempt),
                              .reason = "lost",
                              .voided_unix_ns = static_cast<int64_t>(attempt) * kDayNs});
  }
  const auto rows = [&](uint64_t attempt) {
    return (*store->OpenReader())->ReadRecords(Attempt(attempt), 1, 1000)->size();
  };
  const auto end_round = [&](uint64_t round, int64_t day) {
    append(2 + round, round);
    const OperationResult accepted = Apply(
        *store, AcceptAttempt{.attempt = Attempt(2 + round), .accepted_unix_ns = day * kDayNs});
    EXPECT_EQ(std::get<AcceptResult>(accepted.value).state, AcceptResult::State::kAccepted);
  };
  end_round(1, 7);
  EXPECT_TRUE(rows(1) > 0 && rows(2) > 0) << "six days old";
  store.reset();
  store = OpenStore(path);
  end_round(2, 30);
  EXPECT_TRUE(rows(1) == 0 && rows(2) > 0) << "one attempt for each round";
  end_round(3, 30);
  EXPECT_EQ(rows(2), 0u);
  end_round(4, 60);
  for (uint64_t round = 1; round <= 4; ++round) EXPECT_GT(rows(2 + round), 0u);
  const absl::StatusOr<Table> attempts =
      (*StoreQuery::Open(path, RealClock::Get()))->Run("SELECT state, reason FROM v_attempts", {});
  ASSERT_TRUE(attempts.ok()) << attempts.status();
  EXPECT_THAT(attempts->rows, SizeIs(6));
}

TEST(SqliteStoreTest, AProcessThatDiesWithoutClosingLosesNothing) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(path);
    WriteBatch batch;
    batch.operations.push_back(MakeExperiment({.rounds = 5}));
    _exit(store.ok() && (*store)->Commit(batch).ok() ? 0 : 1);  // no destructor runs
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  const std::unique_ptr<Store> store = OpenStore(path);
  EXPECT_THAT((*store->OpenReader())->LoadQueue()->rounds, SizeIs(5));
}

TEST(SqliteStoreTest, ASecondWriterIsRefusedWhileReadersAreWelcome) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  std::unique_ptr<Store> store = OpenStore(path);
  const absl::Status second = OpenSqliteStore(path).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(second));
  EXPECT_THAT(std::string(second.message()), HasSubstr("another kvsweep process"));
  Apply(*store, MakeExperiment({}));
  EXPECT_THAT((*OpenSqliteReader(path))->LoadQueue()->rounds, SizeIs(2));
  store.reset();
  EXPECT_NE(OpenStore(path), nullptr);
}

TEST(SqliteStoreTest, WhatIsNoStoreIsRefusedWithTheReason) {
  const TempDir folder;
  EXPECT_TRUE(absl::IsNotFound(OpenSqliteReader(folder.Join("absent.db")).status()));

  const std::string text = folder.Join("text.db");
  ASSERT_TRUE(WriteFileAtomic(text, std::string(5000, 'x')).ok());
  const absl::Status not_a_database = OpenSqliteStore(text).status();
  EXPECT_TRUE(absl::IsDataLoss(not_a_database)) << not_a_database;
  EXPECT_THAT(std::string(not_a_database.message()), HasSubstr("not a kvsweep store"));
  EXPECT_EQ(*ReadFile(text, 10'000), std::string(5000, 'x')) << "the file was touched";

  const std::string foreign = folder.Join("foreign.db");
  sqlite3* other = nullptr;
  ASSERT_EQ(sqlite3_open(foreign.c_str(), &other), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(other, "CREATE TABLE t (a)", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(other);
  const absl::Status refused = OpenSqliteStore(foreign).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("another program"));

  const std::string later = folder.Join("later.db");
  OpenStore(later).reset();
  ASSERT_EQ(sqlite3_open(later.c_str(), &other), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(other, "PRAGMA user_version = 99", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(other);
  EXPECT_THAT(std::string(OpenSqliteStore(later).status().message()), HasSubstr("version"));
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenSqliteReader(later).status()));
}

// Bytes changed anywhere: the file is refused, or what it gives passes the same checks as ever.
TEST(SqliteStoreTest, ADamagedFileIsRefusedOrStillSound) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  std::unique_ptr<Store> store = OpenStore(path);
  Apply(*store, MakeExperiment({.rounds = 50}));
  store.reset();
  const std::string sound = *ReadFile(path, 64 * limits::kMiB);
  const uint64_t seed = EntropySeed() % 1'000'000;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  int refused = 0;
  for (int i = 0; i < 60; ++i) {
    std::string damaged = sound;
    if (i % 3 == 0) damaged.resize(4096 * random.Uniform(damaged.size() / 4096));
    for (int flips = 0; flips < 40 && !damaged.empty(); ++flips) {
      damaged[random.Uniform(damaged.size())] = static_cast<char>(random.Next64());
    }
    ASSERT_TRUE(WriteFileAtomic(path, damaged).ok());
    absl::StatusOr<std::unique_ptr<Store>> opened = OpenSqliteStore(path);
    if (!opened.ok()) {
      ++refused;
      EXPECT_NE(opened.status().message(), "");
      continue;
    }
    absl::StatusOr<std::unique_ptr<StoreReader>> reader = (*opened)->OpenReader();
    if (!reader.ok()) continue;
    const absl::StatusOr<Queue> queue = (*reader)->LoadQueue();
    EXPECT_LE(queue.ok() ? queue->rounds.size() : 0, 50u);
  }
  EXPECT_GT(refused, 0);
}

// The metrics' table and the file's columns cannot drift apart.
TEST(SqliteStoreTest, EveryMetricIsAColumnOfTheWideView) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  const std::unique_ptr<Store> store = OpenStore(path);
  const Table empty =
      *(*StoreQuery::Open(path, RealClock::Get()))->Run("SELECT * FROM v_trials", QueryLimits());
  for (const std::vector<MetricInfo>* metrics : {&Metrics(), &QualityMetrics()}) {
    for (const MetricInfo& metric : *metrics) {
      EXPECT_THAT(empty.columns, testing::Contains(metric.name));
    }
  }
}

// Every scalar field of a measurement has its column, so that nothing sent is lost in silence.
TEST(SqliteStoreTest, EveryFieldOfARequestIsAColumn) {
  const TempDir folder;
  const std::string path = folder.Join("store.db");
  const std::unique_ptr<Store> store = OpenStore(path);
  const Table columns =
      *(*StoreQuery::Open(path, RealClock::Get()))->Run("SELECT * FROM request", QueryLimits());
  // record_id and trial_id beside the fields.
  EXPECT_EQ(columns.columns.size(),
            static_cast<size_t>(RequestRow::descriptor()->field_count()) + 2);
}

}  // namespace
}  // namespace kvsweep
