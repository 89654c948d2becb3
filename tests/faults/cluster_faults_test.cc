// The promises of docs/PROTOCOL.md and docs/STORAGE.md with real processes: a coordinator and two
// workers with their runners serve an experiment in modelled time, whose rows are therefore the
// same in every run. Processes are killed in the middle of it. Afterwards everything has ended, and
// all that the store accepted equals, row for row, what an undisturbed run gave.
//
// KVSWEEP_FAULTS_STRIKES=N strikes so often at random moments, KVSWEEP_FAULTS_SEED=S in another
// order.

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/random.h"
#include "tests/faults/cluster.h"
#include "tests/faults/stale_report.h"

namespace kvsweep {
namespace {

using Parts = std::map<std::string, std::vector<std::string>>;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  uint64_t number = 0;
  return text != nullptr && absl::SimpleAtoi(text, &number) ? number : otherwise;
}

// The first rows in which two sorted lists differ, for people.
std::string FirstDifference(const std::vector<std::string>& expected,
                            const std::vector<std::string>& got) {
  const size_t common = std::min(expected.size(), got.size());
  for (size_t i = 0; i < common; ++i) {
    if (expected[i] != got[i]) {
      return absl::StrCat("row ", i, "\nundisturbed: ", expected[i], "\nnow:         ", got[i]);
    }
  }
  return absl::StrCat(expected.size(), " rows undisturbed, ", got.size(), " now");
}

// How a worker is shown by `kvsweep workers`.
std::string ShownState(const Cluster& cluster, const std::string& worker) {
  const ProcessResult result = cluster.Kvsweep({"workers", "--output", "csv"});
  for (absl::string_view line : absl::StrSplit(result.out, '\n')) {
    if (absl::StartsWith(line, absl::StrCat(worker, ","))) return std::string(line);
  }
  return result.err;
}

// Waits until the worker is shown as lost. A question asked more than 3 s after the blow must be
// answered so, however slow this machine answers.
void ExpectShownLostSince(const Cluster& cluster, const std::string& worker, int64_t blow_ns) {
  while (true) {
    const int64_t asked_ns = RealClock::Get().NowNs() - blow_ns;
    const std::string shown = ShownState(cluster, worker);
    if (absl::StrContains(shown, "lost") || absl::StrContains(shown, "gone")) {
      Tell(absl::StrCat("asked ", asked_ns / kNsPerMs, " ms after: ", shown));
      return;
    }
    ASSERT_LE(asked_ns, 3 * kNsPerSecond) << "worker " << worker << " is still shown as " << shown;
  }
}

int64_t RecordsOf(const Cluster& cluster, int64_t attempt) {
  const std::set<int64_t> ids = cluster.store().RecordIds();
  return std::distance(ids.lower_bound(attempt << 32), ids.lower_bound((attempt + 1) << 32));
}

class ClusterFaults : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    Tell("an undisturbed run, to compare with");
    Cluster cluster;
    cluster.StartWorker("a");
    cluster.StartWorker("b");
    const int64_t experiment = cluster.Submit();
    ASSERT_TRUE(cluster.Finishes(experiment));
    undisturbed_ = new Parts(cluster.store().Accepted(experiment));
    EXPECT_EQ(undisturbed_->at("trials").size(), 24u);
    // infinigen's own structures do not fit the small budget: those four trials end before serving.
    EXPECT_EQ(undisturbed_->at("requests").size(), 20u * 160);
    EXPECT_GT(undisturbed_->at("counters").size(), 24u);
    EXPECT_GT(undisturbed_->at("samples").size(), 24u);
    EXPECT_EQ(cluster.store().Violations(), std::vector<std::string>());
  }
  static void TearDownTestSuite() { delete undisturbed_; }

  // Two workers and an experiment under way.
  void StartAll(Cluster& cluster) {
    cluster.StartWorker("a");
    cluster.StartWorker("b");
    experiment_ = cluster.Submit();
  }

  // The attempt of the worker, once one of its three trials has ended and is stored.
  static int64_t MiddleOfRound(const Cluster& cluster, const std::string& worker) {
    int64_t attempt = 0;
    EXPECT_TRUE(Eventually([&] {
      attempt = cluster.RunningAttempt(worker);
      return attempt != 0 &&
             cluster.store().Number(absl::StrCat(
                 "SELECT count(*) FROM trial_outcome WHERE record_id >> 32 = ", attempt)) == 1;
    }));
    return attempt;
  }

  struct Frozen {
    int64_t attempt = 0;
    int64_t at_ns = 0;
  };

  // Stops the worker in the middle of a round: what it had sent by then has arrived, and is not
  // all.
  static Frozen FreezeInMiddle(Cluster& cluster, const std::string& worker) {
    while (true) {
      const int64_t attempt = MiddleOfRound(cluster, worker);
      const int64_t now_ns = RealClock::Get().NowNs();
      cluster.Freeze(worker);
      Pause(200 * kNsPerMs);
      if (attempt == 0 || cluster.RunningAttempt(worker) == attempt) return {attempt, now_ns};
      cluster.Thaw(worker);
    }
  }

  // The experiment ends, and nothing shows that anything happened.
  static void ExpectAsUndisturbed(const Cluster& cluster, int64_t experiment) {
    ASSERT_TRUE(cluster.Finishes(experiment))
        << absl::StrJoin(cluster.store().Rows("SELECT * FROM v_attempts"), "\n");
    EXPECT_EQ(cluster.store().Rows(absl::StrCat(
                  "SELECT round_id, state, reason FROM v_rounds WHERE experiment_id = ", experiment,
                  " AND state NOT IN ('done', 'served')")),
              std::vector<std::string>());
    std::vector<std::string> compared;
    for (const auto& [part, rows] : cluster.store().Accepted(experiment)) {
      const bool equal = rows == undisturbed_->at(part);
      EXPECT_TRUE(equal) << part << ": " << FirstDifference(undisturbed_->at(part), rows);
      compared.push_back(absl::StrCat(rows.size(), " ", part, equal ? "" : " DIFFER"));
    }
    EXPECT_EQ(cluster.store().Violations(), std::vector<std::string>());
    Tell(absl::StrCat("compared with the undisturbed run: ", absl::StrJoin(compared, ", "), "; ",
                      cluster.store().Violations().size(), " violations in the file"));
  }

  static const Parts* undisturbed_;
  int64_t experiment_ = 0;
};

