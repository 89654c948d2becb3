#include "worker/coordinator_link.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kReconnectMinMs = 50;
constexpr int kReconnectMaxMs = 3'000;
constexpr int kFetchTries = 6;
constexpr int kFetchDeadlineSeconds = 30;
constexpr int64_t kSpeakGapNs = 5 * kNsPerMs;

absl::Status ToStatus(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

bool IsLoopback(absl::string_view host) {
  return host == "localhost" || host == "[::1]" || absl::StartsWith(host, "127.");
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenCoordinatorChannel(const std::string& address) {
  const size_t colon = address.rfind(':');
  const bool local =
      absl::StartsWith(address, "unix:") ||
      (colon != std::string::npos && IsLoopback(absl::string_view(address).substr(0, colon)));
  if (!local) {
    return absl::InvalidArgumentError(
        absl::StrCat("coordinator address \"", address,
                     "\": calls are neither authenticated nor encrypted yet, so only unix:PATH and "
                     "loopback addresses ",
                     "(127.0.0.1:7470) are dialled; reach another machine through an SSH tunnel"));
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMinMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kReconnectMinMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMaxMs);
  arguments.SetMaxReceiveMessageSize(limits::kMessageBytes);
  arguments.SetMaxSendMessageSize(limits::kMessageBytes);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

int64_t CoordinatorLink::Backoff::NextNs() {
  const int64_t bound_ms =
      std::min<int64_t>(int64_t{kReconnectMinMs} << std::min(failures_++, 10), kReconnectMaxMs);
  return static_cast<int64_t>(random_.Uniform(static_cast<uint64_t>(bound_ms * kNsPerMs)));
}

CoordinatorLink::Call::Call(CoordinatorLink* link) : link_(link) {
  const std::lock_guard<std::mutex> lock(link_->mutex_);
  link_->calls_.insert(&context);
  if (link_->closed_) context.TryCancel();
}

CoordinatorLink::Call::~Call() {
  const std::lock_guard<std::mutex> lock(link_->mutex_);
  link_->calls_.erase(&context);
}

CoordinatorLink::CoordinatorLink(const Options& options, std::shared_ptr<grpc::Channel> channel,
                                 CoordinatorLinkEvents events, Clock& clock)
    : options_(options),
      events_(std::move(events)),
      clock_(clock),
      stub_(WorkerService::NewStub(std::move(channel))),
      interval_ns_(options.heartbeat_ns),
      synchronizing_([this] { KeepSynchronizing(); }),
      reporting_([this] { KeepReporting(); }) {}

CoordinatorLink::~CoordinatorLink() {
  Close();
  synchronizing_.join();
  reporting_.join();
}

void CoordinatorLink::AnnounceState() {
  const std::lock_guard<std::mutex> lock(mutex_);
  state_announced_ = true;
  state_changed_.notify_one();
}

void CoordinatorLink::AnnounceRows() {
  const std::lock_guard<std::mutex> lock(mutex_);
  rows_announced_ = true;
  rows_changed_.notify_one();
}

void CoordinatorLink::Close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  for (grpc::ClientContext* context : calls_) context->TryCancel();
  state_changed_.notify_all();
  rows_changed_.notify_all();
  closing_.notify_all();
}

// Waits so long; false: the link was closed, or what it waits for is no longer wanted.
bool CoordinatorLink::Pause(int64_t duration_ns, const std::atomic<bool>* unwanted) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t end_ns = clock_.NowNs() + duration_ns;
  const auto goes_on = [&] { return !closed_ && (unwanted == nullptr || !*unwanted); };
  while (goes_on() && clock_.NowNs() < end_ns) clock_.WaitUntilNs(closing_, lock, end_ns);
  return goes_on();
}

// ------------------------------------------------------------------------------------------ states

void CoordinatorLink::KeepSynchronizing() {
  Backoff backoff;
  do {
    const absl::Status status = Synchronize(backoff);
    if (absl::IsFailedPrecondition(status)) {
      // Another worker has this name, or the coordinator speaks another protocol: no use in trying
      // again.
      events_.on_refused(status);
      return;
    }
    if (backoff.failures() == 0 && !absl::IsCancelled(status))
      LogWarning("the coordinator cannot be reached: ", status.ToString());
  } while (Pause(backoff.NextNs(), nullptr));
}

// One stream of states, until it ends.
absl::Status CoordinatorLink::Synchronize(Backoff& backoff) {
  Call call(this);
  const auto stream = stub_->Synchronize(&call.context);
  bool ended = false;  // guarded by mutex_
  std::thread reader([&] {
    DesiredState desired;
    while (stream->Read(&desired)) {
      if (backoff.failures() > 0) LogInfo("the coordinator answers");
      backoff.Reset();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        answered_ns_ = clock_.NowNs();
        interval_ns_ =
            desired.next_after_ns() > 0
                ? std::clamp<int64_t>(desired.next_after_ns(), kSpeakGapNs, options_.heartbeat_ns)
                : options_.heartbeat_ns;
      }
      events_.on_desired(desired);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ended = true;
    state_changed_.notify_all();
  });
  int64_t spoken_ns = 0;
  for (bool first = true;; first = false) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (first) answered_ns_ = clock_.NowNs();
      const auto due_ns = [&] {
        return spoken_ns + (state_announced_ ? kSpeakGapNs : interval_ns_);
      };
      while (!first && !closed_ && !ended && clock_.NowNs() < due_ns()) {
        clock_.WaitUntilNs(state_changed_, lock, due_ns());
      }
      if (ended) break;
      spoken_ns = clock_.NowNs();
      state_announced_ = false;
      if (closed_ || spoken_ns - answered_ns_ > options_.silence_limit_ns) {
        call.context.TryCancel();
        break;
      }
    }
    if (!stream->Write(events_.compose_state())) break;
  }
  reader.join();
  return ToStatus(stream->Finish());
}

