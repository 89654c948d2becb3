#include "kernels/host_node.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <system_error>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/file.h"

namespace kvsweep {
namespace {

constexpr int64_t kMostBytes = 16384;

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

// The number behind `name` in lines of names and numbers.
std::optional<uint64_t> FindNumber(const std::string& text, absl::string_view name) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    uint64_t number = 0;
    if (!absl::ConsumePrefix(&line, name)) continue;
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (!words.empty() && absl::SimpleAtoi(words[0], &number)) return number;
  }
  return std::nullopt;
}

std::optional<uint64_t> ReadNumber(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMostBytes);
  return text.ok() ? FindNumber(*text, "") : std::nullopt;
}

}  // namespace

uint64_t AvailableHostBytes(const std::string& root) {
  uint64_t available = UINT64_MAX;
  const absl::StatusOr<std::string> facts = ReadFile(root + "/proc/meminfo", kMostBytes);
  if (facts.ok()) {
    const std::optional<uint64_t> kib = FindNumber(*facts, "MemAvailable:");
    if (kib.has_value()) available = *kib << 10;
  }
  // Version 2 of control groups: a group's limit holds for all below it.
  const absl::StatusOr<std::string> groups = ReadFile(root + "/proc/self/cgroup", kMostBytes);
  if (!groups.ok()) return available;
  for (absl::string_view line : absl::StrSplit(*groups, '\n')) {
    if (!absl::ConsumePrefix(&line, "0::")) continue;
    for (std::filesystem::path group{std::string(line)};; group = group.parent_path()) {
      const std::string folder = absl::StrCat(root, "/sys/fs/cgroup", group.string());
      const std::optional<uint64_t> limit = ReadNumber(folder + "/memory.max");
      const std::optional<uint64_t> used = ReadNumber(folder + "/memory.current");
      if (limit.has_value() && used.has_value()) {
        available = std::min(available, *limit > *used ? *limit - *used : 0);
      }
      if (!group.has_relative_path()) break;
    }
  }
  return available;
}

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
