#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"

namespace kvsweep::cpu {
namespace {

bool Decides(const PlaceTokensArgs& args, int64_t token) {
  return token < args.decided_rows && args.use_rule != SlotUse::kNone &&
         args.position[token] >= args.capacity[token];
}

// The least used slot of a full pool without its newer half; of equal ones the highest position.
int32_t Victim(const PlaceTokensArgs& args, int64_t token, int64_t head, int32_t* scratch) {
  const int32_t capacity = args.capacity[token];
  const int64_t row = args.table_row[token];
  const auto* const position = static_cast<const int32_t*>(args.slot_position.data);
  const auto* const use = static_cast<const int32_t*>(args.use.data);
  const auto position_of = [&](int64_t slot) {
    return position[SlotOffset(args.slot_position, row, slot, head)];
  };
  for (int32_t slot = 0; slot < capacity; ++slot) scratch[slot] = position_of(slot);
  const int32_t candidates = capacity - capacity / 2;
  std::nth_element(scratch, scratch + candidates - 1, scratch + capacity);
  const int32_t newest = scratch[candidates - 1];
  int32_t victim = -1;
  int32_t least = 0;
  for (int32_t slot = 0; slot < capacity; ++slot) {
    if (position_of(slot) > newest) continue;
    const int32_t mark = use[SlotOffset(args.use, row, slot, head)];
    if (victim >= 0 &&
        (mark > least || (mark == least && position_of(slot) < position_of(victim)))) {
      continue;
    }
    victim = slot;
    least = mark;
  }
  return victim;
}

}  // namespace

absl::Status Run(const PlaceTokensArgs& args, Context& context) {
  int64_t largest = 0;
  for (int32_t token = 0; token < args.rows; ++token) {
    if (args.table_row[token] < 0) continue;
    const bool decides = Decides(args, token);
    if (decides ? args.capacity[token] < 1 : args.planned[token] < 0) {
      return absl::InvalidArgumentError("slot below 0");
    }
    const int64_t slots = decides ? args.capacity[token] : args.planned[token] + 1;
    RETURN_IF_ERROR(CheckSlots("slot_position", args.slot_position, args.table_row[token], slots));
    if (args.use.data != nullptr) {
      RETURN_IF_ERROR(CheckSlots("use", args.use, args.table_row[token], slots));
    }
    if (decides) largest = std::max(largest, slots);
  }
  const int64_t bytes = Workspace::Padded<int32_t>(largest);
  context.ReserveWorkers(bytes);
  context.pool.For(int64_t{args.rows} * args.kv_heads, [&](int64_t pair, int worker) {
    const int64_t token = pair / args.kv_heads;
    const int64_t head = pair % args.kv_heads;
    const int64_t row = args.table_row[token];
    if (row < 0) return;
    int32_t slot = args.planned[token];
    if (Decides(args, token)) {
      context.worker[worker].Reset(bytes);
      slot = Victim(args, token, head, context.worker[worker].Take<int32_t>(largest));
    }
    args.slot[pair] = slot;
    static_cast<int32_t*>(
        args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)] =
        args.position[token];
    if (args.use.data == nullptr) return;
    static_cast<int32_t*>(args.use.data)[SlotOffset(args.use, row, slot, head)] =
        args.use_rule == SlotUse::kStamp ? args.position[token] : 0;
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
