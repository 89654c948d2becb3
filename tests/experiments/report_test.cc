#include "experiments/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

const TrialContext kContext = {"cpu", "Xeon", "x86-64-v3", "", "real", 1};

// One cell, paged as reference and h2o; three repeats, each with its own level of noise that both
// share.
class ReportTest : public ::testing::Test {
 protected:
  ReportTest() {
    input_.experiment = "quickstart";
    input_.model = "books";
    input_.repeats = 3;
    input_.rounds_planned = 3;
    input_.arms = {{"paged", "paged"}, {"h2o-20", "h2o"}};
    input_.cells = {"rate=4/s"};
    const double noise[] = {0, 400, 100};
    for (uint32_t repeat = 0; repeat < 3; ++repeat) {
      Add(0, repeat, 1000 + noise[repeat], 50);
      Add(1, repeat, 900 + noise[repeat] + repeat, 50);
    }
  }

  TrialResult& Add(size_t arm, uint32_t repeat, double ttft, double throughput) {
    TrialResult trial = {
        .trial_id = input_.trials.size() + 1, .round_id = repeat + 1, .arm = arm, .repeat = repeat};
    trial.context = kContext;
    trial.engagement = arm == 0 ? Engagement::kNoRule : Engagement::kEngaged;
    trial.metrics = {{"mean_ttft_ms", ttft, ""},
                     {"output_throughput", throughput, ""},
                     {"p99_ttft_ms", std::nullopt, "24 values; p99 needs 100"},
                     {"attended_fraction", arm == 0 ? 1.0 : 0.2, ""},
                     {"preemptions", 0, ""}};
    input_.trials.push_back(std::move(trial));
    return input_.trials.back();
  }

  Comparison Compared(std::vector<std::string> metrics = {"mean_ttft_ms", "output_throughput"}) {
    const auto comparison = Compare(input_, {.metrics = std::move(metrics)});
    EXPECT_TRUE(comparison.ok()) << comparison.status();
    return comparison.value_or(Comparison());
  }

  std::string Table() { return FormatComparison(Compared(), ReportFormat::kTable); }

  ReportInput input_;
};

TEST_F(ReportTest, TrialsThatLeftTheRegimeAreCounted) {
  input_.trials[1].metrics.push_back({"memory_short_steps", 4, ""});
  EXPECT_TRUE(Compared().cells[0].arms[1].notes.empty()) << "equal bytes promise no more";
  input_.regime = Experiment::REGIME_KV_FITS;
  const Comparison comparison = Compared();
  EXPECT_EQ(comparison.regime, "kv_fits");
  EXPECT_TRUE(comparison.cells[0].arms[0].notes.empty());
  EXPECT_THAT(comparison.cells[0].arms[1].notes,
              ::testing::ElementsAre(HasSubstr("1 of 3 trial(s) left the regime kv_fits")));
  for (const ReportFormat format :
       {ReportFormat::kTable, ReportFormat::kMarkdown, ReportFormat::kJson, ReportFormat::kCsv}) {
    EXPECT_THAT(FormatComparison(comparison, format), HasSubstr("kv_fits"));
  }
}

// The differences are 100, 99 and 98 although single runs scatter by 400: this is what pairing is
// for.
TEST_F(ReportTest, DifferencesArePairedInsideRounds) {
  const Comparison comparison = Compared();
  ASSERT_EQ(comparison.cells.size(), 1u);
  const ComparedArm& paged = comparison.cells[0].arms[0];
  const ComparedArm& h2o = comparison.cells[0].arms[1];
  EXPECT_EQ(paged.metrics[0].verdict, Verdict::kReference);
  EXPECT_NEAR(paged.metrics[0].value->mean, 3500.0 / 3, 1e-9);
  EXPECT_GT(*paged.metrics[0].value->half_width, 300);
  EXPECT_EQ(h2o.repeats, 3u);
  EXPECT_DOUBLE_EQ(h2o.metrics[0].difference->mean, -99);
  EXPECT_NEAR(*h2o.metrics[0].difference->half_width, 4.302653 / std::sqrt(3.0), 1e-5);
  EXPECT_NEAR(*h2o.metrics[0].relative, -99 / (3500.0 / 3), 1e-12);
  EXPECT_EQ(h2o.metrics[0].verdict, Verdict::kBetter) << "lower is better";
  EXPECT_EQ(h2o.metrics[1].verdict, Verdict::kCannotTell) << "equal throughput";
  EXPECT_DOUBLE_EQ(*h2o.attended_fraction, 0.2);
}

