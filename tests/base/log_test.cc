#include "base/log.h"

#include <gtest/gtest.h>

namespace kvsweep {
namespace {

TEST(Log, WritesOnlyWhatTheLevelShows) {
  SetLog("kvsweep-test", LogLevel::kInfo);
  testing::internal::CaptureStderr();
  LogDebug("hidden");
  LogInfo("trial ", 7, " {} ended");  // braces are text, not a format
  LogError("lost");
  const std::string lines = testing::internal::GetCapturedStderr();
  EXPECT_EQ(lines.find("hidden"), std::string::npos);
  EXPECT_NE(lines.find("I kvsweep-test] trial 7 {} ended\n"), std::string::npos);
  EXPECT_NE(lines.find("E kvsweep-test] lost\n"), std::string::npos);
}

TEST(Log, LevelsAreReadByName) {
  EXPECT_EQ(*ParseLogLevel("warning"), LogLevel::kWarning);
  EXPECT_EQ(*ParseLogLevel("off"), LogLevel::kOff);
  EXPECT_FALSE(ParseLogLevel("loud").ok());
}

}  // namespace
}  // namespace kvsweep
