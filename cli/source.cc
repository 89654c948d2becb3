#include "cli/source.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/clock.h"
#include "base/status_macros.h"

namespace kvsweep {

absl::StatusOr<Source> OpenSource(const SourceFlags& flags) {
  Source source;
  if (!flags.coordinator.empty()) {
    ASSIGN_OR_RETURN(source.client, ControlClient::Dial(flags.coordinator));
    source.tables = NewRemoteSource(*source.client);
    return source;
  }
  absl::StatusOr<std::unique_ptr<StoreQuery>> query =
      StoreQuery::Open(flags.store, RealClock::Get());
  if (absl::IsNotFound(query.status())) {
    return absl::UnavailableError(absl::StrCat(
        "there is no store file ", flags.store,
        "; `kvsweep run SPEC` makes one, --store names another, --coordinator asks a coordinator"));
  }
  if (!query.ok()) return absl::UnavailableError(query.status().message());
  source.tables = *std::move(query);
  return source;
}

std::string SqlText(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "''"}}), "'");
}

int64_t IntAt(const Table& table, size_t row, size_t column) {
  const auto* value = std::get_if<int64_t>(&table.rows[row][column]);
  return value == nullptr ? 0 : *value;
}

std::string TextAt(const Table& table, size_t row, size_t column) {
  return TableCellText(table.rows[row][column]);
}

absl::StatusOr<ExperimentId> FindExperiment(TableSource& tables, const std::string& text) {
  std::string where;
  if (uint64_t id = 0; absl::SimpleAtoi(text, &id)) {
    where = absl::StrCat("WHERE experiment_id = ", id);
  } else if (!text.empty()) {
    where = absl::StrCat("WHERE name = ", SqlText(text));
  }
  ASSIGN_OR_RETURN(const Table found,
                   tables.Run(absl::StrCat("SELECT experiment_id FROM v_experiments ", where,
                                           " ORDER BY experiment_id DESC LIMIT 1"),
                              QueryLimits()));
  if (!found.rows.empty()) return ExperimentId(static_cast<uint64_t>(IntAt(found, 0, 0)));
  return absl::NotFoundError(text.empty()
                                 ? "the store has no experiment yet; `kvsweep run SPEC` adds one"
                                 : absl::StrCat("the store has no experiment \"", text,
                                                "\"; `kvsweep list` shows those it has"));
}

absl::StatusOr<TrialId> ParseTrial(const std::string& text) {
  uint64_t id = 0;
  if (absl::SimpleAtoi(text, &id)) return TrialId(id);
  return absl::InvalidArgumentError(absl::StrCat(
      "\"", text,
      "\" is no trial number; `kvsweep query --sql 'SELECT trial_id, arm, cell, repeat, outcome "
      "FROM v_trials'` lists them"));
}

}  // namespace kvsweep
