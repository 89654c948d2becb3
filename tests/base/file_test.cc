#include "base/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>

#include "base/check.h"

namespace kvsweep {
namespace {

TEST(ReadFile, ReadsUpToTheBoundAndNotPastIt) {
  const TempDir dir;
  const std::string path = dir.Join("file");
  KVSWEEP_CHECK_OK(WriteFileAtomic(path, "12345"));
  EXPECT_EQ(*ReadFile(path, 5), "12345");
  const auto too_large = ReadFile(path, 4);
  EXPECT_EQ(too_large.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(too_large.status().message().find(path), absl::string_view::npos);
}

// Such files say that they are empty; the bound must hold all the same.
TEST(ReadFile, ReadsFilesThatDoNotKnowTheirSize) {
  EXPECT_FALSE(ReadFile("/proc/self/maps", 1 << 20)->empty());
  EXPECT_EQ(ReadFile("/dev/zero", 1 << 20).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ReadFile, ErrorsAreStatuses) {
  const TempDir dir;
  EXPECT_EQ(ReadFile(dir.Join("none"), 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(ReadFile(dir.path(), 1 << 20).ok());  // a folder
}

TEST(WriteFileAtomic, ReplacesTheContentAndLeavesNothingBeside) {
  const TempDir dir;
  KVSWEEP_CHECK_OK(WriteFileAtomic(dir.Join("file"), "old"));
  KVSWEEP_CHECK_OK(WriteFileAtomic(dir.Join("file"), std::string("n\0w", 3)));
  EXPECT_EQ(*ReadFile(dir.Join("file"), 10), std::string("n\0w", 3));
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(dir.path()))
    ++files;
  EXPECT_EQ(files, 1);
}

TEST(WriteFileAtomic, FailureKeepsTheOldContent) {
  const TempDir dir;
  std::filesystem::create_directory(dir.Join("folder"));
  EXPECT_FALSE(WriteFileAtomic(dir.Join("folder"), "x").ok());
  EXPECT_FALSE(WriteFileAtomic(dir.Join("missing/file"), "x").ok());
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(dir.path()))
    ++files;
  EXPECT_EQ(files, 1);  // the folder; no temporary file
}

TEST(MappedFile, ShowsTheBytesAndMoves) {
  const TempDir dir;
  KVSWEEP_CHECK_OK(WriteFileAtomic(dir.Join("file"), "abc"));
  auto opened = MappedFile::Open(dir.Join("file"), 3);
  ASSERT_TRUE(opened.ok());
  MappedFile mapped = *std::move(opened);
  ASSERT_EQ(mapped.bytes().size(), 3u);
  EXPECT_EQ(mapped.bytes()[2], 'c');
  MappedFile other;
  other = std::move(mapped);
  EXPECT_EQ(other.bytes()[0], 'a');
}

TEST(MappedFile, RefusesLargeFilesAndFoldersAndTakesEmptyOnes) {
  const TempDir dir;
  KVSWEEP_CHECK_OK(WriteFileAtomic(dir.Join("file"), "abc"));
  KVSWEEP_CHECK_OK(WriteFileAtomic(dir.Join("empty"), ""));
  EXPECT_EQ(MappedFile::Open(dir.Join("file"), 2).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(MappedFile::Open(dir.path(), 100).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(MappedFile::Open(dir.Join("empty"), 0)->bytes().empty());
}

TEST(TempDir, GoesWithItsContent) {
  std::string path;
  {
    const TempDir dir;
    path = dir.path();
    std::filesystem::create_directories(dir.Join("a/b"));
    EXPECT_TRUE(std::filesystem::exists(path));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace kvsweep
