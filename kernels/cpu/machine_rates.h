// What the processors of this machine carry: the limits that the CPU backend is compared with.
#ifndef KVSWEEP_KERNELS_CPU_MACHINE_RATES_H_
#define KVSWEEP_KERNELS_CPU_MACHINE_RATES_H_

#include <vector>

namespace kvsweep::cpu {

// All cores add up 1 GiB once for each sample: bytes a second.
std::vector<double> ReadRates();

// Samples of the time that the BLAS alone, on all cores, takes for one f32 product of
// kProductSize^3.
inline constexpr int kProductSize = 1536;
inline constexpr double kProductOperations = 2.0 * kProductSize * kProductSize * kProductSize;
std::vector<double> ProductTimesNs();

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_MACHINE_RATES_H_
