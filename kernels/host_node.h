// Memory nodes of the host: on a machine with several, a device reaches the memory of its own
// faster than that of the others.
#ifndef KVSWEEP_KERNELS_HOST_NODE_H_
#define KVSWEEP_KERNELS_HOST_NODE_H_

#include <cstdint>
#include <string>

namespace kvsweep {

struct HostNode {
  int nodes = 1;  // of the machine
  int node = -1;  // where the device is attached; -1: not known, or there is one node alone
  // For people: "the machine has one memory node", "node 1 of 2, where the device is attached", …
  std::string Text() const;
};

// As the kernel tells it of a PCI device ("0000:1b:00.0"). `root` stands before /sys.
HostNode FindHostNode(const std::string& pci_address, const std::string& root = "");

// What this process can take of the host's memory without driving anybody out: what the kernel says
// is available, or less if a control group (a container) has less left; all there is where neither
// says anything. `root` stands before /proc and /sys.
uint64_t AvailableHostBytes(const std::string& root = "");

// While it lives, memory that this thread takes comes from `node` as long as that has room; what
// others do to the thread's policy meanwhile is undone. Nothing happens for node -1, or where the
// kernel does not allow it.
class PreferHostNode {
 public:
  explicit PreferHostNode(int node);
  ~PreferHostNode();
  PreferHostNode(const PreferHostNode&) = delete;
  PreferHostNode& operator=(const PreferHostNode&) = delete;

  bool holds() const { return holds_; }

 private:
  static constexpr int kMostNodes = 1024;
  static constexpr int kWordBits = 8 * sizeof(unsigned long);
  using Mask = unsigned long[kMostNodes / kWordBits];

  bool holds_ = false;
  int mode_before_ = 0;
  Mask nodes_before_ = {};
};

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_HOST_NODE_H_
