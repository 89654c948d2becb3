// The read bandwidth of a CUDA device.
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/read_bandwidth.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;  // that a thread has under way

// Adds up everything; what is added is not looked at, but cannot be left out either.
__global__ void __launch_bounds__(kThreads)
    ReadKernel(const uint4* data, int64_t count, unsigned* sink) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  unsigned sum = 0;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i + (kLoads - 1) * step < count; i += kLoads * step) {
    uint4 hold[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) hold[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) sum += hold[u].x ^ hold[u].y ^ hold[u].z ^ hold[u].w;
  }
  for (; i < count; i += step) sum += data[i].x;
  if (sum == 0x9e3779b9u) *sink = sum;
}

}  // namespace

cudaError_t MeasureReading(int device, std::vector<double>* bytes_per_s) {
  size_t available = 0;
  size_t total = 0;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaMemGetInfo(&available, &total);
  if (status != cudaSuccess) return status;
  size_t bytes = size_t{8} << 30;
  while (bytes > available / 2) bytes /= 2;
  int multiprocessors = 0;
  void* data = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  cudaStream_t stream = nullptr;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  status = cudaMalloc(&data, bytes + 256);
  if (status != cudaSuccess) return status;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  cudaMemsetAsync(data, 0x5a, bytes, stream);
  unsigned* const sink = reinterpret_cast<unsigned*>(static_cast<std::byte*>(data) + bytes);
  for (int sample = -2; sample < 10 && status == cudaSuccess; ++sample) {
    cudaEventRecord(begin, stream);
    ReadKernel<<<multiprocessors * 4, kThreads, 0, stream>>>(static_cast<const uint4*>(data),
                                                             bytes / sizeof(uint4), sink);
    cudaEventRecord(end, stream);
    status = cudaStreamSynchronize(stream);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (sample >= 0) bytes_per_s->push_back(static_cast<double>(bytes) / milliseconds * 1e3);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  cudaFree(data);
  return status;
}

}  // namespace kvsweep::cuda
