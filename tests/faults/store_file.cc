#include "tests/faults/store_file.h"

#include <sqlite3.h>

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/text.h"

namespace kvsweep {
namespace {

// Longer than any commit or recovery of the coordinator holds the file.
constexpr int kBusyMs = 20'000;

// Every table that holds records by record_id.
constexpr char kRecords[] =
    "(SELECT record_id FROM trial_start UNION ALL SELECT record_id FROM request"
    " UNION ALL SELECT record_id FROM counter UNION ALL SELECT record_id FROM sample"
    " UNION ALL SELECT record_id FROM quality UNION ALL SELECT record_id FROM trial_outcome"
    " UNION ALL SELECT record_id FROM discard UNION ALL SELECT record_id FROM finish)";

// Columns of v_trials that name the execution, not its result.
constexpr char kProvenance[] =
    "'trial_id','experiment_id','experiment','round_id','state','worker_id','machine','slot',"
    "'neighbours','executions','measured_trial_id','served'";

std::string Text(sqlite3_stmt* statement, int column) {
  switch (sqlite3_column_type(statement, column)) {
    case SQLITE_NULL:
      return "NULL";
    case SQLITE_FLOAT:
      return FormatNumber(sqlite3_column_double(statement, column));
    case SQLITE_BLOB: {
      const auto* bytes = static_cast<const char*>(sqlite3_column_blob(statement, column));
      const auto size = static_cast<size_t>(sqlite3_column_bytes(statement, column));
      return absl::BytesToHexString(absl::string_view(bytes, size));
    }
    default:
      return reinterpret_cast<const char*>(sqlite3_column_text(statement, column));
  }
}

// Whether the tables are there: the file exists before its first transaction has ended.
bool IsStore(sqlite3* database) {
  sqlite3_stmt* statement = nullptr;
  const bool ready = sqlite3_prepare_v2(database, "SELECT 1 FROM v_attempts LIMIT 1", -1,
                                        &statement, nullptr) == SQLITE_OK;
  sqlite3_finalize(statement);
  return ready;
}

}  // namespace

std::vector<std::string> StoreFile::Rows(absl::string_view sql) const {
  sqlite3* database = nullptr;
  std::vector<std::string> rows;
  if (sqlite3_open_v2(path_.c_str(), &database, SQLITE_OPEN_READONLY, nullptr) == SQLITE_OK) {
    sqlite3_busy_timeout(database, kBusyMs);
    if (IsStore(database)) {
      sqlite3_stmt* statement = nullptr;
      KVSWEEP_CHECK(sqlite3_prepare_v2(database, sql.data(), static_cast<int>(sql.size()),
                                       &statement, nullptr) == SQLITE_OK)
          << sqlite3_errmsg(database) << " in " << std::string(sql);
      int step = 0;
      while ((step = sqlite3_step(statement)) == SQLITE_ROW) {
        std::vector<std::string> values;
        for (int i = 0; i < sqlite3_column_count(statement); ++i) {
          values.push_back(Text(statement, i));
        }
        rows.push_back(absl::StrJoin(values, "|"));
      }
      KVSWEEP_CHECK_EQ(step, SQLITE_DONE) << sqlite3_errmsg(database) << " in " << std::string(sql);
      sqlite3_finalize(statement);
    }
  }
  sqlite3_close(database);
  return rows;
}

int64_t StoreFile::Number(absl::string_view sql) const {
  const std::vector<std::string> rows = Rows(sql);
  int64_t number = 0;
  KVSWEEP_CHECK(rows.empty() || rows[0] == "NULL" || absl::SimpleAtoi(rows[0], &number));
  return number;
}

std::map<std::string, std::vector<std::string>> StoreFile::Accepted(int64_t experiment) const {
  const auto of_trials = [&](absl::string_view columns, absl::string_view view) {
    return Rows(absl::StrCat(
        "WITH k AS MATERIALIZED (SELECT trial_id, kind || ' ' || cell || ' repeat ' || repeat || "
        "' ' || arm AS trial FROM v_trials WHERE experiment_id = ",
        experiment, ") SELECT k.trial, ", columns, " FROM k JOIN ", view,
        " v USING (trial_id) ORDER BY 1, 2, 3, 4"));
  };
  const std::vector<std::string> columns = Rows(
      absl::StrCat("SELECT 'v.' || name FROM pragma_table_info('v_trials') WHERE name NOT IN (",
                   kProvenance, ")"));
  std::map<std::string, std::vector<std::string>> parts;
  parts["trials"] = of_trials(absl::StrJoin(columns, ", "), "v_trials");
  parts["requests"] = of_trials(
      "v.request_index, v.status, v.prompt_tokens, v.output_tokens, v.scheduled_ns, v.issued_ns, "
      "v.admitted_ns, v.first_token_ns, v.finished_ns, v.token_gaps_ns, v.preemptions, "
      "v.recomputed_tokens, v.entries_attended, v.entries_full, v.tokens_evicted, "
      "v.entries_fetched, v.kv_device_bytes_peak, v.kv_host_bytes_peak, v.output_digest, "
      "v.engaged, v.engagement_expected",
      "v_requests");
  parts["counters"] = of_trials("v.name, v.layer, v.value", "v_counters");
  parts["samples"] = of_trials("v.name, v.time_ns, v.value", "v_samples");
  parts["outcomes"] = of_trials(
      "v.evidence, v.asked_bytes, v.available_bytes, v.phase, "
      "v.duration_ns, v.signal, v.log_tail",
      "v_outcomes");
  parts["facts"] = of_trials("v.name, v.value, 0", "v_facts");
  parts["notes"] = of_trials("v.metric, v.reason, 0", "v_notes");
  return parts;
}

std::set<int64_t> StoreFile::RecordIds() const {
  std::set<int64_t> ids;
  for (const std::string& row : Rows(absl::StrCat("SELECT record_id FROM ", kRecords))) {
    int64_t id = 0;
    KVSWEEP_CHECK(absl::SimpleAtoi(row, &id));
    ids.insert(id);
  }
  return ids;
}

std::vector<std::string> StoreFile::Violations() const {
  std::vector<std::string> found;
  const auto check = [&](absl::string_view what, absl::string_view sql) {
    for (const std::string& row : Rows(sql)) found.push_back(absl::StrCat(what, ": ", row));
  };
  check("integrity check",
        "SELECT integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok'");
  check("foreign key", "SELECT * FROM pragma_foreign_key_check");
  const auto with_records = [](absl::string_view sql) {
    return absl::StrReplaceAll(sql, {{"$records", kRecords}});
  };
  check("stored twice (attempt, sequence)",
        with_records("SELECT record_id >> 32, record_id & 4294967295 FROM $records "
                     "GROUP BY record_id HAVING count(*) > 1"));
  check("records missing (attempt, stored, last sequence)",
        with_records("SELECT attempt, count(record_id), records FROM v_attempts LEFT JOIN $records "
                     "ON record_id >> 32 = attempt GROUP BY attempt "
                     "HAVING count(record_id) <> records"));
  // What a discard drops: the records of its trial before it, back to the trial's first start.
  check("finish counts otherwise (attempt, remaining, count)",
        with_records(
            "WITH r AS MATERIALIZED (SELECT record_id FROM $records), "
            "dropped AS (SELECT d.record_id AS last, (SELECT min(s.record_id) FROM trial_start s "
            "WHERE s.trial_id = d.trial_id AND s.record_id >> 32 = d.record_id >> 32) AS first "
            "FROM discard d) "
            "SELECT a.attempt, count(r.record_id) AS remaining, f.count FROM v_attempts a "
            "JOIN finish f ON f.record_id = (a.attempt << 32) + a.records "
            "JOIN r ON r.record_id >> 32 = a.attempt AND r.record_id <> f.record_id "
            "WHERE a.state = 'accepted' AND r.record_id NOT IN (SELECT record_id FROM discard) "
            "AND NOT EXISTS (SELECT 1 FROM dropped WHERE r.record_id BETWEEN first AND last) "
            "GROUP BY a.attempt HAVING remaining <> f.count"));
  check("accepted more or less than once (round, attempts)",
        "SELECT r.round_id, count(a.attempt) FROM v_rounds r LEFT JOIN v_attempts a "
        "ON a.round_id = r.round_id AND a.state = 'accepted' WHERE r.state = 'done' "
        "GROUP BY r.round_id HAVING count(a.attempt) <> 1");
  check("accepted without a finish record",
        "SELECT attempt FROM v_attempts WHERE state = 'accepted' AND NOT EXISTS "
        "(SELECT 1 FROM finish WHERE record_id = (attempt << 32) + records)");
  return found;
}

}  // namespace kvsweep
