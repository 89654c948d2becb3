// All that varies from step to step, in one device buffer at a fixed address: token ids, positions,
// lengths, block tables, budgets. Whoever needs such an array registers it once; each step the host
// fills one of several pinned copies, which a single copy brings to the device before the step's
// work, so that a captured step finds new values behind its old pointers.
//
// A pinned copy is written again only after the step that read it has been reached (a captured copy
// records the host address).
#ifndef KVSWEEP_KERNELS_STEP_STATE_H_
#define KVSWEEP_KERNELS_STEP_STATE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace kvsweep {

class StepState {
 public:
  // An array inside the buffer.
  struct Field {
    int64_t offset = 0;  // int32 elements
    int64_t count = 0;
  };

  explicit StepState(Backend* backend) : backend_(backend) {}
  ~StepState();
  StepState(const StepState&) = delete;
  StepState& operator=(const StepState&) = delete;

  // REQUIRES: Build has not been called. count int32 values, aligned to 64 bytes.
  Field Add(int64_t count);
  // Device bytes that Add(count) takes.
  static uint64_t FieldBytes(int64_t count);

  // Allocates the device buffer and the pinned copies (`copies` >= 2).
  absl::Status Build(int copies = 3);

  // Bytes on the device: what the arrays registered so far take.
  uint64_t device_bytes() const { return static_cast<uint64_t>(size_) * sizeof(int32_t); }

  // Opens the next pinned copy for writing; waits until the device has read it. Its content is
  // undefined.
  absl::Status Begin();
  // The open copy's array. REQUIRES: Begin was called.
  std::span<int32_t> Host(Field field);
  // The array on the device; the address never changes after Build.
  int32_t* Device(Field field) const { return device_ + field.offset; }
  // Enqueues the copy to the device on Stream::kCompute and closes the pinned copy.
  void Commit();

 private:
  struct PinnedCopy {
    int32_t* data = nullptr;
    Event read;  // recorded behind the copy that read it
  };

  Backend* backend_;
  int64_t size_ = 0;  // int32 elements
  int32_t* device_ = nullptr;
  std::vector<PinnedCopy> copies_;
  int open_ = -1;
  int next_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_STEP_STATE_H_
