#include "experiments/metrics.h"

#include <cmath>
#include <cstdlib>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

constexpr int64_t kMs = 1'000'000;

// A completed request: arrives at `scheduled_ms`, first token after 100 ms, then a token each 10
// ms.
RequestRow Completed(uint32_t index, int64_t scheduled_ms, uint32_t output_tokens) {
  RequestRow row;
  row.set_index(index);
  row.set_prompt_tokens(50);
  row.set_output_tokens(output_tokens);
  row.set_scheduled_ns(scheduled_ms * kMs);
  row.set_issued_ns((scheduled_ms + 1) * kMs);
  row.set_admitted_ns((scheduled_ms + 40) * kMs);
  row.set_first_token_ns((scheduled_ms + 100) * kMs);
  for (uint32_t i = 1; i < output_tokens; ++i) row.add_token_gap_ns(10 * kMs);
  row.set_finished_ns(row.first_token_ns() + 10 * kMs * (output_tokens - 1));
  row.set_entries_attended(30);
  row.set_entries_full(60);
  return row;
}

Counter CounterOf(const char* name, double value, int32_t layer = -1) {
  Counter counter;
  counter.set_name(name);
  counter.set_value(value);
  counter.set_layer(layer);
  return counter;
}

Sample SampleOf(const char* name, double value) {
  Sample sample;
  sample.set_name(name);
  sample.set_value(value);
  return sample;
}

SummaryMetric Find(const std::vector<SummaryMetric>& summary, absl::string_view name) {
  for (const SummaryMetric& metric : summary) {
    if (metric.name == name) return metric;
  }
  ADD_FAILURE() << "no metric " << name;
  return {};
}

// The value, or NaN.
double ValueOf(const std::vector<SummaryMetric>& summary, absl::string_view name) {
  return Find(summary, name).value.value_or(NAN);
}

TEST(MetricsTable, NamesAreUniqueAndEachIsDescribed) {
  std::set<std::string> names;
  for (const auto* table : {&Metrics(), &QualityMetrics()}) {
    for (const MetricInfo& info : *table) {
      EXPECT_TRUE(names.insert(info.name).second) << info.name;
      EXPECT_FALSE(info.formula.empty() || info.meaning.empty()) << info.name;
      EXPECT_EQ(FindMetric(info.name), &info);
    }
  }
  EXPECT_EQ(FindMetric("nothing"), nullptr);
  // Plot scripts for vLLM's benchmarks load these.
  for (const char* name :
       {"request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
        "mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p99_e2el_ms", "completed", "failed"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

// KVSWEEP_UPDATE_GOLDEN=1 rewrites the tables inside the page.
TEST(MetricsTable, DocumentationIsTheTable) {
  constexpr char kPage[] = "docs/METRICS.md";
  constexpr char kBegin[] = "<!-- tables: begin -->\n";
  constexpr char kEnd[] = "<!-- tables: end -->";
  const auto page = ReadFile(kPage, 1 << 20);
  ASSERT_TRUE(page.ok()) << page.status();
  const size_t begin = page->find(kBegin);
  const size_t end = page->find(kEnd);
  ASSERT_TRUE(begin != std::string::npos && end != std::string::npos);
  const std::string expected =
      absl::StrCat(page->substr(0, begin), kBegin, "\n", MetricsMarkdown(), page->substr(end));
  if (std::getenv("KVSWEEP_UPDATE_GOLDEN") != nullptr) {
    ASSERT_TRUE(WriteFileAtomic(kPage, expected).ok());
  } else {
    EXPECT_EQ(*page, expected) << "KVSWEEP_UPDATE_GOLDEN=1 rewrites the tables";
  }
}

TEST(Summarise, ComputesWhatTheFormulasSay) {
  // Arrivals at 0 and 1000 ms; 11 and 21 tokens: finished at 200 and 1300 ms.
  std::vector<RequestRow> rows = {Completed(0, 0, 11), Completed(1, 1000, 21)};
  rows[1].set_preemptions(2);
  rows[1].set_recomputed_tokens(40);
  rows[0].set_tokens_evicted(5);
  rows[0].set_engagement_expected(true);
  const std::vector<Counter> counters = {CounterOf("attended_fraction", 0.5),
                                         CounterOf("attended_fraction", 0.75, 0),
                                         CounterOf("attended_fraction_beyond_full", 0.25)};
  const std::vector<SummaryMetric> summary = Summarise({.requests = rows, .counters = counters});
  ASSERT_EQ(summary.size(), Metrics().size());
  EXPECT_EQ(ValueOf(summary, "completed"), 2);
  EXPECT_EQ(ValueOf(summary, "failed"), 0);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "duration_s"), 1.3);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "request_throughput"), 2 / 1.3);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "output_throughput"), 32 / 1.3);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "total_token_throughput"), 132 / 1.3);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_ttft_ms"), 100);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_ttft_service_ms"), 99);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_queue_time_ms"), 40);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_prefill_time_ms"), 60);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_decode_time_ms"), 150);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_tpot_ms"), 10);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_itl_ms"), 10);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "median_e2el_ms"), 250);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "std_e2el_ms"), 50) << "population, as numpy's default";
  EXPECT_DOUBLE_EQ(ValueOf(summary, "mean_ntpot_ms"), (200.0 / 11 + 300.0 / 21) / 2);
  EXPECT_EQ(ValueOf(summary, "max_concurrent_requests"), 1);
  EXPECT_EQ(ValueOf(summary, "max_output_tokens_per_s"), 21);
  EXPECT_EQ(ValueOf(summary, "attended_fraction"), 0.5);
  EXPECT_EQ(ValueOf(summary, "attended_fraction_beyond_full"), 0.25);
  EXPECT_EQ(ValueOf(summary, "preemptions"), 2);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "recompute_tax"), 40.0 / 172);
  EXPECT_EQ(ValueOf(summary, "kv_tokens_evicted"), 5);
  EXPECT_EQ(ValueOf(summary, "engaged_share"), 0);
}

