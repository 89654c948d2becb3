#include "kernels/cuda/cuda_backend.h"
#include "worker/runner/device_backend.h"

namespace kvsweep {

absl::Status ProbeDevice(int device) { return ProbeCuda(device); }

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int device, DType dtype,
                                                           const BackendOptions& options) {
  return CreateCudaBackend(
      {.device = device, .dtype = dtype, .batch_invariant = options.batch_invariant});
}

absl::StatusOr<std::vector<double>> MeasureDeviceReading(int device) {
  return MeasureCudaReading(device);
}

}  // namespace kvsweep
