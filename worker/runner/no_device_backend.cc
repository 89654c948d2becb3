#include "worker/runner/device_backend.h"

namespace kvsweep {

absl::Status ProbeDevice(int device) {
  return absl::FailedPreconditionError("this program has the CPU backend only");
}

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int device, DType dtype,
                                                           const BackendOptions& options) {
  return ProbeDevice(device);
}

absl::StatusOr<std::vector<double>> MeasureDeviceReading(int device) { return ProbeDevice(device); }

}  // namespace kvsweep
