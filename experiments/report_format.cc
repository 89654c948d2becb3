// A comparison as table, markdown, JSON and CSV.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/text.h"
#include "experiments/report.h"

namespace kvsweep {
namespace {

using Json = nlohmann::ordered_json;

// --------------------------------------------------------------------------------- numbers as text

// `digits` significant digits, without exponent for what people measure here.
std::string Significant(double value, int digits) {
  if (value == 0 || !std::isfinite(value)) return FormatNumber(value);
  const int magnitude = static_cast<int>(std::floor(std::log10(std::abs(value))));
  if (magnitude < -4) return absl::StrFormat("%.*g", digits, value);
  return absl::StrFormat("%.*f", std::max(0, digits - 1 - magnitude), value);
}

std::string FormatValue(double value, absl::string_view unit) {
  if (unit == "bytes") return FormatBytes(std::llround(value));
  return Significant(value, 3);
}

// "812 ±95".
std::string FormatEstimate(const MeanEstimate& estimate, absl::string_view unit) {
  std::string text = FormatValue(estimate.mean, unit);
  if (!estimate.half_width) return text;
  const std::string half_width = unit == "bytes" ? FormatBytes(std::llround(*estimate.half_width))
                                                 : Significant(*estimate.half_width, 2);
  return absl::StrCat(text, " ±", half_width);
}

absl::string_view VerdictName(Verdict verdict) {
  switch (verdict) {
    case Verdict::kReference:
      return "reference";
    case Verdict::kBetter:
      return "better";
    case Verdict::kWorse:
      return "worse";
    case Verdict::kCannotTell:
      return "cannot tell";
    case Verdict::kNone:
      return "";
  }
  return "";
}

// The verdict as one character: a column holds four such differences.
absl::string_view VerdictMark(Verdict verdict) {
  switch (verdict) {
    case Verdict::kBetter:
      return "✓";
    case Verdict::kWorse:
      return "✗";
    case Verdict::kCannotTell:
      return "~";
    default:
      return "";
  }
}

// "-85.2% ±4.0", or "=" without any difference; empty when there is nothing to say.
std::string FormatDifference(const ComparedMetric& metric) {
  if (!metric.difference || FindMetric(metric.name)->direction == Direction::kNeutral) return "";
  if (metric.difference->mean == 0 && metric.difference->half_width.value_or(0) == 0) return "=";
  if (!metric.relative) {
    const absl::string_view sign = metric.difference->mean > 0 ? "+" : "";
    return absl::StrCat(sign, Significant(metric.difference->mean, 3));
  }
  std::string text = absl::StrFormat("%+.1f%%", 100 * *metric.relative);
  if (metric.relative_half_width) {
    absl::StrAppend(&text, " ±", Significant(100 * *metric.relative_half_width, 2));
  }
  return text;
}

// A difference and what it means, in words or as a mark.
std::string WithVerdict(const ComparedMetric& metric, absl::string_view verdict) {
  const std::string difference = FormatDifference(metric);
  const bool plain = difference.empty() || difference == "=" || verdict.empty();
  return plain ? difference : absl::StrCat(difference, " ", verdict);
}

std::string UnitOf(const std::string& metric) {
  const MetricInfo* info = FindMetric(metric);
  return info == nullptr ? "" : info->unit;
}

std::optional<double> QualityValue(const ComparedArm& arm, absl::string_view name) {
  if (!arm.quality) return std::nullopt;
  for (const SummaryMetric& metric : arm.quality->metrics) {
    if (metric.name == name) return metric.value;
  }
  return std::nullopt;
}

std::string OptionalText(const std::optional<double>& value, int digits) {
  return value ? Significant(*value, digits) : "-";
}

constexpr char kOverPredicted[] = "decode_over_predicted";

std::optional<double> TelemetryValue(const ComparedArm& arm, const std::string& name) {
  const auto found = arm.telemetry.find(name);
  return found == arm.telemetry.end() ? std::nullopt : std::optional<double>(found->second);
}

std::string OutcomesText(const ComparedArm& arm) {
  const auto formatter = [](std::string* out, const auto& entry) {
    absl::StrAppend(out, entry.first, " ", entry.second);
  };
  return arm.outcomes.empty() ? "none" : absl::StrJoin(arm.outcomes, ", ", formatter);
}

bool AllOk(const ComparedArm& arm) {
  return arm.outcomes.empty() || (arm.outcomes.size() == 1 && arm.outcomes.contains("ok"));
}

std::string ContextText(const TrialContext& context) {
  if (context.backend.empty()) return "no result yet";
  return absl::StrCat(context.backend, " · ", context.device, " · time: ", context.time_mode,
                      context.driver.empty() ? "" : absl::StrCat(" · driver ", context.driver));
}

// ------------------------------------------------------------------------------------- text tables

// Characters, not bytes.
size_t Width(absl::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

// Rows of cells, the columns aligned; the first to the left, the others to the right.
class TextTable {
 public:
  void AddRow(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }

  std::string Format(absl::string_view indent) const {
    std::vector<size_t> widths;
    for (const auto& row : rows_) {
      widths.resize(std::max(widths.size(), row.size()));
      for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
    }
    std::string text;
    for (const auto& row : rows_) {
      std::string line(indent);
      for (size_t i = 0; i < row.size(); ++i) {
        const std::string padding(widths[i] - Width(row[i]), ' ');
        absl::StrAppend(&line, i == 0 ? "" : "  ", i == 0 ? row[i] : padding,
                        i == 0 ? padding : row[i]);
      }
      line.erase(line.find_last_not_of(' ') + 1);
      absl::StrAppend(&text, line, "\n");
    }
    return text;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
};

// Breaks a long name at underscores into pieces of about `width`.
std::vector<std::string> BreakName(absl::string_view name, size_t width) {
  std::vector<std::string> lines(1);
  for (absl::string_view part : absl::StrSplit(name, '_')) {
    if (!lines.back().empty() && lines.back().size() + 1 + part.size() > width)
      lines.emplace_back();
    absl::StrAppend(&lines.back(), lines.back().empty() ? "" : "_", part);
  }
  return lines;
}

// Titles of the columns over as many lines as the longest needs, aligned at the bottom.
void AddHeader(const std::vector<std::vector<std::string>>& titles, TextTable* table) {
  size_t height = 0;
  for (const auto& title : titles) height = std::max(height, title.size());
  for (size_t line = 0; line < height; ++line) {
    std::vector<std::string> row;
    for (const auto& title : titles) {
      const size_t skipped = height - title.size();
      row.push_back(line < skipped ? "" : title[line - skipped]);
    }
    table->AddRow(std::move(row));
  }
}

std::vector<std::string> MetricTitle(const std::string& metric) {
  const std::string unit = UnitOf(metric);
  std::string name = metric;
  if (absl::EndsWith(name, "_ms")) name.resize(name.size() - 3);
  std::vector<std::string> lines = BreakName(name, 11);
  if (!unit.empty()) lines.push_back(absl::StrCat("(", unit, ")"));
  return lines;
}

std::string ValueText(const ComparedMetric& metric) {
  return metric.value ? FormatEstimate(*metric.value, UnitOf(metric.name)) : "-";
}

std::string FormatCellTable(const ComparedCell& cell, const std::vector<std::string>& metrics,
                            bool with_quality) {
  std::vector<std::vector<std::string>> titles = {{"arm"}, {"n"}};
  for (const std::string& metric : metrics) titles.push_back(MetricTitle(metric));
  titles.push_back({"attended", "fraction"});
  // Of modelled time it says nothing: there are no kernels to look for.
  const bool with_limit = cell.context.time_mode == "real" &&
                          std::ranges::any_of(cell.arms, [](const ComparedArm& arm) {
                            return TelemetryValue(arm, kOverPredicted).has_value();
                          });
  if (with_limit) titles.push_back({"decode", "over", "limit"});
  titles.push_back({"engaged"});
  if (with_quality) {
    titles.insert(titles.end(), {{"ppl"}, {"KL", "(nats)"}, {"top-1", "agree"}});
  }
  TextTable table;
  AddHeader(titles, &table);
  for (const ComparedArm& arm : cell.arms) {
    std::vector<std::string> values = {arm.arm, absl::StrCat(arm.repeats)};
    std::vector<std::string> differences = {"", ""};
    for (const ComparedMetric& metric : arm.metrics) {
      values.push_back(ValueText(metric));
      differences.push_back(WithVerdict(metric, VerdictMark(metric.verdict)));
    }
    values.push_back(OptionalText(arm.attended_fraction, 3));
    if (with_limit) values.push_back(OptionalText(TelemetryValue(arm, kOverPredicted), 3));
    values.push_back(arm.engagement == "engaged" ? "yes" : arm.engagement);
    if (with_quality) {
      values.push_back(OptionalText(QualityValue(arm, "ppl"), 4));
      values.push_back(OptionalText(QualityValue(arm, "kl"), 3));
      values.push_back(OptionalText(QualityValue(arm, "top1_agreement"), 3));
    }
    table.AddRow(std::move(values));
    const bool says = std::any_of(differences.begin(), differences.end(),
                                  [](const std::string& text) { return !text.empty(); });
    if (says) table.AddRow(std::move(differences));
  }
  return table.Format("  ");
}

// What stands beneath an arm's figures.
std::vector<std::string> ArmNotes(const ComparedArm& arm) {
  std::vector<std::string> notes;
  if (!AllOk(arm)) notes.push_back(absl::StrCat("outcomes: ", OutcomesText(arm)));
  notes.insert(notes.end(), arm.notes.begin(), arm.notes.end());
  if (arm.engagement != "-" && arm.engagement != "engaged" && arm.repeats > 0) {
    notes.push_back(absl::StrCat(arm.engagement, ": no verdict is drawn"));
  }
  if (arm.quality && !arm.quality->note.empty()) {
    notes.push_back(absl::StrCat("quality: ", arm.quality->note));
  }
  return notes;
}

bool HasQuality(const Comparison& comparison) {
  for (const ComparedCell& cell : comparison.cells) {
    for (const ComparedArm& arm : cell.arms) {
      if (arm.quality) return true;
    }
  }
  return false;
}

// Metrics that at least one arm of some cell has, so that no empty columns are shown.
std::vector<std::string> ShownMetrics(const Comparison& comparison) {
  std::vector<std::string> shown;
  for (size_t i = 0; i < comparison.metrics.size(); ++i) {
    bool any = false;
    for (const ComparedCell& cell : comparison.cells) {
      for (const ComparedArm& arm : cell.arms) any |= arm.metrics[i].value.has_value();
    }
    if (any) shown.push_back(comparison.metrics[i]);
  }
  return shown.empty() ? comparison.metrics : shown;
}

ComparedCell WithMetrics(ComparedCell cell, const std::vector<std::string>& shown) {
  for (ComparedArm& arm : cell.arms) {
    std::vector<ComparedMetric> kept;
    for (ComparedMetric& metric : arm.metrics) {
      if (std::find(shown.begin(), shown.end(), metric.name) != shown.end())
        kept.push_back(std::move(metric));
    }
    arm.metrics = std::move(kept);
  }
  return cell;
}

// ---------------------------------------------------------------------------- quality in detail

// Rows of text under a heading; the first row holds the titles.
struct Detail {
  std::string heading;
  std::vector<std::vector<std::string>> rows;
};

// Arms with quality, each question once: cells and repeats share it.
std::vector<const ComparedArm*> ArmsWithQuality(const Comparison& comparison) {
  std::vector<const ComparedArm*> arms;
  std::set<uint64_t> seen;
  for (const ComparedCell& cell : comparison.cells) {
    for (const ComparedArm& arm : cell.arms) {
      if (!arm.quality || arm.quality->metrics.empty()) continue;
      if (seen.insert(arm.quality->trial_id).second) arms.push_back(&arm);
    }
  }
  return arms;
}

std::string IntervalText(const std::optional<Interval>& interval) {
  if (!interval) return "";
  return absl::StrCat(" [", Significant(interval->low, 2), ", ", Significant(interval->high, 2),
                      "]");
}

// How each arm drifts along the windows.
Detail PositionDetail(const std::vector<const ComparedArm*>& arms) {
  Detail detail{"KL to the full cache (nats) by position in the window, [bootstrap interval]", {}};
  std::set<uint32_t> starts;
  for (const ComparedArm* arm : arms) {
    for (const PositionQuality& part : arm->quality->positions) starts.insert(part.first_position);
  }
  if (starts.empty()) return detail;
  std::vector<std::string> titles = {"arm"};
  for (const uint32_t start : starts) titles.push_back(absl::StrCat("from ", start));
  detail.rows.push_back(std::move(titles));
  for (const ComparedArm* arm : arms) {
    std::vector<std::string> row = {arm->arm};
    for (const uint32_t start : starts) {
      const auto& parts = arm->quality->positions;
      const auto part = std::find_if(parts.begin(), parts.end(), [&](const PositionQuality& p) {
        return p.first_position == start;
      });
      row.push_back(part == parts.end()
                        ? "-"
                        : absl::StrCat(Significant(part->kl, 3), IntervalText(part->kl_interval)));
    }
    detail.rows.push_back(std::move(row));
  }
  return detail;
}

std::string RecallText(uint64_t recalled, uint64_t prompts, const Interval& interval) {
  return absl::StrCat(recalled, "/", prompts, IntervalText(interval));
}

// Pass keys by depth, the full cache's below.
Detail RecallDetail(const std::vector<const ComparedArm*>& arms) {
  Detail detail{"pass keys recalled by depth, [Wilson interval]", {}};
  std::set<double> depths;
  for (const ComparedArm* arm : arms) {
    for (const DepthRecall& recall : arm->quality->recall) depths.insert(recall.depth);
  }
  if (depths.empty()) return detail;
  std::vector<std::string> titles = {"arm"};
  for (const double depth : depths) titles.push_back(absl::StrCat("at ", FormatNumber(depth)));
  detail.rows.push_back(std::move(titles));
  std::vector<std::string> full(1 + depths.size(), "-");
  full[0] = "(full cache)";
  for (const ComparedArm* arm : arms) {
    std::vector<std::string> row(1 + depths.size(), "-");
    row[0] = arm->arm;
    for (const DepthRecall& recall : arm->quality->recall) {
      const auto column =
          1 + static_cast<size_t>(std::distance(depths.begin(), depths.find(recall.depth)));
      row[column] = RecallText(recall.recalled, recall.prompts, recall.interval);
      full[column] =
          RecallText(recall.reference_recalled, recall.prompts, recall.reference_interval);
    }
    detail.rows.push_back(std::move(row));
  }
  detail.rows.push_back(std::move(full));
  return detail;
}

std::vector<Detail> QualityDetails(const Comparison& comparison) {
  const std::vector<const ComparedArm*> arms = ArmsWithQuality(comparison);
  std::vector<Detail> details = {PositionDetail(arms), RecallDetail(arms)};
  std::erase_if(details, [](const Detail& detail) { return detail.rows.empty(); });
  return details;
}

std::string FormatTable(const Comparison& comparison) {
  std::string text =
      absl::StrCat(comparison.experiment, " · model ", comparison.model, " · reference ",
                   comparison.reference, " · regime ", comparison.regime, "\n");
  const std::vector<std::string> shown = ShownMetrics(comparison);
  const bool with_quality = HasQuality(comparison);
  for (const ComparedCell& cell : comparison.cells) {
    absl::StrAppend(&text, "\n", cell.cell == "-" ? "all" : cell.cell, "   [",
                    ContextText(cell.context), "]\n",
                    FormatCellTable(WithMetrics(cell, shown), shown, with_quality));
    for (const ComparedArm& arm : cell.arms) {
      for (const std::string& note : ArmNotes(arm)) {
        absl::StrAppend(&text, "  ! ", arm.arm, ": ", note, "\n");
      }
    }
  }
  for (const Detail& detail : QualityDetails(comparison)) {
    TextTable table;
    for (const auto& row : detail.rows) table.AddRow(row);
    absl::StrAppend(&text, "\n", detail.heading, "\n", table.Format("  "));
  }
  absl::StrAppend(&text, "\n✓ better than ", comparison.reference,
                  ", ✗ worse, ~ cannot tell, = the same\n");
  for (const std::string& note : comparison.notes) absl::StrAppend(&text, note, "\n");
  return text;
}

// --------------------------------------------------------------------------------- markdown and
// CSV

std::string MarkdownRow(const std::vector<std::string>& cells) {
  std::string row = "|";
  for (const std::string& cell : cells) {
    absl::StrAppend(&row, " ", absl::StrReplaceAll(cell, {{"|", "\\|"}, {"\n", " "}}), " |");
  }
  return row + "\n";
}

std::string FormatMarkdown(const Comparison& comparison) {
  std::string text = absl::StrCat("# ", comparison.experiment, "\n\nModel ", comparison.model,
                                  ", differences against ", comparison.reference, ", regime ",
                                  comparison.regime, ".\n");
  const std::vector<std::string> shown = ShownMetrics(comparison);
  const bool with_quality = HasQuality(comparison);
  std::vector<std::string> titles = {"arm", "n"};
  for (const std::string& metric : shown) {
    const std::string unit = UnitOf(metric);
    titles.push_back(unit.empty() || absl::EndsWith(metric, "_ms")
                         ? metric
                         : absl::StrCat(metric, " (", unit, ")"));
  }
  titles.insert(titles.end(), {"attended fraction", "engagement"});
  if (with_quality) titles.insert(titles.end(), {"ppl", "KL (nats)", "top-1 agreement"});
  for (const ComparedCell& full : comparison.cells) {
    const ComparedCell cell = WithMetrics(full, shown);
    absl::StrAppend(&text, "\n## ", cell.cell == "-" ? "all" : cell.cell, "\n\n",
                    ContextText(cell.context), "\n\n", MarkdownRow(titles),
                    MarkdownRow(std::vector<std::string>(titles.size(), "---")));
    for (const ComparedArm& arm : cell.arms) {
      std::vector<std::string> row = {arm.arm, absl::StrCat(arm.repeats)};
      for (const ComparedMetric& metric : arm.metrics) {
        const std::string difference = WithVerdict(metric, VerdictName(metric.verdict));
        row.push_back(absl::StrCat(ValueText(metric),
                                   difference.empty() ? "" : absl::StrCat(" (", difference, ")")));
      }
      row.insert(row.end(), {OptionalText(arm.attended_fraction, 3), arm.engagement});
      if (with_quality) {
        row.insert(row.end(), {OptionalText(QualityValue(arm, "ppl"), 4),
                               OptionalText(QualityValue(arm, "kl"), 3),
                               OptionalText(QualityValue(arm, "top1_agreement"), 3)});
      }
      absl::StrAppend(&text, MarkdownRow(row));
    }
    for (const ComparedArm& arm : cell.arms) {
      for (const std::string& note : ArmNotes(arm))
        absl::StrAppend(&text, "\n- ", arm.arm, ": ", note);
    }
    absl::StrAppend(&text, "\n");
  }
  for (const Detail& detail : QualityDetails(comparison)) {
    absl::StrAppend(&text, "\n## ", detail.heading, "\n\n", MarkdownRow(detail.rows[0]),
                    MarkdownRow(std::vector<std::string>(detail.rows[0].size(), "---")));
    for (size_t i = 1; i < detail.rows.size(); ++i) {
      absl::StrAppend(&text, MarkdownRow(detail.rows[i]));
    }
  }
  for (const std::string& note : comparison.notes) absl::StrAppend(&text, "\n", note, "\n");
  return text;
}

std::string CsvField(absl::string_view text) {
  if (text.find_first_of(",\"\r\n") == absl::string_view::npos) return std::string(text);
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
}

std::string CsvNumber(const std::optional<double>& value) {
  return value ? FormatNumber(*value) : "";
}

std::string FormatCsv(const Comparison& comparison) {
  std::string text =
      "experiment,cell,arm,strategy,metric,unit,repeats,mean,half_width,difference,"
      "difference_half_width,relative,relative_half_width,verdict,reason,engagement,outcomes,"
      "attended_fraction,ppl,kl,top1_agreement,backend,device,driver,time_mode,regime\n";
  for (const ComparedCell& cell : comparison.cells) {
    for (const ComparedArm& arm : cell.arms) {
      for (const ComparedMetric& metric : arm.metrics) {
        const auto half_width = [](const std::optional<MeanEstimate>& estimate) {
          return estimate ? CsvNumber(estimate->half_width) : "";
        };
        const auto mean = [](const std::optional<MeanEstimate>& estimate) {
          return estimate ? FormatNumber(estimate->mean) : "";
        };
        std::vector<std::string> fields = {comparison.experiment,
                                           cell.cell,
                                           arm.arm,
                                           arm.strategy,
                                           metric.name,
                                           UnitOf(metric.name),
                                           absl::StrCat(arm.repeats),
                                           mean(metric.value),
                                           half_width(metric.value),
                                           mean(metric.difference),
                                           half_width(metric.difference),
                                           CsvNumber(metric.relative),
                                           CsvNumber(metric.relative_half_width),
                                           std::string(VerdictName(metric.verdict)),
                                           metric.reason,
                                           arm.engagement,
                                           OutcomesText(arm),
                                           CsvNumber(arm.attended_fraction),
                                           CsvNumber(QualityValue(arm, "ppl")),
                                           CsvNumber(QualityValue(arm, "kl")),
                                           CsvNumber(QualityValue(arm, "top1_agreement")),
                                           cell.context.backend,
                                           cell.context.device,
                                           cell.context.driver,
                                           cell.context.time_mode,
                                           comparison.regime};
        for (std::string& field : fields) field = CsvField(field);
        absl::StrAppend(&text, absl::StrJoin(fields, ","), "\n");
      }
    }
  }
  return text;
}

// -------------------------------------------------------------------------------------------- JSON

Json ToJson(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

Json ToJson(const std::optional<Interval>& interval) {
  return interval ? Json{interval->low, interval->high} : Json(nullptr);
}

Json ToJson(const std::optional<MeanEstimate>& estimate) {
  if (!estimate) return nullptr;
  return {{"count", estimate->count},
          {"mean", estimate->mean},
          {"half_width", ToJson(estimate->half_width)}};
}

Json ToJson(const ComparedMetric& metric) {
  return {{"name", metric.name},
          {"unit", UnitOf(metric.name)},
          {"value", ToJson(metric.value)},
          {"difference", ToJson(metric.difference)},
          {"relative", ToJson(metric.relative)},
          {"relative_half_width", ToJson(metric.relative_half_width)},
          {"verdict", VerdictName(metric.verdict).data()},
          {"reason", metric.reason}};
}

Json ToJson(const std::vector<SummaryMetric>& metrics) {
  Json values = Json::object();
  Json reasons = Json::object();
  for (const SummaryMetric& metric : metrics) {
    values[metric.name] = ToJson(metric.value);
    if (!metric.value) reasons[metric.name] = metric.reason;
  }
  if (!reasons.empty()) values["reasons"] = std::move(reasons);
  return values;
}

Json ToJson(const ComparedArm& arm) {
  Json json = {{"arm", arm.arm},
               {"strategy", arm.strategy},
               {"repeats", arm.repeats},
               {"outcomes", arm.outcomes},
               {"engagement", arm.engagement},
               {"attended_fraction", ToJson(arm.attended_fraction)}};
  json["telemetry"] = arm.telemetry;
  json["metrics"] = Json::array();
  for (const ComparedMetric& metric : arm.metrics) json["metrics"].push_back(ToJson(metric));
  json["quality"] = nullptr;
  if (arm.quality) {
    Json quality = ToJson(arm.quality->metrics);
    quality["windows"] = arm.quality->windows;
    for (const auto& [name, interval] : arm.quality->intervals) {
      quality[absl::StrCat(name, "_interval")] = ToJson(interval);
    }
    for (const PositionQuality& part : arm.quality->positions) {
      quality["positions"].push_back({{"first_position", part.first_position},
                                      {"scored_tokens", part.scored_tokens},
                                      {"ppl", part.ppl},
                                      {"reference_ppl", part.reference_ppl},
                                      {"kl", part.kl},
                                      {"kl_interval", ToJson(part.kl_interval)},
                                      {"top1_agreement", part.top1_agreement}});
    }
    for (const DepthRecall& recall : arm.quality->recall) {
      quality["passkeys"].push_back({{"depth", recall.depth},
                                     {"prompts", recall.prompts},
                                     {"recalled", recall.recalled},
                                     {"interval", ToJson(recall.interval)},
                                     {"reference_recalled", recall.reference_recalled},
                                     {"reference_interval", ToJson(recall.reference_interval)}});
    }
    if (!arm.quality->note.empty()) quality["note"] = arm.quality->note;
    json["quality"] = std::move(quality);
  }
  json["notes"] = arm.notes;
  return json;
}

// Text from devices and evidence may hold anything; what is not UTF-8 is replaced rather than
// thrown on.
std::string Dump(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string FormatJson(const Comparison& comparison) {
  Json json = {{"experiment", comparison.experiment},
               {"model", comparison.model},
               {"reference", comparison.reference},
               {"regime", comparison.regime},
               {"metrics", comparison.metrics}};
  json["cells"] = Json::array();
  for (const ComparedCell& cell : comparison.cells) {
    Json entry = {{"cell", cell.cell},
                  {"context",
                   {{"backend", cell.context.backend},
                    {"device", cell.context.device},
                    {"device_class", cell.context.device_class},
                    {"driver", cell.context.driver},
                    {"time_mode", cell.context.time_mode},
                    {"method_version", cell.context.method_version}}}};
    entry["arms"] = Json::array();
    for (const ComparedArm& arm : cell.arms) entry["arms"].push_back(ToJson(arm));
    json["cells"].push_back(std::move(entry));
  }
  json["notes"] = comparison.notes;
  return Dump(json);
}

}  // namespace

absl::StatusOr<ReportFormat> ParseReportFormat(absl::string_view name) {
  if (name == "table") return ReportFormat::kTable;
  if (name == "markdown") return ReportFormat::kMarkdown;
  if (name == "json") return ReportFormat::kJson;
  if (name == "csv") return ReportFormat::kCsv;
  return absl::InvalidArgumentError(
      absl::StrCat("unknown format \"", name, "\"; write table, markdown, json or csv"));
}

std::string FormatComparison(const Comparison& comparison, ReportFormat format) {
  switch (format) {
    case ReportFormat::kTable:
      return FormatTable(comparison);
    case ReportFormat::kMarkdown:
      return FormatMarkdown(comparison);
    case ReportFormat::kJson:
      return FormatJson(comparison);
    case ReportFormat::kCsv:
      return FormatCsv(comparison);
  }
  return "";
}

}  // namespace kvsweep
