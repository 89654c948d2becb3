#include "worker/session.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/random.h"
#include "base/text.h"
#include "tests/worker/memory_spill_file.h"

namespace kvsweep {
namespace {

// Records as text, so that transcripts can be read.
class TextEncoder final : public RecordEncoder {
 public:
  std::string EncodeOutcome(const Outcome& outcome) const override {
    const char* names[] = {"timeout", "crashed", "recorder_overflow"};
    std::string text = absl::StrCat("outcome of ", outcome.trial.value(), ": ",
                                    names[static_cast<int>(outcome.verdict)], " in \"",
                                    outcome.phase, "\": ", outcome.evidence);
    if (outcome.signal != 0) absl::StrAppend(&text, " signal=", outcome.signal);
    if (!outcome.log_tail.empty()) absl::StrAppend(&text, " log=", outcome.log_tail);
    return text;
  }
  std::string EncodeDiscard(TrialId trial, const std::string& reason) const override {
    return absl::StrCat("discard of ", trial.value(), ": ", reason);
  }
  std::string EncodeFinish(const RecordDigest& digest) const override {
    return absl::StrCat("finish: ", digest.count, " records, ", digest.digest.Hex());
  }
};

// ------------------------------------------------------------------------------------- golden
// transcripts

// Each file of tests/golden/session holds commands, one a line, each followed by what the session
// answers (lines that start with two blanks). KVSWEEP_REWRITE_GOLDEN=1 writes the answers anew;
// read the difference.
class Transcript {
 public:
  std::string Run(const std::string& text) {
    std::string out;
    for (absl::string_view line : absl::StrSplit(text, '\n')) {
      if (absl::StartsWith(line, "  ")) continue;  // the old answer
      absl::StrAppend(&out, line, "\n");
      if (line.empty() || line[0] == '#') continue;
      absl::StrAppend(&out, Answer(line));
    }
    while (absl::EndsWith(out, "\n\n")) out.pop_back();
    return out;
  }

 private:
  // The words of a command; what follows ':' is one word.
  static std::vector<std::string> Words(absl::string_view line) {
    std::vector<std::string> words;
    const std::pair<absl::string_view, absl::string_view> halves =
        absl::StrSplit(line, absl::MaxSplits(": ", 1));
    words = absl::StrSplit(halves.first, ' ', absl::SkipEmpty());
    if (!halves.second.empty()) words.emplace_back(halves.second);
    return words;
  }

  static uint64_t Number(const std::string& word) {
    uint64_t number = 0;
    KVSWEEP_CHECK(absl::SimpleAtoi(word, &number)) << word;
    return number;
  }

  std::string Answer(absl::string_view line) {
    const std::vector<std::string> words = Words(line);
    const std::string& verb = words[0];
    const auto slot = [&] { return SlotIndex(Number(words.at(1))); };
    if (verb == "options") return SetOptions(words);
    if (session_ == nullptr) Create();
    if (verb == "start") return Show(session_->Start(now_ns_));
    if (verb == "wish") return Show(Wish(words));
    if (verb == "prepared") {
      const absl::Status status =
          words.size() > 3 ? absl::NotFoundError(words[3]) : absl::OkStatus();
      return Show(session_->OnRoundPrepared(now_ns_, slot(), Attempt(Number(words.at(2))), status));
    }
    if (verb == "ready") return Show(session_->OnRunnerReady(now_ns_, slot()));
    if (verb == "progress") {
      return Show(session_->OnRunnerProgress(now_ns_, slot(), TrialId(Number(words.at(2))),
                                             words.at(3), Number(words.at(4)),
                                             Number(words.at(5))));
    }
    if (verb == "rows" || verb == "outcome") return Show(Records(words, verb == "outcome"));
    if (verb == "done") {
      return Show(session_->OnTrialDone(now_ns_, slot(), TrialId(Number(words.at(2)))));
    }
    if (verb == "misbehaved") {
      return Show(session_->OnRunnerMisbehaved(now_ns_, slot(), words.at(2)));
    }
    if (verb == "exited") return Show(Exited(words));
    if (verb == "tick") {
      now_ns_ += *ParseDurationNs(words.at(1));
      return Show(session_->OnTick(now_ns_));
    }
    if (verb == "shutdown") return Show(session_->OnShutdown(now_ns_));
    if (verb == "report") return ShowReport();
    if (verb == "connected") {
      session_->OnReportConnected();
      return "";
    }
    if (verb == "ack") {
      const absl::StatusOr<SessionPlan> plan =
          session_->OnAcknowledged(now_ns_, Attempt(Number(words.at(1))), Number(words.at(2)));
      return plan.ok() ? Show(*plan) : absl::StrCat("  error: ", plan.status().message(), "\n");
    }
    if (verb == "refused") {
      session_->OnRefused(Attempt(Number(words.at(1))));
      return "";
    }
    if (verb == "send") return Send();
    if (verb == "disk") {
      for (MemorySpillFile& spill : spills_) spill.fail_reads = words.at(1) == "broken";
      return "";
    }
    ADD_FAILURE() << "unknown command: " << line;
    return "";
  }

