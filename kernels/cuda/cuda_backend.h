// The fast backend: one CUDA device, memory in two tiers (device, pinned host mapped into it), four
// streams, captured graphs, and the kernels of this folder. backend.h is its contract; this is how
// it is met:
//
// Work starts when it is enqueued. A failed launch is noted with its operation's name and returned
// by the next Wait; an error that only shows while a kernel runs (an illegal access) names the
// operations since the last wait, and leaves the process without a device: start another. With
// CUDA_LAUNCH_BLOCKING=1 in the environment every error names its operation.
//
// Memory that is freed stays with the backend and serves the next allocation of about its size, so
// that a trial like the one before takes no time for it; when the device has no more to give, what
// is kept is given back first. allocated_bytes counts what callers hold.
//
// The link is counted where it is crossed: plain copies by their length when they are enqueued,
// kernels with lengths of their own by counters on the device, read when WaitAll returns.
#ifndef KVSWEEP_KERNELS_CUDA_CUDA_BACKEND_H_
#define KVSWEEP_KERNELS_CUDA_CUDA_BACKEND_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/shapes.h"

namespace kvsweep {

struct CudaBackendOptions {
  int device = 0;
  // Of activations and weights. kF32 is for comparing with the CPU backend, not for speed.
  DType dtype = DType::kBf16;
  bool batch_invariant = false;      // a row's result does not depend on the rows computed with it
  uint64_t device_memory_bytes = 0;  // what Tier::kDevice may take; 0: what the device has
  uint64_t host_memory_bytes = 0;    // likewise for Tier::kHost; 0: what the machine has
};

// Whether a device is here that CreateCudaBackend can use. FailedPrecondition with the reason: no
// driver, one that is too old (with both versions), no device, or an older architecture.
absl::Status ProbeCuda(int device = 0);

// Bytes a second at which a device reads memory that no cache holds, several samples. Takes up to 8
// GiB of it for as long. Errors as of ProbeCuda.
absl::StatusOr<std::vector<double>> MeasureCudaReading(int device = 0);

// Errors as of ProbeCuda; InvalidArgument for a dtype other than kBf16 and kF32.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_CUDA_CUDA_BACKEND_H_
