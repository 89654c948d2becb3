#include "base/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace kvsweep {
namespace {

// Computed by an independent program from the published algorithms.
TEST(Random, GivesTheSpecifiedNumbers) {
  Random zero(0);
  EXPECT_EQ(zero.Next64(), 0x99ec5f36cb75f2b4u);
  EXPECT_EQ(zero.Next64(), 0xbf6e1f784956452au);
  EXPECT_EQ(zero.Next64(), 0x1a5f849d4933e6e0u);
  EXPECT_EQ(Random(42).Next64(), 0x15780b2e0c2ec716u);
}

TEST(Random, ACopyContinuesFromTheSamePosition) {
  Random random(3);
  random.Normal();  // leaves a spare
  Random copy = random;
  for (int i = 0; i < 10; ++i) EXPECT_EQ(random.Normal(), copy.Normal());
}

TEST(Random, UniformStaysInRangeAndReachesEveryValue) {
  Random random(1);
  for (const uint64_t n : {1u, 2u, 3u, 7u, 100u}) {
    std::vector<int> counts(n, 0);
    for (uint64_t i = 0; i < 1000 * n; ++i) ++counts[random.Uniform(n)];
    // 1,000 expected in each; six standard deviations are 190.
    for (const int count : counts) EXPECT_NEAR(count, 1000, 190);
  }
  // A range just above 2^63 rejects nearly half of the draws, the worst case of the method.
  const uint64_t large = (uint64_t{1} << 63) + 1;
  for (int i = 0; i < 1000; ++i) EXPECT_LT(random.Uniform(large), large);
}

TEST(Random, ShuffleIsAPermutationAndMovesThings) {
  Random random(9);
  std::vector<int> items(100);
  std::iota(items.begin(), items.end(), 0);
  std::vector<int> shuffled = items;
  random.Shuffle(std::span<int>(shuffled));
  EXPECT_NE(shuffled, items);
  EXPECT_TRUE(std::is_permutation(shuffled.begin(), shuffled.end(), items.begin()));
}

// Mean and variance over 200,000 draws against theory. Seeds are fixed, so a pass stays a pass; the
// bounds are five standard errors of the estimates.
struct Moments {
  double mean = 0;
  double variance = 0;
};

template <typename Draw>
Moments Measure(Draw draw) {
  constexpr int kDraws = 200'000;
  double sum = 0, squares = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = draw();
    sum += x;
    squares += x * x;
  }
  const double mean = sum / kDraws;
  return {mean, squares / kDraws - mean * mean};
}

TEST(Random, DistributionsHaveTheirMoments) {
  Random random(2024);
  const Moments uniform = Measure([&] { return random.UniformDouble(); });
  EXPECT_NEAR(uniform.mean, 0.5, 0.0033);
  EXPECT_NEAR(uniform.variance, 1.0 / 12, 0.0009);
  const Moments exponential = Measure([&] { return random.Exponential(2); });
  EXPECT_NEAR(exponential.mean, 2, 0.023);
  EXPECT_NEAR(exponential.variance, 4, 0.13);
  const Moments normal = Measure([&] { return random.Normal(); });
  EXPECT_NEAR(normal.mean, 0, 0.012);
  EXPECT_NEAR(normal.variance, 1, 0.016);
  for (const double shape : {0.25, 1.0, 4.5}) {
    const Moments gamma = Measure([&] { return random.Gamma(shape, 3); });
    EXPECT_NEAR(gamma.mean, 3 * shape, 5 * 3 * std::sqrt(shape / 200'000)) << shape;
    const double relative_error = std::sqrt((2 + 6 / shape) / 200'000);
    EXPECT_NEAR(gamma.variance, 9 * shape, 5 * 9 * shape * relative_error) << shape;
  }
}

TEST(Random, PortableFunctionsAgreeWithTheLibrary) {
  Random random(5);
  for (int i = 0; i < 20'000; ++i) {
    const double x =
        std::ldexp(random.UniformDouble() + 0.5, static_cast<int>(random.Uniform(2000)) - 1000);
    EXPECT_NEAR(PortableLog(x), std::log(x), 1e-15 * std::max(1.0, std::abs(std::log(x)))) << x;
    const double y = 1400 * random.UniformDouble() - 700;
    EXPECT_NEAR(PortableExp(y) / std::exp(y), 1, 1e-15) << y;
  }
  EXPECT_EQ(PortableLog(1), 0);
  EXPECT_EQ(PortableExp(0), 1);
  EXPECT_EQ(PortableExp(-1000), 0);
}

TEST(MixSeed, DependsOnEveryPartAndOnTheirOrder) {
  EXPECT_EQ(MixSeed(1, 2, 3), MixSeed(1, 2, 3));
  EXPECT_NE(MixSeed(1, 2, 3), MixSeed(1, 3, 2));
  EXPECT_NE(MixSeed(1, 2), MixSeed(1, 2, 0));
  EXPECT_NE(MixSeed(0), MixSeed(0, 0));
}

TEST(EntropySeed, DiffersBetweenCalls) { EXPECT_NE(EntropySeed(), EntropySeed()); }

}  // namespace
}  // namespace kvsweep