TEST_F(ReportTest, MoreThroughputIsBetter) {
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.metrics[1].value = 60 + trial.repeat;
  }
  EXPECT_EQ(Compared().cells[0].arms[1].metrics[1].verdict, Verdict::kBetter);
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.metrics[1].value = 40 + trial.repeat;
  }
  EXPECT_EQ(Compared().cells[0].arms[1].metrics[1].verdict, Verdict::kWorse);
}

TEST_F(ReportTest, DistanceFromTheLimitAndTheStackAreTold) {
  EXPECT_THAT(Table(), Not(HasSubstr("limit"))) << "no column where nothing was predicted";
  for (TrialResult& trial : input_.trials) {
    trial.metrics.push_back({"decode_over_predicted", trial.arm == 0 ? 1.25 : 1.75, ""});
    trial.metrics.push_back({"stack_attention_ms", 0.5 + trial.repeat, ""});
  }
  EXPECT_THAT(Table(), HasSubstr("limit"));
  EXPECT_THAT(Table(), HasSubstr("1.75"));
  const auto json = nlohmann::json::parse(FormatComparison(Compared(), ReportFormat::kJson));
  const auto& telemetry = json["cells"][0]["arms"][1]["telemetry"];
  EXPECT_EQ(telemetry["decode_over_predicted"], 1.75);
  EXPECT_EQ(telemetry["stack_attention_ms"], 1.5);
  EXPECT_FALSE(telemetry.contains("energy_j_per_token"));
}

TEST(TelemetryTest, AStackIsBarsThatAddUp) {
  const std::string text = FormatTelemetry({{"decode_step_ms", 4.4, ""},
                                            {"predicted_decode_step_ms", 4.0, ""},
                                            {"stack_attention_ms", 1.0, ""},
                                            {"stack_mlp_ms", 3.0, ""}});
  EXPECT_THAT(text, HasSubstr("4.4 ms, 1.10 times the 4 ms"));
  EXPECT_THAT(text, HasSubstr("25.0 %  " + std::string(10, '#') + "\n"));
  EXPECT_THAT(text, HasSubstr("75.0 %  " + std::string(30, '#') + "\n"));
  EXPECT_THAT(text, Not(HasSubstr("device")));
}

TEST(TelemetryTest, EnergyIsAFigureOrAReason) {
  const std::vector<SummaryMetric> device = {{"mean_power_w", 412.5, ""},
                                             {"energy_j_per_token", std::nullopt, "too short"}};
  EXPECT_THAT(FormatTelemetry(device), HasSubstr("no figure for a token: too short"));
  EXPECT_EQ(FormatTelemetry({{"energy_j_per_token", std::nullopt, "was not recorded"}}), "");
}

TEST_F(ReportTest, OneRepeatHasNoVerdict) {
  input_.trials.resize(2);
  const Comparison comparison = Compared();
  const ComparedMetric& metric = comparison.cells[0].arms[1].metrics[0];
  EXPECT_EQ(metric.verdict, Verdict::kCannotTell);
  EXPECT_EQ(metric.reason, "one repeat has no interval");
  EXPECT_THAT(FormatComparison(comparison, ReportFormat::kTable),
              HasSubstr("partial: 1 of 3 rounds"));
}

