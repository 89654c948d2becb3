#include "kernels/cpu/workspace.h"

#include <bit>

#include "base/check.h"

namespace kvsweep::cpu {

void Workspace::Reset(int64_t bytes) {
  used_ = 0;
  if (bytes <= capacity_) return;
  // Powers of two, so that slowly growing lengths do not allocate at every step.
  capacity_ = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
  memory_ = std::make_unique_for_overwrite<std::byte[]>(capacity_ + kAlignment);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
  begin_ = memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
  ++growths_;
}

void* Workspace::TakeBytes(int64_t bytes) {
  KVSWEEP_CHECK_LE(used_ + bytes, capacity_);
  void* const taken = begin_ + used_;
  used_ += bytes;
  return taken;
}

}  // namespace kvsweep::cpu
