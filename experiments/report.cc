// Computing the comparison; report_format.cc writes it.
#include "experiments/report.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <span>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/text.h"
#include "experiments/spec.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

std::optional<double> FindValue(const std::vector<SummaryMetric>& metrics, absl::string_view name) {
  for (const SummaryMetric& metric : metrics) {
    if (metric.name == name) return metric.value;
  }
  return std::nullopt;
}

std::string FindReason(const std::vector<SummaryMetric>& metrics, absl::string_view name) {
  for (const SummaryMetric& metric : metrics) {
    if (metric.name == name) return metric.reason;
  }
  return absl::StrCat(name, " is not stored for this trial");
}

// What tells two contexts apart, for people: `device "A" instead of "B"`.
std::string ContextDifference(const TrialContext& a, const TrialContext& b) {
  std::vector<std::string> parts;
  const auto compare = [&](absl::string_view name, const std::string& x, const std::string& y) {
    if (x != y) parts.push_back(absl::StrCat(name, " \"", x, "\" instead of \"", y, "\""));
  };
  compare("backend", a.backend, b.backend);
  compare("device", a.device, b.device);
  compare("device class", a.device_class, b.device_class);
  compare("driver", a.driver, b.driver);
  compare("time", a.time_mode, b.time_mode);
  compare("method", absl::StrCat(a.method_version), absl::StrCat(b.method_version));
  return absl::StrJoin(parts, ", ");
}

using Trials = std::vector<const TrialResult*>;

// The context of most trials; the smallest on a tie, so that the choice does not depend on their
// order.
TrialContext MostFrequentContext(const Trials& trials) {
  std::map<TrialContext, size_t> counts;
  for (const TrialResult* trial : trials) {
    // A trial that died before it measured has none.
    if (!trial->context.backend.empty()) ++counts[trial->context];
  }
  TrialContext best;
  size_t most = 0;
  for (const auto& [context, count] : counts) {
    if (count > most) best = context;
    most = std::max(most, count);
  }
  return best;
}

// Mean of a metric within each repeat: the reference runs once for each group of arms.
std::vector<double> ValuesByRepeat(const Trials& trials, absl::string_view metric) {
  std::map<uint32_t, std::vector<double>> by_repeat;
  for (const TrialResult* trial : trials) {
    const std::optional<double> value = FindValue(trial->metrics, metric);
    if (value) by_repeat[trial->repeat].push_back(*value);
  }
  std::vector<double> means;
  for (const auto& [repeat, values] : by_repeat) means.push_back(EstimateMean(values).mean);
  return means;
}

// Values of two arms from the rounds that both have.
struct Pairs {
  std::vector<double> values;
  std::vector<double> baseline;
};

Pairs PairByRound(const Trials& trials, const Trials& reference, absl::string_view metric) {
  std::map<uint64_t, double> baseline;
  for (const TrialResult* trial : reference) {
    const std::optional<double> value = FindValue(trial->metrics, metric);
    if (value) baseline[trial->round_id] = *value;
  }
  Pairs pairs;
  for (const TrialResult* trial : trials) {
    const std::optional<double> value = FindValue(trial->metrics, metric);
    const auto found = baseline.find(trial->round_id);
    if (!value || found == baseline.end()) continue;
    pairs.values.push_back(*value);
    pairs.baseline.push_back(found->second);
  }
  return pairs;
}

Verdict Judge(const MeanEstimate& difference, Direction direction) {
  if (direction == Direction::kNeutral) return Verdict::kNone;
  if (!difference.half_width || std::abs(difference.mean) <= *difference.half_width) {
    return Verdict::kCannotTell;
  }
  const bool lower = difference.mean < 0;
  return lower == (direction == Direction::kLowerIsBetter) ? Verdict::kBetter : Verdict::kWorse;
}

class Comparer {
 public:
  Comparer(const ReportInput& input, const CompareOptions& options)
      : input_(input), confidence_(options.confidence) {
    for (const QualityResult& quality : input.qualities) qualities_[quality.content_key] = &quality;
  }

