#ifndef KVSWEEP_CLI_LOCAL_CLUSTER_H_
#define KVSWEEP_CLI_LOCAL_CLUSTER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "cli/control_client.h"
#include "cli/interrupt.h"
#include "coordinator/service.h"
#include "worker/daemon.h"

namespace kvsweep {

struct LocalWorkerOptions {
  std::string runner_path;
  uint32_t threads = 0;  // CPU threads of the runner; 0: the runner decides
  std::vector<std::string> model_folders;
  std::string cache_folder;
};

// $XDG_CACHE_HOME/kvsweep, ~/.cache/kvsweep, or a folder in /tmp.
std::string DefaultCacheFolder();

// A coordinator and a worker with one slot inside this process, over a channel without sockets: the
// code that also runs across hosts. The runner is a child process; everything else stands in the
// store file.
class LocalCluster {
 public:
  // Opens (or makes) the store and takes up what is unfinished in it. All errors are kUnavailable.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(const std::string& store_path,
                                                             Clock& clock);

  // As Stop.
  ~LocalCluster();

  // Starts the worker and waits until its runner is ready. Returns what it runs on, for people.
  // Unavailable if the runner cannot be started, Cancelled after a signal.
  absl::StatusOr<std::string> StartWorker(const LocalWorkerOptions& options,
                                          const Interrupt& interrupt);

  ControlClient& client() { return *client_; }

  // Kills the runner, ends the coordinator and closes the store. What was running waits in the
  // store for the next start.
  void Stop();

 private:
  explicit LocalCluster(Clock& clock) : clock_(clock) {}

  Clock& clock_;
  std::unique_ptr<Coordinator> coordinator_;
  std::unique_ptr<ControlClient> client_;
  std::unique_ptr<Worker> worker_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_LOCAL_CLUSTER_H_