  std::string SetOptions(const std::vector<std::string>& words) {
    for (size_t i = 1; i < words.size(); ++i) {
      const std::vector<std::string> parts = absl::StrSplit(words[i], '=');
      const uint64_t value = Number(parts.at(1));
      if (parts[0] == "slots") options_.slots = value;
      if (parts[0] == "memory_records") options_.outbox.memory_records = value;
      if (parts[0] == "spill_records") options_.outbox.spill_records = value;
    }
    return "";
  }

  void Create() {
    spills_.resize(options_.slots);
    std::vector<SpillFile*> pointers;
    for (MemorySpillFile& spill : spills_) pointers.push_back(&spill);
    session_ = std::make_unique<Session>(options_, encoder_, pointers);
  }

  // wish SLOT run|abandon|settled ATTEMPT [TRIAL=LIMIT …] [: why the round is invalid]
  SessionPlan Wish(const std::vector<std::string>& words) {
    SessionWish wish{.slot = SlotIndex(Number(words.at(1))),
                     .attempt = Attempt(Number(words.at(3)))};
    if (words.at(2) == "abandon") wish.kind = SessionWish::Kind::kAbandon;
    if (words.at(2) == "settled") wish.kind = SessionWish::Kind::kSettled;
    for (size_t i = 4; i < words.size(); ++i) {
      const std::vector<std::string> parts = absl::StrSplit(words[i], '=');
      if (parts.size() == 2) {
        wish.round->trials.push_back({TrialId(Number(parts[0])), *ParseDurationNs(parts[1])});
      } else {
        wish.round = absl::InvalidArgumentError(words[i]);
      }
    }
    return session_->OnWishes(now_ns_, reported_generation_, {&wish, 1});
  }

  SessionPlan Records(const std::vector<std::string>& words, bool outcome) {
    std::vector<RunnerRecord> records;
    for (size_t i = 3; i < words.size(); ++i) {
      records.push_back({TrialId(Number(words[2])), outcome, words[i]});
    }
    return session_->OnRunnerRecords(now_ns_, SlotIndex(Number(words[1])), std::move(records));
  }

  // exited SLOT signal|code NUMBER [: end of the log]
  SessionPlan Exited(const std::vector<std::string>& words) {
    RunnerExit exit;
    (words.at(2) == "signal" ? exit.signal : exit.exit_code) =
        static_cast<int>(Number(words.at(3)));
    if (words.size() > 4) exit.log_tail = words[4];
    return session_->OnRunnerExited(now_ns_, SlotIndex(Number(words[1])), exit);
  }

