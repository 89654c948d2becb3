// Rotary embedding in place: one block a row, whose sines and cosines serve all its heads.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxHalf = 512;  // half of the largest head dimension

template <typename T>
__global__ void RotaryKernel(RotaryArgs args) {
  __shared__ float cosine[kMaxHalf];
  __shared__ float sine[kMaxHalf];
  const int half = args.head_dim / 2;
  const int64_t row = blockIdx.x;
  const float position = static_cast<float>(args.position[row]);
  for (int j = threadIdx.x; j < half; j += kThreads) {
    // In f32, as the models' own code computes them.
    sincosf(__fmul_rn(position, args.inverse_frequency[j]), &sine[j], &cosine[j]);
  }
  __syncthreads();
  T* const data = static_cast<T*>(args.data.data) + row * args.data.stride;
  for (int i = threadIdx.x; i < args.heads * half; i += kThreads) {
    const int head = i / half;
    const int j = i - head * half;
    T* const low = data + int64_t{head} * args.head_dim + j;
    T* const high = low + half;
    const float x = ToFloat(*low);
    const float y = ToFloat(*high);
    *low = FromFloat<T>(x * cosine[j] - y * sine[j]);
    *high = FromFloat<T>(y * cosine[j] + x * sine[j]);
  }
}

}  // namespace

cudaError_t Launch(const RotaryArgs& args, const LaunchContext& context) {
  if (args.head_dim > 2 * kMaxHalf) return cudaErrorInvalidValue;
  WithActivations(context.activation_dtype, [&](auto element) {
    RotaryKernel<decltype(element)>
        <<<static_cast<unsigned>(args.rows), kThreads, 0, context.stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace kvsweep::cuda
