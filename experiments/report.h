// The answer: which arm wins, where, by how much, how sure, at what cost in quality. Input are the
// stored trials of one experiment as plain values; output is a Comparison, and four ways to write
// it.
//
// Rules: an arm's figure is its mean over repeats with a t interval. A difference is paired: arm
// minus reference inside the same round, then averaged. Trials whose outcome is not ok are counted,
// never averaged. An arm with infeasible requests has no latency verdict, since it served fewer. An
// arm that did not engage is shown and labelled without verdict. Rows of unlike contexts (device,
// driver, backend, time mode, build's method) are not compared: the reference's most frequent
// context rules, others are counted and named.
#ifndef KVSWEEP_EXPERIMENTS_REPORT_H_
#define KVSWEEP_EXPERIMENTS_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "experiments/metrics.h"
#include "experiments/stats.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

// The context in which a trial's numbers are true: two rows compare only if these are equal.
struct TrialContext {
  std::string backend;  // "cpu", "cuda"
  std::string device;
  std::string device_class;
  std::string driver;
  std::string time_mode;  // "real", "modelled:<profile>"
  uint32_t method_version = 0;

  bool operator==(const TrialContext&) const = default;
  auto operator<=>(const TrialContext&) const = default;
};

// One accepted load trial.
struct TrialResult {
  uint64_t trial_id = 0;
  uint64_t round_id = 0;  // differences are paired inside a round
  size_t arm = 0;         // index into ReportInput::arms
  size_t cell = 0;        // index into ReportInput::cells
  uint32_t repeat = 0;
  Outcome outcome = OUTCOME_OK;
  std::string evidence;
  TrialContext context;
  std::string runner_build;
  uint32_t executions = 1;             // more: the runner died and the trial was repeated
  std::vector<SummaryMetric> metrics;  // of Summarise
  Engagement engagement = Engagement::kNoRule;
  std::string quality_key;  // content key of its quality trial; empty: none
  // What makes the arm's outputs depend on the load: "recompute", "chunks", "batch"; empty: nothing.
  std::string load_dependence;
};

// One accepted quality trial.
struct QualityResult {
  uint64_t trial_id = 0;
  std::string content_key;
  Outcome outcome = OUTCOME_OK;
  std::string evidence;
  std::vector<QualityRow> windows;
  std::vector<PasskeyRow> passkeys;
};

struct ReportArm {
  std::string name;
  std::string strategy;
};

// Everything that a comparison is computed from.
struct ReportInput {
  std::string experiment;       // name
  std::string model;            // for the heading
  bool random_weights = false;  // quality is "none"
  Experiment::Regime regime = Experiment::REGIME_EQUAL_DEVICE_BYTES;  // what is claimed
  uint32_t repeats = 0;         // planned
  uint64_t rounds_planned = 0;  // quality rounds included
  std::vector<ReportArm> arms;
  std::vector<std::string> cells;  // names
  size_t reference = 0;            // index into arms
  std::vector<TrialResult> trials;
  std::vector<QualityResult> qualities;
};

enum class Verdict {
  kReference,
  kBetter,
  kWorse,
  kCannotTell,  // the interval of the difference holds 0, or there is no interval
  kNone,        // not comparable: the reason stands in the row
};

// One metric of one arm in one cell.
struct ComparedMetric {
  std::string name;
  std::optional<MeanEstimate> value;       // absent: the reason below
  std::optional<MeanEstimate> difference;  // arm - reference, paired; absent for the reference
  std::optional<double> relative;  // difference / mean of the reference over the same rounds
  std::optional<double> relative_half_width;
  Verdict verdict = Verdict::kNone;
  std::string reason;
};

// Quality in one part of the windows: how it drifts along a text.
struct PositionQuality {
  uint32_t first_position = 0;
  uint64_t scored_tokens = 0;
  double ppl = 0;
  double reference_ppl = 0;
  double kl = 0;
  std::optional<Interval> kl_interval;
  double top1_agreement = 0;
};

