#include "cli/control_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "proto/control.grpc.pb.h"
#include "worker/daemon.h"

namespace kvsweep {
namespace {

constexpr int kCallSeconds = 120;
constexpr size_t kChunkBytes = 512 << 10;

// The coordinator's word on a call that has ended; Unavailable if it said none in time, which is
// not to be taken for a time limit of what was asked. A second is left for clocks that disagree.
absl::Status ToStatus(const grpc::Status& status, const grpc::ClientContext& context) {
  const auto deadline =
      std::chrono::duration_cast<std::chrono::nanoseconds>(context.deadline().time_since_epoch());
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED &&
      RealClock::Get().UnixNs() >= deadline.count() - kNsPerSecond) {
    return absl::UnavailableError(absl::StrCat("no answer within ", kCallSeconds, " s"));
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void SetDeadline(grpc::ClientContext* context) {
  context->set_deadline(gpr_time_from_seconds(kCallSeconds, GPR_TIMESPAN));
}

TableCell CellOf(const TableValue& value) {
  switch (value.value_case()) {
    case TableValue::kInteger:
      return int64_t{value.integer()};
    case TableValue::kReal:
      return value.real();
    case TableValue::kText:
      return value.text();
    case TableValue::kBlob:
      return Blob{value.blob()};
    case TableValue::VALUE_NOT_SET:
      break;
  }
  return std::monostate();
}

// Appends a message of a table; the first has the columns. A row of another width is DataLoss.
absl::Status AppendRows(const TableReply& message, Table* table) {
  if (table->columns.empty()) {
    table->columns.assign(message.columns().begin(), message.columns().end());
  }
  table->truncated = table->truncated || message.truncated();
  for (const TableRow& row : message.rows()) {
    if (static_cast<size_t>(row.values_size()) != table->columns.size()) {
      return absl::DataLossError("the coordinator's table has rows of unequal width");
    }
    std::vector<TableCell>& cells = table->rows.emplace_back();
    for (const TableValue& value : row.values()) cells.push_back(CellOf(value));
  }
  return absl::OkStatus();
}

class RemoteSource final : public TableSource {
 public:
  explicit RemoteSource(ControlClient& client) : client_(client) {}

  // Time and bytes are bounded by the coordinator.
  absl::StatusOr<Table> Run(absl::string_view sql, const QueryLimits& limits) override {
    return client_.Query(sql, std::min<uint64_t>(limits.rows, limits::kQueryRows));
  }

 private:
  ControlClient& client_;
};

}  // namespace

class ControlClient::Stub {
 public:
  explicit Stub(std::shared_ptr<grpc::Channel> channel)
      : stub_(ControlService::NewStub(std::move(channel))) {}
  ControlService::Stub* operator->() const { return stub_.get(); }

