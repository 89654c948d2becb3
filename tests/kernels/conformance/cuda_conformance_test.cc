// The suite on a CUDA device, in bf16 or, with KVSWEEP_CONFORMANCE_ACTIVATIONS=f32, in f32.
#include <cstdlib>

#include "kernels/cuda/cuda_backend.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {

absl::StatusOr<std::unique_ptr<Backend>> CreateSubject() {
  const absl::Status device = ProbeCuda();
  if (!device.ok()) return device;
  const char* const asked = std::getenv("KVSWEEP_CONFORMANCE_ACTIVATIONS");
  const bool f32 = asked != nullptr && absl::string_view(asked) == "f32";
  return CreateCudaBackend({.dtype = f32 ? DType::kF32 : DType::kBf16});
}

}  // namespace kvsweep
