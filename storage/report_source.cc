// What people ask of a store most often, in SQL over its views.
#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "storage/json_text.h"
#include "storage/query.h"

namespace kvsweep {
namespace {

// Rows of one page; a coordinator far away gives no more at once.
constexpr uint64_t kPageRows = 20'000;

const QueryLimits kPage = {.rows = kPageRows,
                           .bytes = 256 * limits::kMiB,
                           .time_ns = limits::kQuerySeconds * kNsPerSecond};

// A row by the names of its columns. A column that is not there reads as null.
class Row {
 public:
  Row(const Table& table, size_t row) : table_(table), cells_(table.rows[row]) {}

  const TableCell& operator[](absl::string_view column) const {
    static const TableCell null;
    for (size_t i = 0; i < table_.columns.size(); ++i) {
      if (table_.columns[i] == column) return cells_[i];
    }
    return null;
  }
  int64_t Int(absl::string_view column) const {
    const auto* value = std::get_if<int64_t>(&(*this)[column]);
    return value == nullptr ? 0 : *value;
  }
  double Real(absl::string_view column) const {
    const auto* value = std::get_if<double>(&(*this)[column]);
    return value == nullptr ? 0 : *value;
  }
  std::string Text(absl::string_view column) const { return TableCellText((*this)[column]); }

