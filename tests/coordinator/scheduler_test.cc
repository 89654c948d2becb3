#include "coordinator/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"

namespace kvsweep {
namespace {

// A world of workers that run what they are told, lose their connection, die and lie, around one
// scheduler that is also restarted; the world keeps the rows of the plans as a store would. Time
// and chance come from the seed.
class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    const uint64_t workers = 1 + random_.Uniform(5);
    for (uint64_t w = 0; w < workers; ++w) {
      WorkerReport& report = workers_.emplace_back();
      report.worker = WorkerId(absl::StrCat("w", w));
      report.incarnation = ++incarnation_;
      report.machine = absl::StrCat("m", random_.Uniform(2));
      report.slots.resize(1 + random_.Uniform(3));
      for (SlotReport& slot : report.slots) slot.devices.resize(1 + random_.Uniform(2));
      if (random_.Bernoulli(0.5)) report.model_digests.insert("model");
    }
    workers_[0].model_digests.insert("model");  // every round fits somewhere
    workers_[0].slots[0].devices.resize(2);
    connected_.assign(workers, false);
    Start();
  }

  // One step with faults, then what follows from it.
  void Step(bool faults) {
    now_ns_ += static_cast<int64_t>(random_.Uniform(faults ? 800 : 300)) * kNsPerMs;
    if (faults) Fault();
    for (size_t w = 0; w < workers_.size(); ++w) {
      if (!faults) connected_[w] = true;
      if (connected_[w]) Speak(w);
    }
    Turn();
  }

  void Submit() {
    std::vector<RoundDescriptor> rounds;
    const RoundRequirement requirement{.devices = 1 + static_cast<uint32_t>(random_.Uniform(2)),
                                       .model_digest = random_.Bernoulli(0.5) ? "model" : "",
                                       .uses_host_tier = random_.Bernoulli(0.5),
                                       .modelled_time = random_.Bernoulli(0.3)};
    const uint64_t count = 1 + random_.Uniform(8);
    for (uint64_t i = 0; i < count; ++i) rounds.push_back({RoundId(++last_round_), requirement});
    const ExperimentId experiment(++last_experiment_);
    for (const RoundDescriptor& round : rounds) open_rounds_[round.round] = {experiment, round};
    submitted_[experiment] = count;
    scheduler_->Submit(now_ns_, experiment, rounds, {});
  }

  void DrainNobody() {
    for (const WorkerReport& report : workers_) {
      scheduler_->Drain(now_ns_, report.worker, false);
    }
  }

  bool AllDone() const { return open_rounds_.empty(); }

  // What the scheduler counts is what the rows say.
  void CheckProgress() const {
    for (const auto& [experiment, count] : submitted_) {
      const ExperimentProgress* progress = scheduler_->FindProgress(experiment);
      if (progress == nullptr) continue;  // finished before a restart
      EXPECT_EQ(progress->rounds, count);
      EXPECT_TRUE(progress->finished());
    }
  }

 private:
  struct OpenRound {
    ExperimentId experiment;
    RoundDescriptor descriptor;
  };

  void Start() {
    SchedulerOptions options;
    options.max_attempts = 1000;  // faults are many here; giving up has its own tests
    options.max_failures = 1000;
    options.poison_losses = 1000;
    scheduler_ = std::make_unique<Scheduler>(options, Attempt(highest_.value() + 1));
    std::map<ExperimentId, std::vector<RoundDescriptor>> rounds;
    for (const auto& [id, round] : open_rounds_) {
      rounds[round.experiment].push_back(round.descriptor);
    }
    for (const auto& [experiment, list] : rounds) {
      std::array<uint64_t, 5> ended{};
      ended[0] = submitted_[experiment] - list.size();
      scheduler_->Submit(now_ns_, experiment, list, ended);
    }
    for (const auto& [attempt, grant] : open_) {
      scheduler_->RecoverLease(now_ns_, {attempt, grant.round, grant.worker, grant.incarnation,
                                         grant.machine, grant.slot});
    }
    std::fill(connected_.begin(), connected_.end(), false);
  }

