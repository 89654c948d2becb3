// Rows of keys and values from one view to another, for the operations that only move: a warp
// starts kRowsInFlight rows before it writes the first, so that few blocks fill the host link and
// leave the multiprocessors to the kernels beside them.
#ifndef KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_
#define KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_

#include <cuda_runtime.h>

#include "kernels/arguments.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {

inline constexpr int kMoveThreads = 128;
inline constexpr int kRowsInFlight = 8;

// A token slot of a row.
struct Place {
  int64_t row;
  int32_t slot;
};

// Moves kRowsInFlight slots of one head, by a warp: to(j) and from(j) for j < count.
template <typename Unit, typename To, typename From>
__device__ __forceinline__ void MoveRows(const KvView& target, const KvView& source, int32_t head,
                                         int32_t head_dim, int32_t count, const To& to,
                                         const From& from) {
  const int lane = threadIdx.x % 32;
  const int64_t element = ElementBytes(source.dtype);
  const int32_t units = static_cast<int32_t>(head_dim * element / sizeof(Unit));
  const int32_t all = target.value == nullptr ? units : 2 * units;
  for (int32_t base = 0; base < all; base += 32) {
    const int32_t i = base + lane;
    const bool is_value = i >= units;
    const int32_t column = is_value ? i - units : i;
    Unit hold[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (j >= count || i >= all) continue;
      const Place place = from(j);
      const std::byte* const pool = is_value ? source.value : source.key;
      const int64_t offset = KvOffset(source, place.row, place.slot, head) * element;
      hold[j] = __ldcs(reinterpret_cast<const Unit*>(pool + offset) + column);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (j >= count || i >= all) continue;
      const Place place = to(j);
      std::byte* const pool = is_value ? target.value : target.key;
      const int64_t offset = KvOffset(target, place.row, place.slot, head) * element;
      reinterpret_cast<Unit*>(pool + offset)[column] = hold[j];
    }
  }
}

// Adds what a block has moved over the host link.
__device__ __forceinline__ void CountLinkBytes(unsigned long long* link_bytes, int64_t rows,
                                               int64_t row_bytes) {
  if (link_bytes == nullptr) return;
  __shared__ unsigned long long moved;
  if (threadIdx.x == 0) moved = 0;
  __syncthreads();
  // Every lane of a warp has counted the same rows.
  if (threadIdx.x % 32 == 0 && rows > 0) {
    atomicAdd(&moved, static_cast<unsigned long long>(rows * row_bytes));
  }
  __syncthreads();
  if (threadIdx.x == 0 && moved > 0) atomicAdd(link_bytes, moved);
}

// Whether both views can be moved 16 bytes at a time.
inline bool CanMoveWide(const KvView& target, const KvView& source, int32_t head_dim) {
  return IsAligned(target) && IsAligned(source) && head_dim * DTypeBytes(source.dtype) % 16 == 0;
}

// Over the link few blocks, on the device a few for each multiprocessor; never more than there is
// work for.
inline int MoveBlocks(const LaunchContext& context, int64_t warps_of_work) {
  const int64_t most = context.link_bytes != nullptr ? 16 : 8 * int64_t{context.multiprocessors};
  const int64_t wanted = (warps_of_work + kMoveThreads / 32 - 1) / (kMoveThreads / 32);
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_
