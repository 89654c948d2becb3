// What a runner program computes on beside the CPU. There are two of these programs, of the same
// sources but for this one: kvsweep-runner has no device backend, kvsweep-runner-cuda has CUDA's.
#ifndef KVSWEEP_WORKER_RUNNER_DEVICE_BACKEND_H_
#define KVSWEEP_WORKER_RUNNER_DEVICE_BACKEND_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/shapes.h"
#include "worker/runner/warm_device.h"

namespace kvsweep {

// Whether this program has a device backend and this machine a device for it; if not, why.
absl::Status ProbeDevice(int device);

// The device backend, computing in `dtype`. Errors as of ProbeDevice, and the backend's own.
absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int device, DType dtype,
                                                           const BackendOptions& options);

// Bytes a second at which the device reads memory that no cache holds, several samples. Errors as
// of ProbeDevice.
absl::StatusOr<std::vector<double>> MeasureDeviceReading(int device);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_DEVICE_BACKEND_H_
