#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/limits.h"
#include "tests/coordinator/transcript.h"

namespace kvsweep {
namespace {

const char* const kFolder = "tests/golden/scheduler";

std::vector<std::string> Scenarios() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    if (entry.path().extension() == ".txt") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Set KVSWEEP_UPDATE_GOLDEN=1 to rewrite the transcripts; behaviour is then reviewed as a diff.
class SchedulerGolden : public testing::TestWithParam<std::string> {};

TEST_P(SchedulerGolden, PlanIsAsWritten) {
  const std::string path = std::string(kFolder) + "/" + GetParam() + ".txt";
  const absl::StatusOr<std::string> text = ReadFile(path, limits::kMiB);
  ASSERT_TRUE(text.ok()) << text.status();
  const std::string played = Transcript().Play(*text);
  if (std::getenv("KVSWEEP_UPDATE_GOLDEN") != nullptr) {
    ASSERT_TRUE(WriteFileAtomic(path, played).ok());
  }
  EXPECT_EQ(played, ReadFile(path, limits::kMiB).value())
      << "KVSWEEP_UPDATE_GOLDEN=1 rewrites " << path;
}

INSTANTIATE_TEST_SUITE_P(All, SchedulerGolden, testing::ValuesIn(Scenarios()),
                         [](const auto& scenario) { return scenario.param; });

}  // namespace
}  // namespace kvsweep