  std::string Show(const SessionPlan& plan) {
    session_->CheckInvariants();
    std::string out;
    for (const SessionAction& action : plan.actions) {
      const char* names[] = {"start runner", "stop runner",  "prepare round",
                             "send trial",   "cancel trial", "forget round"};
      absl::StrAppend(&out, "  slot ", action.slot.value(), ": ",
                      names[static_cast<int>(action.kind)]);
      if (action.attempt != Attempt())
        absl::StrAppend(&out, " of attempt ", action.attempt.value());
      if (action.trial != TrialId()) absl::StrAppend(&out, ", trial ", action.trial.value());
      if (action.kind == SessionAction::Kind::kSendTrial) {
        absl::StrAppend(&out, " (index ", action.trial_index, ", execution ", action.execution,
                        ")");
      }
      if (!action.reason.empty()) absl::StrAppend(&out, ": ", action.reason);
      out += "\n";
    }
    if (plan.speak) out += "  speak\n";
    if (plan.exit) out += "  exit\n";
    if (plan.wake_at_ns != kNeverNs) {
      absl::StrAppend(&out, "  wake in ", FormatDurationNs(plan.wake_at_ns - now_ns_), "\n");
    }
    return out;
  }

  std::string ShowReport() {
    const SessionReport report = session_->TakeReport();
    reported_generation_ = report.generation;
    std::string out = absl::StrCat("  generation ", report.generation);
    if (report.draining) out += ", draining";
    if (!report.unhealthy_reason.empty()) {
      absl::StrAppend(&out, ", unhealthy: ", report.unhealthy_reason);
    }
    out += "\n";
    for (size_t i = 0; i < report.slots.size(); ++i) {
      absl::StrAppend(&out, "  slot ", i, report.slots[i].available ? ": " : " (unavailable): ",
                      ShowHolding(report.slots[i].holding), "\n");
    }
    return out;
  }

  static std::string ShowHolding(const std::optional<HeldAttempt>& holding) {
    if (!holding.has_value()) return "idle";
    const char* names[] = {"starting", "running", "finished", "failed", "abandoned"};
    std::string out = absl::StrCat("attempt ", holding->attempt.value(), " ",
                                   names[static_cast<int>(holding->phase)]);
    if (holding->trial != TrialId()) {
      absl::StrAppend(&out, ", trial ", holding->trial.value(), " in \"", holding->trial_phase,
                      "\" ", holding->done, "/", holding->total);
    }
    if (holding->oldest_unacknowledged != 0) {
      absl::StrAppend(&out, ", unacknowledged from ", holding->oldest_unacknowledged);
    }
    absl::StrAppend(&out, ", last ", holding->last_sequence);
    if (!holding->reason.empty()) absl::StrAppend(&out, ": ", holding->reason);
    return out;
  }

  std::string Send() {
    std::string out;
    while (const std::optional<Session::Batch> batch = session_->NextBatch()) {
      for (size_t i = 0; i < batch->rows.records.size(); ++i) {
        absl::StrAppend(&out, "  attempt ", batch->attempt.value(), " #",
                        batch->rows.first_sequence + i, " ", batch->rows.records[i], "\n");
      }
    }
    return out.empty() ? "  nothing\n" : out;
  }

