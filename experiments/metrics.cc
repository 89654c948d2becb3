#include "experiments/metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/clock.h"
#include "experiments/stats.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

// A value or the reason why there is none.
struct Computed {
  std::optional<double> value;
  std::string reason;

  Computed(double number) : value(number) {}  // NOLINT: a number is a result
  static Computed None(std::string reason) {
    Computed none(0);
    none.value.reset();
    none.reason = std::move(reason);
    return none;
  }
};

// What several metrics are computed from, once for a trial.
struct Digested {
  TrialRecords records;
  std::vector<const RequestRow*> completed;
  double duration_s = 0;                    // first scheduled arrival to last completion
  std::vector<std::vector<double>> series;  // sorted values of each of kSeries, ms
  std::map<std::string, double> counters;   // of the whole trial
};

double ToMs(int64_t nanoseconds) { return static_cast<double>(nanoseconds) / kNsPerMs; }

// A share or rate; without a denominator there is none.
Computed Divide(double numerator, double denominator, absl::string_view reason) {
  if (denominator <= 0) return Computed::None(std::string(reason));
  return numerator / denominator;
}

constexpr absl::string_view kNoCompleted = "no completed request";

// --------------------------------------------------------------------------- series of latencies

// One latency for each request (or gap): what mean_, median_, std_, p90_, p95_ and p99_ are taken
// of.
struct Series {
  absl::string_view tag;
  absl::string_view formula;
  absl::string_view meaning;
  void (*collect)(const RequestRow& row, std::vector<double>* values);
};

double OutputTokens(const RequestRow& row) { return row.output_tokens(); }

constexpr Series kSeries[] = {
    {"ttft", "first_token - scheduled", "Time to first token, queueing included.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.first_token_ns() - row.scheduled_ns()));
     }},
    {"tpot", "(finished - first_token) / (output_tokens - 1)",
     "Time for each output token after the first; one value a request with two tokens or more.",
     [](const RequestRow& row, std::vector<double>* values) {
       if (row.output_tokens() < 2) return;
       values->push_back(ToMs(row.finished_ns() - row.first_token_ns()) / (OutputTokens(row) - 1));
     }},
    {"itl", "every token_gap, pooled over requests",
     "Inter-token latency; long outputs weigh more, hence not the same as tpot.",
     [](const RequestRow& row, std::vector<double>* values) {
       for (const uint64_t gap : row.token_gap_ns()) {
         values->push_back(ToMs(static_cast<int64_t>(gap)));
       }
     }},
    {"e2el", "finished - scheduled", "End-to-end latency.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.finished_ns() - row.scheduled_ns()));
     }},
    {"ttft_service", "first_token - issued",
     "Time to first token from the actual issue, as vLLM counts it: hides the client's own delay.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.first_token_ns() - row.issued_ns()));
     }},
    {"queue_time", "admitted - scheduled", "Wait until the request first enters a batch.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.admitted_ns() - row.scheduled_ns()));
     }},
    {"prefill_time", "first_token - admitted", "From the first batch to the first token.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.first_token_ns() - row.admitted_ns()));
     }},
    {"decode_time", "finished - first_token", "From the first token to the last.",
     [](const RequestRow& row, std::vector<double>* values) {
       values->push_back(ToMs(row.finished_ns() - row.first_token_ns()));
     }},
    {"ntpot", "e2el / output_tokens", "Normalised latency (vLLM paper, Orca).",
     [](const RequestRow& row, std::vector<double>* values) {
       if (row.output_tokens() == 0) return;
       values->push_back(ToMs(row.finished_ns() - row.scheduled_ns()) / OutputTokens(row));
     }},
};
constexpr size_t kSeriesCount = std::size(kSeries);

Computed MeanOf(const std::vector<double>& values) {
  if (values.empty()) return Computed::None("no values");
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Population standard deviation, as numpy's default.
Computed DeviationOf(const std::vector<double>& values) {
  if (values.size() < 2) return Computed::None("fewer than 2 values");
  const double mean = *MeanOf(values).value;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(values.size()));
}

// The rule for percentiles: at least one value must lie past them.
Computed PercentileOf(const std::vector<double>& sorted, double quantile) {
  const size_t needed = static_cast<size_t>(std::ceil(1 / (1 - quantile) - 1e-9));
  if (sorted.size() < needed) {
    return Computed::None(
        absl::StrCat(sorted.size(), " values; p", std::lround(100 * quantile), " needs ", needed));
  }
  return Percentile(sorted, quantile);
}

