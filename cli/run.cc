// `kvsweep run`: an experiment from spec to comparison on this machine.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/expansion.h"
#include "cli/flags.h"
#include "cli/follow.h"
#include "cli/interrupt.h"
#include "cli/local_cluster.h"
#include "cli/progress.h"
#include "cli/source.h"
#include "cli/submit_spec.h"
#include "cli/table_format.h"
#include "coordinator/submission.h"
#include "experiments/matrix.h"
#include "experiments/report.h"
#include "storage/sqlite_store.h"
#include "worker/runner_choice.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] = "Runs an experiment on this machine, from the spec to the comparison.";

constexpr char kMore[] =
    "Coordinator and worker are in this process, the runner is a child, results are in one store "
    "file. Trials that the\n"
    "store holds already are not run again; after Ctrl-C the same command goes on where it "
    "stopped.\n"
    "\n"
    "Example:\n"
    "  kvsweep run experiments/specs/quickstart.yaml\n"
    "  kvsweep run experiments/specs/quickstart.yaml -S repeats=1 --store try.db\n";

// Experiments of this command have client ids that begin so.
constexpr char kClientPrefix[] = "run";

struct Flags {
  SpecFlags spec;
  ReuseFlags reuse;
  std::string store = "kvsweep.db";
  std::string runner;
  std::string cache;
  uint32_t threads = 0;
  bool dry_run = false;
  std::string output;
  std::vector<std::string> metrics;
  std::string log_level = "error";
};

// How many rounds the store would answer, by builds and devices alike; nullopt: there is no store.
absl::StatusOr<std::optional<uint64_t>> CountServed(const Flags& flags,
                                                    const LoadedExperiment& loaded) {
  if (!std::filesystem::exists(flags.store)) return std::optional<uint64_t>();
  ASSIGN_OR_RETURN(const std::unique_ptr<StoreReader> reader, OpenSqliteReader(flags.store));
  SubmitRequest request = MakeSubmitRequest(loaded, flags.reuse);
  request.set_client_id(DeriveClientId(loaded, flags.reuse, kClientPrefix, ""));
  const ReuseRules rules{.fresh = flags.reuse.fresh,
                         .any_build = request.same_method(),
                         .runner_builds = {GetBuildInfo().runner_digest},
                         .device_classes = {}};
  ASSIGN_OR_RETURN(const Submission submission, PlanSubmission(request, rules, 0, *reader));
  return std::optional<uint64_t>(submission.rounds_served);
}

int DryRun(const Flags& flags, const LoadedExperiment& loaded, const Matrix& matrix) {
  std::printf("%s: %s\n\n%s\n%s", loaded.experiment.name().c_str(), FormatCounts(matrix).c_str(),
              FormatTable(ArmsTable(matrix), ReportFormat::kTable).c_str(),
              FormatTable(CellsTable(matrix, 50), ReportFormat::kTable).c_str());
  const absl::StatusOr<std::optional<uint64_t>> served = CountServed(flags, loaded);
  if (!served.ok()) return Fail(absl::UnavailableError(served.status().message()));
  if (served->has_value()) {
    std::printf("\n%s answers %d of these rounds\n", flags.store.c_str(),
                static_cast<int>(**served));
  }
  return kExitOk;
}

// Experiments that an earlier `run` left unfinished would be run first. Unless it is this one
// again, they are cancelled: what they measured stays, and running their spec again goes on.
absl::Status CancelLeftovers(LocalCluster& cluster, TableSource& tables, const std::string& client,
                             ProgressDisplay* display) {
  ASSIGN_OR_RETURN(
      const Table left,
      tables.Run(absl::StrCat("SELECT experiment_id, name FROM v_experiments WHERE state IN "
                              "('queued', 'running') AND client_id LIKE '",
                              kClientPrefix, "-%' AND client_id <> ", SqlText(client)),
                 QueryLimits()));
  for (size_t i = 0; i < left.rows.size(); ++i) {
    const ExperimentId experiment(static_cast<uint64_t>(IntAt(left, i, 0)));
    RETURN_IF_ERROR(cluster.client().Cancel(experiment).status());
    display->Say(absl::StrCat("experiment ", experiment.value(), " (", TextAt(left, i, 1),
                              ") was left unfinished and is cancelled; running its spec again uses "
                              "what it measured"));
  }
  return absl::OkStatus();
}

