#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "coordinator/persistence.h"
#include "coordinator/scheduler.h"
#include "storage/memory_store.h"
#include "storage/store.h"
#include "tests/worker/memory_spill_file.h"
#include "worker/session.h"
#include "worker/wire.h"

// A whole cluster in one thread: the scheduler, real sessions with runners that crash, and the
// store's rules, joined by streams that break and lose answers. Processes are killed and started
// again; time jumps. After the faults stop, everything must end, and what the store accepted must
// be what the runners measured, whole and once.
//
// A failing seed repeats alone with KVSWEEP_SIM_SEED=N; KVSWEEP_SIM_RUNS=N plays more of them.

namespace kvsweep {
namespace {

constexpr uint32_t kRowsPerTrial = 6;

// What a runner measures depends on the trial alone, so that any two executions of it agree.
Record RowOf(TrialId trial, uint32_t index) {
  Record record;
  record.set_trial_id(trial.value());
  if (index == 0) {
    record.mutable_start()->set_backend("cpu");
    record.mutable_start()->set_execution(1);
  } else if (index + 1 < kRowsPerTrial) {
    record.mutable_counter()->set_name(absl::StrCat("counter", index));
    record.mutable_counter()->set_layer(-1);
    record.mutable_counter()->set_value(static_cast<double>(trial.value() * 1000 + index));
  } else {
    record.mutable_outcome()->set_outcome(OUTCOME_OK);
  }
  return record;
}

struct Chances {
  double break_stream = 0;
  double lose_answer = 0;
  double crash_runner = 0;
  double kill_worker = 0;
  double restart_coordinator = 0;
  double jump = 0;
};

// A worker process: a session, and a runner for each slot that does as it is told, more or less.
class SimWorker {
 public:
  SimWorker(const std::string& name, const std::string& machine, size_t slots, Random& random)
      : name_(name), machine_(machine), slots_(slots), random_(random) {}

  void StartProcess(int64_t now_ns, uint64_t incarnation) {
    incarnation_ = incarnation;
    runners_.assign(slots_, Runner());
    spills_ = std::vector<MemorySpillFile>(slots_);
    std::vector<SpillFile*> spills;
    for (MemorySpillFile& spill : spills_) spills.push_back(&spill);
    SessionOptions options;
    options.slots = slots_;
    options.outbox.memory_records = 8;  // so that rows are spilled too
    options.outbox.batch_records = 4;
    session_ = std::make_unique<Session>(options, encoder_, spills);
    connected_ = false;
    prepare_.clear();
    Obey(session_->Start(now_ns));
  }

  // Runners and preparations go on a little.
  void Live(int64_t now_ns, double crash) {
    for (const auto& [slot, attempt] : std::exchange(prepare_, {})) {
      const bool fails = random_.Bernoulli(crash / 4);
      Obey(session_->OnRoundPrepared(
          now_ns, slot, attempt, fails ? absl::NotFoundError("no such file") : absl::OkStatus()));
    }
    for (size_t index = 0; index < slots_; ++index) LiveRunner(now_ns, SlotIndex(index), crash);
    Obey(session_->OnTick(now_ns));
    session_->CheckInvariants();
  }

  WorkerReport Report() {
    const SessionReport session = session_->TakeReport();
    generation_ = session.generation;
    WorkerReport report;
    report.worker = WorkerId(name_);
    report.incarnation = incarnation_;
    report.machine = machine_;
    report.unhealthy_reason = session.unhealthy_reason;
    for (const SessionSlot& slot : session.slots) {
      SlotReport& out = report.slots.emplace_back();
      if (slot.available) out.devices.resize(1);
      if (!slot.holding.has_value()) continue;
      out.holding = SlotHolding{.attempt = slot.holding->attempt,
                                .phase = static_cast<HoldingPhase>(slot.holding->phase),
                                .trial = slot.holding->trial,
                                .reason = slot.holding->reason};
    }
    return report;
  }

  void TakeWishes(int64_t now_ns, const std::vector<SessionWish>& wishes) {
    Obey(session_->OnWishes(now_ns, generation_, wishes));
  }

