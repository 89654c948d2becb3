#include "worker/runner_choice.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace kvsweep {
namespace {

constexpr int64_t kProbeLimitNs = 30'000'000'000;
constexpr size_t kMostOutput = 4096;

struct Probe {
  bool succeeded = false;
  std::string said;  // its last line
};

std::string LastLine(absl::string_view output) {
  output = absl::StripAsciiWhitespace(output);
  const size_t end = output.rfind('\n');
  return std::string(end == absl::string_view::npos ? output : output.substr(end + 1));
}

// What the child writes until it closes the pipe or the time is up.
std::string ReadUntilClosed(int fd, Clock& clock) {
  std::string output;
  const int64_t late_ns = clock.NowNs() + kProbeLimitNs;
  char buffer[512];
  while (true) {
    const int64_t left_ms = (late_ns - clock.NowNs()) / 1'000'000;
    pollfd ready{.fd = fd, .events = POLLIN};
    if (left_ms <= 0 || poll(&ready, 1, static_cast<int>(left_ms)) <= 0) break;
    const ssize_t count = read(fd, buffer, sizeof(buffer));
    if (count <= 0) break;
    const size_t room = kMostOutput - std::min(kMostOutput, output.size());
    output.append(buffer, std::min(static_cast<size_t>(count), room));
  }
  return output;
}

Probe RunProbe(const std::string& path, Clock& clock) {
  int pipe_ends[2];
  if (pipe2(pipe_ends, O_CLOEXEC) != 0) return {.said = "cannot make a pipe"};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDERR_FILENO);
  std::string program = path;
  std::string flag = "--probe";
  char* arguments[] = {program.data(), flag.data(), nullptr};
  pid_t pid = 0;
  const int error = posix_spawn(&pid, path.c_str(), &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe_ends[1]);
  Probe probe;
  if (error != 0) {
    probe.said = std::strerror(error);
  } else {
    probe.said = LastLine(ReadUntilClosed(pipe_ends[0], clock));
    // It has closed its output, so it ends or has hung: in either case it is done.
    int status = 0;
    if (waitpid(pid, &status, WNOHANG) == 0) {
      const int64_t late_ns = clock.NowNs() + kProbeLimitNs / 10;
      while (clock.NowNs() < late_ns && waitpid(pid, &status, WNOHANG) == 0) {
        clock.SleepUntilNs(clock.NowNs() + 10'000'000);
      }
      if (kill(pid, 0) == 0) {
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
      }
    }
    probe.succeeded = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  close(pipe_ends[0]);
  return probe;
}

}  // namespace

RunnerChoice ChooseRunner(const std::string& folder, Clock& clock) {
  const std::string plain = absl::StrCat(folder, "/kvsweep-runner");
  const std::string cuda = absl::StrCat(folder, "/kvsweep-runner-cuda");
  if (access(cuda.c_str(), X_OK) != 0) {
    return {plain, "kvsweep-runner: there is no kvsweep-runner-cuda beside this program"};
  }
  const Probe probe = RunProbe(cuda, clock);
  if (probe.succeeded) return {cuda, absl::StrCat("kvsweep-runner-cuda: ", probe.said)};
  return {plain, absl::StrCat("kvsweep-runner, not kvsweep-runner-cuda: ", probe.said)};
}

std::string ProgramFolder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

}  // namespace kvsweep
