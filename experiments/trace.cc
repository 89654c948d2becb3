#include "experiments/trace.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/civil_time.h"
#include "base/clock.h"
#include "base/limits.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr absl::string_view kAzureHeader = "TIMESTAMP,ContextTokens,GeneratedTokens";
constexpr absl::string_view kShareGptHeader =
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio";

constexpr int64_t kNsPerMillisecond = kNsPerSecond / 1000;
constexpr int64_t kLongestTraceMs = 100LL * 366 * 24 * 3600 * 1000;  // a century

// A line of the file, and all that an error says about it.
struct Line {
  absl::string_view source;
  size_t number = 0;
  absl::string_view text;

  absl::Status Error(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(source, ":", number, ": \"", text.substr(0, 60),
                                                   text.size() > 60 ? "…" : "", "\": ", what));
  }
};

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

absl::Status CheckTokens(const Line& line, uint64_t context, uint64_t generated) {
  constexpr uint64_t kMost = 1000 * limits::kContextTokens;
  if (context <= kMost && generated <= kMost && context + generated <= kMost) {
    return absl::OkStatus();
  }
  return line.Error("more tokens than any model takes");
}

// ------------------------------------------------------------------------------------------ Azure

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

absl::StatusOr<TraceRow> ParseAzureRow(const Line& line, Trace*) {
  absl::string_view rest = line.text;
  const std::optional<int64_t> time_ns = ParseTimestamp(TakeUntil(',', &rest));
  TraceRow row;
  if (!time_ns) return line.Error("no time; write as 2023-11-16 18:15:46.6805900");
  row.time_ns = *time_ns;
  if (!ParseDigits(TakeUntil(',', &rest), &row.context_tokens) ||
      !ParseDigits(rest, &row.generated_tokens)) {
    return line.Error("no token counts; write TIMESTAMP,ContextTokens,GeneratedTokens");
  }
  RETURN_IF_ERROR(CheckTokens(line, row.context_tokens, row.generated_tokens));
  return row;
}

// --------------------------------------------------------------------------------------- ShareGPT

// The ratio of the last column follows from the others and is not read.
absl::StatusOr<TraceRow> ParseShareGptRow(const Line& line, Trace*) {
  absl::string_view rest = line.text;
  TraceRow row;
  uint64_t total = 0;
  if (!ParseDigits(TakeUntil(',', &rest), &row.context_tokens) ||
      !ParseDigits(TakeUntil(',', &rest), &row.generated_tokens) ||
      !ParseDigits(TakeUntil(',', &rest), &total)) {
    return line.Error(absl::StrCat("no token counts; write ", kShareGptHeader));
  }
  RETURN_IF_ERROR(CheckTokens(line, row.context_tokens, row.generated_tokens));
  if (uint64_t{row.context_tokens} + row.generated_tokens != total) {
    return line.Error("num_total_tokens is not the sum of the first two columns");
  }
  return row;
}

// --------------------------------------------------------------------------------------- Mooncake

using Json = nlohmann::json;

// A whole number of a row; nothing if it is absent, negative or no number.
std::optional<uint64_t> WholeNumber(const Json& row, const char* key) {
  const auto found = row.find(key);
  if (found == row.end() || !found->is_number_unsigned()) return std::nullopt;
  return found->get<uint64_t>();
}

