// Every number that is derived from a trial's records, declared once: name, unit, direction,
// formula, meaning and the function that computes it. The store keeps what Summarise returns, its
// wide views are generated from Metrics(), reports print from it, and docs/METRICS.md is checked
// against it.
//
// Names are those of vLLM's benchmarks where it has one, so that existing plot scripts load. One
// thing differs: our latencies start at the *scheduled* arrival; `ttft_service` starts at the
// actual issue, as vLLM's ttft.
//
// A number that the records cannot carry is null with a reason, never a guess: a percentile q needs
// at least 1 / (1 - q) values (p99: 100). That makes it a value of the sample; the *claim* that 99
// % of requests stay below a limit, at 99 % confidence, needs 459 requests without an overrun.
#ifndef KVSWEEP_EXPERIMENTS_METRICS_H_
#define KVSWEEP_EXPERIMENTS_METRICS_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

enum class Direction { kLowerIsBetter, kHigherIsBetter, kNeutral };

// Names of the counters and samples that metrics are computed from; runner and strategies record
// them. Counters of the whole trial have layer -1.
namespace recorded {
inline constexpr char kKvDeviceBytesPeak[] = "kv_device_bytes_peak";  // counter: of the arm's arena
inline constexpr char kKvHostBytesPeak[] = "kv_host_bytes_peak";      // counter
inline constexpr char kKvBytesHostToDevice[] = "kv_bytes_h2d";        // counter
inline constexpr char kKvBytesDeviceToHost[] = "kv_bytes_d2h";        // counter
inline constexpr char kTransferNs[] = "transfer_ns";  // counter: time the host link was busy for KV
inline constexpr char kTransferExposedNs[] =
    "transfer_exposed_ns";  // counter: of it, time that compute waited
inline constexpr char kAttendedFraction[] = "attended_fraction";  // counter: all layers, and each
inline constexpr char kAttendedBeyondFull[] =
    "attended_fraction_beyond_full";  // counter: mean over the layers that are not kept in full
inline constexpr char kMemoryShortSteps[] =
    "memory_short_steps";  // counter: a request left, or could not enter, for lack of KV memory
inline constexpr char kSteps[] = "steps";  // counter: engine steps
inline constexpr char kKvDeviceBytes[] =
    "kv_device_bytes";                                   // sample: reserved for KV on the device
inline constexpr char kKvLiveBytes[] = "kv_live_bytes";  // sample: of it, holding live entries
inline constexpr char kKvHostBytes[] = "kv_host_bytes";  // sample
inline constexpr char kRunning[] = "running_requests";   // sample
inline constexpr char kWaiting[] = "waiting_requests";   // sample
inline constexpr char kStepNs[] = "step_ns";             // sample: length of a step
// Counters of what the device did during the measurement.
inline constexpr char kEnergyJ[] = "energy_j";
inline constexpr char kPowerMean[] = "power_w_mean";
inline constexpr char kSmClockMean[] = "sm_clock_mhz_mean";
inline constexpr char kTemperatureMax[] = "temperature_c_max";
// Counters, 1 where the energy is no figure to compare by: it could not be read, its counter moved
// too rarely, others used the device, or heat or power held its clocks down.
inline constexpr char kEnergyNotRead[] = "energy_not_read";
inline constexpr char kEnergyTooShort[] = "energy_too_short";
inline constexpr char kEnergyShared[] = "energy_shared";
inline constexpr char kEnergyThrottled[] = "energy_throttled";
// Counters about steps that only decode: mean length on the device's clock, and the least that the
// preflight's limits allow for what they read, fetched and computed.
inline constexpr char kDecodeStepNs[] = "decode_step_ns";
inline constexpr char kPredictedDecodeStepNs[] = "predicted_decode_step_ns";
// Counters: parts of a profiled decode step, by name of the part: "stack_attention_ns".
inline constexpr char kStackPrefix[] = "stack_";
inline constexpr const char* kStackParts[] = {"projections", "attention", "selection",
                                              "speculation", "transfer",  "mlp",
                                              "sampling",    "other",     "idle",
                                              "host_gap"};
}  // namespace recorded

// The records of one execution of a load trial. Borrowed; cheap to copy.
struct TrialRecords {
  std::span<const RequestRow> requests;
  std::span<const Counter> counters;
  std::span<const Sample> samples;
  const Slo* slo = nullptr;  // null or empty: no objectives
};

// One derived number.
struct SummaryMetric {
  std::string name;
  std::optional<double> value;
  std::string reason;  // why there is no value; empty when there is one

  bool operator==(const SummaryMetric&) const = default;
};

// Declaration of a metric.
struct MetricInfo {
  std::string name;  // key in JSON, column in the store: "p99_ttft_ms"
  std::string unit;  // "ms", "req/s", "bytes", "" for shares and counts
  Direction direction = Direction::kNeutral;
  std::string formula;  // over the fields of RequestRow and the recorded names
  std::string meaning;  // one sentence
};

// The table, in the order of presentation. Thread-safe.
const std::vector<MetricInfo>& Metrics();

// Of these, what the device did meanwhile and where a step's time goes, by name.
const std::vector<std::string>& TelemetryMetrics();

// The declaration of `name`; null if there is none. Quality metrics included.
const MetricInfo* FindMetric(absl::string_view name);

// All of Metrics(), in that order, for one trial.
std::vector<SummaryMetric> Summarise(const TrialRecords& records);

// What quality trials are summed up to: ppl, reference_ppl, kl, top1_agreement, and the same over
// the positions after something was dropped (`dropped_…`); quality_attended_fraction; recall of
// pass keys.
const std::vector<MetricInfo>& QualityMetrics();
std::vector<SummaryMetric> SummariseQuality(std::span<const QualityRow> windows,
                                            std::span<const PasskeyRow> passkeys);

// Whether the strategy did what it is named for, judged by the rows that it marked.
enum class Engagement { kNoRule, kEngaged, kNotEngaged };

// kNoRule for a strategy that the schema declares a baseline. Otherwise kEngaged if at least half of the requests for which the rule applies
// were engaged, and there was at least one.
Engagement JudgeEngagement(absl::string_view strategy, std::span<const RequestRow> requests);

// "-", "engaged" or "not engaged".
absl::string_view EngagementName(Engagement engagement);

// Lower-case name of an outcome: "ok", "oom", …
std::string OutcomeName(Outcome outcome);

// The tables of docs/METRICS.md.
std::string MetricsMarkdown();

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_METRICS_H_
