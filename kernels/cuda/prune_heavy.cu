// H2O's prune at the end of a prompt: one block for each KV head chooses the heavy tokens and moves
// all that stay, in place. Targets never lie behind their sources, so rows that move in ascending
// order, a batch at a time (all read, then all written), overwrite nothing that is still needed;
// the ring is then formed by turning the recent rows round.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

// One head of one row.
struct Head {
  const PruneHeavyArgs& args;
  int32_t head;

  __device__ bool scored() const { return args.score.data != nullptr; }
  __device__ bool placed() const { return args.position.data != nullptr; }
  __device__ bool ranked() const { return args.rank.data != nullptr; }
  __device__ float& Score(int32_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, args.table_row, slot, head)];
  }
  __device__ int32_t& Position(int32_t slot) const {
    return static_cast<int32_t*>(
        args.position.data)[SlotOffset(args.position, args.table_row, slot, head)];
  }
  __device__ int32_t& Rank(int32_t slot) const {
    return static_cast<int32_t*>(args.rank.data)[SlotOffset(args.rank, args.table_row, slot, head)];
  }
  // What a slot is compared by.
  __device__ float Worth(int32_t slot) const {
    if (!args.scoring.mean) return Score(slot);
    const int32_t end = args.first_position + args.tokens - args.placed;
    return Score(slot) / static_cast<float>(end - Position(slot));
  }
  // Unit `i` of a slot's key, then of its value.
  template <typename Unit>
  __device__ Unit& At(int32_t slot, int32_t i, int32_t units) const {
    const int64_t offset =
        KvOffset(args.view, args.table_row, slot, head) * ElementBytes(args.view.dtype);
    std::byte* const pool = i < units ? args.view.key : args.view.value;
    return reinterpret_cast<Unit*>(pool + offset)[i < units ? i : i - units];
  }
};

// Moves `count` slots source[j] -> target[j] (in shared memory), a warp each, a batch at a time.
// Between the batches all threads meet, so what a batch writes may be what it has read.
template <typename Unit>
__device__ void MoveSlots(const Head& at, const int32_t* source, const int32_t* target,
                          int32_t count) {
  constexpr int kUnits = 4;  // that a lane holds
  const int32_t units = at.args.head_dim * ElementBytes(at.args.view.dtype) / sizeof(Unit);
  const int lane = threadIdx.x % 32;
  for (int32_t base = 0; base < count; base += kSelectWarps) {
    const int32_t j = base + threadIdx.x / 32;
    const bool moves = j < count && source[j] != target[j];
    for (int32_t piece = 0; piece < 2 * units; piece += 32 * kUnits) {
      Unit hold[kUnits];
      float score = 0.0f;
      int32_t position = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int32_t i = piece + u * 32 + lane;
        if (moves && i < 2 * units) hold[u] = at.template At<Unit>(source[j], i, units);
      }
      if (moves && piece == 0 && lane == 0) {
        if (at.scored()) score = at.Score(source[j]);
        if (at.placed()) position = at.Position(source[j]);
      }
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int32_t i = piece + u * 32 + lane;
        if (moves && i < 2 * units) at.template At<Unit>(target[j], i, units) = hold[u];
      }
      if (moves && piece == 0 && lane == 0) {
        if (at.scored()) at.Score(target[j]) = score;
        if (at.placed()) at.Position(target[j]) = position;
      }
      __syncthreads();
    }
  }
}

// Exchanges the slots of [begin, end) with their mirror images.
template <typename Unit>
__device__ void Reverse(const Head& at, int32_t begin, int32_t end) {
  const int32_t units = at.args.head_dim * ElementBytes(at.args.view.dtype) / sizeof(Unit);
  const int lane = threadIdx.x % 32;
  for (int32_t j = threadIdx.x / 32; j < (end - begin) / 2; j += kSelectWarps) {
    const int32_t a = begin + j;
    const int32_t b = end - 1 - j;
    for (int32_t i = lane; i < 2 * units; i += 32) {
      Unit& low = at.template At<Unit>(a, i, units);
      Unit& high = at.template At<Unit>(b, i, units);
      const Unit held = low;
      low = high;
      high = held;
    }
    if (lane != 0) continue;
    if (at.scored()) {
      const float held = at.Score(a);
      at.Score(a) = at.Score(b);
      at.Score(b) = held;
    }
    if (at.placed()) {
      const int32_t held = at.Position(a);
      at.Position(a) = at.Position(b);
      at.Position(b) = held;
    }
  }
  __syncthreads();
}

