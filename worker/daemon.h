#ifndef KVSWEEP_WORKER_DAEMON_H_
#define KVSWEEP_WORKER_DAEMON_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/runner_process.h"
#include "worker/session.h"

namespace grpc {
class Channel;
}

namespace kvsweep {

struct WorkerOptions {
  std::string worker_id;  // stable name; of two workers with one name the newer is heard
  std::string machine;    // rounds on the host tier are one at a time on a machine
  std::map<std::string, std::string> labels;  // for people
  std::vector<RunnerCommand> runners;  // [slots], each with its devices and threads as arguments
  std::vector<std::string> model_folders;  // --models; see ModelShelf
  std::string cache_folder;  // files that were fetched, digests, rows spilled; made if missing
  SessionOptions session;    // its number of slots is taken from `runners`
  // A runner that refuses its arguments before it has ever said hello ends the worker, instead of
  // being started again.
  bool end_on_runner_usage = false;
  int64_t heartbeat_ns = kNsPerSecond;           // longest silence towards the coordinator
  int64_t silence_limit_ns = 10 * kNsPerSecond;  // a coordinator that does not answer: connect anew
  int64_t rescan_ns = 60 * kNsPerSecond;         // between two looks at the model folders
};

// A channel to the coordinator: keepalive each 20 s, messages up to limits::kMessageBytes, quick
// reconnection. InvalidArgument unless `address` is unix:PATH or a loopback address with a port:
// until calls are authenticated and encrypted, nothing else is dialled.
absl::StatusOr<std::shared_ptr<grpc::Channel>> DialCoordinator(const std::string& address);

// The worker: carries out what its Session decides. It keeps two streams to the coordinator (states
// one way and the other; rows one way and acknowledgements the other), connecting anew for as long
// as it lives, one runner process a slot, and the files that rounds need.
//
// Threads: one carries out the session's actions and starts the runners (their parent, so it lives
// as long as they), two write to the streams and two read from them, one looks for models, one for
// each round that is being prepared, and one follows each runner. All of them enter the session
// under one mutex, and none waits in there.
//
// All functions may be called from any thread.
class Worker {
 public:
  // Starts the runners and connects; returns at once, whether or not the coordinator can be
  // reached. `clock` must outlive the worker. InvalidArgument for options without slots, name or
  // cache folder.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(const WorkerOptions& options,
                                                       std::shared_ptr<grpc::Channel> channel,
                                                       Clock& clock);

  // Stops at once: kills the runners, leaves the coordinator.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // First call: finish and settle what is held, take nothing new, then end. Second: end now.
  void Shutdown();

  // Returns when the worker has ended by itself: after Shutdown, because a newer worker has taken
  // its name, or because a runner does not take its arguments. The status says which: OK,
  // FailedPrecondition, or InvalidArgument.
  absl::Status WaitUntilDone();

 private:
  class Daemon;
  explicit Worker(std::unique_ptr<Daemon> daemon);
  const std::unique_ptr<Daemon> daemon_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_DAEMON_H_