// Pass keys recalled at one depth, with Wilson's interval, beside the full cache's.
struct DepthRecall {
  double depth = 0;
  uint64_t prompts = 0;
  uint64_t recalled = 0;
  Interval interval;
  uint64_t reference_recalled = 0;
  Interval reference_interval;
};

// Quality of one arm. Intervals by bootstrap over the windows; there are none of one window.
struct ComparedQuality {
  uint64_t trial_id = 0;
  std::vector<SummaryMetric> metrics;         // of SummariseQuality
  std::map<std::string, Interval> intervals;  // of metrics that have one, by name
  size_t windows = 0;
  std::vector<PositionQuality> positions;
  std::vector<DepthRecall> recall;
  std::string note;  // why there is none, or a mark on the figure
};

// Intervals of the quality metrics by name, the parts of a quality trial's windows, and its pass
// keys by depth.
std::map<std::string, Interval> QualityIntervals(const std::vector<QualityRow>& windows,
                                                 double confidence);
std::vector<PositionQuality> QualityByPosition(const std::vector<QualityRow>& windows,
                                               double confidence);
std::vector<DepthRecall> RecallByDepth(const std::vector<PasskeyRow>& passkeys, double confidence);

struct ComparedArm {
  std::string arm;
  std::string strategy;
  size_t repeats = 0;                       // trials averaged
  std::map<std::string, size_t> outcomes;   // by name; all trials
  std::string engagement;                   // "-", "engaged", "not engaged", "engaged 2 of 3"
  std::vector<ComparedMetric> metrics;      // in the order of Comparison::metrics
  std::optional<double> attended_fraction;  // mean over repeats
  std::map<std::string, double> telemetry;  // likewise, those of TelemetryMetrics that it has
  std::optional<ComparedQuality> quality;
  std::vector<std::string> notes;  // evidence, unlike contexts, repeated executions
};

struct ComparedCell {
  std::string cell;
  TrialContext context;
  std::vector<ComparedArm> arms;  // the reference first, then in the order of the input
};

struct Comparison {
  std::string experiment;
  std::string model;
  std::string regime;  // memory regime that is claimed; arms that leave it say so in their notes
  std::string reference;
  std::vector<std::string> metrics;
  std::vector<ComparedCell> cells;
  std::vector<std::string>
      notes;  // about the whole: missing rounds, what intervals mean, which time it is from
};

struct CompareOptions {
  std::vector<std::string> metrics;  // empty: DefaultMetrics()
  double confidence = 0.95;
};

// What `compare` shows when nothing is asked for.
std::vector<std::string> DefaultMetrics();

// Computes the comparison. InvalidArgument for an unknown metric (with the nearest name).
absl::StatusOr<Comparison> Compare(const ReportInput& input, const CompareOptions& options);

enum class ReportFormat { kTable, kMarkdown, kJson, kCsv };

// "table", "markdown", "json", "csv".
absl::StatusOr<ReportFormat> ParseReportFormat(absl::string_view name);

// Writes a comparison. kTable is for a terminal of 120 columns or more; kCsv has one line for each
// cell × arm × metric; kJson holds everything.
std::string FormatComparison(const Comparison& comparison, ReportFormat format);

// The console block of vLLM's `bench serve` for one trial.
std::string FormatTrialBlock(absl::string_view title, const std::vector<SummaryMetric>& metrics);

// What the device did during a trial, how far its decode steps are from the machine's limits, and
// where their time goes, as a bar for each part. Empty when nothing of it was measured.
std::string FormatTelemetry(const std::vector<SummaryMetric>& metrics);

// One trial as the flat JSON of vLLM's benchmarks: metric names to numbers or null, and "reasons"
// for the nulls.
std::string FormatTrialJson(const std::vector<SummaryMetric>& metrics);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_REPORT_H_
