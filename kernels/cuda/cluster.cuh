// Blocks that work on one thing together: a cluster, whose blocks read each other's shared memory,
// or one block alone. Clusters need compute capability 9.0.
#ifndef KVSWEEP_KERNELS_CUDA_CLUSTER_CUH_
#define KVSWEEP_KERNELS_CUDA_CLUSTER_CUH_

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace kvsweep::cuda {

struct Team {
  int size;
  int rank;

  __device__ void Meet() const {
    if (size == 1) return __syncthreads();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }
  // The same variable of another block.
  template <typename T>
  __device__ const T& Of(T& shared, int other) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) return *cooperative_groups::this_cluster().map_shared_rank(&shared, other);
#endif
    return shared;
  }
};

inline __device__ Team ClusterTeam() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  return {static_cast<int>(cluster.num_blocks()), static_cast<int>(cluster.block_rank())};
#else
  return {1, 0};
#endif
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_CLUSTER_CUH_
