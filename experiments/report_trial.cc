// One trial, in the two forms of vLLM's benchmarks that people and their scripts know.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "experiments/report.h"

namespace kvsweep {
namespace {

constexpr size_t kBlockWidth = 50;

std::string Centred(absl::string_view title, char fill) {
  const size_t width = title.size();
  const size_t padding = width < kBlockWidth ? kBlockWidth - width : 0;
  return absl::StrCat(std::string(padding / 2, fill), title,
                      std::string(padding - padding / 2, fill), "\n");
}

// A line of the block: its label as vLLM prints it, and our name. An empty name is a heading.
struct BlockLine {
  absl::string_view label;
  absl::string_view metric;
};

constexpr BlockLine kBlock[] = {
    {"Successful requests:", "completed"},
    {"Failed requests:", "failed"},
    {"Benchmark duration (s):", "duration_s"},
    {"Total input tokens:", "total_input_tokens"},
    {"Total generated tokens:", "total_output_tokens"},
    {"Request throughput (req/s):", "request_throughput"},
    {"Request goodput (req/s):", "request_goodput"},
    {"Output token throughput (tok/s):", "output_throughput"},
    {"Peak output token throughput (tok/s):", "max_output_tokens_per_s"},
    {"Peak concurrent requests:", "max_concurrent_requests"},
    {"Total token throughput (tok/s):", "total_token_throughput"},
    {"Time to First Token", ""},
    {"Mean TTFT (ms):", "mean_ttft_ms"},
    {"Median TTFT (ms):", "median_ttft_ms"},
    {"P99 TTFT (ms):", "p99_ttft_ms"},
    {"Time per Output Token (excl. 1st token)", ""},
    {"Mean TPOT (ms):", "mean_tpot_ms"},
    {"Median TPOT (ms):", "median_tpot_ms"},
    {"P99 TPOT (ms):", "p99_tpot_ms"},
    {"Inter-token Latency", ""},
    {"Mean ITL (ms):", "mean_itl_ms"},
    {"Median ITL (ms):", "median_itl_ms"},
    {"P99 ITL (ms):", "p99_itl_ms"},
    {"End-to-end Latency", ""},
    {"Mean E2EL (ms):", "mean_e2el_ms"},
    {"Median E2EL (ms):", "median_e2el_ms"},
    {"P99 E2EL (ms):", "p99_e2el_ms"},
    {"KV cache", ""},
    {"Peak device bytes:", "kv_device_bytes_peak"},
    {"Peak host bytes:", "kv_host_bytes_peak"},
    {"Attended fraction:", "attended_fraction"},
    {"Preemptions:", "preemptions"},
    {"Tokens evicted:", "kv_tokens_evicted"},
    {"Entries fetched:", "kv_entries_fetched"},
};

std::string BlockValue(const SummaryMetric& metric) {
  if (!metric.value) return absl::StrCat("n/a (", metric.reason, ")");
  const bool whole = *metric.value == std::floor(*metric.value) && std::abs(*metric.value) < 1e15;
  const MetricInfo* info = FindMetric(metric.name);
  const std::string unit = info == nullptr ? "" : info->unit;
  const bool counts = unit.empty() || unit == "tokens" || unit == "bytes" || unit == "entries";
  return whole && counts ? absl::StrCat(static_cast<int64_t>(*metric.value))
                         : absl::StrFormat(unit.empty() ? "%.4f" : "%.2f", *metric.value);
}

const SummaryMetric* Find(const std::vector<SummaryMetric>& metrics, absl::string_view name) {
  const auto found = std::ranges::find(metrics, name, &SummaryMetric::name);
  return found == metrics.end() ? nullptr : &*found;
}

std::optional<double> ValueOf(const std::vector<SummaryMetric>& metrics, absl::string_view name) {
  const SummaryMetric* const metric = Find(metrics, name);
  return metric == nullptr ? std::nullopt : metric->value;
}

constexpr int kBarWidth = 40;

// The parts of a decode step, each with its bar; a bar of full width is the whole.
std::string FormatStack(const std::vector<SummaryMetric>& metrics) {
  std::vector<std::pair<absl::string_view, double>> parts;
  double total_ms = 0;
  for (const absl::string_view part : recorded::kStackParts) {
    const auto value_ms = ValueOf(metrics, absl::StrCat(recorded::kStackPrefix, part, "_ms"));
    if (!value_ms) continue;
    parts.emplace_back(part, *value_ms);
    total_ms += *value_ms;
  }
  if (total_ms <= 0) return "";
  std::string text = absl::StrFormat("where a decode step's time goes (%.4g ms)\n", total_ms);
  for (const auto& [part, value_ms] : parts) {
    const double share = value_ms / total_ms;
    absl::StrAppendFormat(&text, "  %-12s %10.4g ms %5.1f %%  %s\n", part, value_ms, 100 * share,
                          std::string(static_cast<size_t>(std::lround(share * kBarWidth)), '#'));
  }
  return text;
}

}  // namespace

std::string FormatTelemetry(const std::vector<SummaryMetric>& metrics) {
  std::string text;
  if (const auto power_w = ValueOf(metrics, "mean_power_w")) {
    absl::StrAppendFormat(&text, "device\n  power        %10.4g W in the mean\n", *power_w);
    if (const auto clock_mhz = ValueOf(metrics, "mean_sm_clock_mhz")) {
      absl::StrAppendFormat(&text, "  SM clock     %10.4g MHz in the mean\n", *clock_mhz);
    }
    if (const auto celsius = ValueOf(metrics, "max_temperature_c")) {
      absl::StrAppendFormat(&text, "  temperature  %10.4g C at most\n", *celsius);
    }
    const SummaryMetric* const energy = Find(metrics, "energy_j_per_token");
    if (energy != nullptr && energy->value) {
      absl::StrAppendFormat(&text, "  energy       %10.4g J for each generated token\n",
                            *energy->value);
    } else if (energy != nullptr) {
      absl::StrAppend(&text, "  energy       no figure for a token: ", energy->reason, "\n");
    }
  }
  const auto measured_ms = ValueOf(metrics, "decode_step_ms");
  const auto predicted_ms = ValueOf(metrics, "predicted_decode_step_ms");
  if (measured_ms && predicted_ms && *predicted_ms > 0) {
    absl::StrAppendFormat(&text,
                          "a decode step took %.4g ms, %.2f times the %.4g ms that the machine's "
                          "limits allow\n",
                          *measured_ms, *measured_ms / *predicted_ms, *predicted_ms);
  }
  return text + FormatStack(metrics);
}

std::string FormatTrialBlock(absl::string_view title, const std::vector<SummaryMetric>& metrics) {
  std::string text = Centred(absl::StrCat(" ", title, " "), '=');
  for (const BlockLine& line : kBlock) {
    if (line.metric.empty()) {
      absl::StrAppend(&text, Centred(line.label, '-'));
      continue;
    }
    const auto found =
        std::find_if(metrics.begin(), metrics.end(),
                     [&](const SummaryMetric& metric) { return metric.name == line.metric; });
    if (found == metrics.end()) continue;
    absl::StrAppendFormat(&text, "%-40s %s\n", line.label, BlockValue(*found));
  }
  return text + std::string(kBlockWidth, '=') + "\n";
}

std::string FormatTrialJson(const std::vector<SummaryMetric>& metrics) {
  nlohmann::ordered_json values;
  nlohmann::ordered_json reasons = nlohmann::ordered_json::object();
  for (const SummaryMetric& metric : metrics) {
    values[metric.name] = nullptr;
    if (metric.value) {
      values[metric.name] = *metric.value;
    } else {
      reasons[metric.name] = metric.reason;
    }
  }
  values["reasons"] = std::move(reasons);
  return values.dump(2) + "\n";
}

}  // namespace kvsweep
