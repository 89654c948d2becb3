// Keys and values of a step into a view, converted to its format. Target memory may be pinned host
// memory: writes of neighbouring threads lie together, so they cross the link in large pieces.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;

// One block a token. kWidth elements an access where both sides allow it.
template <typename T, int kWidth>
__global__ void AppendKernel(AppendArgs args, unsigned long long* link_bytes) {
  const KvView& target = args.target;
  const int64_t token = blockIdx.x;
  const int64_t table_row = args.table_row[token];
  if (table_row < 0) return;
  const bool has_table = target.block_table != nullptr;

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
    // A slot that the table does not have is never written.
    const int32_t block = slot / target.block_size;
    if (slot < 0 || block >= (has_table ? target.block_table_stride : 1)) continue;
    if (has_table && target.block_table[table_row * target.block_table_stride + block] < 0) {
      continue;
    }
    const Activations& source = is_value ? args.value : args.key;
    const T* const in = static_cast<const T*>(source.data) + token * source.stride +
                        int64_t{head} * args.head_dim + column;
    const int64_t offset = KvOffset(target, table_row, slot, head) + column;
    std::byte* const pool = is_value ? target.value : target.key;
    if constexpr (kWidth > 1) {
      // The same 16-bit format on both sides: nothing to convert.
      *reinterpret_cast<uint4*>(pool + offset * static_cast<int64_t>(sizeof(T))) =
          *reinterpret_cast<const uint4*>(in);
    } else {
      StoreElement(pool, target.dtype, offset, ToFloat(*in));
    }
  }
  if (link_bytes != nullptr && threadIdx.x == 0) {
    const int64_t bytes = int64_t{parts} * args.kv_heads * args.head_dim * DTypeBytes(target.dtype);
    atomicAdd(link_bytes, static_cast<unsigned long long>(bytes));
  }
}

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 4 ? DType::kF32 : DType::kBf16;

}  // namespace

cudaError_t Launch(const AppendArgs& args, const LaunchContext& context) {
  WithActivations(context.activation_dtype, [&](auto element) {
    using T = decltype(element);
    const KvView& target = args.target;
    const bool has_value = target.value != nullptr;
    const auto even = [](int64_t stride) { return stride % kVectorElements<T> == 0; };
    const bool wide = target.dtype == kDTypeOf<T> &&
                      CanVectorise<T>(target.key, target.token_stride, args.head_dim) &&
                      (!has_value || CanVectorise<T>(target.value, 0, args.head_dim)) &&
                      even(target.block_stride) && even(target.head_stride) &&
                      CanVectorise<T>(args.key.data, args.key.stride, args.head_dim) &&
                      (!has_value || CanVectorise<T>(args.value.data, args.value.stride, 0));
    const auto kernel = wide ? AppendKernel<T, kVectorElements<T>> : AppendKernel<T, 1>;
    kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, context.stream>>>(args,
                                                                              context.link_bytes);
  });
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
