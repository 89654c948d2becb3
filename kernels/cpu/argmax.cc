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
    // Each further rank is the best of those behind it in the order of (logit, id).
    for (int32_t rank = args.rank == nullptr ? 0 : args.rank[row]; rank > 0; --rank) {
      int32_t next = -1;
      for (int32_t i = 0; i < args.columns; ++i) {
        const bool behind = logits[i] < logits[best] || (logits[i] == logits[best] && i > best);
        if (behind && (next < 0 || logits[i] > logits[next])) next = i;
      }
      if (next < 0) break;
      best = next;
    }
    args.token[args.target[row]] = best;
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