absl::StatusOr<TraceRow> ParseMooncakeRow(const Line& line, Trace* trace) {
  constexpr char kForm[] =
      "write {\"timestamp\": ms, \"input_length\": n, \"output_length\": n, \"hash_ids\": [id, …]}";
  const Json json = Json::parse(line.text.begin(), line.text.end(), nullptr, false);
  if (!json.is_object()) return line.Error(absl::StrCat("not a JSON object; ", kForm));
  const std::optional<uint64_t> time_ms = WholeNumber(json, "timestamp");
  const std::optional<uint64_t> input = WholeNumber(json, "input_length");
  const std::optional<uint64_t> output = WholeNumber(json, "output_length");
  const auto ids = json.find("hash_ids");
  if (!time_ms || !input || !output || ids == json.end() || !ids->is_array()) {
    return line.Error(absl::StrCat("a field is missing or no whole number; ", kForm));
  }
  if (*time_ms > kLongestTraceMs) return line.Error("a timestamp of more than a century");
  RETURN_IF_ERROR(CheckTokens(line, *input, *output));
  const uint64_t blocks = (*input + kTraceBlockTokens - 1) / kTraceBlockTokens;
  if (ids->size() != blocks) {
    return line.Error(absl::StrCat(ids->size(), " hash_ids for ", *input, " tokens; ", blocks,
                                   " blocks of ", kTraceBlockTokens, " need ", blocks));
  }
  TraceRow row = {.time_ns = static_cast<int64_t>(*time_ms) * kNsPerMillisecond,
                  .context_tokens = static_cast<uint32_t>(*input),
                  .generated_tokens = static_cast<uint32_t>(*output),
                  .blocks = static_cast<uint32_t>(blocks),
                  .first_block = trace->block_ids.size()};
  for (const Json& id : *ids) {
    if (!id.is_number_unsigned()) return line.Error("a hash id that is no whole number");
    trace->block_ids.push_back(id.get<uint64_t>());
  }
  return row;
}

// ------------------------------------------------------------------------------------------- all

struct Form {
  absl::string_view header;  // empty: the first line is a row
  bool has_times;
  absl::StatusOr<TraceRow> (*parse)(const Line& line, Trace* trace);
};

constexpr Form kAzure = {kAzureHeader, true, ParseAzureRow};
constexpr Form kShareGpt = {kShareGptHeader, false, ParseShareGptRow};
constexpr Form kMooncake = {"", true, ParseMooncakeRow};

absl::StatusOr<const Form*> FormOf(const Line& first) {
  if (first.text == kAzureHeader) return &kAzure;
  if (first.text == kShareGptHeader) return &kShareGpt;
  if (absl::StartsWith(first.text, "{")) return &kMooncake;
  return first.Error(absl::StrCat("expected the header ", kAzureHeader, " (Azure), ",
                                  kShareGptHeader, " (ShareGPT), or a JSON object (Mooncake)"));
}

}  // namespace

absl::StatusOr<Trace> ParseTrace(absl::string_view text, absl::string_view source) {
  if (text.size() > static_cast<size_t>(limits::kTraceFileBytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(source, " has ", text.size(), " bytes, more than ", limits::kTraceFileBytes));
  }
  Trace trace;
  const Form* form = nullptr;
  for (Line line{.source = source, .number = 1, .text = {}}; !text.empty(); ++line.number) {
    line.text = TakeUntil('\n', &text);
    absl::ConsumeSuffix(&line.text, "\r");
    if (line.text.size() > static_cast<size_t>(limits::kTraceLineBytes)) {
      return line.Error(absl::StrCat("longer than ", limits::kTraceLineBytes, " bytes"));
    }
    if (form == nullptr) {
      ASSIGN_OR_RETURN(form, FormOf(line));
      trace.has_times = form->has_times;
      if (!form->header.empty()) continue;
    }
    if (line.text.empty() && text.empty()) break;
    if (trace.rows.size() >= static_cast<size_t>(limits::kTraceRows)) {
      return absl::ResourceExhaustedError(
          absl::StrCat(source, " has more than ", limits::kTraceRows, " rows"));
    }
    ASSIGN_OR_RETURN(const TraceRow row, form->parse(line, &trace));
    if (!trace.rows.empty() && row.time_ns < trace.rows.back().time_ns) {
      return line.Error("its time lies before that of the line above; sort the trace by time");
    }
    trace.rows.push_back(row);
  }
  if (trace.rows.empty()) return absl::InvalidArgumentError(absl::StrCat(source, " has no rows"));
  const int64_t first_ns = trace.rows.front().time_ns;
  for (TraceRow& row : trace.rows) row.time_ns -= first_ns;
  return trace;
}

}  // namespace kvsweep
