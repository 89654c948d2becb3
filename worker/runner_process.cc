#include "worker/runner_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"

extern char** environ;

namespace kvsweep {
namespace {

constexpr size_t kLogTailBytes = 8 * 1024;
constexpr size_t kLogLineBytes = 1024;
constexpr int kSendPatienceMs = 5'000;  // a runner reads its socket all the time
constexpr size_t kFramesPerTurn = 64;   // a flood must not keep us from the other descriptors

// From closing its socket, or being asked to stop, until it is killed; and from that until it is
// given up.
constexpr int64_t kCloseToExitNs = 2 * kNsPerSecond;
constexpr int64_t kKillToExitNs = 5 * kNsPerSecond;

// A duplicate above the descriptors that the child is given (0 to 3), so that giving one never
// closes another.
absl::StatusOr<int> MoveUp(int fd) {
  const int moved = fcntl(fd, F_DUPFD_CLOEXEC, kRunnerSocket + 1);
  const int error = errno;
  close(fd);
  if (moved < 0) return absl::ErrnoToStatus(error, "cannot duplicate a descriptor");
  return moved;
}

// Pointers to the strings, with the null at the end that exec wants. The strings must outlive them.
std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& text : strings) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

int TimeoutMs(int64_t deadline_ns) {
  if (deadline_ns == kNeverNs) return -1;
  const int64_t left_ns = deadline_ns - RealClock::Get().NowNs();
  return left_ns <= 0 ? 0 : static_cast<int>(left_ns / kNsPerMs + 1);
}

}  // namespace

RunnerProcess::Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<std::unique_ptr<RunnerProcess>> RunnerProcess::Start(const RunnerCommand& command,
                                                                    RunnerEvents events) {
  std::unique_ptr<RunnerProcess> process(new RunnerProcess());
  process->events_ = std::move(events);
  RETURN_IF_ERROR(Annotate(process->Spawn(command), command.path));
  process->reader_ = std::make_unique<FrameReader>(process->socket_.get());
  process->thread_ = std::thread([self = process.get()] { self->Follow(); });
  return process;
}

absl::Status RunnerProcess::Spawn(const RunnerCommand& command) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    return absl::ErrnoToStatus(errno, "cannot make a socket pair");
  }
  socket_ = Descriptor(pair[0]);
  ASSIGN_OR_RETURN(const int child_socket, MoveUp(pair[1]));
  const Descriptor socket_closer(child_socket);
  int pipe_ends[2];
  if (pipe2(pipe_ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "cannot make a pipe");
  log_ = Descriptor(pipe_ends[0]);
  ASSIGN_OR_RETURN(const int child_log, MoveUp(pipe_ends[1]));
  const Descriptor log_closer(child_log);
  fcntl(log_.get(), F_SETFL, O_NONBLOCK);
  stopping_ = Descriptor(eventfd(0, EFD_CLOEXEC));
  if (stopping_.get() < 0) return absl::ErrnoToStatus(errno, "cannot make an event descriptor");

  posix_spawn_file_actions_t actions;
  KVSWEEP_CHECK_EQ(posix_spawn_file_actions_init(&actions), 0);
  const absl::Cleanup destroy_actions = [&] { posix_spawn_file_actions_destroy(&actions); };
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, child_log, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, child_log, STDERR_FILENO);
  posix_spawn_file_actions_adddup2(&actions, child_socket, kRunnerSocket);

  posix_spawnattr_t attributes;
  KVSWEEP_CHECK_EQ(posix_spawnattr_init(&attributes), 0);
  const absl::Cleanup destroy_attributes = [&] { posix_spawnattr_destroy(&attributes); };
  // The child starts with no signal blocked or ignored, whatever the calling thread does.
  sigset_t none;
  sigset_t all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);

  std::vector<std::string> arguments = {command.path, "--fd", absl::StrCat(kRunnerSocket)};
  arguments.insert(arguments.end(), command.arguments.begin(), command.arguments.end());
  // Of two entries for a name the first counts.
  std::vector<std::string> environment = command.environment;
  for (char** entry = environ; *entry != nullptr; ++entry) environment.emplace_back(*entry);
  const int error = posix_spawn(&pid_, command.path.c_str(), &actions, &attributes,
                                Pointers(arguments).data(), Pointers(environment).data());
  if (error != 0) return absl::ErrnoToStatus(error, "cannot start");
  // glibc 2.36 declares pidfd_open without C linkage.
  exited_ = Descriptor(static_cast<int>(syscall(SYS_pidfd_open, pid_, 0)));
  if (exited_.get() < 0) {
    const int pidfd_error = errno;
    Kill();
    Reap();
    return absl::ErrnoToStatus(pidfd_error, "cannot watch a child (Linux 5.3 or later is needed)");
  }
  return absl::OkStatus();
}

