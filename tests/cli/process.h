#ifndef KVSWEEP_TESTS_CLI_PROCESS_H_
#define KVSWEEP_TESTS_CLI_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "base/file.h"

namespace kvsweep {

// How a program ended.
struct ProcessResult {
  int exit_code = -1;  // 128 + the signal that killed it
  std::string out;
  std::string err;
};

// A program of the build (by name) that runs beside the test; its output goes to files. Killed, if
// it still runs, with the object.
class Process {
 public:
  Process(const std::string& program, const std::vector<std::string>& arguments);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void Signal(int signal);

  // Its process id. REQUIRES: Wait has not been called.
  pid_t pid() const { return pid_; }

  // Waits for its end.
  ProcessResult Wait();

  // What it has written to stdout so far.
  std::string Out() const;

  // What it has written to stderr so far.
  std::string Err() const;

 private:
  TempDir folder_;
  pid_t pid_ = 0;  // 0: it has been waited for
};

// Runs a program of the build to its end.
ProcessResult RunProgram(const std::string& program, const std::vector<std::string>& arguments);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_CLI_PROCESS_H_
