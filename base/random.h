#ifndef KVSWEEP_BASE_RANDOM_H_
#define KVSWEEP_BASE_RANDOM_H_

#include <array>
#include <cstdint>
#include <span>
#include <utility>

// The only door to chance. Every draw is a specified function of the seed, equal on every machine
// and compiler: integers come from xoshiro256** (Blackman and Vigna), and the distributions use
// only operations that IEEE 754 rounds exactly, with our own logarithm and exponential (the C
// library's may differ in the last bit). So a workload can be named by its seed, in a result and in
// a failing test.

namespace kvsweep {

// A generator of its own stream. Copying it copies the position. Not thread-safe; one for each
// thread.
class Random {
 public:
  // State: four outputs of splitmix64 from `seed`, as its authors advise.
  explicit Random(uint64_t seed);

  // Uniform over all 64-bit values.
  uint64_t Next64();

  // Uniform over [0, n), without bias. REQUIRES: n > 0.
  uint64_t Uniform(uint64_t n);

  // Uniform over [0, 1), a multiple of 2^-53.
  double UniformDouble();

  // True with probability `probability` (<= 0: never, >= 1: always).
  bool Bernoulli(double probability) { return UniformDouble() < probability; }

  // Exponential with the given mean, in the unit of the mean. REQUIRES: mean >= 0.
  double Exponential(double mean);

  // Normal with mean 0 and variance 1 (polar method; draws in pairs, the second is kept).
  double Normal();

  // Gamma with mean shape * scale (Marsaglia and Tsang). REQUIRES: shape > 0, scale >= 0.
  double Gamma(double shape, double scale);

  // Puts `items` into a uniformly drawn order (Fisher-Yates from the back).
  template <typename T>
  void Shuffle(std::span<T> items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[Uniform(i)]);
  }

 private:
  std::array<uint64_t, 4> state_;
  double spare_normal_ = 0;
  bool has_spare_normal_ = false;
};

// A seed derived from several numbers (experiment seed, repeat, purpose): any change in any of
// them, or in their order, gives an unrelated stream.
uint64_t MixSeed(std::span<const uint64_t> parts);
template <typename... Parts>
uint64_t MixSeed(uint64_t first, Parts... rest) {
  const std::array<uint64_t, 1 + sizeof...(rest)> parts = {first, static_cast<uint64_t>(rest)...};
  return MixSeed(std::span<const uint64_t>(parts));
}

// Real chance, from the kernel: for identities and back-off, never for anything that a result
// depends on.
uint64_t EntropySeed();

// Natural logarithm of x > 0 and exponential, with relative error below 1e-15 and equal bits
// everywhere.
double PortableLog(double x);
double PortableExp(double x);

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_RANDOM_H_
