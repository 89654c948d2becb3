// Who arrives when, with how many tokens of what: a pure function of the load's spec, the three
// seeds and the files' contents. Arms never enter it, so all arms of a round meet the same
// requests.
//
// Each seed rules one thing: `schedule` the arrival and think times, `order` the lengths (which
// trace row is which request, or the draw from a distribution), `content` the tokens. A request's
// draw depends on its index alone, so that a longer run begins with the same requests.
//
// Tokens. A prompt is BOS, where the model has one, and a piece of the text (without a text:
// uniform ids). A prompt of a trace with hash ids is made of blocks: block i is
// round(512 * scale) tokens long, at least 1, and a pure function of its hash id and the content
// seed, so that equal ids give equal tokens; BOS takes the place of the first token of the first
// block. What rounding leaves behind the last block is the request's own. The clip to max_total
// cuts at the end.
//
// Sessions. Request k + 1 of a session carries the conversation so far (the prompt of k and the
// output that the engine really gave), and turn_input tokens more. Lengths are known beforehand,
// since outputs have their replayed length; contents may differ from arm to arm, as the outputs do.
// A turn whose prompt would leave no room for an output within max_total is not made, nor those
// after it.
#ifndef KVSWEEP_EXPERIMENTS_WORKLOAD_H_
#define KVSWEEP_EXPERIMENTS_WORKLOAD_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "experiments/arrivals.h"
#include "experiments/trace.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

struct WorkloadRequest {
  Arrival arrival;             // of a session's first turn
  int64_t think_ns = 0;        // later turns: time from the end of the turn before to the arrival
  uint32_t session = 0;        // counts the arrivals
  uint32_t turn = 0;           // 0 for the first; a session's turns stand one behind the other
  bool last_turn = true;       // nothing follows it
  uint32_t prompt_tokens = 0;  // >= 1, BOS included
  uint32_t history_tokens =
      0;  // of these, the conversation so far: the turn before, output included
  uint32_t output_tokens = 0;  // >= 1; the replayed length, which no arm may know
  uint32_t max_tokens = 0;     // what an arm may know: max_total - prompt_tokens >= output_tokens
  uint64_t text_offset = 0;    // where its own tokens begin in the text; unused without a text
  std::span<const uint64_t> blocks;  // hash ids of the prompt; empty: none
};

// What the model and the files contribute.
struct WorkloadInputs {
  uint32_t context_tokens = 0;  // longest sequence that the model takes
  uint32_t vocabulary = 0;
  std::optional<int32_t> bos_id;  // put before each prompt
  std::span<const int32_t>
      text_ids;                  // the tokenised text without BOS; empty: ids are drawn uniformly
  const Trace* trace = nullptr;  // lengths.trace; null when there is none
};

// Tokens of the longest request that a trial names by number; those of a trace are clipped to the
// model. A shape's positions are extended to as many.
uint32_t NamedContext(const TrialSpec& trial);

class Workload {
 public:
  // `load` must have passed CheckTrial, with defaults filled in. What `inputs` points to must
  // outlive the workload. InvalidArgument when max_total exceeds the model's context, the text is
  // shorter than a prompt, or a replay has too few rows.
  static absl::StatusOr<Workload> Build(const Load& load, const Seeds& seeds,
                                        const WorkloadInputs& inputs);

  // `requests` more requests of the same kind, all at time 0 and without further turns, from other
  // seeds: the warm-up phase.
  static absl::StatusOr<Workload> BuildWarmup(const Load& load, const Seeds& seeds,
                                              const WorkloadInputs& inputs, uint32_t requests);

  // First turns in order of arrival, each followed by the further turns of its session.
  const std::vector<WorkloadRequest>& requests() const { return requests_; }

  // Largest prompt_tokens + max_tokens of any request.
  uint32_t max_total() const { return max_total_; }

  // Writes the prompt of request `index` behind its history. REQUIRES: prompt.size() ==
  // prompt_tokens - history_tokens.
  void CopyPrompt(size_t index, std::span<int32_t> prompt) const;

 private:
  class LengthSource;
  void AddSession(const Load& load, const LengthSource& lengths, const Seeds& seeds,
                  const Arrival& arrival);
  absl::Status PlaceTexts();
  void CopyBlocks(const WorkloadRequest& request, std::span<int32_t> prompt) const;
  void CopyOwn(size_t index, std::span<int32_t> tokens) const;

  std::vector<WorkloadRequest> requests_;
  WorkloadInputs inputs_;
  uint64_t content_seed_ = 0;
  uint32_t sessions_ = 0;
  uint32_t block_tokens_ = 0;
  uint32_t max_total_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_WORKLOAD_H_