  SessionOptions options_;
  TextEncoder encoder_;
  std::vector<MemorySpillFile> spills_;
  std::unique_ptr<Session> session_;
  int64_t now_ns_ = 0;
  uint64_t reported_generation_ = 0;
};

class SessionGoldenTest : public testing::TestWithParam<const char*> {};

TEST_P(SessionGoldenTest, AnswersAsWrittenDown) {
  const std::string path = absl::StrCat("tests/golden/session/", GetParam(), ".txt");
  std::ifstream file(path);
  ASSERT_TRUE(file.good()) << path;
  std::stringstream text;
  text << file.rdbuf();
  const std::string answered = Transcript().Run(text.str());
  if (std::getenv("KVSWEEP_REWRITE_GOLDEN") != nullptr) std::ofstream(path) << answered;
  EXPECT_EQ(answered, text.str()) << path;
}

INSTANTIATE_TEST_SUITE_P(Scenarios, SessionGoldenTest,
                         testing::Values("round_of_two_trials", "runner_dies_and_trial_is_repeated",
                                         "third_death_is_crashed", "hung_runner_is_timeout",
                                         "runner_that_does_not_start", "abandon_cancels_then_kills",
                                         "settled_while_running", "reconnect_resends",
                                         "recorder_overflow", "drain_finishes_the_round",
                                         "second_shutdown_stops_all", "wishes_repeated_and_stale",
                                         "misbehaving_runner", "unkillable_runner",
                                         "round_cannot_be_prepared", "disk_lost"),
                         [](const auto& param_info) { return std::string(param_info.param); });

// ---------------------------------------------------------------------------------------- random
// worlds

// A coordinator, a connection and runners that die, hang and lose replies, around one session. Ends
// when the coordinator has accepted what it asked for.
class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    options_.slots = 1 + random_.Uniform(3);
    options_.outbox = {.memory_records = 8,
                       .memory_bytes = 400,
                       .spill_records = 400,
                       .spill_bytes = 100'000,
                       .batch_records = 5,
                       .batch_bytes = 300};
    spills_.resize(options_.slots);
    runners_.resize(options_.slots);
    slots_.resize(options_.slots);
    std::vector<SpillFile*> pointers;
    for (MemorySpillFile& spill : spills_) pointers.push_back(&spill);
    session_ = std::make_unique<Session>(options_, encoder_, pointers);
  }

