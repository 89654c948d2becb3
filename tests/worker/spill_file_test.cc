#include "worker/spill_file.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/file.h"

namespace kvsweep {
namespace {

TEST(DiskSpillFileTest, GivesBackWhatWasWritten) {
  const TempDir folder;
  DiskSpillFile file(folder.path());
  ASSERT_TRUE(file.Write(0, "hello ").ok());
  ASSERT_TRUE(file.Write(6, "world").ok());
  EXPECT_EQ(file.Read(6, 5).value(), "world");
  EXPECT_EQ(file.Read(0, 11).value(), "hello world");
  EXPECT_EQ(file.Read(6, 6).status().code(), absl::StatusCode::kDataLoss);
  file.Clear();
  ASSERT_TRUE(file.Write(0, "again").ok());
  EXPECT_EQ(file.Read(0, 5).value(), "again");
}

TEST(DiskSpillFileTest, LeavesNoNameBehind) {
  const TempDir folder;
  DiskSpillFile file(folder.path());
  ASSERT_TRUE(file.Write(0, "rows").ok());
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(DiskSpillFileTest, AFolderThatIsNotThereIsNamed) {
  DiskSpillFile file("/nowhere");
  const absl::Status status = file.Write(0, "rows");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message().substr(0, 30), "cannot make a file in /nowhere");
}

}  // namespace
}  // namespace kvsweep
