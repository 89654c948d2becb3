#include "coordinator/service.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/memory/memory.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/bounded_queue.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "coordinator/dispatcher.h"
#include "coordinator/streams.h"
#include "coordinator/submission.h"
#include "coordinator/wire.h"
#include "proto/control.grpc.pb.h"
#include "proto/worker.grpc.pb.h"
#include "storage/query.h"

namespace kvsweep {
namespace {

constexpr size_t kQuestionThreads = 4;
constexpr size_t kQuestionsWaiting = 1024;
constexpr size_t kChunkBytes = 512 << 10;
constexpr size_t kServerMemoryBytes = size_t{1} << 30;
constexpr uint32_t kListRows = 100;
constexpr int kPingMs = 20'000;
constexpr int kPingTimeoutMs = 10'000;
constexpr int kLeastPingMs = 10'000;  // clients that ping more often are cut off
constexpr int kStreamsPerConnection = 256;
constexpr int kShutdownMs = 1'000;

// A few threads for work that waits: expanding experiments, asking the store.
class QuestionPool {
 public:
  explicit QuestionPool(Clock& clock) : questions_(kQuestionsWaiting) {
    for (size_t i = 0; i < kQuestionThreads; ++i) {
      threads_.emplace_back([this, &clock] {
        while (auto question = questions_.Pop(clock, kNeverNs)) (*question)();
      });
    }
  }
  ~QuestionPool() { Stop(); }

  // False if too many wait already.
  bool Ask(absl::AnyInvocable<void()> question) { return questions_.TryPush(std::move(question)); }

  // Answers what waits, then ends.
  void Stop() {
    questions_.Close();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

 private:
  BoundedQueue<absl::AnyInvocable<void()>> questions_;
  std::vector<std::thread> threads_;
};

// What the services share.
struct Parts {
  Clock& clock;
  Store& store;
  std::string store_path;
  Dispatcher& dispatcher;
  QuestionPool& pool;

  absl::StatusOr<std::unique_ptr<StoreQuery>> OpenQuery() const {
    if (store_path.empty()) {
      return absl::FailedPreconditionError("this coordinator keeps no file that can be asked");
    }
    return StoreQuery::Open(store_path, clock);
  }
};

// Answers a unary call with what `ask` returns, on a thread that may wait.
template <typename Ask>
grpc::ServerUnaryReactor* AnswerLater(const Parts& parts, grpc::CallbackServerContext* context,
                                      Ask ask) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool asked = parts.pool.Ask([context, reactor, ask = std::move(ask)]() mutable {
    reactor->Finish(context->IsCancelled() ? grpc::Status::CANCELLED : ToGrpc(ask()));
  });
  if (!asked) reactor->Finish(ToGrpc(BusyStatus()));
  return reactor;
}

// Answers a streaming call with the messages that `ask` returns.
template <typename T, typename Ask>
grpc::ServerWriteReactor<T>* StreamLater(const Parts& parts, grpc::CallbackServerContext* context,
                                         Ask ask) {
  auto* stream = new ListStream<T>();  // deletes itself when the call is done
  const bool asked = parts.pool.Ask([context, stream, ask = std::move(ask)]() mutable {
    if (context->IsCancelled()) return stream->Fill(absl::CancelledError());
    stream->Fill(ask());
  });
  if (!asked) stream->Fill(BusyStatus());
  return stream;
}

std::vector<FileChunk> Chunks(const std::string& digest, absl::string_view content) {
  std::vector<FileChunk> chunks;
  for (size_t offset = 0; offset < content.size() || chunks.empty(); offset += kChunkBytes) {
    FileChunk& chunk = chunks.emplace_back();
    chunk.set_data(std::string(content.substr(offset, kChunkBytes)));
    chunk.set_offset(offset);
    chunk.set_total_bytes(content.size());
    if (offset == 0) chunk.set_digest(digest);
  }
  return chunks;
}

// As much of a table as one message holds.
TableReply OneMessage(const Table& table) {
  std::vector<TableReply> messages = TableToWire(table);
  if (messages.size() > 1) messages.front().set_truncated(true);
  return std::move(messages.front());
}

class WorkerServiceImpl final : public WorkerService::CallbackService {
 public:
  explicit WorkerServiceImpl(const Parts& parts) : parts_(parts) {}

