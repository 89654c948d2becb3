#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const ArgmaxArgs& args, Context& context) {
  ForRows(context, args.rows, args.columns, [&](int64_t row, int) {
    if (args.target[row] < 0) return;
    const float* const logits = Row(args.logits, row);
    int32_t best = 0;
    for (int32_t i = 1; i < args.columns; ++i) {
      if (logits[i] > logits[best]) best = i;
    }
    args.token[args.target[row]] = best;
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
