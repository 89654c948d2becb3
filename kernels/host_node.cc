#include "kernels/host_node.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/file.h"

namespace kvsweep {
namespace {

constexpr int64_t kMostBytes = 4096;

int CountNodes(const std::string& root) {
  std::error_code error;
  int nodes = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(root + "/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename().string();
    int number = 0;
    nodes += absl::StartsWith(name, "node") && absl::SimpleAtoi(name.substr(4), &number);
  }
  return nodes == 0 ? 1 : nodes;
}

}  // namespace

std::string HostNode::Text() const {
  if (nodes == 1) return "the machine has one memory node";
  if (node < 0) return absl::StrCat("any of ", nodes, " memory nodes: the device's is not known");
  return absl::StrCat("memory node ", node, " of ", nodes, ", where the device is attached");
}

HostNode FindHostNode(const std::string& pci_address, const std::string& root) {
  HostNode found{.nodes = CountNodes(root)};
  if (found.nodes == 1 || pci_address.empty()) return found;
  const absl::StatusOr<std::string> text =
      ReadFile(absl::StrCat(root, "/sys/bus/pci/devices/", pci_address, "/numa_node"), kMostBytes);
  int node = -1;
  if (text.ok() && absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &node) && node >= 0) {
    found.node = node;
  }
  return found;
}

PreferHostNode::PreferHostNode(int node) {
  if (node < 0 || node >= kMostNodes) return;
  if (syscall(SYS_get_mempolicy, &mode_before_, nodes_before_, kMostNodes, nullptr, 0) != 0) return;
  Mask nodes = {};
  nodes[node / kWordBits] = 1ul << (node % kWordBits);
  holds_ = syscall(SYS_set_mempolicy, MPOL_PREFERRED, nodes, kMostNodes) == 0;
}

PreferHostNode::~PreferHostNode() {
  if (holds_) syscall(SYS_set_mempolicy, mode_before_, nodes_before_, kMostNodes);
}

}  // namespace kvsweep
