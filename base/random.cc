#include "base/random.h"

#include <sys/random.h>

#include <bit>
#include <cmath>

#include "base/check.h"

// Compiled with -ffp-contract=off: a fused multiply-add would round differently.

namespace kvsweep {
namespace {

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLn2High = 6.93147180369123816490e-01;  // 32 bits, so that k * kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;

uint64_t SplitMix64(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace

double PortableLog(double x) {
  KVSWEEP_CHECK_GT(x, 0);
  int exponent;
  double mantissa = std::frexp(x, &exponent);  // [0.5, 1); exact
  if (mantissa < 0.70710678118654752) {
    mantissa *= 2;
    --exponent;
  }
  // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172: eleven terms of the odd series suffice.
  const double s = (mantissa - 1) / (mantissa + 1);
  const double s2 = s * s;
  double sum = 0;
  for (int k = 21; k >= 3; k -= 2) sum = (sum + 1.0 / k) * s2;
  return exponent * kLn2High + (2 * s * (1 + sum) + exponent * kLn2Low);
}

double PortableExp(double x) {
  if (x < -745) return 0;
  if (x > 709.7) return HUGE_VAL;
  // exp x = 2^k exp r with |r| <= ln2 / 2; fifteen terms of Taylor's series.
  const int k = static_cast<int>(std::floor(x / kLn2 + 0.5));
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double sum = 1;
  for (int n = 15; n >= 1; --n) sum = 1 + sum * r / n;
  return std::ldexp(sum, k);
}

Random::Random(uint64_t seed) {
  for (uint64_t& word : state_) word = SplitMix64(seed);
}

uint64_t Random::Next64() {
  const uint64_t result = std::rotl(state_[1] * 5, 7) * 9;
  const uint64_t t = state_[1] << 17;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= t;
  state_[3] = std::rotl(state_[3], 45);
  return result;
}

uint64_t Random::Uniform(uint64_t n) {
  KVSWEEP_CHECK_GT(n, 0u);
  // Lemire: the high word of a product; the few low words that would favour some results are drawn
  // again.
  while (true) {
    const unsigned __int128 product = static_cast<unsigned __int128>(Next64()) * n;
    const uint64_t low = static_cast<uint64_t>(product);
    if (low >= n || low >= -n % n) return static_cast<uint64_t>(product >> 64);
  }
}

double Random::UniformDouble() { return static_cast<double>(Next64() >> 11) * 0x1p-53; }

double Random::Exponential(double mean) {
  KVSWEEP_CHECK_GE(mean, 0);
  return -mean * PortableLog(1 - UniformDouble());  // 1 - u lies in (0, 1]
}

double Random::Normal() {
  if (has_spare_normal_) {
    has_spare_normal_ = false;
    return spare_normal_;
  }
  double x, y, square;
  do {
    x = 2 * UniformDouble() - 1;
    y = 2 * UniformDouble() - 1;
    square = x * x + y * y;
  } while (square >= 1 || square == 0);
  const double factor = std::sqrt(-2 * PortableLog(square) / square);
  spare_normal_ = y * factor;
  has_spare_normal_ = true;
  return x * factor;
}

double Random::Gamma(double shape, double scale) {
  KVSWEEP_CHECK_GT(shape, 0);
  KVSWEEP_CHECK_GE(scale, 0);
  if (shape < 1) {
    // Gamma(a) = Gamma(a + 1) * u^(1/a).
    const double power = PortableLog(1 - UniformDouble()) / shape;
    return Gamma(shape + 1, scale) * PortableExp(power);
  }
  const double d = shape - 1.0 / 3;
  const double c = 1 / std::sqrt(9 * d);
  while (true) {
    const double x = Normal();
    const double root = 1 + c * x;
    if (root <= 0) continue;
    const double v = root * root * root;
    const double u = 1 - UniformDouble();
    if (PortableLog(u) < 0.5 * x * x + d - d * v + d * PortableLog(v)) return d * v * scale;
  }
}

uint64_t MixSeed(std::span<const uint64_t> parts) {
  uint64_t state = parts.size();
  for (const uint64_t part : parts) {
    state ^= part;
    state = SplitMix64(state);
  }
  return state;
}

uint64_t EntropySeed() {
  uint64_t seed;
  KVSWEEP_CHECK(getrandom(&seed, sizeof(seed), 0) == sizeof(seed));
  return seed;
}

}  // namespace kvsweep
