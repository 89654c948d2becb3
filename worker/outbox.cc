#include "worker/outbox.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace kvsweep {

Outbox::Outbox(const OutboxLimits& limits, SpillFile& spill) : limits_(limits), spill_(spill) {
  spill_.Clear();
}

void Outbox::Covered::Add(absl::string_view record) {
  ++count;
  digest.Add(record);
}

void Outbox::BeginTrial() { covered_at_trial_start_ = covered_; }

absl::Status Outbox::Add(std::string record) {
  KVSWEEP_CHECK(!finished_);
  if (record.size() > limits_.batch_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a record of ", record.size(), " bytes; a message holds ", limits_.batch_bytes));
  }
  if (!FitsMemory(record.size())) {
    RETURN_IF_ERROR(Spill(record));
    covered_.Add(record);
    return absl::OkStatus();
  }
  covered_.Add(record);
  Keep(std::move(record));
  return absl::OkStatus();
}

void Outbox::AddOwn(std::string record) {
  KVSWEEP_CHECK(!finished_);
  covered_.Add(record);
  Keep(std::move(record));
}

void Outbox::AddDiscard(std::string record) {
  KVSWEEP_CHECK(!finished_);
  covered_ = covered_at_trial_start_;
  Keep(std::move(record));
}

void Outbox::AddFinish(std::string record) {
  KVSWEEP_CHECK(!finished_);
  finished_ = true;
  Keep(std::move(record));
}

RecordDigest Outbox::Remaining() const { return {covered_.count, covered_.digest.Finish()}; }

bool Outbox::FitsMemory(uint64_t bytes) const {
  return memory_records_ < limits_.memory_records && memory_bytes_ + bytes <= limits_.memory_bytes;
}

void Outbox::Keep(std::string record) {
  KVSWEEP_CHECK(record.size() <= limits_.batch_bytes);
  ++memory_records_;
  memory_bytes_ += record.size();
  const uint64_t bytes = record.size();
  records_.push_back({.record = std::move(record), .bytes = bytes});
}

absl::Status Outbox::Spill(absl::string_view record) {
  if (spilled_records_ >= limits_.spill_records ||
      spill_end_ + record.size() > limits_.spill_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(records_.size(), " records wait for the coordinator's acknowledgement, ",
                     memory_bytes_, " bytes in memory and ", spill_end_, " on disk"));
  }
  RETURN_IF_ERROR(spill_.Write(spill_end_, record));
  records_.push_back({.spilled = true, .spill_offset = spill_end_, .bytes = record.size()});
  spill_end_ += record.size();
  ++spilled_records_;
  return absl::OkStatus();
}

void Outbox::DropOldest() {
  const Stored& oldest = records_.front();
  if (oldest.spilled) {
    --spilled_records_;
  } else {
    --memory_records_;
    memory_bytes_ -= oldest.bytes;
  }
  records_.pop_front();
  ++first_sequence_;
}

absl::Status Outbox::Acknowledge(uint64_t through) {
  if (through > last_sequence()) {
    return absl::InvalidArgumentError(
        absl::StrCat("record ", through, " was acknowledged, but the last is ", last_sequence()));
  }
  while (first_sequence_ <= through) DropOldest();
  next_to_send_ = std::max(next_to_send_, first_sequence_);
  if (spilled_records_ == 0 && spill_end_ > 0) {
    spill_.Clear();
    spill_end_ = 0;
  }
  return absl::OkStatus();
}

void Outbox::Rewind() { next_to_send_ = first_sequence_; }

absl::StatusOr<OutboxBatch> Outbox::NextBatch() {
  OutboxBatch batch{.first_sequence = next_to_send_, .records = {}};
  uint64_t bytes = 0;
  uint64_t next = next_to_send_;
  while (next <= last_sequence() && batch.records.size() < limits_.batch_records) {
    const Stored& stored = records_[next - first_sequence_];
    if (!batch.records.empty() && bytes + stored.bytes > limits_.batch_bytes) break;
    if (stored.spilled) {
      ASSIGN_OR_RETURN(std::string record, spill_.Read(stored.spill_offset, stored.bytes));
      batch.records.push_back(std::move(record));
    } else {
      batch.records.push_back(stored.record);
    }
    bytes += stored.bytes;
    ++next;
  }
  next_to_send_ = next;
  return batch;
}

bool Outbox::HasRoom() const {
  return spilled_records_ == 0 && memory_records_ <= limits_.memory_records / 2 &&
         memory_bytes_ <= limits_.memory_bytes / 2;
}

}  // namespace kvsweep
