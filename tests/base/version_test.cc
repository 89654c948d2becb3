#include "base/version.h"

#include <gtest/gtest.h>

#include "base/digest.h"

namespace kvsweep {
namespace {

TEST(BuildInfo, NamesVersionCompilerAndSources) {
  const BuildInfo& info = GetBuildInfo();
  EXPECT_STREQ(info.version, "0.1.0");
  EXPECT_STRNE(info.commit, "");
  EXPECT_NE(std::string(info.compiler).find('.'), std::string::npos);
  EXPECT_NE(std::string(info.flags).find("-O"), std::string::npos);
  EXPECT_TRUE(Digest::FromHex(info.runner_digest).ok());
}

}  // namespace
}  // namespace kvsweep