  grpc::ServerBidiReactor<WorkerState, DesiredState>* Synchronize(
      grpc::CallbackServerContext*) override {
    return std::make_shared<SynchronizeStream>(parts_.dispatcher)->Begin();
  }

  grpc::ServerBidiReactor<ReportBatch, ReportReply>* Report(grpc::CallbackServerContext*) override {
    return std::make_shared<ReportStream>(parts_.dispatcher)->Begin();
  }

  grpc::ServerWriteReactor<FileChunk>* FetchFile(grpc::CallbackServerContext* context,
                                                 const FetchFileRequest* request) override {
    return StreamLater<FileChunk>(
        parts_, context,
        [this, digest = request->digest()]() -> absl::StatusOr<std::vector<FileChunk>> {
          ASSIGN_OR_RETURN(const std::unique_ptr<StoreReader> reader, parts_.store.OpenReader());
          ASSIGN_OR_RETURN(const std::string content, reader->GetFile(digest));
          return Chunks(digest, content);
        });
  }

 private:
  const Parts& parts_;
};

class ControlServiceImpl final : public ControlService::CallbackService {
 public:
  explicit ControlServiceImpl(const Parts& parts) : parts_(parts) {}

  grpc::ServerReadReactor<FileChunk>* UploadFile(grpc::CallbackServerContext*,
                                                 UploadReply* reply) override {
    return new UploadStream([this, reply](struct PutFile file, UploadStream* stream) {
      reply->set_digest(file.digest);
      const bool taken = parts_.dispatcher.PutFile(
          std::move(file),
          [stream](const absl::Status& status) { stream->Finish(ToGrpc(status)); });
      if (!taken) stream->Finish(ToGrpc(BusyStatus()));
    });
  }

  // First which stored rounds may answer, then the expansion on a thread that may wait, then the
  // store.
  grpc::ServerUnaryReactor* Submit(grpc::CallbackServerContext* context,
                                   const SubmitRequest* request, SubmitReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const bool taken = parts_.dispatcher.Reuse([=, this](ReuseRules rules) {
      rules.fresh = request->fresh();
      rules.any_build = request->same_method();
      const bool asked = parts_.pool.Ask(
          [=, this, rules = std::move(rules)] { Expand(*request, rules, reply, reactor); });
      if (!asked) reactor->Finish(ToGrpc(BusyStatus()));
    });
    if (!taken) reactor->Finish(ToGrpc(BusyStatus()));
    return reactor;
  }

  grpc::ServerWriteReactor<WatchEvent>* Watch(grpc::CallbackServerContext*,
                                              const WatchRequest* request) override {
    auto stream = std::make_shared<WatchStream>();
    grpc::ServerWriteReactor<WatchEvent>* reactor = stream->Begin();
    const ExperimentId experiment(request->experiment_id());
    const bool asked = parts_.pool.Ask([this, stream, experiment] {
      if (SendIfFinished(experiment, *stream)) return;
      if (!parts_.dispatcher.Watch(stream, experiment)) stream->Close(BusyStatus());
    });
    if (!asked) stream->Close(BusyStatus());
    return reactor;
  }

  grpc::ServerUnaryReactor* Cancel(grpc::CallbackServerContext* context,
                                   const CancelRequest* request, CancelReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const bool taken = parts_.dispatcher.Cancel(ExperimentId(request->experiment_id()),
                                                [reply, reactor](uint64_t cancelled) {
                                                  reply->set_rounds_cancelled(cancelled);
                                                  reactor->Finish(grpc::Status::OK);
                                                });
    if (!taken) reactor->Finish(ToGrpc(BusyStatus()));
    return reactor;
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const DrainRequest* request,
                                  DrainReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const bool taken = parts_.dispatcher.Drain(WorkerId(request->worker_id()), request->draining(),
                                               [reply, reactor](bool known) {
                                                 reply->set_known(known);
                                                 reactor->Finish(grpc::Status::OK);
                                               });
    if (!taken) reactor->Finish(ToGrpc(BusyStatus()));
    return reactor;
  }

  grpc::ServerUnaryReactor* Workers(grpc::CallbackServerContext* context, const WorkersRequest*,
                                    WorkersReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const bool taken = parts_.dispatcher.Workers([reply, reactor](const Table& table) {
      *reply->mutable_table() = OneMessage(table);
      reactor->Finish(grpc::Status::OK);
    });
    if (!taken) reactor->Finish(ToGrpc(BusyStatus()));
    return reactor;
  }

