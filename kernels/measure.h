#ifndef KVSWEEP_KERNELS_MEASURE_H_
#define KVSWEEP_KERNELS_MEASURE_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

// How long an operation takes on the device's own clock. Operations are captured into one graph, so
// that launches do not count, and each goes over other data than the one before, so that the caches
// are cold. Graphs are launched until the median stands, as NVBench does: the relative error is
// small enough, or the noise has become stable and more samples would not help, or time is up.

namespace kvsweep {

struct StopRule {
  double relative_error = 0.003;  // of the mean
  int least_samples = 10;
  double seconds = 0.5;
};

struct Timing {
  double median_ns = 0;  // of one operation
  double spread = 0;     // interquartile range / median
  int samples = 0;
  std::string stop;  // "converged", "noise-stable", "time-limit"
};

// Times `operations` calls of enqueue(i), i = 0 …, which enqueue on Stream::kCompute.
absl::StatusOr<Timing> Measure(Backend& backend, int operations,
                               const std::function<void(int i)>& enqueue, const StopRule& rule);

// Median and spread of samples in any order. REQUIRES: there is one.
Timing Summarise(std::vector<double> samples);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_MEASURE_H_
