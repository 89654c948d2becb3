// Projections. Large batches go to the BLAS, cut into slices of output columns, one for each
// worker; small ones and batch-invariant mode to a product of our own that reads every weight once.
#include <cblas.h>

#include <algorithm>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/products.h"

namespace kvsweep::cpu {
namespace {

// Above this many rows the BLAS's packing pays.
constexpr int32_t kOwnProductRows = 8;
// Output columns of a slice: a multiple of every tile width below, so that few slices end in single
// columns.
constexpr int64_t kSliceColumns = 48;
// Bytes of weights that stay in the second-level cache while all rows pass over them.
constexpr int64_t kSliceBytes = 192 * 1024;

// The weights of one output column.
KVSWEEP_INLINE const float* Weight(const GemmArgs& args, int64_t column) {
  return static_cast<const float*>(args.weight) + column * args.in_columns;
}

// Writes `columns` elements of a row whose sums come without bias.
KVSWEEP_INLINE void Finish(const GemmArgs& args, int64_t row, int64_t column, const float* sum,
                           int columns) {
  float* const out = static_cast<float*>(args.out.data) + row * args.out.stride + column;
  for (int c = 0; c < columns; ++c) {
    float value = sum[c];
    if (args.bias != nullptr) value += args.bias[column + c];
    if (args.relu) value = std::max(value, 0.0f);
    out[c] = args.accumulate ? out[c] + value : value;
  }
}

// kRows x kColumns = 8 outputs: as many sums as hide the latency of a multiply-add, reduced
// together.
template <int kRows, int kColumns>
KVSWEEP_INLINE void Tile(const GemmArgs& args, int64_t row, int64_t column) {
  static_assert(kRows * kColumns == kLanes);
  const float* const in = static_cast<const float*>(args.in.data) + row * args.in.stride;
  const int64_t length = args.in_columns;
  F8 sum[kRows][kColumns];
  DotLanes<kRows, kColumns>(sum, in, args.in.stride, Weight(args, column), length, length);
  float sums[kLanes];
  Store(sums, SumEach(&sum[0][0]));
  for (int r = 0; r < kRows; ++r) Finish(args, row + r, column, sums + r * kColumns, kColumns);
}

// The last columns and rows, one output at a time.
void Single(const GemmArgs& args, int64_t row, int64_t column) {
  const float* const in = static_cast<const float*>(args.in.data) + row * args.in.stride;
  F8 sum[1][1];
  DotLanes<1, 1>(sum, in, 0, Weight(args, column), 0, args.in_columns);
  const float total = Sum(sum[0][0]);
  Finish(args, row, column, &total, 1);
}

template <int kRows>
void Rows(const GemmArgs& args, int64_t row, int64_t begin, int64_t end) {
  constexpr int kColumns = kLanes / kRows;
  int64_t column = begin;
  for (; column + kColumns <= end; column += kColumns) Tile<kRows, kColumns>(args, row, column);
  for (; column < end; ++column) {
    for (int r = 0; r < kRows; ++r) Single(args, row + r, column);
  }
}

// All rows pass over a block of weights while it is in the first-level cache or, when rows are
// many, in the second.
void OwnSlice(const GemmArgs& args, int64_t begin, int64_t end) {
  const int64_t block = args.rows > kOwnProductRows ? end - begin : kLanes;
  for (int64_t column = begin; column < end; column += block) {
    const int64_t block_end = std::min(column + block, end);
    int64_t row = 0;
    for (; row + 4 <= args.rows; row += 4) Rows<4>(args, row, column, block_end);
    for (; row + 2 <= args.rows; row += 2) Rows<2>(args, row, column, block_end);
    for (; row < args.rows; ++row) Rows<1>(args, row, column, block_end);
  }
}

void BlasSlice(const GemmArgs& args, int64_t begin, int64_t end) {
  const float* const in = static_cast<const float*>(args.in.data);
  float* const out = static_cast<float*>(args.out.data) + begin;
  const int columns = static_cast<int>(end - begin);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, args.rows, columns, args.in_columns, 1.0f,
              in, static_cast<int>(args.in.stride), Weight(args, begin), args.in_columns,
              args.accumulate ? 1.0f : 0.0f, out, static_cast<int>(args.out.stride));
  if (args.bias == nullptr && !args.relu) return;
  for (int32_t row = 0; row < args.rows; ++row) {
    float* const line = out + row * args.out.stride;
    for (int c = 0; c < columns; ++c) {
      const float biased = line[c] + (args.bias == nullptr ? 0.0f : args.bias[begin + c]);
      line[c] = args.relu ? std::max(biased, 0.0f) : biased;
    }
  }
}

}  // namespace

absl::Status Run(const GemmArgs& args, Context& context) {
  // The BLAS adds before the epilogue, so an accumulated rectifier is left to our own product.
  const bool own =
      context.batch_invariant || args.rows <= kOwnProductRows || (args.accumulate && args.relu);
  int64_t slice;
  if (own) {
    const int64_t fitting = kSliceBytes / (int64_t{4} * args.in_columns) / kLanes * kLanes;
    slice = std::clamp<int64_t>(fitting, kLanes, kSliceColumns);
  } else {
    const int64_t share = (args.out_columns + context.pool.threads() - 1) / context.pool.threads();
    slice = (share + kLanes - 1) / kLanes * kLanes;
  }
  context.pool.For((args.out_columns + slice - 1) / slice, [&](int64_t task, int) {
    const int64_t begin = task * slice;
    const int64_t end = std::min<int64_t>(begin + slice, args.out_columns);
    own ? OwnSlice(args, begin, end) : BlasSlice(args, begin, end);
  });
  return absl::OkStatus();
}

void UseOneBlasThread() { openblas_set_num_threads(1); }

const char* BlasDescription() { return openblas_get_config(); }

}  // namespace kvsweep::cpu
