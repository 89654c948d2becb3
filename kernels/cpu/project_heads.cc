#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

void Scale(float* out, int count, float factor) {
  if (factor == 1.0f) return;
  for (int i = 0; i < count; ++i) out[i] *= factor;
}

void ProjectThin(const ProjectHeadsArgs& args, Context& context) {
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
    for (int r = 0; r < rows; ++r) Scale(out + r * args.out.stride, args.out_dim, args.scale);
  });
}

// Each token through the columns of its own set. Sums run over the inner dimension in order.
void ProjectPicked(const ProjectHeadsArgs& args, int64_t row) {
  const int32_t set = args.column_set[row];
  for (int64_t head = 0; head < args.heads; ++head) {
    float* const out = Row(args.out, row) + head * args.out_dim;
    std::memset(out, 0, args.out_dim * sizeof(float));
    if (set < 0) continue;
    const float* const in = Row(args.in, row) + head * args.in_dim;
    const int64_t kv_head = head / args.group;
    const float* const matrix = args.matrix + kv_head * args.in_dim * args.in_dim;
    const int32_t* const column = args.column + set * args.column_stride + kv_head * args.out_dim;
    for (int32_t j = 0; j < args.in_dim; ++j) {
      const float* const matrix_row = matrix + int64_t{j} * args.in_dim;
      for (int32_t c = 0; c < args.out_dim; ++c) out[c] += in[j] * matrix_row[column[c]];
    }
    Scale(out, args.out_dim, args.scale);
  }
}

absl::Status CheckColumns(const ProjectHeadsArgs& args) {
  const int32_t columns = args.heads / args.group * args.out_dim;
  for (int32_t row = 0; row < args.rows; ++row) {
    if (args.column_set[row] < 0) continue;
    const int32_t* const column = args.column + args.column_set[row] * args.column_stride;
    for (int32_t i = 0; i < columns; ++i) {
      if (column[i] < 0 || column[i] >= args.in_dim) {
        return absl::InvalidArgumentError(
            absl::StrCat("row ", row, " picks column ", column[i], " of ", args.in_dim));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Run(const ProjectHeadsArgs& args, Context& context) {
  if (args.column == nullptr) {
    ProjectThin(args, context);
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(CheckColumns(args));
  ForRows(context, args.rows, int64_t{args.heads} * args.in_dim * args.out_dim,
          [&](int64_t row, int) { ProjectPicked(args, row); });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