  void TakeReply(int64_t now_ns, Attempt attempt, bool refused, uint64_t through) {
    if (refused) return session_->OnRefused(attempt);
    absl::StatusOr<SessionPlan> plan = session_->OnAcknowledged(now_ns, attempt, through);
    ASSERT_TRUE(plan.ok()) << plan.status();
    Obey(*plan);
  }

  bool connected() const { return connected_; }
  void Connect() {
    connected_ = true;
    session_->OnReportConnected();
  }
  void Disconnect() { connected_ = false; }
  Session& session() { return *session_; }
  const std::string& name() const { return name_; }
  uint64_t incarnation() const { return incarnation_; }

 private:
  struct Runner {
    enum class State { kAbsent, kStarting, kReady, kDying };
    State state = State::kAbsent;
    TrialId trial;  // 0: none
    uint32_t next_row = 0;
    bool cancelled = false;
  };

  void Obey(const SessionPlan& plan) {
    for (const SessionAction& action : plan.actions) {
      Runner& runner = runners_[action.slot.value()];
      switch (action.kind) {
        case SessionAction::Kind::kStartRunner:
          runner = {.state = Runner::State::kStarting, .trial = TrialId()};
          break;
        case SessionAction::Kind::kStopRunner:
          runner.state = Runner::State::kDying;
          break;
        case SessionAction::Kind::kPrepareRound:
          prepare_.emplace_back(action.slot, action.attempt);
          break;
        case SessionAction::Kind::kSendTrial:
          runner.trial = action.trial;
          runner.next_row = 0;
          runner.cancelled = false;
          break;
        case SessionAction::Kind::kCancelTrial:
          runner.cancelled = true;
          break;
        case SessionAction::Kind::kForgetRound:
          break;
      }
    }
  }

  void LiveRunner(int64_t now_ns, SlotIndex slot, double crash) {
    Runner& runner = runners_[slot.value()];
    if (runner.state == Runner::State::kAbsent || random_.Bernoulli(0.3)) return;
    if (runner.state == Runner::State::kDying || random_.Bernoulli(crash)) {
      runner = Runner();
      return Obey(session_->OnRunnerExited(now_ns, slot, {.signal = 9}));
    }
    if (runner.state == Runner::State::kStarting) {
      runner.state = Runner::State::kReady;
      return Obey(session_->OnRunnerReady(now_ns, slot));
    }
    if (runner.trial == TrialId()) return;
    const TrialId trial = runner.trial;
    std::vector<RunnerRecord> records;
    const uint64_t rows = 1 + random_.Uniform(3);
    for (uint64_t i = 0; i < rows && runner.next_row < kRowsPerTrial; ++i) {
      Record record = RowOf(trial, runner.next_row++);
      if (runner.cancelled && record.has_counter()) {
        runner.next_row = kRowsPerTrial;
        record.mutable_outcome()->set_outcome(OUTCOME_CANCELLED);
      }
      records.push_back({trial, record.has_outcome(), SerializeRecord(record)});
    }
    Obey(session_->OnRunnerRecords(now_ns, slot, std::move(records)));
    if (runner.next_row < kRowsPerTrial || runner.state != Runner::State::kReady) return;
    runner.trial = TrialId();
    Obey(session_->OnTrialDone(now_ns, slot, trial));
  }

  const std::string name_;
  const std::string machine_;
  const size_t slots_;
  Random& random_;
  ProtoRecordEncoder encoder_;
  uint64_t incarnation_ = 0;
  uint64_t generation_ = 0;
  bool connected_ = false;
  std::vector<Runner> runners_;
  std::vector<MemorySpillFile> spills_;
  std::vector<std::pair<SlotIndex, Attempt>> prepare_;
  std::unique_ptr<Session> session_;
};

class Cluster {
 public:
  explicit Cluster(uint64_t seed)
      : random_(seed), store_(NewMemoryStore()), reader_(store_->OpenReader().value()) {
    StartCoordinator();
    const uint64_t workers = 1 + random_.Uniform(4);
    for (uint64_t w = 0; w < workers; ++w) {
      workers_.push_back(std::make_unique<SimWorker>(absl::StrCat("w", w),
                                                     absl::StrCat("m", random_.Uniform(2)),
                                                     1 + random_.Uniform(2), random_));
      workers_.back()->StartProcess(now_ns_, ++incarnation_);
    }
  }