struct Statistic {
  absl::string_view name;
  absl::string_view meaning;
  Computed (*compute)(const std::vector<double>& sorted);
};

constexpr Statistic kStatistics[] = {
    {"mean", "Mean", MeanOf},
    {"median", "Median",
     [](const std::vector<double>& sorted) {
       return sorted.empty() ? Computed::None("no values") : Computed(Percentile(sorted, 0.5));
     }},
    {"std", "Population standard deviation", DeviationOf},
    {"p90", "90th percentile",
     [](const std::vector<double>& sorted) { return PercentileOf(sorted, 0.90); }},
    {"p95", "95th percentile",
     [](const std::vector<double>& sorted) { return PercentileOf(sorted, 0.95); }},
    {"p99", "99th percentile",
     [](const std::vector<double>& sorted) { return PercentileOf(sorted, 0.99); }},
};

// ----------------------------------------------------------------------------------- single
// numbers

template <typename Field>
double SumRows(const Digested& trial, Field field) {
  double sum = 0;
  for (const RequestRow& row : trial.records.requests) sum += static_cast<double>(field(row));
  return sum;
}

template <typename Field>
double SumCompleted(const Digested& trial, Field field) {
  double sum = 0;
  for (const RequestRow* row : trial.completed) sum += static_cast<double>(field(*row));
  return sum;
}

double CountStatus(const Digested& trial, RequestRow::Status status) {
  return SumRows(trial, [&](const RequestRow& row) { return row.status() == status; });
}

double InputTokens(const Digested& trial) {
  return SumCompleted(trial, [](const RequestRow& row) { return row.prompt_tokens(); });
}

double GeneratedTokens(const Digested& trial) { return SumCompleted(trial, OutputTokens); }

bool HasObjective(const Digested& trial) {
  const Slo* slo = trial.records.slo;
  return slo != nullptr && (slo->has_ttft() || slo->has_tpot() || slo->has_e2el());
}

// A request with one output token has no tpot and meets any limit on it, as in vLLM.
bool MeetsObjectives(const RequestRow& row, const Slo& slo) {
  const auto within = [](bool limited, uint64_t limit_ns, double value_ns) {
    return !limited || value_ns <= static_cast<double>(limit_ns);
  };
  const double first = static_cast<double>(row.first_token_ns() - row.scheduled_ns());
  const double decode = static_cast<double>(row.finished_ns() - row.first_token_ns());
  const double gaps = std::max(1.0, OutputTokens(row) - 1);
  return within(slo.has_ttft(), slo.ttft(), first) &&
         within(slo.has_tpot(), slo.tpot(), decode / gaps) &&
         within(slo.has_e2el(), slo.e2el(), first + decode);
}

double CountMeeting(const Digested& trial) {
  return SumCompleted(
      trial, [&](const RequestRow& row) { return MeetsObjectives(row, *trial.records.slo); });
}

// Largest number of requests between arrival and completion at one time; an end comes before a
// start at that time.
Computed PeakConcurrency(const Digested& trial) {
  std::vector<std::pair<int64_t, int>> events;
  for (const RequestRow* row : trial.completed) {
    events.emplace_back(row->scheduled_ns(), 1);
    events.emplace_back(row->finished_ns(), -1);
  }
  std::sort(events.begin(), events.end());
  int running = 0;
  int peak = 0;
  for (const auto& [time_ns, change] : events) peak = std::max(peak, running += change);
  return static_cast<double>(peak);
}

// Most tokens in any second, counted from time 0.
Computed PeakTokenRate(const Digested& trial) {
  std::map<int64_t, int> buckets;
  for (const RequestRow* row : trial.completed) {
    int64_t time_ns = row->first_token_ns();
    ++buckets[time_ns / kNsPerSecond];
    for (const uint64_t gap : row->token_gap_ns()) {
      // Modulo 2^64: a worker may send any numbers, which then mean nothing but must not trap.
      time_ns = static_cast<int64_t>(static_cast<uint64_t>(time_ns) + gap);
      ++buckets[time_ns / kNsPerSecond];
    }
  }
  int peak = 0;
  for (const auto& [second, tokens] : buckets) peak = std::max(peak, tokens);
  return static_cast<double>(peak);
}

Computed CounterValue(const Digested& trial, const char* name) {
  const auto found = trial.counters.find(name);
  if (found == trial.counters.end()) return Computed::None(absl::StrCat(name, " was not recorded"));
  return found->second;
}

