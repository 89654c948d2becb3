#include "coordinator/persistence.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "base/status_macros.h"
#include "coordinator/submission.h"

namespace kvsweep {
namespace {

std::array<uint64_t, 5> EndedOf(const QueuedExperiment& experiment) {
  std::array<uint64_t, 5> ended{};
  ended[static_cast<size_t>(RoundEnd::kAccepted)] = experiment.rounds_done;
  ended[static_cast<size_t>(RoundEnd::kServed)] = experiment.rounds_served;
  ended[static_cast<size_t>(RoundEnd::kFailed)] = experiment.rounds_failed;
  ended[static_cast<size_t>(RoundEnd::kPoisoned)] = experiment.rounds_poisoned;
  ended[static_cast<size_t>(RoundEnd::kCancelled)] = experiment.rounds_cancelled;
  return ended;
}

RoundRequirement RequirementOf(const QueuedRound& round, const QueuedExperiment& experiment,
                               bool model_travels) {
  return {.devices = std::max(1u, round.devices),
          .backend = round.backend,
          .device_class = {},
          .model_digest = experiment.model_digest,
          .model_travels = model_travels,
          .model_name = experiment.model_name,
          .uses_host_tier = round.uses_host_tier,
          .modelled_time = round.modelled_time};
}

VoidAttempt RowOf(const VoidRow& row, int64_t unix_ns) {
  VoidAttempt operation{.attempt = row.attempt,
                        .reason = row.mishap.reason,
                        .worker_lost = row.mishap.kind == Mishap::Kind::kWorkerLost,
                        .running_trial = std::nullopt,
                        .voided_unix_ns = unix_ns};
  if (row.mishap.trial != TrialId()) operation.running_trial = row.mishap.trial;
  return operation;
}

FinishRound RowOf(const FinishRow& row, int64_t unix_ns) {
  FinishRound operation{.round = row.round,
                        .state = FinishRound::State::kFailed,
                        .poisoned_trial = std::nullopt,
                        .reason = row.reason,
                        .finished_unix_ns = unix_ns};
  if (row.end == RoundEnd::kPoisoned) {
    operation.state = FinishRound::State::kPoisoned;
    operation.poisoned_trial = row.poisoned_trial;
  }
  return operation;
}

GrantAttempt RowOf(const GrantRow& row, int64_t unix_ns) {
  return {.attempt = row.attempt,
          .round = row.round,
          .worker_id = row.worker.value(),
          .incarnation = row.incarnation,
          .machine = row.machine,
          .slot = static_cast<uint32_t>(row.slot.value()),
          .neighbours = row.neighbours,
          .granted_unix_ns = unix_ns};
}

void RecoverAttempts(const QueuedRound& round, int64_t now_ns, Scheduler* scheduler) {
  for (const VoidedAttempt& attempt : round.void_attempts) {
    scheduler->RecoverMishap(round.round, {.kind = attempt.worker_lost ? Mishap::Kind::kWorkerLost
                                                                       : Mishap::Kind::kFailed,
                                           .worker = WorkerId(attempt.worker_id),
                                           .machine = attempt.machine,
                                           .trial = attempt.running_trial.value_or(TrialId()),
                                           .time_ns = now_ns,
                                           .reason = attempt.reason});
  }
  if (!round.open_attempt.has_value()) return;
  const StoredAttempt& open = *round.open_attempt;
  scheduler->RecoverLease(now_ns, {.attempt = open.attempt,
                                   .round = round.round,
                                   .worker = WorkerId(open.worker_id),
                                   .incarnation = open.incarnation,
                                   .machine = open.machine,
                                   .slot = SlotIndex(open.slot)});
}

}  // namespace

std::vector<Operation> RowsOf(const SchedulerPlan& plan, int64_t unix_ns) {
  std::vector<Operation> rows;
  for (const VoidRow& row : plan.voids) rows.push_back(RowOf(row, unix_ns));
  for (const FinishRow& row : plan.finishes) rows.push_back(RowOf(row, unix_ns));
  // Behind these: a cancellation ends what is open, and what has ended cannot be voided any more.
  for (const ExperimentId experiment : plan.cancels) {
    rows.push_back(CancelExperiment{experiment, unix_ns});
  }
  for (const GrantRow& row : plan.grants) rows.push_back(RowOf(row, unix_ns));
  return rows;
}

absl::Status RecoverScheduler(const Queue& queue, StoreReader& reader, int64_t now_ns,
                              Scheduler* scheduler) {
  std::map<ExperimentId, const QueuedExperiment*> experiments;
  for (const QueuedExperiment& experiment : queue.experiments) {
    experiments[experiment.experiment] = &experiment;
  }
  for (size_t begin = 0; begin < queue.rounds.size();) {
    const QueuedExperiment& experiment = *experiments.at(queue.rounds[begin].experiment);
    ASSIGN_OR_RETURN(const StoredRound example, reader.GetRound(queue.rounds[begin].round));
    const bool model_travels = RequirementOf(example.spec).model_travels;
    std::vector<RoundDescriptor> rounds;
    size_t end = begin;
    for (; end < queue.rounds.size() && queue.rounds[end].experiment == experiment.experiment;
         ++end) {
      rounds.push_back({.round = queue.rounds[end].round,
                        .requirement = RequirementOf(queue.rounds[end], experiment, model_travels),
                        .trials = queue.rounds[end].trials.size()});
    }
    const bool first = scheduler->FindProgress(experiment.experiment) == nullptr;
    scheduler->Submit(now_ns, experiment.experiment, std::move(rounds),
                      first ? EndedOf(experiment) : std::array<uint64_t, 5>{});
    begin = end;
  }
  for (const QueuedRound& round : queue.rounds) RecoverAttempts(round, now_ns, scheduler);
  return absl::OkStatus();
}

}  // namespace kvsweep
