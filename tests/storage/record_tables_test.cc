#include "storage/record_tables.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/random.h"
#include "storage/record_audit.h"
#include "storage/schema_sql.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

std::unique_ptr<Database> NewDatabase(const TempDir& folder) {
  std::unique_ptr<Database> database =
      *Database::Open(folder.Join("records.db"), Database::Mode::kReadWriteCreate);
  EXPECT_TRUE(database->Execute(k_schema_sql).ok());
  return database;
}

// Signed zeros, the largest counts, texts with NUL: whatever passes ParseRecord comes back as it
// was.
TEST(RecordTablesTest, RecordsComeBackByteForByte) {
  const uint64_t seed = EntropySeed() % 1'000'000;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  const TempDir folder;
  const std::unique_ptr<Database> database = NewDatabase(folder);
  RecordWriter writer = *RecordWriter::Create(*database);
  ASSERT_TRUE(database->Execute("BEGIN").ok());
  std::vector<std::string> sent;
  for (uint64_t sequence = 1; sequence <= 3000; ++sequence) {
    std::string bytes;
    SerializeRecord(RandomRecord(random, 1 + random.Uniform(3)), &bytes);
    Record parsed;
    const absl::Status sound = ParseRecord(bytes, &parsed);
    ASSERT_TRUE(sound.ok()) << sound << parsed.ShortDebugString();
    ASSERT_TRUE(writer.Insert(RecordId(Attempt(7), sequence), parsed).ok());
    sent.push_back(bytes);
  }
  ASSERT_TRUE(database->Execute("COMMIT").ok());
  RecordCursor cursor =
      *RecordCursor::Open(*database, RecordId(Attempt(7), 1), RecordId(Attempt(7), kMaxSequence));
  Record record;
  std::string bytes;
  int64_t record_id = 0;
  for (size_t i = 0; i < sent.size(); ++i) {
    ASSERT_TRUE(*cursor.Next(&record_id, &record));
    EXPECT_EQ(record_id, RecordId(Attempt(7), i + 1));
    SerializeRecord(record, &bytes);
    ASSERT_EQ(bytes, sent[i]) << record.ShortDebugString();
  }
  EXPECT_FALSE(*cursor.Next(&record_id, &record));
}

TEST(RecordTablesTest, ACursorReadsItsRangeOnly) {
  const TempDir folder;
  const std::unique_ptr<Database> database = NewDatabase(folder);
  RecordWriter writer = *RecordWriter::Create(*database);
  Random random(1);
  for (const uint64_t attempt : {6, 7, 8}) {
    for (uint64_t sequence = 1; sequence <= 4; ++sequence) {
      ASSERT_TRUE(
          writer.Insert(RecordId(Attempt(attempt), sequence), RandomRecord(random, 1)).ok());
    }
  }
  RecordCursor cursor =
      *RecordCursor::Open(*database, RecordId(Attempt(7), 2), RecordId(Attempt(7), kMaxSequence));
  std::vector<int64_t> ids;
  Record record;
  for (int64_t id = 0; *cursor.Next(&id, &record);) ids.push_back(id);
  EXPECT_THAT(ids, testing::ElementsAre(RecordId(Attempt(7), 2), RecordId(Attempt(7), 3),
                                        RecordId(Attempt(7), 4)));
}

TEST(RecordTablesTest, VarintsThatAreCutAreDataLoss) {
  google::protobuf::RepeatedField<uint64_t> values;
  for (const uint64_t value : {uint64_t{0}, uint64_t{127}, uint64_t{128}, ~uint64_t{0}}) {
    values.Add(value);
  }
  std::string bytes;
  AppendVarints(values, &bytes);
  google::protobuf::RepeatedField<uint64_t> again;
  ASSERT_TRUE(ReadVarints(bytes, &again).ok());
  EXPECT_THAT(again, testing::ElementsAreArray(values));
  bytes.pop_back();
  EXPECT_TRUE(absl::IsDataLoss(ReadVarints(bytes, &again)));
}

}  // namespace
}  // namespace kvsweep
