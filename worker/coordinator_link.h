#ifndef KVSWEEP_WORKER_COORDINATOR_LINK_H_
#define KVSWEEP_WORKER_COORDINATOR_LINK_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/random.h"
#include "proto/experiment.pb.h"
#include "proto/worker.grpc.pb.h"

namespace kvsweep {

// A channel to the coordinator; see DialCoordinator in daemon.h.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenCoordinatorChannel(const std::string& address);

// What a link asks of its owner. Called on the link's threads, without its lock; the owner may call
// the link from within.
struct CoordinatorLinkEvents {
  std::function<WorkerState()> compose_state;           // the state to send now
  std::function<void(const DesiredState&)> on_desired;  // the coordinator's answer
  std::function<void()>
      on_report_connected;  // a new stream for rows: start from the last acknowledged
  std::function<std::optional<ReportBatch>()>
      next_batch;  // the next rows; none: wait for AnnounceRows
  std::function<absl::Status(const ReportReply&)> on_reply;  // an error ends the stream
  std::function<void(const absl::Status&)>
      on_refused;  // the coordinator will never take this worker
};

// The worker's end of both streams to the coordinator. Each stream has a thread that writes and,
// while it is up, one that reads. A stream that breaks, or whose other end no longer answers, is
// opened anew after a random wait that grows with each failure in a row. All functions may be
// called from any thread.
class CoordinatorLink {
 public:
  struct Options {
    int64_t heartbeat_ns = kNsPerSecond;           // longest silence of ours
    int64_t silence_limit_ns = 10 * kNsPerSecond;  // longest silence of the coordinator
  };

  // Connects, and goes on connecting until Close. `clock` must outlive the link.
  CoordinatorLink(const Options& options, std::shared_ptr<grpc::Channel> channel,
                  CoordinatorLinkEvents events, Clock& clock);

  // Closes, and waits for the threads. Not from within an event.
  ~CoordinatorLink();

  // The state has changed: tell it soon. Changes within 5 ms go into one message.
  void AnnounceState();

  // There are rows to send.
  void AnnounceRows();

  // Ends all calls; no event comes from calls that begin later.
  void Close();

  // The content of a file of at most limits::kTravellingFileBytes, tried again while the
  // coordinator cannot be reached, some seconds in all. Cancelled once the link is closed or
  // `unwanted` is set.
  absl::StatusOr<std::string> Fetch(const FileReference& file, const std::atomic<bool>& unwanted);

 private:
  // Waiting times between tries: uniform up to a bound that doubles ("full jitter"), so that
  // workers that were cut off together do not return together.
  class Backoff {
   public:
    int64_t NextNs();
    void Reset() { failures_ = 0; }
    int failures() const { return failures_; }

   private:
    Random random_{EntropySeed()};
    std::atomic<int> failures_ = 0;
  };

  // A call that Close cancels.
  class Call {
   public:
    explicit Call(CoordinatorLink* link);
    ~Call();
    grpc::ClientContext context;

   private:
    CoordinatorLink* const link_;
  };

  void KeepSynchronizing();
  void KeepReporting();
  absl::Status Synchronize(Backoff& backoff);
  absl::Status Report(Backoff& backoff);
  absl::StatusOr<std::string> FetchOnce(const FileReference& file);
  bool Pause(int64_t duration_ns, const std::atomic<bool>* unwanted);

  const Options options_;
  const CoordinatorLinkEvents events_;
  Clock& clock_;
  const std::unique_ptr<WorkerService::Stub> stub_;

  std::mutex mutex_;
  // One for each kind of waiting, all with mutex_.
  std::condition_variable state_changed_;
  std::condition_variable rows_changed_;
  std::condition_variable closing_;

  // Guarded by mutex_.
  bool closed_ = false;
  std::set<grpc::ClientContext*> calls_;
  bool state_announced_ = false;
  int64_t interval_ns_;      // until the next state, as the coordinator asked
  int64_t answered_ns_ = 0;  // when it last answered one
  bool rows_announced_ = false;
  uint64_t unanswered_batches_ = 0;
  int64_t batches_moved_ns_ = 0;  // when one was last sent or answered

  std::thread synchronizing_;
  std::thread reporting_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_COORDINATOR_LINK_H_
