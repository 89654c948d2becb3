// Dependent launch: a kernel's blocks become resident while the kernel before it in the stream
// still runs, so that its start (and what it may read early) hides behind the other's end. Under
// stream capture the order of two such kernels becomes a programmatic edge of the graph.
//
// The contract of a kernel that is started by LaunchDependent:
// - Every thread calls WaitForEarlierKernels before it reads anything that an earlier kernel may
//   have written (activations, caches, workspace, tickets) and before it writes
//   anything that an earlier kernel may read or write. No thread returns before that call: that all
//   of a kernel's blocks have waited is what makes its own end mean the end of all before it.
//   Ahead of the call only the kernel's arguments and constants of the model may be read (weights,
//   biases, tables that are written when the model is loaded), and the arrays that say which rows
//   are active, at what position, how long, how many of their slots are heavy or recent, how many
//   may be selected and where they are stored: copies write those (or another stream, behind a
//   wait), and a kernel behind either starts ordinarily. Decode attention also reads stored keys and
//   values early, and speculation stored partial keys: earlier steps wrote them, or, of this step,
//   another stream (a wait for an event makes the launch ordinary) or the copies of a fork
//   (CopyBlocks makes the next launch ordinary).
// - Every block calls ReleaseLaterKernels as early as it can, usually first of all: blocks of the
//   next kernel start when every block of this one has called it (or has ended), and those wait for
//   this one's end on their own. A kernel that never calls it is right too, and hides nothing.
//   A block that waits holds its registers and shared memory meanwhile.
// - A kernel that writes constants of the model does not release: ordinary launch, ordinary end.
//
// Ordinary kernels may stand before and behind dependent ones.
#ifndef KVSWEEP_KERNELS_CUDA_DEPENDENT_LAUNCH_CUH_
#define KVSWEEP_KERNELS_CUDA_DEPENDENT_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {

// Until every earlier kernel of the stream has ended and what it wrote is visible. Does nothing
// where the launch was an ordinary one.
__device__ __forceinline__ void WaitForEarlierKernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start once all of this one's have called this.
__device__ __forceinline__ void ReleaseLaterKernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Enqueues kernel<<<grid, threads, shared_bytes, context.stream>>>(arguments...), dependent on the
// kernel before it where there is one (context.follows_kernel) and the device can. `kernel` keeps
// the contract above. Blocks come in clusters of `cluster`, which divides the grid's x.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchDependentClusters(const LaunchContext& context, void (*kernel)(Parameters...),
                                    dim3 grid, dim3 threads, size_t shared_bytes, unsigned cluster,
                                    Arguments&&... arguments) {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  // For all kernels that run beside others alike, since a multiprocessor takes no block of a kernel
  // that wants shared memory divided otherwise before all others have ended.
  cudaLaunchAttribute& division = attributes[config.numAttrs++];
  division.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  division.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  if (context.follows_kernel && context.architecture >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchDependent(const LaunchContext& context, void (*kernel)(Parameters...), dim3 grid,
                            dim3 threads, size_t shared_bytes, Arguments&&... arguments) {
  return LaunchDependentClusters(context, kernel, grid, threads, shared_bytes, 1,
                                 std::forward<Arguments>(arguments)...);
}

// The same behind the end of all earlier kernels, for kernels that do not keep the contract.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOrdinary(LaunchContext context, void (*kernel)(Parameters...), dim3 grid,
                           dim3 threads, size_t shared_bytes, Arguments&&... arguments) {
  context.follows_kernel = false;
  return LaunchDependent(context, kernel, grid, threads, shared_bytes,
                         std::forward<Arguments>(arguments)...);
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_DEPENDENT_LAUNCH_CUH_
