#ifndef KVSWEEP_COORDINATOR_WIRE_H_
#define KVSWEEP_COORDINATOR_WIRE_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/scheduler.h"
#include "proto/control.pb.h"
#include "proto/worker.pb.h"
#include "storage/query.h"

// Between messages and the planner's plain values. What comes in is held to base/limits.h here,
// before anything else sees it.

namespace kvsweep {

// The version of worker.proto that both sides speak.
inline constexpr uint32_t kProtocolVersion = 1;

// InvalidArgument for what no honest worker says (names, counts, slot numbers, digests);
// FailedPrecondition for another protocol version, with what to do. A worker whose runner measures
// by another method is unhealthy, not an error.
absl::StatusOr<WorkerReport> ReportFromWire(const WorkerState& state);

// InvalidArgument for a batch past the limits.
absl::Status CheckBatch(const ReportBatch& batch);

// Whether the last record of the batch is a finish record: the attempt is to be accepted with it.
bool EndsWithFinish(const ReportBatch& batch);

// The message for a wish, but for the rounds of its kRun entries: `round_specs` has the serialised
// RoundSpec of each.
DesiredState WishToWire(const WorkerWish& wish, const std::map<Attempt, std::string>& round_specs);

// The listing of workers, one row each.
Table WorkersTable(const Roster& roster, int64_t now_ns);

// Splits a table into messages below limits::kMessageBytes, at least one; the first has the
// columns. A value that is too large for a message becomes a text that says so.
std::vector<TableReply> TableToWire(const Table& table);

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_WIRE_H_
