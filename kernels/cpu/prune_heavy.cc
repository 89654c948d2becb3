#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/planted_bug.h"
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
  int64_t sinks() const { return std::min(args.sinks, args.heavy); }
  bool scored() const { return args.score.data != nullptr; }
  bool placed() const { return args.position.data != nullptr; }
  float& score(int64_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, args.table_row, slot, head)];
  }
  int32_t& position(int64_t slot) const {
    return static_cast<int32_t*>(
        args.position.data)[SlotOffset(args.position, args.table_row, slot, head)];
  }
  int32_t& rank(int64_t slot) const {
    return static_cast<int32_t*>(args.rank.data)[SlotOffset(args.rank, args.table_row, slot, head)];
  }
  std::byte* key(int64_t slot) const { return args.view.key + Offset(slot); }
  std::byte* value(int64_t slot) const { return args.view.value + Offset(slot); }
  int64_t Offset(int64_t slot) const {
    return KvOffset(args.view, args.table_row, slot, head) * DTypeBytes(args.view.dtype);
  }

  // What a slot is compared by.
  float Worth(int64_t slot) const {
    if (!args.scoring.mean) return score(slot);
    const int32_t end = args.first_position + args.tokens - args.placed;
    return score(slot) / static_cast<float>(end - position(slot));
  }

  void Move(int64_t target, int64_t source) const {
    if (target == source) return;
    std::memcpy(key(target), key(source), row_bytes());
    std::memcpy(value(target), value(source), row_bytes());
    if (scored()) score(target) = score(source);
    if (placed()) position(target) = position(source);
  }
};

// The slots that stay as heavy ones, ascending, at the front of `order` [first_recent]: the sinks,
// then of the others those of largest worth (ties: the lower slot).
void ChooseHeavy(const HeadSlots& slots, int32_t* order, float* worth, int64_t first_recent) {
  const int64_t heavy = slots.args.heavy;
  const int64_t sinks = slots.sinks();
  std::iota(order, order + first_recent, 0);
  if (!slots.scored() || sinks == heavy) return;
  for (int64_t slot = sinks; slot < first_recent; ++slot) worth[slot] = slots.Worth(slot);
  std::nth_element(order + sinks, order + heavy, order + first_recent, [&](int32_t a, int32_t b) {
    const bool earlier = BugPlanted("prune_keeps_the_later_of_ties") ? a > b : a < b;
    return worth[a] > worth[b] || (worth[a] == worth[b] && earlier);
  });
  std::sort(order + sinks, order + heavy);
}

// The recent tokens on their way from their places to the ring's, which overlap.
struct Recent {
  std::byte* key = nullptr;     // [recent, d]
  std::byte* value = nullptr;   // [recent, d]
  float* score = nullptr;       // [recent]
  int32_t* position = nullptr;  // [recent]

  static int64_t WorkspaceBytes(const PruneHeavyArgs& args) {
    const int64_t row_bytes = args.head_dim * DTypeBytes(args.view.dtype);
    return 2 * Workspace::Padded<std::byte>(args.recent * row_bytes) +
           Workspace::Padded<float>(args.recent) + Workspace::Padded<int32_t>(args.recent);
  }

  void Take(const HeadSlots& slots, Workspace& workspace) {
    key = workspace.Take<std::byte>(slots.args.recent * slots.row_bytes());
    value = workspace.Take<std::byte>(slots.args.recent * slots.row_bytes());
    score = workspace.Take<float>(slots.args.recent);
    position = workspace.Take<int32_t>(slots.args.recent);
  }

  void PickUp(const HeadSlots& slots, int64_t first) const {
    const int64_t bytes = slots.row_bytes();
    for (int64_t i = 0; i < slots.args.recent; ++i) {
      std::memcpy(key + i * bytes, slots.key(first + i), bytes);
      std::memcpy(value + i * bytes, slots.value(first + i), bytes);
      if (slots.scored()) score[i] = slots.score(first + i);
      if (slots.placed()) position[i] = slots.position(first + i);
    }
  }

  void PutDown(const HeadSlots& slots, int64_t i, int64_t target) const {
    const int64_t bytes = slots.row_bytes();
    std::memcpy(slots.key(target), key + i * bytes, bytes);
    std::memcpy(slots.value(target), value + i * bytes, bytes);
    if (slots.scored()) slots.score(target) = score[i];
    if (slots.placed()) slots.position(target) = position[i];
  }
};

void Prune(const HeadSlots& slots, Workspace& workspace) {
  const PruneHeavyArgs& args = slots.args;
  const int64_t first_recent = int64_t{args.tokens} - args.recent;
  const int32_t last = args.first_position + args.tokens - args.placed - 1;
  int32_t* const order = workspace.Take<int32_t>(args.tokens);
  float* const worth = workspace.Take<float>(args.tokens);
  Recent recent;
  recent.Take(slots, workspace);

  recent.PickUp(slots, first_recent);
  ChooseHeavy(slots, order, worth, first_recent);
  // Ascending, so a target never lies behind its source.
  for (int32_t i = 0; i < args.heavy; ++i) {
    slots.Move(i, order[i]);
    if (args.rank.data != nullptr) slots.rank(i) = i;
  }
  for (int64_t i = 0; i < args.recent; ++i) {
    const int64_t position = last - args.recent + 1 + i;
    const int64_t target = args.heavy + (args.ring ? (position - args.heavy) % args.recent : i);
    recent.PutDown(slots, i, target);
    if (args.rank.data != nullptr) slots.rank(target) = static_cast<int32_t>(args.heavy + i);
  }
}

int64_t WorkspaceBytes(const PruneHeavyArgs& args) {
  return Workspace::Padded<int32_t>(args.tokens) + Workspace::Padded<float>(args.tokens) +
         Recent::WorkspaceBytes(args);
}

}  // namespace

absl::Status Run(const PruneHeavyArgs& args, Context& context) {
  RETURN_IF_ERROR(CheckSlots("view", args.view, args.table_row, args.tokens));
  for (const auto& [name, slots] :
       {std::pair{"score", &args.score}, {"position", &args.position}, {"rank", &args.rank}}) {
    if (slots->data == nullptr) continue;
    RETURN_IF_ERROR(CheckSlots(name, *slots, args.table_row, args.tokens));
  }
  context.ReserveWorkers(WorkspaceBytes(args));
  context.pool.For(args.kv_heads, [&](int64_t head, int worker) {
    const HeadSlots slots{args, head};
    for (int32_t slot = args.placed; slot < args.tokens; ++slot) {
      if (slots.placed()) slots.position(slot) = args.first_position + slot - args.placed;
      if (args.rank.data != nullptr) slots.rank(slot) = slot;
    }
    if (args.tokens <= int64_t{args.heavy} + args.recent) return;
    context.worker[worker].Reset(WorkspaceBytes(args));
    Prune(slots, context.worker[worker]);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