TEST_F(ReportTest, TrialsOfAnotherOutcomeAreCountedAndNotAveraged) {
  TrialResult& failed = Add(1, 3, 1e9, 0);
  failed.outcome = OUTCOME_OOM;
  failed.evidence = "asked 9 MiB of 3 MiB";
  const Comparison comparison = Compared();
  const ComparedArm& h2o = comparison.cells[0].arms[1];
  EXPECT_EQ(h2o.outcomes.at("ok"), 3u);
  EXPECT_EQ(h2o.outcomes.at("oom"), 1u);
  EXPECT_LT(h2o.metrics[0].value->mean, 2000);
  EXPECT_THAT(FormatComparison(comparison, ReportFormat::kTable),
              HasSubstr("! h2o-20: outcomes: ok 3, oom 1\n  ! h2o-20: oom: asked 9 MiB of 3 MiB"));
}

TEST_F(ReportTest, AnArmWithoutAnyOkTrialHasNoFigures) {
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.outcome = OUTCOME_INFEASIBLE;
  }
  const Comparison comparison = Compared();
  const ComparedMetric& metric = comparison.cells[0].arms[1].metrics[0];
  EXPECT_FALSE(metric.value.has_value());
  EXPECT_EQ(metric.verdict, Verdict::kNone);
  EXPECT_EQ(metric.reason, "no trial with outcome ok");
}

TEST_F(ReportTest, WithoutEngagementThereIsNoVerdict) {
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1 && trial.repeat > 0) trial.engagement = Engagement::kNotEngaged;
  }
  const Comparison comparison = Compared();
  EXPECT_EQ(comparison.cells[0].arms[1].engagement, "engaged 1 of 3");
  EXPECT_EQ(comparison.cells[0].arms[1].metrics[0].verdict, Verdict::kNone);
  EXPECT_TRUE(comparison.cells[0].arms[1].metrics[0].value.has_value()) << "shown all the same";
  EXPECT_THAT(FormatComparison(comparison, ReportFormat::kTable),
              HasSubstr("engaged 1 of 3: no verdict is drawn"));
}

TEST_F(ReportTest, AgainstAReferenceThatDidNotEngageThereIsNoVerdict) {
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 0) trial.engagement = Engagement::kNotEngaged;
  }
  const ComparedMetric metric = Compared().cells[0].arms[1].metrics[0];
  EXPECT_EQ(metric.verdict, Verdict::kNone);
  EXPECT_EQ(metric.reason, "the reference did not engage");
}

TEST_F(ReportTest, RepeatsWithoutAFigureAreCounted) {
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1 && trial.repeat == 0) trial.metrics.clear();
  }
  const ComparedArm h2o = Compared().cells[0].arms[1];
  EXPECT_EQ(h2o.repeats, 3u);
  ASSERT_FALSE(h2o.notes.empty());
  EXPECT_THAT(h2o.notes[0], HasSubstr(": of 2 of 3 repeats"));
}

TEST_F(ReportTest, WhatNeverRanIsOfNoUnlikeContext) {
  TrialResult& cancelled = Add(1, 3, 1e9, 0);
  cancelled.outcome = OUTCOME_CANCELLED;
  cancelled.context = {};
  EXPECT_THAT(FormatComparison(Compared(), ReportFormat::kTable),
              testing::Not(HasSubstr("unlike context")));
}

TEST_F(ReportTest, UnlikeContextsAreNamedAndLeftOut) {
  input_.trials[3].context.device = "EPYC";
  input_.trials[3].context.time_mode = "modelled:h200";
  const Comparison comparison = Compared();
  const ComparedArm& h2o = comparison.cells[0].arms[1];
  EXPECT_EQ(h2o.repeats, 2u);
  ASSERT_EQ(h2o.notes.size(), 1u);
  EXPECT_EQ(
      h2o.notes[0],
      "1 trial(s) left out, from an unlike context: device \"EPYC\" instead of \"Xeon\", time "
      "\"modelled:h200\" instead of \"real\"");
}

// More arms than a round holds: the reference runs twice in a repeat, which must not count as two
// repeats.
TEST_F(ReportTest, ReferenceOfSeveralGroupsCountsOncePerRepeat) {
  input_.arms.push_back({"infinigen", "infinigen"});
  for (uint32_t repeat = 0; repeat < 3; ++repeat) {
    Add(0, repeat, 2000, 50).round_id = 10 + repeat;
    Add(2, repeat, 1990 - repeat, 50).round_id = 10 + repeat;
  }
  const Comparison comparison = Compared();
  EXPECT_EQ(comparison.cells[0].arms[0].repeats, 3u);
  EXPECT_EQ(comparison.cells[0].arms[0].metrics[0].value->count, 3u);
  EXPECT_DOUBLE_EQ(comparison.cells[0].arms[2].metrics[0].difference->mean, -11)
      << "against the reference of its own rounds";
}