// A counter, or else the largest sample of a series.
Computed CounterOrPeak(const Digested& trial, const char* counter, const char* series) {
  const auto found = trial.counters.find(counter);
  if (found != trial.counters.end()) return found->second;
  std::optional<double> peak;
  for (const Sample& sample : trial.records.samples) {
    if (sample.name() == series) peak = std::max(peak.value_or(sample.value()), sample.value());
  }
  if (!peak) return Computed::None(absl::StrCat(counter, " was not recorded"));
  return *peak;
}

Computed MeanSample(const Digested& trial, const char* series) {
  double sum = 0;
  double count = 0;
  for (const Sample& sample : trial.records.samples) {
    if (sample.name() != series) continue;
    sum += sample.value();
    ++count;
  }
  return Divide(sum, count, absl::StrCat(series, " was not recorded"));
}

Computed Fragmentation(const Digested& trial) {
  const Computed live = MeanSample(trial, recorded::kKvLiveBytes);
  const Computed reserved = MeanSample(trial, recorded::kKvDeviceBytes);
  if (!live.value) return live;
  if (!reserved.value) return reserved;
  if (*reserved.value <= 0) return Computed::None("nothing was reserved");
  return 1 - *live.value / *reserved.value;
}

Computed PrefetchOverlap(const Digested& trial) {
  const Computed total = CounterValue(trial, recorded::kTransferNs);
  const Computed exposed = CounterValue(trial, recorded::kTransferExposedNs);
  if (!total.value) return total;
  if (!exposed.value) return exposed;
  if (*total.value <= 0) return Computed::None("nothing was transferred");
  return 1 - *exposed.value / *total.value;
}

Computed StallPerToken(const Digested& trial) {
  const Computed exposed = CounterValue(trial, recorded::kTransferExposedNs);
  if (!exposed.value) return exposed;
  return Divide(*exposed.value / kNsPerMs, GeneratedTokens(trial), kNoCompleted);
}

Computed MeanStep(const Digested& trial) {
  const Computed mean_ns = MeanSample(trial, recorded::kStepNs);
  return mean_ns.value ? Computed(*mean_ns.value / kNsPerMs) : mean_ns;
}

Computed EngagedShare(const Digested& trial) {
  const double expected =
      SumRows(trial, [](const RequestRow& row) { return row.engagement_expected(); });
  const double engaged = SumRows(
      trial, [](const RequestRow& row) { return row.engagement_expected() && row.engaged(); });
  return Divide(engaged, expected, "no request to which the strategy's rule applies");
}

// ---------------------------------------------------------------------------------------- the
// table

struct Entry {
  MetricInfo info;
  std::function<Computed(const Digested&)> compute;
};

constexpr Direction kLower = Direction::kLowerIsBetter;
constexpr Direction kHigher = Direction::kHigherIsBetter;
constexpr Direction kNeutral = Direction::kNeutral;

