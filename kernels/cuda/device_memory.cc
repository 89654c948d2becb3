#include "kernels/cuda/device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/host_node.h"

namespace kvsweep::cuda {
namespace {

constexpr uint64_t kGranularity = 512;

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;

// Pinned and mapped. Of huge pages where the system has them: pinning 9 GiB takes 1.9 s so, and
// 4.2 s with cudaHostAlloc, which takes small ones (H200 node, 2026-11). Pages are taken by this
// thread. The kernel kills who takes more than there is, so that is ruled out first.
cudaError_t AllocateHost(uint64_t size, void** memory) {
  const uint64_t page = size < kHugePageBytes ? kPageBytes : kHugePageBytes;
  size = (size + page - 1) / page * page;
  if (size > AvailableHostBytes()) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(page, size);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  if (page == kHugePageBytes) madvise(*memory, size, MADV_HUGEPAGE);
  auto* const bytes = static_cast<volatile std::byte*>(*memory);
  for (uint64_t i = 0; i < size; i += kPageBytes) bytes[i] = std::byte{0};
  const cudaError_t error =
      cudaHostRegister(*memory, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) std::free(*memory);
  return error;
}

void FreeNow(Tier tier, std::byte* memory) {
  if (tier == Tier::kDevice) {
    cudaFree(memory);
    return;
  }
  cudaHostUnregister(memory);
  std::free(memory);
}

}  // namespace

cudaError_t DeviceMemory::AllocateNew(Tier tier, uint64_t size, void** memory) const {
  if (tier == Tier::kDevice) return cudaMalloc(memory, size);
  const PreferHostNode prefer(host_node_);
  return AllocateHost(size, memory);
}

DeviceMemory::~DeviceMemory() {
  for (const auto& [memory, block] : blocks_) FreeNow(block.tier, const_cast<std::byte*>(memory));
  Release(Tier::kDevice);
  Release(Tier::kHost);
}

absl::StatusOr<std::byte*> DeviceMemory::Allocate(Tier tier, uint64_t bytes) {
  const int index = static_cast<int>(tier);
  const uint64_t limit = limit_[index];
  uint64_t available = limit > allocated_[index] ? limit - allocated_[index] : 0;
  const uint64_t size =
      (std::max<uint64_t>(bytes, 1) + kGranularity - 1) / kGranularity * kGranularity;
  Block block{.bytes = bytes, .size = size, .tier = tier};
  void* memory = nullptr;
  cudaError_t error = cudaSuccess;
  if (bytes <= available) {
    memory = TakeKept(tier, size, &block);
    if (memory == nullptr && AllocateNew(tier, size, &memory) != cudaSuccess) {
      cudaGetLastError();  // it has been dealt with
      Release(tier);
      error = AllocateNew(tier, size, &memory);
      if (error != cudaSuccess) {
        cudaGetLastError();
        memory = nullptr;
        size_t free_bytes = 0;
        size_t total_bytes = 0;
        if (tier == Tier::kHost) {
          available = std::min(available, AvailableHostBytes());
        } else if (cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess) {
          available = std::min<uint64_t>(available, free_bytes);
        }
      }
    }
  }
  if (error != cudaSuccess && error != cudaErrorMemoryAllocation) {
    // An earlier kernel's fault, which every call tells from then on.
    return absl::InternalError(
        absl::StrCat("allocating ", bytes, " bytes: ", cudaGetErrorString(error)));
  }
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat(tier == Tier::kDevice ? "device" : "pinned host", " memory: asked ", bytes,
                     ", available ", available, " of ", limit, " bytes"));
  }
  auto* const result = static_cast<std::byte*>(memory);
  blocks_[result] = block;
  allocated_[index] += bytes;
  return result;
}

// The smallest that is kept, unless it would waste more than a quarter.
std::byte* DeviceMemory::TakeKept(Tier tier, uint64_t size, Block* block) {
  Kept& kept = kept_[static_cast<int>(tier)];
  const auto found = kept.lower_bound(size);
  if (found == kept.end() || found->first > size + size / 3) return nullptr;
  std::byte* const memory = found->second;
  block->size = found->first;
  kept.erase(found);
  return memory;
}

void DeviceMemory::Free(std::byte* memory) {
  if (memory == nullptr) return;
  const auto found = blocks_.find(memory);
  KVSWEEP_CHECK(found != blocks_.end()) << "Free of memory that Allocate did not return";
  const Block& block = found->second;
  allocated_[static_cast<int>(block.tier)] -= block.bytes;
  kept_[static_cast<int>(block.tier)].emplace(block.size, memory);
  blocks_.erase(found);
}

void DeviceMemory::Release(Tier tier) {
  Kept& kept = kept_[static_cast<int>(tier)];
  // Work of the last owners may still be under way, and the host's pages go at once.
  if (!kept.empty()) cudaDeviceSynchronize();
  for (const auto& [size, memory] : kept) FreeNow(tier, memory);
  kept.clear();
}

const DeviceMemory::Block* DeviceMemory::Find(const void* pointer) const {
  const auto* const address = static_cast<const std::byte*>(pointer);
  const auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return nullptr;
  const auto& [begin, block] = *std::prev(after);
  return static_cast<uint64_t>(address - begin) < std::max<uint64_t>(block.bytes, 1) ? &block
                                                                                     : nullptr;
}

Tier DeviceMemory::TierOf(const void* pointer) const {
  const Block* const block = Find(pointer);
  return block == nullptr ? Tier::kHost : block->tier;
}

}  // namespace kvsweep::cuda
