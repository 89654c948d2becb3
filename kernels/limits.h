// What the machine can carry, measured before anything is compared with it: by kvsweep-bench at the
// head of each run, and by a runner as the preflight of its node.
#ifndef KVSWEEP_KERNELS_LIMITS_H_
#define KVSWEEP_KERNELS_LIMITS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "kernels/measure.h"

namespace kvsweep {

struct Limit {
  std::string name;
  double value = 0;
  std::string unit;
  double spread = 0;  // interquartile range / median
};

struct MachineLimits {
  std::vector<Limit> rows;
  DeviceProfile profile;  // the ones that floors are made of
};

struct LimitsOptions {
  bool all = true;     // also what floors do not need: gathers by row size, launches, both ways
  bool brief = false;  // seconds in all, at a little more spread
  // Reads a device's memory, cold: bytes a second, several samples. Not asked on the CPU backend.
  std::function<absl::StatusOr<std::vector<double>>()> read_device;
};

// Takes and frees memory of both tiers: up to 2 GiB of each, half a GiB if brief.
absl::StatusOr<MachineLimits> MeasureLimits(Backend& backend, const LimitsOptions& options);

// The limits that floors are made of, by the names that MeasureLimits gives them.
DeviceProfile ProfileOf(const std::string& name, double element_bytes,
                        const std::vector<Limit>& rows);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_LIMITS_H_
