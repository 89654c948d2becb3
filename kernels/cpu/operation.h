// One entry of a stream: an operation's arguments by value, whatever operation it is. Fixed in
// size, so queues of them need no memory of their own for each entry.
#ifndef KVSWEEP_KERNELS_CPU_OPERATION_H_
#define KVSWEEP_KERNELS_CPU_OPERATION_H_

#include <type_traits>
#include <variant>

#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "kernels/cpu/operations.h"

namespace kvsweep::cpu {

using Operation = std::variant<CopyArgs, ZeroArgs, FillNormalArgs, EmbedArgs, NormArgs, GemmArgs,
                               SiluGateArgs, RotaryArgs, TakeRowsArgs, ArgmaxArgs, AppendArgs,
                               DecodeAttentionArgs, PrefillAttentionArgs, ColumnSumArgs,
                               PruneHeavyArgs, EvictHeavyArgs, RepeatHeadsArgs, ProjectHeadsArgs, RankColumnsArgs, SpeculateArgs, SelectTopArgs, PlaceTokensArgs, GatherRowsArgs, CopyTileArgs, CopyBlocksArgs, AllReduceArgs>;
static_assert(std::is_trivially_copyable_v<Operation>);

// The name of the backend's function, for errors.
absl::string_view OperationName(const Operation& operation);

// Aborts on arguments that no caller may pass: sizes below zero, missing arrays, heads that do not
// divide.
void CheckArguments(const Operation& operation);

// Which memory a pointer belongs to; implemented by the backend, whose allocations decide.
class MemoryMap {
 public:
  virtual ~MemoryMap() = default;
  // Memory that the backend did not allocate counts as host.
  virtual Tier TierOf(const void* pointer) const = 0;
};

// The cost of an operation that is about to run; reads lengths and counts from the device.
// link_to_host says which way link_bytes go.
struct OperationCost {
  Cost cost;
  bool link_to_host = false;
};
OperationCost CostOf(const Operation& operation, const MemoryMap& memory, double element_bytes);

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_OPERATION_H_
