// Slots for new tokens in pools that are bounded: one block for each token and KV head, which looks
// for the least used slot where the pool is full.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The least used of `capacity` slots without the newer half; of equal ones the highest position.
__device__ int32_t Victim(SelectScratch& scratch, const PlaceTokensArgs& args, int64_t row,
                          int32_t head, int32_t capacity) {
  __shared__ int3 of_warp[kWarps];  // mark, position, slot
  const auto position = [&](int32_t slot) {
    return static_cast<const int32_t*>(
        args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)];
  };
  // The older half ends at the (capacity - capacity / 2)-th lowest position.
  const Threshold newest =
      FindThreshold<kThreads>(scratch, capacity, capacity - capacity / 2,
                              [&](int32_t slot) { return ~static_cast<uint32_t>(position(slot)); });
  const int32_t newest_position = static_cast<int32_t>(~newest.key);
  const auto better = [](const int3& a, const int3& b) {
    return a.z >= 0 && (b.z < 0 || a.x < b.x || (a.x == b.x && a.y > b.y));
  };
  int3 mine = make_int3(0, 0, -1);
  for (int32_t slot = threadIdx.x; slot < capacity; slot += kThreads) {
    const int32_t place = position(slot);
    if (place > newest_position) continue;
    const int3 other =
        make_int3(static_cast<const int32_t*>(args.use.data)[SlotOffset(args.use, row, slot, head)],
                  place, slot);
    if (better(other, mine)) mine = other;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const int3 other =
        make_int3(__shfl_xor_sync(~0u, mine.x, offset), __shfl_xor_sync(~0u, mine.y, offset),
                  __shfl_xor_sync(~0u, mine.z, offset));
    if (better(other, mine)) mine = other;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (better(of_warp[w], mine)) mine = of_warp[w];
  }
  return mine.z;
}

__global__ void __launch_bounds__(kThreads)
    PlaceTokensKernel(const __grid_constant__ PlaceTokensArgs args) {
  __shared__ SelectScratch scratch;
  const int32_t token = blockIdx.x / args.kv_heads;
  const int32_t head = blockIdx.x % args.kv_heads;
  ReleaseLaterKernels();
  const int64_t row = args.table_row[token];
  WaitForEarlierKernels();
  if (row < 0) return;
  int32_t slot = args.planned[token];
  const bool decides = token < args.decided_rows && args.use_rule != SlotUse::kNone &&
                       args.position[token] >= args.capacity[token];
  if (decides) slot = Victim(scratch, args, row, head, args.capacity[token]);
  if (threadIdx.x != 0 || slot < 0) return;
  args.slot[blockIdx.x] = slot;
  static_cast<int32_t*>(args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)] =
      args.position[token];
  if (args.use.data == nullptr) return;
  static_cast<int32_t*>(args.use.data)[SlotOffset(args.use, row, slot, head)] =
      args.use_rule == SlotUse::kStamp ? args.position[token] : 0;
}

}  // namespace

// ----------------------------------------------------------------------------------------
// launchers

cudaError_t Launch(const PlaceTokensArgs& args, const LaunchContext& context) {
  return LaunchDependent(context, PlaceTokensKernel,
                         static_cast<unsigned>(args.rows * args.kv_heads), kThreads, 0, args);
}

}  // namespace kvsweep::cuda
