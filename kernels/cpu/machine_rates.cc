#include "kernels/cpu/machine_rates.h"

#include <cblas.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>

#include "base/clock.h"

namespace kvsweep::cpu {

std::vector<double> ReadRates() {
  constexpr size_t kWords = size_t{1} << 27;
  const auto data = std::make_unique<uint64_t[]>(kWords);
  for (size_t i = 0; i < kWords; i += 512) data[i] = i;
  const int threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<double> samples;
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  for (int sample = 0; sample < 5; ++sample) {
    const int64_t begin = RealClock::Get().NowNs();
    std::vector<std::thread> readers;
    for (int t = 0; t < threads; ++t) {
      readers.emplace_back([&, t] {
        uint64_t sum[4] = {};
        const size_t first = kWords / threads * t / 4 * 4;
        for (size_t i = first; i + 4 <= first + kWords / threads; i += 4) {
          for (int lane = 0; lane < 4; ++lane) sum[lane] += data[i + lane];
        }
        sums[t] += sum[0] + sum[1] + sum[2] + sum[3];
      });
    }
    for (std::thread& reader : readers) reader.join();
    const double seconds = static_cast<double>(RealClock::Get().NowNs() - begin) / 1e9;
    // The sums are looked at, so that nothing is left out.
    if (sums[0] != 1) samples.push_back(kWords * 8 / seconds);
  }
  return samples;
}

std::vector<double> ProductTimesNs() {
  const std::vector<float> in(size_t{kProductSize} * kProductSize, 0.5f);
  std::vector<float> out(in.size());
  openblas_set_num_threads(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  std::vector<double> samples;
  for (int sample = 0; sample < 6; ++sample) {
    const int64_t begin = RealClock::Get().NowNs();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, kProductSize, kProductSize, kProductSize,
                1, in.data(), kProductSize, in.data(), kProductSize, 0, out.data(), kProductSize);
    samples.push_back(static_cast<double>(RealClock::Get().NowNs() - begin));
  }
  openblas_set_num_threads(1);
  return samples;
}

}  // namespace kvsweep::cpu