const Parts* ClusterFaults::undisturbed_ = nullptr;

TEST_F(ClusterFaults, SubmittedAgainRunsNothing) {
  Cluster cluster;
  StartAll(cluster);
  ExpectAsUndisturbed(cluster, experiment_);
  const int64_t attempts = cluster.store().Number("SELECT count(*) FROM v_attempts");
  EXPECT_EQ(cluster.Submit(), experiment_) << "the same submission is the same experiment";
  const int64_t served = cluster.Submit({"--client-id", "somebody-else"});
  EXPECT_NE(served, experiment_);
  ExpectAsUndisturbed(cluster, served);
  EXPECT_EQ(cluster.store().Number("SELECT count(*) FROM v_attempts"), attempts);
  Tell(absl::StrCat("submitted twice more: still ", attempts, " attempts"));
}

TEST_F(ClusterFaults, KilledWorkerIsShownLostAndItsRoundRunsElsewhere) {
  Cluster cluster;
  StartAll(cluster);
  const int64_t attempt = FreezeInMiddle(cluster, "a").attempt;
  const pid_t runner = cluster.RunnerOf("a");
  EXPECT_NE(runner, 0);
  cluster.KillWorker("a");
  const int64_t blow_ns = RealClock::Get().NowNs();
  Tell(absl::StrCat("kill -9 worker a in attempt ", attempt, ", ", RecordsOf(cluster, attempt),
                    " records stored"));
  ExpectShownLostSince(cluster, "a", blow_ns);
  EXPECT_TRUE(Eventually([&] { return !ProcessIsAlive(runner); })) << "its runner outlived it";

  ExpectAsUndisturbed(cluster, experiment_);
  EXPECT_EQ(cluster.StateOf(attempt), "void");
  EXPECT_EQ(
      cluster.store().Rows(absl::StrCat("SELECT r.worker_id FROM v_rounds r JOIN v_attempts a "
                                        "USING (round_id) WHERE a.attempt = ",
                                        attempt)),
      std::vector<std::string>{"b"});
}

