// Rows of keys and values from one view to another, for the operations that only move. Few blocks
// must fill the host link and leave the multiprocessors to the kernels beside them, so a warp has
// kRowsInFlight rows under way at any time, and finds where the next ones lie while it waits.
#ifndef KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_
#define KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_

#include <cuda_runtime.h>

#include "kernels/arguments.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {

inline constexpr int kMoveThreads = 256;
inline constexpr int kMoveWarps = kMoveThreads / 32;
inline constexpr int kRowsInFlight = 8;
inline constexpr int kPairsOfThread = 8;
// (Row, head) pairs that are counted at a time.
inline constexpr int kPairsAtOnce = kPairsOfThread * kMoveThreads;

// A token slot of a row.
struct Place {
  int64_t row;
  int32_t slot;
};

// Which rows each pair moves, in batches of kRowsInFlight; the batches of all pairs are numbered in
// a row, so that warps stay evenly loaded however much each pair has.
struct MoveCounts {
  int32_t rows[kPairsAtOnce];
  int32_t batch_end[kPairsAtOnce];
  int32_t of_warp[kMoveWarps];

  // Counts pairs first .. by all threads: rows_of(pair). Returns the number of batches.
  template <typename RowsOf>
  __device__ int32_t Count(int32_t first, int32_t pairs, const RowsOf& rows_of) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int base = threadIdx.x * kPairsOfThread;
    int32_t own[kPairsOfThread];
#pragma unroll
    for (int i = 0; i < kPairsOfThread; ++i) {
      own[i] = first + base + i < pairs ? rows_of(first + base + i) : 0;
    }
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kPairsOfThread; ++i) {
      sum += (own[i] + kRowsInFlight - 1) / kRowsInFlight;
    }
    int32_t before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    __syncthreads();  // nobody reads the counts of earlier pairs any more
    if (lane == 31) of_warp[warp] = before;
    __syncthreads();
    before -= sum;
    int32_t all = 0;
#pragma unroll
    for (int w = 0; w < kMoveWarps; ++w) {
      if (w < warp) before += of_warp[w];
      all += of_warp[w];
    }
#pragma unroll
    for (int i = 0; i < kPairsOfThread; ++i) {
      before += (own[i] + kRowsInFlight - 1) / kRowsInFlight;
      rows[base + i] = own[i];
      batch_end[base + i] = before;
    }
    __syncthreads();
    return all;
  }

  // The pair that a batch belongs to.
  __device__ int32_t PairOf(int32_t batch) const {
    int32_t low = 0;
    for (int32_t step = kPairsAtOnce / 2; step > 0; step /= 2) {
      if (batch_end[low + step - 1] <= batch) low += step;
    }
    return low;
  }
};

// Rows that a warp has under way: lane j < count knows where row j lies, in bytes from the start of
// the pool of keys or of values.
struct MoveBatch {
  int32_t count = 0;
  int64_t from = 0;
  int64_t to = 0;
};

// Row i of head `head` of row `row` of the target, for every i < rows_of(pair), from the place
// from(pair, i) of the source; pair = row * kv_heads + head. Counts what it moves in link_bytes.
template <typename Unit, typename RowsOf, typename From>
__device__ void MoveHeads(const KvView& target, const KvView& source, int32_t pairs,
                          int32_t kv_heads, int32_t head_dim, const RowsOf& rows_of,
                          const From& from, unsigned long long* link_bytes) {
  static_assert((kPairsAtOnce & (kPairsAtOnce - 1)) == 0);
  __shared__ MoveCounts counts;
  const int lane = threadIdx.x % 32;
  const int64_t element = ElementBytes(source.dtype);
  const int32_t units = static_cast<int32_t>(head_dim * element / sizeof(Unit));
  const int32_t all = target.value == nullptr ? units : 2 * units;
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kMoveWarps;
  int64_t moved = 0;

  for (int32_t first = 0; first < pairs; first += kPairsAtOnce) {
    const int32_t batches = counts.Count(first, pairs, rows_of);
    const auto find = [&](int32_t batch) {
      MoveBatch found;
      if (batch >= batches) return found;
      const int32_t slot = counts.PairOf(batch);
      const int32_t begin = (batch - (slot == 0 ? 0 : counts.batch_end[slot - 1])) * kRowsInFlight;
      found.count = min(kRowsInFlight, counts.rows[slot] - begin);
      if (lane >= found.count) return found;
      const int32_t pair = first + slot;
      const int32_t row = pair / kv_heads;
      const int32_t head = pair - row * kv_heads;
      const Place place = from(pair, begin + lane);
      found.from = KvOffset(source, place.row, place.slot, head) * element;
      found.to = KvOffset(target, row, begin + lane, head) * element;
      return found;
    };
    // Unit `base` + lane of every row of the batch.
    const auto load = [&](const MoveBatch& batch, int32_t base, Unit(&hold)[kRowsInFlight]) {
      const int32_t i = base + lane;
      const std::byte* const pool = i < units ? source.key : source.value;
      const int32_t column = i < units ? i : i - units;
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t at = __shfl_sync(~0u, batch.from, j);
        if (j < batch.count && i < all) {
          hold[j] = __ldcs(reinterpret_cast<const Unit*>(pool + at) + column);
        }
      }
    };
    const auto store = [&](const MoveBatch& batch, int32_t base, const Unit(&hold)[kRowsInFlight]) {
      const int32_t i = base + lane;
      std::byte* const pool = i < units ? target.key : target.value;
      const int32_t column = i < units ? i : i - units;
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t at = __shfl_sync(~0u, batch.to, j);
        if (j < batch.count && i < all) reinterpret_cast<Unit*>(pool + at)[column] = hold[j];
      }
    };
    int32_t batch = static_cast<int32_t>(blockIdx.x) * kMoveWarps + threadIdx.x / 32;
    MoveBatch now = find(batch);
    while (batch < batches) {
      Unit hold[kRowsInFlight];
      load(now, 0, hold);
      batch += warps;
      const MoveBatch next = find(batch);
      store(now, 0, hold);
      for (int32_t base = 32; base < all; base += 32) {
        load(now, base, hold);
        store(now, base, hold);
      }
      moved += now.count;
      now = next;
    }
  }

  if (link_bytes == nullptr) return;
  __shared__ unsigned long long rows_moved;
  if (threadIdx.x == 0) rows_moved = 0;
  __syncthreads();
  // Every lane of a warp has counted the same rows.
  if (lane == 0 && moved > 0) atomicAdd(&rows_moved, static_cast<unsigned long long>(moved));
  __syncthreads();
  if (threadIdx.x == 0 && rows_moved > 0) {
    atomicAdd(link_bytes, rows_moved * all * sizeof(Unit));
  }
}

// Whether both views can be moved 16 bytes at a time.
inline bool CanMoveWide(const KvView& target, const KvView& source, int32_t head_dim) {
  return IsAligned(target) && IsAligned(source) && head_dim * DTypeBytes(source.dtype) % 16 == 0;
}

// Over the link as many blocks as fill it (16 do not on every host, 64 are no faster than 32), on
// the device a few for each multiprocessor; never more than there is work for.
inline int MoveBlocks(const LaunchContext& context, int64_t batches) {
  const int64_t most = context.link_bytes != nullptr ? 32 : 4 * int64_t{context.multiprocessors};
  const int64_t wanted = (batches + kMoveWarps - 1) / kMoveWarps;
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_MOVE_ROWS_CUH_
