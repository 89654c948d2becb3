#include "worker/round_files.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "experiments/files.h"

namespace kvsweep {
namespace {

namespace fs = std::filesystem;

std::string MakeModel(const std::string& folder, const std::string& config) {
  fs::create_directories(folder);
  EXPECT_TRUE(WriteFileAtomic(folder + "/config.json", config).ok());
  return folder;
}

FileReference FileOf(const std::string& path, const std::string& content) {
  FileReference file;
  file.set_path(path);
  file.set_digest(std::string(Sha256(content).bytes()));
  file.set_bytes(content.size());
  return file;
}

// Serves one content, whatever is asked for, and counts.
struct OneContent {
  std::string content;
  int fetches = 0;
  FileCache::Fetch Fetch() {
    return [this](const FileReference&) {
      ++fetches;
      return content;
    };
  }
};

TEST(ModelShelfTest, FindsModelsInEveryLayout) {
  const TempDir folder;
  const std::string plain = MakeModel(folder.Join("plain"), "{\"a\": 1}");
  const std::string cached =
      MakeModel(folder.Join("models--org--name/snapshots/0123"), "{\"b\": 1}");
  const std::string alone = MakeModel(folder.Join("deep/alone"), "{\"c\": 1}");
  fs::create_directories(folder.Join("no-model"));
  ModelShelf shelf({folder.path(), alone, "/nowhere"}, folder.Join("cache"));
  EXPECT_TRUE(shelf.Scan());
  EXPECT_FALSE(shelf.Scan());
  ASSERT_EQ(shelf.models().size(), 3u);
  for (const std::string& path : {plain, cached, alone}) {
    EXPECT_EQ(shelf.Find(*DescribeModelFolder(path)).value(), path);
  }
}

TEST(ModelShelfTest, SaysWhatIsHeldUnderTheNameInstead) {
  const TempDir folder;
  const std::string path = MakeModel(folder.Join("model"), "{}");
  ModelShelf shelf({folder.path()}, folder.Join("cache"));
  shelf.Scan();
  ModelReference other;
  other.set_name("model");
  other.set_digest(std::string(32, 'x'));
  const absl::Status status = shelf.Find(other).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat(path, " has digest "))) << status;
}

// A kept digest is used as long as the files stay as they are, and no longer.
TEST(ModelShelfTest, AChangedFileIsDigestedAnew) {
  const TempDir folder;
  const std::string path = MakeModel(folder.Join("model"), "{}");
  const std::string cache = folder.Join("cache");
  ModelShelf(std::vector<std::string>{folder.path()}, cache).Scan();
  ASSERT_EQ(std::distance(fs::directory_iterator(cache + "/models"), fs::directory_iterator()), 1);
  MakeModel(path, "{\"changed\": true}");
  ModelShelf shelf({folder.path()}, cache);
  shelf.Scan();
  EXPECT_EQ(shelf.Find(*DescribeModelFolder(path)).value(), path);
}

TEST(FileCacheTest, FetchesOnceAndAgainWhenSpoilt) {
  const TempDir folder;
  FileCache cache(folder.path());
  OneContent source{.content = "rows"};
  const FileReference file = FileOf("trace.csv", "rows");
  const std::string path = cache.Get(file, source.Fetch()).value();
  EXPECT_EQ(ReadFile(path, 100).value(), "rows");
  EXPECT_EQ(cache.Get(file, source.Fetch()).value(), path);
  EXPECT_EQ(source.fetches, 1);
  ASSERT_TRUE(WriteFileAtomic(path, "spoilt").ok());
  EXPECT_EQ(ReadFile(cache.Get(file, source.Fetch()).value(), 100).value(), "rows");
  EXPECT_EQ(source.fetches, 2);
}

TEST(FileCacheTest, WhatDoesNotMatchItsDigestIsNotKept) {
  const TempDir folder;
  FileCache cache(folder.path());
  OneContent source{.content = "forged"};
  const absl::Status status = cache.Get(FileOf("trace.csv", "rows"), source.Fetch()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(FileCacheTest, LargeFilesDoNotTravel) {
  const TempDir folder;
  FileCache cache(folder.path());
  OneContent source;
  FileReference file = FileOf("trace.csv", "rows");
  file.set_bytes(uint64_t{1} << 40);
  EXPECT_EQ(cache.Get(file, source.Fetch()).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(source.fetches, 0);
}

TEST(FileCacheTest, AModelCannotWriteOutsideItsFolder) {
  const TempDir folder;
  FileCache cache(folder.path());
  OneContent source{.content = "{}"};
  for (const char* name : {"../config.json", "/etc/config.json", "..", "a/b", ""}) {
    ModelReference model;
    model.set_name("model");
    *model.add_files() = FileOf(name, "{}");
    model.set_digest(ModelDigest(model));
    EXPECT_EQ(cache.GetModel(model, source.Fetch()).status().code(),
              absl::StatusCode::kInvalidArgument)
        << name;
  }
  EXPECT_EQ(source.fetches, 0);
}

TEST(FileCacheTest, AModelIsWhatItsDigestSays) {
  const TempDir folder;
  FileCache cache(folder.path());
  OneContent source{.content = "{}"};
  ModelReference model;
  model.set_name("model");
  *model.add_files() = FileOf("config.json", "{}");
  model.set_digest(std::string(32, 'x'));
  EXPECT_EQ(cache.GetModel(model, source.Fetch()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvsweep
