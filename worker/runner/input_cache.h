// What trials read, kept across trials: traces, and texts as token ids. Each is read once, and held
// to the digest that the trial's spec names for it, so that a result never rests on another file.
//
// One thread.
#ifndef KVSWEEP_WORKER_RUNNER_INPUT_CACHE_H_
#define KVSWEEP_WORKER_RUNNER_INPUT_CACHE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "experiments/trace.h"
#include "proto/runner.pb.h"
#include "worker/engine/tokenizer.h"

namespace kvsweep {

class InputCache {
 public:
  // Lets go of what earlier trials have read, where it is much. Before a trial reads anything: what
  // the functions below give is valid until then.
  void Trim();

  // The trace that the spec calls `path`. NotFound when the request has no place for it,
  // FailedPrecondition when the file is not the one that was submitted.
  absl::StatusOr<const Trace*> FindTrace(const RunTrial& request, const std::string& path);

  // The text that the spec calls `path`, whole, as ids of `tokenizer`, which belongs to the model
  // of digest `model`; without BOS. Errors as above.
  absl::StatusOr<std::span<const int32_t>> TextIds(const RunTrial& request, const std::string& path,
                                                   const Tokenizer& tokenizer,
                                                   absl::string_view model);

  // The ids of the token file (token_file.h) that the spec calls `path`, all inside `vocabulary`.
  // Errors as above.
  absl::StatusOr<std::span<const int32_t>> TokenIds(const RunTrial& request,
                                                    const std::string& path, int32_t vocabulary);

 private:
  // Local path and digest of a file of the request; the digest is empty when the spec has none.
  struct Place {
    std::string path;
    Digest digest;
  };
  static absl::StatusOr<Place> FindPlace(const RunTrial& request, const std::string& path);
  static absl::StatusOr<std::string> ReadFile(const Place& place, const std::string& name,
                                              int64_t most_bytes);

  std::map<std::string, Trace> traces_;                // by digest and place
  std::map<std::string, std::vector<int32_t>> texts_;  // by digest, place and model or vocabulary
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_INPUT_CACHE_H_
