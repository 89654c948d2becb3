// The plain values that every kernel interface speaks in: element types, tensors as pointer and
// strides, and the one view of a KV cache that all strategies hand to the same attention kernels.
// Shapes stand in brackets: [T] tokens of a step, [B] decode rows, Hq query heads, Hk KV heads, d
// head dimension, g = Hq / Hk.
#ifndef KVSWEEP_KERNELS_SHAPES_H_
#define KVSWEEP_KERNELS_SHAPES_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvsweep {

// kFp8E4m3 stores keys and values alone (paged cache): 4 bits of exponent, 3 of mantissa, no
// infinity, the largest number 448, with a scale of 1.
enum class DType : uint8_t { kF32, kBf16, kF16, kFp8E4m3 };

// Bytes of one element.
constexpr int64_t DTypeBytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kFp8E4m3 ? 1 : 2;
}

// "f32", "bf16", "f16", "fp8_e4m3".
const char* DTypeName(DType dtype);

// Elements of `dtype`, at any alignment, to and from f32: widening is exact, narrowing rounds to
// nearest even (NaN stays NaN, what is too large becomes infinity, or 448 in kFp8E4m3).
void ToFloats(const void* elements, DType dtype, std::span<float> out);
void FromFloats(std::span<const float> values, DType dtype, void* out);

// One number of kFp8E4m3, likewise.
constexpr float WidenFp8E4m3(uint8_t byte) {
  const uint32_t sign = uint32_t{byte & 0x80u} << 24;
  const uint32_t exponent = (byte >> 3) & 0xfu;
  const uint32_t mantissa = byte & 0x7u;
  if (exponent == 0xf && mantissa == 0x7) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent != 0)
    return std::bit_cast<float>(sign | (exponent + 127 - 7) << 23 | mantissa << 20);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  return sign != 0 ? -magnitude : magnitude;
}
uint8_t NarrowFp8E4m3(float value);

// Device memory is read by kernels at full speed; host memory is pinned and reached over the link.
enum class Tier : uint8_t { kDevice, kHost };

// Rows of activations, f32 on the CPU backend, the backend's activation type elsewhere: [rows,
// columns], rows `stride` elements apart. Heads lie side by side inside a row: head h of a row
// starts at column h * d.
struct Activations {
  void* data = nullptr;
  int64_t stride = 0;
};

// Keys and values of many sequences, by numbers alone. Row b of the block table names the blocks of
// one sequence; token slot t of KV head h of that row lies, in elements of `dtype` from `key` (and
// likewise from `value`), at
//   block_table[b, t / block_size] * block_stride + (t % block_size) * token_stride + h *
//   head_stride.
// Paged blocks, H2O's slabs, InfiniGen's partial keys, fetched rows, ring tiles and the host pool
// are all this view with other numbers.
//
// Attention over a view reads the slots [0, n) with n = clamp(length[b * length_stride + h *
// length_head_stride] - first_token, 0, max_tokens); first_token and max_tokens let tiles of a
// longer sequence share its lengths, slot 0 of the tile being token first_token.
struct KvView {
  std::byte* key = nullptr;
  std::byte* value = nullptr;  // nullptr: keys only
  DType dtype = DType::kF32;
  int32_t block_size = 1;    // token slots of a block
  int64_t block_stride = 0;  // elements
  int64_t token_stride = 0;  // elements
  int64_t head_stride = 0;   // elements
  // [rows, block_table_stride], device; nullptr: block b of row b (contiguous). Entries past a row's
  // length may be read, and are not used.
  const int32_t* block_table = nullptr;
  int32_t block_table_stride = 0;
  const int32_t* length = nullptr;  // [rows] or [rows, Hk], device
  int32_t length_stride = 1;
  int32_t length_head_stride = 0;  // 1: a length for each KV head
  int32_t first_token = 0;
  int32_t max_tokens = INT32_MAX;
};

// A number for each (row, KV head, slot) that lies in the same blocks as the KV it belongs to:
// accumulated scores, original positions. Slot t of head h of row b lies, in elements of 4 bytes
// from `data`, at
//   block_table[b, t / block_size] * block_stride + h * head_stride + t % block_size.
struct SlotView {
  void* data = nullptr;  // float or int32_t
  int32_t block_size = 1;
  int64_t block_stride = 0;
  int64_t head_stride = 0;
  const int32_t* block_table = nullptr;  // as in KvView
  int32_t block_table_stride = 0;
};

// Attention over a part of the keys, ready to be merged with other parts: softmax numerators times
// values, their maximum exponent and their sum. Empty parts have maximum -inf and sum 0; merging
// empties gives an output of 0, never NaN. f32 on every backend.
struct PartialAttention {
  float* output = nullptr;   // [rows, Hq, d], not yet divided by sum
  float* maximum = nullptr;  // [rows, Hq], of the scaled scores
  float* sum = nullptr;      // [rows, Hq], of exp(score - maximum)
};

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_SHAPES_H_
