#include <pthread.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/text.h"
#include "base/version.h"
#include "coordinator/service.h"
#include "storage/sqlite_store.h"

namespace kvsweep {
namespace {

constexpr char kDescription[] =
    "Queue, leases and results store of kvsweep. Workers dial in and ask for work; people submit "
    "and watch with "
    "`kvsweep`. Everything is in one store file: stop it at any time and start it again.";

constexpr char kExample[] =
    "\nExample:\n"
    "  kvsweep-coordinator --store results.db &\n"
    "  kvsweep-worker --coordinator 127.0.0.1:7470 --models models &\n"
    "  kvsweep submit --coordinator 127.0.0.1:7470 experiments/specs/quickstart.yaml\n"
    "\n"
    "The first line on stdout is the address, so that --listen 127.0.0.1:0 can be used in "
    "scripts.\n";

// As of cli/exit_code.h: wrong flags.
constexpr int kExitUsage = 2;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "kvsweep-coordinator: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? kExitUsage : 1;
}

struct Flags {
  std::vector<std::string> listen = {"127.0.0.1:7470"};
  std::string store = "kvsweep.db";
  std::string lease = "15s";
  std::string log_level = "info";
};

int Serve(const Flags& flags) {
  const absl::StatusOr<LogLevel> level = ParseLogLevel(flags.log_level);
  if (!level.ok()) return Fail(level.status());
  SetLog("kvsweep-coordinator", *level);
  const absl::StatusOr<int64_t> lease_ns = ParseDurationNs(flags.lease);
  if (!lease_ns.ok() || *lease_ns < kNsPerSecond / 2) {
    return Fail(absl::InvalidArgumentError("--lease " + flags.lease +
                                           ": a duration of at least 500ms, such as 15s"));
  }

  // Blocked before any thread starts, so that all inherit it and only sigwait below takes them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  // Before the store: a start that fails for its address leaves no new file behind.
  for (const std::string& address : flags.listen) {
    const absl::Status status = CheckAddressIsFree(address);
    if (!status.ok()) return Fail(status);
  }
  absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(flags.store);
  if (!store.ok()) {
    // Not the flags' fault, whatever the store calls it.
    return Fail(absl::UnavailableError(store.status().message()));
  }
  CoordinatorOptions options;
  options.store = *std::move(store);
  options.store_path = flags.store;
  options.listen = flags.listen;
  // A short lease shortens what leads up to it: silence is shown after a fifth of it, as 3 s of 15
  // s.
  options.scheduler.lease.lease_ns = *lease_ns;
  options.scheduler.lease.lost_after_ns = std::min(3 * kNsPerSecond, *lease_ns / 5);
  options.scheduler.lease.reconnect_ns = std::min(2 * kNsPerSecond, *lease_ns / 2);
  absl::StatusOr<std::unique_ptr<Coordinator>> coordinator =
      Coordinator::Start(std::move(options), RealClock::Get());
  if (!coordinator.ok()) return Fail(coordinator.status());
  for (const std::string& address : (*coordinator)->addresses()) {
    std::printf("%s\n", address.c_str());
  }
  std::fflush(stdout);
  LogInfo("store ", flags.store, ", lease ", FormatDurationNs(*lease_ns));

  int signal_number = 0;
  sigwait(&signals, &signal_number);
  LogInfo("stopping; workers go on with what they run");
  (*coordinator)->Shutdown();
  return 0;
}

int Main(int argc, char** argv) {
  // gRPC reads it when it starts. What goes wrong is said once, in our words, unless somebody asks
  // for gRPC's too.
  setenv("GRPC_VERBOSITY", "NONE", /*replace=*/0);
  CLI::App app(kDescription, "kvsweep-coordinator");
  Flags flags;
  app.footer(kExample);
  app.set_version_flag("--version",
                       std::string(GetBuildInfo().version) + " (" + GetBuildInfo().commit + ")");
  app.add_option("--listen", flags.listen,
                 "Where to listen: HOST:PORT on loopback (port 0: any free one), or unix:PATH; may "
                 "be repeated")
      ->capture_default_str();
  app.add_option("--store", flags.store, "Store file; made if missing")->capture_default_str();
  app.add_option("--lease", flags.lease, "How long a silent worker keeps its round")
      ->capture_default_str();
  app.add_option("--log-level", flags.log_level, "debug, info, warning, error or off")
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  return Serve(flags);
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) { return kvsweep::Main(argc, argv); }