 private:
  const Table& table_;
  const std::vector<TableCell>& cells_;
};

std::string CellJson(const TableCell& cell) {
  if (std::holds_alternative<std::monostate>(cell)) return "null";
  if (std::holds_alternative<std::string>(cell) || std::holds_alternative<Blob>(cell)) {
    return JsonString(TableCellText(cell));
  }
  const std::string number = TableCellText(cell);
  return number == "inf" || number == "-inf" ? JsonString(number) : number;
}

// Rows as a JSON array of objects.
std::string TableJson(const Table& table) {
  return absl::StrCat("[",
                      absl::StrJoin(table.rows, ",",
                                    [&](std::string* out, const auto& row) {
                                      for (size_t i = 0; i < row.size(); ++i) {
                                        absl::StrAppend(out, i == 0 ? "{" : ",",
                                                        JsonString(table.columns[i]), ":",
                                                        CellJson(row[i]));
                                      }
                                      absl::StrAppend(out, "}");
                                    }),
                      "]");
}

// Two columns as a JSON object.
std::string PairsJson(const Table& table) {
  return absl::StrCat("{",
                      absl::StrJoin(table.rows, ",",
                                    [](std::string* out, const auto& row) {
                                      absl::StrAppend(out, JsonString(TableCellText(row[0])), ":",
                                                      CellJson(row[1]));
                                    }),
                      "}");
}

Outcome OutcomeOf(absl::string_view name) {
  for (int value = Outcome_MIN; value <= Outcome_MAX; ++value) {
    if (Outcome_IsValid(value) && OutcomeName(static_cast<Outcome>(value)) == name) {
      return static_cast<Outcome>(value);
    }
  }
  return OUTCOME_CRASHED;  // a word of a later version: at least not a success
}

Engagement EngagementOf(absl::string_view name) {
  for (const Engagement value : {Engagement::kEngaged, Engagement::kNotEngaged}) {
    if (EngagementName(value) == name) return value;
  }
  return Engagement::kNoRule;
}

// The reasons of metrics without value, by trial and metric.
using Notes = std::map<std::pair<int64_t, std::string>, std::string>;

TrialResult ResultOf(const Row& row, const Notes& notes) {
  TrialResult trial;
  trial.trial_id = row.Int("trial_id");
  trial.round_id = row.Int("round_id");
  trial.arm = row.Int("arm_index");
  trial.cell = row.Int("cell_index");
  trial.repeat = static_cast<uint32_t>(row.Int("repeat"));
  trial.outcome = OutcomeOf(row.Text("outcome"));
  trial.evidence = row.Text("evidence");
  trial.context = {.backend = row.Text("backend"),
                   .device = row.Text("device"),
                   .device_class = row.Text("device_class"),
                   .driver = row.Text("driver"),
                   .time_mode = row.Text("time_mode"),
                   .method_version = static_cast<uint32_t>(row.Int("method_version"))};
  trial.runner_build = row.Text("runner_build");
  trial.executions = static_cast<uint32_t>(row.Int("executions"));
  trial.engagement = EngagementOf(row.Text("engagement"));
  trial.quality_key = row.Text("quality_key");
  trial.load_dependence = row.Text("load_dependence");
  for (const MetricInfo& info : Metrics()) {
    SummaryMetric metric{.name = info.name, .value = std::nullopt, .reason = ""};
    if (const auto* value = std::get_if<double>(&row[info.name])) {
      metric.value = *value;
    } else {
      const auto note = notes.find({row.Int("trial_id"), info.name});
      metric.reason = note == notes.end() ? "not measured" : note->second;
    }
    trial.metrics.push_back(std::move(metric));
  }
  return trial;
}

QualityRow WindowOf(const Row& row) {
  QualityRow window;
  window.set_window(static_cast<uint32_t>(row.Int("window")));
  window.set_scored_tokens(static_cast<uint32_t>(row.Int("scored_tokens")));
  window.set_nll_sum(row.Real("nll_sum"));
  window.set_reference_nll_sum(row.Real("reference_nll_sum"));
  window.set_kl_sum(row.Real("kl_sum"));
  window.set_top1_matches(static_cast<uint32_t>(row.Int("top1_matches")));
  window.set_dropped_tokens(static_cast<uint32_t>(row.Int("dropped_tokens")));
  window.set_dropped_nll_sum(row.Real("dropped_nll_sum"));
  window.set_dropped_reference_nll_sum(row.Real("dropped_reference_nll_sum"));
  window.set_dropped_kl_sum(row.Real("dropped_kl_sum"));
  window.set_dropped_top1_matches(static_cast<uint32_t>(row.Int("dropped_top1_matches")));
  window.set_attended_fraction(row.Real("attended_fraction"));
  return window;
}

QualityPositions PositionsOf(const Row& row) {
  QualityPositions positions;
  positions.set_first_position(static_cast<uint32_t>(row.Int("first_position")));
  positions.set_scored_tokens(static_cast<uint32_t>(row.Int("scored_tokens")));
  positions.set_nll_sum(row.Real("nll_sum"));
  positions.set_reference_nll_sum(row.Real("reference_nll_sum"));
  positions.set_kl_sum(row.Real("kl_sum"));
  positions.set_top1_matches(static_cast<uint32_t>(row.Int("top1_matches")));
  return positions;
}

PasskeyRow PasskeyOf(const Row& row) {
  PasskeyRow passkey;
  passkey.set_index(static_cast<uint32_t>(row.Int("prompt_index")));
  passkey.set_depth(row.Real("depth"));
  passkey.set_context_tokens(static_cast<uint32_t>(row.Int("context_tokens")));
  passkey.set_digits(static_cast<uint32_t>(row.Int("digits")));
  passkey.set_correct_digits(static_cast<uint32_t>(row.Int("correct_digits")));
  passkey.set_recalled(row.Int("recalled") != 0);
  passkey.set_reference_correct_digits(static_cast<uint32_t>(row.Int("reference_correct_digits")));
  passkey.set_reference_recalled(row.Int("reference_recalled") != 0);
  return passkey;
}

std::string TrialsOf(ExperimentId experiment) {
  return absl::StrCat(
      "trial_id IN (SELECT trial_id FROM v_trials WHERE experiment_id = ", experiment.value(), ")");
}

}  // namespace

absl::StatusOr<Table> TableSource::Experiments(uint64_t limit) {
  QueryLimits limits;
  limits.rows = limit;
  return Run(
      "SELECT experiment_id, name, state, rounds, done, served, failed, poisoned, cancelled, "
      "running, model, submitted_utc FROM v_experiments ORDER BY experiment_id DESC",
      limits);
}

absl::StatusOr<std::string> TableSource::ShowTrial(TrialId id) {
  const std::string where = absl::StrCat(" WHERE trial_id = ", id.value());
  ASSIGN_OR_RETURN(const Table trials, Run(absl::StrCat("SELECT * FROM v_trials", where), kPage));
  if (trials.rows.empty()) {
    return absl::NotFoundError(absl::StrCat("the store has no trial ", id.value(),
                                            "; `kvsweep query --sql 'SELECT trial_id, arm, cell "
                                            "FROM v_trials'` lists them"));
  }
  std::string about, metrics, spec = "{}";
  for (size_t i = 0; i < trials.columns.size(); ++i) {
    const std::string& column = trials.columns[i];
    if (column == "spec") {
      spec = TableCellText(trials.rows[0][i]);
      continue;
    }
    std::string* part = FindMetric(column) != nullptr ? &metrics : &about;
    absl::StrAppend(part, part->empty() ? "" : ",", JsonString(column), ":",
                    CellJson(trials.rows[0][i]));
  }
  ASSIGN_OR_RETURN(const Table reasons,
                   Run(absl::StrCat("SELECT metric, reason FROM v_notes", where), kPage));
  ASSIGN_OR_RETURN(const Table facts,
                   Run(absl::StrCat("SELECT name, value FROM v_facts", where), kPage));
  ASSIGN_OR_RETURN(const Table outcomes,
                   Run(absl::StrCat("SELECT evidence, asked_bytes, available_bytes, phase, "
                                    "duration_ns, signal, log_tail FROM v_outcomes",
                                    where),
                       kPage));
  ASSIGN_OR_RETURN(const Table counters,
                   Run(absl::StrCat("SELECT name, layer, value FROM v_counters", where), kPage));
  ASSIGN_OR_RETURN(
      const Table positions,
      Run(absl::StrCat("SELECT first_position, sum(scored_tokens) AS scored_tokens, "
                       "sum(nll_sum) / sum(scored_tokens) AS nll, "
                       "sum(reference_nll_sum) / sum(scored_tokens) AS reference_nll, "
                       "sum(kl_sum) / sum(scored_tokens) AS kl, "
                       "1.0 * sum(top1_matches) / sum(scored_tokens) AS top1_agreement "
                       "FROM v_quality_positions",
                       where, " GROUP BY first_position ORDER BY first_position"),
          kPage));
  ASSIGN_OR_RETURN(const Table passkeys,
                   Run(absl::StrCat("SELECT depth, count(*) AS prompts, sum(recalled) AS recalled, "
                                    "sum(reference_recalled) AS reference_recalled FROM v_passkeys",
                                    where, " GROUP BY depth ORDER BY depth"),
                       kPage));
  return absl::StrCat("{\"trial\":{", about, "},\"spec\":", spec, ",\"metrics\":{", metrics,
                      "},\"reasons\":", PairsJson(reasons), ",\"facts\":", PairsJson(facts),
                      ",\"outcome\":", TableJson(outcomes), ",\"counters\":", TableJson(counters),
                      ",\"positions\":", TableJson(positions),
                      ",\"passkeys\":", TableJson(passkeys), "}");
}

absl::StatusOr<std::string> TableSource::Logs(TrialId id) {
  ASSIGN_OR_RETURN(
      const Table rounds,
      Run(absl::StrCat(
              "SELECT round_id, state, reason, outcome, evidence FROM v_trials WHERE trial_id = ",
              id.value()),
          kPage));
  if (rounds.rows.empty()) {
    return absl::NotFoundError(absl::StrCat("the store has no trial ", id.value()));
  }
  const std::string where = absl::StrCat(" WHERE round_id = ", Row(rounds, 0).Int("round_id"));
  std::string text =
      absl::StrCat("round ", Row(rounds, 0).Text("round_id"), ": ", Row(rounds, 0).Text("state"),
                   " ", Row(rounds, 0).Text("reason"), "\n");
  ASSIGN_OR_RETURN(
      const Table attempts,
      Run(absl::StrCat("SELECT * FROM v_attempts", where, " ORDER BY attempt"), kPage));
  for (size_t i = 0; i < attempts.rows.size(); ++i) {
    const Row row(attempts, i);
    absl::StrAppend(&text, row.Text("granted_utc"), " attempt ", row.Text("attempt"), " on ",
                    row.Text("worker_id"), " (", row.Text("machine"), ", slot ", row.Text("slot"),
                    "): ", row.Text("state"), " ", row.Text("reason"), "\n");
  }
  ASSIGN_OR_RETURN(
      const Table lines,
      Run(absl::StrCat("SELECT utc, text FROM v_logs", where, " ORDER BY log_id"), kPage));
  for (size_t i = 0; i < lines.rows.size(); ++i) {
    absl::StrAppend(&text, Row(lines, i).Text("utc"), " ", Row(lines, i).Text("text"), "\n");
  }
  const std::string outcome = Row(rounds, 0).Text("outcome");
  if (outcome.empty()) return text;
  const std::string evidence = Row(rounds, 0).Text("evidence");
  absl::StrAppend(&text, "outcome: ", outcome, evidence.empty() ? "" : ": ", evidence, "\n");
  ASSIGN_OR_RETURN(
      const Table outcomes,
      Run(absl::StrCat("SELECT log_tail FROM v_outcomes WHERE trial_id = ", id.value()), kPage));
  for (size_t i = 0; i < outcomes.rows.size(); ++i) {
    const std::string tail = Row(outcomes, i).Text("log_tail");
    if (!tail.empty()) absl::StrAppend(&text, tail, "\n");
  }
  return text;
}

absl::StatusOr<Table> TableSource::RunByTrial(absl::string_view select, absl::string_view where) {
  Table all;
  int64_t after = 0;
  while (true) {
    ASSIGN_OR_RETURN(Table page, Run(absl::StrCat(select, " WHERE ", where, " AND trial_id > ",
                                                  after, " ORDER BY trial_id LIMIT ", kPageRows),
                                     kPage));
    all.columns = page.columns;
    const bool last = page.rows.size() < kPageRows && !page.truncated;
    if (!last) {
      // The last trial may go on behind the page: it is read with the next one.
      const TableCell cut = page.rows.back()[0];
      while (!page.rows.empty() && page.rows.back()[0] == cut) page.rows.pop_back();
      if (page.rows.empty()) return absl::ResourceExhaustedError("a trial has too many rows");
      after = std::get<int64_t>(page.rows.back()[0]);
    }
    std::move(page.rows.begin(), page.rows.end(), std::back_inserter(all.rows));
    if (last) return all;
  }
}

absl::StatusOr<Table> TableSource::Results(ExperimentId experiment) {
  return RunByTrial("SELECT * FROM v_trials", absl::StrCat("experiment_id = ", experiment.value(),
                                                           " AND outcome IS NOT NULL"));
}

absl::StatusOr<ReportInput> TableSource::Report(ExperimentId experiment) {
  const std::string where = absl::StrCat(" WHERE experiment_id = ", experiment.value());
  ASSIGN_OR_RETURN(const Table experiments,
                   Run(absl::StrCat("SELECT * FROM v_experiments", where), kPage));
  if (experiments.rows.empty()) {
    return absl::NotFoundError(absl::StrCat("the store has no experiment ", experiment.value(),
                                            "; `kvsweep list` shows those it has"));
  }
  const Row about(experiments, 0);
  Experiment spec;
  const auto* blob = std::get_if<Blob>(&about["spec"]);
  if (blob == nullptr || !spec.ParseFromString(blob->bytes)) {
    return absl::DataLossError("the stored spec is damaged");
  }
  ReportInput input;
  input.experiment = about.Text("name");
  input.model = about.Text("model").empty() ? spec.model().shape() : about.Text("model");
  input.random_weights = spec.model().weights() == Model::WEIGHTS_RANDOM;
  input.regime = spec.regime();
  input.repeats = static_cast<uint32_t>(about.Int("repeats"));
  input.rounds_planned = about.Int("rounds");
  input.reference = about.Int("reference_arm");
  ASSIGN_OR_RETURN(
      const Table arms,
      Run(absl::StrCat("SELECT name, strategy FROM v_arms", where, " ORDER BY arm_index"), kPage));
  for (size_t i = 0; i < arms.rows.size(); ++i) {
    input.arms.push_back({Row(arms, i).Text("name"), Row(arms, i).Text("strategy")});
  }
  ASSIGN_OR_RETURN(
      const Table cells,
      Run(absl::StrCat("SELECT name FROM v_cells", where, " ORDER BY cell_index"), kPage));
  for (size_t i = 0; i < cells.rows.size(); ++i) input.cells.push_back(Row(cells, i).Text("name"));
  RETURN_IF_ERROR(ReadTrials(experiment, &input));
  RETURN_IF_ERROR(ReadWindows(experiment, &input));
  return input;
}

absl::Status TableSource::ReadTrials(ExperimentId experiment, ReportInput* input) {
  ASSIGN_OR_RETURN(const Table reasons, RunByTrial("SELECT trial_id, metric, reason FROM v_notes",
                                                   TrialsOf(experiment)));
  Notes notes;
  for (size_t i = 0; i < reasons.rows.size(); ++i) {
    const Row row(reasons, i);
    notes[{row.Int("trial_id"), row.Text("metric")}] = row.Text("reason");
  }
  ASSIGN_OR_RETURN(const Table results, Results(experiment));
  for (size_t i = 0; i < results.rows.size(); ++i) {
    const Row row(results, i);
    if (row.Text("kind") == "load") {
      input->trials.push_back(ResultOf(row, notes));
    } else {
      input->qualities.push_back({.trial_id = static_cast<uint64_t>(row.Int("trial_id")),
                                  .content_key = row.Text("content_key"),
                                  .outcome = OutcomeOf(row.Text("outcome")),
                                  .evidence = row.Text("evidence"),
                                  .windows = {},
                                  .passkeys = {}});
    }
  }
  return absl::OkStatus();
}

absl::Status TableSource::ReadWindows(ExperimentId experiment, ReportInput* input) {
  std::map<uint64_t, QualityResult*> by_trial;
  for (QualityResult& quality : input->qualities) by_trial[quality.trial_id] = &quality;
  if (by_trial.empty()) return absl::OkStatus();
  const auto find = [&](const Row& row) -> QualityResult* {
    const auto quality = by_trial.find(static_cast<uint64_t>(row.Int("trial_id")));
    return quality == by_trial.end() ? nullptr : quality->second;
  };
  ASSIGN_OR_RETURN(const Table windows,
                   RunByTrial("SELECT * FROM v_quality", TrialsOf(experiment)));
  std::map<std::pair<int64_t, int64_t>, QualityRow*> by_window;
  for (size_t i = 0; i < windows.rows.size(); ++i) {
    const Row row(windows, i);
    if (QualityResult* quality = find(row)) quality->windows.push_back(WindowOf(row));
  }
  for (QualityResult& quality : input->qualities) {
    for (QualityRow& window : quality.windows) {
      by_window[{static_cast<int64_t>(quality.trial_id), window.window()}] = &window;
    }
  }
  ASSIGN_OR_RETURN(const Table positions,
                   RunByTrial("SELECT * FROM v_quality_positions", TrialsOf(experiment)));
  for (size_t i = 0; i < positions.rows.size(); ++i) {
    const Row row(positions, i);
    const auto window = by_window.find({row.Int("trial_id"), row.Int("window")});
    if (window != by_window.end()) *window->second->add_positions() = PositionsOf(row);
  }
  ASSIGN_OR_RETURN(const Table passkeys,
                   RunByTrial("SELECT * FROM v_passkeys", TrialsOf(experiment)));
  for (size_t i = 0; i < passkeys.rows.size(); ++i) {
    const Row row(passkeys, i);
    if (QualityResult* quality = find(row)) quality->passkeys.push_back(PasskeyOf(row));
  }
  return absl::OkStatus();
}

}  // namespace kvsweep
