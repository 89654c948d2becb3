#ifndef KVSWEEP_TESTS_BENCH_LIMITS_H_
#define KVSWEEP_TESTS_BENCH_LIMITS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "tests/bench/measure.h"

// What the machine can carry, measured before anything is compared with it.

namespace kvsweep {

struct Limit {
  std::string name;
  double value = 0;
  std::string unit;
  double spread = 0;
};

struct Limits {
  std::vector<Limit> rows;
  DeviceProfile profile;  // the ones that floors are made of
};

// `all`: also what floors do not need (gathers by row size, graph nodes, both ways of the link).
absl::StatusOr<Limits> MeasureLimits(Backend& backend, bool all);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_LIMITS_H_