// -------------------------------------------------------------------------------------------- rows

void CoordinatorLink::KeepReporting() {
  Backoff backoff;
  do {
    const absl::Status status = Report(backoff);
    if (backoff.failures() == 0 && !absl::IsCancelled(status))
      LogWarning("the stream of rows has ended: ", status.ToString());
  } while (Pause(backoff.NextNs(), nullptr));
}

// One stream of rows, until it ends.
absl::Status CoordinatorLink::Report(Backoff& backoff) {
  Call call(this);
  const auto stream = stub_->Report(&call.context);
  bool ended = false;  // guarded by mutex_
  std::thread reader([&] {
    ReportReply reply;
    while (stream->Read(&reply)) {
      backoff.Reset();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (unanswered_batches_ > 0) --unanswered_batches_;
        batches_moved_ns_ = clock_.NowNs();
      }
      if (const absl::Status status = events_.on_reply(reply); !status.ok()) {
        LogError("attempt ", reply.attempt(), ": ", status.message());
        call.context.TryCancel();
      }
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ended = true;
    rows_changed_.notify_all();
  });
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    unanswered_batches_ = 0;
    rows_announced_ = true;
  }
  events_.on_report_connected();
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto silent_at_ns = [&] {
        return unanswered_batches_ > 0 ? batches_moved_ns_ + options_.silence_limit_ns : kNeverNs;
      };
      while (!closed_ && !ended && !rows_announced_ && clock_.NowNs() < silent_at_ns()) {
        clock_.WaitUntilNs(rows_changed_, lock, silent_at_ns());
      }
      if (ended) break;
      if (closed_ || clock_.NowNs() >= silent_at_ns()) {
        call.context.TryCancel();
        break;
      }
      rows_announced_ = false;
    }
    const std::optional<ReportBatch> batch = events_.next_batch();
    if (!batch.has_value()) continue;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      rows_announced_ = true;  // there may be more
      ++unanswered_batches_;
      batches_moved_ns_ = clock_.NowNs();
    }
    if (!stream->Write(*batch)) break;
  }
  reader.join();
  return ToStatus(stream->Finish());
}

// ------------------------------------------------------------------------------------------- files

absl::StatusOr<std::string> CoordinatorLink::Fetch(const FileReference& file,
                                                   const std::atomic<bool>& unwanted) {
  Backoff backoff;
  while (true) {
    absl::StatusOr<std::string> content = FetchOnce(file);
    const bool may_pass =
        absl::IsUnavailable(content.status()) || absl::IsDeadlineExceeded(content.status());
    if (!may_pass || backoff.failures() >= kFetchTries) return content;
    if (!Pause(backoff.NextNs(), &unwanted))
      return absl::CancelledError("the file is no longer wanted");
  }
}

absl::StatusOr<std::string> CoordinatorLink::FetchOnce(const FileReference& file) {
  Call call(this);
  call.context.set_deadline(gpr_time_from_seconds(kFetchDeadlineSeconds, GPR_TIMESPAN));
  FetchFileRequest request;
  request.set_digest(file.digest());
  const auto reader = stub_->FetchFile(&call.context, request);
  std::string content;
  FileChunk chunk;
  while (reader->Read(&chunk)) {
    if (chunk.offset() != content.size() || content.size() + chunk.data().size() > file.bytes()) {
      call.context.TryCancel();
      reader->Finish();
      return absl::DataLossError(absl::StrCat("a chunk at byte ", chunk.offset(), " of ",
                                              file.bytes(), " does not continue what came before"));
    }
    content += chunk.data();
  }
  RETURN_IF_ERROR(ToStatus(reader->Finish()));
  return content;
}

}  // namespace kvsweep