  void Submit(uint64_t rounds) {
    SubmitExperiment operation{.client_id = absl::StrCat("client", ++submitted_), .name = "sim"};
    operation.arms = {{"a", "paged"}, {"b", "paged"}};
    operation.cells.resize(1);
    operation.submitted_unix_ns = 1;
    for (uint64_t r = 0; r < rounds; ++r) {
      NewRound& round = operation.rounds.emplace_back();
      round.repeat = static_cast<uint32_t>(r);
      round.spec.set_devices(1);
      round.spec.set_uses_host_tier(random_.Bernoulli(0.3));
      for (uint32_t arm = 0; arm < 2; ++arm) {
        PlannedTrial* trial = round.spec.add_trials();
        trial->mutable_spec()->mutable_arm()->set_strategy("paged");
        trial->set_content_key(std::string(32, static_cast<char>('a' + arm)));
        round.trials.push_back({.arm_index = arm,
                                .content_key = trial->content_key(),
                                .quality_key = {},
                                .canonical_spec = "{}"});
      }
    }
    std::vector<RoundRequirement> requirements;
    for (const NewRound& round : operation.rounds) {
      requirements.push_back(RequirementForSim(round.spec));
    }
    const CommitResult result = Commit({std::move(operation)});
    ASSERT_TRUE(result.operations[0].status.ok()) << result.operations[0].status;
    const SubmitResult& stored = result.Get<SubmitResult>(0);
    std::vector<RoundDescriptor> descriptors;
    for (size_t i = 0; i < stored.rounds.size(); ++i) {
      descriptors.push_back({stored.rounds[i].round, requirements[i]});
      rounds_.push_back(stored.rounds[i].round);
    }
    scheduler_->Submit(now_ns_, stored.experiment, std::move(descriptors), {});
  }

  void Step(const Chances& chances) {
    now_ns_ += static_cast<int64_t>(random_.Uniform(400)) * kNsPerMs;
    if (random_.Bernoulli(chances.jump)) now_ns_ += 20 * kNsPerSecond;
    if (random_.Bernoulli(chances.restart_coordinator)) StartCoordinator();
    std::vector<Arrived> arrived;
    for (const auto& worker : workers_) Live(*worker, chances, &arrived);
    Turn(chances, arrived);
  }

  bool AllEnded() { return reader_->LoadQueue().value().rounds.empty(); }

  // What was accepted is what the runners measured; nothing that was acknowledged is missing.
  void CheckStore() {
    uint64_t accepted = 0;
    for (const RoundId id : rounds_) {
      const StoredRound round = reader_->GetRound(id).value();
      if (round.state != RoundState::kDone) continue;
      ++accepted;
      CheckRound(round);
    }
    EXPECT_GT(accepted, 0u);
    for (const auto& [attempt, through] : acknowledged_) {
      EXPECT_GE(reader_->GetAttempt(attempt).value().last_sequence, through);
    }
  }

 private:
  struct Arrived {
    SimWorker* worker;
    uint64_t incarnation;
    Attempt attempt;
    OutboxBatch rows;
  };

  static RoundRequirement RequirementForSim(const RoundSpec& spec) {
    return {.devices = 1, .uses_host_tier = spec.uses_host_tier()};
  }

  void StartCoordinator() {
    SchedulerOptions options;
    options.max_attempts = 100'000;  // faults never end a round here; that has its own tests
    options.max_failures = 100'000;
    options.poison_losses = 100'000;
    const Queue queue = reader_->LoadQueue().value();
    scheduler_ = std::make_unique<Scheduler>(options, Attempt(queue.highest_attempt.value() + 1));
    ASSERT_TRUE(RecoverScheduler(queue, *reader_, now_ns_, scheduler_.get()).ok());
    for (const QueuedRound& round : queue.rounds) {
      if (round.open_attempt.has_value() && round.open_attempt->finished) {
        accept_.push_back(round.open_attempt->attempt);
      }
    }
    for (const auto& worker : workers_) worker->Disconnect();
  }

  CommitResult Commit(std::vector<Operation> operations) {
    return store_->Commit({std::move(operations)}).value();
  }

