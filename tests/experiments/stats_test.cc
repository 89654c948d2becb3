#include "experiments/stats.h"

#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

TEST(StatsTest, MeanHasStudentsInterval) {
  // t(0.975, 2) = 4.302653; the standard deviation of 1, 2, 3 is 1.
  const MeanEstimate estimate = EstimateMean(std::vector<double>{1, 2, 3});
  EXPECT_EQ(estimate.count, 3u);
  EXPECT_DOUBLE_EQ(estimate.mean, 2);
  EXPECT_NEAR(estimate.half_width.value(), 4.302653 / std::sqrt(3.0), 1e-6);
}

TEST(StatsTest, OneValueHasNoInterval) {
  EXPECT_FALSE(EstimateMean(std::vector<double>{5}).half_width.has_value());
}

// Pairing takes out what both share: here an offset a hundred times the effect.
TEST(StatsTest, PairedDifferenceIsBlindToSharedNoise) {
  const std::vector<double> baseline = {100, 300, 200};
  const std::vector<double> values = {101, 301.1, 200.9};
  const MeanEstimate difference = EstimatePairedDifference(values, baseline);
  EXPECT_NEAR(difference.mean, 1, 1e-9);
  EXPECT_LT(*difference.half_width, 0.5);
}

TEST(StatsTest, PercentileInterpolatesLikeNumpy) {
  const std::vector<double> sorted = {1, 2, 3, 4};
  EXPECT_DOUBLE_EQ(Percentile(sorted, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(sorted, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(Percentile(sorted, 0.9), 3.7);
  EXPECT_DOUBLE_EQ(Percentile(sorted, 1), 4);
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{7}, 0.99), 7);
}

TEST(StatsTest, WilsonIntervalStaysInsideShares) {
  const Interval half = WilsonInterval(5, 10);
  EXPECT_NEAR(half.low, 0.2366, 1e-4);
  EXPECT_NEAR(half.high, 0.7634, 1e-4);
  EXPECT_NEAR(WilsonInterval(0, 10).low, 0, 1e-12);
  EXPECT_GT(WilsonInterval(0, 10).high, 0.2);
  EXPECT_DOUBLE_EQ(WilsonInterval(10, 10).high, 1);
}

TEST(StatsTest, IntervalsCoverTheTruthAsOftenAsTheySay) {
  const uint64_t seed = 7;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  int covered = 0;
  constexpr int kRounds = 2000;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> values(5);
    for (double& value : values) value = 3 + random.Normal();
    const MeanEstimate estimate = EstimateMean(values);
    covered += std::abs(estimate.mean - 3) <= *estimate.half_width;
  }
  // 95 % of 2000, give or take four standard deviations.
  EXPECT_NEAR(covered, 1900, 40);
}

TEST(StatsTest, BootstrapIsRepeatableAndHoldsTheRatio) {
  const std::vector<double> sums = {10, 12, 9, 11, 30, 8};
  const std::vector<double> tokens = {100, 100, 100, 100, 200, 100};
  const Interval first = BootstrapRatio(sums, tokens, 3);
  const Interval again = BootstrapRatio(sums, tokens, 3);
  EXPECT_EQ(first.low, again.low);
  EXPECT_EQ(first.high, again.high);
  EXPECT_LT(first.low, 80.0 / 700);
  EXPECT_GT(first.high, 80.0 / 700);
  const Interval constant = BootstrapRatio(tokens, tokens, 3);
  EXPECT_EQ(constant.low, 1);
  EXPECT_EQ(constant.high, 1);
}

}  // namespace
}  // namespace kvsweep
