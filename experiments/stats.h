// The few statistics that reports rest on. Intervals are two-sided. Nothing is assumed normal but
// means over repeats (Student's t); shares use Wilson's interval, sums over windows the bootstrap.
#ifndef KVSWEEP_EXPERIMENTS_STATS_H_
#define KVSWEEP_EXPERIMENTS_STATS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace kvsweep {

struct Interval {
  double low = 0;
  double high = 0;
};

// A mean and how sure it is. Without a half width (fewer than two values) nothing is known about
// its error.
struct MeanEstimate {
  size_t count = 0;
  double mean = 0;
  std::optional<double> half_width;
};

// Mean of `values` and its t interval. REQUIRES: not empty, 0 < confidence < 1.
MeanEstimate EstimateMean(std::span<const double> values, double confidence = 0.95);

// Mean of values[i] - baseline[i] and its t interval. REQUIRES: equal, non-zero sizes.
MeanEstimate EstimatePairedDifference(std::span<const double> values,
                                      std::span<const double> baseline, double confidence = 0.95);

// The `quantile` (0 to 1) of `sorted`, by linear interpolation as numpy's default. REQUIRES:
// sorted, not empty.
double Percentile(std::span<const double> sorted, double quantile);

// Wilson's score interval for a share. REQUIRES: successes <= trials, trials > 0.
Interval WilsonInterval(uint64_t successes, uint64_t trials, double confidence = 0.95);

// Percentile bootstrap of sum(numerators) / sum(denominators) over jointly resampled entries
// (windows of a text). The same seed gives the same interval. REQUIRES: equal sizes of at least 2,
// positive denominators.
Interval BootstrapRatio(std::span<const double> numerators, std::span<const double> denominators,
                        uint64_t seed, size_t resamples = 2000, double confidence = 0.95);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_STATS_H_
