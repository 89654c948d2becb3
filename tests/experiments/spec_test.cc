#include "experiments/spec.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/file.h"
#include "experiments/matrix.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

using ::testing::HasSubstr;

constexpr char kBrokenSpecs[] = "tests/golden/spec/broken";
constexpr char kSpecs[] = "experiments/specs";

std::vector<std::string> SpecsIn(const std::string& folder) {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.path().extension() == ".yaml") paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

// What a user who submits the spec is told; "" when it is sound.
std::string Complaint(const std::string& path) {
  const absl::StatusOr<LoadedExperiment> loaded = LoadExperiment(path, {});
  if (!loaded.ok()) return std::string(loaded.status().message());
  const absl::StatusOr<Matrix> matrix = Matrix::Create(loaded->experiment, loaded->resolved.inputs);
  return std::string(matrix.status().message());
}

// KVSWEEP_UPDATE_GOLDEN=1 rewrites the messages; what users read is then reviewed as a diff.
TEST(SpecGolden, EachBrokenSpecHasItsMessage) {
  const std::vector<std::string> specs = SpecsIn(kBrokenSpecs);
  EXPECT_GE(specs.size(), 20u);
  for (const std::string& path : specs) {
    SCOPED_TRACE(path);
    const std::string complaint = Complaint(path) + "\n";
    const std::string golden = std::string(absl::StripSuffix(path, ".yaml")) + ".txt";
    if (std::getenv("KVSWEEP_UPDATE_GOLDEN") != nullptr) {
      ASSERT_TRUE(WriteFileAtomic(golden, complaint).ok());
    }
    const absl::StatusOr<std::string> expected = ReadFile(golden, 1 << 20);
    ASSERT_TRUE(expected.ok()) << expected.status();
    EXPECT_NE(complaint, "\n") << "the spec is sound";
    EXPECT_EQ(complaint, *expected);
  }
}

TEST(SpecFiles, ShippedSpecsAreSound) {
  const std::vector<std::string> specs = SpecsIn(kSpecs);
  EXPECT_GE(specs.size(), 5u);
  for (const std::string& path : specs) EXPECT_EQ(Complaint(path), "") << path;
}

TEST(SpecFiles, QuickstartIsReadWhole) {
  const auto loaded = LoadExperiment("experiments/specs/quickstart.yaml", {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->experiment.arms_size(), 3);
  ASSERT_TRUE(loaded->resolved.inputs.model.has_value());
  EXPECT_EQ(loaded->resolved.inputs.model->name(), "books-llama-14m");
  ASSERT_EQ(loaded->resolved.inputs.files.size(), 2u);
  EXPECT_EQ(loaded->resolved.inputs.files[0].path(), "experiments/data/azure_llm_2023_conv.csv");
  EXPECT_EQ(loaded->resolved.inputs.files[0].bytes(), 719188u);
  EXPECT_EQ(loaded->resolved.inputs.files[0].digest().size(), 32u);
  EXPECT_EQ(ValidateExperiment(loaded->experiment), absl::OkStatus());
}

TEST(SpecOverrides, SetFieldsAndRefuseWhatHasNoEffect) {
  const std::string path = "experiments/specs/quickstart.yaml";
  const auto loaded = LoadExperiment(path, {.overrides = {"repeats=1", "kv.host_bytes=2GiB"}});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->experiment.repeats(), 1u);
  EXPECT_EQ(loaded->experiment.kv().host_bytes(), uint64_t{2} << 30);
  const auto message = [&](const char* text) {
    return std::string(LoadExperiment(path, {.overrides = {text}}).status().message());
  };
  EXPECT_THAT(message("repeats"), HasSubstr("write path=value"));
  EXPECT_THAT(message("repeat=1"), HasSubstr("did you mean \"repeats\"?"));
  EXPECT_THAT(message("kv.device_bytes=6MiB"), HasSubstr("since the sweep varies it"));
  EXPECT_THAT(message("slo.ttft=500"), HasSubstr("override: slo.ttft: value \"500\""));
}

TEST(SpecOverrides, OneThatEveryArmOverridesItselfIsRefused) {
  const auto said = [](absl::string_view second_arm, const char* text) {
    const std::string spec = absl::StrCat(R"(schema_version: 1
name: own
model: {shape: opt-125m, weights: random}
load: {arrivals: {process: burst, requests: 4}, lengths: {input: 32, output: 8}}
kv: {device_bytes: 1MiB}
regime: kv_fits
arms:
  - {name: small, strategy: paged, kv: {device_bytes: 4MiB}}
)",
                                          "  - ", second_arm, "\n");
    return std::string(ParseExperiment(spec, "own.yaml", {.overrides = {text}}).status().message());
  };
  constexpr char kOwn[] = "{name: large, strategy: paged, kv: {device_bytes: 8MiB}}";
  constexpr char kGrid[] = "{name: large, strategy: paged, grid: {kv.device_bytes: [8MiB, 9MiB]}}";
  constexpr char kShared[] = "{name: large, strategy: paged}";
  constexpr char kRefusal[] =
      "override: kv.device_bytes: has no effect, since every arm has a value of its own (small, "
      "large); edit arms[].kv.device_bytes in the spec, or remove it there and override it here";
  EXPECT_EQ(said(kOwn, "kv.device_bytes=6MiB"), kRefusal);
  EXPECT_EQ(said(kGrid, "kv.device_bytes=6MiB"), kRefusal);
  EXPECT_EQ(said(kShared, "kv.device_bytes=6MiB"), "") << "one arm takes it";
  EXPECT_EQ(said(kOwn, "kv.host_bytes=1GiB"), "");
  EXPECT_EQ(said(kOwn, "repeats=1"), "");
}

TEST(SpecLoad, MissingSpecIsNotFound) {
  EXPECT_EQ(LoadExperiment("no/such.yaml", {}).status().code(), absl::StatusCode::kNotFound);
}

// Paths are tried beside the spec first, so that a folder with spec and data can be moved as a
// whole.
TEST(SpecLoad, FilesAreLookedForBesideTheSpecFirst) {
  const TempDir folder;
  ASSERT_TRUE(WriteFileAtomic(folder.Join("words.txt"), "beside").ok());
  ASSERT_TRUE(WriteFileAtomic(folder.Join("spec.yaml"), R"(schema_version: 1
name: moved
model: {shape: llama-3.1-8b, weights: random}
load:
  arrivals: {process: burst, requests: 1}
  lengths: {input: 4, output: 4}
  text: words.txt
kv: {device_bytes: 1MiB}
arms: [{name: paged, strategy: paged}]
)")
                  .ok());
  const auto loaded = LoadExperiment(folder.Join("spec.yaml"), {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_FALSE(loaded->resolved.inputs.model.has_value());
  EXPECT_EQ(loaded->resolved.inputs.files.at(0).bytes(), 6u);
  EXPECT_EQ(loaded->resolved.local_paths.at("words.txt"), folder.Join("words.txt"));
}

TEST(SpecCheck, WireExperimentsAreHeldToTheSameRules) {
  auto loaded = LoadExperiment("experiments/specs/quickstart.yaml", {});
  ASSERT_TRUE(loaded.ok());
  loaded->experiment.mutable_arms(1)->mutable_h2o()->set_heavy_ratio(0.95);
  EXPECT_THAT(std::string(ValidateExperiment(loaded->experiment).message()),
              HasSubstr("arms[1].h2o: heavy_ratio and recent_ratio add up to 1.05"));
}

}  // namespace
}  // namespace kvsweep
