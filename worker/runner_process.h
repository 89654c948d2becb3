#ifndef KVSWEEP_WORKER_RUNNER_PROCESS_H_
#define KVSWEEP_WORKER_RUNNER_PROCESS_H_

#include <sys/types.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/runner.pb.h"
#include "worker/frames.h"
#include "worker/session.h"

namespace kvsweep {

struct RunnerCommand {
  std::string path;                      // of the program; no search along $PATH
  std::vector<std::string> arguments;    // after the program's name; "--fd 3" is added
  std::vector<std::string> environment;  // "NAME=value", in addition to our own
};

// What a runner does, as it happens, one call at a time, on a thread of the RunnerProcess. Frames
// come in order and before on_exit, which comes once and last. The functions must not destroy the
// process.
struct RunnerEvents {
  std::function<void(FromRunner)> on_frame;
  std::function<void(absl::Status)>
      on_malformed;  // a frame that cannot be read; none comes after it
  std::function<void(absl::string_view)> on_log;  // a line of its output, cut at 1 KiB
  std::function<void(RunnerExit)> on_exit;
};

// A runner as a child process: its end of the socket pair is descriptor 3, its output (stdout and
// stderr) comes through a pipe whose end is kept for the record of a crash. It leads a process
// group of its own, so that killing it takes what it started along. It asks the system to be killed
// when the thread that started it ends (and sees its socket close), so Start must be called on a
// thread that outlives it.
//
// Send and Kill may be called from any thread, at any time until destruction.
class RunnerProcess {
 public:
  // Starts the program (posix_spawn: no fork handlers run). Errors name the program.
  static absl::StatusOr<std::unique_ptr<RunnerProcess>> Start(const RunnerCommand& command,
                                                              RunnerEvents events);

  // Calls Stop, and waits for the end (but not for ever: a process that the kernel cannot kill is
  // left behind).
  ~RunnerProcess();
  RunnerProcess(const RunnerProcess&) = delete;
  RunnerProcess& operator=(const RunnerProcess&) = delete;

  // Sends one frame. An error means that the runner has gone or does not read: kill it.
  absl::Status Send(const ToRunner& frame);

  // Kills the runner and its process group, at once. No effect after its end.
  void Kill();

  // Asks the runner to end; it is killed if it has not within two seconds. Returns at once.
  void Stop();

  pid_t pid() const { return pid_; }

 private:
  // A descriptor that is closed with its owner.
  class Descriptor {
   public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
      std::swap(fd_, other.fd_);
      return *this;
    }
    ~Descriptor();
    int get() const { return fd_; }

   private:
    int fd_ = -1;
  };

  RunnerProcess() = default;
  absl::Status Spawn(const RunnerCommand& command);
  void Follow();
  bool ReadFrames(size_t most);
  bool ReadLog();
  void EndLogLine();
  RunnerExit Reap();

  RunnerEvents events_;
  Descriptor socket_;    // our end of the pair
  Descriptor log_;       // reading end of the output pipe
  Descriptor exited_;    // pidfd: readable once the process has ended
  Descriptor stopping_;  // eventfd: readable once Stop was called
  pid_t pid_ = 0;
  std::mutex send_mutex_;
  std::mutex reap_mutex_;
  bool reaped_ = false;  // guarded by reap_mutex_; pid_ may then belong to another process
  std::string log_tail_;
  std::string log_line_;  // unfinished
  std::unique_ptr<FrameReader> reader_;
  bool frames_ended_ = false;
  std::thread thread_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_PROCESS_H_
