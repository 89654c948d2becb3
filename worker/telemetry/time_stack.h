// What a step's time goes to, as a stack of parts that adds up to the step.
#ifndef KVSWEEP_WORKER_TELEMETRY_TIME_STACK_H_
#define KVSWEEP_WORKER_TELEMETRY_TIME_STACK_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace kvsweep {

enum class StackPart : uint8_t {
  kProjections,  // of queries, keys, values and attention's output, with their norm
  kAttention,
  kSelection,    // what decides which entries stay or are read: sums, scores, top-m, eviction
  kSpeculation,  // looking ahead
  kTransfer,     // rows that cross the host link or move between pools
  kMlp,
  kSampling,  // last norm, logits, argmax
  kOther,     // embeddings, the step's own arrays
  kIdle       // nothing ran: launches, waits that no operation explains
};
inline constexpr size_t kStackParts = 9;

// "projections", "attention", …
absl::string_view StackPartName(StackPart part);

struct TimeStack {
  std::array<double, kStackParts> ns = {};

  double& operator[](StackPart part) { return ns[static_cast<size_t>(part)]; }
  double operator[](StackPart part) const { return ns[static_cast<size_t>(part)]; }
  double total_ns() const;
  TimeStack& operator+=(const TimeStack& other);
  TimeStack& operator*=(double factor);
};

// The part that an operation belongs to.
StackPart PartOf(const OperationTime& operation);

// Every instant from the first beginning to the last end counts for one part: that of the compute
// stream's operation; while that stream has none, that of an operation of another stream, a
// look-ahead before a transfer; otherwise kIdle. So transfers count where nothing hides them.
TimeStack StackOf(std::span<const OperationTime> operations);

// How long the host link was busy: instants at which an operation of kTransfer ran, hidden or not.
double TransferNs(std::span<const OperationTime> operations);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_TIME_STACK_H_
