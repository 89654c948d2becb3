#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

int32_t SlotOf(const AppendArgs& args, int64_t row, int head) {
  return args.slot_by_head ? args.slot[row * args.kv_heads + head] : args.slot[row];
}

// Only the block that is written need exist: earlier ones may have been given up.
absl::Status CheckTarget(const AppendArgs& args, int64_t row, int head) {
  const KvView& target = args.target;
  const int32_t slot = SlotOf(args, row, head);
  if (slot < 0) return absl::InvalidArgumentError("slot below 0");
  const int64_t block = slot / target.block_size;
  const int64_t available = target.block_table == nullptr ? 1 : target.block_table_stride;
  const int64_t first = int64_t{args.table_row[row]} * target.block_table_stride;
  if (block < available &&
      (target.block_table == nullptr || target.block_table[first + block] >= 0)) {
    return absl::OkStatus();
  }
  return CheckSlots("target", target, args.table_row[row], slot + 1);
}

}  // namespace

absl::Status Run(const AppendArgs& args, Context& context) {
  if (args.rotary.data.data != nullptr) RETURN_IF_ERROR(Run(args.rotary, context));
  const KvView& target = args.target;
  for (int32_t row = 0; row < args.rows; ++row) {
    if (args.table_row[row] < 0) continue;
    for (int head = 0; head < (args.slot_by_head ? args.kv_heads : 1); ++head) {
      RETURN_IF_ERROR(CheckTarget(args, row, head));
    }
  }
  ForRows(context, args.rows, int64_t{2} * args.kv_heads * args.head_dim, [&](int64_t row, int) {
    if (args.table_row[row] < 0) return;
    for (int head = 0; head < args.kv_heads; ++head) {
      const int64_t offset = KvOffset(target, args.table_row[row], SlotOf(args, row, head), head);
      const int64_t column = int64_t{head} * args.head_dim;
      StoreElements(target.key, target.dtype, offset, Row(args.key, row) + column, args.head_dim);
      if (target.value == nullptr) continue;
      StoreElements(target.value, target.dtype, offset, Row(args.value, row) + column,
                    args.head_dim);
    }
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
