#include "kernels/step_state.h"

#include "base/check.h"
#include "base/planted_bug.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr int64_t kFieldAlignment = 64 / sizeof(int32_t);

}  // namespace

StepState::~StepState() {
  // Queued work may still read the copies; an error of that work belongs to whoever waits for it.
  if (device_ == nullptr) return;
  backend_->WaitAll().IgnoreError();
  backend_->Free(reinterpret_cast<std::byte*>(device_));
  for (const PinnedCopy& copy : copies_) backend_->Free(reinterpret_cast<std::byte*>(copy.data));
}

StepState::Field StepState::Add(int64_t count) {
  KVSWEEP_CHECK(device_ == nullptr) << "Add after Build";
  KVSWEEP_CHECK_GE(count, 0);
  const Field field{.offset = size_, .count = count};
  size_ += static_cast<int64_t>(FieldBytes(count) / sizeof(int32_t));
  return field;
}

uint64_t StepState::FieldBytes(int64_t count) {
  const int64_t padded = (count + kFieldAlignment - 1) / kFieldAlignment * kFieldAlignment;
  return static_cast<uint64_t>(padded) * sizeof(int32_t);
}

absl::Status StepState::Build(int copies) {
  KVSWEEP_CHECK(device_ == nullptr) << "Build twice";
  KVSWEEP_CHECK_GE(copies, 2);
  const uint64_t bytes = device_bytes() > 0 ? device_bytes() : sizeof(int32_t);
  ASSIGN_OR_RETURN(std::byte * device, backend_->Allocate(Tier::kDevice, bytes));
  device_ = reinterpret_cast<int32_t*>(device);
  for (int i = 0; i < copies; ++i) {
    ASSIGN_OR_RETURN(std::byte * pinned, backend_->Allocate(Tier::kHost, bytes));
    copies_.push_back(
        {.data = reinterpret_cast<int32_t*>(pinned), .read = backend_->CreateEvent()});
  }
  return absl::OkStatus();
}

absl::Status StepState::Begin() {
  KVSWEEP_CHECK(!copies_.empty()) << "Begin before Build";
  KVSWEEP_CHECK_EQ(open_, -1) << "Begin twice";
  if (!BugPlanted("pinned_copy_reused")) RETURN_IF_ERROR(backend_->Wait(copies_[next_].read));
  open_ = next_;
  next_ = (next_ + 1) % static_cast<int>(copies_.size());
  return absl::OkStatus();
}

std::span<int32_t> StepState::Host(Field field) {
  KVSWEEP_CHECK_NE(open_, -1) << "Host without Begin";
  return {copies_[open_].data + field.offset, static_cast<size_t>(field.count)};
}

void StepState::Commit() {
  KVSWEEP_CHECK_NE(open_, -1) << "Commit without Begin";
  const PinnedCopy& copy = copies_[open_];
  backend_->Copy(device_, copy.data, device_bytes(), Stream::kCompute);
  backend_->RecordEvent(copy.read, Stream::kCompute);
  open_ = -1;
}

}  // namespace kvsweep
