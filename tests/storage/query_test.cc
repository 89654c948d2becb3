#include "storage/query.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "storage/sqlite_store.h"
#include "tests/storage/store_fixture.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

// A clock that runs ahead by a second at each look.
class HastyClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_ += kNsPerSecond; }
  int64_t UnixNs() const override { return 0; }
  void SleepUntilNs(int64_t) override {}
  void WaitUntilNs(std::condition_variable&, std::unique_lock<std::mutex>&, int64_t) override {}

 private:
  mutable int64_t now_ns_ = 0;
};

class QueryTest : public testing::Test {
 protected:
  QueryTest() : path_(folder_.Join("store.db")), store_(*OpenSqliteStore(path_)) {
    // One round accepted, one void once and queued again, one cancelled with its experiment.
    Random random(4);
    first_ = std::get<SubmitResult>(Apply(*store_, MakeExperiment({})).value);
    Grant(1, first_.rounds[0].round);
    Send(1, AttemptScript::Whole(first_.rounds[0].trials, random));
    Apply(*store_, AcceptAttempt{.attempt = Attempt(1)});
    Grant(2, first_.rounds[1].round);
    Send(2, AttemptScript::Whole(first_.rounds[1].trials, random));
    Apply(*store_, VoidAttempt{.attempt = Attempt(2), .reason = "the worker was lost"});
    SubmitExperiment served = MakeExperiment({.client_id = "client-2", .rounds = 1});
    served.rounds[0].served_by = first_.rounds[0].round;
    second_ = std::get<SubmitResult>(Apply(*store_, served).value);
    query_ = *StoreQuery::Open(path_, RealClock::Get());
  }
  void Grant(uint64_t attempt, RoundId round) {
    Apply(*store_, GrantAttempt{.attempt = Attempt(attempt),
                                .round = round,
                                .worker_id = "worker-1",
                                .machine = "machine-1"});
  }
  void Send(uint64_t attempt, std::vector<std::string> records) {
    Apply(*store_,
          AppendRecords{
              .attempt = Attempt(attempt), .first_sequence = 1, .records = std::move(records)});
  }
  absl::StatusOr<Table> Run(absl::string_view sql) { return query_->Run(sql, QueryLimits()); }
  std::string One(absl::string_view sql) {
    const absl::StatusOr<Table> table = Run(sql);
    EXPECT_TRUE(table.ok()) << table.status();
    return table.ok() && !table->rows.empty() ? TableCellText(table->rows[0][0]) : "";
  }

  TempDir folder_;
  const std::string path_;
  std::unique_ptr<Store> store_;
  SubmitResult first_;
  SubmitResult second_;
  std::unique_ptr<StoreQuery> query_;
};

TEST_F(QueryTest, ValuesKeepTheirTypes) {
  const Table table =
      *Run("SELECT 1 AS a, -2.5 AS b, 'x' || char(0) AS c, x'00ff' AS d, NULL AS e");
  EXPECT_THAT(table.columns, ElementsAre("a", "b", "c", "d", "e"));
  EXPECT_THAT(table.rows[0],
              ElementsAre(TableCell(int64_t{1}), TableCell(-2.5), TableCell(std::string("x\0", 2)),
                          TableCell(Blob{std::string("\0\xff", 2)}), TableCell()));
  EXPECT_EQ(TableCellText(table.rows[0][3]), "00ff");
  EXPECT_EQ(TableCellText(table.rows[0][4]), "");
}

TEST_F(QueryTest, OnlyReadingIsAllowed) {
  for (const char* sql :
       {"ATTACH ':memory:' AS other", "PRAGMA user_version", "PRAGMA journal_mode = DELETE",
        "DELETE FROM trial", "INSERT INTO meta VALUES ('a', 'b')", "DROP VIEW v_trials",
        "CREATE TABLE t (a)", "CREATE TEMP TABLE t (a)", "VACUUM", "BEGIN", "REINDEX",
        "UPDATE round SET state = 'done'", "SELECT load_extension('x')"}) {
    EXPECT_TRUE(absl::IsPermissionDenied(Run(sql).status())) << sql << ": " << Run(sql).status();
  }
  for (const char* sql : {"", "  ;", "SELEC 1", "SELECT * FROM nothing", "SELECT 1; SELECT 2"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Run(sql).status())) << sql << ": " << Run(sql).status();
  }
  EXPECT_EQ(One("SELECT count(*) FROM v_trials"), "6");
}

