#include "tests/cli/process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace kvsweep {
namespace {

constexpr int64_t kOutputBytes = 64 << 20;

std::string ReadAll(const std::string& path) {
  const auto text = ReadFile(path, kOutputBytes);
  KVSWEEP_CHECK_OK(text);
  return *text;
}

}  // namespace

Process::Process(const std::string& program, const std::vector<std::string>& arguments) {
  const std::string path = absl::StrCat(KVSWEEP_BIN_DIR, "/", program);
  std::vector<char*> argv = {const_cast<char*>(path.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, folder_.Join("out").c_str(), O_WRONLY | O_CREAT,
                                   0600);
  posix_spawn_file_actions_addopen(&actions, 2, folder_.Join("err").c_str(), O_WRONLY | O_CREAT,
                                   0600);
  const int error = posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  KVSWEEP_CHECK_EQ(error, 0);
}

Process::~Process() {
  if (pid_ == 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

void Process::Signal(int signal) { KVSWEEP_CHECK_EQ(kill(pid_, signal), 0); }

ProcessResult Process::Wait() {
  int status = 0;
  KVSWEEP_CHECK_EQ(waitpid(pid_, &status, 0), pid_);
  pid_ = 0;
  return {.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
          .out = ReadAll(folder_.Join("out")),
          .err = ReadAll(folder_.Join("err"))};
}

std::string Process::Out() const { return ReadAll(folder_.Join("out")); }

std::string Process::Err() const { return ReadAll(folder_.Join("err")); }

ProcessResult RunProgram(const std::string& program, const std::vector<std::string>& arguments) {
  return Process(program, arguments).Wait();
}

}  // namespace kvsweep
