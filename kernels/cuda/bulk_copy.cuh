// Bulk copies into shared memory and the barriers that say when they have landed: one thread asks
// for kilobytes, and no register or load slot is held until they are there. Compute capability 9.0.
#ifndef KVSWEEP_KERNELS_CUDA_BULK_COPY_CUH_
#define KVSWEEP_KERNELS_CUDA_BULK_COPY_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace kvsweep::cuda {

// A barrier counts arrivals and bytes of one phase; when both are complete the next phase begins.
// Barriers are named by their address in shared memory.
__device__ __forceinline__ void InitialiseBarrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initialisation of all barriers, before the block's threads meet.
__device__ __forceinline__ void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase end only when so many bytes have landed too.
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase of that parity has ended: at once for parity 1 of a new barrier.
__device__ __forceinline__ void WaitPhase(uint32_t barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Copies `bytes` (a multiple of 16, both sides aligned to 16) from global memory that is read once:
// its lines are the first to leave the cache.
__device__ __forceinline__ uint64_t ReadOncePolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void CopyBulk(uint32_t target, const void* source, uint32_t bytes,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The box of a matrix (tensor_map.h: MakeMatrixMap) at (column, row), to shared memory; elements
// outside of it are zeros. Its bytes count at `barrier`.
__device__ __forceinline__ void CopyMatrixBox(uint32_t target, const CUtensorMap& map,
                                              uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void CopyMatrixBox(uint32_t target, const CUtensorMap& map,
                                              uint32_t barrier, int column, int row,
                                              uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// Between this thread's ordinary accesses to shared memory and products or copies of other threads:
// these see what it wrote, and overwrite nothing that it has yet to read.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Threads of some warps of the block meet; `name` 1 .. 15, `threads` a multiple of 32.
__device__ __forceinline__ void MeetWarps(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
// The same of a warp that does not wait for the others.
__device__ __forceinline__ void ArriveAtMeeting(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_BULK_COPY_CUH_
