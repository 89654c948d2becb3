#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/planted_bug.h"
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

  bool scored() const { return args.score.data != nullptr; }
  float& score(int64_t slot) const {
    return static_cast<float*>(args.score.data)[SlotOffset(args.score, row, slot, head)];
  }
  int32_t& position(int64_t slot) const {
    return static_cast<int32_t*>(
        args.slot_position.data)[SlotOffset(args.slot_position, row, slot, head)];
  }
  int32_t& rank(int64_t slot) const {
    return static_cast<int32_t*>(args.rank.data)[SlotOffset(args.rank, row, slot, head)];
  }

  // What token slot `slot` (the new token: the number stored) received from the group's queries.
  float Received(int64_t slot) const {
    const int64_t group = args.query_heads / args.kv_heads;
    float received = 0.0f;
    for (int64_t q = 0; q < group; ++q) {
      const int64_t index = row * args.query_heads + head * group + q;
      const float probability = args.probability[index * args.probability_stride + slot];
      received =
          args.scoring.group_maximum ? std::max(received, probability) : received + probability;
    }
    return received;
  }

  float Kept(float value) const {
    if (args.scoring.half) RoundElements(&value, &value, DType::kF16, 1);
    return value;
  }

  // What a slot is compared by.
  float Worth(int64_t slot) const {
    if (!args.scoring.mean) return score(slot);
    return score(slot) / static_cast<float>(args.position[row] + 1 - position(slot));
  }

  // The slot in [begin, end) of least worth, on ties the one with the highest position; kNowhere if
  // there is none.
  int64_t Least(int64_t begin, int64_t end) const {
    if (begin >= end) return kNowhere;
    int64_t least = begin;
    float least_worth = Worth(begin);
    for (int64_t slot = begin + 1; slot < end; ++slot) {
      const float worth = Worth(slot);
      const bool later = (position(slot) > position(least)) != BugPlanted("ties_evict_the_earlier");
      if (worth < least_worth || (worth == least_worth && later)) {
        least = slot;
        least_worth = worth;
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
    if (args.rank.data != nullptr) rank(target) = rank(source);
  }

  void WriteNew(int64_t slot, float new_score) const {
    const int64_t offset = KvOffset(args.view, row, slot, head);
    const int64_t column = head * args.head_dim;
    StoreElements(args.view.key, args.view.dtype, offset, Row(args.key, row) + column,
                  args.head_dim);
    StoreElements(args.view.value, args.view.dtype, offset, Row(args.value, row) + column,
                  args.head_dim);
    if (scored()) score(slot) = new_score;
    if (args.slot_position.data != nullptr) position(slot) = args.position[row];
  }

  // The token of rank `gone` has left a full row of `slots` slots, whose slot `target` is new.
  void CloseRanks(int32_t gone, int64_t slots, int64_t target) const {
    const bool unsorted = BugPlanted("rolling_ranks_unsorted");
    for (int64_t slot = 0; slot < slots; ++slot) rank(slot) -= rank(slot) > gone && !unsorted;
    rank(target) = static_cast<int32_t>(slots - 1);
  }

  // Finds the new token's place in a full row and makes room there; kNowhere: it is the one that
  // leaves.
  int64_t MakeRoom(float new_score) const {
    const int64_t heavy = args.heavy[row];
    const int64_t recent = args.recent[row];
    const int64_t sinks = std::min<int64_t>(args.sinks, heavy);
    const int64_t end = BugPlanted("argmin_over_window") ? heavy + recent : heavy;
    const int64_t least = scored() ? Least(sinks, end) : kNowhere;
    int64_t leaves = least;
    int64_t target = least;
    if (recent == 0) {
      if (least == kNowhere || (!args.promote && !(new_score > Worth(least)))) return kNowhere;
    } else {
      target = heavy + (args.position[row] - heavy) % recent;
      const bool displaces = least != kNowhere && (args.promote || Worth(least) < Worth(target));
      if (!displaces) leaves = target;
    }
    const int32_t gone = args.rank.data != nullptr ? rank(leaves) : 0;
    if (leaves != target) CopySlot(leaves, target);
    if (args.rank.data != nullptr) CloseRanks(gone, heavy + recent, target);
    return target;
  }

  void Step(int64_t stored) const {
    float new_score = 0.0f;
    if (scored()) {
      for (int64_t slot = 0; slot < stored; ++slot) {
        score(slot) = Kept(score(slot) * args.scoring.decay + Received(slot));
      }
      new_score = BugPlanted("new_token_starts_at_zero") ? 0.0f : Kept(Received(stored));
    }
    int64_t slot = args.position[row];
    if (slot >= int64_t{args.heavy[row]} + args.recent[row]) {
      slot = MakeRoom(new_score);
      if (slot == kNowhere) return;
    } else if (args.rank.data != nullptr) {
      rank(slot) = static_cast<int32_t>(slot);
    }
    WriteNew(slot, new_score);
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
  if (args.rank.data != nullptr) RETURN_IF_ERROR(CheckSlots("rank", args.rank, row, slots));
  if (args.score.data == nullptr) return absl::OkStatus();
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
  const int64_t work = args.score.data == nullptr ? 2 * args.head_dim : 2 * args.probability_stride;
  ForRows(context, pairs, work, [&](int64_t task, int) {
    const Head head{args, task / args.kv_heads, task % args.kv_heads};
    if (IsActive(args.row_active, head.row)) head.Step(KvLength(args.view, head.row, head.head));
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
