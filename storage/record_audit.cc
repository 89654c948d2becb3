#include "storage/record_audit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace kvsweep {
namespace {

constexpr int kMaxVarintBytes = 10;

absl::Status Broken(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("record ", what));
}

absl::Status CheckCounts(std::initializer_list<uint64_t> counts) {
  for (const uint64_t count : counts) {
    if (count > uint64_t{std::numeric_limits<int64_t>::max()}) {
      return Broken(absl::StrCat("holds the count ", count, ", which is above 2^63 - 1"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckFinite(absl::string_view name, std::initializer_list<double> values) {
  for (const double value : values) {
    if (!std::isfinite(value)) {
      return Broken(absl::StrCat("holds ", value, " in ", name, "; numbers must be finite"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckBody(const Record& record) {
  switch (record.body_case()) {
    case Record::kRequest: {
      const RequestRow& row = record.request();
      if (!RequestRow::Status_IsValid(row.status())) return Broken("has an unknown request status");
      return CheckCounts({row.entries_attended(), row.entries_full(), row.tokens_evicted(),
                          row.entries_fetched(), row.kv_device_bytes_peak(),
                          row.kv_host_bytes_peak()});
    }
    case Record::kCounter:
      return CheckFinite(record.counter().name(), {record.counter().value()});
    case Record::kSample:
      return CheckFinite(record.sample().name(), {record.sample().value()});
    case Record::kQuality: {
      const QualityRow& row = record.quality();
      for (const QualityPositions& part : row.positions()) {
        RETURN_IF_ERROR(CheckFinite("a part of a quality window",
                                    {part.nll_sum(), part.reference_nll_sum(), part.kl_sum()}));
      }
      return CheckFinite(
          "a quality window",
          {row.nll_sum(), row.reference_nll_sum(), row.kl_sum(), row.dropped_nll_sum(),
           row.dropped_reference_nll_sum(), row.dropped_kl_sum(), row.attended_fraction()});
    }
    case Record::kPasskey:
      return CheckFinite("a pass key", {record.passkey().depth()});
    case Record::kOutcome:
      if (!Outcome_IsValid(record.outcome().outcome())) return Broken("has an unknown outcome");
      return CheckCounts({record.outcome().asked_bytes(), record.outcome().available_bytes()});
    case Record::kFinish:
      if (record.finish().digest().size() != Digest::kBytes) return Broken("has no 32-byte digest");
      return CheckCounts({record.finish().count()});
    case Record::kStart:
    case Record::kDiscard:
      return absl::OkStatus();
    case Record::BODY_NOT_SET:
      break;
  }
  return Broken("has no body that this version knows");
}

// Fields of a later version survive parsing, but have no column.
bool HasUnknownFields(const Record& record) {
  const google::protobuf::Reflection& reflection = *record.GetReflection();
  const google::protobuf::FieldDescriptor* kind =
      reflection.GetOneofFieldDescriptor(record, Record::descriptor()->oneof_decl(0));
  const google::protobuf::Message& body = reflection.GetMessage(record, kind);
  const auto has_unknown = [](const google::protobuf::Message& message) {
    return !message.GetReflection()->GetUnknownFields(message).empty();
  };
  return has_unknown(record) || has_unknown(body) ||
         std::any_of(record.quality().positions().begin(), record.quality().positions().end(),
                     has_unknown);
}

// Whether serialising `record` gives `bytes` again.
bool IsDeterministicForm(absl::string_view bytes, const Record& record) {
  if (record.ByteSizeLong() != bytes.size()) return false;
  thread_local std::string again;
  again.resize(bytes.size());
  google::protobuf::io::ArrayOutputStream array(again.data(), static_cast<int>(again.size()));
  google::protobuf::io::CodedOutputStream out(&array);
  out.SetSerializationDeterministic(true);
  record.SerializeWithCachedSizes(&out);
  out.Trim();
  return again == bytes;
}

}  // namespace

absl::Status ParseRecord(absl::string_view bytes, Record* record) {
  if (static_cast<int64_t>(bytes.size()) > limits::kMessageBytes) {
    return Broken(
        absl::StrCat("of ", bytes.size(), " bytes is longer than ", limits::kMessageBytes));
  }
  if (!record->ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return Broken("cannot be parsed");
  }
  RETURN_IF_ERROR(CheckBody(*record));
  if (record->trial_id() > uint64_t{std::numeric_limits<int64_t>::max()}) {
    return Broken("has a trial id above 2^63 - 1");
  }
  if (HasUnknownFields(*record)) return Broken("has fields that this version does not know");
  if (!IsDeterministicForm(bytes, *record)) {
    return Broken("is not in protobuf's deterministic form");
  }
  return absl::OkStatus();
}

void AppendVarints(const google::protobuf::RepeatedField<uint64_t>& values, std::string* out) {
  const size_t start = out->size();
  out->resize(start + static_cast<size_t>(values.size()) * kMaxVarintBytes);
  uint8_t* end = reinterpret_cast<uint8_t*>(out->data()) + start;
  for (const uint64_t value : values) {
    end = google::protobuf::io::CodedOutputStream::WriteVarint64ToArray(value, end);
  }
  out->resize(end - reinterpret_cast<uint8_t*>(out->data()));
}

absl::Status ReadVarints(absl::string_view bytes,
                         google::protobuf::RepeatedField<uint64_t>* values) {
  google::protobuf::io::CodedInputStream in(reinterpret_cast<const uint8_t*>(bytes.data()),
                                            static_cast<int>(bytes.size()));
  while (in.CurrentPosition() < static_cast<int>(bytes.size())) {
    uint64_t value = 0;
    if (!in.ReadVarint64(&value)) return absl::DataLossError("token gaps are not whole varints");
    values->Add(value);
  }
  return absl::OkStatus();
}

AttemptAudit::AttemptAudit(std::vector<AuditedTrial> trials) : waiting_(std::move(trials)) {}

absl::Status AttemptAudit::Add(absl::string_view bytes, const Record& record) {
  ++sequence_;
  if (finish_.has_value()) return Broken("after the finish");
  if (record.has_finish()) {
    finish_ = record.finish();
    return absl::OkStatus();
  }
  if (!running_.has_value()) RETURN_IF_ERROR(Enter(record.trial_id()));
  if (running_->trial.trial_id != record.trial_id()) {
    return Broken(absl::StrCat(sequence_, " is of trial ", record.trial_id(), " while trial ",
                               running_->trial.trial_id, " has no outcome yet"));
  }
  if (record.has_discard()) {
    DropRows();
    return absl::OkStatus();
  }
  digest_.Add(bytes);
  ++count_;
  return AddToTrial(record);
}

absl::Status AttemptAudit::Enter(uint64_t trial_id) {
  const auto found = std::find_if(waiting_.begin(), waiting_.end(), [&](const AuditedTrial& trial) {
    return trial.trial_id == trial_id;
  });
  if (found == waiting_.end()) {
    return Broken(absl::StrCat(sequence_, " is of trial ", trial_id,
                               ", which is not of this round or has ended already"));
  }
  running_.emplace();
  running_->trial = std::move(*found);
  waiting_.erase(found);
  running_->account.trial_id = trial_id;
  running_->account.first_sequence = sequence_;
  count_before_trial_ = count_;
  digest_before_trial_ = digest_;
  return absl::OkStatus();
}

// The repeat continues the trial's sequence; what it replaces is neither counted nor digested.
void AttemptAudit::DropRows() {
  count_ = count_before_trial_;
  digest_ = digest_before_trial_;
  AuditedTrial trial = std::move(running_->trial);
  running_.emplace();
  running_->account.trial_id = trial.trial_id;
  running_->account.first_sequence = sequence_ + 1;
  running_->trial = std::move(trial);
}

absl::Status AttemptAudit::AddToTrial(const Record& record) {
  if (record.has_start()) {
    if (running_->started) return Broken(absl::StrCat(sequence_, " starts a trial that runs"));
    running_->started = true;
    running_->account.start = record.start();
    return absl::OkStatus();
  }
  if (record.has_outcome()) {
    Close(record.outcome());
    return absl::OkStatus();
  }
  if (!running_->started) {
    return Broken(
        absl::StrCat(sequence_, " measures trial ", record.trial_id(), " before its start record"));
  }
  return AddRow(record);
}

absl::Status AttemptAudit::AddRow(const Record& record) {
  Running& running = *running_;
  if (record.has_request()) return AddRequest(record.request());
  if (record.has_counter()) {
    running.counters.push_back(record.counter());
  } else if (record.has_sample()) {
    running.samples.push_back(record.sample());
  } else if (record.has_passkey()) {
    running.passkeys.push_back(record.passkey());
  } else {
    running.windows.push_back(record.quality());
  }
  const auto past = [](size_t rows, int64_t limit) { return static_cast<int64_t>(rows) > limit; };
  // Counters by layer: every name may come once for each layer.
  if (past(running.counters.size(), limits::kCountersPerTrial * limits::kLayers) ||
      past(running.samples.size(), limits::kSamplesPerTrial) ||
      past(running.windows.size(), limits::kSamplesPerTrial) ||
      past(running.passkeys.size(), limits::kSamplesPerTrial)) {
    return Broken(absl::StrCat(sequence_, " is past the bound of a trial's rows"));
  }
  return absl::OkStatus();
}

absl::Status AttemptAudit::AddRequest(const RequestRow& row) {
  if (row.index() >= limits::kRequestsPerTrial) {
    return Broken(absl::StrCat(sequence_, " has request index ", row.index()));
  }
  std::vector<bool>& seen = running_->seen_requests;
  if (row.index() >= seen.size()) seen.resize(row.index() + 1);
  if (seen[row.index()]) {
    return Broken(absl::StrCat(sequence_, " is a second row of request ", row.index()));
  }
  seen[row.index()] = true;
  running_->requests.push_back(row);
  return absl::OkStatus();
}

void AttemptAudit::Close(const TrialOutcome& outcome) {
  Running& running = *running_;
  running.account.outcome = outcome;
  running.account.last_sequence = sequence_;
  const TrialSpec& spec = running.trial.spec;
  if (spec.kind() == TrialSpec::KIND_QUALITY) {
    running.account.metrics = SummariseQuality(running.windows, running.passkeys);
  } else {
    running.account.metrics = Summarise({.requests = running.requests,
                                         .counters = running.counters,
                                         .samples = running.samples,
                                         .slo = &spec.slo()});
    running.account.engagement = JudgeEngagement(spec.arm().strategy(), running.requests);
  }
  accounts_.push_back(std::move(running.account));
  running_.reset();
}

absl::StatusOr<std::vector<TrialAccount>> AttemptAudit::Judge() {
  if (!finish_.has_value()) return absl::InvalidArgumentError("there is no finish record");
  if (running_.has_value() || !waiting_.empty()) {
    const uint64_t trial_id =
        running_.has_value() ? running_->trial.trial_id : waiting_.front().trial_id;
    return absl::InvalidArgumentError(absl::StrCat("trial ", trial_id, " has no outcome"));
  }
  if (finish_->count() != count_) {
    return absl::InvalidArgumentError(absl::StrCat("the finish record counts ", finish_->count(),
                                                   " records, ", count_, " are stored"));
  }
  if (finish_->digest() != digest_.Finish().bytes()) {
    return absl::InvalidArgumentError(
        "the digest of the stored records is not that of the finish record");
  }
  return std::move(accounts_);
}

}  // namespace kvsweep