template <typename Unit>
__global__ void __launch_bounds__(kSelectThreads)
    PruneHeavyKernel(const __grid_constant__ PruneHeavyArgs args) {
  __shared__ SelectScratch scratch;
  __shared__ int32_t source[kSelectThreads];
  __shared__ int32_t target[kSelectThreads];
  const Head at{args, static_cast<int32_t>(blockIdx.x)};
  for (int32_t slot = args.placed + threadIdx.x; slot < args.tokens; slot += kSelectThreads) {
    if (at.placed()) at.Position(slot) = args.first_position + slot - args.placed;
    if (at.ranked()) at.Rank(slot) = slot;
  }
  if (args.tokens <= args.heavy + args.recent) return;
  __syncthreads();

  // Heavy: the sinks stand where they are, the chosen ones move up behind them.
  const int32_t first_recent = args.tokens - args.recent;
  const int32_t sinks = min(args.sinks, args.heavy);
  if (at.scored() && sinks < args.heavy) {
    const auto key = [&](int32_t i) { return OrderedKey(at.Worth(sinks + i)); };
    const int32_t candidates = first_recent - sinks;
    const Threshold threshold = FindThreshold(scratch, candidates, args.heavy - sinks, key);
    int32_t ties = threshold.ties;
    int32_t next = sinks;
    for (int32_t base = 0; base < candidates; base += kSelectThreads) {
      const int32_t i = base + threadIdx.x;
      const uint32_t own = i < candidates ? key(i) : 0;
      const bool equal = i < candidates && own == threshold.key;
      int32_t tied;
      const int32_t rank = BlockScan(scratch, equal ? 1 : 0, tied);
      const bool takes = (i < candidates && own > threshold.key) || (equal && rank < ties);
      int32_t taken;
      const int32_t place = BlockScan(scratch, takes ? 1 : 0, taken);
      if (takes) {
        source[place] = sinks + i;
        target[place] = next + place;
      }
      __syncthreads();
      MoveSlots<Unit>(at, source, target, taken);
      ties -= min(ties, tied);
      next += taken;
      __syncthreads();
    }
  }

  // Recent: ascending behind the heavy ones, then turned until each is in its place of the ring.
  for (int32_t base = 0; base < args.recent; base += kSelectThreads) {
    const int32_t count = min(kSelectThreads, args.recent - base);
    source[threadIdx.x] = first_recent + base + threadIdx.x;
    target[threadIdx.x] = args.heavy + base + threadIdx.x;
    __syncthreads();
    MoveSlots<Unit>(at, source, target, count);
    __syncthreads();
  }
  int32_t turn = 0;  // places by which the first recent token lies behind the start of the ring
  if (args.ring && args.recent > 0) {
    const int32_t first_position = args.first_position + args.tokens - args.placed - args.recent;
    turn = (first_position - args.heavy) % args.recent;
    if (turn > 0) {
      const int32_t end = args.heavy + args.recent;
      Reverse<Unit>(at, args.heavy, end);
      Reverse<Unit>(at, args.heavy, args.heavy + turn);
      Reverse<Unit>(at, args.heavy + turn, end);
    }
  }
  if (!at.ranked()) return;
  for (int32_t i = threadIdx.x; i < args.heavy + args.recent; i += kSelectThreads) {
    const int32_t slot = i < args.heavy ? i : args.heavy + (i - args.heavy + turn) % args.recent;
    at.Rank(slot) = i;
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const PruneHeavyArgs& args, const LaunchContext& context) {
  const bool wide = IsAligned(args.view) && args.head_dim * DTypeBytes(args.view.dtype) % 16 == 0;
  if (wide) {
    PruneHeavyKernel<uint4><<<args.kv_heads, kSelectThreads, 0, context.stream>>>(args);
  } else {
    PruneHeavyKernel<uint8_t><<<args.kv_heads, kSelectThreads, 0, context.stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
