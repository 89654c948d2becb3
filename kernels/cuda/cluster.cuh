// Blocks that work on one thing together: a cluster, whose blocks read each other's shared memory
// and send into it, or one block alone. Clusters need compute capability 9.0.
#ifndef KVSWEEP_KERNELS_CUDA_CLUSTER_CUH_
#define KVSWEEP_KERNELS_CUDA_CLUSTER_CUH_

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

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
  // A meeting in two halves, by all threads of a cluster: what came before the first half is
  // visible to the other blocks behind their second. A thread that ends instead keeps nobody
  // waiting.
  __device__ void Arrive() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
  }
  __device__ void AwaitArrivals() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  }
  // Stores `value` into the variable of another block of the cluster, which runs, and lets its
  // bytes count at that block's barrier. Nobody waits; this block may end before they are there.
  __device__ void Send(float& shared, const float4& value, int other, uint64_t& barrier) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
        "{%1, %2, %3, %4}, [%5];" ::"r"(AddressAt(&shared, other)),
        "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
        "r"(__float_as_uint(value.w)), "r"(AddressAt(&barrier, other))
        : "memory");
#endif
  }
  // The same of 8 bytes.
  template <typename T>
  __device__ void Send(T& shared, const T& value, int other, uint64_t& barrier) const {
    static_assert(sizeof(T) == 8);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto& words = reinterpret_cast<const uint32_t(&)[2]>(value);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
        "[%3];" ::"r"(AddressAt(&shared, other)),
        "r"(words[0]), "r"(words[1]), "r"(AddressAt(&barrier, other))
        : "memory");
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

 private:
  // Of a variable in shared memory, as block `other` has it.
  static __device__ uint32_t AddressAt(const void* shared, int other) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(other));
#endif
    return address;
  }
};

// Until what is sent to this block's barrier has arrived, in the phase of that parity.
__device__ __forceinline__ void AwaitSent(uint32_t barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
#endif
}

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
