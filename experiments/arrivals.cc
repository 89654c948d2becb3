#include "experiments/arrivals.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

// A gap of mean 1.
double DrawGap(const Arrivals& arrivals, Random* random) {
  switch (arrivals.process()) {
    case Arrivals::PROCESS_CONSTANT:
      return 1;
    case Arrivals::PROCESS_GAMMA:
    case Arrivals::PROCESS_RAMP:
      if (arrivals.burstiness() == 1) break;
      return random->Gamma(arrivals.burstiness(), 1 / arrivals.burstiness());
    default:
      break;
  }
  return random->Exponential(1);
}

// Mean rate of a ramp at request `index`.
double RampRate(const Arrivals& arrivals, size_t index) {
  if (arrivals.requests() < 2) return arrivals.rate();
  const double progress = static_cast<double>(index) / static_cast<double>(arrivals.requests() - 1);
  const double from = arrivals.ramp_from();
  const double to = arrivals.rate();
  return arrivals.ramp() == Arrivals::RAMP_LINEAR
             ? from + (to - from) * progress
             : from * PortableExp(PortableLog(to / from) * progress);
}

// Sum of the mean gaps, in seconds: where the last request arrives.
double MeanDuration(const Arrivals& arrivals) {
  if (arrivals.process() != Arrivals::PROCESS_RAMP) return arrivals.requests() / arrivals.rate();
  double sum = 0;
  for (size_t i = 0; i < arrivals.requests(); ++i) sum += 1 / RampRate(arrivals, i);
  return sum;
}

std::vector<Arrival> ByRate(const Arrivals& arrivals, uint64_t seed) {
  const bool ramp = arrivals.process() == Arrivals::PROCESS_RAMP;
  Random random(seed);
  std::vector<double> times(arrivals.requests());
  double time = 0;
  for (size_t i = 0; i < times.size(); ++i) {
    const double gap = DrawGap(arrivals, &random);
    times[i] = time += ramp ? gap / RampRate(arrivals, i) : gap;
  }
  const double wanted = MeanDuration(arrivals) * static_cast<double>(kNsPerSecond);
  if (!(time > 0) || !std::isfinite(wanted / time)) {
    // Very bursty gaps can all be too small for a number: then they are equal.
    std::iota(times.begin(), times.end(), 1.0);
    time = static_cast<double>(times.size());
  }
  const double scale = wanted / time;
  std::vector<Arrival> result(times.size());
  for (size_t i = 0; i < times.size(); ++i) result[i].time_ns = std::llround(times[i] * scale);
  return result;
}

absl::StatusOr<std::vector<Arrival>> Replayed(const Arrivals& arrivals, const Trace* trace) {
  if (trace == nullptr || !trace->has_times) {
    return absl::InvalidArgumentError(
        "the trace has no times to replay; name an Azure or Mooncake trace, or another process");
  }
  if (arrivals.requests() > trace->rows.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the trace has ", trace->rows.size(), " rows and load.arrivals.requests is ",
                     arrivals.requests(), ", of which replay needs a row each"));
  }
  // Far enough that no clock gets there, and not past what nanoseconds can hold.
  constexpr double kLatestNs = 9e18;
  std::vector<Arrival> result(arrivals.requests());
  for (size_t i = 0; i < result.size(); ++i) {
    const double time_ns = static_cast<double>(trace->rows[i].time_ns) * arrivals.time_scale();
    result[i].time_ns = std::llround(std::min(time_ns, kLatestNs));
  }
  return result;
}

// Closed loops and static batches: `concurrency` at once, the others as those before them end.
std::vector<Arrival> AfterOthers(const Arrivals& arrivals) {
  const uint32_t concurrency = arrivals.concurrency();
  KVSWEEP_CHECK_GE(concurrency, 1u);
  const bool batches = arrivals.process() == Arrivals::PROCESS_STATIC;
  std::vector<Arrival> result(arrivals.requests());
  for (uint32_t i = concurrency; i < result.size(); ++i) {
    result[i].after_ended = batches ? i / concurrency * concurrency : i - concurrency + 1;
  }
  return result;
}

}  // namespace

absl::StatusOr<std::vector<Arrival>> DrawArrivals(const Arrivals& arrivals, uint64_t seed,
                                                  const Trace* trace) {
  switch (arrivals.process()) {
    case Arrivals::PROCESS_REPLAY:
      return Replayed(arrivals, trace);
    case Arrivals::PROCESS_CLOSED:
    case Arrivals::PROCESS_STATIC:
      return AfterOthers(arrivals);
    default:
      break;
  }
  return IsOpenLoop(arrivals) ? ByRate(arrivals, seed) : std::vector<Arrival>(arrivals.requests());
}

bool IsOpenLoop(const Arrivals& arrivals) {
  switch (arrivals.process()) {
    case Arrivals::PROCESS_POISSON:
    case Arrivals::PROCESS_GAMMA:
    case Arrivals::PROCESS_CONSTANT:
    case Arrivals::PROCESS_RAMP:
      return std::isfinite(arrivals.rate());
    default:
      return arrivals.process() == Arrivals::PROCESS_REPLAY;
  }
}

}  // namespace kvsweep
