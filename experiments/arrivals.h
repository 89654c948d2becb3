// When requests arrive: a pure function of the spec, the schedule seed and, of replay, the trace.
//
// The laws, N requests at a mean rate r:
//   poisson    gaps drawn from an exponential, summed, then rescaled so that the last request
//              arrives at N / r exactly (vLLM's rule): the mean rate is the same for every seed
//   gamma      the same with gaps from a gamma of shape `burstiness` (1: exponential, that is
//              poisson; below 1 in bursts; above, more even)
//   constant   request i arrives at (i + 1) / r
//   ramp       gap i is `burstiness`'s draw divided by the rate at i, which goes from ramp_from
//              (first request) to r (last), linearly or exponentially over the requests; rescaled
//              so that the last arrives at the sum of the mean gaps
//   replay     the times of the trace's first N rows, from 0, times time_scale
//   burst      all at 0, as any process of infinite rate
//   closed     `concurrency` at 0, each other one when another has ended
//   static     batches of `concurrency`: the first at 0, each other one when all before it ended
#ifndef KVSWEEP_EXPERIMENTS_ARRIVALS_H_
#define KVSWEEP_EXPERIMENTS_ARRIVALS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "experiments/trace.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

struct Arrival {
  int64_t time_ns = 0;       // since time 0 of the measurement
  uint32_t after_ended = 0;  // above 0: arrives when so many have ended, not by the clock
};

// One for each request, in order. `arrivals` must have passed CheckTrial, with defaults filled in;
// `trace` is needed by replay alone. InvalidArgument when a trace has too few rows or no times.
absl::StatusOr<std::vector<Arrival>> DrawArrivals(const Arrivals& arrivals, uint64_t seed,
                                                  const Trace* trace);

// Whether arrivals come by the clock at a finite rate, so that a queue may grow without bound.
bool IsOpenLoop(const Arrivals& arrivals);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_ARRIVALS_H_
