#include "experiments/stats.h"

#include <algorithm>
#include <boost/math/distributions/normal.hpp>
#include <boost/math/distributions/students_t.hpp>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "base/random.h"

namespace kvsweep {

MeanEstimate EstimateMean(std::span<const double> values, double confidence) {
  KVSWEEP_CHECK(!values.empty() && confidence > 0 && confidence < 1);
  MeanEstimate estimate = {.count = values.size()};
  const double count = static_cast<double>(values.size());
  double sum = 0;
  for (const double value : values) sum += value;
  estimate.mean = sum / count;
  if (values.size() < 2) return estimate;
  double squares = 0;
  for (const double value : values) squares += (value - estimate.mean) * (value - estimate.mean);
  const double standard_error = std::sqrt(squares / (count - 1) / count);
  const boost::math::students_t distribution(count - 1);
  estimate.half_width = boost::math::quantile(distribution, 0.5 + confidence / 2) * standard_error;
  return estimate;
}

MeanEstimate EstimatePairedDifference(std::span<const double> values,
                                      std::span<const double> baseline, double confidence) {
  KVSWEEP_CHECK_EQ(values.size(), baseline.size());
  std::vector<double> differences(values.size());
  for (size_t i = 0; i < values.size(); ++i) differences[i] = values[i] - baseline[i];
  return EstimateMean(differences, confidence);
}

double Percentile(std::span<const double> sorted, double quantile) {
  KVSWEEP_CHECK(!sorted.empty() && quantile >= 0 && quantile <= 1);
  const double position = quantile * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double share = position - static_cast<double>(below);
  return sorted[below] + share * (sorted[above] - sorted[below]);
}

Interval WilsonInterval(uint64_t successes, uint64_t trials, double confidence) {
  KVSWEEP_CHECK(trials > 0 && successes <= trials);
  const double z = boost::math::quantile(boost::math::normal(), 0.5 + confidence / 2);
  const double count = static_cast<double>(trials);
  const double share = static_cast<double>(successes) / count;
  const double scale = 1 + z * z / count;
  const double centre = (share + z * z / (2 * count)) / scale;
  const double half_width =
      z / scale * std::sqrt(share * (1 - share) / count + z * z / (4 * count * count));
  // Exact at the ends, where rounding would leave a trace.
  return {successes == 0 ? 0.0 : std::max(0.0, centre - half_width),
          successes == trials ? 1.0 : std::min(1.0, centre + half_width)};
}

Interval BootstrapRatio(std::span<const double> numerators, std::span<const double> denominators,
                        uint64_t seed, size_t resamples, double confidence) {
  KVSWEEP_CHECK(numerators.size() == denominators.size() && numerators.size() >= 2);
  KVSWEEP_CHECK(resamples >= 1);
  Random random(seed);
  std::vector<double> ratios(resamples);
  for (double& ratio : ratios) {
    double numerator = 0;
    double denominator = 0;
    for (size_t i = 0; i < numerators.size(); ++i) {
      const uint64_t drawn = random.Uniform(numerators.size());
      numerator += numerators[drawn];
      denominator += denominators[drawn];
    }
    ratio = numerator / denominator;
  }
  std::sort(ratios.begin(), ratios.end());
  return {Percentile(ratios, (1 - confidence) / 2), Percentile(ratios, (1 + confidence) / 2)};
}

}  // namespace kvsweep