  // Experiments whose name or state contains the filter.
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context, const ListRequest* request,
                                 TableReply* reply) override {
    return AnswerLater(parts_, context, [this, request, reply]() -> absl::Status {
      ASSIGN_OR_RETURN(const std::unique_ptr<StoreQuery> query, parts_.OpenQuery());
      const uint32_t limit = request->limit() == 0 ? kListRows : request->limit();
      ASSIGN_OR_RETURN(Table table,
                       query->Experiments(request->filter().empty() ? limit : UINT32_MAX));
      if (!request->filter().empty()) {
        std::erase_if(table.rows, [&](const std::vector<TableCell>& row) {
          return std::none_of(row.begin(), row.end(), [&](const TableCell& cell) {
            return absl::StrContains(TableCellText(cell), request->filter());
          });
        });
      }
      if (table.rows.size() > limit) {
        table.rows.resize(limit);
        table.truncated = true;
      }
      *reply = OneMessage(table);
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Show(grpc::CallbackServerContext* context, const ShowRequest* request,
                                 ShowReply* reply) override {
    return AnswerLater(parts_, context, [this, request, reply]() -> absl::Status {
      ASSIGN_OR_RETURN(const std::unique_ptr<StoreQuery> query, parts_.OpenQuery());
      ASSIGN_OR_RETURN(*reply->mutable_json(), query->ShowTrial(TrialId(request->trial_id())));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Logs(grpc::CallbackServerContext* context, const LogsRequest* request,
                                 LogsReply* reply) override {
    return AnswerLater(parts_, context, [this, request, reply]() -> absl::Status {
      ASSIGN_OR_RETURN(const std::unique_ptr<StoreQuery> query, parts_.OpenQuery());
      ASSIGN_OR_RETURN(*reply->mutable_text(), query->Logs(TrialId(request->trial_id())));
      return absl::OkStatus();
    });
  }

  grpc::ServerWriteReactor<TableReply>* Query(grpc::CallbackServerContext* context,
                                              const QueryRequest* request) override {
    return StreamLater<TableReply>(
        parts_, context, [this, request]() -> absl::StatusOr<std::vector<TableReply>> {
          if (request->sql().size() > static_cast<size_t>(limits::kQueryTextBytes)) {
            return absl::InvalidArgumentError(
                absl::StrCat("the query has more than ", limits::kQueryTextBytes, " bytes"));
          }
          ASSIGN_OR_RETURN(const std::unique_ptr<StoreQuery> query, parts_.OpenQuery());
          QueryLimits bounds;
          bounds.rows = limits::kQueryRows;
          if (request->row_limit() > 0) {
            bounds.rows = std::min<uint64_t>(bounds.rows, request->row_limit());
          }
          bounds.time_ns = limits::kQuerySeconds * kNsPerSecond;
          ASSIGN_OR_RETURN(const Table table, query->Run(request->sql(), bounds));
          return TableToWire(table);
        });
  }

  grpc::ServerWriteReactor<TableReply>* Results(grpc::CallbackServerContext* context,
                                                const ResultsRequest* request) override {
    return StreamLater<TableReply>(
        parts_, context, [this, request]() -> absl::StatusOr<std::vector<TableReply>> {
          ASSIGN_OR_RETURN(const std::unique_ptr<StoreQuery> query, parts_.OpenQuery());
          ASSIGN_OR_RETURN(const Table table,
                           query->Results(ExperimentId(request->experiment_id())));
          return TableToWire(table);
        });
  }

 private:
  void Expand(const SubmitRequest& request, const ReuseRules& rules, SubmitReply* reply,
              grpc::ServerUnaryReactor* reactor) {
    absl::StatusOr<std::unique_ptr<StoreReader>> reader = parts_.store.OpenReader();
    if (!reader.ok()) return reactor->Finish(ToGrpc(reader.status()));
    absl::StatusOr<Submission> submission =
        PlanSubmission(request, rules, parts_.clock.UnixNs(), **reader);
    if (!submission.ok()) return reactor->Finish(ToGrpc(submission.status()));
    if (!submission->missing_files.empty()) {
      for (const std::string& digest : submission->missing_files) reply->add_missing_files(digest);
      return reactor->Finish(grpc::Status::OK);
    }
    const bool taken = parts_.dispatcher.Submit(
        *std::move(submission), [reply, reactor](absl::StatusOr<SubmitReply> submitted) {
          if (!submitted.ok()) return reactor->Finish(ToGrpc(submitted.status()));
          *reply = *std::move(submitted);
          reactor->Finish(grpc::Status::OK);
        });
    if (!taken) reactor->Finish(ToGrpc(BusyStatus()));
  }

  // An experiment that has ended has one event. False: it has not, or nobody knows it.
  bool SendIfFinished(ExperimentId experiment, WatchStream& stream) {
    const absl::StatusOr<std::unique_ptr<StoreQuery>> query = parts_.OpenQuery();
    if (!query.ok()) return false;
    const absl::StatusOr<Table> table = (*query)->Run(
        absl::StrCat(
            "SELECT rounds, done, served, failed + poisoned + cancelled FROM v_experiments "
            "WHERE experiment_id = ",
            experiment.value(), " AND state IN ('finished', 'cancelled')"),
        QueryLimits());
    if (!table.ok() || table->rows.size() != 1) return false;
    const auto number = [&](size_t column) {
      const auto* value = std::get_if<int64_t>(&table->rows[0][column]);
      return value == nullptr ? 0 : static_cast<uint64_t>(*value);
    };
    WatchEvent event;
    event.set_experiment_id(experiment.value());
    event.set_rounds(number(0));
    event.set_rounds_done(number(1));
    event.set_rounds_served(number(2));
    event.set_rounds_failed(number(3));
    event.set_finished(true);
    stream.Send(std::move(event));
    stream.Close(absl::OkStatus());
    return true;
  }

  const Parts& parts_;
};

absl::Status CannotListen(const std::string& addresses) {
  return absl::UnavailableError(
      absl::StrCat("cannot listen on ", addresses, ": is another coordinator running?"));
}

bool IsLoopbackHost(absl::string_view host) {
  return host == "localhost" || host == "[::1]" ||
         (absl::StartsWith(host, "127.") &&
          host.find_first_not_of("0123456789.") == absl::string_view::npos);
}

}  // namespace

// ---------------------------------------------------------------------------------------- upload

absl::Status UploadStream::Take() {
  const size_t bytes = file_.content.size();
  if (bytes == 0 && !chunk_.digest().empty()) file_.digest = chunk_.digest();
  if (chunk_.offset() != bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a chunk at ", chunk_.offset(), " where ", bytes, " must come"));
  }
  if (bytes + chunk_.data().size() > static_cast<size_t>(limits::kTravellingFileBytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the file has more than ", limits::kTravellingFileBytes, " bytes"));
  }
  file_.content += chunk_.data();
  return absl::OkStatus();
}

void UploadStream::OnReadDone(bool ok) {
  if (ok) {
    const absl::Status status = Take();
    if (!status.ok()) return Finish(ToGrpc(status));
    return StartRead(&chunk_);
  }
  if (Sha256(file_.content).bytes() != file_.digest) {
    return Finish(ToGrpc(absl::InvalidArgumentError("the content is not what its digest says")));
  }
  whole_(std::move(file_), this);
}

absl::Status CheckListenAddress(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const size_t colon = address.rfind(':');
  const absl::string_view host = address.substr(0, colon);
  uint32_t port = 0;
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", address, "' is no address: write HOST:PORT or unix:PATH"));
  }
  if (IsLoopbackHost(host)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "'", address,
      "' can be reached from other machines, and calls are neither encrypted nor authenticated: "
      "listen on "
      "127.0.0.1, [::1], localhost or unix:PATH, and reach it through a tunnel (ssh -L)"));
}

absl::Status CheckAddressIsFree(const std::string& address) {
  RETURN_IF_ERROR(CheckListenAddress(address));
  if (absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon);
  if (host == "[::1]") host = "::1";
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  // What has no address here is for the server to refuse.
  if (getaddrinfo(host.c_str(), address.substr(colon + 1).c_str(), &hints, &found) != 0) {
    return absl::OkStatus();
  }
  const absl::Cleanup free_found = [found] { freeaddrinfo(found); };
  // One of them is enough, as for the server ("localhost" has two).
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    const int fd = socket(one->ai_family, one->ai_socktype | SOCK_CLOEXEC, one->ai_protocol);
    if (fd < 0) continue;
    const absl::Cleanup close_fd = [fd] { close(fd); };
    const int reuse = 1;  // connections that have ended do not hold a port, only who listens
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
    if (bind(fd, one->ai_addr, one->ai_addrlen) == 0) return absl::OkStatus();
  }
  return CannotListen(address);
}

// ----------------------------------------------------------------------------------- coordinator

class Coordinator::Impl {
 public:
  Impl(CoordinatorOptions options, std::unique_ptr<Dispatcher> dispatcher, Clock& clock)
      : store_(std::move(options.store)),
        dispatcher_(std::move(dispatcher)),
        pool_(std::make_unique<QuestionPool>(clock)),
        parts_{.clock = clock,
               .store = *store_,
               .store_path = std::move(options.store_path),
               .dispatcher = *dispatcher_,
               .pool = *pool_},
        worker_service_(parts_),
        control_service_(parts_) {}

  absl::Status Serve(const std::vector<std::string>& listen) {
    grpc::ServerBuilder builder;
    std::vector<int> ports(listen.size(), -1);
    for (size_t i = 0; i < listen.size(); ++i) {
      builder.AddListeningPort(listen[i], grpc::InsecureServerCredentials(), &ports[i]);
    }
    builder.RegisterService(&worker_service_);
    builder.RegisterService(&control_service_);
    SetLimits(builder);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || std::count(ports.begin(), ports.end(), 0) > 0) {
      return CannotListen(absl::StrJoin(listen, ", "));
    }
    for (size_t i = 0; i < listen.size(); ++i) {
      const bool is_unix = absl::StartsWith(listen[i], "unix:");
      addresses_.push_back(
          is_unix ? listen[i]
                  : absl::StrCat(listen[i].substr(0, listen[i].rfind(':')), ":", ports[i]));
    }
    return absl::OkStatus();
  }

  void Shutdown() {
    if (server_ == nullptr) return;
    // Open streams would hold the server up; the deadline cancels whatever else is left.
    (void)dispatcher_->CloseLinks([](const absl::Status&) {});
    server_->Shutdown(gpr_time_from_millis(kShutdownMs, GPR_TIMESPAN));
    pool_->Stop();
    dispatcher_->Stop();
    server_->Wait();
    server_.reset();
  }

  grpc::Server& server() { return *server_; }
  const std::vector<std::string>& addresses() const { return addresses_; }

 private:
  static void SetLimits(grpc::ServerBuilder& builder) {
    builder.SetMaxReceiveMessageSize(static_cast<int>(limits::kMessageBytes));
    builder.SetMaxSendMessageSize(static_cast<int>(limits::kMessageBytes));
    builder.SetResourceQuota(grpc::ResourceQuota("coordinator").Resize(kServerMemoryBytes));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kStreamsPerConnection);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kPingMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPingTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kLeastPingMs);
    // A second coordinator on the same port must fail, not share it.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    // Only reflection and health use the synchronous part.
    builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 2);
  }