  void Fault() {
    const size_t w = random_.Uniform(workers_.size());
    WorkerReport& report = workers_[w];
    switch (random_.Uniform(10)) {
      case 0:
        connected_[w] = false;  // silent
        break;
      case 1:
        if (connected_[w]) scheduler_->Broken(now_ns_, report.worker, report.incarnation);
        connected_[w] = false;
        break;
      case 2:  // killed and started again
        report.incarnation = ++incarnation_;
        for (SlotReport& slot : report.slots) slot.holding.reset();
        connected_[w] = true;
        break;
      case 3:
        Start();
        break;
      case 4:
        Submit();
        break;
      case 5:
        scheduler_->Drain(now_ns_, report.worker, random_.Bernoulli(0.3));
        break;
      case 6: {  // lies about what it holds
        SlotReport& slot = report.slots[random_.Uniform(report.slots.size())];
        slot.holding = SlotHolding{.attempt = Attempt(random_.Uniform(highest_.value() + 3))};
        break;
      }
      case 7:
        now_ns_ += static_cast<int64_t>(random_.Uniform(20)) * kNsPerSecond;
        break;
      case 8: {  // the coordinator is held up: nobody spoke since the last step
        const int64_t stall_ns = static_cast<int64_t>(random_.Uniform(40)) * kNsPerSecond;
        now_ns_ += stall_ns;
        scheduler_->Stalled(stall_ns);
        break;
      }
      default:
        connected_[w] = true;
    }
  }

  // The worker lets its slots go on a little and tells the scheduler.
  void Speak(size_t w) {
    for (SlotReport& slot : workers_[w].slots) {
      if (!slot.holding.has_value()) continue;
      SlotHolding& holding = *slot.holding;
      if (holding.phase == HoldingPhase::kStarting) {
        holding.phase = random_.Bernoulli(0.05) ? HoldingPhase::kFailed : HoldingPhase::kRunning;
      } else if (holding.phase == HoldingPhase::kRunning && random_.Bernoulli(0.4)) {
        holding.phase = HoldingPhase::kFinished;
      }
      // The store: only an open attempt of this very worker is accepted.
      const auto open = open_.find(holding.attempt);
      if (holding.phase == HoldingPhase::kFinished && open != open_.end() &&
          open->second.worker == workers_[w].worker && random_.Bernoulli(0.7)) {
        ASSERT_TRUE(
            scheduler_->MayReport(workers_[w].worker, workers_[w].incarnation, holding.attempt));
        open_rounds_.erase(open->second.round);
        open_.erase(open);
        scheduler_->Accepted(now_ns_, holding.attempt);
      }
    }
    ASSERT_TRUE(scheduler_->Heard(now_ns_, workers_[w]));
  }

  void Turn() {
    const SchedulerPlan plan = scheduler_->Decide(now_ns_);
    scheduler_->CheckInvariants();
    ASSERT_GT(plan.wake_ns, now_ns_);
    for (const VoidRow& row : plan.voids) ASSERT_EQ(open_.erase(row.attempt), 1u);
    for (const FinishRow& row : plan.finishes) ASSERT_EQ(open_rounds_.erase(row.round), 1u);
    for (const GrantRow& row : plan.grants) {
      ASSERT_GT(row.attempt, highest_) << "attempts only grow";
      highest_ = row.attempt;
      ASSERT_TRUE(open_rounds_.contains(row.round));
      for (const auto& [attempt, open] : open_) {
        ASSERT_NE(open.round, row.round) << "leased twice";
        ASSERT_FALSE(open.worker == row.worker && open.slot == row.slot) << "slot leased twice";
      }
      open_[row.attempt] = row;
    }
    for (const WorkerWish& wish : plan.wishes) Obey(wish);
  }

  // A message reaches its worker most of the time; what is not obeyed is wished again.
  void Obey(const WorkerWish& wish) {
    const auto worker = std::find_if(workers_.begin(), workers_.end(), [&](const auto& report) {
      return report.worker == wish.worker && report.incarnation == wish.incarnation;
    });
    if (worker == workers_.end() || !connected_[worker - workers_.begin()]) return;
    if (random_.Bernoulli(0.2)) return;
    for (const SlotWish& slot : wish.slots) {
      std::optional<SlotHolding>& holding = worker->slots.at(slot.slot.value()).holding;
      if (slot.kind == SlotWish::Kind::kRun) {
        ASSERT_FALSE(holding.has_value()) << "told to run before the last attempt was settled";
        holding = SlotHolding{.attempt = slot.attempt};
      } else if (slot.kind == SlotWish::Kind::kAbandon) {
        holding->phase = HoldingPhase::kAbandoned;
      } else {
        holding.reset();
      }
    }
  }