// Requests and rates.
void AddRates(std::vector<Entry>* table) {
  const auto add = [&](MetricInfo info, std::function<Computed(const Digested&)> compute) {
    table->push_back({std::move(info), std::move(compute)});
  };
  add({"completed", "", kHigher, "count(status = completed)", "Requests served to their end."},
      [](const Digested& t) { return Computed(static_cast<double>(t.completed.size())); });
  add({"failed", "", kLower, "count(status != completed)", "Requests not served."},
      [](const Digested& t) {
        return Computed(static_cast<double>(t.records.requests.size() - t.completed.size()));
      });
  add({"infeasible_requests", "", kLower, "count(status = infeasible)",
       "Requests that can never fit the arm's memory."},
      [](const Digested& t) { return Computed(CountStatus(t, RequestRow::STATUS_INFEASIBLE)); });
  add({"unfinished_requests", "", kLower, "count(status = unfinished)",
       "Requests that the end of the trial cut off."},
      [](const Digested& t) { return Computed(CountStatus(t, RequestRow::STATUS_UNFINISHED)); });
  add({"duration_s", "s", kLower, "max(finished) - min(scheduled)",
       "From the first arrival to the last completion; ramp-up and drain are inside."},
      [](const Digested& t) {
        return t.completed.empty() ? Computed::None(std::string(kNoCompleted))
                                   : Computed(t.duration_s);
      });
  add({"total_input_tokens", "tokens", kNeutral, "sum(prompt_tokens)",
       "Prompt tokens of completed requests."},
      [](const Digested& t) { return Computed(InputTokens(t)); });
  add({"total_output_tokens", "tokens", kNeutral, "sum(output_tokens)",
       "Generated tokens of completed requests."},
      [](const Digested& t) { return Computed(GeneratedTokens(t)); });
  add({"request_throughput", "req/s", kHigher, "completed / duration_s",
       "Requests served each second."},
      [](const Digested& t) {
        return Divide(static_cast<double>(t.completed.size()), t.duration_s, kNoCompleted);
      });
  add({"output_throughput", "tok/s", kHigher, "total_output_tokens / duration_s",
       "Tokens generated each second."},
      [](const Digested& t) { return Divide(GeneratedTokens(t), t.duration_s, kNoCompleted); });
  add({"total_token_throughput", "tok/s", kHigher,
       "(total_input_tokens + total_output_tokens) / duration_s",
       "Tokens read and generated each second."},
      [](const Digested& t) {
        return Divide(InputTokens(t) + GeneratedTokens(t), t.duration_s, kNoCompleted);
      });
  add({"request_goodput", "req/s", kHigher, "count(completed, every objective met) / duration_s",
       "Requests each second that meet every objective of slo."},
      [](const Digested& t) {
        return HasObjective(t) ? Divide(CountMeeting(t), t.duration_s, kNoCompleted)
                               : Computed::None("the spec has no slo");
      });
  add({"slo_attainment", "", kHigher, "count(completed, every objective met) / count(all)",
       "Share of all requests that meet every objective; what failed counts as a miss."},
      [](const Digested& t) {
        return HasObjective(t)
                   ? Divide(CountMeeting(t), static_cast<double>(t.records.requests.size()),
                            "no requests")
                   : Computed::None("the spec has no slo");
      });
  add({"max_concurrent_requests", "", kNeutral, "max overlap of [scheduled, finished)",
       "Most requests in the system at one time."},
      PeakConcurrency);
  add({"max_output_tokens_per_s", "tok/s", kHigher, "max tokens in any second",
       "Best second of generation."},
      PeakTokenRate);
}

void AddLatencies(std::vector<Entry>* table) {
  for (size_t i = 0; i < kSeriesCount; ++i) {
    const Series& series = kSeries[i];
    for (const Statistic& statistic : kStatistics) {
      MetricInfo info = {
          .name = absl::StrCat(statistic.name, "_", series.tag, "_ms"),
          .unit = "ms",
          .direction = kLower,
          .formula = absl::StrCat(statistic.name, "(", series.formula, ")"),
          .meaning = absl::StrCat(statistic.meaning, " of ", series.tag, ". ", series.meaning)};
      table->push_back({std::move(info), [i, compute = statistic.compute](const Digested& t) {
                          return compute(t.series[i]);
                        }});
    }
  }
}

