#include "coordinator/dispatcher.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "base/version.h"
#include "coordinator/persistence.h"
#include "coordinator/wire.h"

namespace kvsweep {
namespace {

constexpr size_t kEventsPerTurn = 8192;
constexpr int64_t kWatchPauseNs = 200 * kNsPerMs;     // between events of one watcher
constexpr int64_t kWatchPeriodNs = 1 * kNsPerSecond;  // while something runs
constexpr size_t kWatchMessages = 100;                // kept for a watcher that reads slowly

constexpr char kIncarnationKey[] = "coordinator_incarnation";

std::string DrainedKey(const WorkerId& worker) { return absl::StrCat("drained:", worker.value()); }

// Between two states of a worker: four in the time after which silence is shown.
int64_t StatePeriodNs(const LeaseOptions& lease) {
  return std::min(kNsPerSecond, lease.lost_after_ns / 4);
}

UpsertWorker WorkerRow(const WorkerReport& report, int64_t unix_ns) {
  UpsertWorker row{.worker_id = report.worker.value(),
                   .incarnation = report.incarnation,
                   .machine = report.machine,
                   .runner_build = report.build,
                   .method_version = report.method_version,
                   .facts = report.labels,
                   .seen_unix_ns = unix_ns};
  for (size_t slot = 0; slot < report.slots.size(); ++slot) {
    std::vector<std::string> devices;
    for (const DeviceDescription& device : report.slots[slot].devices) {
      for (const auto& [name, value] : device.facts) {
        row.facts[absl::StrCat("slot ", slot, " ", name)] = value;
      }
      devices.push_back(absl::StrCat(device.backend, " ", device.name));
    }
    row.facts[absl::StrCat("slot ", slot)] = absl::StrJoin(devices, ", ");
  }
  return row;
}

}  // namespace

// ------------------------------------------------------------------------------------ beginning

absl::StatusOr<std::unique_ptr<Dispatcher>> Dispatcher::Start(const DispatcherOptions& options,
                                                              Store& store, Clock& clock) {
  ASSIGN_OR_RETURN(std::unique_ptr<StoreReader> reader, store.OpenReader());
  ASSIGN_OR_RETURN(const Queue queue, reader->LoadQueue());
  auto dispatcher = absl::WrapUnique(new Dispatcher(options, store, clock, std::move(reader),
                                                    Attempt(queue.highest_attempt.value() + 1)));
  RETURN_IF_ERROR(Annotate(dispatcher->Recover(queue), "reading the store"));
  dispatcher->thread_ = std::thread([self = dispatcher.get()] { self->Run(); });
  return dispatcher;
}

Dispatcher::Dispatcher(const DispatcherOptions& options, Store& store, Clock& clock,
                       std::unique_ptr<StoreReader> reader, Attempt next_attempt)
    : options_(options),
      store_(store),
      clock_(clock),
      reader_(std::move(reader)),
      events_(limits::kEventQueueLength),
      scheduler_(options.scheduler, next_attempt) {}

Dispatcher::~Dispatcher() { Stop(); }

void Dispatcher::Stop() {
  events_.Close();
  if (thread_.joinable()) thread_.join();
}

absl::Status Dispatcher::Recover(const Queue& queue) {
  now_ns_ = clock_.NowNs();
  RETURN_IF_ERROR(RecoverScheduler(queue, *reader_, now_ns_, &scheduler_));
  for (const QueuedRound& round : queue.rounds) {
    if (round.open_attempt.has_value() && round.open_attempt->finished) {
      AcceptIfFinished(round.open_attempt->attempt);
    }
  }
  ASSIGN_OR_RETURN(const std::optional<std::string> incarnation,
                   reader_->ReadMeta(kIncarnationKey));
  if (incarnation.has_value() && !absl::SimpleAtoi(*incarnation, &coordinator_incarnation_)) {
    return absl::DataLossError(absl::StrCat("meta ", kIncarnationKey, " is no number"));
  }
  ++coordinator_incarnation_;
  first_.push_back({PutMeta{kIncarnationKey, absl::StrCat(coordinator_incarnation_)}, nullptr});
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------- turns

bool Dispatcher::Post(Event event) { return events_.TryPush(std::move(event)); }

void Dispatcher::Run() {
  int64_t listening_ns = clock_.NowNs();
  while (true) {
    int64_t wake_ns = wake_ns_;
    for (const Watcher& watcher : watchers_) wake_ns = std::min(wake_ns, WatchDueNs(watcher));
    std::vector<Event> events = events_.PopBatch(clock_, wake_ns, kEventsPerTurn);
    if (events.empty() && events_.closed()) return;
    const int64_t turn_ns = std::exchange(now_ns_, clock_.NowNs());
    LeaveOutStall(turn_ns, listening_ns, wake_ns);
    for (Event& event : events) event();
    Turn();
    listening_ns = clock_.NowNs();
  }
}

// Between two turns the dispatcher hears the workers only while it waits for events: not while the
// last turn lasted (a commit on a slow disk), nor after it should have woken (a stopped process).
void Dispatcher::LeaveOutStall(int64_t turn_ns, int64_t listening_ns, int64_t wake_ns) {
  const int64_t overslept_ns = now_ns_ - std::max(wake_ns, listening_ns);
  const int64_t stalled_ns = listening_ns - turn_ns + std::max<int64_t>(overslept_ns, 0);
  // Less than the time between two states of a worker makes none late.
  if (stalled_ns < StatePeriodNs(options_.scheduler.lease)) return;
  LogWarning("the coordinator was held up for ", FormatDurationNs(stalled_ns),
             "; leases run on as if that time had not been");
  scheduler_.Stalled(stalled_ns);
}

void Dispatcher::Turn() {
  const SchedulerPlan plan = scheduler_.Decide(now_ns_);
  wake_ns_ = plan.wake_ns;
  Commit(plan);
  for (Event& answer : std::exchange(answers_, {})) answer();
  Tell(plan);
  UpdateWatchers(plan);
  if (options_.check_invariants) scheduler_.CheckInvariants();
}

// The dispatcher's own share of a plan: which rounds it must be able to hand out.
void Dispatcher::FollowLeases(const SchedulerPlan& plan) {
  for (const ExperimentId experiment : plan.cancels) {
    std::erase_if(live_, [&](const auto& live) { return live.second.experiment == experiment; });
  }
  for (const VoidRow& row : plan.voids) live_.erase(row.attempt);
  for (const GrantRow& row : plan.grants) Live(row.attempt, row.round).granted_ns = now_ns_;
}

void Dispatcher::Commit(const SchedulerPlan& plan) {
  std::vector<Write> writes = std::exchange(first_, {});
  const size_t first_count = writes.size();
  for (Operation& row : RowsOf(plan, clock_.UnixNs())) writes.push_back({std::move(row), nullptr});
  FollowLeases(plan);
  const size_t plan_end = writes.size();
  std::move(later_.begin(), later_.end(), std::back_inserter(writes));
  later_.clear();
  if (writes.empty()) return;

  WriteBatch batch;
  for (Write& write : writes) batch.operations.push_back(std::move(write.operation));
  const absl::StatusOr<CommitResult> result = store_.Commit(batch);
  if (!result.ok()) EndProcess(result.status());
  for (size_t i = 0; i < writes.size(); ++i) {
    const OperationResult& operation = result->operations[i];
    if (i >= first_count && i < plan_end) {
      KVSWEEP_CHECK(operation.status.ok()) << "row " << i << ": " << operation.status.ToString();
    }
    if (writes[i].then != nullptr) writes[i].then(operation);
  }
}

void Dispatcher::EndProcess(const absl::Status& status) const {
  LogError("the store cannot be written any more: ", status.ToString());
  LogError("stopping; nothing that was acknowledged is lost: see to the disk and start again");
  std::_Exit(EXIT_FAILURE);
}

// ----------------------------------------------------------------------------- workers and leases

bool Dispatcher::OnState(std::shared_ptr<WorkerLink> link, WorkerReport report,
                         uint64_t generation) {
  return Post([this, link = std::move(link), report = std::move(report), generation]() mutable {
    TakeState(std::move(link), std::move(report), generation);
  });
}

void Dispatcher::TakeState(std::shared_ptr<WorkerLink> link, WorkerReport report,
                           uint64_t generation) {
  if (!AdoptLink(link, report)) return;
  LinkedWorker& worker = workers_.at(report.worker);
  const bool is_first = worker.generation == 0;
  const bool changed = is_first || generation < worker.generation;
  worker.generation = generation;
  worker.unanswered = true;
  const RosterEntry* known = scheduler_.roster().Find(report.worker);
  if (changed || known == nullptr || known->report.build != report.build) {
    first_.push_back({WorkerRow(report, clock_.UnixNs()), nullptr});
  }
  const WorkerId id = report.worker;
  KVSWEEP_CHECK(scheduler_.Heard(now_ns_, std::move(report)));
  // Also of one that a lease from before a restart has made known.
  if (known != nullptr && !is_first) return;
  const absl::StatusOr<std::optional<std::string>> drained = reader_->ReadMeta(DrainedKey(id));
  if (!drained.ok()) EndProcess(drained.status());
  if (drained->value_or("") == "1") scheduler_.Drain(now_ns_, id, true);
}

// Makes `link` the one link of its worker. False, and closes it, if it may not be.
bool Dispatcher::AdoptLink(const std::shared_ptr<WorkerLink>& link, const WorkerReport& report) {
  if (closing_) {
    link->Close(absl::UnavailableError("the coordinator is stopping"));
    return false;
  }
  const Roster& roster = scheduler_.roster();
  if (roster.IsSuperseded(report.worker, report.incarnation)) {
    link->Close(absl::FailedPreconditionError(absl::StrCat(
        "worker ", report.worker.value(), " was started again elsewhere; this process must end")));
    return false;
  }
  const auto found = workers_.find(report.worker);
  if (found == workers_.end()) {
    if (roster.Find(report.worker) == nullptr &&
        static_cast<int64_t>(roster.entries().size()) >= limits::kWorkers) {
      link->Close(absl::ResourceExhaustedError(
          absl::StrCat("there are ", limits::kWorkers, " workers already")));
      return false;
    }
    workers_[report.worker] = {.link = link, .incarnation = report.incarnation};
    return true;
  }
  LinkedWorker& worker = found->second;
  if (worker.link == link) {
    if (worker.incarnation == report.incarnation) return true;
    link->Close(absl::InvalidArgumentError("a stream belongs to one incarnation of a worker"));
    return false;
  }
  worker.link->Close(absl::AbortedError("replaced by a newer stream of the same worker"));
  worker = {.link = link, .incarnation = report.incarnation};
  return true;
}

bool Dispatcher::OnLinkEnded(std::shared_ptr<WorkerLink> link) {
  return Post([this, link = std::move(link)] {
    for (const auto& [id, worker] : workers_) {
      if (worker.link != link) continue;
      scheduler_.Broken(now_ns_, id, worker.incarnation);
      workers_.erase(WorkerId(id));
      return;
    }
  });
}

void Dispatcher::Tell(const SchedulerPlan& plan) {
  for (const WorkerWish& wish : plan.wishes) TellWorker(wish);
}

void Dispatcher::TellWorker(const WorkerWish& wish) {
  const auto found = workers_.find(wish.worker);
  if (found == workers_.end() || found->second.incarnation != wish.incarnation) return;
  LinkedWorker& worker = found->second;
  if (wish.slots.empty() && !worker.unanswered) return;
  std::map<Attempt, std::string> specs;
  for (const SlotWish& slot : wish.slots) {
    if (slot.kind == SlotWish::Kind::kRun)
      specs[slot.attempt] = Live(slot.attempt, slot.round).spec;
  }
  DesiredState desired = WishToWire(wish, specs);
  desired.set_next_after_ns(StatePeriodNs(options_.scheduler.lease));
  desired.set_coordinator_incarnation(coordinator_incarnation_);
  desired.set_generation(worker.generation);
  worker.link->Tell(std::move(desired));
  if (!std::exchange(worker.unanswered, false)) return;
  worker.link->ReadOn();
}

Dispatcher::LiveRound& Dispatcher::Live(Attempt attempt, RoundId round) {
  const auto [found, inserted] = live_.try_emplace(attempt);
  LiveRound& live = found->second;
  if (!inserted) return live;
  const absl::StatusOr<StoredRound> stored = reader_->GetRound(round);
  if (!stored.ok()) EndProcess(stored.status());
  live.experiment = stored->experiment;
  live.spec = stored->spec.SerializeAsString();
  for (const StoredTrial& trial : stored->trials) {
    live.names[trial.trial] = absl::StrCat(trial.arm_name, " ", stored->cell_name);
  }
  return live;
}

// --------------------------------------------------------------------------------- measurements

bool Dispatcher::OnBatch(std::shared_ptr<ReportLink> link, ReportBatch batch) {
  return Post([this, link = std::move(link), batch = std::move(batch)]() mutable {
    TakeBatch(std::move(link), std::move(batch));
  });
}

void Dispatcher::TakeBatch(std::shared_ptr<ReportLink> link, ReportBatch batch) {
  const Attempt attempt(batch.attempt());
  ReportReply reply;
  reply.set_attempt(batch.attempt());
  if (!scheduler_.MayReport(WorkerId(batch.worker_id()), batch.incarnation(), attempt)) {
    reply.set_refused(true);
    reply.set_reason("the attempt belongs to another worker");
    link->Reply(std::move(reply));
    return;
  }
  const bool ends = EndsWithFinish(batch);
  AppendRecords append{.attempt = attempt,
                       .first_sequence = batch.first_sequence(),
                       .records = {},
                       .received_unix_ns = clock_.UnixNs()};
  append.records.assign(std::make_move_iterator(batch.mutable_records()->begin()),
                        std::make_move_iterator(batch.mutable_records()->end()));
  later_.push_back({std::move(append), [this, link = std::move(link), reply = std::move(reply),
                                        attempt](const OperationResult& result) mutable {
                      if (!result.status.ok()) {
                        reply.set_refused(true);
                        reply.set_reason(std::string(result.status.message()));
                        link->Reply(std::move(reply));
                        return;
                      }
                      const auto& stored = std::get<AppendResult>(result.value);
                      reply.set_acknowledged_through(stored.acknowledged_through);
                      reply.set_refused(stored.state != AppendResult::State::kStored);
                      reply.set_reason(stored.reason);
                      link->Reply(std::move(reply));
                      if (stored.state != AppendResult::State::kVoided) return;
                      RoundTakenBack(attempt, stored.reason);
                    }});
  if (ends) AcceptIfFinished(attempt);
}

void Dispatcher::AcceptIfFinished(Attempt attempt) {
  later_.push_back(
      {AcceptAttempt{attempt, clock_.UnixNs()}, [this, attempt](const OperationResult& result) {
         if (!result.status.ok()) return;
         const auto& accepted = std::get<AcceptResult>(result.value);
         if (accepted.state == AcceptResult::State::kAccepted) {
           RoundAccepted(attempt);
         } else if (accepted.state == AcceptResult::State::kVoided) {
           RoundTakenBack(attempt, accepted.reason);
         }
       }});
}

// The store has queued the round again; the scheduler must not write that a second time.
void Dispatcher::RoundTakenBack(Attempt attempt, const std::string& reason) {
  scheduler_.Refused(now_ns_, attempt, reason);
  live_.erase(attempt);
  wake_ns_ = now_ns_;
}

void Dispatcher::RoundAccepted(Attempt attempt) {
  scheduler_.Accepted(now_ns_, attempt);
  wake_ns_ = now_ns_;
  const auto live = live_.find(attempt);
  if (live == live_.end()) return;
  if (live->second.granted_ns > 0) {
    Pace& pace = paces_[live->second.experiment];
    pace.total_ns += now_ns_ - live->second.granted_ns;
    ++pace.rounds;
  }
  live_.erase(live);
}

// ---------------------------------------------------------------------------------------- people

bool Dispatcher::Submit(Submission submission, Done<absl::StatusOr<SubmitReply>> done) {
  return Post([this, submission = std::move(submission), done = std::move(done)]() mutable {
    const absl::Status room = CheckRoom(submission);
    if (!room.ok()) return done(room);
    arriving_trials_ += submission.queued_trials;
    std::vector<RoundRequirement> requirements;
    for (const NewRound& round : submission.operation.rounds) {
      requirements.push_back(RequirementOf(round.spec));
    }
    SubmitReply reply;
    reply.set_rounds(submission.operation.rounds.size());
    reply.set_trials(submission.trials);
    reply.set_rounds_served(submission.rounds_served);
    later_.push_back({std::move(submission.operation),
                      [this, requirements = std::move(requirements), reply = std::move(reply),
                       trials = submission.queued_trials,
                       done = std::move(done)](const OperationResult& result) mutable {
                        arriving_trials_ -= trials;
                        if (!result.status.ok()) return done(result.status);
                        const auto& submitted = std::get<SubmitResult>(result.value);
                        if (!submitted.repeated) Enqueue(submitted, std::move(requirements));
                        reply.set_experiment_id(submitted.experiment.value());
                        done(std::move(reply));
                      }});
  });
}

// The queue is held in memory, and read whole at each start. What is known already adds nothing.
absl::Status Dispatcher::CheckRoom(const Submission& submission) {
  if (submission.queued_trials == 0) return absl::OkStatus();
  const uint64_t held = scheduler_.open_trials() + arriving_trials_;
  if (held + submission.queued_trials <= options_.queued_trials) return absl::OkStatus();
  const absl::StatusOr<bool> known = reader_->IsSubmitted(submission.operation.client_id);
  if (!known.ok()) EndProcess(known.status());
  return *known ? absl::OkStatus()
                : QueueFullError(submission.queued_trials, held, options_.queued_trials);
}

void Dispatcher::Enqueue(const SubmitResult& submitted,
                         std::vector<RoundRequirement> requirements) {
  std::vector<RoundDescriptor> rounds;
  std::array<uint64_t, 5> ended{};
  for (size_t i = 0; i < submitted.rounds.size(); ++i) {
    if (submitted.rounds[i].served) {
      ++ended[static_cast<size_t>(RoundEnd::kServed)];
    } else {
      rounds.push_back({submitted.rounds[i].round, std::move(requirements[i]),
                        submitted.rounds[i].trials.size()});
    }
  }
  scheduler_.Submit(now_ns_, submitted.experiment, std::move(rounds), ended);
  wake_ns_ = now_ns_;
}

bool Dispatcher::PutFile(struct PutFile file, Done<absl::Status> done) {
  return Post([this, file = std::move(file), done = std::move(done)]() mutable {
    later_.push_back(
        {std::move(file),
         [done = std::move(done)](const OperationResult& result) mutable { done(result.status); }});
  });
}

bool Dispatcher::Cancel(ExperimentId experiment, Done<uint64_t> done) {
  return Post([this, experiment, done = std::move(done)]() mutable {
    const uint64_t cancelled = scheduler_.Cancel(now_ns_, experiment);
    answers_.push_back([done = std::move(done), cancelled]() mutable { done(cancelled); });
  });
}

bool Dispatcher::Drain(WorkerId worker, bool draining, Done<bool> done) {
  return Post([this, worker = std::move(worker), draining, done = std::move(done)]() mutable {
    const bool known = scheduler_.Drain(now_ns_, worker, draining);
    if (!known) return done(false);
    later_.push_back({PutMeta{DrainedKey(worker), draining ? "1" : "0"},
                      [done = std::move(done)](const OperationResult&) mutable { done(true); }});
  });
}

bool Dispatcher::Workers(Done<Table> done) {
  return Post([this, done = std::move(done)]() mutable {
    done(WorkersTable(scheduler_.roster(), now_ns_));
  });
}

// Builds and classes of the workers that are connected; none: our own build, on any device.
bool Dispatcher::Reuse(Done<ReuseRules> done) {
  return Post([this, done = std::move(done)]() mutable {
    std::set<std::string> builds;
    std::set<std::string> classes;
    for (const auto& [id, entry] : scheduler_.roster().entries()) {
      if (entry.presence != Presence::kConnected) continue;
      for (const SlotReport& slot : entry.report.slots) {
        if (slot.devices.empty()) continue;
        builds.insert(entry.report.build);
        classes.insert(slot.devices[0].device_class);
      }
    }
    if (builds.empty()) builds.insert(GetBuildInfo().runner_digest);
    ReuseRules rules;
    rules.runner_builds.assign(builds.begin(), builds.end());
    rules.device_classes.assign(classes.begin(), classes.end());
    done(std::move(rules));
  });
}

// -------------------------------------------------------------------------------------- watching

bool Dispatcher::Watch(std::shared_ptr<WatchLink> link, ExperimentId experiment) {
  return Post([this, link = std::move(link), experiment]() mutable {
    if (closing_) return link->Close(absl::UnavailableError("the coordinator is stopping"));
    if (static_cast<int64_t>(watchers_.size()) >= limits::kWatchers) {
      return link->Close(absl::ResourceExhaustedError("too many watchers"));
    }
    if (scheduler_.FindProgress(experiment) == nullptr) {
      return link->Close(absl::NotFoundError(
          absl::StrCat("there is no experiment ", experiment.value(), " that is not finished")));
    }
    watchers_.push_back({.link = std::move(link), .experiment = experiment, .messages = {}});
  });
}

bool Dispatcher::CloseLinks(Done<absl::Status> done) {
  return Post([this, done = std::move(done)]() mutable {
    closing_ = true;
    const absl::Status stopping = absl::UnavailableError("the coordinator is stopping");
    for (const auto& [id, worker] : workers_) worker.link->Close(stopping);
    for (const Watcher& watcher : watchers_) watcher.link->Close(stopping);
    workers_.clear();
    watchers_.clear();
    done(absl::OkStatus());
  });
}

int64_t Dispatcher::WatchDueNs(const Watcher& watcher) const {
  return watcher.sent_ns + (watcher.dirty ? kWatchPauseNs : kWatchPeriodNs);
}

void Dispatcher::UpdateWatchers(const SchedulerPlan& plan) {
  for (const LogLine& line : plan.messages) LogInfo(line.text);
  for (Watcher& watcher : watchers_) {
    watcher.dirty = watcher.dirty || std::binary_search(plan.changed.begin(), plan.changed.end(),
                                                        watcher.experiment);
    for (const LogLine& line : plan.messages) {
      if (line.experiment != ExperimentId() && line.experiment != watcher.experiment) continue;
      watcher.messages.push_back(line.text);
      if (watcher.messages.size() > kWatchMessages) {
        watcher.messages.pop_front();
        ++watcher.dropped_messages;
      }
      watcher.dirty = true;
    }
    if (watcher.link->Gone() || now_ns_ < WatchDueNs(watcher)) continue;
    const bool ready = watcher.link->Ready();
    watcher.sent_ns = now_ns_;
    if (!ready) continue;
    watcher.dirty = false;
    WatchEvent event = EventFor(watcher);
    const bool finished = event.finished();
    watcher.link->Send(std::move(event));
    if (!finished) continue;
    watcher.link->Close(absl::OkStatus());
    watcher.link = nullptr;
  }
  std::erase_if(watchers_, [](const Watcher& watcher) {
    return watcher.link == nullptr || watcher.link->Gone();
  });
}

WatchEvent Dispatcher::EventFor(Watcher& watcher) {
  const ExperimentProgress& progress = *scheduler_.FindProgress(watcher.experiment);
  const auto ended = [&](RoundEnd end) { return progress.ended[static_cast<size_t>(end)]; };
  WatchEvent event;
  event.set_experiment_id(watcher.experiment.value());
  event.set_rounds(progress.rounds);
  event.set_rounds_done(ended(RoundEnd::kAccepted));
  event.set_rounds_served(ended(RoundEnd::kServed));
  event.set_rounds_failed(ended(RoundEnd::kFailed) + ended(RoundEnd::kPoisoned) +
                          ended(RoundEnd::kCancelled));
  event.set_rounds_running(progress.running);
  event.set_waiting_for(scheduler_.WaitingFor(watcher.experiment));
  event.set_finished(progress.finished());
  if (watcher.dropped_messages > 0) {
    event.add_messages(absl::StrCat("(", watcher.dropped_messages, " lines left out)"));
  }
  for (std::string& message : watcher.messages) event.add_messages(std::move(message));
  watcher.messages.clear();
  watcher.dropped_messages = 0;

  event.set_eta_ns(-1);
  const auto pace = paces_.find(watcher.experiment);
  if (pace != paces_.end() && progress.running > 0) {
    // On the average a running round is half done.
    const int64_t mean_ns = pace->second.total_ns / pace->second.rounds;
    const int64_t halves = static_cast<int64_t>(2 * progress.queued + progress.running);
    event.set_eta_ns(mean_ns * halves / 2 / static_cast<int64_t>(progress.running));
  }
  for (const RunningAttempt& row : scheduler_.Running(watcher.experiment)) {
    RunningTrial* trial = event.add_running();
    trial->set_worker_id(row.worker.value());
    trial->set_slot(static_cast<uint32_t>(row.slot.value()));
    if (!row.holding.has_value()) continue;
    const LiveRound& live = Live(row.attempt, row.round);
    const auto name = live.names.find(row.holding->trial);
    trial->set_trial_id(row.holding->trial.value());
    trial->set_trial(name == live.names.end() ? "" : name->second);
    trial->set_phase(row.holding->trial_phase);
    trial->set_done(row.holding->done);
    trial->set_total(row.holding->total);
  }
  return event;
}

}  // namespace kvsweep
