#ifndef KVSWEEP_COORDINATOR_STREAMS_H_
#define KVSWEEP_COORDINATOR_STREAMS_H_

#include <grpcpp/grpcpp.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/dispatcher.h"
#include "coordinator/wire.h"

// The gRPC side of the dispatcher's links: reactors of the callback API. Each lives from Begin
// until gRPC says that the call is done, by a reference to itself; the dispatcher may hold it
// longer. Callbacks never wait: they hand what they read to the dispatcher. What is read and not
// answered is bounded for each stream, so a worker that floods, or does not read its answers, stops
// only itself.

namespace kvsweep {

inline grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

inline absl::Status BusyStatus() {
  return absl::UnavailableError("the coordinator is stopping, or too much waits for it: try again");
}

// What the two streams of a worker share: one read, one write and one end at a time.
template <typename Request, typename Reply>
class WorkerStream : public grpc::ServerBidiReactor<Request, Reply>,
                     public std::enable_shared_from_this<WorkerStream<Request, Reply>> {
 public:
  grpc::ServerBidiReactor<Request, Reply>* Begin() {
    self_ = this->shared_from_this();
    Read();
    return this;
  }

  void OnWriteDone(bool ok) final {
    const std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (ok) WriteNext();
    Written();
  }

  void OnDone() final {
    Ended();
    self_.reset();
  }

 protected:
  // Once a write has ended; the mutex is held.
  virtual void Written() {}
  // The call is over.
  virtual void Ended() {}

  void Read() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ReadLocked();
  }

  void ReadLocked() {
    if (!finished_) this->StartRead(&request_);
  }

  // `replace`: what waits to be sent is out of date.
  void Write(Reply reply, bool replace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return;
    if (replace) waiting_.clear();
    waiting_.push_back(std::move(reply));
    if (!writing_) WriteNext();
  }

  void End(const absl::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(finished_, true)) return;
    this->Finish(ToGrpc(status));
  }

  Request request_;  // of the read in hand
  std::mutex mutex_;

 private:
  void WriteNext() {
    if (finished_ || waiting_.empty()) return;
    writing_ = true;
    reply_ = std::move(waiting_.front());
    waiting_.pop_front();
    this->StartWrite(&reply_);
  }

  std::shared_ptr<WorkerStream> self_;
  std::deque<Reply> waiting_;
  Reply reply_;  // being written
  bool writing_ = false;
  bool finished_ = false;
};

class SynchronizeStream final : public WorkerStream<WorkerState, DesiredState>, public WorkerLink {
 public:
  explicit SynchronizeStream(Dispatcher& dispatcher) : dispatcher_(dispatcher) {}

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus());
    absl::StatusOr<WorkerReport> report = ReportFromWire(request_);
    if (!report.ok()) return End(report.status());
    if (!dispatcher_.OnState(Link(), *std::move(report), request_.generation())) End(BusyStatus());
  }

  void Tell(DesiredState desired) override { Write(std::move(desired), /*replace=*/true); }
  void ReadOn() override { Read(); }
  void Close(const absl::Status& status) override { End(status); }

 protected:
  void Ended() override { (void)dispatcher_.OnLinkEnded(Link()); }

 private:
  std::shared_ptr<WorkerLink> Link() {
    return std::static_pointer_cast<SynchronizeStream>(shared_from_this());
  }

  Dispatcher& dispatcher_;
};

class ReportStream final : public WorkerStream<ReportBatch, ReportReply>, public ReportLink {
 public:
  explicit ReportStream(Dispatcher& dispatcher) : dispatcher_(dispatcher) {}

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus());
    const absl::Status status = CheckBatch(request_);
    if (!status.ok()) return End(status);
    std::shared_ptr<ReportLink> link = std::static_pointer_cast<ReportStream>(shared_from_this());
    if (!dispatcher_.OnBatch(std::move(link), std::move(request_))) return End(BusyStatus());
    request_ = ReportBatch();
    const std::lock_guard<std::mutex> lock(mutex_);
    reading_ = ++unanswered_ < kWindow;
    if (reading_) ReadLocked();
  }

  void Reply(ReportReply reply) override { Write(std::move(reply), /*replace=*/false); }
  void Close(const absl::Status& status) override { End(status); }

 protected:
  void Written() override {
    --unanswered_;
    if (!std::exchange(reading_, true)) ReadLocked();
  }

 private:
  static constexpr int kWindow = 8;  // batches read whose answers have not been sent

  Dispatcher& dispatcher_;
  int unanswered_ = 0;
  bool reading_ = true;
};

// Events of one experiment to one watcher.
class WatchStream final : public grpc::ServerWriteReactor<WatchEvent>,
                          public WatchLink,
                          public std::enable_shared_from_this<WatchStream> {
 public:
  grpc::ServerWriteReactor<WatchEvent>* Begin() {
    self_ = shared_from_this();
    return this;
  }

  bool Ready() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !writing_ && !end_.has_value();
  }
  bool Gone() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return end_.has_value();
  }
  void Send(WatchEvent event) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (writing_ || end_.has_value()) return;
    writing_ = true;
    event_ = std::move(event);
    StartWrite(&event_);
  }
  void Close(const absl::Status& status) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (end_.has_value()) return;
    end_ = status;
    if (!writing_) Finish(ToGrpc(status));
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    const bool had_end = end_.has_value();
    if (!ok && !had_end) end_ = absl::CancelledError("the watcher has left");
    if (end_.has_value()) Finish(ToGrpc(*end_));
  }
  void OnCancel() override { Close(absl::CancelledError("the watcher has left")); }
  void OnDone() override { self_.reset(); }

 private:
  std::mutex mutex_;
  std::shared_ptr<WatchStream> self_;
  WatchEvent event_;  // being written
  bool writing_ = false;
  std::optional<absl::Status> end_;  // how the call ends, once nothing is being written
};

// Sends messages that are made somewhere else, then ends. Fill must be called once.
template <typename T>
class ListStream final : public grpc::ServerWriteReactor<T> {
 public:
  void Fill(absl::StatusOr<std::vector<T>> messages) {
    if (!messages.ok()) return this->Finish(ToGrpc(messages.status()));
    messages_ = *std::move(messages);
    Next();
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return this->Finish(grpc::Status::CANCELLED);
    ++next_;
    Next();
  }
  void OnDone() override { delete this; }

 private:
  void Next() {
    if (next_ == messages_.size()) return this->Finish(grpc::Status::OK);
    this->StartWrite(&messages_[next_]);
  }

  std::vector<T> messages_;
  size_t next_ = 0;
};

// Reads a file in chunks, in order, up to limits::kTravellingFileBytes, and hands it over once it
// is whole and is what its digest says. `finish` answers the call.
class UploadStream final : public grpc::ServerReadReactor<FileChunk> {
 public:
  using Whole = absl::AnyInvocable<void(struct PutFile, UploadStream*)>;

  UploadStream(Whole whole) : whole_(std::move(whole)) { StartRead(&chunk_); }

  void OnReadDone(bool ok) override;
  void OnDone() override { delete this; }

 private:
  absl::Status Take();

  Whole whole_;
  FileChunk chunk_;
  struct PutFile file_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_STREAMS_H_
