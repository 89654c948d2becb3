#ifndef KVSWEEP_CLI_FOLLOW_H_
#define KVSWEEP_CLI_FOLLOW_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "cli/control_client.h"
#include "cli/progress.h"
#include "storage/query.h"

namespace kvsweep {

// Shows an experiment live until it has finished: progress, what the coordinator says, and every
// trial that did not end well, as soon as that is stored. A coordinator that went away is tried
// again for half a minute. Cancelled after ControlClient::Interrupt; the experiment goes on then,
// as far as its coordinator does.
absl::Status Follow(ControlClient& client, TableSource& tables, ExperimentId experiment,
                    ProgressDisplay* display, Clock& clock);

// How an experiment stands in the store.
struct Standing {
  int64_t rounds = 0;
  int64_t done = 0;    // measured for it
  int64_t served = 0;  // answered by earlier rounds
  int64_t failed = 0;  // given up; poisoned ones too
  int64_t cancelled = 0;
  std::map<std::string, int64_t> outcomes;  // trials that have ended, by outcome

  bool finished() const { return done + served + failed + cancelled == rounds; }

  // Whether a part of it failed that a repetition might not: crashed trials, rounds given up or
  // cancelled. Not: oom, infeasible, unstable, timeout, which are results.
  bool has_failures() const;
};
absl::StatusOr<Standing> ReadStanding(TableSource& tables, ExperimentId experiment);

// "12 of 12 rounds: 10 measured, 2 from the store; trials: ok 34, oom 2".
std::string FormatStanding(const Standing& standing);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_FOLLOW_H_
