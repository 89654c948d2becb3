// Memory of one CUDA device and of its host, in two tiers, with what was freed kept for later.
#ifndef KVSWEEP_KERNELS_CUDA_DEVICE_MEMORY_H_
#define KVSWEEP_KERNELS_CUDA_DEVICE_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/status/statusor.h"
#include "kernels/shapes.h"

namespace kvsweep::cuda {

// One thread, on which the device is current.
class DeviceMemory {
 public:
  // Limits of what callers may hold at a time. Host memory comes from `host_node` (host_node.h) as
  // long as that has room; -1: from anywhere.
  DeviceMemory(uint64_t device_bytes, uint64_t host_bytes, int host_node = -1)
      : limit_{device_bytes, host_bytes}, host_node_(host_node) {}
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // `bytes` of a tier, content undefined. ResourceExhausted with asked and available bytes.
  absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes);
  // REQUIRES: Allocate returned it, and no work on the device uses it any more.
  void Free(std::byte* memory);

  uint64_t allocated_bytes(Tier tier) const { return allocated_[static_cast<int>(tier)]; }
  // Whether the memory that holds `pointer` was allocated here, and where it lies; memory from
  // elsewhere counts as host.
  bool Holds(const void* pointer) const { return Find(pointer) != nullptr; }
  Tier TierOf(const void* pointer) const;

 private:
  struct Block {
    uint64_t bytes = 0;  // asked for
    uint64_t size = 0;   // taken from the driver
    Tier tier = Tier::kDevice;
  };
  using Kept = std::multimap<uint64_t, std::byte*>;  // by size

  const Block* Find(const void* pointer) const;
  std::byte* TakeKept(Tier tier, uint64_t size, Block* block);
  void Release(Tier tier);

  cudaError_t AllocateNew(Tier tier, uint64_t size, void** memory) const;

  const uint64_t limit_[2];
  const int host_node_;
  uint64_t allocated_[2] = {};
  std::map<const std::byte*, Block> blocks_;  // that callers hold, by address
  Kept kept_[2];
};

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_DEVICE_MEMORY_H_
