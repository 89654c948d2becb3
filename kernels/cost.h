// The least that an operation must do: bytes it has to read and write on the device, bytes it has
// to move over the host link, and floating-point operations. Every measurement has its distance
// from this floor, and modelled time is made of it.
#ifndef KVSWEEP_KERNELS_COST_H_
#define KVSWEEP_KERNELS_COST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvsweep {

struct Cost {
  double device_bytes = 0;  // read plus written
  double link_bytes = 0;    // over the host link, one direction
  double operations = 0;    // floating-point

  Cost& operator+=(const Cost& other);
};

// What a machine can carry, as measured on it.
struct DeviceProfile {
  std::string name;
  double device_bytes_per_s = 0;
  double link_bytes_per_s = 0;
  double operations_per_s = 0;
  double operation_ns = 0;   // fixed cost of one operation inside a graph
  double element_bytes = 2;  // bytes of a weight or activation on that machine
};

// The profile of that name ("h100", "h200", "laptop"); InvalidArgument naming the known ones.
absl::StatusOr<DeviceProfile> FindDeviceProfile(absl::string_view name);
std::vector<std::string> DeviceProfileNames();

// Nanoseconds that an operation of this cost takes: the slowest of its three parts plus the fixed
// cost.
double DurationNs(const Cost& cost, const DeviceProfile& profile);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_COST_H_
