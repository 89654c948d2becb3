#include "worker/telemetry/machine_facts.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/file.h"

namespace kvsweep {
namespace {

class HostClock : public testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_.Join(path)).parent_path());
    ASSERT_TRUE(WriteFileAtomic(root_.Join(path), text).ok());
  }
  std::string Text() const { return HostClockText(root_.path() + "/"); }

  const std::string kFolder = "sys/devices/system/cpu/cpu0/cpufreq/";
  TempDir root_;
};

TEST_F(HostClock, IsTheMeanOverCoresWithItsBounds) {
  Write("proc/cpuinfo",
        "processor : 0\ncpu MHz\t\t: 2000.000\n\nprocessor : 1\ncpu MHz\t\t: 3000.5\n");
  EXPECT_EQ(Text(), "2.50 GHz");
  Write(kFolder + "scaling_min_freq", "800000\n");
  Write(kFolder + "scaling_max_freq", "3900000\n");
  Write(kFolder + "scaling_governor", "performance\n");
  EXPECT_EQ(Text(), "2.50 GHz (0.80 to 3.90), governor performance");
}

TEST_F(HostClock, ComesFromTheKernelsFilesWhereProcHasNone) {
  Write("proc/cpuinfo", "processor : 0\nBogoMIPS : 50.00\n");
  Write(kFolder + "scaling_cur_freq", "2600000\n");
  EXPECT_EQ(Text(), "2.60 GHz");
}

TEST_F(HostClock, MayNotBeTold) { EXPECT_EQ(Text(), "the kernel does not tell"); }

}  // namespace
}  // namespace kvsweep
