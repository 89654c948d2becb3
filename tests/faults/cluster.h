#ifndef KVSWEEP_TESTS_FAULTS_CLUSTER_H_
#define KVSWEEP_TESTS_FAULTS_CLUSTER_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/file.h"
#include "tests/cli/process.h"
#include "tests/faults/store_file.h"

namespace kvsweep {

// What a person does, told as it happens: a line on stdout with the seconds since the test began.
void Tell(absl::string_view text);

// Looks every few milliseconds until `condition` holds; false after `seconds`.
bool Eventually(const std::function<bool()>& condition, int64_t seconds = 240);

void Pause(int64_t duration_ns);

// False for one that has gone or waits for its parent to hear of its end.
bool ProcessIsAlive(pid_t process);

// A coordinator and workers as real processes on one machine, in a folder of its own, over a unix
// socket, and `kvsweep` as a person would call it. All processes that still run are killed with the
// object.
class Cluster {
 public:
  // Starts the coordinator alone. `lease` as its flag.
  explicit Cluster(std::string lease = "15s");

  // Starts `kvsweep-coordinator` on the same store, or the worker of that name; waits until the
  // coordinator listens.
  void StartCoordinator();
  void StartWorker(const std::string& id);

  // kill -9, and the process is gone when this returns.
  void KillCoordinator();
  void KillWorker(const std::string& id);

  // SIGSTOP and SIGCONT to the worker; its runner goes on.
  void Freeze(const std::string& id);
  void Thaw(const std::string& id);

  // The process of the worker's runner; 0 while it has none.
  pid_t RunnerOf(const std::string& id) const;

  // Where the coordinator listens.
  const std::string& address() const { return address_; }

  // Runs `kvsweep ARGUMENTS --coordinator ...` to its end.
  ProcessResult Kvsweep(std::vector<std::string> arguments) const;

  // `kvsweep submit`; the experiment's number.
  int64_t Submit(std::vector<std::string> more = {}) const;

  // `kvsweep watch`, running beside.
  std::unique_ptr<Process> Watch(int64_t experiment) const;

  // Whether the store tells that every round of the experiment has ended; Finishes waits for it.
  bool IsFinished(int64_t experiment) const;
  bool Finishes(int64_t experiment) const;

  // The attempt that the worker holds with at least one record stored and not yet all; 0: none.
  int64_t RunningAttempt(const std::string& id) const;

  // State of an attempt: "open", "accepted", "void".
  std::string StateOf(int64_t attempt) const;

  const StoreFile& store() const { return store_; }

 private:
  const TempDir folder_;
  const std::string lease_;
  const std::string address_;
  const StoreFile store_;
  std::unique_ptr<Process> coordinator_;
  std::map<std::string, std::unique_ptr<Process>> workers_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_FAULTS_CLUSTER_H_
