#include "tests/faults/stale_report.h"

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "proto/experiment.pb.h"
#include "proto/worker.grpc.pb.h"

namespace kvsweep {

std::string ReportStaleRow(const Cluster& cluster, const std::string& worker, int64_t attempt,
                           int64_t sequence) {
  const std::string of_attempt = absl::StrCat(" FROM attempt JOIN trial USING (round_id) WHERE ",
                                              "attempt = ", attempt, " ORDER BY position LIMIT 1");
  Record record;
  record.set_trial_id(
      static_cast<uint64_t>(cluster.store().Number("SELECT trial_id" + of_attempt)));
  record.mutable_counter()->set_name("stale");
  record.mutable_counter()->set_layer(-1);
  ReportBatch batch;
  batch.set_worker_id(worker);
  batch.set_incarnation(
      static_cast<uint64_t>(cluster.store().Number("SELECT incarnation" + of_attempt)));
  batch.set_attempt(static_cast<uint64_t>(attempt));
  batch.set_first_sequence(static_cast<uint64_t>(sequence));
  batch.add_records(record.SerializeAsString());

  const auto stub = WorkerService::NewStub(
      grpc::CreateChannel(cluster.address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto stream = stub->Report(&context);
  ReportReply reply;
  if (!stream->Write(batch) || !stream->Read(&reply)) {
    context.TryCancel();
    return absl::StrCat("no answer: ", stream->Finish().error_message());
  }
  context.TryCancel();
  stream->Finish();
  return reply.refused() ? absl::StrCat("refused: ", reply.reason())
                         : absl::StrCat("stored up to ", reply.acknowledged_through());
}

}  // namespace kvsweep
