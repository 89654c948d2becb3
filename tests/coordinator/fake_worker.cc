#include "tests/coordinator/fake_worker.h"

#include "base/check.h"
#include "base/digest.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

FakeWorker::FakeWorker(std::shared_ptr<grpc::Channel> channel, const std::string& name,
                       uint64_t incarnation)
    : stub_(WorkerService::NewStub(channel)),
      synchronize_(stub_->Synchronize(&synchronize_context_)),
      report_(stub_->Report(&report_context_)) {
  state_.set_worker_id(name);
  state_.set_incarnation(incarnation);
  state_.set_machine("machine-" + name);
  state_.set_protocol_version(1);
  state_.set_build("build-1");
  state_.set_method_version(1);
  Device* device = state_.add_slots()->add_devices();
  device->set_backend("cpu");
  device->set_name("fake");
  device->set_device_class("class-1");
}

FakeWorker::~FakeWorker() {
  synchronize_context_.TryCancel();
  report_context_.TryCancel();
}

bool FakeWorker::Exchange() {
  state_.set_generation(state_.generation() + 1);
  if (!synchronize_->Write(state_)) return false;
  DesiredState desired;
  do {
    if (!synchronize_->Read(&desired)) return false;
    Obey(desired);
  } while (desired.generation() < state_.generation());
  return true;
}

void FakeWorker::Obey(const DesiredState& desired) {
  SlotState* slot = state_.mutable_slots(0);
  for (const SlotDesire& wish : desired.slots()) {
    KVSWEEP_CHECK_EQ(wish.index(), 0u);
    if (wish.has_run() && !slot->has_holding()) {
      slot->mutable_holding()->set_attempt(wish.attempt());
      slot->mutable_holding()->set_phase(Holding::PHASE_RUNNING);
      MakeRecords(wish.run());
    } else if (slot->holding().attempt() == wish.attempt() && wish.abandon()) {
      slot->mutable_holding()->set_phase(Holding::PHASE_ABANDONED);
    } else if (slot->holding().attempt() == wish.attempt() && wish.settled()) {
      slot->clear_holding();
      ++settled_;
    }
  }
}

void FakeWorker::MakeRecords(const std::string& round_spec) {
  RoundSpec round;
  KVSWEEP_CHECK(round.ParseFromString(round_spec));
  records_.clear();
  DigestBuilder digest;
  const auto add = [&](const Record& record) {
    records_.push_back(record.SerializeAsString());
    digest.Add(records_.back());
  };
  for (const PlannedTrial& trial : round.trials()) {
    Record start;
    start.set_trial_id(trial.trial_id());
    start.mutable_start()->set_backend("cpu");
    start.mutable_start()->set_device_class("class-1");
    start.mutable_start()->set_runner_build("build-1");
    start.mutable_start()->set_method_version(1);
    start.mutable_start()->set_time_mode("modelled:h200");
    start.mutable_start()->set_execution(1);
    add(start);
    Record outcome;
    outcome.set_trial_id(trial.trial_id());
    outcome.mutable_outcome()->set_outcome(OUTCOME_TIMEOUT);
    outcome.mutable_outcome()->set_evidence("a fake worker measures nothing");
    add(outcome);
  }
  Record finish;
  finish.mutable_finish()->set_count(records_.size());
  finish.mutable_finish()->set_digest(std::string(digest.Finish().bytes()));
  records_.push_back(finish.SerializeAsString());
}

bool FakeWorker::WaitForRound() {
  while (!holds()) {
    if (!Exchange()) return false;
  }
  return true;
}

ReportBatch FakeWorker::Batch(uint64_t first, uint64_t last) const {
  ReportBatch batch;
  batch.set_worker_id(state_.worker_id());
  batch.set_incarnation(state_.incarnation());
  batch.set_attempt(attempt());
  batch.set_first_sequence(first);
  if (last == 0) last = records_.size();
  for (uint64_t sequence = first; sequence <= last; ++sequence) {
    batch.add_records(records_[sequence - 1]);
  }
  return batch;
}

ReportReply FakeWorker::Report(uint64_t first, uint64_t last) { return Send(Batch(first, last)); }

ReportReply FakeWorker::Send(const ReportBatch& batch) {
  ReportReply reply;
  KVSWEEP_CHECK(report_->Write(batch));
  KVSWEEP_CHECK(report_->Read(&reply));
  return reply;
}

bool FakeWorker::RunRounds(int rounds) {
  const int target = settled_ + rounds;
  while (settled_ < target) {
    if (!WaitForRound()) return false;
    if (Report(1, 0).refused()) return false;
    state_.mutable_slots(0)->mutable_holding()->set_phase(Holding::PHASE_FINISHED);
    const uint64_t held = attempt();
    while (holds() && attempt() == held) {
      if (!Exchange()) return false;
    }
  }
  return true;
}

grpc::Status FakeWorker::Finish() { return synchronize_->Finish(); }

}  // namespace kvsweep