TEST(Summarise, PercentilesNeedValuesPastThem) {
  std::vector<RequestRow> rows;
  for (uint32_t i = 0; i < 99; ++i) rows.push_back(Completed(i, i, 2));
  SummaryMetric p99 = Find(Summarise({.requests = rows}), "p99_ttft_ms");
  EXPECT_FALSE(p99.value.has_value());
  EXPECT_EQ(p99.reason, "99 values; p99 needs 100");
  EXPECT_TRUE(Find(Summarise({.requests = rows}), "p95_ttft_ms").value.has_value());
  rows.push_back(Completed(99, 99, 2));
  EXPECT_TRUE(Find(Summarise({.requests = rows}), "p99_ttft_ms").value.has_value());
  rows.resize(10);
  EXPECT_TRUE(Find(Summarise({.requests = rows}), "p90_ttft_ms").value.has_value());
  EXPECT_EQ(Find(Summarise({.requests = rows}), "p95_ttft_ms").reason, "10 values; p95 needs 20");
}

TEST(Summarise, ObjectivesCountFailuresAndOneTokenRequests) {
  std::vector<RequestRow> rows = {Completed(0, 0, 11), Completed(1, 0, 1), Completed(2, 0, 101),
                                  Completed(3, 0, 2)};
  rows[3].set_status(RequestRow::STATUS_INFEASIBLE);
  Slo slo;
  EXPECT_EQ(Find(Summarise({.requests = rows, .slo = &slo}), "slo_attainment").reason,
            "the spec has no slo");
  slo.set_ttft(100 * kMs);
  slo.set_tpot(10 * kMs);
  std::vector<SummaryMetric> summary = Summarise({.requests = rows, .slo = &slo});
  EXPECT_DOUBLE_EQ(ValueOf(summary, "slo_attainment"), 0.75)
      << "limits are inclusive; a failure is a miss";
  EXPECT_EQ(ValueOf(summary, "infeasible_requests"), 1);
  EXPECT_EQ(ValueOf(summary, "failed"), 1);
  slo.set_tpot(9 * kMs);
  EXPECT_DOUBLE_EQ(ValueOf(Summarise({.requests = rows, .slo = &slo}), "slo_attainment"), 0.25)
      << "one output token has no tpot to miss";
  slo.set_e2el(50 * kMs);
  EXPECT_EQ(ValueOf(Summarise({.requests = rows, .slo = &slo}), "request_goodput"), 0);
}

TEST(Summarise, CountersAndSamples) {
  const std::vector<RequestRow> rows = {Completed(0, 0, 10)};
  const std::vector<Counter> counters = {CounterOf(recorded::kKvBytesHostToDevice, 4096),
                                         CounterOf(recorded::kTransferNs, 100 * kMs),
                                         CounterOf(recorded::kTransferExposedNs, 25 * kMs),
                                         CounterOf(recorded::kTransferExposedNs, 7, 3)};
  const std::vector<Sample> samples = {
      SampleOf(recorded::kKvDeviceBytes, 1000), SampleOf(recorded::kKvDeviceBytes, 3000),
      SampleOf(recorded::kKvLiveBytes, 900), SampleOf(recorded::kKvLiveBytes, 2100)};
  const std::vector<SummaryMetric> summary =
      Summarise({.requests = rows, .counters = counters, .samples = samples});
  EXPECT_EQ(ValueOf(summary, "kv_bytes_h2d"), 4096);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "prefetch_overlap"), 0.75);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "kv_stall_ms_per_token"), 2.5);
  EXPECT_EQ(ValueOf(summary, "kv_device_bytes_peak"), 3000)
      << "the largest sample, without a counter";
  EXPECT_DOUBLE_EQ(ValueOf(summary, "fragmentation"), 0.25);
  EXPECT_EQ(Find(summary, "kv_bytes_d2h").reason, "kv_bytes_d2h was not recorded");
}

