// Random numbers by index: close to the standard normal (the sum of eight uniforms), and a function
// of seed and index alone, computed exactly, so that every backend and any number of threads fill
// memory with the same values.
#ifndef KVSWEEP_KERNELS_NORMAL_VALUE_H_
#define KVSWEEP_KERNELS_NORMAL_VALUE_H_

#include <cstdint>

#ifdef __CUDACC__
#define KVSWEEP_HOST_DEVICE __host__ __device__
#else
#define KVSWEEP_HOST_DEVICE
#endif

namespace kvsweep {

// The finaliser of SplitMix64: every bit of the result depends on every bit of x.
KVSWEEP_HOST_DEVICE inline uint64_t MixBits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

KVSWEEP_HOST_DEVICE inline float NormalValue(uint64_t seed, uint64_t index) {
  const uint64_t first = MixBits(seed + (index + 1) * 0x9e3779b97f4a7c15u);
  const uint64_t second = MixBits(first ^ 0xd1b54a32d192ed03u);
  int32_t sum = 0;  // of eight uniforms on 0 .. 65535
  for (int shift = 0; shift < 64; shift += 16) {
    sum += static_cast<int32_t>((first >> shift) & 0xffff);
    sum += static_cast<int32_t>((second >> shift) & 0xffff);
  }
  constexpr int32_t kMean = 4 * 65535;
  constexpr float kPerDeviation = 1.0f / 53509.6f;  // sqrt(8 / 12 * 65536^2)
  return static_cast<float>(sum - kMean) * kPerDeviation;
}

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_NORMAL_VALUE_H_