 private:
  const std::unique_ptr<ControlService::Stub> stub_;
};

ControlClient::ControlClient(std::shared_ptr<grpc::Channel> channel, std::string address)
    : stub_(std::make_unique<Stub>(std::move(channel))), address_(std::move(address)) {}
ControlClient::~ControlClient() = default;

absl::StatusOr<std::unique_ptr<ControlClient>> ControlClient::Dial(const std::string& address) {
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, DialCoordinator(address));
  return std::make_unique<ControlClient>(std::move(channel), address);
}

absl::Status ControlClient::Annotated(absl::Status status) const {
  if (!absl::IsUnavailable(status)) return status;
  return Annotate(std::move(status),
                  absl::StrCat("no coordinator answers at ", address_,
                               " (start kvsweep-coordinator there, or name another address with "
                               "--coordinator)"));
}

absl::StatusOr<SubmitReply> ControlClient::Submit(const SubmitRequest& request) {
  grpc::ClientContext context;
  SetDeadline(&context);
  SubmitReply reply;
  RETURN_IF_ERROR(Annotated(ToStatus((*stub_)->Submit(&context, request, &reply), context)));
  return reply;
}

absl::Status ControlClient::UploadFile(const Digest& digest, absl::string_view content) {
  grpc::ClientContext context;
  SetDeadline(&context);
  UploadReply reply;
  const std::unique_ptr<grpc::ClientWriter<FileChunk>> writer =
      (*stub_)->UploadFile(&context, &reply);
  size_t offset = 0;
  do {
    FileChunk chunk;
    chunk.set_data(std::string(content.substr(offset, kChunkBytes)));
    chunk.set_offset(offset);
    chunk.set_total_bytes(content.size());
    if (offset == 0) chunk.set_digest(std::string(digest.bytes()));
    if (!writer->Write(chunk)) break;  // Finish says why
    offset += kChunkBytes;
  } while (offset < content.size());
  writer->WritesDone();
  return Annotated(ToStatus(writer->Finish(), context));
}

absl::Status ControlClient::Watch(ExperimentId experiment,
                                  const std::function<void(const WatchEvent&)>& on_event) {
  grpc::ClientContext context;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (interrupted_) return absl::CancelledError("interrupted");
    watch_ = &context;
  }
  WatchRequest request;
  request.set_experiment_id(experiment.value());
  const std::unique_ptr<grpc::ClientReader<WatchEvent>> reader = (*stub_)->Watch(&context, request);
  WatchEvent event;
  bool finished = false;
  while (!finished && reader->Read(&event)) {
    on_event(event);
    finished = event.finished();
  }
  if (finished) context.TryCancel();
  const grpc::Status status = reader->Finish();
  const std::lock_guard<std::mutex> lock(mutex_);
  watch_ = nullptr;
  if (finished) return absl::OkStatus();
  if (interrupted_) return absl::CancelledError("interrupted");
  if (status.ok()) return absl::UnavailableError("the coordinator ended the watch");
  return Annotated(ToStatus(status, context));
}

void ControlClient::Interrupt() {
  const std::lock_guard<std::mutex> lock(mutex_);
  interrupted_ = true;
  if (watch_ != nullptr) watch_->TryCancel();
}

absl::StatusOr<uint64_t> ControlClient::Cancel(ExperimentId experiment) {
  grpc::ClientContext context;
  SetDeadline(&context);
  CancelRequest request;
  request.set_experiment_id(experiment.value());
  CancelReply reply;
  RETURN_IF_ERROR(Annotated(ToStatus((*stub_)->Cancel(&context, request, &reply), context)));
  return reply.rounds_cancelled();
}

absl::StatusOr<Table> ControlClient::Workers() {
  grpc::ClientContext context;
  SetDeadline(&context);
  WorkersReply reply;
  RETURN_IF_ERROR(
      Annotated(ToStatus((*stub_)->Workers(&context, WorkersRequest(), &reply), context)));
  Table table;
  RETURN_IF_ERROR(AppendRows(reply.table(), &table));
  return table;
}

absl::StatusOr<Table> ControlClient::Query(absl::string_view sql, uint64_t row_limit) {
  grpc::ClientContext context;
  SetDeadline(&context);
  QueryRequest request;
  request.set_sql(std::string(sql));
  request.set_row_limit(static_cast<uint32_t>(row_limit));
  const std::unique_ptr<grpc::ClientReader<TableReply>> reader = (*stub_)->Query(&context, request);
  Table table;
  TableReply message;
  absl::Status appended;
  while (appended.ok() && reader->Read(&message)) appended = AppendRows(message, &table);
  if (!appended.ok()) context.TryCancel();
  const grpc::Status status = reader->Finish();
  RETURN_IF_ERROR(appended);
  RETURN_IF_ERROR(Annotated(ToStatus(status, context)));
  return table;
}

std::unique_ptr<TableSource> NewRemoteSource(ControlClient& client) {
  return std::make_unique<RemoteSource>(client);
}

}  // namespace kvsweep
