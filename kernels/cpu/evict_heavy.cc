#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

constexpr int64_t kNowhere = -1;

// One row and KV head.
struct Head {
  const EvictHeavyArgs& args;
  int64_t row = 0;
  int64_t head = 0;

  float& score(int64_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, row, slot, head)];
  }
  int32_t& position(int64_t slot) const {
    return static_cast<int32_t*>(
        args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)];
  }
  // What token slot `slot` (the new token: the number stored) received from the group's queries.
  float Received(int64_t slot) const {
    const int64_t group = args.query_heads / args.kv_heads;
    float sum = 0.0f;
    for (int64_t q = 0; q < group; ++q) {
      const int64_t index = row * args.query_heads + head * group + q;
      sum += args.probability[index * args.probability_stride + slot];
    }
    return sum;
  }

  // The slot in [0, slots) with the least score, on ties the one with the highest position.
  int64_t Least(int64_t slots) const {
    int64_t least = 0;
    for (int64_t slot = 1; slot < slots; ++slot) {
      if (score(slot) < score(least) ||
          (score(slot) == score(least) && position(slot) > position(least))) {
        least = slot;
      }
    }
    return least;
  }

  void CopySlot(int64_t target, int64_t source) const {
    const int64_t element = DTypeBytes(args.view.dtype);
    const int64_t bytes = args.head_dim * element;
    const int64_t to = KvOffset(args.view, row, target, head) * element;
    const int64_t from = KvOffset(args.view, row, source, head) * element;
    std::memcpy(args.view.key + to, args.view.key + from, bytes);
    std::memcpy(args.view.value + to, args.view.value + from, bytes);
    score(target) = score(source);
    position(target) = position(source);
  }

  void WriteNew(int64_t slot, float new_score) const {
    const int64_t offset = KvOffset(args.view, row, slot, head);
    const int64_t column = head * args.head_dim;
    StoreElements(args.view.key, args.view.dtype, offset, Row(args.key, row) + column,
                  args.head_dim);
    StoreElements(args.view.value, args.view.dtype, offset, Row(args.value, row) + column,
                  args.head_dim);
    score(slot) = new_score;
    position(slot) = args.position[row];
  }

  // Makes room for the new token and returns its slot, kNowhere if it is the one to leave.
  int64_t Evict(float new_score) const {
    const int64_t heavy = args.heavy[row];
    const int64_t recent = args.recent[row];
    const int64_t position = args.position[row];
    if (position < heavy + recent) return position;
    if (recent == 0) {
      if (heavy == 0) return kNowhere;
      const int64_t least = Least(heavy);
      return new_score > score(least) ? least : kNowhere;
    }
    const int64_t leaving = heavy + (position - heavy) % recent;
    if (heavy > 0) {
      const int64_t least = Least(heavy);
      if (score(least) < score(leaving)) CopySlot(least, leaving);
    }
    return leaving;
  }
};

// Every slot that the row reads or writes must exist: those stored, and the budget once it is full.
absl::Status CheckRow(const EvictHeavyArgs& args, int64_t row) {
  const int64_t budget = int64_t{args.heavy[row]} + args.recent[row];
  int64_t stored = 0;
  for (int32_t head = 0; head < args.kv_heads; ++head) {
    stored = std::max<int64_t>(stored, KvLength(args.view, row, head));
  }
  const int64_t slots = std::max(stored, std::min<int64_t>(args.position[row] + 1, budget));
  RETURN_IF_ERROR(CheckSlots("view", args.view, row, slots));
  RETURN_IF_ERROR(CheckSlots("score", args.score, row, slots));
  RETURN_IF_ERROR(CheckSlots("slot_position", args.slot_position, row, slots));
  if (stored >= args.probability_stride) {
    return absl::InvalidArgumentError(absl::StrCat("row ", row, " holds ", stored,
                                                   " tokens, but probability has room for ",
                                                   args.probability_stride - 1));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Run(const EvictHeavyArgs& args, Context& context) {
  for (int32_t row = 0; row < args.rows; ++row) {
    if (IsActive(args.row_active, row)) RETURN_IF_ERROR(CheckRow(args, row));
  }
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  ForRows(context, pairs, 2 * args.probability_stride, [&](int64_t task, int) {
    const Head head{args, task / args.kv_heads, task % args.kv_heads};
    if (!IsActive(args.row_active, head.row)) return;
    const int64_t stored = KvLength(args.view, head.row, head.head);
    for (int64_t slot = 0; slot < stored; ++slot) head.score(slot) += head.Received(slot);
    const float new_score = head.Received(stored);
    const int64_t slot = head.Evict(new_score);
    if (slot != kNowhere) head.WriteNew(slot, new_score);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
