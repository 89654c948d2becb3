#include "experiments/workload.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/civil_time.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr absl::string_view kAzureHeader = "TIMESTAMP,ContextTokens,GeneratedTokens";

// Set apart from the seeds of the measured requests.
constexpr uint64_t kWarmupSalt = 0x7761726d;  // "warm"

absl::Status LineError(absl::string_view source, size_t line, absl::string_view text,
                       absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(source, ":", line, ": \"", text.substr(0, 60),
                                                 text.size() > 60 ? "…" : "", "\": ", what));
}

// The text up to `separator`, which is taken off `rest` with it.
absl::string_view TakeUntil(char separator, absl::string_view* rest) {
  const size_t end = std::min(rest->find(separator), rest->size());
  const absl::string_view taken = rest->substr(0, end);
  rest->remove_prefix(std::min(end + 1, rest->size()));
  return taken;
}

template <typename T>
bool ParseDigits(absl::string_view text, T* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty() &&
         absl::ascii_isdigit(text[0]);
}

// "2023-11-16 18:15:46.6805900" in nanoseconds since 1970.
std::optional<int64_t> ParseTimestamp(absl::string_view text) {
  int32_t parts[6];
  constexpr char kSeparators[] = "-- ::.";
  for (int i = 0; i < 6; ++i) {
    const bool fraction_follows = i == 5;
    const absl::string_view part = TakeUntil(kSeparators[i], &text);
    if (part.size() > 4 || !ParseDigits(part, &parts[i])) return std::nullopt;
    if (!fraction_follows && text.empty()) return std::nullopt;
  }
  if (text.size() > 9) return std::nullopt;
  int64_t nanoseconds = 0;
  if (!text.empty() && !ParseDigits(text, &nanoseconds)) return std::nullopt;
  for (size_t digits = text.size(); digits < 9; ++digits) nanoseconds *= 10;
  const absl::CivilSecond second(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]);
  // A civil time that was moved by normalising was none.
  if (second.month() != parts[1] || second.day() != parts[2] || second.hour() != parts[3] ||
      second.minute() != parts[4] || second.second() != parts[5] || parts[0] < 1970 ||
      parts[0] > 2200) {
    return std::nullopt;
  }
  return (second - absl::CivilSecond(1970, 1, 1)) * kNsPerSecond + nanoseconds;
}

absl::StatusOr<TraceRow> ParseRow(absl::string_view line, absl::string_view source, size_t number) {
  absl::string_view rest = line;
  const std::optional<int64_t> time_ns = ParseTimestamp(TakeUntil(',', &rest));
  TraceRow row;
  if (!time_ns) {
    return LineError(source, number, line, "no time; write as 2023-11-16 18:15:46.6805900");
  }
  row.time_ns = *time_ns;
  if (!ParseDigits(TakeUntil(',', &rest), &row.context_tokens) ||
      !ParseDigits(rest, &row.generated_tokens)) {
    return LineError(source, number, line,
                     "no token counts; write TIMESTAMP,ContextTokens,GeneratedTokens");
  }
  if (int64_t{row.context_tokens} + row.generated_tokens > 1000 * limits::kContextTokens) {
    return LineError(source, number, line, "more tokens than any model takes");
  }
  return row;
}

// A length of the trace, scaled.
uint32_t ScaleLength(uint32_t tokens, double scale) {
  const double scaled = std::round(tokens * scale);
  return static_cast<uint32_t>(
      std::clamp(scaled, 1.0, static_cast<double>(limits::kContextTokens)));
}

// Prompt and output lengths by the rule of the schema: scale, max_output, then max_total, where the
// prompt gives way first, but only so far that one output token fits.
void ClipLengths(uint32_t max_total, WorkloadRequest* request) {
  request->prompt_tokens = std::min(request->prompt_tokens, max_total - 1);
  request->output_tokens = std::min(request->output_tokens, max_total - request->prompt_tokens);
  request->max_tokens = max_total - request->prompt_tokens;
}

// Index of the trace row of each request: a drawn order of all rows, begun again when it runs out.
std::vector<uint32_t> DrawRows(size_t rows, size_t requests, uint64_t seed) {
  std::vector<uint32_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  Random random(seed);
  random.Shuffle(std::span(order));
  std::vector<uint32_t> drawn(requests);
  for (size_t i = 0; i < requests; ++i) drawn[i] = order[i % rows];
  return drawn;
}

// Arrival times of a Poisson process, as vLLM's benchmark makes them: exponential gaps, summed,
// then rescaled so that the last request arrives at N / rate. The mean rate is then exact and the
// same for every seed.
std::vector<int64_t> PoissonArrivals(size_t requests, double rate, uint64_t seed) {
  Random random(seed);
  std::vector<double> times(requests);
  double time = 0;
  for (double& arrival : times) arrival = time += random.Exponential(1);
  const double scale = static_cast<double>(requests) / rate / time * kNsPerSecond;
  std::vector<int64_t> arrivals(requests);
  for (size_t i = 0; i < requests; ++i) arrivals[i] = std::llround(times[i] * scale);
  return arrivals;
}

std::vector<int64_t> DrawArrivals(const Arrivals& arrivals, uint64_t seed) {
  const size_t requests = arrivals.requests();
  if (arrivals.process() == Arrivals::PROCESS_POISSON && std::isfinite(arrivals.rate())) {
    return PoissonArrivals(requests, arrivals.rate(), seed);
  }
  std::vector<int64_t> times(requests, 0);
  if (arrivals.process() == Arrivals::PROCESS_CLOSED) {
    for (size_t i = arrivals.concurrency(); i < requests; ++i) times[i] = kArrivesOnFinish;
  }
  return times;
}

}  // namespace