  void Live(SimWorker& worker, const Chances& chances, std::vector<Arrived>* arrived) {
    if (random_.Bernoulli(chances.kill_worker)) worker.StartProcess(now_ns_, ++incarnation_);
    worker.Live(now_ns_, chances.crash_runner);
    if (!worker.connected()) {
      if (random_.Bernoulli(0.3)) return;
      worker.Connect();
    }
    if (random_.Bernoulli(chances.break_stream)) return Break(worker);
    ASSERT_TRUE(scheduler_->Heard(now_ns_, worker.Report()));
    for (int batches = 0; batches < 3; ++batches) {
      std::optional<Session::Batch> batch = worker.session().NextBatch();
      if (!batch.has_value()) break;
      arrived->push_back({&worker, worker.incarnation(), batch->attempt, std::move(batch->rows)});
    }
  }

  // The worker loses its streams; the coordinator hears of it, or not.
  void Break(SimWorker& worker) {
    worker.Disconnect();
    if (random_.Bernoulli(0.5)) {
      scheduler_->Broken(now_ns_, WorkerId(worker.name()), worker.incarnation());
    }
  }

  void Turn(const Chances& chances, std::vector<Arrived>& arrived) {
    const SchedulerPlan plan = scheduler_->Decide(now_ns_);
    const CommitResult rows = Commit(RowsOf(plan, now_ns_));
    for (const OperationResult& row : rows.operations) ASSERT_TRUE(row.status.ok()) << row.status;
    for (const Attempt attempt : std::exchange(accept_, {})) Accept(attempt);
    for (Arrived& batch : arrived) Append(chances, batch);
    for (const WorkerWish& wish : plan.wishes) Tell(chances, wish);
    scheduler_->CheckInvariants();
  }

  void Append(const Chances& chances, Arrived& batch) {
    bool refused =
        !scheduler_->MayReport(WorkerId(batch.worker->name()), batch.incarnation, batch.attempt);
    uint64_t through = 0;
    if (!refused) {
      const CommitResult result = Commit(
          {AppendRecords{batch.attempt, batch.rows.first_sequence, std::move(batch.rows.records)}});
      ASSERT_TRUE(result.operations[0].status.ok()) << result.operations[0].status;
      const AppendResult& stored = result.Get<AppendResult>(0);
      ASSERT_NE(stored.state, AppendResult::State::kVoided) << stored.reason;
      refused = stored.state == AppendResult::State::kRefused;
      through = stored.acknowledged_through;
      if (stored.finished && !refused) Accept(batch.attempt);
    }
    SimWorker& worker = *batch.worker;
    if (!worker.connected() || worker.incarnation() != batch.incarnation) return;
    if (random_.Bernoulli(chances.lose_answer)) return Break(worker);
    worker.TakeReply(now_ns_, batch.attempt, refused, through);
    if (!refused) acknowledged_[batch.attempt] = std::max(acknowledged_[batch.attempt], through);
  }

  void Accept(Attempt attempt) {
    const CommitResult result = Commit({AcceptAttempt{attempt, now_ns_}});
    ASSERT_TRUE(result.operations[0].status.ok()) << result.operations[0].status;
    const AcceptResult& accepted = result.Get<AcceptResult>(0);
    if (accepted.state == AcceptResult::State::kRefused) return;  // accepted before
    ASSERT_EQ(accepted.state, AcceptResult::State::kAccepted) << accepted.reason;
    scheduler_->Accepted(now_ns_, attempt);
  }

  void Tell(const Chances& chances, const WorkerWish& wish) {
    for (const auto& worker : workers_) {
      if (worker->name() != wish.worker.value() || worker->incarnation() != wish.incarnation ||
          !worker->connected()) {
        continue;
      }
      if (random_.Bernoulli(chances.lose_answer)) return;
      std::vector<SessionWish> wishes;
      for (const SlotWish& slot : wish.slots) {
        SessionWish& out = wishes.emplace_back();
        out.slot = slot.slot;
        out.attempt = slot.attempt;
        out.kind = static_cast<SessionWish::Kind>(slot.kind);
        if (slot.kind == SlotWish::Kind::kRun) {
          out.round = RoundFromWire(reader_->GetRound(slot.round).value().spec);
          for (SessionTrial& trial : out.round->trials) trial.limit_ns = 3600 * kNsPerSecond;
        }
      }
      worker->TakeWishes(now_ns_, wishes);
    }
  }

