// The operations of backend.h, computed at once on the calling thread and its pool. One overload of
// Run for each argument struct, each in the file named after its operation; the streams
// (stream_scheduler.h) decide when it is called.
//
// Every Run returns InvalidArgument for what only the device knows (a negative block, a length past
// its block table), before it writes anything outside its outputs; what the host could have known
// is checked when the operation is enqueued.
#ifndef KVSWEEP_KERNELS_CPU_OPERATIONS_H_
#define KVSWEEP_KERNELS_CPU_OPERATIONS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/workspace.h"

namespace kvsweep::cpu {

// Bytes from anywhere to anywhere, as Backend::Copy and Backend::Zero.
struct CopyArgs {
  void* target = nullptr;
  const void* source = nullptr;
  uint64_t bytes = 0;
};
struct ZeroArgs {
  void* target = nullptr;
  uint64_t bytes = 0;
};

absl::Status Run(const CopyArgs& args, Context& context);
absl::Status Run(const ZeroArgs& args, Context& context);
absl::Status Run(const FillNormalArgs& args, Context& context);
absl::Status Run(const EmbedArgs& args, Context& context);
absl::Status Run(const NormArgs& args, Context& context);
absl::Status Run(const GemmArgs& args, Context& context);
absl::Status Run(const SiluGateArgs& args, Context& context);
absl::Status Run(const RotaryArgs& args, Context& context);
absl::Status Run(const TakeRowsArgs& args, Context& context);
absl::Status Run(const ArgmaxArgs& args, Context& context);
absl::Status Run(const AppendArgs& args, Context& context);
absl::Status Run(const DecodeAttentionArgs& args, Context& context);
absl::Status Run(const PrefillAttentionArgs& args, Context& context);
absl::Status Run(const ColumnSumArgs& args, Context& context);
absl::Status Run(const PruneHeavyArgs& args, Context& context);
absl::Status Run(const EvictHeavyArgs& args, Context& context);
absl::Status Run(const RepeatHeadsArgs& args, Context& context);
absl::Status Run(const ProjectHeadsArgs& args, Context& context);
absl::Status Run(const RankColumnsArgs& args, Context& context);
absl::Status Run(const SpeculateArgs& args, Context& context);
absl::Status Run(const SelectTopArgs& args, Context& context);
absl::Status Run(const PlaceTokensArgs& args, Context& context);
absl::Status Run(const GatherRowsArgs& args, Context& context);
absl::Status Run(const CopyTileArgs& args, Context& context);
absl::Status Run(const CopyBlocksArgs& args, Context& context);
absl::Status Run(const AllReduceArgs& args, Context& context);

// How many BLAS threads exist beside the pool: none. Called once for each backend; the library
// keeps it for the whole process.
void UseOneBlasThread();
// What the BLAS says of itself.
const char* BlasDescription();

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_OPERATIONS_H_
