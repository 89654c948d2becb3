#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// A token slot of one head of a view.
struct Place {
  int64_t row = 0;
  int64_t slot = 0;
};

void CopySlot(const KvView& target, Place to, const KvView& source, Place from, int64_t head,
              int32_t head_dim) {
  const int64_t element = DTypeBytes(source.dtype);
  const int64_t target_offset = KvOffset(target, to.row, to.slot, head) * element;
  const int64_t source_offset = KvOffset(source, from.row, from.slot, head) * element;
  std::memcpy(target.key + target_offset, source.key + source_offset, head_dim * element);
  if (target.value == nullptr) return;
  std::memcpy(target.value + target_offset, source.value + source_offset, head_dim * element);
}

absl::Status CheckGather(const GatherRowsArgs& args, int64_t row) {
  int64_t most = 0;
  int64_t end = 0;
  for (int32_t head = 0; head < args.kv_heads; ++head) {
    const int64_t pair = row * args.kv_heads + head;
    const int64_t selected = args.selected[pair];
    most = std::max(most, selected);
    if (selected > args.index_stride) break;
    const int32_t* const index = args.index + pair * args.index_stride;
    for (int64_t j = 0; j < selected; ++j) {
      if (index[j] < 0) {
        return absl::InvalidArgumentError(absl::StrCat("row ", row, " selects token ", index[j]));
      }
      end = std::max<int64_t>(end, index[j] + 1);
    }
  }
  if (most > args.index_stride) {
    return absl::InvalidArgumentError(absl::StrCat(
        "row ", row, " selects ", most, " tokens, but index has room for ", args.index_stride));
  }
  RETURN_IF_ERROR(CheckSlots("target", args.target, row, most));
  return CheckSlots("source", args.source, row, end);
}

}  // namespace

absl::Status Run(const GatherRowsArgs& args, Context& context) {
  for (int32_t row = 0; row < args.rows; ++row) {
    if (IsActive(args.row_active, row)) RETURN_IF_ERROR(CheckGather(args, row));
  }
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  context.pool.For(pairs, [&](int64_t pair, int) {
    const int64_t row = pair / args.kv_heads;
    if (!IsActive(args.row_active, row)) return;
    const int32_t* const index = args.index + pair * args.index_stride;
    for (int64_t j = 0; j < args.selected[pair]; ++j) {
      CopySlot(args.target, {row, j}, args.source, {row, index[j]}, pair % args.kv_heads,
               args.head_dim);
    }
  });
  return absl::OkStatus();
}

absl::Status Run(const CopyTileArgs& args, Context& context) {
  const bool single = args.row >= 0;
  const int64_t rows = single ? 1 : args.rows;
  const auto count = [&](int64_t row, int64_t head) -> int64_t {
    const int64_t end =
        single ? args.row_tokens
               : (IsActive(args.row_active, row) ? KvLength(args.source, row, head) : 0);
    return std::clamp<int64_t>(end - args.first_token, 0, args.tokens);
  };
  for (int64_t row = 0; row < rows; ++row) {
    int64_t longest = 0;
    for (int32_t head = 0; head < args.kv_heads; ++head) {
      longest = std::max(longest, count(row, head));
    }
    if (longest == 0) continue;
    RETURN_IF_ERROR(CheckSlots("target", args.target, row, longest));
    RETURN_IF_ERROR(
        CheckSlots("source", args.source, single ? args.row : row, args.first_token + longest));
  }
  ForRows(context, rows * args.kv_heads, int64_t{args.tokens} * args.head_dim,
          [&](int64_t pair, int) {
            const int64_t row = pair / args.kv_heads;
            const int64_t head = pair % args.kv_heads;
            const int64_t tokens = count(row, head);
            for (int64_t t = 0; t < tokens; ++t) {
              CopySlot(args.target, {row, t}, args.source,
                       {single ? args.row : row, args.first_token + t}, head, args.head_dim);
            }
          });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
