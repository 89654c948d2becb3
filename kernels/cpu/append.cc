#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const AppendArgs& args, Context& context) {
  const KvView& target = args.target;
  for (int32_t row = 0; row < args.rows; ++row) {
    if (args.table_row[row] < 0) continue;
    if (args.slot[row] < 0) {
      return absl::InvalidArgumentError("slot below 0");
    }
    // Only the block that is written need exist: earlier ones may have been given up.
    const KvView block_only = target;
    const int64_t block = args.slot[row] / target.block_size;
    const int64_t available = target.block_table == nullptr ? 1 : target.block_table_stride;
    if (block >= available ||
        (block_only.block_table != nullptr &&
         target.block_table[int64_t{args.table_row[row]} * target.block_table_stride + block] <
             0)) {
      return CheckSlots("target", target, args.table_row[row], args.slot[row] + 1);
    }
  }
  ForRows(context, args.rows, int64_t{2} * args.kv_heads * args.head_dim, [&](int64_t row, int) {
    if (args.table_row[row] < 0) return;
    for (int head = 0; head < args.kv_heads; ++head) {
      const int64_t offset = KvOffset(target, args.table_row[row], args.slot[row], head);
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