TEST_F(ClusterFaults, KilledRunnerCostsItsTrialAlone) {
  Cluster cluster;
  StartAll(cluster);
  // Stopped first, so that what is looked at is what is killed: a trial begun and not ended.
  int64_t attempt = 0;
  pid_t runner = 0;
  std::vector<std::string> trial;
  while (trial.size() != 1) {
    attempt = MiddleOfRound(cluster, "a");
    ASSERT_NE(attempt, 0);
    runner = cluster.RunnerOf("a");
    if (runner == 0) continue;
    kill(runner, SIGSTOP);
    Pause(200 * kNsPerMs);  // what it had sent arrives
    trial = cluster.store().Rows(absl::StrCat(
        "SELECT trial_id FROM trial_start WHERE record_id >> 32 = ", attempt,
        " EXCEPT SELECT trial_id FROM trial_outcome WHERE record_id >> 32 = ", attempt));
    if (trial.size() != 1) kill(runner, SIGCONT);
  }
  Tell(absl::StrCat("kill -9 the runner of worker a in trial ", trial[0], " of attempt ", attempt));
  kill(runner, SIGKILL);

  ExpectAsUndisturbed(cluster, experiment_);
  EXPECT_EQ(cluster.StateOf(attempt), "accepted") << "the round went on where it was";
  EXPECT_EQ(cluster.store().Rows("SELECT trial_id, executions FROM v_trials WHERE executions <> 1"),
            std::vector<std::string>{absl::StrCat(trial[0], "|2")});
  EXPECT_EQ(cluster.store().Rows("SELECT trial_id FROM discard"), trial);
}

TEST_F(ClusterFaults, KilledCoordinatorGoesOnFromItsStore) {
  Cluster cluster;
  experiment_ = cluster.Submit();
  const auto watch = cluster.Watch(experiment_);
  EXPECT_TRUE(Eventually([&] { return !watch->Err().empty(); })) << "watch shows nothing";
  cluster.StartWorker("a");
  cluster.StartWorker("b");
  EXPECT_TRUE(Eventually(
      [&] { return cluster.RunningAttempt("a") != 0 && cluster.RunningAttempt("b") != 0; }));
  const std::vector<pid_t> runners = {cluster.RunnerOf("a"), cluster.RunnerOf("b")};
  cluster.KillCoordinator();
  const std::set<int64_t> stored = cluster.store().RecordIds();
  const std::vector<std::string> open =
      cluster.store().Rows("SELECT attempt FROM v_attempts WHERE state = 'open'");
  Tell(absl::StrCat("kill -9 the coordinator; attempts ", absl::StrJoin(open, " and "),
                    " are open, ", stored.size(), " records stored"));
  Pause(300 * kNsPerMs);  // the trials go on meanwhile
  cluster.StartCoordinator();

  ExpectAsUndisturbed(cluster, experiment_);
  for (const std::string& attempt : open) {
    EXPECT_EQ(cluster.store().Rows("SELECT state FROM v_attempts WHERE attempt = " + attempt),
              std::vector<std::string>{"accepted"});
  }
  EXPECT_EQ(cluster.store().Rows("SELECT attempt, worker_id, state, reason FROM v_attempts WHERE "
                                 "state <> 'accepted'"),
            std::vector<std::string>{});
  EXPECT_EQ(cluster.store().Number("SELECT max(executions) FROM v_trials"), 1);
  EXPECT_EQ((std::vector<pid_t>{cluster.RunnerOf("a"), cluster.RunnerOf("b")}), runners);
  const std::set<int64_t> now = cluster.store().RecordIds();
  EXPECT_TRUE(std::includes(now.begin(), now.end(), stored.begin(), stored.end()))
      << "a record that was stored is gone";
  const ProcessResult watched = watch->Wait();
  EXPECT_EQ(watched.exit_code, 0) << watched.err;
  EXPECT_TRUE(absl::StrContains(watched.out, "8 of 8 rounds")) << watched.out;
}

TEST_F(ClusterFaults, FrozenPastItsLeaseAWorkerIsRefused) {
  Cluster cluster("2s");
  StartAll(cluster);
  const auto [attempt, blow_ns] = FreezeInMiddle(cluster, "a");
  Tell(absl::StrCat("SIGSTOP worker a in attempt ", attempt));
  ExpectShownLostSince(cluster, "a", blow_ns);
  EXPECT_TRUE(Eventually([&, frozen = attempt] { return cluster.StateOf(frozen) == "void"; }));
  const int64_t records = RecordsOf(cluster, attempt);
  cluster.Thaw("a");
  Tell(absl::StrCat("SIGCONT after the lease; ", records, " records of the attempt are stored"));
  // What of its rows it sends before it hears that it was taken off the attempt is up to chance, so
  // one more is sent in its name: it did not hear at all.
  const std::string answer = ReportStaleRow(cluster, "a", attempt, records + 1);
  Tell("a row more, sent in its name: " + answer);
  EXPECT_TRUE(absl::StartsWith(answer, "refused")) << answer;

  ExpectAsUndisturbed(cluster, experiment_);
  EXPECT_EQ(RecordsOf(cluster, attempt), records) << "a stale row was stored";
  EXPECT_EQ(cluster.StateOf(attempt), "void");
}

