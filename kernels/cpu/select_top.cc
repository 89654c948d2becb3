#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "base/planted_bug.h"
#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"

namespace kvsweep::cpu {
namespace {

bool Selects(const SelectTopArgs& args, int64_t row) {
  return IsActive(args.row_active, row) && args.length[row] > 0;
}

int64_t CountOfRow(const SelectTopArgs& args, int64_t row) {
  int64_t counted = 0;
  for (int32_t head = 0; head < args.kv_heads; ++head) {
    counted += args.count[row * args.kv_heads + head];
  }
  return counted;
}

// The mean over every head of every row that selects.
int64_t BatchMean(const SelectTopArgs& args) {
  int64_t counted = 0;
  int64_t pairs = 0;
  for (int32_t row = 0; row < args.rows; ++row) {
    if (!Selects(args, row)) continue;
    counted += CountOfRow(args, row);
    pairs += args.kv_heads;
  }
  return pairs > 0 ? counted / pairs : 0;
}

int32_t SelectedCount(const SelectTopArgs& args, int64_t row, int32_t head, int64_t batch_mean) {
  if (!Selects(args, row)) return 0;
  int64_t wanted = batch_mean;
  if (args.wanted != nullptr) {
    wanted = args.wanted[row];
  } else if (args.scope == SelectionScope::kHead) {
    wanted = args.count[row * args.kv_heads + head];
  } else if (args.scope == SelectionScope::kRequest) {
    wanted = CountOfRow(args, row) / args.kv_heads;
  }
  const int64_t most = std::min<int64_t>(args.limit[row], args.length[row]);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, most)));
}

// Of the slots whose margin is `least`, those `ties` with the lowest positions: the position that
// the last of them has.
int32_t LastPositionOfTies(const SelectTopArgs& args, int64_t row, int64_t head,
                           const float* margin, float least, int64_t ties, int32_t* scratch) {
  int64_t tied = 0;
  const auto* position = static_cast<const int32_t*>(args.slot_position.data);
  for (int64_t t = 0; t < args.length[row]; ++t) {
    if (margin[t] == least)
      scratch[tied++] = position[SlotOffset(args.slot_position, row, t, head)];
  }
  std::nth_element(scratch, scratch + ties - 1, scratch + tied);
  return scratch[ties - 1];
}

// index[0..selected) = the slots of the largest margins, ascending; of equal ones the lower
// position.
void SelectLargest(const SelectTopArgs& args, int64_t pair, Workspace& workspace) {
  const int64_t row = pair / args.kv_heads;
  const int64_t head = pair % args.kv_heads;
  const int64_t count = args.length[row];
  const int64_t selected = args.selected[pair];
  const float* const margin = args.margin + pair * args.margin_stride;
  int32_t* const index = args.index + pair * args.index_stride;
  float* const sorted = workspace.Take<float>(count);
  std::copy_n(margin, count, sorted);
  std::nth_element(sorted, sorted + selected - 1, sorted + count, std::greater<float>());
  const float least = sorted[selected - 1];
  int64_t ties = selected;
  for (int64_t t = 0; t < count; ++t) ties -= margin[t] > least ? 1 : 0;

  const bool placed = args.slot_position.data != nullptr;
  const auto* position = static_cast<const int32_t*>(args.slot_position.data);
  const int32_t last = placed ? LastPositionOfTies(args, row, head, margin, least, ties,
                                                   workspace.Take<int32_t>(count))
                              : 0;
  int64_t taken = 0;
  for (int64_t t = 0; t < count && taken < selected; ++t) {
    if (margin[t] < least) continue;
    if (margin[t] == least) {
      const bool in =
          placed ? position[SlotOffset(args.slot_position, row, t, head)] <= last : ties-- > 0;
      if (!in) continue;
    }
    index[taken++] = static_cast<int32_t>(t);
  }
  if (BugPlanted("selection_unsorted")) std::reverse(index, index + taken);
}

void MarkUse(const SelectTopArgs& args, int64_t pair) {
  const int64_t row = pair / args.kv_heads;
  const int64_t head = pair % args.kv_heads;
  auto* const use = static_cast<int32_t*>(args.use.data);
  const int32_t* const index = args.index + pair * args.index_stride;
  bool saturated = false;
  for (int64_t j = 0; j < args.selected[pair]; ++j) {
    int32_t& mark = use[SlotOffset(args.use, row, index[j], head)];
    mark = args.use_rule == SlotUse::kStamp ? args.stamp[row] : mark + 1;
    saturated = saturated || (args.use_rule == SlotUse::kCount && mark >= args.use_limit);
  }
  if (!saturated) return;
  for (int64_t t = 0; t < args.length[row]; ++t) use[SlotOffset(args.use, row, t, head)] /= 2;
}

absl::Status CheckRow(const SelectTopArgs& args, int64_t row) {
  const int64_t length = args.length[row];
  int64_t selected = 0;
  for (int32_t head = 0; head < args.kv_heads; ++head) {
    selected = std::max<int64_t>(selected, args.selected[row * args.kv_heads + head]);
  }
  if (length > args.margin_stride || selected > args.index_stride) {
    return absl::InvalidArgumentError(absl::StrCat("row ", row, ": ", selected, " of ", length,
                                                   " tokens selected, with room for ",
                                                   args.index_stride, " of ", args.margin_stride));
  }
  if (args.slot_position.data != nullptr) {
    RETURN_IF_ERROR(CheckSlots("slot_position", args.slot_position, row, length));
  }
  if (args.use.data != nullptr) RETURN_IF_ERROR(CheckSlots("use", args.use, row, length));
  return absl::OkStatus();
}

}  // namespace

absl::Status Run(const SelectTopArgs& args, Context& context) {
  const int64_t batch_mean = args.scope == SelectionScope::kBatch ? BatchMean(args) : 0;
  int64_t longest = 0;
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t head = 0; head < args.kv_heads; ++head) {
      args.selected[int64_t{row} * args.kv_heads + head] =
          SelectedCount(args, row, head, batch_mean);
    }
    if (!Selects(args, row)) continue;
    RETURN_IF_ERROR(CheckRow(args, row));
    longest = std::max<int64_t>(longest, args.length[row]);
  }
  const int64_t bytes = Workspace::Padded<float>(longest) + Workspace::Padded<int32_t>(longest);
  context.ReserveWorkers(bytes);
  context.pool.For(int64_t{args.rows} * args.kv_heads, [&](int64_t pair, int worker) {
    if (args.selected[pair] == 0) return;
    context.worker[worker].Reset(bytes);
    SelectLargest(args, pair, context.worker[worker]);
    if (args.use_rule != SlotUse::kNone) MarkUse(args, pair);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
