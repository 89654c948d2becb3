// Who arrives when, with how many tokens of what: a pure function of the load's spec, the three
// seeds and the files' contents. Arms never enter it, so all arms of a round meet the same
// requests.
//
// Each seed rules one thing: `schedule` the arrival times, `order` which trace row is which
// request, `content` the tokens. A request's draw depends on its index alone, so that a longer run
// begins with the same requests.
#ifndef KVSWEEP_EXPERIMENTS_WORKLOAD_H_
#define KVSWEEP_EXPERIMENTS_WORKLOAD_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

// Arrival of a closed loop's request that comes when another one finishes.
inline constexpr int64_t kArrivesOnFinish = -1;

struct WorkloadRequest {
  int64_t arrival_ns = 0;      // since time 0 of the measurement, or kArrivesOnFinish
  uint32_t prompt_tokens = 0;  // >= 1, BOS included
  uint32_t output_tokens = 0;  // >= 1; the replayed length, which no arm may know
  uint32_t max_tokens = 0;     // what an arm may know: max_total - prompt_tokens >= output_tokens
  uint64_t text_offset = 0;    // first token of the text after BOS; unused without a text
};

// A row of a trace: what is used of it.
struct TraceRow {
  int64_t time_ns = 0;  // since the first row
  uint32_t context_tokens = 0;
  uint32_t generated_tokens = 0;
};

// Reads an Azure LLM trace in its native form: header TIMESTAMP,ContextTokens,GeneratedTokens, LF
// or CRLF, up to 9 decimals of a second, with or without a newline at the end. InvalidArgument as
// "source:line: …".
absl::StatusOr<std::vector<TraceRow>> ParseAzureTrace(absl::string_view text,
                                                      absl::string_view source);

// What the model and the files contribute.
struct WorkloadInputs {
  uint32_t context_tokens = 0;  // longest sequence that the model takes
  uint32_t vocabulary = 0;
  std::optional<int32_t> bos_id;  // put before each prompt
  std::span<const int32_t>
      text_ids;  // the tokenised text without BOS; empty: ids are drawn uniformly
  std::span<const TraceRow> trace;  // the rows of lengths.trace; empty when lengths are fixed
};

class Workload {
 public:
  // `load` must have passed CheckTrial, with defaults filled in. The spans of `inputs` must outlive
  // the workload. InvalidArgument when max_total exceeds the model's context or the text is shorter
  // than a prompt.
  static absl::StatusOr<Workload> Build(const Load& load, const Seeds& seeds,
                                        const WorkloadInputs& inputs);

  // `requests` more requests of the same kind, all at time 0, from other seeds: the warm-up phase.
  static absl::StatusOr<Workload> BuildWarmup(const Load& load, const Seeds& seeds,
                                              const WorkloadInputs& inputs, uint32_t requests);

  // In order of arrival.
  const std::vector<WorkloadRequest>& requests() const { return requests_; }

  // Requests in flight of a closed loop; 0 for the others.
  uint32_t concurrency() const { return concurrency_; }

  // Largest prompt_tokens + max_tokens of any request.
  uint32_t max_total() const { return max_total_; }

  // Writes the prompt of request `index`. REQUIRES: prompt.size() == prompt_tokens.
  void CopyPrompt(size_t index, std::span<int32_t> prompt) const;

 private:
  std::vector<WorkloadRequest> requests_;
  WorkloadInputs inputs_;
  uint64_t content_seed_ = 0;
  uint32_t concurrency_ = 0;
  uint32_t max_total_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_WORKLOAD_H_
