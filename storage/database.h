#ifndef KVSWEEP_STORAGE_DATABASE_H_
#define KVSWEEP_STORAGE_DATABASE_H_

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// SQLite's C interface with ownership and Status, and nothing more. A connection and its statements
// belong to one thread at a time.

namespace kvsweep {

// A compiled statement. Bind parameters (counted from 1), Step through the rows, read columns
// (counted from 0); Reset before the next use. A text or blob that is bound must live until Reset.
class Statement {
 public:
  explicit Statement(sqlite3_stmt* statement) : statement_(statement, &sqlite3_finalize) {}

  Statement& BindInt(int parameter, int64_t value);
  Statement& BindReal(int parameter, double value);  // NaN would become null: keep it out
  Statement& BindText(int parameter, absl::string_view value);
  Statement& BindBlob(int parameter, absl::string_view value);
  Statement& BindNull(int parameter);

  // True: a row is ready. False: done, and reset.
  absl::StatusOr<bool> Step();

  // Runs a statement that gives no rows, and resets it.
  absl::Status Run();

  void Reset() { sqlite3_reset(statement_.get()); }

  int64_t Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }
  double Real(int column) const { return sqlite3_column_double(statement_.get(), column); }
  bool IsNull(int column) const;
  // Text or blob; valid until the next Step or Reset.
  absl::string_view Bytes(int column) const;
  std::string String(int column) const { return std::string(Bytes(column)); }
  std::optional<int64_t> OptionalInt(int column) const;

  sqlite3_stmt* get() const { return statement_.get(); }

 private:
  std::unique_ptr<sqlite3_stmt, int (*)(sqlite3_stmt*)> statement_;
};

// Resets the statement when a reading loop is left, so that no read transaction stays open.
class StatementUse {
 public:
  explicit StatementUse(Statement& statement) : statement_(statement) {}
  ~StatementUse() { statement_.Reset(); }
  StatementUse(const StatementUse&) = delete;
  StatementUse& operator=(const StatementUse&) = delete;
  Statement* operator->() { return &statement_; }

 private:
  Statement& statement_;
};

class Database {
 public:
  enum class Mode { kReadOnly, kReadWriteCreate };

  // Opens `path`. NotFound when reading only and there is no file.
  static absl::StatusOr<std::unique_ptr<Database>> Open(const std::string& path, Mode mode);

  // Runs one or more statements without parameters, dropping their rows.
  absl::Status Execute(const char* sql);

  // Compiles a statement, or gives the one compiled before: `sql` must be a literal, since its
  // address is the key. It comes reset, with the parameters of its last use.
  absl::StatusOr<Statement*> Prepare(const char* sql);

  // Compiles a statement that the caller keeps.
  absl::StatusOr<Statement> Compile(absl::string_view sql);

  // The first value of the first row of a statement without parameters; 0 for null or no row. `sql`
  // as of Prepare.
  absl::StatusOr<int64_t> QueryInt(const char* sql);

  const std::string& path() const { return path_; }
  sqlite3* get() const { return connection_.get(); }

 private:
  Database(const std::string& path, sqlite3* connection)
      : path_(path), connection_(connection, &sqlite3_close_v2) {}

  const std::string path_;
  std::unique_ptr<sqlite3, int (*)(sqlite3*)> connection_;
  absl::flat_hash_map<const char*, std::unique_ptr<Statement>> prepared_;
};

// The status of a failed call on `connection`: NotFound, DataLoss (damaged, or not
// a database), ResourceExhausted (disk full), Unavailable (busy), … with SQLite's words.
absl::Status SqliteError(sqlite3* connection, absl::string_view doing);

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_DATABASE_H_
