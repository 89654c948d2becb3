// The device backend of a runner that a test can make fail (gpu_main.cc): $KVSWEEP_DEVICE_FAULT
// names the fault, "illegal access", "hang" or "die", and $KVSWEEP_DEVICE_FAULT_MARK a file; as
// long as that exists, the fault happens at a launch of a captured step of an engine (the node's
// measurements launch graphs too), and takes the file away first.
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/fault_kernels.h"
#include "tests/gpu/forwarding_backend.h"
#include "worker/runner/device_backend.h"

namespace kvsweep {
namespace {

constexpr int kHealthyLaunches = 40;

class FaultyBackend : public ForwardingBackend {
 public:
  FaultyBackend(std::unique_ptr<Backend> inner, std::string fault, std::string mark)
      : ForwardingBackend(std::move(inner)), fault_(std::move(fault)), mark_(std::move(mark)) {}

  void Embed(const EmbedArgs& args, Stream stream) override {
    serves_ = true;
    ForwardingBackend::Embed(args, stream);
  }

  void Launch(Graph graph) override {
    if (serves_ && ++launches_ > kHealthyLaunches && unlink(mark_.c_str()) == 0) Fail();
    ForwardingBackend::Launch(graph);
  }

 private:
  void Fail() {
    if (fault_ == "illegal access") return LaunchIllegalAccess();
    if (fault_ == "hang") return LaunchEndlessLoop();
    KVSWEEP_CHECK(fault_ == "die") << fault_;
    kill(getpid(), SIGKILL);
  }

  std::string fault_;
  std::string mark_;
  bool serves_ = false;
  int launches_ = 0;
};

}  // namespace

absl::Status ProbeDevice(int device) { return ProbeCuda(device); }

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int device, DType dtype,
                                                           const BackendOptions& options) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(
      {.device = device, .dtype = dtype, .batch_invariant = options.batch_invariant});
  const char* const fault = std::getenv("KVSWEEP_DEVICE_FAULT");
  const char* const mark = std::getenv("KVSWEEP_DEVICE_FAULT_MARK");
  if (!backend.ok() || fault == nullptr || mark == nullptr) return backend;
  return std::make_unique<FaultyBackend>(*std::move(backend), fault, mark);
}

absl::StatusOr<std::vector<double>> MeasureDeviceReading(int device) {
  return MeasureCudaReading(device);
}

}  // namespace kvsweep