  // Taken down from the end: calls, then questions, then decisions, then the store.
  const std::unique_ptr<Store> store_;
  const std::unique_ptr<Dispatcher> dispatcher_;
  const std::unique_ptr<QuestionPool> pool_;
  const Parts parts_;
  WorkerServiceImpl worker_service_;
  ControlServiceImpl control_service_;
  std::vector<std::string> addresses_;
  std::unique_ptr<grpc::Server> server_;
};

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Start(CoordinatorOptions options,
                                                                Clock& clock) {
  for (const std::string& address : options.listen) RETURN_IF_ERROR(CheckListenAddress(address));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  ASSIGN_OR_RETURN(std::unique_ptr<Dispatcher> dispatcher,
                   Dispatcher::Start({.scheduler = options.scheduler,
                                      .queued_trials = options.queued_trials,
                                      .check_invariants = options.check_invariants},
                                     *options.store, clock));
  const std::vector<std::string> listen = options.listen;
  auto impl = std::make_unique<Impl>(std::move(options), std::move(dispatcher), clock);
  RETURN_IF_ERROR(impl->Serve(listen));
  return absl::WrapUnique(new Coordinator(std::move(impl)));
}

Coordinator::Coordinator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Coordinator::~Coordinator() { Shutdown(); }

std::shared_ptr<grpc::Channel> Coordinator::InProcessChannel() {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(static_cast<int>(limits::kMessageBytes));
  return impl_->server().InProcessChannel(arguments);
}

const std::vector<std::string>& Coordinator::addresses() const { return impl_->addresses(); }

void Coordinator::Shutdown() { impl_->Shutdown(); }

}  // namespace kvsweep