  Random random_;
  int64_t now_ns_ = 0;
  uint64_t incarnation_ = 0;
  uint64_t last_round_ = 0;
  uint64_t last_experiment_ = 0;
  std::unique_ptr<Scheduler> scheduler_;
  std::vector<WorkerReport> workers_;
  std::vector<bool> connected_;

  std::map<RoundId, OpenRound> open_rounds_;
  std::map<ExperimentId, uint64_t> submitted_;
  std::map<Attempt, GrantRow> open_;
  Attempt highest_;
};

TEST(SchedulerTest, RandomWorldsKeepTheInvariantsAndFinishWhenFaultsStop) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    World world(seed);
    world.Submit();
    for (int step = 0; step < 150; ++step) world.Step(/*faults=*/true);
    world.DrainNobody();
    int steps = 0;
    while (!world.AllDone() && ++steps < 5000) world.Step(/*faults=*/false);
    ASSERT_TRUE(world.AllDone());
    world.CheckProgress();
    if (testing::Test::HasFailure()) break;
  }
}

WorkerReport OneSlot(const std::string& name) {
  WorkerReport report;
  report.worker = WorkerId(name);
  report.incarnation = 1;
  report.machine = name;
  report.slots.resize(1);
  report.slots[0].devices.resize(1);
  return report;
}

TEST(SchedulerTest, AMillionRoundsOnAThousandWorkersInOrder) {
  constexpr uint64_t kRounds = 1'000'000;
  constexpr uint64_t kWorkers = 1'000;
  Scheduler scheduler(SchedulerOptions(), Attempt(1));
  for (uint64_t experiment = 1; experiment <= 100; ++experiment) {
    std::vector<RoundDescriptor> rounds;
    for (uint64_t i = 1; i <= kRounds / 100; ++i) {
      rounds.push_back({RoundId((experiment - 1) * kRounds / 100 + i),
                        {.model_digest = absl::StrCat("model", experiment)}});
    }
    scheduler.Submit(0, ExperimentId(experiment), std::move(rounds), {});
  }
  std::vector<WorkerReport> workers;
  for (uint64_t w = 0; w < kWorkers; ++w) {
    workers.push_back(OneSlot(absl::StrCat("w", w)));
    workers.back().model_digests = {"model1", absl::StrCat("model", 2 + w % 9)};
    ASSERT_TRUE(scheduler.Heard(0, workers.back()));
  }
  SchedulerPlan plan = scheduler.Decide(0);
  ASSERT_EQ(plan.grants.size(), kWorkers);
  std::map<RoundId, uint64_t> granted;
  for (int turn = 1; turn <= 20; ++turn) {
    const std::vector<GrantRow> grants = plan.grants;
    for (const GrantRow& row : grants) {
      ASSERT_EQ(granted.emplace(row.round, row.attempt.value()).second, true);
      const uint64_t w = std::stoull(row.worker.value().substr(1));
      workers[w].slots[0].holding = SlotHolding{.attempt = row.attempt};
      scheduler.Accepted(turn, row.attempt);
      scheduler.Heard(turn, workers[w]);
    }
    plan = scheduler.Decide(turn);
    ASSERT_EQ(plan.grants.size(), kWorkers);
  }
  // While model 1 lasts, all have it, and it came first: its rounds went out in order without a
  // hole.
  uint64_t expected = 0;
  for (const auto& [round, attempt] : granted) {
    if (round.value() > kRounds / 100) break;
    ASSERT_EQ(round.value(), ++expected);
  }
  EXPECT_EQ(expected, kRounds / 100);
  scheduler.CheckInvariants();
}

TEST(SchedulerTest, OnlyTheHolderMayReport) {
  Scheduler scheduler(SchedulerOptions(), Attempt(1));
  scheduler.Submit(0, ExperimentId(1), {{RoundId(1), {}}}, {});
  scheduler.Heard(0, OneSlot("w"));
  const Attempt attempt = scheduler.Decide(0).grants.at(0).attempt;
  EXPECT_TRUE(scheduler.MayReport(WorkerId("w"), 1, attempt));
  EXPECT_FALSE(scheduler.MayReport(WorkerId("w"), 2, attempt));
  EXPECT_FALSE(scheduler.MayReport(WorkerId("x"), 1, attempt));
  EXPECT_TRUE(scheduler.MayReport(WorkerId("x"), 1, Attempt(99)));  // the store's business
}