LocalWorkerOptions WorkerOptionsOf(const Flags& flags, const LoadedExperiment& loaded) {
  LocalWorkerOptions options{
      .runner_path = flags.runner,
      .threads = flags.threads,
      .model_folders = {},
      .cache_folder = flags.cache.empty() ? DefaultCacheFolder() : flags.cache};
  const auto folder = loaded.resolved.local_paths.find(loaded.experiment.model().path());
  if (folder != loaded.resolved.local_paths.end()) options.model_folders = {folder->second};
  return options;
}

absl::StatusOr<int64_t> CountLeases(TableSource& tables) {
  ASSIGN_OR_RETURN(const Table table, tables.Run("SELECT count(*) FROM v_attempts", QueryLimits()));
  return IntAt(table, 0, 0);
}

// Runs the experiment as far as it goes. Cancelled: interrupted, perhaps before it had an id.
absl::Status RunToEnd(const Flags& flags, const LoadedExperiment& loaded, TableSource& tables,
                      LocalCluster& cluster, Interrupt& interrupt, ProgressDisplay* display,
                      std::optional<ExperimentId>* experiment) {
  SubmitRequest request = MakeSubmitRequest(loaded, flags.reuse);
  const std::string where = absl::StrCat("threads ", flags.threads);
  ASSIGN_OR_RETURN(const std::string client_id,
                   NextTry(tables, DeriveClientId(loaded, flags.reuse, kClientPrefix, where)));
  request.set_client_id(client_id);
  ASSIGN_OR_RETURN(const int64_t leases_before, CountLeases(tables));
  RETURN_IF_ERROR(CancelLeftovers(cluster, tables, client_id, display));
  // The worker first: which stored rounds may answer depends on the device that it has.
  LocalWorkerOptions worker = WorkerOptionsOf(flags, loaded);
  if (worker.runner_path.empty()) {
    const RunnerChoice choice = ChooseRunner(ProgramFolder(), RealClock::Get());
    worker.runner_path = choice.path;
    LogInfo("runner: ", choice.reason);
    const bool has_device = absl::EndsWith(choice.path, "-cuda");
    if (has_device) display->Say(choice.reason);
    // No other worker joins this command's coordinator.
    if (!has_device && loaded.experiment.engine().backend() == Engine::BACKEND_CUDA) {
      return absl::UnavailableError(absl::StrCat(
          "engine.backend: cuda, and this machine has no device for it: ", choice.reason));
    }
  }
  RETURN_IF_ERROR(cluster.StartWorker(worker, interrupt).status());
  ASSIGN_OR_RETURN(const SubmitReply reply, SubmitWithFiles(cluster.client(), loaded, request));
  *experiment = ExperimentId(reply.experiment_id());
  interrupt.OnSignal([&cluster] { cluster.client().Interrupt(); });
  const absl::Status status =
      Follow(cluster.client(), tables, **experiment, display, RealClock::Get());
  interrupt.OnSignal(nullptr);
  RETURN_IF_ERROR(status);
  ASSIGN_OR_RETURN(const int64_t leases_after, CountLeases(tables));
  if (leases_after == leases_before) display->Say("the store had all of it: nothing was run");
  return absl::OkStatus();
}

// Prints the comparison, and on stderr how it went and where to look further.
absl::StatusOr<Standing> Conclude(const Flags& flags, TableSource& tables,
                                  ExperimentId experiment) {
  ASSIGN_OR_RETURN(const Standing standing, ReadStanding(tables, experiment));
  ASSIGN_OR_RETURN(const ReportInput input, tables.Report(experiment));
  ASSIGN_OR_RETURN(const Comparison comparison, Compare(input, {.metrics = flags.metrics}));
  std::fputs(FormatComparison(comparison, OutputFormat(flags.output)).c_str(), stdout);
  std::fflush(stdout);
  const std::string id = absl::StrCat(experiment.value());
  std::fprintf(stderr,
               "%s\nexperiment %s in %s; look further with\n"
               "  kvsweep compare %s --store %s --output markdown\n"
               "  kvsweep query --store %s --sql \"SELECT trial_id, arm, cell, repeat, outcome "
               "FROM v_trials WHERE experiment_id = %s\"\n"
               "  kvsweep show TRIAL --store %s\n",
               FormatStanding(standing).c_str(), id.c_str(), flags.store.c_str(), id.c_str(),
               flags.store.c_str(), flags.store.c_str(), id.c_str(), flags.store.c_str());
  return standing;
}

