#include "worker/telemetry/time_stack.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <vector>

namespace kvsweep {
namespace {

bool IsOneOf(absl::string_view name, std::initializer_list<absl::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// A beginning or an end.
struct Edge {
  double time_ns = 0;
  int change = 0;  // 1 or -1
  StackPart part = StackPart::kOther;
  bool compute = false;
};

std::vector<Edge> EdgesOf(std::span<const OperationTime> operations) {
  std::vector<Edge> edges;
  edges.reserve(2 * operations.size());
  for (const OperationTime& operation : operations) {
    const StackPart part = PartOf(operation);
    const bool compute = operation.stream == Stream::kCompute;
    edges.push_back({operation.begin_ns, 1, part, compute});
    edges.push_back({std::max(operation.begin_ns, operation.end_ns), -1, part, compute});
  }
  std::sort(edges.begin(), edges.end(),
            [](const Edge& a, const Edge& b) { return a.time_ns < b.time_ns; });
  return edges;
}

// Calls use(part counts on the compute stream, on the others, length) for each stretch in which the
// same operations run.
template <typename Use>
void Sweep(std::span<const OperationTime> operations, const Use& use) {
  using Counts = std::array<int, kStackParts>;
  Counts compute = {};
  Counts others = {};
  const std::vector<Edge> edges = EdgesOf(operations);
  for (size_t i = 0; i < edges.size(); ++i) {
    if (i > 0) use(compute, others, edges[i].time_ns - edges[i - 1].time_ns);
    (edges[i].compute ? compute : others)[static_cast<size_t>(edges[i].part)] += edges[i].change;
  }
}

// The part that counts where several run beside each other; kIdle where none does.
StackPart FirstOf(const std::array<int, kStackParts>& counts) {
  for (const StackPart part :
       {StackPart::kProjections, StackPart::kAttention, StackPart::kMlp, StackPart::kSampling,
        StackPart::kOther, StackPart::kSelection, StackPart::kSpeculation, StackPart::kTransfer}) {
    if (counts[static_cast<size_t>(part)] > 0) return part;
  }
  return StackPart::kIdle;
}

}  // namespace

absl::string_view StackPartName(StackPart part) {
  constexpr absl::string_view kNames[kStackParts] = {"projections", "attention", "selection",
                                                     "speculation", "transfer",  "mlp",
                                                     "sampling",    "other",     "idle"};
  return kNames[static_cast<size_t>(part)];
}

double TimeStack::total_ns() const { return std::accumulate(ns.begin(), ns.end(), 0.0); }

TimeStack& TimeStack::operator+=(const TimeStack& other) {
  for (size_t i = 0; i < kStackParts; ++i) ns[i] += other.ns[i];
  return *this;
}

TimeStack& TimeStack::operator*=(double factor) {
  for (double& part : ns) part *= factor;
  return *this;
}

StackPart PartOf(const OperationTime& operation) {
  const bool copies = operation.stream == Stream::kHostToDevice ||
                      operation.stream == Stream::kDeviceToHost ||
                      IsOneOf(operation.name, {"GatherRows", "CopyTile", "CopyBlocks"});
  if (copies) return StackPart::kTransfer;
  if (IsOneOf(operation.name,
              {"SelectTop", "PlaceTokens", "ColumnSum", "PruneHeavy", "EvictHeavy"})) {
    return StackPart::kSelection;
  }
  if (operation.stream == Stream::kSpeculation ||
      IsOneOf(operation.name, {"Speculate", "ProjectHeads", "RankColumns"})) {
    return StackPart::kSpeculation;
  }
  switch (operation.part) {
    case StepPart::kProjections:
      return StackPart::kProjections;
    case StepPart::kSpeculation:
      return StackPart::kSpeculation;
    case StepPart::kAttention:
      return StackPart::kAttention;
    case StepPart::kMlp:
      return StackPart::kMlp;
    case StepPart::kSampling:
      return StackPart::kSampling;
    case StepPart::kNone:
    case StepPart::kOther:
      break;
  }
  return StackPart::kOther;
}

TimeStack StackOf(std::span<const OperationTime> operations) {
  TimeStack stack;
  Sweep(operations, [&](const auto& compute, const auto& others, double length_ns) {
    StackPart part = FirstOf(compute);
    if (part == StackPart::kIdle) part = FirstOf(others);
    stack[part] += length_ns;
  });
  return stack;
}

double TransferNs(std::span<const OperationTime> operations) {
  constexpr auto kTransfer = static_cast<size_t>(StackPart::kTransfer);
  double busy_ns = 0;
  Sweep(operations, [&](const auto& compute, const auto& others, double length_ns) {
    if (compute[kTransfer] + others[kTransfer] > 0) busy_ns += length_ns;
  });
  return busy_ns;
}

}  // namespace kvsweep
