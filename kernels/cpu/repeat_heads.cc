#include <algorithm>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const RepeatHeadsArgs& args, Context& context) {
  const int64_t columns = int64_t{args.heads} * args.repeat * args.head_dim;
  ForRows(context, args.rows, columns, [&](int64_t row, int) {
    for (int64_t head = 0; head < int64_t{args.heads} * args.repeat; ++head) {
      std::copy_n(Row(args.in, row) + head / args.repeat * args.head_dim, args.head_dim,
                  Row(args.out, row) + head * args.head_dim);
    }
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
