#ifndef KVSWEEP_TESTS_COORDINATOR_FAKE_WORKER_H_
#define KVSWEEP_TESTS_COORDINATOR_FAKE_WORKER_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "proto/worker.grpc.pb.h"

namespace kvsweep {

// A worker of one slot without runner, driven step by step by a test: it says what the test wants
// said, and makes the records that a round needs to be accepted.
class FakeWorker {
 public:
  FakeWorker(std::shared_ptr<grpc::Channel> channel, const std::string& name, uint64_t incarnation);
  ~FakeWorker();

  // Says the present state and takes in answers until the one to it; obeys them. False: the stream
  // has ended.
  bool Exchange();

  // Exchanges until the slot holds an attempt (true) or the stream ends (false).
  bool WaitForRound();

  // Sends records [first, last] (from 1) of the round that is held; 0: to the end. The reply to the
  // last batch.
  ReportReply Report(uint64_t first, uint64_t last);

  // Any batch at all.
  ReportReply Send(const ReportBatch& batch);
  ReportBatch Batch(uint64_t first, uint64_t last) const;

  // Runs what it is handed until the coordinator has settled `rounds` attempts.
  bool RunRounds(int rounds);

  // How the Synchronize stream ended. Call once Exchange has returned false.
  grpc::Status Finish();

  WorkerState& state() { return state_; }
  uint64_t attempt() const { return state_.slots(0).holding().attempt(); }
  bool holds() const { return state_.slots(0).has_holding(); }
  const std::vector<std::string>& records() const { return records_; }
  int settled() const { return settled_; }

 private:
  void Obey(const DesiredState& desired);
  void MakeRecords(const std::string& round_spec);

  std::unique_ptr<WorkerService::Stub> stub_;
  grpc::ClientContext synchronize_context_;
  grpc::ClientContext report_context_;
  std::unique_ptr<grpc::ClientReaderWriter<WorkerState, DesiredState>> synchronize_;
  std::unique_ptr<grpc::ClientReaderWriter<ReportBatch, ReportReply>> report_;
  WorkerState state_;
  std::vector<std::string> records_;  // of the attempt that is held; sequence 1 first
  int settled_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_COORDINATOR_FAKE_WORKER_H_
