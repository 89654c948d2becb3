#include "kernels/host_node.h"

#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>

#include "base/file.h"

namespace kvsweep {
namespace {

class HostNodeTest : public testing::Test {
 protected:
  void MakeNodes(int nodes) {
    for (int node = 0; node < nodes; ++node) {
      std::filesystem::create_directories(
          root_.Join("sys/devices/system/node/node" + std::to_string(node)));
    }
    // What else lies there.
    std::filesystem::create_directories(root_.Join("sys/devices/system/node/power"));
  }
  void Attach(const std::string& address, const std::string& node) {
    const std::string folder = root_.Join("sys/bus/pci/devices/" + address);
    std::filesystem::create_directories(folder);
    ASSERT_TRUE(WriteFileAtomic(folder + "/numa_node", node + "\n").ok());
  }
  HostNode Find(const std::string& address) const { return FindHostNode(address, root_.path()); }

  TempDir root_;
};

// Writes a file below the root.
void Write(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  ASSERT_TRUE(WriteFileAtomic(path, text).ok());
}

TEST(AvailableHostBytesTest, IsTheLeastOfWhatMachineAndGroupsHaveLeft) {
  TempDir root;
  EXPECT_EQ(AvailableHostBytes(root.path()), UINT64_MAX);
  Write(root.Join("proc/meminfo"), "MemTotal:       9000 kB\nMemAvailable:   8000 kB\n");
  EXPECT_EQ(AvailableHostBytes(root.path()), 8000u << 10);
  Write(root.Join("proc/self/cgroup"), "1:cpu:/elsewhere\n0::/outer/inner\n");
  EXPECT_EQ(AvailableHostBytes(root.path()), 8000u << 10);
  Write(root.Join("sys/fs/cgroup/outer/memory.max"), "1000000\n");
  Write(root.Join("sys/fs/cgroup/outer/memory.current"), "400000\n");
  Write(root.Join("sys/fs/cgroup/outer/inner/memory.max"), "max\n");
  Write(root.Join("sys/fs/cgroup/outer/inner/memory.current"), "300000\n");
  EXPECT_EQ(AvailableHostBytes(root.path()), 600000u);
  Write(root.Join("sys/fs/cgroup/outer/inner/memory.max"), "200000\n");
  EXPECT_EQ(AvailableHostBytes(root.path()), 0u);
}

TEST_F(HostNodeTest, IsWhereTheDeviceIsAttached) {
  MakeNodes(2);
  Attach("0000:1b:00.0", "1");
  EXPECT_EQ(Find("0000:1b:00.0").node, 1);
  EXPECT_EQ(Find("0000:1b:00.0").Text(), "memory node 1 of 2, where the device is attached");
}

TEST_F(HostNodeTest, MayNotBeKnown) {
  MakeNodes(2);
  Attach("0000:1b:00.0", "-1");
  EXPECT_EQ(Find("0000:1b:00.0").node, -1);
  EXPECT_EQ(Find("0000:2b:00.0").Text(), "any of 2 memory nodes: the device's is not known");
}

TEST_F(HostNodeTest, IsNoChoiceOnAMachineWithOne) {
  MakeNodes(1);
  Attach("0000:1b:00.0", "0");
  EXPECT_EQ(Find("0000:1b:00.0").node, -1);
  EXPECT_EQ(Find("0000:1b:00.0").Text(), "the machine has one memory node");
  EXPECT_EQ(FindHostNode("0000:1b:00.0", root_.Join("nothing")).nodes, 1);
}

TEST_F(HostNodeTest, ThePolicyEndsWithItsHolder) {
  const auto mode = [] {
    int mode = -1;
    syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0);
    return mode;
  };
  const int before = mode();
  {
    const PreferHostNode prefer(0);
    EXPECT_EQ(mode(), prefer.holds() ? MPOL_PREFERRED : before);
  }
  EXPECT_EQ(mode(), before);
  const PreferHostNode none(-1);
  EXPECT_FALSE(none.holds());
  EXPECT_EQ(mode(), before);
}

}  // namespace
}  // namespace kvsweep
