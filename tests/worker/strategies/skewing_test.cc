#include "worker/strategies/skewing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/random.h"

namespace kvsweep {
namespace {

std::vector<float> Normals(Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(random.Normal());
  return values;
}

// Strategies' law: A is orthogonal, so skewed scores equal the original ones up to rounding.
TEST(SkewingTest, IsOrthogonalAndKeepsScores) {
  Random random(5);
  for (const auto& [heads, kv_heads, dim] : {std::tuple{4, 4, 8}, {6, 2, 64}, {7, 1, 16}}) {
    const SkewingSizes sizes{
        .tokens = 2 * dim, .query_heads = heads, .kv_heads = kv_heads, .head_dim = dim};
    const std::vector<float> queries = Normals(random, int64_t{sizes.tokens} * heads * dim);
    const std::vector<float> keys = Normals(random, int64_t{sizes.tokens} * kv_heads * dim);
    const LayerSkewing skewing = ComputeSkewing(queries, keys, sizes);
    for (int head = 0; head < kv_heads; ++head) {
      const float* a = skewing.matrix.data() + head * dim * dim;
      for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < dim; ++j) {
          double dot = 0;
          for (int k = 0; k < dim; ++k) dot += double{a[k * dim + i]} * a[k * dim + j];
          EXPECT_NEAR(dot, i == j, 1e-5) << "columns " << i << ", " << j;
        }
      }
    }
  }
}

// Queries that live in three directions: three columns of the skewed space must hold all of their
// energy.
TEST(SkewingTest, GathersEnergyInFewColumns) {
  Random random(6);
  constexpr int kDim = 32;
  constexpr int kTokens = 200;
  std::vector<float> directions = Normals(random, 3 * kDim);
  std::vector<float> queries(kTokens * kDim);
  for (int t = 0; t < kTokens; ++t) {
    for (int d = 0; d < 3; ++d) {
      const auto weight = static_cast<float>(random.Normal());
      for (int i = 0; i < kDim; ++i) queries[t * kDim + i] += weight * directions[d * kDim + i];
    }
  }
  const std::vector<float> keys = Normals(random, kTokens * kDim);
  const LayerSkewing skewing = ComputeSkewing(
      queries, keys, {.tokens = kTokens, .query_heads = 1, .kv_heads = 1, .head_dim = kDim});
  std::vector<int32_t> best(skewing.column_order.begin(), skewing.column_order.begin() + 3);
  std::ranges::sort(best);
  EXPECT_EQ(best, (std::vector<int32_t>{0, 1, 2}));  // largest singular values first
  const std::vector<float> kept = KeptColumns(skewing, 1, kDim, 3, 1.0f);
  double all = 0;
  double held = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kDim; ++i) all += std::pow(queries[t * kDim + i], 2);
    for (int c = 0; c < 3; ++c) {
      double dot = 0;
      for (int i = 0; i < kDim; ++i) dot += double{queries[t * kDim + i]} * kept[i * 3 + c];
      held += dot * dot;
    }
  }
  EXPECT_NEAR(held / all, 1.0, 1e-5);
}

// A component that all keys share cancels in the softmax, so it must not win a column.
TEST(SkewingTest, WhatAllKeysShareWinsNoColumn) {
  Random random(7);
  constexpr int kDim = 16;
  constexpr int kTokens = 64;
  const std::vector<float> queries = Normals(random, kTokens * kDim);
  std::vector<float> keys = Normals(random, kTokens * kDim);
  const SkewingSizes sizes{.tokens = kTokens, .query_heads = 1, .kv_heads = 1, .head_dim = kDim};
  const LayerSkewing before = ComputeSkewing(queries, keys, sizes);
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kDim; ++i) keys[t * kDim + i] += 100.0f * static_cast<float>(i);
  }
  EXPECT_EQ(ComputeSkewing(queries, keys, sizes).column_order, before.column_order);
}

TEST(SkewingTest, PartialDimIsRoundedUpToEight) {
  EXPECT_EQ(PartialDim(0.3, 64), 24);   // 19 columns
  EXPECT_EQ(PartialDim(0.3, 128), 40);  // 38
  EXPECT_EQ(PartialDim(0.01, 64), 8);
  EXPECT_EQ(PartialDim(1.0, 64), 64);
  EXPECT_EQ(PartialDim(0.3, 8), 8);
  EXPECT_EQ(PartialDim(0.2, 80), 16);  // exactly 16
}

}  // namespace
}  // namespace kvsweep
