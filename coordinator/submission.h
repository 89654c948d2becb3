#ifndef KVSWEEP_COORDINATOR_SUBMISSION_H_
#define KVSWEEP_COORDINATOR_SUBMISSION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/scheduler.h"
#include "proto/control.pb.h"
#include "storage/store.h"

// From what a person submits to what the store keeps and the scheduler queues. An experiment is
// checked, expanded and compared with what the store already holds: a round is *served* when an
// accepted round answers it whole; of a round whose arms are answered in part, only {reference,
// arms not answered} is run.

namespace kvsweep {

// What decides whether a stored round answers a planned one, beside its content keys.
struct ReuseRules {
  bool fresh = false;                       // nothing is served
  bool any_build = false;                   // of the same method version
  std::vector<std::string> runner_builds;   // otherwise one of these
  std::vector<std::string> device_classes;  // any of these; empty: any
};

struct Submission {
  // Digests that must be uploaded first, ascending; the rest is empty if there are any.
  std::vector<std::string> missing_files;

  SubmitExperiment operation;
  uint64_t trials = 0;
  uint64_t queued_trials = 0;  // in rounds that are not served
  uint64_t rounds_served = 0;
};

// InvalidArgument, with every problem, for what is not sound; ResourceExhausted past a limit. Reads
// the store, once for each round, so not for a thread that must not wait.
absl::StatusOr<Submission> PlanSubmission(const SubmitRequest& request, const ReuseRules& rules,
                                          int64_t unix_ns, StoreReader& reader);

// ResourceExhausted for `trials` more than a queue of `limit` takes that holds `held`, with what to
// do about it.
absl::Status QueueFullError(uint64_t trials, uint64_t held, uint64_t limit);

// Whether all files of the model are small enough to be sent to any worker.
bool ModelTravels(const ModelReference& model);

// What the scheduler must know of a round.
RoundRequirement RequirementOf(const RoundSpec& spec);

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_SUBMISSION_H_