  ComparedCell CompareCell(size_t cell, const std::vector<std::string>& metrics) const {
    std::vector<Trials> by_arm(input_.arms.size());
    Trials all;
    for (const TrialResult& trial : input_.trials) {
      if (trial.cell != cell) continue;
      by_arm[trial.arm].push_back(&trial);
      all.push_back(&trial);
    }
    const Trials& references = by_arm[input_.reference];
    ComparedCell compared = {.cell = input_.cells[cell]};
    compared.context = MostFrequentContext(references.empty() ? all : references);
    const Trials usable_reference = Usable(references, compared.context);

    std::vector<size_t> order = {input_.reference};
    for (size_t arm = 0; arm < by_arm.size(); ++arm) {
      if (arm != input_.reference) order.push_back(arm);
    }
    ComparedArm of_reference;
    const bool reference_engaged = DescribeEngagement(usable_reference, &of_reference).empty();
    for (const size_t arm : order) {
      compared.arms.push_back(CompareArm(arm, by_arm[arm], usable_reference, reference_engaged,
                                         compared.context, metrics));
    }
    return compared;
  }

 private:
  static Trials Usable(const Trials& trials, const TrialContext& context) {
    Trials usable;
    for (const TrialResult* trial : trials) {
      if (trial->outcome == OUTCOME_OK && trial->context == context) usable.push_back(trial);
    }
    return usable;
  }

  ComparedArm CompareArm(size_t arm, const Trials& trials, const Trials& reference,
                         bool reference_engaged, const TrialContext& context,
                         const std::vector<std::string>& metrics) const {
    const Trials usable = Usable(trials, context);
    ComparedArm compared = {.arm = input_.arms[arm].name, .strategy = input_.arms[arm].strategy};
    std::set<uint32_t> repeats;
    for (const TrialResult* trial : usable) repeats.insert(trial->repeat);
    compared.repeats = repeats.size();
    for (const TrialResult* trial : trials) ++compared.outcomes[OutcomeName(trial->outcome)];
    std::string withheld = DescribeEngagement(usable, &compared);
    if (withheld.empty() && !reference_engaged) withheld = "the reference did not engage";
    for (const std::string& metric : metrics) {
      compared.metrics.push_back(
          CompareMetric(metric, arm == input_.reference, trials, usable, reference, withheld));
      const ComparedMetric& last = compared.metrics.back();
      if (last.value && last.value->count < compared.repeats) {
        compared.notes.push_back(absl::StrCat(metric, ": of ", last.value->count, " of ",
                                              compared.repeats, " repeats; the others have none"));
      }
    }
    const std::vector<double> attended = ValuesByRepeat(usable, "attended_fraction");
    if (!attended.empty()) compared.attended_fraction = EstimateMean(attended).mean;
    for (const std::string& name : TelemetryMetrics()) {
      const std::vector<double> values = ValuesByRepeat(usable, name);
      if (!values.empty()) compared.telemetry[name] = EstimateMean(values).mean;
    }
    compared.quality = FindQuality(trials, compared);
    AddNotes(trials, context, &compared);
    AddRegimeNote(trials, &compared);
    return compared;
  }

  // Fills in the engagement; returns why verdicts are withheld, if they are.
  static std::string DescribeEngagement(const Trials& usable, ComparedArm* compared) {
    size_t engaged = 0;
    size_t ruled = 0;
    for (const TrialResult* trial : usable) {
      ruled += trial->engagement != Engagement::kNoRule;
      engaged += trial->engagement == Engagement::kEngaged;
    }
    if (ruled == 0) {
      compared->engagement = "-";
    } else if (engaged == ruled) {
      compared->engagement = "engaged";
    } else {
      compared->engagement =
          engaged == 0 ? "not engaged" : absl::StrCat("engaged ", engaged, " of ", ruled);
      return "the strategy did not engage";
    }
    return "";
  }

  ComparedMetric CompareMetric(const std::string& name, bool is_reference, const Trials& trials,
                               const Trials& usable, const Trials& reference,
                               const std::string& withheld) const {
    ComparedMetric compared = {.name = name};
    const std::vector<double> values = ValuesByRepeat(usable, name);
    if (values.empty()) {
      compared.reason = usable.empty()
                            ? (trials.empty() ? "no trial yet" : "no trial with outcome ok")
                            : FindReason(usable.front()->metrics, name);
      return compared;
    }
    compared.value = EstimateMean(values, confidence_);
    if (is_reference) {
      compared.verdict = Verdict::kReference;
      return compared;
    }
    const Pairs pairs = PairByRound(usable, reference, name);
    if (pairs.values.empty()) {
      compared.reason = "no round in which the reference has this figure too";
      return compared;
    }
    compared.difference = EstimatePairedDifference(pairs.values, pairs.baseline, confidence_);
    const double scale = EstimateMean(pairs.baseline).mean;
    if (scale != 0) {
      compared.relative = compared.difference->mean / std::abs(scale);
      if (compared.difference->half_width) {
        compared.relative_half_width = *compared.difference->half_width / std::abs(scale);
      }
    }
    const MetricInfo* info = FindMetric(name);
    KVSWEEP_CHECK(info != nullptr) << name;
    compared.verdict =
        withheld.empty() ? Judge(*compared.difference, info->direction) : Verdict::kNone;
    compared.reason = withheld;
    if (compared.verdict == Verdict::kCannotTell && !compared.difference->half_width) {
      compared.reason = "one repeat has no interval";
    }
    return compared;
  }

