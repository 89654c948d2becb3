// A small real runner for the tests of processes: speaks runner.proto and does what the trial's arm
// is named for.
//
//   rows-N        N request rows, outcome ok, done              (any other name: 3 rows)
//   slow-N        the same, waiting 10 ms before each row; obeys a cancellation
//   die-once      kills itself after one row in its first execution, then as rows-3
//   die           kills itself after one row, always
//   exit-7        exits with code 7
//   hang          never answers
//   flood         rows without end, until cancelled
//   child         leaves a child of its own behind, writes its process id to $KVSWEEP_FAKE_CHILD,
//   then dies garbage       a frame longer than allowed wrong-trial   a record of another trial
//   facts         one row whose evidence is the model path and the files it was handed
//
// $KVSWEEP_FAKE_START: exit (with code 9 and a line on stderr, before hello), usage (the same with
// code 109, CLI11's for a flag it does not know), silent (never says hello).
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "proto/runner.pb.h"
#include "worker/frames.h"

namespace kvsweep {
namespace {

class FakeRunner {
 public:
  void Serve() {
    FromRunner hello;
    hello.mutable_hello()->set_backend("cpu");
    hello.mutable_hello()->set_device("fake");
    hello.mutable_hello()->set_device_class("fake-cpu");
    hello.mutable_hello()->set_device_memory_bytes(1 << 30);
    hello.mutable_hello()->set_runner_build("fake-build");
    hello.mutable_hello()->set_method_version(1);
    Send(hello);
    ToRunner frame;
    while (reader_.Read(&frame).value_or(FrameReader::Result::kEnd) ==
           FrameReader::Result::kFrame) {
      if (frame.has_shutdown()) return;
      if (frame.has_run()) Run(frame.run());
    }
  }

 private:
  static void Send(const FromRunner& frame) {
    if (!WriteFrame(kRunnerSocket, frame).ok()) std::exit(1);
  }

  [[noreturn]] static void Hang() {
    while (true) pause();
  }

  void SendRow(uint64_t trial, uint32_t index) {
    FromRunner frame;
    Record* record = frame.mutable_records()->add_records();
    record->set_trial_id(trial);
    record->mutable_request()->set_index(index);
    Send(frame);
  }

  void End(uint64_t trial, Outcome outcome, const std::string& evidence) {
    FromRunner frame;
    Record* record = frame.mutable_records()->add_records();
    record->set_trial_id(trial);
    record->mutable_outcome()->set_outcome(outcome);
    record->mutable_outcome()->set_evidence(evidence);
    Send(frame);
    frame.mutable_done()->set_trial_id(trial);
    Send(frame);
  }

  // Waits so long for a cancellation.
  bool Cancelled(int patience_ms) {
    pollfd descriptor = {kRunnerSocket, POLLIN, 0};
    if (poll(&descriptor, 1, patience_ms) <= 0) return false;
    ToRunner frame;
    const auto result = reader_.Read(&frame);
    if (!result.ok() || *result == FrameReader::Result::kEnd) std::exit(0);
    return frame.has_cancel();
  }

  void Progress(uint64_t trial, const std::string& phase) {
    FromRunner frame;
    frame.mutable_progress()->set_trial_id(trial);
    frame.mutable_progress()->set_phase(phase);
    Send(frame);
  }

  void Run(const RunTrial& run) {
    const uint64_t trial = run.trial_id();
    const std::string& name = run.spec().arm().name();
    Progress(trial, "measure");
    if (name == "hang") Hang();
    if (name == "exit-7") std::exit(7);
    if (name == "die" || name == "child" || (name == "die-once" && run.execution() == 1)) {
      SendRow(trial, 0);
      if (name == "child") LeaveChild();
      std::fprintf(stderr, "about to die in execution %u\n", run.execution());
      raise(SIGKILL);
    }
    if (name == "garbage") {
      send(kRunnerSocket, "\xff\xff\xff\xff", 4, 0);
      Hang();
    }
    const bool slow = absl::StartsWith(name, "slow-");
    uint32_t rows = 0;
    if (!absl::SimpleAtoi(absl::StripPrefix(absl::StripPrefix(name, "rows-"), "slow-"), &rows))
      rows = 3;
    if (name == "flood") rows = 0xffffffffu;
    for (uint32_t i = 0; i < rows; ++i) {
      if ((slow || i % 64 == 0) && Cancelled(slow ? 10 : 0)) {
        End(trial, OUTCOME_CANCELLED, "cancelled");
        return;
      }
      SendRow(name == "wrong-trial" ? trial + 1 : trial, i);
    }
    End(trial, OUTCOME_OK, name == "facts" ? Facts(run) : "as asked");
  }

  // Something that outlives its parent unless the whole group is killed; it holds socket and pipe
  // open.
  static void LeaveChild() {
    const pid_t child = fork();
    if (child == 0) Hang();
    if (std::FILE* file = std::fopen(std::getenv("KVSWEEP_FAKE_CHILD"), "w")) {
      std::fprintf(file, "%d", child);
      std::fclose(file);
    }
  }

  static std::string Facts(const RunTrial& run) {
    std::string facts = absl::StrCat("model ", run.model_path());
    for (const auto& [path, local] : run.file_paths())
      absl::StrAppend(&facts, "; ", path, " at ", local);
    return facts;
  }

  FrameReader reader_{kRunnerSocket};
};

}  // namespace
}  // namespace kvsweep

int main() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const char* start = std::getenv("KVSWEEP_FAKE_START");
  if (start != nullptr && std::string(start) == "exit") {
    std::fprintf(stderr, "no device\n");
    return 9;
  }
  if (start != nullptr && std::string(start) == "usage") {
    std::fprintf(stderr, "unknown flag\n");
    return 109;
  }
  if (start != nullptr && std::string(start) == "silent") {
    while (true) pause();
  }
  kvsweep::FakeRunner().Serve();
  return 0;
}
