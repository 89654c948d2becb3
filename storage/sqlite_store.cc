#include "storage/sqlite_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "experiments/metrics.h"
#include "storage/database.h"
#include "storage/schema_sql.h"
#include "storage/sqlite_reader.h"
#include "storage/sqlite_writer.h"
#include "storage/views_sql.h"

namespace kvsweep {
namespace {

constexpr int64_t kApplicationId = 0x4b565357;  // "KVSW"
constexpr int64_t kSchemaVersion = 2;

// Files up to this size are checked page by page when they are opened for writing.
constexpr int64_t kCheckedBytes = 64 * limits::kMiB;

// Settings of the writing connection. The log is copied into the file every 16 MiB or so.
constexpr char kSettings[] =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
    "PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY;"
    "PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4096;"
    "PRAGMA journal_size_limit = 67108864;";

// Held while a process writes the store: flock on a file beside it. SQLite's own locks would let
// two coordinators write in turn, each blind to the other's attempts.
class WriterLock {
 public:
  static absl::StatusOr<WriterLock> Take(const std::string& store_path) {
    // One lock whatever the store is called: through a link it is the same store.
    std::error_code unknown;
    const std::filesystem::path resolved = std::filesystem::weakly_canonical(store_path, unknown);
    const std::string path = (unknown ? store_path : resolved.string()) + "-lock";
    WriterLock lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    if (lock.descriptor_ < 0) {
      return absl::ErrnoToStatus(errno, absl::StrCat("cannot write a store here: ", path));
    }
    if (flock(lock.descriptor_, LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(store_path,
                       " is being written by another kvsweep process; wait for it to end, submit "
                       "to it with --coordinator, or name another file with --store"));
    }
    return lock;
  }
  WriterLock(WriterLock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  WriterLock& operator=(WriterLock&&) = delete;
  ~WriterLock() {
    if (descriptor_ >= 0) close(descriptor_);
  }

 private:
  explicit WriterLock(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

absl::Status Foreign(const std::string& path, absl::string_view why) {
  return absl::FailedPreconditionError(
      absl::StrCat(path, " is not a kvsweep store: ", why, "; name another file with --store"));
}

// What SQLite says when a file is no database, or a damaged one, in words that help.
absl::Status Explain(const std::string& path, const absl::Status& status) {
  if (!absl::IsDataLoss(status)) return status;
  return absl::DataLossError(
      absl::StrCat(path, " is damaged or not a kvsweep store (", status.message(),
                   "); nothing was changed: restore a copy, or name another file with --store"));
}

// OK for a store of this version; NotFound for an empty database.
absl::Status CheckIdentity(Database& database) {
  ASSIGN_OR_RETURN(const int64_t id, database.QueryInt("PRAGMA application_id"));
  ASSIGN_OR_RETURN(const int64_t version, database.QueryInt("PRAGMA user_version"));
  ASSIGN_OR_RETURN(const int64_t objects, database.QueryInt("SELECT count(*) FROM sqlite_schema"));
  if (id == 0 && objects == 0) return absl::NotFoundError("empty");
  if (id != kApplicationId) {
    return Foreign(database.path(), "it is an SQLite file of another program");
  }
  if (version != kSchemaVersion) {
    return Foreign(database.path(), absl::StrCat("its version is ", version,
                                                 ", this program knows version ", kSchemaVersion));
  }
  return absl::OkStatus();
}

absl::Status CheckPages(Database& database) {
  struct stat info = {};
  if (stat(database.path().c_str(), &info) != 0 || info.st_size > kCheckedBytes) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(Statement check, database.Compile("PRAGMA quick_check(1)"));
  ASSIGN_OR_RETURN(const bool found, check.Step());
  if (found && check.Bytes(0) == "ok") return absl::OkStatus();
  return absl::DataLossError(found ? check.String(0) : "no answer of the check");
}

absl::Status CreateTables(Database& database) {
  return database.Execute(absl::StrCat(k_schema_sql, "PRAGMA application_id = ", kApplicationId,
                                       ";PRAGMA user_version = ", kSchemaVersion)
                              .c_str());
}

// Every metric has its column: a later version may know more of them.
absl::Status AddMetricColumns(Database& database) {
  std::vector<std::string> present;
  ASSIGN_OR_RETURN(Statement columns,
                   database.Compile("SELECT name FROM pragma_table_info('summary')"));
  while (true) {
    ASSIGN_OR_RETURN(const bool more, columns.Step());
    if (!more) break;
    present.push_back(columns.String(0));
  }
  for (const std::vector<MetricInfo>* metrics : {&Metrics(), &QualityMetrics()}) {
    for (const MetricInfo& metric : *metrics) {
      if (std::find(present.begin(), present.end(), metric.name) != present.end()) continue;
      RETURN_IF_ERROR(database.Execute(
          absl::StrCat("ALTER TABLE summary ADD COLUMN \"", metric.name, "\" REAL").c_str()));
    }
  }
  return absl::OkStatus();
}

std::string ViewColumns(absl::string_view table, const std::vector<MetricInfo>& metrics) {
  std::string columns;
  for (const MetricInfo& metric : metrics) {
    absl::StrAppend(&columns, ", ", table, ".\"", metric.name, "\"");
  }
  return columns;
}

// Drops and makes all views, unless the file has those of exactly this text.
absl::Status RefreshViews(Database& database) {
  const std::string views = absl::StrReplaceAll(
      k_views_sql, {{"{{metrics}}", ViewColumns("s", Metrics())},
                    {"{{quality_metrics}}", ViewColumns("q", QualityMetrics())}});
  ASSIGN_OR_RETURN(Statement known,
                   database.Compile("SELECT 1 FROM meta WHERE key = 'views' AND value = ?1"));
  ASSIGN_OR_RETURN(const bool fresh, known.BindBlob(1, views).Step());
  known.Reset();
  if (fresh) return absl::OkStatus();
  std::string drop;
  ASSIGN_OR_RETURN(Statement names,
                   database.Compile("SELECT name FROM sqlite_schema WHERE type = 'view'"));
  while (true) {
    ASSIGN_OR_RETURN(const bool more, names.Step());
    if (!more) break;
    absl::StrAppend(&drop, "DROP VIEW \"", names.Bytes(0), "\";");
  }
  RETURN_IF_ERROR(database.Execute(absl::StrCat(drop, views).c_str()));
  ASSIGN_OR_RETURN(Statement note,
                   database.Compile("INSERT OR REPLACE INTO meta VALUES ('views', ?1)"));
  return note.BindBlob(1, views).Run();
}

absl::Status Prepare(Database& database) {
  const absl::Status identity = CheckIdentity(database);
  if (!identity.ok() && !absl::IsNotFound(identity)) return identity;
  RETURN_IF_ERROR(database.Execute(kSettings));
  if (identity.ok()) RETURN_IF_ERROR(CheckPages(database));
  RETURN_IF_ERROR(database.Execute("BEGIN IMMEDIATE"));
  if (!identity.ok()) RETURN_IF_ERROR(CreateTables(database));
  RETURN_IF_ERROR(AddMetricColumns(database));
  RETURN_IF_ERROR(RefreshViews(database));
  return database.Execute("COMMIT");
}

class SqliteStore final : public Store {
 public:
  SqliteStore(WriterLock lock, std::unique_ptr<Database> database,
              std::unique_ptr<SqliteWriter> writer)
      : lock_(std::move(lock)), database_(std::move(database)), writer_(std::move(writer)) {}

  absl::StatusOr<CommitResult> Commit(const WriteBatch& batch) override;

  absl::StatusOr<std::unique_ptr<StoreReader>> OpenReader() override {
    return OpenSqliteReader(database_->path());
  }

 private:
  absl::StatusOr<CommitResult> TryCommit(const WriteBatch& batch);

  const WriterLock lock_;
  const std::unique_ptr<Database> database_;
  const std::unique_ptr<SqliteWriter> writer_;
  absl::Status failed_;  // not OK after the first failure: what memory holds may not be in the file
};

absl::StatusOr<CommitResult> SqliteStore::Commit(const WriteBatch& batch) {
  RETURN_IF_ERROR(failed_);
  absl::StatusOr<CommitResult> result = TryCommit(batch);
  if (!result.ok()) {
    // The file is as before this batch, or the next opening makes it so.
    database_->Execute("ROLLBACK").IgnoreError();
    failed_ = Annotate(result.status(), absl::StrCat("store ", database_->path(), " failed"));
    return failed_;
  }
  return result;
}

absl::StatusOr<CommitResult> SqliteStore::TryCommit(const WriteBatch& batch) {
  CommitResult result;
  result.operations.reserve(batch.operations.size());
  RETURN_IF_ERROR(database_->Execute("BEGIN IMMEDIATE"));
  for (const Operation& operation : batch.operations) {
    ASSIGN_OR_RETURN(result.operations.emplace_back(), writer_->Apply(operation));
  }
  RETURN_IF_ERROR(database_->Execute("COMMIT"));
  return result;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& path) {
  ASSIGN_OR_RETURN(WriterLock lock, WriterLock::Take(path));
  ASSIGN_OR_RETURN(std::unique_ptr<Database> database,
                   Database::Open(path, Database::Mode::kReadWriteCreate));
  const absl::Status prepared = Prepare(*database);
  if (!prepared.ok()) return Explain(path, prepared);
  ASSIGN_OR_RETURN(std::unique_ptr<SqliteWriter> writer, SqliteWriter::Create(*database));
  return std::make_unique<SqliteStore>(std::move(lock), std::move(database), std::move(writer));
}

absl::StatusOr<std::unique_ptr<Database>> OpenStoreForReading(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<Database> database,
                   Database::Open(path, Database::Mode::kReadOnly));
  const absl::Status identity = CheckIdentity(*database);
  if (absl::IsNotFound(identity)) return Foreign(path, "it is empty");
  if (!identity.ok()) return Explain(path, identity);
  RETURN_IF_ERROR(database->Execute(
      "PRAGMA query_only = ON; PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF;"));
  return database;
}

absl::StatusOr<std::unique_ptr<StoreReader>> OpenSqliteReader(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<Database> database, OpenStoreForReading(path));
  return std::make_unique<SqliteReader>(std::move(database));
}

}  // namespace kvsweep
