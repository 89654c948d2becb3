// One prompt under several arms, for people: what a strategy does to a model's text. Nothing is
// measured and nothing recorded.
#ifndef KVSWEEP_WORKER_RUNNER_GENERATE_H_
#define KVSWEEP_WORKER_RUNNER_GENERATE_H_

#include "absl/status/statusor.h"
#include "proto/runner.pb.h"
#include "worker/runner/warm_device.h"

namespace kvsweep {

// Continues (or scores) the request's prompt under each of its arms, one after the other, with the
// strategy's real state: the prompt is prefilled, every further token is one decode step. An arm
// that cannot run has its reason in its reply; errors of model, tokenizer and files are returned.
// InvalidArgument also for a prompt without tokens and for one that is too long for the model.
absl::StatusOr<GenerateReply> Generate(const GenerateRequest& request, WarmDevice* device);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_GENERATE_H_
