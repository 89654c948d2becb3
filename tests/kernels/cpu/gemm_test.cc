#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

struct Case {
  int32_t rows = 1;
  int32_t out_columns = 1;
  int32_t in_columns = 1;
};

struct Problem {
  Problem(Device& device, Random& random, const Case& c)
      : shape(c),
        in(RandomFloats(random, int64_t{c.rows} * c.in_columns, true)),
        weight(RandomFloats(random, int64_t{c.out_columns} * c.in_columns)),
        bias(RandomFloats(random, c.out_columns)),
        before(RandomFloats(random, int64_t{c.rows} * c.out_columns)) {
    args.in = device.PutRows(in, c.rows, c.in_columns);
    args.out = device.PutRows(before, c.rows, c.out_columns);
    args.weight = device.Put(weight);
    args.rows = c.rows;
    args.out_columns = c.out_columns;
    args.in_columns = c.in_columns;
  }

  void ExpectOutput() const {
    const std::vector<float> out = Device::GetRows(args.out, shape.rows, shape.out_columns);
    for (int32_t r = 0; r < shape.rows; ++r) {
      for (int32_t c = 0; c < shape.out_columns; ++c) {
        double sum = args.bias != nullptr ? bias[c] : 0.0;
        double bound = std::abs(sum);
        for (int32_t k = 0; k < shape.in_columns; ++k) {
          const double term =
              static_cast<double>(in[r * shape.in_columns + k]) * weight[c * shape.in_columns + k];
          sum += term;
          bound += std::abs(term);
        }
        if (args.relu) sum = std::max(sum, 0.0);
        if (args.accumulate) {
          sum += before[r * shape.out_columns + c];
          bound += std::abs(before[r * shape.out_columns + c]);
        }
        // In any order of summation, each term passes at most as many roundings as there are terms.
        const double tolerance =
            (std::sqrt(shape.in_columns) + 8) * std::numeric_limits<float>::epsilon() * bound;
        ASSERT_NEAR(out[r * shape.out_columns + c], sum, tolerance)
            << "row " << r << " column " << c;
      }
    }
  }

  Case shape;
  std::vector<float> in;
  std::vector<float> weight;
  std::vector<float> bias;
  std::vector<float> before;
  GemmArgs args;
};

TEST(Gemm, EqualsTheReferenceForAllShapesAndEpilogues) {
  Random random(1);
  for (bool invariant : {false, true}) {
    for (const Case& c : {Case{1, 1, 1}, Case{1, 37, 64}, Case{2, 100, 13}, Case{3, 49, 384},
                          Case{4, 48, 40}, Case{7, 97, 129}, Case{8, 8, 8}, Case{9, 130, 65},
                          Case{33, 51, 100}, Case{64, 256, 384}}) {
      for (int epilogue = 0; epilogue < 8; ++epilogue) {
        SCOPED_TRACE(absl::StrCat(invariant ? "invariant " : "", c.rows, " x ", c.out_columns,
                                  " x ", c.in_columns, " epilogue ", epilogue));
        Device device({.threads = 3, .batch_invariant = invariant});
        Problem problem(device, random, c);
        if ((epilogue & 1) != 0) problem.args.bias = device.Put(problem.bias);
        problem.args.relu = (epilogue & 2) != 0;
        problem.args.accumulate = (epilogue & 4) != 0;
        device.backend.Gemm(problem.args, Stream::kCompute);
        ASSERT_TRUE(device.backend.WaitAll().ok());
        problem.ExpectOutput();
      }
    }
  }
}

TEST(Gemm, BatchInvariantRowsAreEqualToTheBitForAnyBatchAndThreads) {
  Random random(2);
  const Case whole{.rows = 23, .out_columns = 211, .in_columns = 301};
  Device device({.threads = 2, .batch_invariant = true});
  Problem problem(device, random, whole);
  problem.args.bias = device.Put(problem.bias);
  device.backend.Gemm(problem.args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  const std::vector<float> together = Device::GetRows(problem.args.out, 23, 211);

  CpuBackend single({.threads = 1, .batch_invariant = true});
  for (int32_t rows = 1; rows <= 7; ++rows) {
    for (int32_t first = 0; first + rows <= whole.rows; first += rows) {
      GemmArgs part = problem.args;
      part.rows = rows;
      part.in.data = static_cast<float*>(part.in.data) + first * part.in.stride;
      part.out = device.RoomRows(rows, 211);
      single.Gemm(part, Stream::kCompute);
      ASSERT_TRUE(single.WaitAll().ok());
      const std::vector<float> out = Device::GetRows(part.out, rows, 211);
      for (int32_t i = 0; i < rows * 211; ++i) ASSERT_EQ(out[i], together[first * 211 + i]);
    }
  }
}

}  // namespace
}  // namespace kvsweep
