// From the CUDA backend to its kernels: one operation a file, each with a launcher that enqueues on
// the context's stream and returns what the launch said (cudaGetLastError after the last kernel).
//
// A launcher only enqueues: no synchronisation, no allocation, no copy of a host variable, so that
// every one of them can be captured into a graph.
// rows == 0 never reaches a launcher. What varies from step to step is read through the arguments'
// device pointers.
//
// Host memory of the backend is pinned and mapped: its pointers are valid in kernels as they are.
#ifndef KVSWEEP_KERNELS_CUDA_LAUNCH_H_
#define KVSWEEP_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace kvsweep::cuda {

// What a launcher runs with.
struct LaunchContext {
  cudaStream_t stream = nullptr;
  DType activation_dtype = DType::kBf16;  // of Activations: kBf16 or kF32
  DType weight_dtype = DType::kBf16;      // of matrices and tables: the same as activation_dtype
  bool batch_invariant = false;           // fixed reduction orders and split sizes
  int multiprocessors = 1;
  int architecture = 90;  // 10 * major + minor
  // Whether the last work in the stream is a kernel, nothing else and no wait for another stream:
  // then the launch may be a dependent one (dependent_launch.cuh).
  bool follows_kernel = false;
  // Scratch of this stream: content undefined at every launch, 256-byte aligned.
  std::byte* workspace = nullptr;
  size_t workspace_bytes = 0;
  // Zeroed counters of this stream for "the last block goes on" schemes; a kernel leaves them zero.
  uint32_t* tickets = nullptr;
  int ticket_count = 0;
  // Where a kernel that moves keys and values over the host link adds the bytes it moved (integer
  // atomics, one for each block); nullptr: both sides are on the device, nothing to count.
  unsigned long long* link_bytes = nullptr;
};

// For the second and later kernels of one launcher.
inline LaunchContext AfterKernel(LaunchContext context) {
  context.follows_kernel = true;
  return context;
}

// Projections need more than a launch: products.h.

cudaError_t Launch(const FillNormalArgs& args, const LaunchContext& context);
cudaError_t Launch(const EmbedArgs& args, const LaunchContext& context);
cudaError_t Launch(const NormArgs& args, const LaunchContext& context);
cudaError_t Launch(const SiluGateArgs& args, const LaunchContext& context);
cudaError_t Launch(const RotaryArgs& args, const LaunchContext& context);
cudaError_t Launch(const TakeRowsArgs& args, const LaunchContext& context);
cudaError_t Launch(const ArgmaxArgs& args, const LaunchContext& context);
cudaError_t Launch(const AppendArgs& args, const LaunchContext& context);
cudaError_t Launch(const CopyBlocksArgs& args, const LaunchContext& context);
cudaError_t Launch(const RepeatHeadsArgs& args, const LaunchContext& context);
cudaError_t Launch(const RankColumnsArgs& args, const LaunchContext& context);
cudaError_t Launch(const PlaceTokensArgs& args, const LaunchContext& context);

cudaError_t Launch(const DecodeAttentionArgs& args, const LaunchContext& context);
// Whether one kernel appends and attends (decode_attention.cu), and that one. REQUIRES: what is
// appended to lies on the device.
bool CanAppendAndAttend(const AppendAndAttendArgs& args, const LaunchContext& context);
cudaError_t Launch(const AppendAndAttendArgs& args, const LaunchContext& context);
cudaError_t Launch(const PrefillAttentionArgs& args, const LaunchContext& context);
cudaError_t Launch(const ColumnSumArgs& args, const LaunchContext& context);
cudaError_t Launch(const PruneHeavyArgs& args, const LaunchContext& context);
cudaError_t Launch(const EvictHeavyArgs& args, const LaunchContext& context);
cudaError_t Launch(const ProjectHeadsArgs& args, const LaunchContext& context);
cudaError_t Launch(const SpeculateArgs& args, const LaunchContext& context);
cudaError_t Launch(const SelectTopArgs& args, const LaunchContext& context);
cudaError_t Launch(const GatherRowsArgs& args, const LaunchContext& context);
cudaError_t Launch(const CopyTileArgs& args, const LaunchContext& context);

// A copy between the tiers that a kernel does sooner than the copy engine (copy_small.cu), and that
// kernel. REQUIRES: both sides are memory of the backend.
bool IsSmallCopy(const void* target, const void* source, uint64_t bytes);
cudaError_t LaunchSmallCopy(void* target, const void* source, uint64_t bytes,
                            const LaunchContext& context);

// How decode attention splits its keys (decode_attention.cu).
AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads,
                            const LaunchContext& context);

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_LAUNCH_H_
