#include "tests/coordinator/transcript.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/text.h"

namespace kvsweep {
namespace {

const char* const kPhases[] = {"starting", "running", "finished", "failed", "abandoned"};
const char* const kEnds[] = {"accepted", "served", "failed", "poisoned", "cancelled"};

// The number after an optional letter: "a12", "e1", "r3", "7".
uint64_t Number(absl::string_view text) {
  while (!text.empty() && (text[0] < '0' || text[0] > '9')) text.remove_prefix(1);
  uint64_t number = 0;
  KVSWEEP_CHECK(absl::SimpleAtoi(text, &number)) << text;
  return number;
}

// The value of "key=value" among words; "1" for the bare word "key"; empty if absent.
std::string Option(const std::vector<std::string>& words, absl::string_view key) {
  for (const std::string& word : words) {
    if (word == key) return "1";
    absl::string_view value = word;
    if (absl::ConsumePrefix(&value, absl::StrCat(key, "="))) {
      return absl::StrJoin(absl::StrSplit(value, '_'), " ");
    }
  }
  return "";
}

uint64_t NumberOption(const std::vector<std::string>& words, absl::string_view key,
                      uint64_t otherwise) {
  const std::string value = Option(words, key);
  return value.empty() ? otherwise : Number(value);
}

std::string Time(int64_t time_ns) {
  return time_ns == kNeverNs ? "never" : absl::StrCat(time_ns / kNsPerMs, "ms");
}

std::string WishText(const SlotWish& wish) {
  const std::string at = absl::StrCat("slot ", wish.slot.value());
  const std::string attempt = absl::StrCat("a", wish.attempt.value());
  switch (wish.kind) {
    case SlotWish::Kind::kRun:
      return absl::StrCat(at, " run ", attempt, " round ", wish.round.value());
    case SlotWish::Kind::kAbandon:
      return absl::StrCat(at, " abandon ", attempt);
    case SlotWish::Kind::kSettled:
      return absl::StrCat(at, " settled ", attempt);
  }
  return "";
}

}  // namespace

Transcript::Transcript()
    : scheduler_(std::make_unique<Scheduler>(SchedulerOptions(), Attempt(1))) {}

std::string Transcript::Play(absl::string_view text) {
  std::string out;
  for (const absl::string_view line : absl::StrSplit(absl::StripSuffix(text, "\n"), '\n')) {
    if (absl::StartsWith(line, "  ")) continue;
    absl::StrAppend(&out, line, "\n");
    if (line.empty() || line[0] == '#') continue;
    absl::StrAppend(&out, Run(absl::StrSplit(line, ' ', absl::SkipEmpty())));
    scheduler_->CheckInvariants();
  }
  return out;
}

std::string Transcript::Run(const std::vector<std::string>& words) {
  const std::string answer = Question(words);
  if (!answer.empty()) return answer;
  Event(words);
  const SchedulerPlan plan = scheduler_->Decide(now_ns_);
  Store(plan);
  return Show(plan);
}

std::string Transcript::Question(const std::vector<std::string>& words) {
  if (words[0] == "why") {
    return absl::StrCat("  ", scheduler_->WaitingFor(ExperimentId(Number(words[1]))), "\n");
  }
  if (words[0] == "progress") {
    const ExperimentProgress* progress = scheduler_->FindProgress(ExperimentId(Number(words[1])));
    KVSWEEP_CHECK(progress != nullptr);
    std::string out = absl::StrCat("  rounds ", progress->rounds, " queued ", progress->queued,
                                   " running ", progress->running);
    for (size_t end = 0; end < progress->ended.size(); ++end) {
      if (progress->ended[end] > 0) {
        absl::StrAppend(&out, " ", kEnds[end], " ", progress->ended[end]);
      }
    }
    return absl::StrCat(out, progress->finished() ? " finished\n" : "\n");
  }
  if (words[0] == "running") {
    std::string out;
    for (const RunningAttempt& row : scheduler_->Running(ExperimentId(Number(words[1])))) {
      absl::StrAppend(&out, "  ", row.worker.value(), " slot ", row.slot.value(), " a",
                      row.attempt.value(), " round ", row.round.value(), " trial ",
                      row.holding.has_value() ? row.holding->trial.value() : 0, "\n");
    }
    return out.empty() ? "  nothing\n" : out;
  }
  if (words[0] == "workers") {
    std::string out;
    for (const auto& [id, entry] : scheduler_->roster().entries()) {
      const std::string reason = entry.IdleReason();
      absl::StrAppend(&out, "  ", id.value(), " ", PresenceName(entry.presence),
                      reason.empty() ? "" : absl::StrCat(" (", reason, ")"), "\n");
    }
    return out.empty() ? "  nobody\n" : out;
  }
  return "";
}

void Transcript::Event(const std::vector<std::string>& words) {
  const std::string& verb = words[0];
  if (verb == "at") {
    const absl::StatusOr<int64_t> time_ns = ParseDurationNs(words[1]);
    KVSWEEP_CHECK_OK(time_ns);
    KVSWEEP_CHECK_GE(*time_ns, now_ns_);
    now_ns_ = *time_ns;
  } else if (verb == "stall") {
    const absl::StatusOr<int64_t> duration_ns = ParseDurationNs(words[1]);
    KVSWEEP_CHECK_OK(duration_ns);
    now_ns_ += *duration_ns;
    scheduler_->Stalled(*duration_ns);
  } else if (verb == "submit") {
    Submit(words);
  } else if (verb == "join") {
    Join(words);
  } else if (verb == "hold") {
    const auto phase = std::find(std::begin(kPhases), std::end(kPhases), words[4]);
    KVSWEEP_CHECK(phase != std::end(kPhases)) << words[4];
    WorkerReport& report = workers_.at(words[1]);
    report.slots.at(Number(words[2])).holding =
        SlotHolding{.attempt = Attempt(Number(words[3])),
                    .phase = static_cast<HoldingPhase>(phase - std::begin(kPhases)),
                    .trial = TrialId(NumberOption(words, "trial", 0)),
                    .trial_phase = {},
                    .reason = Option(words, "reason")};
    scheduler_->Heard(now_ns_, report);
  } else if (verb == "idle") {
    workers_.at(words[1]).slots.at(Number(words[2])).holding.reset();
    scheduler_->Heard(now_ns_, workers_.at(words[1]));
  } else if (verb == "beat") {
    scheduler_->Heard(now_ns_, workers_.at(words[1]));
  } else if (verb == "break") {
    const WorkerReport& report = workers_.at(words[1]);
    scheduler_->Broken(now_ns_, report.worker, NumberOption(words, "inc", report.incarnation));
  } else if (verb == "accept") {
    const Attempt attempt(Number(words[1]));
    const auto open = stored_.open.find(attempt);
    scheduler_->Accepted(now_ns_, attempt);
    if (open == stored_.open.end()) return;
    EndRound(open->second.round, RoundEnd::kAccepted);
    stored_.open.erase(open);
  } else if (verb == "refuse") {
    const Attempt attempt(Number(words[1]));
    const GrantRow grant = stored_.open.at(attempt);
    stored_.open.erase(attempt);
    stored_.mishaps[grant.round].push_back({.kind = Mishap::Kind::kFailed,
                                            .worker = grant.worker,
                                            .machine = grant.machine,
                                            .time_ns = now_ns_,
                                            .reason = words[2]});
    scheduler_->Refused(now_ns_, attempt, words[2]);
  } else if (verb == "cancel") {
    scheduler_->Cancel(now_ns_, ExperimentId(Number(words[1])));
  } else if (verb == "drain") {
    KVSWEEP_CHECK(scheduler_->Drain(now_ns_, WorkerId(words[1]), words[2] == "on"));
  } else if (verb == "restart") {
    Restart();
  } else {
    KVSWEEP_CHECK(false) << "unknown command " << verb;
  }
}

void Transcript::Submit(const std::vector<std::string>& words) {
  const ExperimentId experiment(Number(words[1]));
  const std::vector<std::string> range = absl::StrSplit(words[2], '-');
  RoundRequirement requirement{.devices = static_cast<uint32_t>(NumberOption(words, "devices", 1)),
                               .backend = Option(words, "backend"),
                               .device_class = Option(words, "class"),
                               .model_digest = Option(words, "model"),
                               .model_travels = !Option(words, "travels").empty(),
                               .model_name = Option(words, "model"),
                               .uses_host_tier = !Option(words, "host").empty(),
                               .modelled_time = !Option(words, "modelled").empty()};
  std::vector<RoundDescriptor>& rounds = stored_.rounds[experiment];
  for (uint64_t id = Number(range.front()); id <= Number(range.back()); ++id) {
    rounds.push_back({.round = RoundId(id), .requirement = requirement});
  }
  scheduler_->Submit(now_ns_, experiment, rounds, {});
}

void Transcript::Join(const std::vector<std::string>& words) {
  WorkerReport report;
  report.worker = WorkerId(words[1]);
  report.incarnation = NumberOption(words, "inc", 1);
  report.machine = Option(words, "machine").empty() ? words[1] : Option(words, "machine");
  const std::string backend = Option(words, "backend");
  const DeviceDescription device{.backend = backend.empty() ? "cpu" : backend,
                                 .name = "device",
                                 .device_class = Option(words, "class")};
  const std::vector<DeviceDescription> devices(NumberOption(words, "devices", 1), device);
  report.slots.assign(NumberOption(words, "slots", 1), {.devices = devices, .holding = {}});
  for (const absl::string_view model : absl::StrSplit(Option(words, "models"), ',')) {
    if (!model.empty()) report.model_digests.insert(std::string(model));
  }
  report.draining = !Option(words, "draining").empty();
  report.unhealthy_reason = Option(words, "unhealthy");
  workers_[words[1]] = report;
  scheduler_->Heard(now_ns_, report);
}

void Transcript::Restart() {
  scheduler_ =
      std::make_unique<Scheduler>(SchedulerOptions(), Attempt(stored_.highest.value() + 1));
  for (const auto& [experiment, rounds] : stored_.rounds) {
    scheduler_->Submit(now_ns_, experiment, rounds, stored_.ended[experiment]);
    for (const RoundDescriptor& round : rounds) {
      for (const Mishap& mishap : stored_.mishaps[round.round]) {
        scheduler_->RecoverMishap(round.round, mishap);
      }
    }
  }
  for (const auto& [attempt, grant] : stored_.open) {
    scheduler_->RecoverLease(now_ns_, {.attempt = attempt,
                                       .round = grant.round,
                                       .worker = grant.worker,
                                       .incarnation = grant.incarnation,
                                       .machine = grant.machine,
                                       .slot = grant.slot});
  }
}

void Transcript::EndRound(RoundId round, RoundEnd end) {
  for (auto& [experiment, rounds] : stored_.rounds) {
    const size_t erased = std::erase_if(
        rounds, [&](const RoundDescriptor& descriptor) { return descriptor.round == round; });
    stored_.ended[experiment][static_cast<size_t>(end)] += erased;
  }
}

void Transcript::Store(const SchedulerPlan& plan) {
  for (const ExperimentId experiment : plan.cancels) {
    for (const RoundDescriptor& round : std::vector<RoundDescriptor>(stored_.rounds[experiment])) {
      EndRound(round.round, RoundEnd::kCancelled);
      std::erase_if(stored_.open,
                    [&](const auto& open) { return open.second.round == round.round; });
    }
  }
  for (const VoidRow& row : plan.voids) {
    KVSWEEP_CHECK_EQ(stored_.open.erase(row.attempt), 1u);
    stored_.mishaps[row.round].push_back(row.mishap);
  }
  for (const FinishRow& row : plan.finishes) EndRound(row.round, row.end);
  for (const GrantRow& row : plan.grants) {
    KVSWEEP_CHECK_LT(stored_.highest.value(), row.attempt.value());
    stored_.highest = row.attempt;
    for (const auto& [attempt, open] : stored_.open) {
      KVSWEEP_CHECK(open.round != row.round) << "round leased twice: " << row.round.value();
      KVSWEEP_CHECK(open.worker != row.worker || open.slot != row.slot);
    }
    stored_.open[row.attempt] = row;
  }
}

std::string Transcript::Show(const SchedulerPlan& plan) const {
  std::string out;
  for (const ExperimentId experiment : plan.cancels) {
    absl::StrAppend(&out, "  cancel e", experiment.value(), "\n");
  }
  for (const VoidRow& row : plan.voids) {
    absl::StrAppend(&out, "  void a", row.attempt.value(), " round ", row.round.value(),
                    row.mishap.kind == Mishap::Kind::kWorkerLost ? " lost " : " failed ",
                    row.mishap.worker.value(), " trial ", row.mishap.trial.value(), ": ",
                    row.mishap.reason, "\n");
  }
  for (const FinishRow& row : plan.finishes) {
    absl::StrAppend(&out, "  finish round ", row.round.value(), " ",
                    kEnds[static_cast<size_t>(row.end)], " trial ", row.poisoned_trial.value(),
                    ": ", row.reason, "\n");
  }
  for (const GrantRow& row : plan.grants) {
    absl::StrAppend(&out, "  grant a", row.attempt.value(), " round ", row.round.value(), " to ",
                    row.worker.value(), " slot ", row.slot.value(), " neighbours ", row.neighbours,
                    "\n");
  }
  for (const WorkerWish& wish : plan.wishes) {
    std::vector<std::string> slots;
    for (const SlotWish& slot : wish.slots) slots.push_back(WishText(slot));
    absl::StrAppend(&out, "  tell ", wish.worker.value(), ": ",
                    slots.empty() ? "go on" : absl::StrJoin(slots, ", "), "\n");
  }
  for (const LogLine& message : plan.messages) {
    absl::StrAppend(&out, "  say ",
                    message.experiment == ExperimentId()
                        ? "all"
                        : absl::StrCat("e", message.experiment.value()),
                    ": ", message.text, "\n");
  }
  return absl::StrCat(out, "  wake ", Time(plan.wake_ns), "\n");
}

}  // namespace kvsweep