// Memory, traffic and decisions of the strategy.
void AddCache(std::vector<Entry>* table) {
  const auto add = [&](MetricInfo info, std::function<Computed(const Digested&)> compute) {
    table->push_back({std::move(info), std::move(compute)});
  };
  add({"kv_device_bytes_peak", "bytes", kLower, "counter kv_device_bytes_peak",
       "Most device memory that the arm took because it is that arm."},
      [](const Digested& t) {
        return CounterOrPeak(t, recorded::kKvDeviceBytesPeak, recorded::kKvDeviceBytes);
      });
  add({"kv_host_bytes_peak", "bytes", kLower, "counter kv_host_bytes_peak",
       "The same on the host."},
      [](const Digested& t) {
        return CounterOrPeak(t, recorded::kKvHostBytesPeak, recorded::kKvHostBytes);
      });
  add({"kv_bytes_h2d", "bytes", kLower, "counter kv_bytes_h2d", "KV bytes sent host to device."},
      [](const Digested& t) { return CounterValue(t, recorded::kKvBytesHostToDevice); });
  add({"kv_bytes_d2h", "bytes", kLower, "counter kv_bytes_d2h", "KV bytes sent device to host."},
      [](const Digested& t) { return CounterValue(t, recorded::kKvBytesDeviceToHost); });
  add({"kv_tokens_evicted", "tokens", kNeutral, "sum(tokens_evicted)",
       "Tokens dropped for good, mean over layers and KV heads."},
      [](const Digested& t) {
        return Computed(SumRows(t, [](const RequestRow& row) { return row.tokens_evicted(); }));
      });
  add({"kv_entries_fetched", "entries", kNeutral, "sum(entries_fetched)",
       "Entries of the host tier that were fetched, over layers, mean over KV heads."},
      [](const Digested& t) {
        return Computed(SumRows(t, [](const RequestRow& row) { return row.entries_fetched(); }));
      });
  add({"attended_fraction", "", kNeutral, "counter attended_fraction",
       "Entries that attention read, of the tokens so far; mean over decode steps, layers and KV "
       "heads. The common axis of sparsity."},
      [](const Digested& t) { return CounterValue(t, recorded::kAttendedFraction); });
  add({"attended_fraction_beyond_full", "", kNeutral, "counter attended_fraction_beyond_full",
       "The same over the layers that the arm does not keep in full by its own parameters."},
      [](const Digested& t) { return CounterValue(t, recorded::kAttendedBeyondFull); });
  add({"preemptions", "", kLower, "sum(preemptions)", "Times a running request was set back."},
      [](const Digested& t) {
        return Computed(SumRows(t, [](const RequestRow& row) { return row.preemptions(); }));
      });
  add({"memory_short_steps", "", kLower, "counter memory_short_steps",
       "Steps in which a request lost its place, or waited for one, for lack of KV memory."},
      [](const Digested& t) { return CounterValue(t, recorded::kMemoryShortSteps); });
  add({"recomputed_tokens", "tokens", kLower, "sum(recomputed_tokens)",
       "Tokens computed again after a preemption."},
      [](const Digested& t) {
        return Computed(SumRows(t, [](const RequestRow& row) { return row.recomputed_tokens(); }));
      });
  add({"recompute_tax", "", kLower,
       "recomputed_tokens / (total_input_tokens + total_output_tokens + recomputed_tokens)",
       "Share of all computed tokens that were computed again."},
      [](const Digested& t) {
        const double again =
            SumRows(t, [](const RequestRow& row) { return row.recomputed_tokens(); });
        return Divide(again, again + InputTokens(t) + GeneratedTokens(t), kNoCompleted);
      });
  add({"fragmentation", "", kLower, "1 - mean(kv_live_bytes) / mean(kv_device_bytes)",
       "Reserved device memory that holds no live entry."},
      Fragmentation);
  add({"prefetch_overlap", "", kHigher, "1 - transfer_exposed_ns / transfer_ns",
       "Share of the host link's time that was hidden behind compute."},
      PrefetchOverlap);
  add({"kv_stall_ms_per_token", "ms", kLower, "transfer_exposed_ns / total_output_tokens",
       "Time that each output token waited for the host link."},
      StallPerToken);
  add({"engaged_share", "", kNeutral,
       "count(engagement_expected and engaged) / count(engagement_expected)",
       "Requests in which the strategy did what it is named for, of those where it should."},
      EngagedShare);
  add({"steps", "", kNeutral, "counter steps", "Steps of the engine."},
      [](const Digested& t) { return CounterValue(t, recorded::kSteps); });
  add({"mean_step_ms", "ms", kLower, "mean(sample step_ns)", "Mean length of a sampled step."},
      MeanStep);
  add({"mean_running_requests", "", kNeutral, "mean(sample running_requests)",
       "Requests in the batch."},
      [](const Digested& t) { return MeanSample(t, recorded::kRunning); });
  add({"mean_waiting_requests", "", kLower, "mean(sample waiting_requests)",
       "Requests waiting for memory or a place in the batch."},
      [](const Digested& t) { return MeanSample(t, recorded::kWaiting); });
}

// What a part of a step is, for people.
absl::string_view StackMeaning(absl::string_view part) {
  constexpr std::pair<absl::string_view, absl::string_view> kMeanings[] = {
      {"projections", "products around attention, and their norm."},
      {"attention", "attention itself, positions and storing."},
      {"selection", "choosing the entries that stay or are read."},
      {"speculation", "looking ahead, where nothing hides it."},
      {"transfer", "rows over the host link, where nothing hides them."},
      {"mlp", "the feed-forward part and its norm."},
      {"sampling", "last norm, logits and the choice of tokens."},
      {"other", "embeddings and the step's own arrays."},
      {"idle", "nothing ran on the device."},
      {"host_gap", "between steps, waiting for the host (measured, not profiled)."}};
  for (const auto& [name, meaning] : kMeanings) {
    if (name == part) return meaning;
  }
  return "";
}

