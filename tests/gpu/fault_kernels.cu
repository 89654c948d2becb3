#include "tests/gpu/fault_kernels.h"

namespace kvsweep {
namespace {

constexpr int kThreads = 1024;
constexpr int kBlocks = 2 * 256;  // two on each multiprocessor fill its threads; more than any device has

// ----------------------------------------------------------------------------------------- kernels

__global__ void illegal_access_kernel(int* nowhere) { *nowhere = 1; }

__global__ void endless_loop_kernel() {
  while (true) __nanosleep(1000);
}

// Faults come beside the backend's streams.
cudaStream_t NewStream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}

}  // namespace

// --------------------------------------------------------------------------------------- launchers

void LaunchIllegalAccess() {
  illegal_access_kernel<<<1, 1, 0, NewStream()>>>(reinterpret_cast<int*>(16));
}

void LaunchEndlessLoop() { endless_loop_kernel<<<kBlocks, kThreads, 0, NewStream()>>>(); }

}  // namespace kvsweep
