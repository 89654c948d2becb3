#include "storage/query.h"

#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "storage/database.h"
#include "storage/sqlite_reader.h"

namespace kvsweep {
namespace {

// Virtual-machine steps between two looks at the clock: some tens of microseconds.
constexpr int kStepsPerLook = 1000;

// Reading tables, views and functions is allowed, nothing else. Pragmas are not, since some of them
// write and the others tell of the machine.
int AuthorizeReading(void*, int action, const char*, const char* name, const char*, const char*) {
  switch (action) {
    case SQLITE_SELECT:
    case SQLITE_READ:
    case SQLITE_RECURSIVE:
      return SQLITE_OK;
    case SQLITE_FUNCTION:
      return name != nullptr && std::string_view(name) == "load_extension" ? SQLITE_DENY
                                                                           : SQLITE_OK;
    default:
      return SQLITE_DENY;
  }
}

struct Deadline {
  const Clock& clock;
  int64_t at_ns;
};

int StopWhenLate(void* deadline) {
  const Deadline& limit = *static_cast<const Deadline*>(deadline);
  return limit.clock.NowNs() >= limit.at_ns ? 1 : 0;
}

TableCell ReadCell(sqlite3_stmt* row, int column) {
  switch (sqlite3_column_type(row, column)) {
    case SQLITE_INTEGER:
      return int64_t{sqlite3_column_int64(row, column)};
    case SQLITE_FLOAT:
      return sqlite3_column_double(row, column);
    case SQLITE_NULL:
      return std::monostate();
    default:
      break;
  }
  const bool text = sqlite3_column_type(row, column) == SQLITE_TEXT;
  const void* data = sqlite3_column_blob(row, column);
  std::string bytes(static_cast<const char*>(data == nullptr ? "" : data),
                    static_cast<size_t>(sqlite3_column_bytes(row, column)));
  if (text) return bytes;
  return Blob{std::move(bytes)};
}

uint64_t CellBytes(const TableCell& cell) {
  if (const auto* text = std::get_if<std::string>(&cell)) return text->size() + 8;
  if (const auto* blob = std::get_if<Blob>(&cell)) return blob->bytes.size() + 8;
  return 8;
}

}  // namespace

std::string TableCellText(const TableCell& cell) {
  if (const auto* integer = std::get_if<int64_t>(&cell)) return absl::StrCat(*integer);
  if (const auto* real = std::get_if<double>(&cell)) return FormatNumber(*real);
  if (const auto* text = std::get_if<std::string>(&cell)) return *text;
  if (const auto* blob = std::get_if<Blob>(&cell)) return absl::BytesToHexString(blob->bytes);
  return "";
}

struct StoreQuery::Connection {
  std::unique_ptr<Database> database;
  const Clock& clock;

  absl::StatusOr<Statement> Compile(absl::string_view sql);
  absl::StatusOr<Table> Read(Statement& statement, const QueryLimits& limits);
};

StoreQuery::StoreQuery(std::unique_ptr<Connection> connection)
    : connection_(std::move(connection)) {}
StoreQuery::~StoreQuery() = default;

absl::StatusOr<std::unique_ptr<StoreQuery>> StoreQuery::Open(const std::string& path,
                                                             const Clock& clock) {
  ASSIGN_OR_RETURN(std::unique_ptr<Database> database, OpenStoreForReading(path));
  sqlite3_limit(database->get(), SQLITE_LIMIT_SQL_LENGTH, limits::kQueryTextBytes);
  sqlite3_limit(database->get(), SQLITE_LIMIT_LENGTH, 16 * limits::kMiB);
  sqlite3_limit(database->get(), SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000);
  sqlite3_limit(database->get(), SQLITE_LIMIT_ATTACHED, 0);
  sqlite3_set_authorizer(database->get(), &AuthorizeReading, nullptr);
  return std::unique_ptr<StoreQuery>(
      new StoreQuery(std::unique_ptr<Connection>(new Connection{std::move(database), clock})));
}

absl::StatusOr<Statement> StoreQuery::Connection::Compile(absl::string_view sql) {
  sqlite3_stmt* compiled = nullptr;
  const char* rest = nullptr;
  const int code = sqlite3_prepare_v2(database->get(), sql.data(), static_cast<int>(sql.size()),
                                      &compiled, &rest);
  const absl::string_view words = sqlite3_errmsg(database->get());
  // A function that is not allowed has the code of any other error.
  if (code == SQLITE_AUTH || (code != SQLITE_OK && absl::StartsWith(words, "not authorized"))) {
    return absl::PermissionDeniedError(
        absl::StrCat("only SELECT over the store's tables and views is allowed (", words, ")"));
  }
  if (code != SQLITE_OK) return SqliteError(database->get(), "query");
  Statement statement(compiled);
  const absl::string_view tail(rest, sql.data() + sql.size() - rest);
  if (compiled == nullptr) return absl::InvalidArgumentError("query: it is empty");
  if (!absl::StripAsciiWhitespace(tail).empty()) {
    return absl::InvalidArgumentError("query: more than one statement; send them one by one");
  }
  if (sqlite3_column_count(compiled) == 0) {
    return absl::PermissionDeniedError("only SELECT over the store's tables and views is allowed");
  }
  return statement;
}

absl::StatusOr<Table> StoreQuery::Connection::Read(Statement& statement,
                                                   const QueryLimits& limits) {
  Table table;
  const int columns = sqlite3_column_count(statement.get());
  for (int column = 0; column < columns; ++column) {
    table.columns.push_back(sqlite3_column_name(statement.get(), column));
  }
  uint64_t bytes = 0;
  while (true) {
    const absl::StatusOr<bool> more = statement.Step();
    if (absl::IsDeadlineExceeded(more.status())) {
      return absl::DeadlineExceededError(
          absl::StrCat("the query took more than ", FormatDurationNs(limits.time_ns),
                       "; narrow it, or open the store file with sqlite3"));
    }
    RETURN_IF_ERROR(more.status());
    if (!*more) return table;
    if (table.rows.size() >= limits.rows || bytes > limits.bytes) {
      table.truncated = true;
      return table;
    }
    std::vector<TableCell>& row = table.rows.emplace_back();
    row.reserve(columns);
    for (int column = 0; column < columns; ++column) {
      row.push_back(ReadCell(statement.get(), column));
      bytes += CellBytes(row.back());
      // A row of many large values must not be built whole.
      if (bytes <= limits.bytes) continue;
      table.rows.pop_back();
      table.truncated = true;
      return table;
    }
  }
}

absl::StatusOr<Table> StoreQuery::Run(absl::string_view sql, const QueryLimits& limits) {
  Deadline deadline{connection_->clock, connection_->clock.NowNs() + limits.time_ns};
  sqlite3* database = connection_->database->get();
  sqlite3_progress_handler(database, kStepsPerLook, &StopWhenLate, &deadline);
  absl::StatusOr<Table> table = [&]() -> absl::StatusOr<Table> {
    ASSIGN_OR_RETURN(Statement statement, connection_->Compile(sql));
    return connection_->Read(statement, limits);
  }();
  sqlite3_progress_handler(database, 0, nullptr, nullptr);
  return table;
}

}  // namespace kvsweep