  std::optional<ComparedQuality> FindQuality(const Trials& trials,
                                             const ComparedArm& compared) const {
    ComparedQuality quality;
    if (input_.random_weights) {
      quality.note = "none: the weights are random";
      return quality;
    }
    if (trials.empty() || trials.front()->quality_key.empty()) return std::nullopt;
    const auto found = qualities_.find(trials.front()->quality_key);
    if (found == qualities_.end()) {
      quality.note = "its quality trial has not finished";
      return quality;
    }
    const QualityResult& result = *found->second;
    if (result.outcome != OUTCOME_OK) {
      quality.note = absl::StrCat(OutcomeName(result.outcome), ": ", result.evidence);
      return quality;
    }
    quality.trial_id = result.trial_id;
    quality.metrics = SummariseQuality(result.windows, result.passkeys);
    quality.windows = result.windows.size();
    quality.intervals = QualityIntervals(result.windows, confidence_);
    quality.positions = QualityByPosition(result.windows, confidence_);
    quality.recall = RecallByDepth(result.passkeys, confidence_);
    quality.note = LoadDependence(trials, compared.strategy);
    return quality;
  }

  // Why the quality of the trial of its own need not be that of these outputs; empty: it is.
  static std::string LoadDependence(const Trials& trials, const std::string& strategy) {
    const std::string& cause = trials.front()->load_dependence;
    if (cause == "batch") {
      return "count_scope: batch makes a request's output depend on its batch mates; the quality "
             "under this load may differ";
    }
    if (cause == "chunks") {
      return "prefill_evict: chunk prunes at the borders of chunks, which depend on the load; the "
             "quality under this load may differ";
    }
    // Victims of a swap that found no room on the host start anew too.
    const bool depends =
        cause == "recompute" || FindStrategyTraits(*Arm::descriptor(), strategy).history_dependent;
    const auto happened = [&](absl::string_view metric) {
      const std::vector<double> values = ValuesByRepeat(trials, metric);
      return std::any_of(values.begin(), values.end(), [](double value) { return value > 0; });
    };
    const bool recomputed =
        cause == "recompute" ? happened("preemptions") : happened("recomputed_tokens");
    if (!depends || !recomputed) return "";
    return absl::StrCat("requests were preempted by recompute, which does not restore what ",
                        strategy, " kept; the quality under this load may differ");
  }

  // Trials that did not stay in the regime that is claimed: where KV fits, and where the same
  // requests run side by side, nobody waits for memory or is sent away.
  void AddRegimeNote(const Trials& trials, ComparedArm* compared) const {
    if (input_.regime == Experiment::REGIME_EQUAL_DEVICE_BYTES) return;
    size_t left = 0;
    for (const TrialResult* trial : trials) {
      const auto positive = [&](absl::string_view metric) {
        return FindValue(trial->metrics, metric).value_or(0) > 0;
      };
      left += trial->outcome == OUTCOME_OOM || positive("preemptions") ||
              positive("memory_short_steps") || positive("infeasible_requests");
    }
    if (left == 0) return;
    compared->notes.push_back(absl::StrCat(
        left, " of ", trials.size(), " trial(s) left the regime ", RegimeName(input_.regime),
        ": requests were preempted, waited for memory or could not fit"));
  }