absl::Status CheckMetrics(const std::vector<std::string>& metrics) {
  ReportInput nothing;
  nothing.arms = {{"any", "paged"}};
  return Compare(nothing, {.metrics = metrics}).status();
}

int Run(const Flags& flags) {
  const absl::StatusOr<LogLevel> level = ParseLogLevel(flags.log_level);
  if (!level.ok()) return Fail(level.status());
  SetLog("kvsweep", *level);
  const absl::StatusOr<LoadedExperiment> loaded = LoadSpec(flags.spec);
  if (!loaded.ok()) return FailSpec(loaded.status());
  const absl::StatusOr<Matrix> matrix = Matrix::Create(loaded->experiment, loaded->resolved.inputs);
  if (!matrix.ok()) return FailSpec(matrix.status());
  // An unknown metric must not come to light after an hour of measuring.
  const absl::Status metrics = CheckMetrics(flags.metrics);
  if (!metrics.ok()) return Fail(metrics);
  if (flags.dry_run && flags.output != "table") {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("--dry-run prints a table, not ", flags.output,
                     "; `kvsweep expand SPEC --output ", flags.output, "` prints the matrix")));
  }
  if (flags.dry_run) return DryRun(flags, *loaded, *matrix);

  Interrupt interrupt;
  absl::StatusOr<std::unique_ptr<LocalCluster>> cluster =
      LocalCluster::Start(flags.store, RealClock::Get());
  if (!cluster.ok()) return Fail(cluster.status());
  absl::StatusOr<Source> source = OpenSource({.store = flags.store, .coordinator = ""});
  if (!source.ok()) return Fail(source.status());
  ProgressDisplay display(stderr, RealClock::Get());
  display.Say(absl::StrCat(loaded->experiment.name(), ": ", FormatCounts(*matrix)));
  std::optional<ExperimentId> experiment;
  const absl::Status status =
      RunToEnd(flags, *loaded, *source->tables, **cluster, interrupt, &display, &experiment);
  (*cluster)->Stop();
  if (!status.ok() && !absl::IsCancelled(status)) return Fail(status);
  if (absl::IsCancelled(status)) {
    display.Say(flags.reuse.fresh
                    ? "interrupted; the same command without --fresh goes on from here"
                    : "interrupted; the same command goes on from here");
    if (!experiment.has_value()) return kExitInterrupted;
  }
  const absl::StatusOr<Standing> standing = Conclude(flags, *source->tables, *experiment);
  if (absl::IsCancelled(status)) return kExitInterrupted;
  if (!standing.ok()) return Fail(standing.status());
  return standing->has_failures() ? kExitFailed : kExitOk;
}

}  // namespace

void AddRunCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "run", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  AddSpecFlags(*command, &flags->spec);
  command->add_option("--store", flags->store, "Store file; made if missing")
      ->type_name("FILE")
      ->capture_default_str();
  AddReuseFlags(*command, &flags->reuse);
  command->add_flag("-n,--dry-run", flags->dry_run,
                    "Show what would run, and how much of it the store answers");
  AddOutputFlag(*command, &flags->output);
  command->add_option("--metrics", flags->metrics, "Metrics of the comparison, separated by commas")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option(
      "--runner", flags->runner,
      "The runner program; by default the one beside this program that fits the machine");
  command->add_option("--threads", flags->threads, "CPU threads of the runner; 0: one a core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command->add_option("--cache", flags->cache,
                      "Folder for fetched files and digests; by default ~/.cache/kvsweep");
  command->add_option("--log-level", flags->log_level, "debug, info, warning, error or off")
      ->capture_default_str();
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
