// Request traces: who asked when, for how much, in the native forms of their publishers. The form
// is told by the first line.
//
//   Azure LLM inference   TIMESTAMP,ContextTokens,GeneratedTokens
//   ShareGPT lengths      num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio; no times
//   Mooncake              a JSON object a line: timestamp (ms), input_length, output_length,
//                         hash_ids (one for each 512 tokens of the prompt; equal ids, equal tokens)
#ifndef KVSWEEP_EXPERIMENTS_TRACE_H_
#define KVSWEEP_EXPERIMENTS_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvsweep {

// Tokens of the prompt that one hash id of a Mooncake row stands for; the last one's may be fewer.
inline constexpr uint32_t kTraceBlockTokens = 512;

// A row of a trace: what is used of it.
struct TraceRow {
  int64_t time_ns = 0;  // since the first row; 0 in a trace without times
  uint32_t context_tokens = 0;
  uint32_t generated_tokens = 0;
  uint32_t blocks = 0;       // hash ids of the row
  uint64_t first_block = 0;  // where they begin in Trace::block_ids
};

struct Trace {
  std::vector<TraceRow> rows;       // never empty once parsed; times do not go back
  std::vector<uint64_t> block_ids;  // of all rows
  bool has_times = false;

  std::span<const uint64_t> BlocksOf(const TraceRow& row) const {
    return std::span(block_ids).subspan(row.first_block, row.blocks);
  }
};

// Reads a trace: LF or CRLF, with or without a newline at the end. InvalidArgument as
// "source:line: …"; ResourceExhausted past the limits of base/limits.h.
absl::StatusOr<Trace> ParseTrace(absl::string_view text, absl::string_view source);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_TRACE_H_
