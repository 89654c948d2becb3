// Eight floats at a time, by the compiler's vector type: it becomes AVX2 or a pair of smaller
// registers, and the order in which lanes are summed is fixed by the source, not by the compiler.
// Included only by the operations, which are compiled for KVSWEEP_CPU_ARCH.
#ifndef KVSWEEP_KERNELS_CPU_SIMD_H_
#define KVSWEEP_KERNELS_CPU_SIMD_H_

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // every function here is inlined

namespace kvsweep::cpu {

inline constexpr int kLanes = 8;

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float F8Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

#define KVSWEEP_INLINE inline __attribute__((always_inline))

KVSWEEP_INLINE F8 Load(const float* from) { return *reinterpret_cast<const F8Unaligned*>(from); }
KVSWEEP_INLINE void Store(float* to, F8 value) { *reinterpret_cast<F8Unaligned*>(to) = value; }
KVSWEEP_INLINE F8 Splat(float value) {
  return F8{value, value, value, value, value, value, value, value};
}

// The first `count` < 8 floats, zeros behind them; reads nothing else.
KVSWEEP_INLINE F8 LoadFirst(const float* from, int count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return Load(lanes);
}

KVSWEEP_INLINE F8 Max(F8 a, F8 b) { return a > b ? a : b; }
KVSWEEP_INLINE F8 Min(F8 a, F8 b) { return a < b ? a : b; }

// Lane i = sum of the lanes of v[i], each in the order ((0+2)+(1+3))+((4+6)+(5+7)).
KVSWEEP_INLINE F8 SumEach(const F8 v[kLanes]) {
  const I8 low = {0, 8, 1, 9, 4, 12, 5, 13};
  const I8 high = {2, 10, 3, 11, 6, 14, 7, 15};
  const I8 low_pair = {0, 1, 8, 9, 4, 5, 12, 13};
  const I8 high_pair = {2, 3, 10, 11, 6, 7, 14, 15};
  const I8 low_half = {0, 1, 2, 3, 8, 9, 10, 11};
  const I8 high_half = {4, 5, 6, 7, 12, 13, 14, 15};
  F8 pair[4];
  for (int i = 0; i < 4; ++i) {
    pair[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low) +
              __builtin_shuffle(v[2 * i], v[2 * i + 1], high);
  }
  F8 quad[2];
  for (int i = 0; i < 2; ++i) {
    quad[i] = __builtin_shuffle(pair[2 * i], pair[2 * i + 1], low_pair) +
              __builtin_shuffle(pair[2 * i], pair[2 * i + 1], high_pair);
  }
  return __builtin_shuffle(quad[0], quad[1], low_half) +
         __builtin_shuffle(quad[0], quad[1], high_half);
}

// The sum of all lanes, in the same order as SumEach.
KVSWEEP_INLINE float Sum(F8 v) {
  return ((v[0] + v[2]) + (v[1] + v[3])) + ((v[4] + v[6]) + (v[5] + v[7]));
}

KVSWEEP_INLINE float MaxLane(F8 v) {
  float maximum = v[0];
  for (int i = 1; i < kLanes; ++i) maximum = v[i] > maximum ? v[i] : maximum;
  return maximum;
}

// e^x to within 2 ulp. Exactly 1 at 0, exactly 0 below -87.3 (and at -inf); x is clamped to 88.
KVSWEEP_INLINE F8 Exp(F8 x) {
  const F8 lowest = Splat(-87.3f);
  const F8 in_range = Min(x, Splat(88.0f));
  // Adding 1.5 * 2^23 rounds to an integer, whose bits are then the low bits of the sum.
  const F8 magic = Splat(12582912.0f);
  const F8 shifted = in_range * Splat(1.44269504088896341f) + magic;
  const F8 n = shifted - magic;
  F8 r = in_range - n * Splat(0.693359375f);
  r = r - n * Splat(-2.12194440e-4f);
  F8 p = Splat(1.9875691500e-4f);
  p = p * r + Splat(1.3981999507e-3f);
  p = p * r + Splat(8.3334519073e-3f);
  p = p * r + Splat(4.1665795894e-2f);
  p = p * r + Splat(1.6666665459e-1f);
  p = p * r + Splat(5.0000001201e-1f);
  p = p * (r * r) + r + Splat(1.0f);
  const I8 bits = reinterpret_cast<I8>(shifted) - reinterpret_cast<I8>(magic);
  const F8 scale = reinterpret_cast<F8>((bits + 127) << 23);
  return x < lowest ? Splat(0.0f) : p * scale;
}

KVSWEEP_INLINE float Exp(float x) { return Exp(Splat(x))[0]; }

}  // namespace kvsweep::cpu

#pragma GCC diagnostic pop

#endif  // KVSWEEP_KERNELS_CPU_SIMD_H_
