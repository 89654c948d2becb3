#include "experiments/files.h"

#include <filesystem>

#include "base/digest.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

void Write(const std::string& path, absl::string_view content) {
  ASSERT_TRUE(WriteFileAtomic(path, content).ok()) << path;
}

TEST(ModelFolder, DigestCoversWhatTheModelComputesAndNothingElse) {
  const TempDir folder;
  Write(folder.Join("config.json"), "{}");
  Write(folder.Join("model.safetensors"), "weights");
  const auto model = DescribeModelFolder(folder.path() + "/");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->name(), std::filesystem::path(folder.path()).filename());
  EXPECT_EQ(model->bytes(), 9u);
  ASSERT_EQ(model->files_size(), 2);
  EXPECT_EQ(model->files(0).path(), "config.json");
  EXPECT_EQ(model->files(1).digest(), Sha256("weights").bytes());
  EXPECT_EQ(model->digest(), ModelDigest(*model));

  Write(folder.Join("README.md"), "words");
  EXPECT_EQ(DescribeModelFolder(folder.path())->digest(), model->digest());
  Write(folder.Join("tokenizer.model"), "pieces");
  EXPECT_NE(DescribeModelFolder(folder.path())->digest(), model->digest());
  std::filesystem::remove(folder.Join("tokenizer.model"));
  std::filesystem::rename(folder.Join("model.safetensors"), folder.Join("renamed.safetensors"));
  EXPECT_NE(DescribeModelFolder(folder.path())->digest(), model->digest());
}

TEST(ModelFolder, NeedsAConfig) {
  const TempDir folder;
  EXPECT_EQ(DescribeModelFolder(folder.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(DescribeModelFolder("no/such").status().code(), absl::StatusCode::kNotFound);
}

// The snapshot folders of Hugging Face's cache hold links to blobs.
TEST(ModelFolder, FollowsLinks) {
  const TempDir folder;
  std::filesystem::create_directory(folder.Join("blobs"));
  std::filesystem::create_directory(folder.Join("snapshot"));
  Write(folder.Join("blobs/1"), "{}");
  std::filesystem::create_symlink("../blobs/1", folder.Join("snapshot/config.json"));
  const auto model = DescribeModelFolder(folder.Join("snapshot"));
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->files(0).digest(), Sha256("{}").bytes());
}

TEST(ResolveInputsTest, ReportsEachMissingPathOnceAndKeepsTheRest) {
  const TempDir folder;
  Write(folder.Join("b.txt"), "b");
  Write(folder.Join("a.txt"), "aa");
  Experiment experiment;
  experiment.mutable_model()->set_path("nowhere");
  experiment.mutable_load()->set_text("b.txt");
  experiment.mutable_quality()->set_text("b.txt");
  Axis* axis = experiment.mutable_sweep()->add_grid();
  axis->set_path("load.text");
  axis->add_values("a.txt");
  axis->add_values("gone.txt");
  ProblemList problems;
  const ResolvedInputs resolved = ResolveInputs(experiment, folder.path(), &problems);
  std::vector<std::string> paths;
  for (const FileReference& file : resolved.inputs.files) paths.push_back(file.path());
  EXPECT_THAT(paths, ElementsAre("a.txt", "b.txt"));
  EXPECT_EQ(resolved.inputs.FindFile("a.txt")->bytes(), 2u);
  EXPECT_EQ(resolved.inputs.FindFile("gone.txt"), nullptr);
  EXPECT_EQ(resolved.local_paths.at("a.txt"), folder.Join("a.txt"));
  ASSERT_EQ(problems.problems().size(), 2u);
  EXPECT_EQ(problems.problems()[0].field, "model.path");
  EXPECT_EQ(problems.problems()[1].field, "sweep.grid.load.text");
}

TEST(ResolveInputsTest, FilesTooLargeToTravelAreRefused) {
  const TempDir folder;
  Write(folder.Join("big.txt"), std::string((8 << 20) + 1, 'x'));
  Experiment experiment;
  experiment.mutable_load()->set_text("big.txt");
  ProblemList problems;
  ResolveInputs(experiment, folder.path(), &problems);
  ASSERT_EQ(problems.problems().size(), 1u);
  EXPECT_THAT(problems.problems()[0].what, HasSubstr("has 8388609 bytes, more than 8388608"));
}

}  // namespace
}  // namespace kvsweep