TEST_F(ReportTest, QualityIsJoinedByItsKey) {
  QualityRow window;
  window.set_scored_tokens(100);
  window.set_nll_sum(200);
  window.set_reference_nll_sum(190);
  window.set_kl_sum(5);
  window.set_top1_matches(80);
  input_.qualities = {{.trial_id = 50, .content_key = "key", .windows = {window, window}}};
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.quality_key = "key";
    if (trial.arm == 0) trial.quality_key = "not yet";
  }
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.load_dependence = "recompute";
  }
  EXPECT_EQ(Compared().cells[0].arms[1].quality->note, "") << "nothing was preempted";
  input_.trials[1].metrics[4].value = 2;  // preemptions
  const Comparison comparison = Compared();
  EXPECT_EQ(comparison.cells[0].arms[0].quality->note, "its quality trial has not finished");
  const ComparedQuality& quality = *comparison.cells[0].arms[1].quality;
  EXPECT_DOUBLE_EQ(*quality.metrics[0].value, std::exp(2.0));
  EXPECT_DOUBLE_EQ(quality.intervals.at("kl").low, 0.05);
  EXPECT_THAT(quality.note, HasSubstr("preempted by recompute"));
  const std::string table = FormatComparison(comparison, ReportFormat::kTable);
  EXPECT_THAT(table, HasSubstr("7.389"));
  EXPECT_THAT(table, HasSubstr("0.0500"));
  EXPECT_THAT(table, HasSubstr("0.800"));
}

TEST_F(ReportTest, OutputsThatDependOnTheLoadMarkTheirQuality) {
  input_.qualities = {{.trial_id = 50, .content_key = "key", .windows = {QualityRow()}}};
  for (TrialResult& trial : input_.trials) trial.quality_key = "key";
  const auto note = [&](const char* cause) {
    for (TrialResult& trial : input_.trials) trial.load_dependence = cause;
    return Compared().cells[0].arms[1].quality->note;
  };
  EXPECT_THAT(note("batch"), HasSubstr("depend on its batch mates"));
  EXPECT_THAT(note("chunks"), HasSubstr("borders of chunks"));
  EXPECT_EQ(note(""), "");
}

