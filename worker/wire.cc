#include "worker/wire.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/limits.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

// The last `limit` bytes, from the beginning of a UTF-8 character: a proto3 string holds nothing
// else.
std::string ValidTail(const std::string& text, size_t limit) {
  std::string tail = text.substr(text.size() - std::min(text.size(), limit));
  for (char& byte : tail) {
    if (static_cast<unsigned char>(byte) >= 0x80) byte = '?';
  }
  return tail;
}

Outcome OutcomeOf(RecordEncoder::Verdict verdict) {
  switch (verdict) {
    case RecordEncoder::Verdict::kTimeout:
      return OUTCOME_TIMEOUT;
    case RecordEncoder::Verdict::kCrashed:
      return OUTCOME_CRASHED;
    case RecordEncoder::Verdict::kRecorderOverflow:
      return OUTCOME_RECORDER_OVERFLOW;
  }
  KVSWEEP_CHECK(false) << "verdict " << static_cast<int>(verdict);
  return OUTCOME_CRASHED;
}

constexpr size_t kTextBytes = limits::kEvidenceBytes / 2;  // evidence and log share the bound

}  // namespace

std::string SerializeRecord(const Record& record) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream coded(&stream);
  coded.SetSerializationDeterministic(true);
  KVSWEEP_CHECK(record.SerializeToCodedStream(&coded));
  coded.Trim();
  return bytes;
}

std::string ProtoRecordEncoder::EncodeOutcome(const Outcome& outcome) const {
  Record record;
  record.set_trial_id(outcome.trial.value());
  TrialOutcome& message = *record.mutable_outcome();
  message.set_outcome(OutcomeOf(outcome.verdict));
  message.set_evidence(ValidTail(outcome.evidence, kTextBytes));
  message.set_phase(ValidTail(outcome.phase, limits::kNameLength));
  message.set_signal(outcome.signal);
  message.set_log_tail(ValidTail(outcome.log_tail, kTextBytes));
  return SerializeRecord(record);
}

std::string ProtoRecordEncoder::EncodeDiscard(TrialId trial, const std::string& reason) const {
  Record record;
  record.set_trial_id(trial.value());
  record.mutable_discard()->set_reason(ValidTail(reason, kTextBytes));
  return SerializeRecord(record);
}

std::string ProtoRecordEncoder::EncodeFinish(const RecordDigest& digest) const {
  Record record;
  record.mutable_finish()->set_count(digest.count);
  record.mutable_finish()->set_digest(std::string(digest.digest.bytes()));
  return SerializeRecord(record);
}

absl::StatusOr<std::vector<RunnerRecord>> RecordsFromRunner(const RecordBatch& batch) {
  std::vector<RunnerRecord> records;
  records.reserve(batch.records_size());
  for (const Record& record : batch.records()) {
    switch (record.body_case()) {
      case Record::BODY_NOT_SET:
      case Record::kDiscard:
      case Record::kFinish:
        return absl::InvalidArgumentError(absl::StrCat("the runner sent a record of kind ",
                                                       record.body_case(),
                                                       ", which is not for it to send"));
      default:
        records.push_back({.trial = TrialId(record.trial_id()),
                           .is_outcome = record.has_outcome(),
                           .payload = SerializeRecord(record)});
    }
  }
  return records;
}

absl::StatusOr<RoundSpec> ParseRound(const std::string& bytes) {
  RoundSpec round;
  if (!round.ParseFromString(bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the round is not a RoundSpec (", bytes.size(), " bytes)"));
  }
  for (const PlannedTrial& trial : round.trials()) {
    if (trial.trial_id() == 0)
      return absl::InvalidArgumentError("the round has a trial without id");
  }
  return round;
}

SessionRound RoundFromWire(const RoundSpec& round) {
  SessionRound session_round;
  for (const PlannedTrial& trial : round.trials()) {
    Limits trial_limits = trial.spec().limits();
    ApplyDefaults(&trial_limits);
    // Both are bounded by the schema, but whoever sent them may not have asked it.
    const uint64_t most = static_cast<uint64_t>(kNeverNs) / 4;
    session_round.trials.push_back(
        {.trial = TrialId(trial.trial_id()),
         .limit_ns = static_cast<int64_t>(std::min(trial_limits.trial(), most) +
                                          std::min(trial_limits.prepare(), most))});
  }
  return session_round;
}

void ReportToWire(const SessionReport& report, WorkerState* state) {
  state->set_generation(report.generation);
  state->set_draining(report.draining);
  state->set_unhealthy_reason(ValidTail(report.unhealthy_reason, kTextBytes));
  for (size_t i = 0; i < report.slots.size(); ++i) {
    SlotState& slot = *state->add_slots();
    slot.set_index(static_cast<uint32_t>(i));
    if (!report.slots[i].holding.has_value()) continue;
    const HeldAttempt& held = *report.slots[i].holding;
    Holding& holding = *slot.mutable_holding();
    holding.set_attempt(held.attempt.value());
    holding.set_phase(static_cast<Holding::Phase>(held.phase));
    holding.set_trial_id(held.trial.value());
    holding.set_trial_phase(held.trial_phase);
    holding.set_done(held.done);
    holding.set_total(held.total);
    holding.set_oldest_unacknowledged(held.oldest_unacknowledged);
    holding.set_last_sequence(held.last_sequence);
    holding.set_reason(ValidTail(held.reason, kTextBytes));
  }
}

}  // namespace kvsweep