// Joules for each generated token, unless something makes that no figure to compare by.
Computed EnergyPerToken(const Digested& trial) {
  constexpr std::pair<const char*, const char*> kDoubts[] = {
      {recorded::kEnergyNotRead, "the device's energy counter could not be read"},
      {recorded::kEnergyTooShort, "the trial was too short for the device's energy counter"},
      {recorded::kEnergyShared, "other processes used the device"},
      {recorded::kEnergyThrottled, "heat or power held the device's clocks down"}};
  std::string reasons;
  for (const auto& [name, reason] : kDoubts) {
    const auto found = trial.counters.find(name);
    if (found == trial.counters.end() || found->second == 0) continue;
    absl::StrAppend(&reasons, reasons.empty() ? "" : "; ", reason);
  }
  if (!reasons.empty()) return Computed::None(std::move(reasons));
  const Computed energy = CounterValue(trial, recorded::kEnergyJ);
  return energy.value ? Divide(*energy.value, GeneratedTokens(trial), kNoCompleted) : energy;
}

Computed DecodeOverPredicted(const Digested& trial) {
  const Computed measured = CounterValue(trial, recorded::kDecodeStepNs);
  const Computed predicted = CounterValue(trial, recorded::kPredictedDecodeStepNs);
  if (!measured.value) return measured;
  if (!predicted.value) return predicted;
  return Divide(*measured.value, *predicted.value, "nothing was predicted");
}

Computed CounterMs(const Digested& trial, const std::string& name) {
  const Computed nanoseconds = CounterValue(trial, name.c_str());
  return nanoseconds.value ? Computed(*nanoseconds.value / kNsPerMs) : nanoseconds;
}

// What the device did meanwhile, and where a step's time goes.
void AddTelemetry(std::vector<Entry>* table) {
  const auto add = [&](MetricInfo info, std::function<Computed(const Digested&)> compute) {
    table->push_back({std::move(info), std::move(compute)});
  };
  const auto counter = [](const char* name) {
    return [name](const Digested& t) { return CounterValue(t, name); };
  };
  const auto milliseconds = [](const std::string& name) {
    return [name](const Digested& t) { return CounterMs(t, name); };
  };
  add({"energy_j_per_token", "J/tok", kLower, "energy_j / total_output_tokens",
       "The device's energy during the measurement, idle times included, for each generated token."},
      EnergyPerToken);
  add({"mean_power_w", "W", kNeutral, "counter power_w_mean", "Mean power of the device."},
      counter(recorded::kPowerMean));
  add({"mean_sm_clock_mhz", "MHz", kNeutral, "counter sm_clock_mhz_mean",
       "Mean clock of the device's multiprocessors."},
      counter(recorded::kSmClockMean));
  add({"max_temperature_c", "C", kNeutral, "counter temperature_c_max",
       "Highest temperature of the device."},
      counter(recorded::kTemperatureMax));
  add({"decode_step_ms", "ms", kLower, "counter decode_step_ns",
       "Mean length of a step that only decodes, on the device's clock."},
      milliseconds(recorded::kDecodeStepNs));
  add({"predicted_decode_step_ms", "ms", kNeutral, "counter predicted_decode_step_ns",
       "The least that such a step can take, by the limits of the node's preflight."},
      milliseconds(recorded::kPredictedDecodeStepNs));
  add({"decode_over_predicted", "", kLower, "decode_step_ns / predicted_decode_step_ns",
       "Distance from that limit; above 1.5 look for a kernel or an overlap, not at the strategy."},
      DecodeOverPredicted);
  for (const absl::string_view part : recorded::kStackParts) {
    const std::string name = absl::StrCat(recorded::kStackPrefix, part);
    add({absl::StrCat(name, "_ms"), "ms", kNeutral, absl::StrCat("counter ", name, "_ns"),
         absl::StrCat("Of a profiled decode step: ", StackMeaning(part))},
        milliseconds(absl::StrCat(name, "_ns")));
  }
}

const std::vector<Entry>& Table() {
  static const std::vector<Entry> table = [] {
    std::vector<Entry> entries;
    AddRates(&entries);
    AddLatencies(&entries);
    AddCache(&entries);
    AddTelemetry(&entries);
    return entries;
  }();
  return table;
}

Digested DigestTrial(const TrialRecords& records) {
  Digested trial = {.records = records};
  int64_t first_ns = kNeverNs;
  int64_t last_ns = 0;
  for (const RequestRow& row : records.requests) {
    first_ns = std::min(first_ns, row.scheduled_ns());
    if (row.status() != RequestRow::STATUS_COMPLETED) continue;
    trial.completed.push_back(&row);
    last_ns = std::max(last_ns, row.finished_ns());
  }
  if (!trial.completed.empty()) {
    trial.duration_s = static_cast<double>(last_ns - first_ns) / kNsPerSecond;
  }
  trial.series.resize(kSeriesCount);
  for (size_t i = 0; i < kSeriesCount; ++i) {
    for (const RequestRow* row : trial.completed) kSeries[i].collect(*row, &trial.series[i]);
    std::sort(trial.series[i].begin(), trial.series[i].end());
  }
  for (const Counter& counter : records.counters) {
    if (counter.layer() < 0) trial.counters[counter.name()] = counter.value();
  }
  return trial;
}

