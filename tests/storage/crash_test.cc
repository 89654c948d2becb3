// The power fails at every write, sync and deletion of a scripted experiment, in turn. What the
// disk then holds must open, and must be what was acknowledged, or that and the one batch that was
// being committed: never less, never a part.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/file.h"
#include "storage/memory_store.h"
#include "storage/sqlite_store.h"
#include "tests/storage/crash_vfs.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

// The batches of the script; ids are known, since the store counts from 1.
std::vector<WriteBatch> Script() {
  std::vector<WriteBatch> script;
  const auto turn = [&](std::vector<Operation> operations) {
    script.push_back({std::move(operations)});
  };
  Random random(11);
  turn({MakeExperiment({.rounds = 3, .arms = 2})});
  turn({GrantAttempt{.attempt = Attempt(1), .round = RoundId(1)},
        GrantAttempt{.attempt = Attempt(2), .round = RoundId(2)}});
  const std::vector<std::string> first = AttemptScript::Whole({TrialId(1), TrialId(2)}, random, 40);
  const std::vector<std::string> second = AttemptScript::Whole({TrialId(3), TrialId(4)}, random, 5);
  for (size_t at = 0; at < first.size(); at += 20) {
    AppendRecords append{.attempt = Attempt(1), .first_sequence = at + 1};
    append.records.assign(first.begin() + static_cast<int64_t>(at),
                          first.begin() + static_cast<int64_t>(std::min(at + 20, first.size())));
    turn({append});
  }
  turn({AppendRecords{.attempt = Attempt(2), .first_sequence = 1, .records = second},
        AcceptAttempt{.attempt = Attempt(1)}});
  turn({VoidAttempt{.attempt = Attempt(2), .reason = "lost", .worker_lost = true}});
  turn({GrantAttempt{.attempt = Attempt(3), .round = RoundId(2)}, PutMeta{"incarnation", "2"}});
  turn({AppendRecords{.attempt = Attempt(3), .first_sequence = 1, .records = second}});
  turn({AcceptAttempt{.attempt = Attempt(3)}});
  turn({CancelExperiment{.experiment = ExperimentId(1)}});
  return script;
}
constexpr size_t kReopenAfter = 5;  // closing copies the log into the file

// All that the script can change.
std::string Fingerprint(Store& store) {
  const std::unique_ptr<StoreReader> reader = *store.OpenReader();
  std::string text;
  for (uint64_t round = 1; round <= 3; ++round) {
    const absl::StatusOr<StoredRound> stored = reader->GetRound(RoundId(round));
    absl::StrAppend(&text, stored.ok() ? RoundStateName(stored->state) : "none", " ");
  }
  for (uint64_t attempt = 1; attempt <= 3; ++attempt) {
    const absl::StatusOr<StoredAttempt> stored = reader->GetAttempt(Attempt(attempt));
    const std::vector<std::string> records = *reader->ReadRecords(Attempt(attempt), 1, 1000);
    absl::StrAppend(&text, stored.ok() ? AttemptStateName(stored->state) : "none", ":",
                    stored.ok() ? stored->last_sequence : 0, ":", records.size(), ":",
                    std::hash<std::string>()(absl::StrJoin(records, "|")), " ");
  }
  return absl::StrCat(text, reader->ReadMeta("incarnation")->value_or("-"));
}

// Fingerprints before the first batch and after each, by the store in memory.
std::vector<std::string> Expected() {
  const std::unique_ptr<Store> memory = NewMemoryStore();
  std::vector<std::string> fingerprints = {Fingerprint(*memory)};
  for (const WriteBatch& batch : Script()) {
    EXPECT_TRUE(memory->Commit(batch).ok());
    fingerprints.push_back(Fingerprint(*memory));
  }
  return fingerprints;
}

// Plays the script until the power fails; how many batches were acknowledged.
size_t Play(const std::vector<WriteBatch>& script, const std::string& path) {
  size_t acknowledged = 0;
  absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(path);
  for (const WriteBatch& batch : script) {
    if (acknowledged == kReopenAfter) {
      store->reset();
      store = OpenSqliteStore(path);
    }
    if (!store.ok() || !(*store)->Commit(batch).ok()) break;
    ++acknowledged;
  }
  return acknowledged;
}

TEST(CrashTest, PowerFailsAtEveryWrite) {
  const std::vector<WriteBatch> script = Script();
  const std::vector<std::string> expected = Expected();
  ASSERT_NE(expected[expected.size() - 1], expected[expected.size() - 2]);
  const uint64_t seed = EntropySeed() % 1'000'000;
  Random random(seed);
  uint64_t points = 0, in_flight_kept = 0;
  for (uint64_t crash_at = 1;; ++crash_at) {
    const TempDir disk;
    const TempDir after;
    size_t acknowledged = 0;
    std::vector<std::string> images;
    bool crashed = false;
    {
      CrashVfs vfs;
      vfs.Arm(crash_at);
      acknowledged = Play(script, disk.Join("store.db"));
      crashed = vfs.crashed();
      for (const CrashVfs::Fate fate :
           {CrashVfs::Fate::kDropped, CrashVfs::Fate::kPrefix, CrashVfs::Fate::kAnySubset}) {
        images.push_back(after.Join(absl::StrCat(images.size())));
        std::filesystem::create_directory(images.back());
        vfs.WriteImage(disk.path(), images.back(), fate, random);
      }
    }
    if (!crashed) break;  // the whole script ran
    ++points;
    for (const std::string& image : images) {
      SCOPED_TRACE(absl::StrCat("seed ", seed, " crash at call ", crash_at, ", ", acknowledged,
                                " acknowledged, image ", image));
      absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(image + "/store.db");
      ASSERT_TRUE(store.ok()) << store.status();
      const std::string found = Fingerprint(**store);
      const bool next = acknowledged + 1 < expected.size() && found == expected[acknowledged + 1];
      ASSERT_TRUE(found == expected[acknowledged] || next) << found << "\nexpected\n"
                                                           << expected[acknowledged];
      in_flight_kept += next;
      // It takes up its work: the batch that was not acknowledged can be sent again.
      ASSERT_TRUE((*store)->Commit({.operations = {PutMeta{"after", "crash"}}}).ok());
    }
  }
  std::printf("%lu crash points, 3 images each; the batch in flight was kept in %lu\n", points,
              in_flight_kept);
  EXPECT_GT(points, 50u);
}

}  // namespace
}  // namespace kvsweep
