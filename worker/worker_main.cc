#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/version.h"
#include "worker/daemon.h"
#include "worker/runner_choice.h"

namespace kvsweep {
namespace {

constexpr char kDescription[] =
    R"(The daemon on each GPU machine: dials the coordinator, runs rounds on its slots, relays measurements.

It opens no port. Each slot has one runner process and runs one round at a time. SIGTERM (or Ctrl-C) once: finish
and settle the rounds that run, take no new one, end. Twice: end at once.)";

constexpr char kExample[] =
    R"(Example: two slots of one core each, models in /srv/models, coordinator on this machine
  kvsweep-worker --coordinator 127.0.0.1:7470 --models /srv/models --slots 2 --threads 1

Example: two unequal slots, models in a Hugging Face cache
  kvsweep-worker --slot "--threads 2" --slot "--threads 6" --models ~/.cache/huggingface/hub)";

// As of cli/exit_code.h: wrong flags.
constexpr int kExitUsage = 2;

struct Flags {
  std::string coordinator = "127.0.0.1:7470";
  std::string id;
  std::string machine;
  std::vector<std::string> labels;
  uint32_t slots = 1;
  std::vector<std::string> slot_arguments;
  uint32_t threads = 0;
  std::vector<std::string> models;
  std::string cache;
  std::string runner;
  std::string log_level = "info";
};

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "localhost";
}

std::string DefaultCache() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME")) return absl::StrCat(cache, "/kvsweep");
  if (const char* home = std::getenv("HOME")) return absl::StrCat(home, "/.cache/kvsweep");
  return "/tmp/kvsweep-cache";
}

void DefineFlags(CLI::App& app, Flags& flags) {
  app.footer(kExample);
  app.set_version_flag("--version", absl::StrCat("kvsweep-worker ", GetBuildInfo().version, " (",
                                                 GetBuildInfo().commit, ")"));
  app.add_option("--coordinator", flags.coordinator,
                 "Address: HOST:PORT on the loopback interface, or unix:PATH")
      ->capture_default_str();
  app.add_option("--id", flags.id, "Stable name of this worker; by default the machine's");
  app.add_option("--machine", flags.machine,
                 "Name of the machine, if several workers share it; by default the host's name");
  app.add_option("--label", flags.labels, "NAME=VALUE, shown in listings; repeatable");
  app.add_option("--slots", flags.slots, "Number of equal slots")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option(
      "--slot", flags.slot_arguments,
      "Arguments of one slot's runner, in one string; repeat for each slot, instead of --slots");
  app.add_option("--threads", flags.threads, "CPU threads of each slot; 0: the runner decides")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--models", flags.models,
                 "Folder of model folders, a model folder, or a Hugging Face cache; repeatable");
  app.add_option("--cache", flags.cache,
                 "Folder for fetched files and digests; by default ~/.cache/kvsweep");
  app.add_option("--runner", flags.runner,
                 "The runner program; by default the one beside this program that fits the "
                 "machine: kvsweep-runner-cuda where there is a device, else kvsweep-runner");
  app.add_option("--log-level", flags.log_level, "debug, info, warning, error or off")
      ->capture_default_str();
}

absl::StatusOr<WorkerOptions> OptionsFrom(const Flags& flags) {
  WorkerOptions options;
  options.machine = flags.machine.empty() ? HostName() : flags.machine;
  options.worker_id = flags.id.empty() ? options.machine : flags.id;
  options.model_folders = flags.models;
  options.cache_folder = flags.cache.empty() ? DefaultCache() : flags.cache;
  for (const std::string& label : flags.labels) {
    const std::vector<std::string> parts = absl::StrSplit(label, absl::MaxSplits('=', 1));
    if (parts.size() != 2 || parts[0].empty()) {
      return absl::InvalidArgumentError(absl::StrCat("--label ", label, ": write NAME=VALUE"));
    }
    options.labels[parts[0]] = parts[1];
  }
  for (const std::string& folder : flags.models) {
    std::error_code ignored;
    if (!std::filesystem::is_directory(folder, ignored)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--models ", folder,
          ": no such folder; name a folder of model folders, a model folder or a Hugging Face "
          "cache, or leave it out"));
    }
  }
  options.end_on_runner_usage = true;
  RunnerCommand command{.path = flags.runner};
  if (command.path.empty()) {
    const RunnerChoice choice = ChooseRunner(ProgramFolder(), RealClock::Get());
    LogInfo("runner: ", choice.reason);
    command.path = choice.path;
  }
  if (access(command.path.c_str(), X_OK) != 0) {
    return absl::NotFoundError(
        absl::StrCat(command.path, " is not a program; name the runner with --runner"));
  }
  command.arguments = {"--cache", options.cache_folder};
  if (flags.threads > 0) {
    command.arguments.insert(command.arguments.end(), {"--threads", absl::StrCat(flags.threads)});
  }
  const std::vector<std::string> slots =
      flags.slot_arguments.empty() ? std::vector<std::string>(flags.slots) : flags.slot_arguments;
  for (const std::string& arguments : slots) {
    RunnerCommand& runner = options.runners.emplace_back(command);
    for (absl::string_view argument :
         absl::StrSplit(arguments, absl::ByAnyChar(" \t"), absl::SkipEmpty())) {
      runner.arguments.emplace_back(argument);
    }
  }
  return options;
}

// Hands signals to the worker until the worker has ended. SIGINT and SIGTERM are blocked in every
// thread and taken here, so that no code runs inside a signal handler.
absl::Status Serve(Worker& worker, const sigset_t& signals) {
  std::atomic<bool> done = false;
  std::thread listener([&] {
    int signal = 0;
    while (sigwait(&signals, &signal) == 0 && !done) {
      LogInfo("signal ", signal, ": the worker stops; once more to stop at once");
      worker.Shutdown();
    }
  });
  const absl::Status status = worker.WaitUntilDone();
  done = true;
  pthread_kill(listener.native_handle(), SIGTERM);
  listener.join();
  return status;
}

absl::Status Run(const Flags& flags) {
  // Before gRPC or anything else starts a thread: all inherit it.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  absl::StatusOr<LogLevel> level = ParseLogLevel(flags.log_level);
  if (!level.ok()) return level.status();
  SetLog("kvsweep-worker", *level);
  absl::StatusOr<WorkerOptions> options = OptionsFrom(flags);
  if (!options.ok()) return options.status();
  auto channel = DialCoordinator(flags.coordinator);
  if (!channel.ok()) return channel.status();

  absl::StatusOr<std::unique_ptr<Worker>> worker =
      Worker::Start(*options, *std::move(channel), RealClock::Get());
  if (!worker.ok()) return worker.status();
  LogInfo("worker ", options->worker_id, ", ", options->runners.size(), " slots, coordinator ",
          flags.coordinator);
  return Serve(**worker, signals);
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) {
  kvsweep::Flags flags;
  CLI::App app(kvsweep::kDescription, "kvsweep-worker");
  kvsweep::DefineFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kvsweep::kExitUsage;
  }
  const absl::Status status = kvsweep::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "kvsweep-worker: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? kvsweep::kExitUsage : 1;
}