TEST(SchedulerTest, ARoundIsGivenUpAfterItsLastAttempt) {
  SchedulerOptions options;
  options.max_attempts = 3;
  Scheduler scheduler(options, Attempt(1));
  scheduler.Submit(0, ExperimentId(1), {{RoundId(1), {}}}, {});
  WorkerReport worker = OneSlot("w");
  for (uint64_t incarnation = 1; incarnation <= 3; ++incarnation) {
    worker.incarnation = incarnation;
    scheduler.Heard(0, worker);
    ASSERT_EQ(scheduler.Decide(0).grants.size(), 1u);
  }
  worker.incarnation = 4;
  scheduler.Heard(0, worker);
  const SchedulerPlan plan = scheduler.Decide(0);
  ASSERT_EQ(plan.finishes.size(), 1u);
  EXPECT_EQ(plan.finishes[0].end, RoundEnd::kFailed);
  EXPECT_TRUE(scheduler.FindProgress(ExperimentId(1))->finished());
}

// "bad" fails whatever it is handed in its next heartbeat, "good" runs a round for 20 s.
TEST(SchedulerTest, AWorkerWhereAllFailsAtOnceEndsNoRoundThatAnotherCanRun) {
  constexpr uint64_t kRounds = 40;
  Scheduler scheduler(SchedulerOptions(), Attempt(1));
  std::vector<RoundDescriptor> rounds;
  for (uint64_t id = 1; id <= kRounds; ++id) rounds.push_back({RoundId(id), {}});
  scheduler.Submit(0, ExperimentId(1), rounds, {});
  WorkerReport bad = OneSlot("bad");
  WorkerReport good = OneSlot("good");
  int64_t good_until_ns = 0;
  uint64_t failures = 0;
  const ExperimentProgress& progress = *scheduler.FindProgress(ExperimentId(1));
  for (int64_t now_ns = 0; now_ns < 3600 * kNsPerSecond && !progress.finished();
       now_ns += kNsPerSecond) {
    std::optional<SlotHolding>& held_by_good = good.slots[0].holding;
    if (held_by_good.has_value() && now_ns >= good_until_ns) {
      scheduler.Accepted(now_ns, held_by_good->attempt);
      held_by_good.reset();
    }
    ASSERT_TRUE(scheduler.Heard(now_ns, bad));
    ASSERT_TRUE(scheduler.Heard(now_ns, good));
    bad.slots[0].holding.reset();
    const SchedulerPlan plan = scheduler.Decide(now_ns);
    scheduler.CheckInvariants();
    EXPECT_TRUE(plan.finishes.empty());
    for (const GrantRow& row : plan.grants) {
      const bool to_good = row.worker == good.worker;
      WorkerReport& worker = to_good ? good : bad;
      worker.slots[0].holding = {.attempt = row.attempt,
                                 .phase = to_good ? HoldingPhase::kRunning : HoldingPhase::kFailed,
                                 .reason = "no such model"};
      if (to_good) good_until_ns = now_ns + 20 * kNsPerSecond;
      failures += to_good ? 0 : 1;
    }
  }
  EXPECT_EQ(progress.ended[static_cast<size_t>(RoundEnd::kAccepted)], kRounds);
  EXPECT_GE(failures, 3u);
  EXPECT_LE(failures, kRounds);  // no round fails there twice
}

TEST(SchedulerTest, MishapsSurviveARestart) {
  SchedulerOptions options;
  Scheduler scheduler(options, Attempt(10));
  scheduler.Submit(0, ExperimentId(1), {{RoundId(1), {}}}, {});
  for (int loss = 0; loss < 2; ++loss) {
    scheduler.RecoverMishap(RoundId(1), {.kind = Mishap::Kind::kWorkerLost,
                                         .worker = WorkerId("gone"),
                                         .machine = "a",
                                         .trial = TrialId(5)});
  }
  WorkerReport worker = OneSlot("w");
  scheduler.Heard(0, worker);
  const Attempt attempt = scheduler.Decide(0).grants.at(0).attempt;
  worker.slots[0].holding = SlotHolding{.attempt = attempt, .trial = TrialId(5)};
  scheduler.Heard(0, worker);
  worker.incarnation = 2;
  scheduler.Heard(0, worker);
  const SchedulerPlan plan = scheduler.Decide(0);
  ASSERT_EQ(plan.finishes.size(), 1u);
  EXPECT_EQ(plan.finishes[0].end, RoundEnd::kPoisoned);
  EXPECT_EQ(plan.finishes[0].poisoned_trial, TrialId(5));
}

}  // namespace
}  // namespace kvsweep