  void Run() {
    Execute(session_->Start(now_ns_));
    for (int step = 0; step < 200'000 && accepted_ < kRounds; ++step) {
      faults_ = step < 3'000;
      Step();
      session_->CheckInvariants();
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_GE(accepted_, kRounds) << "did not settle";
  }

 private:
  static constexpr uint64_t kRounds = 12;

  struct Runner {
    bool alive = false;
    bool killed = false;
    bool greeted = false;
    bool hung = false;
    bool cancelled = false;
    TrialId trial;
    uint64_t rows_left = 0;
    bool outcome_sent = false;
  };

  // What the coordinator knows of a slot's attempt.
  struct Lease {
    Attempt attempt;
    bool abandoned = false;
    bool complete = false;  // the finish record is stored
    std::vector<SessionTrial> trials;
    std::vector<std::string> rows;  // [sequence - 1], durable
  };

  void Step() {
    now_ns_ += static_cast<int64_t>(random_.Uniform(50 * kNsPerMs));
    const SlotIndex slot(random_.Uniform(slots_.size()));
    switch (random_.Uniform(8)) {
      case 0:
      case 1:
      case 2:
        RunnerStep(slot);
        break;
      case 3:
        SendRows();
        break;
      case 4:
        Synchronize();
        break;
      case 5:
        Execute(session_->OnTick(now_ns_));
        break;
      case 6:
        if (faults_ && random_.Bernoulli(0.05)) session_->OnReportConnected();
        break;
      case 7:
        // Time passes unheard: a hung runner meets its deadline.
        if (runners_[slot.value()].hung || random_.Bernoulli(0.02)) {
          now_ns_ += 40 * kNsPerSecond;
          Execute(session_->OnTick(now_ns_));
        }
        break;
    }
  }

  void Execute(const SessionPlan& plan) {
    for (const SessionAction& action : plan.actions) {
      Runner& runner = runners_[action.slot.value()];
      switch (action.kind) {
        case SessionAction::Kind::kStartRunner:
          ASSERT_FALSE(runner.alive);
          runner = {.alive = true};
          break;
        case SessionAction::Kind::kStopRunner:
          ASSERT_TRUE(runner.alive && !runner.killed);
          runner.killed = true;
          break;
        case SessionAction::Kind::kPrepareRound:
          preparing_.insert(action.attempt);
          break;
        case SessionAction::Kind::kSendTrial: {
          const Lease& lease = slots_[action.slot.value()];
          ASSERT_TRUE(runner.greeted && runner.trial == TrialId());
          ASSERT_EQ(action.attempt, lease.attempt);
          ASSERT_EQ(action.trial, lease.trials.at(action.trial_index).trial);
          ASSERT_GE(action.execution, 1u);
          ASSERT_LE(action.execution, 3u);
          runner.trial = action.trial;
          runner.rows_left = random_.Uniform(20);
          runner.outcome_sent = false;
          runner.cancelled = false;
          break;
        }
        case SessionAction::Kind::kCancelTrial:
          ASSERT_EQ(runner.trial, action.trial);
          runner.cancelled = true;
          break;
        case SessionAction::Kind::kForgetRound:
          preparing_.erase(action.attempt);
          break;
      }
    }
  }

  void RunnerStep(SlotIndex slot) {
    Runner& runner = runners_[slot.value()];
    if (!runner.alive) return;
    if (runner.killed || (faults_ && random_.Bernoulli(0.02))) {
      runner = {};
      Execute(session_->OnRunnerExited(now_ns_, slot, {.signal = 9, .log_tail = "…"}));
      return;
    }
    if (runner.hung) return;
    if (faults_ && random_.Bernoulli(0.003)) runner.hung = true;
    if (!runner.greeted) {
      runner.greeted = true;
      Execute(session_->OnRunnerReady(now_ns_, slot));
    } else if (runner.trial != TrialId()) {
      TrialStep(slot, runner);
    }
  }

  void TrialStep(SlotIndex slot, Runner& runner) {
    if (runner.cancelled) runner.rows_left = 0;
    if (runner.rows_left > 0) {
      --runner.rows_left;
      std::string row =
          absl::StrCat("row ", runner.trial.value(), " ", std::string(random_.Uniform(60), 'x'));
      Execute(session_->OnRunnerRecords(now_ns_, slot, {{runner.trial, false, std::move(row)}}));
    } else if (!runner.outcome_sent) {
      runner.outcome_sent = true;
      Execute(session_->OnRunnerRecords(
          now_ns_, slot,
          {{runner.trial, true, absl::StrCat("outcome of ", runner.trial.value())}}));
    } else {
      const TrialId trial = std::exchange(runner.trial, TrialId());
      Execute(session_->OnTrialDone(now_ns_, slot, trial));
    }
  }

  // A batch reaches the store, and its acknowledgement may be lost.
  void SendRows() {
    const std::optional<Session::Batch> batch = session_->NextBatch();
    if (!batch.has_value()) return;
    if (faults_ && random_.Bernoulli(0.1)) {  // lost on the way, and the connection with it
      session_->OnReportConnected();
      return;
    }
    for (Lease& lease : slots_) {
      if (lease.attempt == batch->attempt) Store(lease, batch->rows);
    }
  }

  void Store(Lease& lease, const OutboxBatch& batch) {
    ASSERT_LE(batch.first_sequence, lease.rows.size() + 1) << "a gap";
    ASSERT_LE(batch.records.size(), options_.outbox.batch_records);
    for (size_t i = 0; i < batch.records.size(); ++i) {
      const size_t index = batch.first_sequence - 1 + i;
      if (index < lease.rows.size()) {
        ASSERT_EQ(lease.rows[index], batch.records[i]) << "an unequal repeat";
      } else {
        lease.rows.push_back(batch.records[i]);
      }
    }
    if (absl::StartsWith(lease.rows.back(), "finish")) CheckFinished(lease);
    if (faults_ && random_.Bernoulli(0.1)) {
      session_->OnReportConnected();
      return;
    }
    const absl::StatusOr<SessionPlan> plan =
        session_->OnAcknowledged(now_ns_, lease.attempt, lease.rows.size());
    ASSERT_TRUE(plan.ok()) << plan.status();
    Execute(*plan);
  }

  // Recomputes from the stored rows what the finish record claims, and that every trial has one
  // outcome, in order.
  void CheckFinished(Lease& lease) {
    lease.complete = true;
    std::vector<std::string> kept;
    size_t trial_start = 0;
    std::vector<std::string> outcomes;
    for (size_t i = 0; i + 1 < lease.rows.size(); ++i) {
      const std::string& row = lease.rows[i];
      if (absl::StartsWith(row, "discard")) {
        kept.resize(trial_start);
        continue;
      }
      kept.push_back(row);
      if (!absl::StartsWith(row, "outcome")) continue;
      trial_start = kept.size();
      outcomes.push_back(row);
    }
    DigestBuilder digest;
    for (const std::string& row : kept) digest.Add(row);
    ASSERT_EQ(lease.rows.back(), encoder_.EncodeFinish({kept.size(), digest.Finish()}));
    ASSERT_EQ(outcomes.size(), lease.trials.size());
    for (size_t i = 0; i < outcomes.size(); ++i) {
      ASSERT_TRUE(absl::StartsWith(outcomes[i],
                                   absl::StrCat("outcome of ", lease.trials[i].trial.value())));
    }
  }

  // One exchange of whole states; the answer may be lost or come twice.
  void Synchronize() {
    const SessionReport report = session_->TakeReport();
    std::vector<SessionWish> wishes;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (std::optional<SessionWish> wish = WishFor(SlotIndex(i), report.slots[i])) {
        wishes.push_back(*wish);
      }
    }
    const int times = faults_ ? static_cast<int>(random_.Uniform(3)) : 1;
    for (int i = 0; i < times; ++i) Execute(session_->OnWishes(now_ns_, report.generation, wishes));
    for (const Attempt attempt : std::set<Attempt>(std::exchange(preparing_, {}))) {
      for (size_t i = 0; i < slots_.size(); ++i) {
        if (slots_[i].attempt != attempt) continue;
        Execute(session_->OnRoundPrepared(now_ns_, SlotIndex(i), attempt, absl::OkStatus()));
      }
    }
  }

