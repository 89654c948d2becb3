#ifndef KVSWEEP_WORKER_WIRE_H_
#define KVSWEEP_WORKER_WIRE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "proto/runner.pb.h"
#include "proto/worker.pb.h"
#include "worker/session.h"

// Between messages and the session's plain values. What comes in is held to base/limits.h here.

namespace kvsweep {

// The version of worker.proto that this worker speaks.
inline constexpr uint32_t kWorkerProtocolVersion = 1;

// The bytes of a record, the same for equal records: what is sent, stored and digested.
std::string SerializeRecord(const Record& record);

class ProtoRecordEncoder final : public RecordEncoder {
 public:
  std::string EncodeOutcome(const Outcome& outcome) const override;
  std::string EncodeDiscard(TrialId trial, const std::string& reason) const override;
  std::string EncodeFinish(const RecordDigest& digest) const override;
};

// InvalidArgument for what a runner may not send: a record without content, a discard, a finish.
absl::StatusOr<std::vector<RunnerRecord>> RecordsFromRunner(const RecordBatch& batch);

// The round of a wish to run, parsed. InvalidArgument if it is not one that a session can take.
absl::StatusOr<RoundSpec> ParseRound(const std::string& bytes);
SessionRound RoundFromWire(const RoundSpec& round);

// Fills in generation, health and slots but for their devices.
void ReportToWire(const SessionReport& report, WorkerState* state);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_WIRE_H_
