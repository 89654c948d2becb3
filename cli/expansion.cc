#include "cli/expansion.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

std::string Count(uint64_t count, absl::string_view what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

std::string KindName(const PlannedRound& round) {
  return round.kind == TrialSpec::KIND_QUALITY ? "quality" : "load";
}

std::string CellName(const Matrix& matrix, const PlannedRound& round) {
  return round.kind == TrialSpec::KIND_QUALITY ? "-" : matrix.CellAt(round.cell).name;
}

uint64_t QualityRounds(const Matrix& matrix) {
  uint64_t count = 0;
  while (count < matrix.round_count() &&
         matrix.RoundAt(matrix.round_count() - 1 - count).kind == TrialSpec::KIND_QUALITY) {
    ++count;
  }
  return count;
}

}  // namespace

std::string FormatCounts(const Matrix& matrix) {
  const uint64_t quality = QualityRounds(matrix);
  return absl::StrCat(Count(matrix.arms().size(), "arm"), " x ", Count(matrix.cell_count(), "cell"),
                      " x ", Count(matrix.repeats(), "repeat"), ": ",
                      Count(matrix.trial_count(), "trial"), " in ",
                      Count(matrix.round_count(), "round"),
                      quality > 0 ? absl::StrCat(", ", quality, " of them quality") : "");
}

Table ArmsTable(const Matrix& matrix) {
  Table table;
  table.columns = {"arm", "strategy", "reference", "parameters"};
  for (size_t i = 0; i < matrix.arms().size(); ++i) {
    const Arm& arm = matrix.arms()[i];
    table.rows.push_back({arm.name(), arm.strategy(),
                          std::string(i == matrix.reference() ? "yes" : ""), CanonicalJson(arm)});
  }
  return table;
}

Table CellsTable(const Matrix& matrix, uint64_t limit) {
  Table table;
  table.columns = {"cell"};
  for (uint64_t i = 0; i < matrix.cell_count(); ++i) {
    if (i == limit) {
      table.truncated = true;
      break;
    }
    const Cell cell = matrix.CellAt(i);
    std::vector<TableCell> row = {cell.name};
    for (const auto& [path, value] : cell.values) {
      if (i == 0) table.columns.push_back(path);
      row.push_back(value);
    }
    table.rows.push_back(std::move(row));
  }
  return table;
}

Table RoundsTable(const Matrix& matrix, uint64_t limit) {
  Table table;
  table.columns = {"round", "kind", "cell", "repeat", "order of arms"};
  table.truncated = matrix.round_count() > limit;
  for (uint64_t i = 0; i < std::min(limit, matrix.round_count()); ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    const std::string arms = absl::StrJoin(round.arms, ", ", [&](std::string* out, size_t arm) {
      absl::StrAppend(out, matrix.arms()[arm].name());
    });
    table.rows.push_back({static_cast<int64_t>(i), KindName(round), CellName(matrix, round),
                          int64_t{round.repeat}, arms});
  }
  return table;
}

Table TrialsTable(const Matrix& matrix, uint64_t limit) {
  Table table;
  table.columns = {"round", "position", "kind", "cell", "repeat", "arm", "content_key"};
  for (uint64_t i = 0; i < matrix.round_count(); ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    for (size_t position = 0; position < round.arms.size(); ++position) {
      if (table.rows.size() >= limit) {
        table.truncated = true;
        return table;
      }
      const std::string& key = round.spec.trials(static_cast<int>(position)).content_key();
      table.rows.push_back({static_cast<int64_t>(i), static_cast<int64_t>(position),
                            KindName(round), CellName(matrix, round), int64_t{round.repeat},
                            matrix.arms()[round.arms[position]].name(),
                            absl::BytesToHexString(key)});
    }
  }
  return table;
}

}  // namespace kvsweep
