#include "kernels/measure.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Standard deviation over the mean.
double Noise(const std::vector<double>& values) {
  const double mean = Mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(values.size() - 1)) / mean;
}

// The noise has been the same, within a twentieth, over the last quarter of the samples.
bool IsStable(const std::vector<double>& noise) {
  constexpr size_t kLeast = 40;
  if (noise.size() < kLeast) return false;
  const auto from = noise.end() - static_cast<int64_t>(noise.size() / 4);
  const auto [low, high] = std::minmax_element(from, noise.end());
  return *high - *low < 0.05 * *high;
}

}  // namespace

Timing Summarise(std::vector<double> samples) {
  KVSWEEP_CHECK(!samples.empty());
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double share) {
    return samples[static_cast<size_t>(share * static_cast<double>(samples.size() - 1) + 0.5)];
  };
  return {.median_ns = at(0.5),
          .spread = (at(0.75) - at(0.25)) / at(0.5),
          .samples = static_cast<int>(samples.size()),
          .stop = ""};
}

absl::StatusOr<Timing> Measure(Backend& backend, int operations,
                               const std::function<void(int i)>& enqueue, const StopRule& rule) {
  // Once outside the capture: libraries choose and allocate on a first call.
  enqueue(0);
  RETURN_IF_ERROR(backend.WaitAll());
  backend.BeginCapture();
  for (int i = 0; i < operations; ++i) enqueue(i);
  ASSIGN_OR_RETURN(const Graph graph, backend.EndCapture());
  const Event begin = backend.CreateEvent();
  const Event end = backend.CreateEvent();
  for (int warm_up = 0; warm_up < 2; ++warm_up) backend.Launch(graph);
  RETURN_IF_ERROR(backend.WaitAll());

  RealClock& clock = RealClock::Get();
  const int64_t deadline = clock.NowNs() + static_cast<int64_t>(rule.seconds * kNsPerSecond);
  std::vector<double> samples;
  std::vector<double> noise;
  std::string stop;
  while (stop.empty()) {
    backend.RecordEvent(begin, Stream::kCompute);
    backend.Launch(graph);
    backend.RecordEvent(end, Stream::kCompute);
    RETURN_IF_ERROR(backend.WaitAll());
    samples.push_back(backend.ElapsedNs(begin, end) / operations);
    if (samples.size() > 1) noise.push_back(Noise(samples));
    const bool enough = static_cast<int>(samples.size()) >= rule.least_samples;
    if (enough &&
        noise.back() / std::sqrt(static_cast<double>(samples.size())) < rule.relative_error) {
      stop = "converged";
    } else if (enough && IsStable(noise)) {
      stop = "noise-stable";
    } else if (clock.NowNs() > deadline) {
      stop = "time-limit";
    }
  }
  backend.DestroyGraph(graph);
  Timing timing = Summarise(samples);
  timing.stop = stop;
  return timing;
}

}  // namespace kvsweep