// --------------------------------------------------------------------------------------------
// quality

struct QualitySums {
  double tokens = 0;
  double nll = 0;
  double reference_nll = 0;
  double kl = 0;
  double matches = 0;
};

// Adds up all scored positions, or only those after something was dropped.
QualitySums Add(std::span<const QualityRow> windows, bool dropped) {
  QualitySums sums;
  for (const QualityRow& row : windows) {
    sums.tokens += dropped ? row.dropped_tokens() : row.scored_tokens();
    sums.nll += dropped ? row.dropped_nll_sum() : row.nll_sum();
    sums.reference_nll += dropped ? row.dropped_reference_nll_sum() : row.reference_nll_sum();
    sums.kl += dropped ? row.dropped_kl_sum() : row.kl_sum();
    sums.matches += dropped ? row.dropped_top1_matches() : row.top1_matches();
  }
  return sums;
}

// The four figures of one set of positions, under a prefix.
void AddQualityInfo(absl::string_view prefix, absl::string_view where,
                    std::vector<MetricInfo>* table) {
  table->push_back({absl::StrCat(prefix, "ppl"), "", kLower, "exp(sum(nll) / tokens)",
                    absl::StrCat("Perplexity of the arm", where, ".")});
  table->push_back(
      {absl::StrCat(prefix, "reference_ppl"), "", kNeutral, "exp(sum(reference_nll) / tokens)",
       absl::StrCat("Perplexity of the full cache on the same positions", where, ".")});
  table->push_back({absl::StrCat(prefix, "kl"), "nats", kLower, "sum(KL(full || arm)) / tokens",
                    absl::StrCat("Divergence of the next-token distribution from the full cache's",
                                 where, ".")});
  table->push_back(
      {absl::StrCat(prefix, "top1_agreement"), "", kHigher, "count(argmax equal) / tokens",
       absl::StrCat("Positions whose most likely token is the full cache's", where, ".")});
}

void AddQualityValues(const QualitySums& sums, absl::string_view reason,
                      std::vector<Computed>* values) {
  const Computed nll = Divide(sums.nll, sums.tokens, reason);
  const Computed reference = Divide(sums.reference_nll, sums.tokens, reason);
  values->push_back(nll.value ? Computed(std::exp(*nll.value)) : nll);
  values->push_back(reference.value ? Computed(std::exp(*reference.value)) : reference);
  values->push_back(Divide(sums.kl, sums.tokens, reason));
  values->push_back(Divide(sums.matches, sums.tokens, reason));
}

SummaryMetric ToSummary(const MetricInfo& info, Computed computed) {
  // Nothing that is not a number goes into the store or a report.
  if (computed.value && !std::isfinite(*computed.value)) {
    computed = Computed::None("not a finite number");
  }
  return {info.name, computed.value, std::move(computed.reason)};
}

absl::string_view DirectionName(Direction direction) {
  switch (direction) {
    case Direction::kLowerIsBetter:
      return "lower";
    case Direction::kHigherIsBetter:
      return "higher";
    case Direction::kNeutral:
      return "-";
  }
  return "";
}

void AppendTable(absl::string_view title, const std::vector<MetricInfo>& metrics,
                 std::string* text) {
  absl::StrAppend(text, "### ", title, "\n\n| name | unit | better | formula | meaning |\n",
                  "| --- | --- | --- | --- | --- |\n");
  for (const MetricInfo& info : metrics) {
    absl::StrAppend(text, "| `", info.name, "` | ", info.unit, " | ", DirectionName(info.direction),
                    " | ", info.formula, " | ", info.meaning, " |\n");
  }
  absl::StrAppend(text, "\n");
}

}  // namespace

const std::vector<MetricInfo>& Metrics() {
  static const std::vector<MetricInfo> metrics = [] {
    std::vector<MetricInfo> infos;
    for (const Entry& entry : Table()) infos.push_back(entry.info);
    return infos;
  }();
  return metrics;
}

