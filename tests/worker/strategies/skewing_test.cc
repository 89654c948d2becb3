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
  const HeadColumns best =
      ChooseColumns(skewing.skewed, Infinigen::COLUMN_SCORE_UNION, 3.0 / kDim, 1, kDim);
  // Largest singular values first; beyond the three nothing is left.
  EXPECT_EQ(std::vector<int32_t>(best[0].begin(), best[0].begin() + 3),
            (std::vector<int32_t>{0, 1, 2}));
  const std::vector<float> kept = ThinMatrices(skewing.matrix, {{0, 1, 2}}, kDim, 3, 1.0f);
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
  const auto chosen = [](const LayerSkewing& skewing) {
    return ChooseColumns(skewing.skewed, Infinigen::COLUMN_SCORE_PRODUCT, 0.5, 1, kDim);
  };
  EXPECT_EQ(chosen(ComputeSkewing(queries, keys, sizes)), chosen(before));
}

// Invariant: scores of skewed queries and keys equal the original ones up to rounding.
TEST(SkewingTest, ScoresStay) {
  Random random(8);
  constexpr int kDim = 64;
  const SkewingSizes sizes{.tokens = 100, .query_heads = 3, .kv_heads = 1, .head_dim = kDim};
  const std::vector<float> queries = Normals(random, 100 * 3 * kDim);
  const std::vector<float> keys = Normals(random, 100 * kDim);
  const LayerSkewing skewing = ComputeSkewing(queries, keys, sizes);
  const auto through = [&](const float* vector) {
    std::vector<double> out(kDim);
    for (int j = 0; j < kDim; ++j) {
      for (int c = 0; c < kDim; ++c) out[c] += double{vector[j]} * skewing.matrix[j * kDim + c];
    }
    return out;
  };
  double largest = 0;
  for (int t = 0; t < 100; ++t) {
    const float* const query = queries.data() + (t * 3 + t % 3) * kDim;
    const float* const key = keys.data() + (99 - t) * kDim;
    const std::vector<double> a = through(query);
    const std::vector<double> b = through(key);
    double score = 0;
    double skewed = 0;
    for (int c = 0; c < kDim; ++c) {
      score += double{query[c]} * key[c];
      skewed += a[c] * b[c];
    }
    largest = std::max(largest, std::abs(score - skewed));
  }
  EXPECT_LT(largest, 1e-4);
}

ColumnEnergy Energy(std::vector<double> query, std::vector<double> key) {
  return {.query = std::move(query), .key = std::move(key)};
}

TEST(ColumnsTest, AreRankedAsTheScoreSays) {
  // 16 columns: query energy falls, key energy rises.
  std::vector<double> falls(16), rises(16);
  for (int c = 0; c < 16; ++c) {
    falls[c] = 17 - c;
    rises[c] = 1 + c;
  }
  const ColumnEnergy energy = Energy(falls, rises);
  const auto choose = [&](Infinigen::ColumnScore score) {
    return ChooseColumns(energy, score, 0.25, 1, 16)[0];
  };
  EXPECT_EQ(choose(Infinigen::COLUMN_SCORE_QUERY), (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  // Products are largest in the middle.
  EXPECT_EQ(choose(Infinigen::COLUMN_SCORE_PRODUCT),
            (std::vector<int32_t>{4, 5, 6, 7, 8, 9, 10, 11}));
  // Four of each, which are eight.
  EXPECT_EQ(choose(Infinigen::COLUMN_SCORE_UNION),
            (std::vector<int32_t>{0, 1, 2, 3, 12, 13, 14, 15}));
  EXPECT_EQ(ChooseColumns(Energy(falls, falls), Infinigen::COLUMN_SCORE_UNION, 0.25, 1, 16)[0],
            (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(ColumnsTest, RotaryPairsAreChosenForAllHeadsTogether) {
  // Two heads of 8 columns: pairs (0, 4) … (3, 7). Head 0 likes column 5, head 1 column 3.
  ColumnEnergy energy = Energy(std::vector<double>(16, 1.0), std::vector<double>(16, 1.0));
  energy.query[5] = 10;
  energy.query[8 + 3] = 9;
  const std::vector<int32_t> pairs =
      ChooseRotaryPairs(energy, Infinigen::COLUMN_SCORE_PRODUCT, 4, 2, 8);
  EXPECT_EQ(pairs, (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(PairColumns(pairs, 2, 8), HeadColumns(2, std::vector<int32_t>{1, 3, 5, 7}));
}

TEST(ColumnsTest, ThinMatricesPickAndScale) {
  const std::vector<float> matrix = {1, 2, 3, 4};  // [1, 2, 2]
  EXPECT_EQ(ThinMatrices(matrix, {{1}}, 2, 2, 0.5f), (std::vector<float>{1, 0, 2, 0}));
  EXPECT_EQ(ThinMatrices({}, {{1}}, 2, 1, 2.0f), (std::vector<float>{0, 2}));
}

// (x W^T) M = x (M^T W)^T: projecting through a matrix is projecting with the projected weights.
TEST(ColumnsTest, ProjectedWeightsGiveProjectedQueries) {
  Random random(9);
  constexpr int kHeads = 4, kDim = 8, kInner = 12, kColumns = 5;
  const std::vector<float> weight = Normals(random, kHeads * kDim * kInner);
  const std::vector<float> bias = Normals(random, kHeads * kDim);
  const std::vector<float> matrix = Normals(random, 2 * kDim * kColumns);
  const std::vector<float> x = Normals(random, kInner);
  const ProjectedWeights projected =
      ThroughMatrices(weight, bias, matrix, kHeads, 2, kDim, kColumns);
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kColumns; ++c) {
      double expected = 0;
      for (int j = 0; j < kDim; ++j) {
        double q = bias[h * kDim + j];
        for (int k = 0; k < kInner; ++k) q += double{weight[(h * kDim + j) * kInner + k]} * x[k];
        expected += q * matrix[(h / 2 * kDim + j) * kColumns + c];
      }
      double got = projected.bias[h * kColumns + c];
      for (int k = 0; k < kInner; ++k) {
        got += double{projected.weight[(h * kColumns + c) * kInner + k]} * x[k];
      }
      EXPECT_NEAR(got, expected, 1e-4);
    }
  }
}

TEST(SkewingTest, PartialDimIsRoundedUpToEight) {
  EXPECT_EQ(PartialDim(0.3, 64), 24);   // 19 columns
  EXPECT_EQ(PartialDim(0.3, 128), 40);  // 38
  EXPECT_EQ(PartialDim(0.01, 64), 8);
  EXPECT_EQ(PartialDim(1.0, 64), 64);
  EXPECT_EQ(PartialDim(0.3, 8), 8);
  EXPECT_EQ(PartialDim(0.2, 80), 16);        // exactly 16
  EXPECT_EQ(PartialDim(0.2, 64, true), 24);  // twice 12
  EXPECT_EQ(PartialDim(0.8, 64, true), 64);
}

}  // namespace
}  // namespace kvsweep