RunnerProcess::~RunnerProcess() {
  if (!thread_.joinable()) return;
  Stop();
  thread_.join();
}

void RunnerProcess::Stop() {
  ToRunner frame;
  frame.mutable_shutdown();
  const std::lock_guard<std::mutex> lock(send_mutex_);
  // It may have gone, or not read: then it is killed.
  (void)WriteFrame(socket_.get(), frame, 0);
  shutdown(socket_.get(), SHUT_WR);
  eventfd_write(stopping_.get(), 1);
}

absl::Status RunnerProcess::Send(const ToRunner& frame) {
  const std::lock_guard<std::mutex> lock(send_mutex_);
  return WriteFrame(socket_.get(), frame, kSendPatienceMs);
}

void RunnerProcess::Kill() {
  const std::lock_guard<std::mutex> lock(reap_mutex_);
  if (!reaped_) kill(-pid_, SIGKILL);
}

// The life of the process, on its own thread.
void RunnerProcess::Follow() {
  enum { kExited, kSocket, kLog, kStopping };
  pollfd descriptors[] = {{exited_.get(), POLLIN, 0},
                          {socket_.get(), POLLIN, 0},
                          {log_.get(), POLLIN, 0},
                          {stopping_.get(), POLLIN, 0}};
  int64_t kill_at_ns = kNeverNs;
  int64_t give_up_at_ns = kNeverNs;
  while (true) {
    if (poll(descriptors, 4, TimeoutMs(std::min(kill_at_ns, give_up_at_ns))) < 0) continue;
    if (descriptors[kExited].revents != 0) break;
    const int64_t now_ns = RealClock::Get().NowNs();
    if (now_ns >= give_up_at_ns) return;  // not even the kernel can end it
    if (now_ns >= kill_at_ns) {
      Kill();
      kill_at_ns = kNeverNs;
    }
    if (descriptors[kLog].revents != 0 && !ReadLog()) descriptors[kLog].fd = -1;
    if (descriptors[kSocket].revents != 0 && !ReadFrames(kFramesPerTurn)) {
      // Whoever closes the socket is about to end; whoever spoils it is killed by the session.
      descriptors[kSocket].fd = -1;
      kill_at_ns = now_ns + kCloseToExitNs;
    }
    if (descriptors[kStopping].revents != 0) {
      descriptors[kStopping].fd = -1;
      kill_at_ns = now_ns + kCloseToExitNs;
      give_up_at_ns = kill_at_ns + kKillToExitNs;
    }
  }
  events_.on_exit(Reap());
}

// Delivers frames that have arrived, `most` at most. False: there will be no more.
bool RunnerProcess::ReadFrames(size_t most) {
  for (size_t i = 0; i < most && !frames_ended_; ++i) {
    FromRunner frame;
    const absl::StatusOr<FrameReader::Result> result = reader_->TryRead(&frame);
    if (!result.ok()) events_.on_malformed(result.status());
    frames_ended_ = !result.ok() || *result == FrameReader::Result::kEnd;
    if (frames_ended_ || *result == FrameReader::Result::kWait) break;
    events_.on_frame(std::move(frame));
  }
  return !frames_ended_;
}

// Takes one piece of its output. False: none is there, or will come.
bool RunnerProcess::ReadLog() {
  char buffer[4096];
  const ssize_t count = read(log_.get(), buffer, sizeof(buffer));
  if (count <= 0) return false;
  log_tail_.append(buffer, static_cast<size_t>(count));
  if (log_tail_.size() > kLogTailBytes) log_tail_.erase(0, log_tail_.size() - kLogTailBytes);
  for (ssize_t i = 0; i < count; ++i) {
    if (buffer[i] == '\n') {
      EndLogLine();
    } else if (log_line_.size() < kLogLineBytes) {
      log_line_.push_back(buffer[i]);
    }
  }
  return true;
}

void RunnerProcess::EndLogLine() {
  if (!log_line_.empty()) events_.on_log(log_line_);
  log_line_.clear();
}

// Ends the whole group, takes what the process left in socket and pipe, and its status.
RunnerExit RunnerProcess::Reap() {
  siginfo_t info = {};
  {
    const std::lock_guard<std::mutex> lock(reap_mutex_);
    // Before its number is given back: until then the group cannot be another's.
    kill(-pid_, SIGKILL);
    while (waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED) != 0 && errno == EINTR) {
    }
    reaped_ = true;
  }
  RunnerExit exit;
  (info.si_code == CLD_EXITED ? exit.exit_code : exit.signal) = info.si_status;
  if (reader_ == nullptr) return exit;
  // What is left fits socket and pipe buffers: their writers have been killed.
  ReadFrames(std::numeric_limits<size_t>::max());
  while (ReadLog()) {
  }
  EndLogLine();
  exit.log_tail = log_tail_;
  return exit;
}

}  // namespace kvsweep