const std::vector<std::string>& TelemetryMetrics() {
  static const std::vector<std::string> names = [] {
    std::vector<Entry> entries;
    AddTelemetry(&entries);
    std::vector<std::string> all;
    for (const Entry& entry : entries) all.push_back(entry.info.name);
    return all;
  }();
  return names;
}

const std::vector<MetricInfo>& QualityMetrics() {
  static const std::vector<MetricInfo> metrics = [] {
    std::vector<MetricInfo> infos;
    AddQualityInfo("", "", &infos);
    AddQualityInfo("dropped_", ", over positions after something was dropped", &infos);
    infos.push_back({"quality_attended_fraction", "", kNeutral, "mean over windows, by tokens",
                     "Attended fraction during the quality trial."});
    infos.push_back({"passkey_recall", "", kHigher, "count(recalled) / count(pass keys)",
                     "Pass keys of which the arm gave every digit that counts."});
    infos.push_back({"passkey_reference_recall", "", kNeutral,
                     "count(reference_recalled) / count(pass keys)",
                     "The same of the full cache: what this model can do at all."});
    infos.push_back({"passkey_digit_accuracy", "", kHigher, "sum(correct_digits) / sum(digits)",
                     "Digits of pass keys that were right in place; 0.1 is chance."});
    return infos;
  }();
  return metrics;
}

const MetricInfo* FindMetric(absl::string_view name) {
  for (const auto* table : {&Metrics(), &QualityMetrics()}) {
    for (const MetricInfo& info : *table) {
      if (info.name == name) return &info;
    }
  }
  return nullptr;
}

std::vector<SummaryMetric> Summarise(const TrialRecords& records) {
  const Digested trial = DigestTrial(records);
  std::vector<SummaryMetric> summary;
  for (const Entry& entry : Table()) summary.push_back(ToSummary(entry.info, entry.compute(trial)));
  return summary;
}

std::vector<SummaryMetric> SummariseQuality(std::span<const QualityRow> windows,
                                            std::span<const PasskeyRow> passkeys) {
  std::vector<Computed> values;
  AddQualityValues(Add(windows, /*dropped=*/false), "no scored position", &values);
  AddQualityValues(Add(windows, /*dropped=*/true), "nothing was dropped", &values);
  double attended = 0;
  double tokens = 0;
  for (const QualityRow& row : windows) {
    attended += row.attended_fraction() * row.scored_tokens();
    tokens += row.scored_tokens();
  }
  values.push_back(Divide(attended, tokens, "no scored position"));
  double recalled = 0;
  double reference_recalled = 0;
  double correct = 0;
  double digits = 0;
  for (const PasskeyRow& row : passkeys) {
    recalled += row.recalled();
    reference_recalled += row.reference_recalled();
    correct += row.correct_digits();
    digits += row.digits();
  }
  const auto asked = static_cast<double>(passkeys.size());
  values.push_back(Divide(recalled, asked, "no pass key was asked for"));
  values.push_back(Divide(reference_recalled, asked, "no pass key was asked for"));
  values.push_back(Divide(correct, digits, "no pass key was asked for"));
  std::vector<SummaryMetric> summary;
  for (size_t i = 0; i < values.size(); ++i) {
    summary.push_back(ToSummary(QualityMetrics()[i], values[i]));
  }
  return summary;
}

Engagement JudgeEngagement(absl::string_view strategy, std::span<const RequestRow> requests) {
  if (FindStrategyTraits(*Arm::descriptor(), strategy).baseline) return Engagement::kNoRule;
  size_t expected = 0;
  size_t engaged = 0;
  for (const RequestRow& row : requests) {
    if (!row.engagement_expected()) continue;
    ++expected;
    engaged += row.engaged();
  }
  return expected > 0 && 2 * engaged >= expected ? Engagement::kEngaged : Engagement::kNotEngaged;
}

absl::string_view EngagementName(Engagement engagement) {
  switch (engagement) {
    case Engagement::kNoRule:
      return "-";
    case Engagement::kEngaged:
      return "engaged";
    case Engagement::kNotEngaged:
      return "not engaged";
  }
  return "";
}

std::string OutcomeName(Outcome outcome) {
  const std::string name = Outcome_Name(outcome);
  if (name.empty()) return absl::StrCat("outcome ", static_cast<int>(outcome));
  return absl::AsciiStrToLower(absl::StripPrefix(name, "OUTCOME_"));
}

std::string MetricsMarkdown() {
  std::string text;
  AppendTable("Of a load trial", Metrics(), &text);
  AppendTable("Of a quality trial", QualityMetrics(), &text);
  return text;
}

}  // namespace kvsweep