TEST_F(QueryTest, AnswersAreBounded) {
  const char* endless =
      "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
  QueryLimits limits;
  limits.rows = 5;
  const Table cut = *query_->Run(endless, limits);
  EXPECT_THAT(cut.rows, SizeIs(5));
  EXPECT_TRUE(cut.truncated);
  limits.rows = 1'000'000'000;
  limits.bytes = 1000;
  EXPECT_TRUE(query_->Run(endless, limits)->truncated);
  const HastyClock hasty;
  const std::unique_ptr<StoreQuery> hurried = *StoreQuery::Open(path_, hasty);
  const absl::Status late =
      hurried
          ->Run(
              "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
              "SELECT count(*) FROM n",
              QueryLimits())
          .status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_TRUE(hurried->Run("SELECT 1", QueryLimits()).ok()) << "the connection goes on";
}

TEST_F(QueryTest, ViewsShowAcceptedAttemptsOnly) {
  EXPECT_EQ(One("SELECT count(DISTINCT trial_id) FROM v_requests"), "4");
  EXPECT_EQ(One("SELECT count(*) FROM v_requests"), "12") << "3 rows of each of 4 trials";
  EXPECT_EQ(One("SELECT count(*) FROM request"), "12") << "void attempts keep theirs for a while";
  EXPECT_EQ(One("SELECT count(*) FROM v_trials WHERE outcome = 'ok'"), "4");
  EXPECT_EQ(One("SELECT count(*) FROM v_trials WHERE served"), "2");
  EXPECT_EQ(One("SELECT group_concat(DISTINCT machine) FROM v_trials"), "machine-1");
  EXPECT_EQ(One("SELECT value FROM v_facts WHERE name = 'threads'"), "2");
  EXPECT_EQ(One("SELECT group_concat(state) FROM v_rounds"), "done,queued,served");
  EXPECT_EQ(One("SELECT json_extract(axes, '$.\"load.arrivals.rate\"') FROM v_cells"), "4");
}

TEST_F(QueryTest, EveryViewCanBeRead) {
  const Table views = *Run("SELECT name FROM sqlite_schema WHERE type = 'view'");
  EXPECT_GT(views.rows.size(), 10u);
  for (const auto& view : views.rows) {
    const absl::StatusOr<Table> rows = Run("SELECT * FROM " + TableCellText(view[0]));
    EXPECT_TRUE(rows.ok()) << TableCellText(view[0]) << ": " << rows.status();
  }
}

TEST_F(QueryTest, ListsExperiments) {
  const Table table = *query_->Experiments(10);
  ASSERT_THAT(table.rows, SizeIs(2));
  EXPECT_EQ(TableCellText(table.rows[0][1]), "experiment of client-2");
  EXPECT_EQ(TableCellText(table.rows[0][2]), "finished");
  EXPECT_EQ(TableCellText(table.rows[1][2]), "queued");
}

TEST_F(QueryTest, ShowsATrialAndItsHistory) {
  const absl::StatusOr<std::string> json = query_->ShowTrial(first_.rounds[0].trials[0]);
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_THAT(*json, HasSubstr("\"arm\":\"arm-0\""));
  EXPECT_THAT(*json, HasSubstr("\"evidence\":\"as it went\""));
  EXPECT_THAT(*json, HasSubstr("\"spec\":{\"repeat\":1}"));
  EXPECT_THAT(*json, HasSubstr("\"threads\":\"2\""));
  EXPECT_TRUE(absl::IsNotFound(query_->ShowTrial(TrialId(99)).status()));
  const absl::StatusOr<std::string> logs = query_->Logs(first_.rounds[1].trials[0]);
  ASSERT_TRUE(logs.ok()) << logs.status();
  EXPECT_THAT(*logs, HasSubstr("the worker was lost"));
  EXPECT_THAT(*logs, Not(HasSubstr("outcome:")));
  EXPECT_THAT(*query_->Logs(first_.rounds[0].trials[0]), EndsWith("outcome: ok: as it went\n"));
  EXPECT_TRUE(absl::IsNotFound(query_->Logs(TrialId(99)).status()));
}

TEST_F(QueryTest, GathersWhatAComparisonNeeds) {
  const absl::StatusOr<ReportInput> input = query_->Report(second_.experiment);
  ASSERT_TRUE(input.ok()) << input.status();
  EXPECT_EQ(input->experiment, "experiment of client-2");
  ASSERT_THAT(input->arms, SizeIs(2));
  EXPECT_EQ(input->arms[1].strategy, "h2o");
  EXPECT_EQ(input->rounds_planned, 1u);
  ASSERT_THAT(input->trials, SizeIs(2));
  EXPECT_EQ(input->trials[0].context.device_class, "class-1");
  EXPECT_EQ(input->trials[0].trial_id, second_.rounds[0].trials[0].value());
  EXPECT_THAT(input->trials[0].metrics, SizeIs(Metrics().size()));
  for (const SummaryMetric& metric : input->trials[0].metrics) {
    EXPECT_NE(metric.value.has_value(), !metric.reason.empty()) << metric.name;
  }
  EXPECT_TRUE(absl::IsNotFound(query_->Report(ExperimentId(99)).status()));
}

}  // namespace
}  // namespace kvsweep