// Strikes at processes at random moments, by kill -9 or SIGSTOP, and starts again what was struck.
class Storm {
 public:
  Storm(Cluster& cluster, uint64_t seed) : cluster_(cluster), random_(seed) {}

  void Strike() {
    Pause(static_cast<int64_t>(random_.Uniform(1000)) * kNsPerMs);
    if (MostLeases() >= kLeasesToStrike) return;
    const std::string worker = random_.Bernoulli(0.5) ? "a" : "b";
    switch (random_.Uniform(9)) {
      case 0:
      case 1:
        return Restart("coordinator", true, {});
      case 2:
      case 3:
        return Restart("worker", false, {worker});
      case 4:
        return Restart("everything", true, {"a", "b"});
      case 5:
        return FreezePastLease(worker);
      default:
        return StrikeRunner(worker);
    }
  }

  int64_t strikes() const {
    int64_t sum = 0;
    for (const auto& [what, count] : strikes_) sum += count;
    return sum;
  }
  std::string Counts() const { return absl::StrJoin(strikes_, ", ", absl::PairFormatter(" ")); }

 private:
  // A round that was leased so often is left in peace: after 16 leases it would be given up.
  static constexpr int64_t kLeasesToStrike = 10;

  int64_t MostLeases() const {
    return cluster_.store().Number(
        "SELECT max(leases) FROM (SELECT count(*) AS leases FROM v_attempts a JOIN v_rounds r "
        "ON r.round_id = a.round_id WHERE r.state IN ('queued', 'running') GROUP BY a.round_id)");
  }

  void Restart(const std::string& what, bool coordinator, const std::vector<std::string>& workers) {
    if (coordinator) cluster_.KillCoordinator();
    for (const std::string& worker : workers) cluster_.KillWorker(worker);
    Pause(static_cast<int64_t>(random_.Uniform(300)) * kNsPerMs);
    if (coordinator) cluster_.StartCoordinator();
    for (const std::string& worker : workers) cluster_.StartWorker(worker);
    ++strikes_[what];
  }

  void FreezePastLease(const std::string& worker) {
    cluster_.Freeze(worker);
    Pause(2 * kNsPerSecond + static_cast<int64_t>(random_.Uniform(1000)) * kNsPerMs);
    cluster_.Thaw(worker);
    ++strikes_["frozen past the lease"];
  }

  // Once in an attempt at most: the third death in a trial is a result, and not that of the
  // undisturbed run.
  void StrikeRunner(const std::string& worker) {
    const int64_t attempt = cluster_.RunningAttempt(worker);
    const pid_t runner = cluster_.RunnerOf(worker);
    if (attempt == 0 || runner == 0 || !struck_.insert(attempt).second) return;
    kill(runner, SIGKILL);
    ++strikes_["runner"];
  }

  Cluster& cluster_;
  Random random_;
  std::map<std::string, int64_t> strikes_;
  std::set<int64_t> struck_;  // attempts
};

TEST_F(ClusterFaults, KilledAtRandomAgainAndAgainEverythingEnds) {
  const uint64_t seed = FromEnvironment("KVSWEEP_FAULTS_SEED", 1);
  const auto strikes = static_cast<int64_t>(FromEnvironment("KVSWEEP_FAULTS_STRIKES", 12));
  SCOPED_TRACE(absl::StrCat("KVSWEEP_FAULTS_SEED=", seed, " KVSWEEP_FAULTS_STRIKES=", strikes));
  Cluster cluster("2s");
  cluster.StartWorker("a");
  cluster.StartWorker("b");
  Storm storm(cluster, seed);
  int64_t experiments = 0;
  while (storm.strikes() < strikes && !HasFailure()) {
    const int64_t experiment =
        cluster.Submit({"--fresh", "--client-id", absl::StrCat("storm-", ++experiments)});
    while (storm.strikes() < strikes && !cluster.IsFinished(experiment)) storm.Strike();
    Tell(absl::StrCat("seed ", seed, ", struck so far: ", storm.Counts()));
    ExpectAsUndisturbed(cluster, experiment);
  }
  Tell(absl::StrCat("ledger: struck at random: ", storm.Counts(), "; ", experiments,
                    " experiments equal to the undisturbed run"));
}

}  // namespace
}  // namespace kvsweep
