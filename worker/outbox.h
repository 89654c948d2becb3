#ifndef KVSWEEP_WORKER_OUTBOX_H_
#define KVSWEEP_WORKER_OUTBOX_H_

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "base/limits.h"

namespace kvsweep {

// Where an outbox puts what does not fit into its memory. One owner, one thread at a time.
class SpillFile {
 public:
  virtual ~SpillFile() = default;

  // Writes `data` at byte `offset`, which is the end of what was written since the last Clear.
  virtual absl::Status Write(uint64_t offset, absl::string_view data) = 0;

  // Reads exactly `size` bytes at `offset`.
  virtual absl::StatusOr<std::string> Read(uint64_t offset, uint64_t size) = 0;

  // Gives the space back; the next Write is at offset 0.
  virtual void Clear() = 0;
};

// How much may wait for acknowledgement. There is no path around these limits but for the few
// records that the session itself writes (at most three a trial and one a round, each a few KiB).
struct OutboxLimits {
  uint64_t memory_records = limits::kOutboxRows;
  uint64_t memory_bytes = limits::kOutboxBytes;
  uint64_t spill_records = limits::kOutboxSpillRows;
  uint64_t spill_bytes = limits::kOutboxSpillBytes;
  uint64_t batch_records = limits::kBatchRows;
  // Payloads of a batch; what is left of a message holds its other fields. A larger record is
  // refused.
  uint64_t batch_bytes = limits::kMessageBytes - 8 * limits::kKiB;
};

// What a store must hold to accept an attempt; see Finish in experiment.proto.
struct RecordDigest {
  uint64_t count = 0;
  Digest digest;
};

// A batch ready to be sent: records first_sequence, first_sequence + 1, ….
struct OutboxBatch {
  uint64_t first_sequence = 0;
  std::vector<std::string> records;
};

// The records of one attempt that the store has not yet acknowledged: a window that slides over
// sequences 1, 2, ….
//
//   acknowledged | sent, unacknowledged | not yet sent
//                ^ oldest_unacknowledged ^ next to send          ^ last_sequence
//
// A record stays until it is acknowledged, in memory or, when memory is full, in the spill file. It
// leaves in order of sequence whichever of the two holds it. Pure apart from the spill file: no
// clock, no lock. Not thread-safe.
class Outbox {
 public:
  // `spill` is cleared, and must outlive the outbox.
  Outbox(const OutboxLimits& limits, SpillFile& spill);

  // The records from here on belong to a new trial: a later Discard drops only these.
  void BeginTrial();

  // Adds a record of the current trial under the next sequence. ResourceExhausted when the limits
  // are reached or the record is larger than a batch, the spill file's error when it cannot be
  // written; then nothing was added and the sequence is not used up.
  absl::Status Add(std::string record);

  // Adds a record that the session wrote about the current trial: as Add, but kept in memory and
  // never refused.
  void AddOwn(std::string record);

  // Adds a discard record: the records of the current trial so far no longer count for Remaining().
  void AddDiscard(std::string record);

  // Adds the finish record, the last: REQUIRES that it carries Remaining(). Nothing may be added
  // afterwards.
  void AddFinish(std::string record);

  // Count and digest of the records that remain after discards, discards excluded.
  RecordDigest Remaining() const;

  // Drops what is durable: every record up to and including `through`. Smaller than before: no
  // effect. InvalidArgument when `through` was never sent.
  absl::Status Acknowledge(uint64_t through);

  // The connection was lost: sending starts again after the last acknowledged record.
  void Rewind();

  // Takes the next records to send, as many as a batch may hold; empty when all have been sent. An
  // error means that the spill file could not be read: the attempt is lost.
  absl::StatusOr<OutboxBatch> NextBatch();

  bool HasUnsent() const { return next_to_send_ <= last_sequence(); }

  // True when nothing is spilled and memory is at most half used: the time to begin the next trial
  // after an overflow.
  bool HasRoom() const;

  // 0 when there is none.
  uint64_t oldest_unacknowledged() const { return records_.empty() ? 0 : first_sequence_; }
  uint64_t last_sequence() const { return first_sequence_ + records_.size() - 1; }

 private:
  struct Stored {
    std::string record;  // empty when spilled
    bool spilled = false;
    uint64_t spill_offset = 0;
    uint64_t bytes = 0;
  };

  // What Finish covers; copied at the start of each trial, so that a discard can go back to it.
  struct Covered {
    uint64_t count = 0;
    DigestBuilder digest;
    void Add(absl::string_view record);
  };

  bool FitsMemory(uint64_t bytes) const;
  void Keep(std::string record);
  absl::Status Spill(absl::string_view record);
  void DropOldest();

  const OutboxLimits limits_;
  SpillFile& spill_;
  std::deque<Stored> records_;  // [unacknowledged], records_[i] has sequence first_sequence_ + i
  uint64_t first_sequence_ = 1;
  uint64_t next_to_send_ = 1;    // first_sequence_ <= next_to_send_ <= last_sequence() + 1
  uint64_t memory_records_ = 0;  // of records_, those not spilled
  uint64_t memory_bytes_ = 0;
  uint64_t spilled_records_ = 0;  // memory_records_ + spilled_records_ == records_.size()
  uint64_t spill_end_ = 0;        // where the next Write goes
  bool finished_ = false;
  Covered covered_;
  Covered covered_at_trial_start_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_OUTBOX_H_
