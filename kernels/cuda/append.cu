// Keys and values of a step into a view, converted to its format. Target memory may be pinned host
// memory: writes of neighbouring threads lie together, so they cross the link in large pieces.
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rotary.cuh"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads == kRotaryThreads);

// Elements of T that lie together. More than one: the pool has the same format, nothing is
// converted.
template <typename T, int kWidth>
__device__ __forceinline__ void StoreRun(std::byte* pool, DType dtype, int64_t offset,
                                         const Vector<T, kWidth>& run) {
  if constexpr (kWidth > 1) {
    *reinterpret_cast<Vector<T, kWidth>*>(pool + offset * static_cast<int64_t>(sizeof(T))) = run;
  } else {
    StoreElement(pool, dtype, offset, ToFloat(run.element[0]));
  }
}

// One block a token. kWidth elements an access where both sides allow it.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    AppendKernel(const __grid_constant__ AppendArgs args, unsigned long long* link_bytes) {
  const KvView& target = args.target;
  const int64_t token = blockIdx.x;
  ReleaseLaterKernels();
  WaitForEarlierKernels();
  const int64_t table_row = args.table_row[token];
  if (table_row < 0) return;

  const int per_head = args.head_dim / kWidth;
  const int parts = target.value == nullptr ? 1 : 2;
  const int count = args.kv_heads * per_head;
  for (int i = threadIdx.x; i < parts * count; i += kThreads) {
    const bool is_value = i >= count;
    const int within = is_value ? i - count : i;
    const int head = within / per_head;
    const int column = (within - head * per_head) * kWidth;
    const int32_t slot =
        args.slot_by_head ? args.slot[token * args.kv_heads + head] : args.slot[token];
    const Activations& source = is_value ? args.value : args.key;
    const auto run = *reinterpret_cast<const Vector<T, kWidth>*>(
        static_cast<const T*>(source.data) + token * source.stride + int64_t{head} * args.head_dim +
        column);
    if (!HasSlot(target, table_row, slot)) continue;
    StoreRun<T, kWidth>(is_value ? target.value : target.key, target.dtype,
                        KvOffset(target, table_row, slot, head) + column, run);
  }
  if (link_bytes != nullptr && threadIdx.x == 0) {
    const int64_t bytes = int64_t{parts} * args.kv_heads * args.head_dim * DTypeBytes(target.dtype);
    atomicAdd(link_bytes, static_cast<unsigned long long>(bytes));
  }
}

// The same with what stands before it in most layers: the row is turned, and its last kv_heads
// heads are the keys that are stored. Angles and places are found while the row is still under way.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    RotateAndAppendKernel(const __grid_constant__ AppendArgs args) {
  __shared__ RotaryAngles angles;
  ReleaseLaterKernels();
  const KvView& target = args.target;
  const int64_t token = blockIdx.x;
  FindAngles(angles, args.rotary);
  const int64_t table_row = args.table_row[token];
  const int32_t slot = args.slot[token];
  const bool stored = table_row >= 0 && HasSlot(target, table_row, slot);
  const int64_t first = stored ? KvOffset(target, table_row, slot, 0) : 0;
  WaitForEarlierKernels();
  __syncthreads();

  if (stored && target.value != nullptr) {
    const int per_head = args.head_dim / kWidth;
    const T* const value = static_cast<const T*>(args.value.data) + token * args.value.stride;
    // From the last thread on: the first ones have a run to turn.
    for (int i = RowThreads() - 1 - RowThread(); i < args.kv_heads * per_head; i += RowThreads()) {
      const int head = i / per_head;
      const int column = (i - head * per_head) * kWidth;
      StoreRun<T, kWidth>(target.value, target.dtype, first + head * target.head_stride + column,
                          *reinterpret_cast<const Vector<T, kWidth>*>(
                              value + int64_t{head} * args.head_dim + column));
    }
  }
  const int first_key = args.rotary.heads - args.kv_heads;
  RotateRow<T, kWidth>(
      angles, args.rotary, [&](int head, int column, const Vector<T, kWidth>& run) {
        if (!stored || head < first_key) return;
        StoreRun<T, kWidth>(target.key, target.dtype,
                            first + (head - first_key) * target.head_stride + column, run);
      });
}

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 4 ? DType::kF32 : DType::kBf16;

template <typename T>
bool CanAppendWide(const AppendArgs& args) {
  const KvView& target = args.target;
  const bool has_value = target.value != nullptr;
  const auto even = [](int64_t stride) { return stride % kVectorElements<T> == 0; };
  return target.dtype == kDTypeOf<T> &&
         CanVectorise<T>(target.key, target.token_stride, args.head_dim) &&
         (!has_value || CanVectorise<T>(target.value, 0, args.head_dim)) &&
         even(target.block_stride) && even(target.head_stride) &&
         CanVectorise<T>(args.key.data, args.key.stride, args.head_dim) &&
         (!has_value || CanVectorise<T>(args.value.data, args.value.stride, 0));
}

// Whether one launch turns and stores.
template <typename T>
bool CanJoin(const AppendArgs& args, const LaunchContext& context) {
  const RotaryArgs& rotary = args.rotary;
  const T* const first_key = static_cast<const T*>(rotary.data.data) +
                             int64_t{rotary.heads - args.kv_heads} * args.head_dim;
  return rotary.heads >= args.kv_heads && rotary.head_dim == args.head_dim &&
         rotary.rows == args.rows && rotary.data.stride == args.key.stride &&
         args.key.data == first_key && args.head_dim <= 2 * kMostRotaryHalf && !args.slot_by_head &&
         context.link_bytes == nullptr;
}

}  // namespace

cudaError_t Launch(const AppendArgs& args, const LaunchContext& context) {
  return WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const unsigned rows = static_cast<unsigned>(args.rows);
    const bool wide = CanAppendWide<T>(args);
    if (args.rotary.data.data != nullptr && CanJoin<T>(args, context)) {
      const auto kernel = wide && CanRotateWide<T>(args.rotary)
                              ? RotateAndAppendKernel<T, kVectorElements<T>>
                              : RotateAndAppendKernel<T, 1>;
      return LaunchDependent(context, kernel, RotaryGrid(args.rows), kThreads, 0, args);
    }
    const bool turns = args.rotary.data.data != nullptr && args.rotary.rows > 0;
    if (turns) {
      const cudaError_t error = Launch(args.rotary, context);
      if (error != cudaSuccess) return error;
    }
    const auto kernel = wide ? AppendKernel<T, kVectorElements<T>> : AppendKernel<T, 1>;
    return LaunchDependent(turns ? AfterKernel(context) : context, kernel, rows, kThreads, 0, args,
                           context.link_bytes);
  });
}

}  // namespace kvsweep::cuda