  // What a reader must know before trusting the arm's figures.
  static void AddNotes(const Trials& trials, const TrialContext& context, ComparedArm* compared) {
    std::map<std::string, size_t> foreign;
    std::set<std::string> evidence;
    size_t repeated = 0;
    for (const TrialResult* trial : trials) {
      // What never ran has no context.
      const bool ran = !trial->context.backend.empty();
      if (ran && trial->context != context) ++foreign[ContextDifference(trial->context, context)];
      if (trial->outcome != OUTCOME_OK && evidence.size() < 3) {
        evidence.insert(absl::StrCat(OutcomeName(trial->outcome), ": ", trial->evidence));
      }
      repeated += trial->executions > 1;
    }
    for (const auto& [difference, count] : foreign) {
      compared->notes.push_back(
          absl::StrCat(count, " trial(s) left out, from an unlike context: ", difference));
    }
    for (const std::string& text : evidence) compared->notes.push_back(text);
    if (repeated > 0) {
      compared->notes.push_back(
          absl::StrCat(repeated, " trial(s) were repeated after their runner died"));
    }
  }

  const ReportInput& input_;
  const double confidence_;
  std::map<std::string, const QualityResult*> qualities_;
};

// Notes about the whole.
std::vector<std::string> GeneralNotes(const ReportInput& input, const Comparison& comparison,
                                      double confidence) {
  std::vector<std::string> notes;
  std::set<uint64_t> rounds;
  for (const TrialResult& trial : input.trials) {
    if (trial.outcome != OUTCOME_CANCELLED) rounds.insert(trial.round_id);
  }
  const uint64_t finished = rounds.size() + input.qualities.size();
  if (finished < input.rounds_planned) {
    notes.push_back(
        absl::StrCat("partial: ", finished, " of ", input.rounds_planned, " rounds have results"));
  }
  notes.push_back(absl::StrCat("± is half the width of the ", FormatNumber(100 * confidence),
                               " % t interval over repeats; differences are to ",
                               comparison.reference, " in the same round, in % of it."));
  notes.push_back(
      "No verdict where the interval of the difference holds 0. Intervals stand alone: of many, "
      "some miss.");
  bool cpu = false;
  bool modelled = false;
  for (const ComparedCell& cell : comparison.cells) {
    cpu |= cell.context.backend == "cpu" && cell.context.time_mode == "real";
    modelled |= absl::StartsWith(cell.context.time_mode, "modelled");
  }
  if (cpu) notes.push_back("Timings of the CPU backend say nothing about a GPU.");
  if (modelled) notes.push_back("Modelled time is computed from a cost model, not measured.");
  return notes;
}

absl::Status CheckInput(const ReportInput& input) {
  if (input.arms.empty() || input.reference >= input.arms.size()) {
    return absl::InvalidArgumentError("the experiment has no reference arm");
  }
  for (const TrialResult& trial : input.trials) {
    if (trial.arm >= input.arms.size() || trial.cell >= input.cells.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("trial ", trial.trial_id, " names an arm or cell that does not exist"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<std::string> DefaultMetrics() {
  return {"mean_ttft_ms", "mean_tpot_ms",      "output_throughput", "slo_attainment",
          "preemptions",  "kv_tokens_evicted", "kv_entries_fetched"};
}

absl::StatusOr<Comparison> Compare(const ReportInput& input, const CompareOptions& options) {
  if (absl::Status status = CheckInput(input); !status.ok()) return status;
  Comparison comparison = {.experiment = input.experiment,
                           .model = input.model,
                           .regime = RegimeName(input.regime),
                           .reference = input.arms[input.reference].name,
                           .metrics = options.metrics};
  if (comparison.metrics.empty()) comparison.metrics = DefaultMetrics();
  for (const std::string& name : comparison.metrics) {
    const MetricInfo* info = FindMetric(name);
    std::vector<std::string> names;
    for (const MetricInfo& known : Metrics()) names.push_back(known.name);
    if (info != nullptr && std::find(names.begin(), names.end(), name) != names.end()) continue;
    const std::optional<std::string> nearest = NearestName(name, names);
    return absl::InvalidArgumentError(
        absl::StrCat("unknown metric \"", name, "\"",
                     nearest ? absl::StrCat("; did you mean \"", *nearest, "\"?")
                             : std::string("; docs/METRICS.md lists them")));
  }
  const Comparer comparer(input, options);
  for (size_t cell = 0; cell < input.cells.size(); ++cell) {
    comparison.cells.push_back(comparer.CompareCell(cell, comparison.metrics));
  }
  comparison.notes = GeneralNotes(input, comparison, options.confidence);
  return comparison;
}

}  // namespace kvsweep
