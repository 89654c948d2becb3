#include "cli/table_format.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace kvsweep {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kWidestColumn = 60;

bool IsNumber(const TableCell& cell) {
  return std::holds_alternative<int64_t>(cell) || std::holds_alternative<double>(cell);
}

// Characters, not bytes.
size_t Width(absl::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

// One line of at most kWidestColumn characters. Reals are shortened to what people read.
std::string ShortText(const TableCell& cell) {
  if (std::holds_alternative<std::monostate>(cell)) return "-";
  if (const auto* real = std::get_if<double>(&cell)) return absl::StrFormat("%.6g", *real);
  std::string text = absl::StrReplaceAll(TableCellText(cell), {{"\n", " "}, {"\t", " "}});
  if (Width(text) <= kWidestColumn) return text;
  size_t end = kWidestColumn - 3;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::string FormatAligned(const Table& table) {
  std::vector<std::vector<std::string>> lines = {table.columns};
  std::vector<bool> right(table.columns.size(), !table.rows.empty());
  for (const auto& row : table.rows) {
    std::vector<std::string>& line = lines.emplace_back();
    for (size_t i = 0; i < row.size(); ++i) {
      line.push_back(ShortText(row[i]));
      if (!IsNumber(row[i]) && !std::holds_alternative<std::monostate>(row[i])) right[i] = false;
    }
  }
  std::vector<size_t> widths(table.columns.size());
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], Width(line[i]));
  }
  std::string text;
  for (const auto& line : lines) {
    std::string formatted;
    for (size_t i = 0; i < line.size(); ++i) {
      const std::string padding(widths[i] - Width(line[i]), ' ');
      absl::StrAppend(&formatted, i == 0 ? "" : "  ", right[i] ? padding : "", line[i],
                      right[i] ? "" : padding);
    }
    formatted.erase(formatted.find_last_not_of(' ') + 1);
    absl::StrAppend(&text, formatted, "\n");
  }
  return text;
}

std::string FormatMarkdown(const Table& table) {
  std::string text = "|";
  for (const std::string& column : table.columns) absl::StrAppend(&text, " ", column, " |");
  text += "\n|";
  for (size_t i = 0; i < table.columns.size(); ++i) text += " --- |";
  text += "\n";
  for (const auto& row : table.rows) {
    text += "|";
    for (const TableCell& cell : row) {
      absl::StrAppend(
          &text, " ",
          absl::StrReplaceAll(TableCellText(cell), {{"|", "\\|"}, {"\n", " "}, {"\r", ""}}), " |");
    }
    text += "\n";
  }
  return text;
}

std::string CsvField(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
}

std::string FormatCsv(const Table& table) {
  std::string text;
  for (size_t i = 0; i < table.columns.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : ",", CsvField(table.columns[i]));
  }
  text += "\r\n";
  for (const auto& row : table.rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      absl::StrAppend(&text, i == 0 ? "" : ",", CsvField(TableCellText(row[i])));
    }
    text += "\r\n";
  }
  return text;
}

Json CellJson(const TableCell& cell) {
  if (const auto* integer = std::get_if<int64_t>(&cell)) return *integer;
  // JSON has no infinity.
  const auto* real = std::get_if<double>(&cell);
  if (real != nullptr && std::isfinite(*real)) return *real;
  if (std::holds_alternative<std::monostate>(cell)) return nullptr;
  return TableCellText(cell);
}

std::string FormatJson(const Table& table) {
  Json rows = Json::array();
  for (const auto& row : table.rows) {
    Json object = Json::object();
    for (size_t i = 0; i < row.size(); ++i) object[table.columns[i]] = CellJson(row[i]);
    rows.push_back(std::move(object));
  }
  // Texts of the store are UTF-8, but a query can make others.
  return rows.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string FormatTable(const Table& table, ReportFormat format) {
  switch (format) {
    case ReportFormat::kTable:
      return FormatAligned(table);
    case ReportFormat::kMarkdown:
      return FormatMarkdown(table);
    case ReportFormat::kJson:
      return FormatJson(table);
    case ReportFormat::kCsv:
      return FormatCsv(table);
  }
  return "";
}

}  // namespace kvsweep