TEST(Summarise, EnergyIsWithheldWithAllItsReasons) {
  const std::vector<RequestRow> rows = {Completed(0, 0, 5), Completed(1, 10, 5)};
  std::vector<Counter> counters = {
      CounterOf(recorded::kEnergyJ, 50), CounterOf(recorded::kEnergyNotRead, 0),
      CounterOf(recorded::kEnergyTooShort, 0), CounterOf(recorded::kEnergyShared, 0),
      CounterOf(recorded::kEnergyThrottled, 0)};
  const auto energy = [&] {
    return Find(Summarise({.requests = rows, .counters = counters}), "energy_j_per_token");
  };
  EXPECT_EQ(energy().value, 5);
  counters[2].set_value(1);
  counters[4].set_value(1);
  EXPECT_FALSE(energy().value.has_value());
  EXPECT_EQ(energy().reason,
            "the trial was too short for the device's energy counter; heat or power held the "
            "device's clocks down");
  counters = {CounterOf(recorded::kEnergyNotRead, 1)};
  EXPECT_EQ(energy().reason, "the device's energy counter could not be read");
  counters.clear();
  EXPECT_EQ(energy().reason, "energy_j was not recorded");
}

TEST(Summarise, NothingIsNotANumber) {
  for (const SummaryMetric& metric : Summarise({})) {
    EXPECT_NE(metric.value.has_value(), !metric.reason.empty()) << metric.name;
    EXPECT_TRUE(std::isfinite(metric.value.value_or(0))) << metric.name;
  }
}

QualityRow Window(uint32_t tokens, double nll, double kl, uint32_t matches) {
  QualityRow row;
  row.set_scored_tokens(tokens);
  row.set_nll_sum(nll * tokens);
  row.set_reference_nll_sum(tokens);
  row.set_kl_sum(kl * tokens);
  row.set_top1_matches(matches);
  row.set_attended_fraction(0.5);
  return row;
}

TEST(SummariseQualityTest, WeighsWindowsByTheirTokens) {
  const std::vector<QualityRow> windows = {Window(100, 2, 0.1, 90), Window(300, 1, 0.3, 150)};
  const std::vector<SummaryMetric> summary = SummariseQuality(windows, {});
  EXPECT_DOUBLE_EQ(ValueOf(summary, "ppl"), std::exp(1.25));
  EXPECT_DOUBLE_EQ(ValueOf(summary, "reference_ppl"), std::exp(1.0));
  EXPECT_DOUBLE_EQ(ValueOf(summary, "kl"), 0.25);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "top1_agreement"), 0.6);
  EXPECT_EQ(Find(summary, "dropped_kl").reason, "nothing was dropped");
  EXPECT_EQ(Find(SummariseQuality({}, {}), "ppl").reason, "no scored position");
  EXPECT_EQ(Find(summary, "passkey_recall").reason, "no pass key was asked for");
}

TEST(SummariseQualityTest, CountsRecalledPassKeysAndTheirDigits) {
  std::vector<PasskeyRow> passkeys(4);
  for (PasskeyRow& row : passkeys) {
    row.set_digits(5);
    row.set_correct_digits(2);
    row.set_reference_recalled(true);
  }
  passkeys[3].set_correct_digits(5);
  passkeys[3].set_recalled(true);
  const std::vector<SummaryMetric> summary = SummariseQuality({}, passkeys);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "passkey_recall"), 0.25);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "passkey_reference_recall"), 1);
  EXPECT_DOUBLE_EQ(ValueOf(summary, "passkey_digit_accuracy"), 11.0 / 20);
}

TEST(EngagementTest, HalfOfTheRequestsWhereTheRuleApplies) {
  std::vector<RequestRow> rows(4, Completed(0, 0, 2));
  EXPECT_EQ(JudgeEngagement("paged", rows), Engagement::kNoRule);
  EXPECT_EQ(JudgeEngagement("h2o", rows), Engagement::kNotEngaged) << "no request was long enough";
  for (RequestRow& row : rows) row.set_engagement_expected(true);
  rows[0].set_engaged(true);
  EXPECT_EQ(JudgeEngagement("h2o", rows), Engagement::kNotEngaged);
  rows[1].set_engaged(true);
  EXPECT_EQ(JudgeEngagement("h2o", rows), Engagement::kEngaged);
}

TEST(OutcomeNameTest, IsShortAndLowerCase) {
  EXPECT_EQ(OutcomeName(OUTCOME_OK), "ok");
  EXPECT_EQ(OutcomeName(OUTCOME_RECORDER_OVERFLOW), "recorder_overflow");
  EXPECT_EQ(OutcomeName(static_cast<Outcome>(77)), "outcome 77");
}

}  // namespace
}  // namespace kvsweep
