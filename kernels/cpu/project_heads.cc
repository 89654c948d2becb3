#include <algorithm>
#include <cstring>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const ProjectHeadsArgs& args, Context& context) {
  constexpr int64_t kBlockRows = 48;
  const int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  context.pool.For(blocks * args.heads, [&](int64_t task, int) {
    const int64_t head = task % args.heads;
    const int64_t first = task / args.heads * kBlockRows;
    const int rows = static_cast<int>(std::min(kBlockRows, args.rows - first));
    float* const out = Row(args.out, first) + head * args.out_dim;
    for (int r = 0; r < rows; ++r) {
      std::memset(out + r * args.out.stride, 0, args.out_dim * sizeof(float));
    }
    AddProduct(out, args.out.stride, Row(args.in, first) + head * args.in_dim, args.in.stride,
               args.matrix + head / args.group * args.in_dim * args.out_dim, args.out_dim, rows,
               args.in_dim, args.out_dim);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
