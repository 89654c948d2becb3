// The suite on the CPU backend as it runs in production: several threads, streams in a drawn order,
// results that may depend on the batch.
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {

absl::StatusOr<std::unique_ptr<Backend>> CreateSubject() {
  return CreateCpuBackend({.threads = 2, .shuffle_streams = true, .stream_seed = 1});
}

}  // namespace kvsweep
