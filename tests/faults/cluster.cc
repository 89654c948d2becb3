#include "tests/faults/cluster.h"

#include <signal.h>

#include <cstdio>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/check.h"

namespace kvsweep {
namespace {

constexpr char kSpec[] = "experiments/specs/cluster-modelled.yaml";

// The name and the parent of a process, from /proc; parent 0 if it has gone.
struct ProcessStatus {
  std::string name;
  pid_t parent = 0;
};

ProcessStatus StatusOf(const std::string& folder) {
  ProcessStatus status;
  const absl::StatusOr<std::string> text = ReadFile(folder + "/status", 1 << 20);
  if (!text.ok()) return status;
  for (absl::string_view line : absl::StrSplit(*text, '\n')) {
    const std::vector<absl::string_view> field = absl::StrSplit(line, absl::MaxSplits(':', 1));
    if (field.size() != 2) continue;
    const absl::string_view value = absl::StripAsciiWhitespace(field[1]);
    if (field[0] == "Name") status.name = std::string(value);
    if (field[0] == "PPid") (void)absl::SimpleAtoi(value, &status.parent);
    if (field[0] == "State" && absl::StartsWith(value, "Z")) return {};
  }
  return status;
}

void KillAndReap(std::unique_ptr<Process>& process) {
  KVSWEEP_CHECK(process != nullptr);
  process.reset();  // kills and waits
}

}  // namespace

void Tell(absl::string_view text) {
  static const int64_t start_ns = RealClock::Get().NowNs();
  std::printf("  %7.2f s  %s\n",
              static_cast<double>(RealClock::Get().NowNs() - start_ns) / kNsPerSecond,
              std::string(text).c_str());
  std::fflush(stdout);
}

void Pause(int64_t duration_ns) {
  RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + duration_ns);
}

bool Eventually(const std::function<bool()>& condition, int64_t seconds) {
  const int64_t deadline_ns = RealClock::Get().NowNs() + seconds * kNsPerSecond;
  while (!condition()) {
    if (RealClock::Get().NowNs() > deadline_ns) return false;
    Pause(5 * kNsPerMs);
  }
  return true;
}

bool ProcessIsAlive(pid_t process) {
  return !StatusOf(absl::StrCat("/proc/", process)).name.empty();
}

Cluster::Cluster(std::string lease)
    : lease_(std::move(lease)),
      address_(absl::StrCat("unix:", folder_.Join("socket"))),
      store_(folder_.Join("store.db")) {
  StartCoordinator();
}

void Cluster::StartCoordinator() {
  coordinator_ = std::make_unique<Process>(
      "kvsweep-coordinator", std::vector<std::string>{"--store", folder_.Join("store.db"),
                                                      "--listen", address_, "--lease", lease_});
  KVSWEEP_CHECK(Eventually([&] { return absl::StrContains(coordinator_->Out(), "\n"); }, 60))
      << coordinator_->Err();
}

void Cluster::StartWorker(const std::string& id) {
  workers_[id] = std::make_unique<Process>(
      "kvsweep-worker", std::vector<std::string>{"--coordinator", address_, "--id", id, "--cache",
                                                 folder_.Join("cache-" + id), "--threads", "1"});
}

void Cluster::KillCoordinator() { KillAndReap(coordinator_); }
void Cluster::KillWorker(const std::string& id) { KillAndReap(workers_.at(id)); }
void Cluster::Freeze(const std::string& id) { workers_.at(id)->Signal(SIGSTOP); }
void Cluster::Thaw(const std::string& id) { workers_.at(id)->Signal(SIGCONT); }

pid_t Cluster::RunnerOf(const std::string& id) const {
  const pid_t worker = workers_.at(id)->pid();
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    pid_t pid = 0;
    if (!absl::SimpleAtoi(entry.path().filename().string(), &pid)) continue;
    const ProcessStatus status = StatusOf(entry.path().string());
    if (status.parent == worker && status.name == "kvsweep-runner") return pid;
  }
  return 0;
}

ProcessResult Cluster::Kvsweep(std::vector<std::string> arguments) const {
  arguments.insert(arguments.end(), {"--coordinator", address_});
  return RunProgram("kvsweep", arguments);
}

int64_t Cluster::Submit(std::vector<std::string> more) const {
  // Trials of some tenths of a second, so that there is a middle to strike in.
  std::vector<std::string> arguments = {"submit", kSpec,      "-S", "load.arrivals.requests=160",
                                        "-S",     "repeats=2"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  const ProcessResult result = Kvsweep(arguments);
  int64_t experiment = 0;
  KVSWEEP_CHECK(result.exit_code == 0 &&
                absl::SimpleAtoi(absl::StripAsciiWhitespace(result.out), &experiment))
      << result.err;
  return experiment;
}

std::unique_ptr<Process> Cluster::Watch(int64_t experiment) const {
  return std::make_unique<Process>(
      "kvsweep",
      std::vector<std::string>{"watch", absl::StrCat(experiment), "--coordinator", address_});
}

bool Cluster::IsFinished(int64_t experiment) const {
  return store_.Number(absl::StrCat("SELECT count(*) FROM v_rounds WHERE experiment_id = ",
                                    experiment, " AND state IN ('queued', 'running')")) == 0;
}

bool Cluster::Finishes(int64_t experiment) const {
  return Eventually([&] { return IsFinished(experiment); });
}

int64_t Cluster::RunningAttempt(const std::string& id) const {
  return store_.Number(
      absl::StrCat("SELECT attempt FROM v_attempts WHERE state = 'open' AND records > 0 AND "
                   "NOT finished AND worker_id = '",
                   id, "'"));
}

std::string Cluster::StateOf(int64_t attempt) const {
  const std::vector<std::string> rows =
      store_.Rows(absl::StrCat("SELECT state FROM v_attempts WHERE attempt = ", attempt));
  return rows.empty() ? "unknown" : rows[0];
}

}  // namespace kvsweep
