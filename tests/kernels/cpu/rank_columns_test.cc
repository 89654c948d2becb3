// A prompt's own columns: which they are, and projecting through them.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

// [rows, heads, d] through the matrix of each head's KV head, in double.
std::vector<double> Skewed(const std::vector<float>& in, const std::vector<float>& matrix, int rows,
                           int heads, int group, int d) {
  std::vector<double> out(in.size());
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < d; ++c) {
        for (int j = 0; j < d; ++j) {
          out[(r * heads + h) * d + c] +=
              double{in[(r * heads + h) * d + j]} * matrix[(h / group * d + j) * d + c];
        }
      }
    }
  }
  return out;
}

TEST(RankColumns, EqualsTheReference) {
  Random random(21);
  for (const auto& [group, kv_heads, d, kept] :
       {std::tuple{1, 3, 8, 8}, {2, 2, 16, 8}, {3, 1, 64, 24}, {7, 1, 16, 8}}) {
    for (const bool query_alone : {false, true}) {
      SCOPED_TRACE(testing::Message() << "group " << group << " d " << d);
      Device device;
      const int rows = 37;
      const int heads = group * kv_heads;
      const std::vector<float> query = RandomFloats(random, int64_t{rows} * heads * d, true);
      std::vector<float> key = RandomFloats(random, int64_t{rows} * kv_heads * d, true);
      // What all keys share must not count.
      for (size_t i = 0; i < key.size(); ++i) key[i] += static_cast<float>(i % d);
      const std::vector<float> matrix = RandomFloats(random, int64_t{kv_heads} * d * d);
      const RankColumnsArgs args{.column = device.Room<int32_t>(kv_heads * kept),
                                 .query = device.PutRows(query, rows, heads * d),
                                 .key = device.PutRows(key, rows, kv_heads * d),
                                 .matrix = device.Put(matrix),
                                 .query_alone = query_alone,
                                 .rows = rows,
                                 .query_heads = heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = d,
                                 .partial_dim = kept};
      device.backend.RankColumns(args, Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      const std::vector<double> q = Skewed(query, matrix, rows, heads, group, d);
      const std::vector<double> k = Skewed(key, matrix, rows, kv_heads, 1, d);
      for (int h = 0; h < kv_heads; ++h) {
        std::vector<double> worth(d);
        for (int c = 0; c < d; ++c) {
          double mean = 0;
          double spread = 0;
          double size = 0;
          for (int r = 0; r < rows; ++r) mean += k[(r * kv_heads + h) * d + c] / rows;
          for (int r = 0; r < rows; ++r) {
            spread += std::abs(k[(r * kv_heads + h) * d + c] - mean);
            for (int m = 0; m < group; ++m) {
              size += std::abs(q[(r * heads + h * group + m) * d + c]);
            }
          }
          worth[c] = query_alone ? size : size * spread;
        }
        std::vector<int32_t> order(d);
        std::iota(order.begin(), order.end(), 0);
        std::ranges::stable_sort(order, std::greater(), [&](int32_t c) { return worth[c]; });
        order.resize(kept);
        std::ranges::sort(order);
        EXPECT_EQ(std::vector<int32_t>(args.column + h * kept, args.column + (h + 1) * kept),
                  order);
      }
    }
  }
}

TEST(ProjectHeads, ThroughEachTokensOwnColumns) {
  Random random(22);
  constexpr int kDim = 16, kKept = 8, kHeads = 4, kKvHeads = 2, kRows = 5, kSets = 3;
  Device device;
  const std::vector<float> in = RandomFloats(random, kRows * kHeads * kDim);
  const std::vector<float> matrix = RandomFloats(random, kKvHeads * kDim * kDim);
  std::vector<int32_t> column(kSets * kKvHeads * kKept);
  for (int32_t& c : column) c = static_cast<int32_t>(random.Uniform(kDim));
  const std::vector<int32_t> set = {2, -1, 0, 1, 2};
  const Activations out = device.RoomRows(kRows, kHeads * kKept);
  device.backend.ProjectHeads({.out = out,
                               .in = device.PutRows(in, kRows, kHeads * kDim),
                               .matrix = device.Put(matrix),
                               .column = device.Put(column),
                               .column_set = device.Put(set),
                               .column_stride = kKvHeads * kKept,
                               .scale = 0.25f,
                               .rows = kRows,
                               .heads = kHeads,
                               .group = kHeads / kKvHeads,
                               .in_dim = kDim,
                               .out_dim = kKept},
                              Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  const std::vector<float> result = Device::GetRows(out, kRows, kHeads * kKept);
  const std::vector<double> skewed = Skewed(in, matrix, kRows, kHeads, kHeads / kKvHeads, kDim);
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kKept; ++c) {
        double expected = 0;
        if (set[r] >= 0) {
          const int picked = column[(set[r] * kKvHeads + h / 2) * kKept + c];
          expected = 0.25 * skewed[(r * kHeads + h) * kDim + picked];
        }
        EXPECT_NEAR(result[(r * kHeads + h) * kKept + c], expected, 1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace kvsweep