absl::StatusOr<std::vector<TraceRow>> ParseAzureTrace(absl::string_view text,
                                                      absl::string_view source) {
  if (text.size() > static_cast<size_t>(limits::kTraceFileBytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(source, " has ", text.size(), " bytes, more than ", limits::kTraceFileBytes));
  }
  std::vector<TraceRow> rows;
  for (size_t number = 1; !text.empty(); ++number) {
    absl::string_view line = TakeUntil('\n', &text);
    absl::ConsumeSuffix(&line, "\r");
    if (number == 1) {
      if (line != kAzureHeader) {
        return LineError(source, number, line, absl::StrCat("expected the header ", kAzureHeader));
      }
      continue;
    }
    if (line.empty() && text.empty()) break;
    if (rows.size() >= static_cast<size_t>(limits::kTraceRows)) {
      return absl::ResourceExhaustedError(
          absl::StrCat(source, " has more than ", limits::kTraceRows, " rows"));
    }
    ASSIGN_OR_RETURN(const TraceRow row, ParseRow(line, source, number));
    rows.push_back(row);
  }
  if (rows.empty()) return absl::InvalidArgumentError(absl::StrCat(source, " has no rows"));
  const int64_t first_ns = rows.front().time_ns;
  for (TraceRow& row : rows) row.time_ns -= first_ns;
  return rows;
}

absl::StatusOr<Workload> Workload::Build(const Load& load, const Seeds& seeds,
                                         const WorkloadInputs& inputs) {
  const Lengths& lengths = load.lengths();
  const uint32_t max_total = lengths.has_max_total() ? lengths.max_total() : inputs.context_tokens;
  if (max_total > inputs.context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("load.lengths.max_total: ", max_total,
                                                   " exceeds the model's context of ",
                                                   inputs.context_tokens, " tokens; lower it"));
  }
  if (lengths.has_trace() && inputs.trace.empty()) {
    return absl::InvalidArgumentError("load.lengths.trace has no rows");
  }
  if (max_total < 2 || inputs.vocabulary == 0) {
    return absl::InvalidArgumentError("the model has no context or no vocabulary");
  }

  Workload workload;
  workload.inputs_ = inputs;
  workload.content_seed_ = seeds.content();
  const std::vector<int64_t> arrivals = DrawArrivals(load.arrivals(), seeds.schedule());
  std::vector<uint32_t> rows;
  if (lengths.has_trace()) rows = DrawRows(inputs.trace.size(), arrivals.size(), seeds.order());
  Random content(seeds.content());
  const uint64_t text_tokens = inputs.text_ids.size();
  for (size_t i = 0; i < arrivals.size(); ++i) {
    WorkloadRequest request = {.arrival_ns = arrivals[i],
                               .prompt_tokens = lengths.input(),
                               .output_tokens = lengths.output()};
    if (!rows.empty()) {
      const TraceRow& row = inputs.trace[rows[i]];
      request.prompt_tokens = ScaleLength(row.context_tokens, lengths.scale());
      request.output_tokens = ScaleLength(row.generated_tokens, lengths.scale());
    }
    if (lengths.has_max_output()) {
      request.output_tokens = std::min(request.output_tokens, lengths.max_output());
    }
    ClipLengths(max_total, &request);
    // One draw a request, whatever its length, so that lengths do not shift the draws that follow.
    const double position = content.UniformDouble();
    if (text_tokens > 0) {
      const uint64_t needed = request.prompt_tokens - (inputs.bos_id ? 1 : 0);
      if (needed > text_tokens) {
        return absl::InvalidArgumentError(absl::StrCat(
            "load.text: its ", text_tokens, " tokens are fewer than the ", needed,
            " of a prompt; name a longer text, or lower load.lengths.max_total or scale"));
      }
      const uint64_t choices = text_tokens - needed + 1;
      request.text_offset = std::min<uint64_t>(
          choices - 1, static_cast<uint64_t>(position * static_cast<double>(choices)));
    }
    workload.requests_.push_back(request);
  }
  if (load.arrivals().process() == Arrivals::PROCESS_CLOSED) {
    workload.concurrency_ = load.arrivals().concurrency();
  }
  workload.max_total_ = max_total;
  return workload;
}

absl::StatusOr<Workload> Workload::BuildWarmup(const Load& load, const Seeds& seeds,
                                               const WorkloadInputs& inputs, uint32_t requests) {
  Load warmup = load;
  warmup.mutable_arrivals()->set_process(Arrivals::PROCESS_BURST);
  warmup.mutable_arrivals()->set_requests(requests);
  Seeds other;
  other.set_content(MixSeed(seeds.content(), kWarmupSalt));
  other.set_order(MixSeed(seeds.order(), kWarmupSalt));
  other.set_schedule(MixSeed(seeds.schedule(), kWarmupSalt));
  return Build(warmup, other, inputs);
}

void Workload::CopyPrompt(size_t index, std::span<int32_t> prompt) const {
  KVSWEEP_CHECK_LT(index, requests_.size());
  const WorkloadRequest& request = requests_[index];
  KVSWEEP_CHECK_EQ(prompt.size(), request.prompt_tokens);
  if (inputs_.bos_id) {
    prompt[0] = *inputs_.bos_id;
    prompt = prompt.subspan(1);
  }
  if (!inputs_.text_ids.empty()) {
    const auto text = inputs_.text_ids.subspan(request.text_offset, prompt.size());
    std::copy(text.begin(), text.end(), prompt.begin());
    return;
  }
  Random random(MixSeed(content_seed_, index));
  for (int32_t& id : prompt) id = static_cast<int32_t>(random.Uniform(inputs_.vocabulary));
}

}  // namespace kvsweep