TEST_F(ReportTest, QualityIsShownByPositionAndDepth) {
  QualityRow window;
  window.set_scored_tokens(128);
  window.set_nll_sum(256);
  window.set_reference_nll_sum(250);
  for (uint32_t part = 0; part < 2; ++part) {
    QualityPositions& positions = *window.add_positions();
    positions.set_first_position(256 + 64 * part);
    positions.set_scored_tokens(64);
    positions.set_nll_sum(128);
    positions.set_reference_nll_sum(125);
    positions.set_kl_sum(part == 0 ? 6.4 : 19.2);
    positions.set_top1_matches(part == 0 ? 64 : 32);
  }
  std::vector<PasskeyRow> passkeys(20);
  for (size_t i = 0; i < 20; ++i) {
    passkeys[i].set_depth(i < 10 ? 0.1 : 0.9);
    passkeys[i].set_digits(5);
    passkeys[i].set_recalled(i >= 10);
    passkeys[i].set_correct_digits(i < 10 ? 1 : 5);
    passkeys[i].set_reference_recalled(i != 0);
  }
  input_.qualities = {{.trial_id = 50,
                       .content_key = "key",
                       .windows = {window, window},
                       .passkeys = std::move(passkeys)}};
  for (TrialResult& trial : input_.trials) {
    if (trial.arm == 1) trial.quality_key = "key";
  }
  const Comparison comparison = Compared();
  const ComparedQuality& quality = *comparison.cells[0].arms[1].quality;
  ASSERT_EQ(quality.positions.size(), 2u);
  EXPECT_EQ(quality.positions[1].first_position, 320u);
  EXPECT_EQ(quality.positions[1].scored_tokens, 128u);
  EXPECT_DOUBLE_EQ(quality.positions[1].kl, 0.3);
  EXPECT_DOUBLE_EQ(quality.positions[1].ppl, std::exp(2.0));
  EXPECT_DOUBLE_EQ(quality.positions[1].top1_agreement, 0.5);
  ASSERT_EQ(quality.recall.size(), 2u);
  EXPECT_EQ(quality.recall[0].recalled, 0u);
  EXPECT_EQ(quality.recall[0].reference_recalled, 9u);
  EXPECT_EQ(quality.recall[1].recalled, 10u);
  EXPECT_NEAR(quality.recall[1].interval.low, 0.7225, 1e-4) << "Wilson, 10 of 10";
  const std::string table = FormatComparison(comparison, ReportFormat::kTable);
  EXPECT_THAT(table, HasSubstr("from 320"));
  EXPECT_THAT(table, HasSubstr("10/10 [0.72, 1.0]"));
  EXPECT_THAT(table, HasSubstr("(full cache)"));
  const auto json = nlohmann::json::parse(FormatComparison(comparison, ReportFormat::kJson));
  const auto& told = json["cells"][0]["arms"][1]["quality"];
  EXPECT_DOUBLE_EQ(told["positions"][0]["kl"], 0.1);
  EXPECT_EQ(told["passkeys"][1]["recalled"], 10);
}

TEST_F(ReportTest, RandomWeightsHaveNoQuality) {
  input_.random_weights = true;
  EXPECT_EQ(Compared().cells[0].arms[1].quality->note, "none: the weights are random");
}

TEST_F(ReportTest, UnknownMetricsAreRefusedWithTheNearestName) {
  EXPECT_EQ(std::string(Compare(input_, {.metrics = {"mean_tfft_ms"}}).status().message()),
            "unknown metric \"mean_tfft_ms\"; did you mean \"mean_ttft_ms\"?");
  input_.trials[0].cell = 9;
  EXPECT_THAT(std::string(Compare(input_, {}).status().message()),
              HasSubstr("trial 1 names an arm or cell"));
}

TEST_F(ReportTest, TableIsAlignedAndFitsATerminal) {
  EXPECT_EQ(Table(),
            "quickstart · model books · reference paged · regime equal_device_bytes\n"
            "\n"
            "rate=4/s   [cpu · Xeon · time: real]\n"
            "                                output\n"
            "                 mean_ttft  throughput  attended\n"
            "  arm     n           (ms)     (tok/s)  fraction  engaged\n"
            "  paged   3      1167 ±517     50.0 ±0      1.00        -\n"
            "  h2o-20  3      1068 ±518     50.0 ±0     0.200      yes\n"
            "             -8.5% ±0.21 ✓           =\n"
            "\n"
            "✓ better than paged, ✗ worse, ~ cannot tell, = the same\n"
            "± is half the width of the 95 % t interval over repeats; differences are to paged in "
            "the same round, in % of it.\n"
            "No verdict where the interval of the difference holds 0. Intervals stand alone: of "
            "many, some miss.\n"
            "Timings of the CPU backend say nothing about a GPU.\n");
}

// What `compare` prints by default must fit: four differences, three counts, quality beside them.
TEST_F(ReportTest, DefaultTableFitsAWideTerminal) {
  for (TrialResult& trial : input_.trials) {
    trial.metrics = {};
    for (const std::string& name : DefaultMetrics()) {
      trial.metrics.push_back({name, 12345.6 + trial.arm * 777 + trial.repeat * 33, ""});
    }
    trial.quality_key = "key";
  }
  const std::vector<std::string> lines =
      absl::StrSplit(FormatComparison(Compared(DefaultMetrics()), ReportFormat::kTable), '\n');
  for (const std::string& line : lines) {
    const auto is_start = [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; };
    EXPECT_LE(std::count_if(line.begin(), line.end(), is_start), 160) << line;
  }
}

