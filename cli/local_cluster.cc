#include "cli/local_cluster.h"

#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "cli/source.h"
#include "storage/sqlite_store.h"

namespace kvsweep {
namespace {

// Always the same name: the next start on this store voids at once what the last one left running.
constexpr char kWorkerId[] = "local";
constexpr int64_t kStartLimitNs = 120 * kNsPerSecond;
constexpr int64_t kPollNs = 5 * kNsPerMs;

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "localhost";
}

size_t ColumnOf(const Table& table, absl::string_view name) {
  size_t column = 0;
  while (column + 1 < table.columns.size() && table.columns[column] != name) ++column;
  return column;
}

}  // namespace

std::string DefaultCacheFolder() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME")) return absl::StrCat(cache, "/kvsweep");
  if (const char* home = std::getenv("HOME")) return absl::StrCat(home, "/.cache/kvsweep");
  return "/tmp/kvsweep-cache";
}

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(const std::string& store_path,
                                                                  Clock& clock) {
  absl::StatusOr<std::unique_ptr<Store>> store = OpenSqliteStore(store_path);
  if (!store.ok()) return absl::UnavailableError(store.status().message());
  CoordinatorOptions options;
  options.store = *std::move(store);
  options.store_path = store_path;
  absl::StatusOr<std::unique_ptr<Coordinator>> coordinator =
      Coordinator::Start(std::move(options), clock);
  if (!coordinator.ok()) return absl::UnavailableError(coordinator.status().message());
  auto cluster = absl::WrapUnique(new LocalCluster(clock));
  cluster->coordinator_ = *std::move(coordinator);
  cluster->client_ =
      std::make_unique<ControlClient>(cluster->coordinator_->InProcessChannel(), "(this process)");
  return cluster;
}

LocalCluster::~LocalCluster() { Stop(); }

absl::StatusOr<std::string> LocalCluster::StartWorker(const LocalWorkerOptions& options,
                                                      const Interrupt& interrupt) {
  if (access(options.runner_path.c_str(), X_OK) != 0) {
    return absl::UnavailableError(absl::StrCat(
        options.runner_path, " is not a program; build kvsweep-runner, or name it with --runner"));
  }
  RunnerCommand runner{.path = options.runner_path, .arguments = {}, .environment = {}};
  runner.arguments = {"--cache", options.cache_folder};
  if (options.threads > 0) {
    runner.arguments.insert(runner.arguments.end(), {"--threads", absl::StrCat(options.threads)});
  }
  WorkerOptions worker;
  worker.worker_id = kWorkerId;
  worker.machine = HostName();
  worker.runners = {runner};
  worker.model_folders = options.model_folders;
  worker.cache_folder = options.cache_folder;
  absl::StatusOr<std::unique_ptr<Worker>> started =
      Worker::Start(worker, coordinator_->InProcessChannel(), clock_);
  if (!started.ok()) return absl::UnavailableError(started.status().message());
  worker_ = *std::move(started);

  const int64_t late_ns = clock_.NowNs() + kStartLimitNs;
  while (!interrupt.happened() && clock_.NowNs() < late_ns) {
    ASSIGN_OR_RETURN(const Table workers, client_->Workers());
    for (size_t row = 0; row < workers.rows.size(); ++row) {
      if (TextAt(workers, row, ColumnOf(workers, "worker")) != kWorkerId) continue;
      const std::string state = TextAt(workers, row, ColumnOf(workers, "state"));
      const std::string slots = TextAt(workers, row, ColumnOf(workers, "slots"));
      if (absl::StartsWith(state, "unhealthy")) {
        return absl::UnavailableError(
            absl::StrCat(options.runner_path, " cannot run here: ", state));
      }
      if (state == "connected" && !absl::StrContains(slots, "no runner")) return slots;
    }
    clock_.SleepUntilNs(clock_.NowNs() + kPollNs);
  }
  if (interrupt.happened()) return absl::CancelledError("interrupted");
  return absl::UnavailableError(absl::StrCat(options.runner_path, " did not start"));
}

void LocalCluster::Stop() {
  worker_.reset();
  client_.reset();
  if (coordinator_ != nullptr) coordinator_->Shutdown();
  coordinator_.reset();
}

}  // namespace kvsweep
