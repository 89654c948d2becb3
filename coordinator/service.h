#ifndef KVSWEEP_COORDINATOR_SERVICE_H_
#define KVSWEEP_COORDINATOR_SERVICE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/limits.h"
#include "coordinator/scheduler.h"
#include "storage/store.h"

namespace grpc {
class Channel;
}

namespace kvsweep {

struct CoordinatorOptions {
  std::unique_ptr<Store> store;
  std::string store_path;  // of the same store, for readers; empty: people's questions are refused
  std::vector<std::string>
      listen;  // "127.0.0.1:7470", "[::1]:0", "unix:/run/kvsweep"; may be empty
  SchedulerOptions scheduler;
  uint64_t queued_trials = limits::kQueuedTrials;  // not done, of all experiments together
  bool check_invariants = false;                   // after every turn; for tests
};

// The coordinator, in this process: queue, leases and results store behind the two gRPC services of
// worker.proto and control.proto. `kvsweep-coordinator` is this and flags; `kvsweep run` embeds it
// without listening and talks to it through InProcessChannel, the same code as across hosts.
//
// Threads: gRPC's, which never wait here; one for all decisions and writes
// (coordinator/dispatcher.h); a few for questions and for expanding experiments, each with its own
// reader of the store.
class Coordinator {
 public:
  // Takes up what the store left unfinished and serves from then on. InvalidArgument for an address
  // that is not loopback or a unix socket (CheckListenAddress), Unavailable for one that cannot be
  // had. `clock` must outlive it.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Start(CoordinatorOptions options,
                                                            Clock& clock);

  // As Shutdown.
  ~Coordinator();
  Coordinator(const Coordinator&) = delete;
  Coordinator& operator=(const Coordinator&) = delete;

  // A channel to this coordinator without any socket. Must not be used after Shutdown.
  std::shared_ptr<grpc::Channel> InProcessChannel();

  // Where it listens, ports filled in, in the order of the options.
  const std::vector<std::string>& addresses() const;

  // Ends calls, answers what was taken, and stops. Leases stay in the store: workers go on, and a
  // coordinator started later on the same store takes them up. Idempotent.
  void Shutdown();

 private:
  class Impl;
  explicit Coordinator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// OK for loopback addresses with a port and for unix sockets. Until calls are authenticated and
// encrypted, everything else is InvalidArgument, with the reason.
absl::Status CheckListenAddress(absl::string_view address);

// The same, and Unavailable where another program listens on that port now. Unix sockets are not
// tried.
absl::Status CheckAddressIsFree(const std::string& address);

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_SERVICE_H_