TEST_F(ReportTest, MarkdownHasOneTableForEachCell) {
  const std::string text = FormatComparison(Compared(), ReportFormat::kMarkdown);
  EXPECT_THAT(text, HasSubstr("## rate=4/s\n\ncpu · Xeon · time: real\n\n| arm | n | mean_ttft_ms "
                              "| output_throughput (tok/s) |"));
  EXPECT_THAT(text, HasSubstr("| h2o-20 | 3 | 1068 ±518 (-8.5% ±0.21 better) |"));
}

TEST_F(ReportTest, CsvHasOneLineForEachFigure) {
  input_.arms[1].name = "h2o, 20 \"percent\"";
  const std::string text = FormatComparison(Compared(), ReportFormat::kCsv);
  const std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 1u + 2 * 2);
  EXPECT_THAT(lines[3],
              HasSubstr("quickstart,rate=4/s,\"h2o, 20 \"\"percent\"\"\",h2o,mean_ttft_ms,ms,3,"));
  EXPECT_THAT(lines[3], HasSubstr(",better,"));
}

TEST_F(ReportTest, JsonHoldsEverything) {
  input_.trials[0].context.device = "bad \xff bytes";
  const auto json = nlohmann::json::parse(
      FormatComparison(Compared({"mean_ttft_ms", "p99_ttft_ms"}), ReportFormat::kJson));
  EXPECT_EQ(json["cells"][0]["arms"][1]["metrics"][0]["verdict"], "better");
  EXPECT_TRUE(json["cells"][0]["arms"][1]["metrics"][1]["value"].is_null());
  EXPECT_EQ(json["cells"][0]["arms"][1]["metrics"][1]["reason"], "24 values; p99 needs 100");
  EXPECT_EQ(json["cells"][0]["context"]["time_mode"], "real");
}

TEST_F(ReportTest, BackendAndTimeAreSaid) {
  EXPECT_THAT(Table(), HasSubstr("Timings of the CPU backend say nothing about a GPU."));
  for (TrialResult& trial : input_.trials) trial.context.time_mode = "modelled:h200";
  EXPECT_THAT(Table(), HasSubstr("Modelled time is computed from a cost model"));
  EXPECT_THAT(Table(), Not(HasSubstr("Timings of the CPU")));
  input_.trials.clear();
  EXPECT_THAT(Table(), HasSubstr("[no result yet]"));
}

TEST(TrialBlockTest, IsVllmsBlock) {
  std::vector<RequestRow> rows(1);
  rows[0].set_output_tokens(2);
  rows[0].set_prompt_tokens(5);
  rows[0].set_first_token_ns(100'000'000);
  rows[0].add_token_gap_ns(12'500'000);
  rows[0].set_finished_ns(112'500'000);
  const std::vector<SummaryMetric> metrics = Summarise({.requests = rows});
  const std::string block = FormatTrialBlock("Serving Benchmark Result", metrics);
  EXPECT_THAT(block, HasSubstr("============ Serving Benchmark Result ============\n"
                               "Successful requests:                     1\n"));
  EXPECT_THAT(block, HasSubstr("---------------Time to First Token----------------\n"
                               "Mean TTFT (ms):                          100.00\n"));
  EXPECT_THAT(block,
              HasSubstr("P99 TTFT (ms):                           n/a (1 values; p99 needs 100)"));
  const auto json = nlohmann::json::parse(FormatTrialJson(metrics));
  EXPECT_EQ(json["mean_tpot_ms"], 12.5);
  EXPECT_TRUE(json["p99_ttft_ms"].is_null());
  EXPECT_EQ(json["reasons"]["p99_ttft_ms"], "1 values; p99 needs 100");
}

TEST(ReportFormatTest, NamesAreParsed) {
  EXPECT_EQ(*ParseReportFormat("csv"), ReportFormat::kCsv);
  EXPECT_THAT(std::string(ParseReportFormat("xml").status().message()),
              HasSubstr("table, markdown, json or csv"));
}

}  // namespace
}  // namespace kvsweep
