// Rows of keys and values behind a KvView, converted to and from f32.
#ifndef KVSWEEP_KERNELS_CPU_KV_ROWS_H_
#define KVSWEEP_KERNELS_CPU_KV_ROWS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace kvsweep::cpu {

// Elements from the start of the pool to slot `token` of head `head` of block table row `row`.
inline int64_t KvOffset(const KvView& view, int64_t row, int64_t token, int64_t head) {
  const int64_t block = token / view.block_size;
  const int64_t id =
      view.block_table == nullptr ? row : view.block_table[row * view.block_table_stride + block];
  return id * view.block_stride + (token % view.block_size) * view.token_stride +
         head * view.head_stride;
}

// The same for a view of one number a slot.
inline int64_t SlotOffset(const SlotView& view, int64_t row, int64_t slot, int64_t head) {
  const int64_t block = slot / view.block_size;
  const int64_t id =
      view.block_table == nullptr ? row : view.block_table[row * view.block_table_stride + block];
  return id * view.block_stride + head * view.head_stride + slot % view.block_size;
}

// Slots of head `head` of row `row` that attention reads.
inline int32_t KvLength(const KvView& view, int64_t row, int64_t head) {
  if (view.length == nullptr) return 0;
  const int64_t length = view.length[row * view.length_stride + head * view.length_head_stride];
  return static_cast<int32_t>(std::clamp<int64_t>(length - view.first_token, 0, view.max_tokens));
}

inline bool IsActive(const int32_t* row_active, int64_t row) {
  return row_active == nullptr || row_active[row] != 0;
}

// InvalidArgument if slots [0, tokens) of a row reach past the block table or into a block below 0;
// `what` names the view.
absl::Status CheckSlots(absl::string_view what, int32_t block_size, const int32_t* block_table,
                        int32_t block_table_stride, int64_t row, int64_t tokens);
inline absl::Status CheckSlots(absl::string_view what, const KvView& view, int64_t row,
                               int64_t tokens) {
  return CheckSlots(what, view.block_size, view.block_table, view.block_table_stride, row, tokens);
}
inline absl::Status CheckSlots(absl::string_view what, const SlotView& view, int64_t row,
                               int64_t tokens) {
  return CheckSlots(what, view.block_size, view.block_table, view.block_table_stride, row, tokens);
}

// As CheckSlots, for the lengths of all active rows and heads.
absl::Status CheckLengths(absl::string_view what, const KvView& view, const int32_t* row_active,
                          int32_t rows, int32_t kv_heads);

// out[0..count) = the elements from `offset` of a pool of `dtype`.
void LoadElements(float* out, const std::byte* pool, DType dtype, int64_t offset, int count);
// The reverse; rounds to nearest even.
void StoreElements(std::byte* pool, DType dtype, int64_t offset, const float* in, int count);
// out = what StoreElements then LoadElements would give.
void RoundElements(float* out, const float* in, DType dtype, int count);

// Keys (values) that attention reads: slots [0, stored) of one head of a view, then `own` rows that
// stand in the activations. The latter are rounded to the view's dtype, so that a token weighs the
// same before and after it is stored, wherever a chunk ends.
struct KeyRange {
  const KvView* view = nullptr;
  int64_t row = 0;  // of the block table
  int64_t head = 0;
  int64_t stored = 0;
  const float* own_key = nullptr;  // the head's columns of the first own row
  const float* own_value = nullptr;
  int64_t own_key_stride = 0;
  int64_t own_value_stride = 0;
  const KeyRotation* rotation = nullptr;
  int64_t own_position = 0;  // of the first own row; read where the rotation turns keys

  // key and value [tokens, head_dim] = slots first .. first + tokens - 1; value may be nullptr.
  // Rows up to the next multiple of 8 are zeroed.
  void Load(float* key, float* value, int64_t first, int tokens, int head_dim) const;

 private:
  void Rotate(float* key, int64_t first, int tokens, int head_dim) const;
};

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_KV_ROWS_H_
