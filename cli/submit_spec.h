#ifndef KVSWEEP_CLI_SUBMIT_SPEC_H_
#define KVSWEEP_CLI_SUBMIT_SPEC_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "cli/control_client.h"
#include "cli/flags.h"
#include "experiments/spec.h"
#include "proto/control.pb.h"
#include "storage/query.h"

namespace kvsweep {

// The request for a spec that was read, but for its client id.
SubmitRequest MakeSubmitRequest(const LoadedExperiment& loaded, const ReuseFlags& reuse);

// The id under which asking the same again is the same experiment: `prefix` and a digest of the
// experiment, the content of its files, this build of the runner, the rule of reuse, and `where`
// (what else decides the numbers, such as the device; may be empty). With --fresh, no two are
// equal.
std::string DeriveClientId(const LoadedExperiment& loaded, const ReuseFlags& reuse,
                           absl::string_view prefix, absl::string_view where);

// `client_id`, or, if the experiment under that id has ended and a part of it failed, a further id
// for another try. A try that has not ended goes on, and one that went well is the answer.
absl::StatusOr<std::string> NextTry(TableSource& tables, const std::string& client_id);

// Submits, uploading the files that the coordinator lacks first.
absl::StatusOr<SubmitReply> SubmitWithFiles(ControlClient& client, const LoadedExperiment& loaded,
                                            const SubmitRequest& request);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_SUBMIT_SPEC_H_