  std::optional<SessionWish> WishFor(SlotIndex slot, const SessionSlot& report) {
    Lease& lease = slots_[slot.value()];
    SessionWish wish{.slot = slot, .attempt = lease.attempt};
    if (!report.holding.has_value()) {
      if (lease.complete && !lease.abandoned) ++accepted_;
      if (lease.complete || lease.abandoned || lease.attempt == Attempt()) NewLease(lease);
      wish.attempt = lease.attempt;
    } else if (report.holding->attempt != lease.attempt) {
      ADD_FAILURE() << "the slot holds attempt " << report.holding->attempt;
      return std::nullopt;
    } else if (lease.abandoned) {
      wish.kind = report.holding->phase == HeldAttempt::Phase::kAbandoned
                      ? SessionWish::Kind::kSettled
                      : SessionWish::Kind::kAbandon;
      return wish;
    } else if (report.holding->phase == HeldAttempt::Phase::kFailed) {
      lease.abandoned = true;
      wish.kind = SessionWish::Kind::kSettled;
      return wish;
    } else if (lease.complete) {
      wish.kind = SessionWish::Kind::kSettled;
      return wish;
    } else if (faults_ && random_.Bernoulli(0.02)) {
      lease.abandoned = true;
      wish.kind = SessionWish::Kind::kAbandon;
      return wish;
    }
    wish.round = SessionRound{lease.trials};
    return wish;
  }

  void NewLease(Lease& lease) {
    lease = {.attempt = Attempt(next_attempt_++)};
    const uint64_t trials = 1 + random_.Uniform(4);
    for (uint64_t i = 0; i < trials; ++i) {
      lease.trials.push_back({TrialId(next_trial_++), 5 * kNsPerSecond});
    }
  }

  Random random_;
  SessionOptions options_;
  TextEncoder encoder_;
  std::vector<MemorySpillFile> spills_;
  std::unique_ptr<Session> session_;
  std::vector<Runner> runners_;  // [slots]
  std::vector<Lease> slots_;     // [slots]
  std::set<Attempt> preparing_;
  bool faults_ = true;
  int64_t now_ns_ = 0;
  uint64_t next_attempt_ = 1;
  uint64_t next_trial_ = 100;
  uint64_t accepted_ = 0;
};

TEST(SessionPropertyTest, WhateverHappensRoundsEndWholeAndOnce) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    World(seed).Run();
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace kvsweep
