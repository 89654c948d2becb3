#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"

namespace kvsweep::cpu {
namespace {

// One head of one row: its slots as values that can be picked up and put down.
struct HeadSlots {
  const PruneHeavyArgs& args;
  int64_t head = 0;

  int64_t row_bytes() const { return args.head_dim * DTypeBytes(args.view.dtype); }
  float& score(int64_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, args.table_row, slot, head)];
  }
  int32_t& position(int64_t slot) const {
    return static_cast<int32_t*>(
        args.position.data)[SlotOffset(args.position, args.table_row, slot, head)];
  }
  std::byte* key(int64_t slot) const { return args.view.key + Offset(slot); }
  std::byte* value(int64_t slot) const { return args.view.value + Offset(slot); }
  int64_t Offset(int64_t slot) const {
    return KvOffset(args.view, args.table_row, slot, head) * DTypeBytes(args.view.dtype);
  }

  void Move(int64_t target, int64_t source) const {
    if (target == source) return;
    std::memcpy(key(target), key(source), row_bytes());
    std::memcpy(value(target), value(source), row_bytes());
    score(target) = score(source);
    position(target) = position(source);
  }
};

// The slots [0, candidates) with the `heavy` largest scores (ties: the lower slot), ascending, at
// the front of `order`.
void ChooseHeavy(const HeadSlots& slots, int32_t* order, int64_t candidates, int64_t heavy) {
  std::iota(order, order + candidates, 0);
  std::nth_element(order, order + heavy, order + candidates, [&](int32_t a, int32_t b) {
    const float left = slots.score(a);
    const float right = slots.score(b);
    return left > right || (left == right && a < b);
  });
  std::sort(order, order + heavy);
}

// Bytes of workspace for the order of the candidates and for the recent tokens, whose places
// overlap.
int64_t WorkspaceBytes(const PruneHeavyArgs& args) {
  const int64_t row_bytes = args.head_dim * DTypeBytes(args.view.dtype);
  return Workspace::Padded<int32_t>(args.tokens) +
         2 * Workspace::Padded<std::byte>(args.recent * row_bytes) +
         Workspace::Padded<float>(args.recent) + Workspace::Padded<int32_t>(args.recent);
}

void Prune(const HeadSlots& slots, Workspace& workspace) {
  const PruneHeavyArgs& args = slots.args;
  const int64_t row_bytes = slots.row_bytes();
  const int64_t first_recent = int64_t{args.tokens} - args.recent;
  int32_t* const order = workspace.Take<int32_t>(args.tokens);
  std::byte* const keys = workspace.Take<std::byte>(args.recent * row_bytes);
  std::byte* const values = workspace.Take<std::byte>(args.recent * row_bytes);
  float* const scores = workspace.Take<float>(args.recent);
  int32_t* const positions = workspace.Take<int32_t>(args.recent);

  for (int64_t i = 0; i < args.recent; ++i) {
    std::memcpy(keys + i * row_bytes, slots.key(first_recent + i), row_bytes);
    std::memcpy(values + i * row_bytes, slots.value(first_recent + i), row_bytes);
    scores[i] = slots.score(first_recent + i);
    positions[i] = slots.position(first_recent + i);
  }
  if (args.heavy > 0) {
    // Ascending, so a target never lies behind its source.
    ChooseHeavy(slots, order, first_recent, args.heavy);
    for (int32_t i = 0; i < args.heavy; ++i) slots.Move(i, order[i]);
  }
  for (int64_t i = 0; i < args.recent; ++i) {
    const int64_t target = args.heavy + (first_recent + i - args.heavy) % args.recent;
    std::memcpy(slots.key(target), keys + i * row_bytes, row_bytes);
    std::memcpy(slots.value(target), values + i * row_bytes, row_bytes);
    slots.score(target) = scores[i];
    slots.position(target) = positions[i];
  }
}

}  // namespace

absl::Status Run(const PruneHeavyArgs& args, Context& context) {
  RETURN_IF_ERROR(CheckSlots("view", args.view, args.table_row, args.tokens));
  RETURN_IF_ERROR(CheckSlots("score", args.score, args.table_row, args.tokens));
  RETURN_IF_ERROR(CheckSlots("position", args.position, args.table_row, args.tokens));
  context.ReserveWorkers(WorkspaceBytes(args));
  context.pool.For(args.kv_heads, [&](int64_t head, int worker) {
    const HeadSlots slots{args, head};
    for (int32_t slot = 0; slot < args.tokens; ++slot) slots.position(slot) = slot;
    if (args.tokens <= int64_t{args.heavy} + args.recent) return;
    context.worker[worker].Reset(WorkspaceBytes(args));
    Prune(slots, context.worker[worker]);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