  void CheckRound(const StoredRound& round) {
    const Attempt attempt = AcceptedAttempt(round.round);
    std::map<uint64_t, std::vector<std::string>> rows;  // by trial, after the last discard
    std::map<uint64_t, Outcome> outcomes;
    const std::vector<std::string> records = reader_->ReadRecords(attempt, 1, 10'000).value();
    for (const std::string& bytes : records) {
      Record record;
      ASSERT_TRUE(record.ParseFromString(bytes));
      if (record.has_discard()) rows[record.trial_id()].clear();
      if (record.has_discard() || record.has_finish()) continue;
      if (record.has_outcome()) outcomes[record.trial_id()] = record.outcome().outcome();
      rows[record.trial_id()].push_back(bytes);
    }
    ASSERT_EQ(outcomes.size(), round.trials.size());
    for (const auto& [trial, outcome] : outcomes) {
      if (outcome == OUTCOME_CRASHED || outcome == OUTCOME_TIMEOUT) continue;
      ASSERT_EQ(outcome, OUTCOME_OK);
      ASSERT_EQ(rows[trial].size(), kRowsPerTrial);
      for (uint32_t row = 0; row < kRowsPerTrial; ++row) {
        EXPECT_EQ(rows[trial][row], SerializeRecord(RowOf(TrialId(trial), row)));
      }
    }
  }

  // The one accepted attempt of the round.
  Attempt AcceptedAttempt(RoundId round) {
    Attempt accepted;
    const Queue queue = reader_->LoadQueue().value();
    for (uint64_t attempt = 1; attempt <= queue.highest_attempt.value(); ++attempt) {
      const StoredAttempt stored = reader_->GetAttempt(Attempt(attempt)).value();
      if (stored.round != round || stored.state != AttemptState::kAccepted) continue;
      EXPECT_EQ(accepted, Attempt()) << "accepted twice";
      accepted = stored.attempt;
    }
    return accepted;
  }

  Random random_;
  int64_t now_ns_ = kNsPerSecond;
  uint64_t incarnation_ = 0;
  uint64_t submitted_ = 0;
  std::unique_ptr<Store> store_;
  std::unique_ptr<StoreReader> reader_;
  std::unique_ptr<Scheduler> scheduler_;
  std::vector<std::unique_ptr<SimWorker>> workers_;
  std::vector<RoundId> rounds_;
  std::vector<Attempt> accept_;
  std::map<Attempt, uint64_t> acknowledged_;
};

void Play(uint64_t seed) {
  SCOPED_TRACE(absl::StrCat("KVSWEEP_SIM_SEED=", seed));
  Cluster cluster(seed);
  Random random(seed ^ 0x5eed);
  const Chances faults{.break_stream = 0.1 * random.UniformDouble(),
                       .lose_answer = 0.2 * random.UniformDouble(),
                       .crash_runner = 0.05 * random.UniformDouble(),
                       .kill_worker = 0.03 * random.UniformDouble(),
                       .restart_coordinator = 0.03 * random.UniformDouble(),
                       .jump = 0.02 * random.UniformDouble()};
  cluster.Submit(1 + random.Uniform(5));
  for (int step = 0; step < 150; ++step) {
    if (random.Bernoulli(0.02)) cluster.Submit(1 + random.Uniform(3));
    cluster.Step(faults);
    if (testing::Test::HasFailure()) return;
  }
  int steps = 0;
  while (!cluster.AllEnded() && ++steps < 3000) cluster.Step(Chances());
  ASSERT_TRUE(cluster.AllEnded()) << "not everything ended after the faults did";
  cluster.CheckStore();
}

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  uint64_t number = 0;
  return text != nullptr && absl::SimpleAtoi(text, &number) ? number : otherwise;
}

TEST(ClusterSimulation, EverythingEndsWholeAndOnce) {
  if (const uint64_t seed = FromEnvironment("KVSWEEP_SIM_SEED", 0)) return Play(seed);
  const uint64_t runs = FromEnvironment("KVSWEEP_SIM_RUNS", 300);
  for (uint64_t seed = 1; seed <= runs && !testing::Test::HasFailure(); ++seed) Play(seed);
}

}  // namespace
}  // namespace kvsweep
