// Specs that name broken model folders: `validate` and `run` say what is wrong with the folder, end
// with the code of a wrong spec, and store nothing.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/file.h"
#include "tests/cli/process.h"

namespace kvsweep {
namespace {

constexpr char kSound[] = "experiments/models/stories260K";

// The sound model's folder, to be broken.
class BrokenModel {
 public:
  BrokenModel() { std::filesystem::copy(kSound, folder_.Join("model")); }

  std::string Path(const std::string& name) const { return folder_.Join("model/" + name); }
  std::string Read(const std::string& name) const { return *ReadFile(Path(name), 64 << 20); }
  void Write(const std::string& name, const std::string& content) const {
    ASSERT_TRUE(WriteFileAtomic(Path(name), content).ok());
  }
  void Replace(const std::string& name, const std::string& from, const std::string& to) const {
    const std::string before = Read(name);
    const std::string after = absl::StrReplaceAll(before, {{from, to}});
    ASSERT_NE(after, before) << from;
    Write(name, after);
  }

  // Both commands refuse the spec with `message`; no store is made.
  void ExpectRefused(const std::string& message) const {
    const std::string spec = folder_.Join("spec.yaml");
    const auto tiny = ReadFile("tests/cli/tiny.yaml", 1 << 20);
    ASSERT_TRUE(tiny.ok());
    ASSERT_TRUE(
        WriteFileAtomic(spec, absl::StrReplaceAll(*tiny, {{kSound, folder_.Join("model")}})).ok());
    const std::string store = folder_.Join("results.db");
    for (const std::vector<std::string>& command :
         {std::vector<std::string>{"validate", spec}, {"run", spec, "--store", store}}) {
      const ProcessResult result = RunProgram("kvsweep", command);
      EXPECT_EQ(result.exit_code, 2) << command[0] << ": " << result.err;
      EXPECT_THAT(absl::StrReplaceAll(result.err, {{folder_.path(), "DIR"}}),
                  testing::HasSubstr(message));
    }
    EXPECT_FALSE(std::filesystem::exists(store));
    const ProcessResult generated =
        RunProgram("kvsweep", {"generate", folder_.Join("model"), "Once upon", "--tokens", "2"});
    EXPECT_EQ(generated.exit_code, 2) << generated.err;
    EXPECT_NE(generated.err, "");
  }

 private:
  TempDir folder_;
};

TEST(BrokenModel, WithoutConfig) {
  BrokenModel model;
  std::filesystem::remove(model.Path("config.json"));
  model.ExpectRefused("DIR/model holds no config.json");
}

TEST(BrokenModel, IndexThatNamesAMissingShard) {
  BrokenModel model;
  model.Write("model.safetensors.index.json",
              R"({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})");
  model.ExpectRefused("model-00001-of-00002.safetensors");
}

TEST(BrokenModel, TruncatedWeights) {
  BrokenModel model;
  const std::string bytes = model.Read("model.safetensors");
  model.Write("model.safetensors", bytes.substr(0, bytes.size() - 100));
  model.ExpectRefused("is the file cut short?");
}

TEST(BrokenModel, ShapeThatTheConfigDoesNotAskFor) {
  BrokenModel model;
  model.Replace("config.json", "\"vocab_size\": 512", "\"vocab_size\": 520");
  model.ExpectRefused("config.json asks for [520, 64]");
}

TEST(BrokenModel, WeightsThatAreNoNumbers) {
  BrokenModel model;
  std::string bytes = model.Read("model.safetensors");
  std::memset(bytes.data() + bytes.size() - 4, 0xff, 4);  // the end of the last tensor, f32
  model.Write("model.safetensors", bytes);
  model.ExpectRefused("holds NaN at element");
}

TEST(BrokenModel, PositionsThatAreScaledInAWayOfTheirOwn) {
  BrokenModel model;
  model.Replace("config.json", "\"rope_theta\": 10000.0",
                R"("rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0})");
  model.ExpectRefused("rope_type \"yarn\" is not supported: default, linear and llama3 are");
}

TEST(BrokenModel, AHeaderThatClaimsMoreThanThereIs) {
  BrokenModel model;
  std::string bytes = model.Read("model.safetensors");
  std::memset(bytes.data(), 0xff, 8);
  model.Write("model.safetensors", bytes);
  model.ExpectRefused("header is said to take 18446744073709551615 bytes");
}

TEST(BrokenModel, TheSoundOneIsNotRefused) {
  EXPECT_EQ(RunProgram("kvsweep", {"validate", "tests/cli/tiny.yaml"}).exit_code, 0);
}

}  // namespace
}  // namespace kvsweep
