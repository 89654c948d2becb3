#ifndef KVSWEEP_STORAGE_RECORD_AUDIT_H_
#define KVSWEEP_STORAGE_RECORD_AUDIT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "experiments/metrics.h"
#include "proto/experiment.pb.h"

// What a record, and an attempt made of records, must be: the rules by which both stores judge.

namespace kvsweep {

// Parses a record that a worker sent. InvalidArgument, with what is wrong, unless it is one that
// the store can give back byte for byte: in protobuf's deterministic form, without unknown fields,
// with a body, finite numbers, known enum values and counts below 2^63.
absl::Status ParseRecord(absl::string_view bytes, Record* record);

// Appends each value as a base-128 varint, lowest group first: the payload of a packed field.
void AppendVarints(const google::protobuf::RepeatedField<uint64_t>& values, std::string* out);

// Reads them back. DataLoss if `bytes` are not whole varints.
absl::Status ReadVarints(absl::string_view bytes,
                         google::protobuf::RepeatedField<uint64_t>* values);

// A trial of the audited round.
struct AuditedTrial {
  uint64_t trial_id = 0;
  TrialSpec spec;
};

// What the records of one trial come down to.
struct TrialAccount {
  uint64_t trial_id = 0;
  uint64_t first_sequence = 0;  // of its last execution; discarded rows are before
  uint64_t last_sequence = 0;   // its outcome
  TrialStart start;             // empty if no execution came so far
  TrialOutcome outcome;
  std::vector<SummaryMetric> metrics;
  Engagement engagement = Engagement::kNoRule;
};

// Goes through the records of a finished attempt once, in order of sequence, and judges it as a
// whole. In memory it holds the rows of one trial at a time.
//
// Rules: sequences 1, 2, 3, …; the records of a trial follow each other, from its start to its
// outcome; every trial of the round has them once; measurements come after a start; a discard drops
// the rows of the running trial; the finish comes last, and its count and digest (over what is not
// dropped) are right.
class AttemptAudit {
 public:
  explicit AttemptAudit(std::vector<AuditedTrial> trials);

  // The next record and its serialised form. InvalidArgument for a broken rule; call no more then.
  absl::Status Add(absl::string_view bytes, const Record& record);

  // Whether the attempt may be accepted: its trials, in the order in which they ran, or
  // InvalidArgument with the rule that is broken.
  absl::StatusOr<std::vector<TrialAccount>> Judge();

 private:
  struct Running {
    AuditedTrial trial;
    TrialAccount account;
    std::vector<RequestRow> requests;
    std::vector<bool> seen_requests;  // by index
    std::vector<Counter> counters;
    std::vector<Sample> samples;
    std::vector<QualityRow> windows;
    std::vector<PasskeyRow> passkeys;
    bool started = false;
  };

  absl::Status Enter(uint64_t trial_id);
  absl::Status AddToTrial(const Record& record);
  absl::Status AddRow(const Record& record);
  absl::Status AddRequest(const RequestRow& row);
  void DropRows();
  void Close(const TrialOutcome& outcome);

  std::vector<AuditedTrial> waiting_;  // not begun
  std::optional<Running> running_;
  std::vector<TrialAccount> accounts_;
  std::optional<Finish> finish_;
  uint64_t sequence_ = 0;
  uint64_t count_ = 0;
  DigestBuilder digest_;
  uint64_t count_before_trial_ = 0;  // to go back to at a discard
  DigestBuilder digest_before_trial_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_RECORD_AUDIT_H_
