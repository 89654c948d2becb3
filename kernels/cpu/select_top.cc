#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"

namespace kvsweep::cpu {
namespace {

int32_t SelectedCount(const SelectTopArgs& args, int64_t row) {
  if (!IsActive(args.row_active, row) || args.length[row] <= 0) return 0;
  int64_t counted = 0;
  for (int32_t head = 0; head < args.kv_heads; ++head) {
    counted += args.count[row * args.kv_heads + head];
  }
  const int64_t mean = counted / args.kv_heads;
  return static_cast<int32_t>(std::max<int64_t>(1, std::min<int64_t>(mean, args.limit[row])));
}

// index[0..selected) = the places of the largest margins, ascending; of equal ones the first.
void SelectLargest(int32_t* index, const float* margin, int64_t count, int64_t selected,
                   float* scratch) {
  std::copy_n(margin, count, scratch);
  std::nth_element(scratch, scratch + selected - 1, scratch + count, std::greater<float>());
  const float least = scratch[selected - 1];
  int64_t above = 0;
  for (int64_t t = 0; t < count; ++t) above += margin[t] > least ? 1 : 0;
  int64_t ties = selected - above;
  int64_t taken = 0;
  for (int64_t t = 0; t < count && taken < selected; ++t) {
    if (margin[t] < least || (margin[t] == least && ties-- <= 0)) continue;
    index[taken++] = static_cast<int32_t>(t);
  }
}

}  // namespace

absl::Status Run(const SelectTopArgs& args, Context& context) {
  int64_t longest = 0;
  for (int32_t row = 0; row < args.rows; ++row) {
    args.selected[row] = 0;
    const int32_t selected = SelectedCount(args, row);
    if (selected == 0) continue;
    if (args.length[row] > args.margin_stride || selected > args.length[row] ||
        selected > args.index_stride) {
      return absl::InvalidArgumentError(absl::StrCat(
          "row ", row, ": ", selected, " of ", args.length[row], " tokens selected, with room for ",
          args.index_stride, " of ", args.margin_stride));
    }
    args.selected[row] = selected;
    longest = std::max<int64_t>(longest, args.length[row]);
  }
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  context.ReserveWorkers(Workspace::Padded<float>(longest));
  context.pool.For(pairs, [&](int64_t pair, int worker) {
    const int64_t row = pair / args.kv_heads;
    if (args.selected[row] == 0) return;
    context.worker[worker].Reset(Workspace::Padded<float>(longest));
    SelectLargest(args.index + pair * args.index_stride, args.margin + pair * args.margin_stride,
                  args.length[row], args.selected[row],
                  context.worker[worker].Take<float>(longest));
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
