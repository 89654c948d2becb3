// `kvsweep run` from end to end: real programs, a tiny model, modelled time, one store file.

#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/file.h"
#include "tests/cli/process.h"

namespace kvsweep {
namespace {

using Json = nlohmann::json;

constexpr char kSpec[] = "tests/cli/tiny.yaml";

class RunTest : public testing::Test {
 protected:
  std::string store() const { return folder_.Join("store.db"); }

  std::vector<std::string> RunArguments(std::vector<std::string> more) const {
    std::vector<std::string> arguments = {"run",   kSpec,     "--store",
                                          store(), "--cache", folder_.Join("cache")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  ProcessResult Run(const std::vector<std::string>& more) const {
    return RunProgram("kvsweep", RunArguments(more));
  }

  // Ctrl-C as soon as a round is in the store.
  ProcessResult RunAndInterrupt(const std::vector<std::string>& more) const {
    Process running("kvsweep", RunArguments(more));
    const auto has_rounds = [&] {
      const ProcessResult asked =
          RunProgram("kvsweep", {"query", "--store", store(), "--output", "csv", "--sql",
                                 "SELECT count(*) FROM v_rounds WHERE state = 'done'"});
      return asked.exit_code == 0 && !absl::StrContains(asked.out, "\r\n0\r\n");
    };
    while (!has_rounds()) RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + 20 * kNsPerMs);
    running.Signal(SIGINT);
    return running.Wait();
  }

  // The first value that the store answers, as a number.
  int64_t Ask(const std::string& sql) const {
    const ProcessResult result =
        RunProgram("kvsweep", {"query", "--store", store(), "--output", "csv", "--sql", sql});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const std::vector<std::string> lines = absl::StrSplit(result.out, "\r\n");
    int64_t value = -1;
    EXPECT_TRUE(lines.size() >= 2 && absl::SimpleAtoi(lines[1], &value)) << result.out;
    return value;
  }

  TempDir folder_;
};

// Runs one round of each of two cells, then asks everything that can be asked of the result.
TEST_F(RunTest, MeasuresComparesAndServesTheSecondTime) {
  const ProcessResult first = Run({"-S", "repeats=1"});
  ASSERT_EQ(first.exit_code, 0) << first.err;
  for (const char* arm : {"paged", "h2o-25", "modelled"}) {
    EXPECT_TRUE(absl::StrContains(first.out, arm)) << arm << "\n" << first.out;
  }
  EXPECT_EQ(Ask("SELECT count(*) FROM v_trials WHERE outcome = 'ok'"), 4);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 2);

  // The same again: answered by the store, word for word, without a further lease.
  const ProcessResult second = Run({"-S", "repeats=1"});
  EXPECT_EQ(second.exit_code, 0) << second.err;
  EXPECT_EQ(second.out, first.out);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 2);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_experiments"), 1);

  // A further repeat runs only what is new; another name runs nothing.
  EXPECT_EQ(Run({"-S", "repeats=2"}).exit_code, 0);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 4);
  EXPECT_EQ(Run({"-S", "repeats=2", "-S", "name=again"}).exit_code, 0);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 4);

  // --fresh runs all of it, and modelled time gives the same rows.
  EXPECT_EQ(Run({"-S", "repeats=1", "--fresh"}).exit_code, 0);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 6);
  EXPECT_EQ(Ask("SELECT count(DISTINCT output_digest || finished_ns) FROM v_requests r JOIN "
                "v_trials t USING (trial_id) WHERE arm = 'paged' AND cell_index = 0 AND "
                "repeat = 0 AND request_index = 0"),
            1);
}

// Two arms of equal parameters are two measurements, also when the store answers.
TEST_F(RunTest, EqualArmsKeepTheirOwnTrials) {
  const std::string spec = folder_.Join("equal.yaml");
  ASSERT_TRUE(WriteFileAtomic(spec, absl::StrReplaceAll(*ReadFile(kSpec, 1 << 20),
                                                        {{"{name: h2o-25, strategy: h2o, h2o: "
                                                          "{heavy_ratio: 0.125, recent_ratio: "
                                                          "0.125}}",
                                                          "{name: again, strategy: paged}"},
                                                         {"experiments/models",
                                                          std::filesystem::current_path().string() +
                                                              "/experiments/models"}}))
                  .ok());
  for (const char* name : {"first", "second"}) {
    const ProcessResult run =
        RunProgram("kvsweep", {"run", spec, "--store", store(), "--cache", folder_.Join("cache"),
                               "-S", "repeats=1", "-S", absl::StrCat("name=", name)});
    ASSERT_EQ(run.exit_code, 0) << run.err;
  }
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts"), 2) << "the second is served";
  EXPECT_EQ(Ask("SELECT count(DISTINCT measured_trial_id) FROM v_trials WHERE experiment = "
                "'second'"),
            4);
}

TEST_F(RunTest, EveryOutputParses) {
  const ProcessResult run = Run({"-S", "repeats=2", "--output", "json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_TRUE(Json::accept(run.out)) << run.out;

  const std::vector<std::string> source = {"--store", store()};
  const auto ask = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), source.begin(), source.end());
    const ProcessResult result = RunProgram("kvsweep", arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  const std::string csv = ask({"compare", "--output", "csv", "--metrics", "median_ttft_ms"});
  std::set<size_t> widths;
  for (absl::string_view line : absl::StrSplit(csv, '\n', absl::SkipEmpty())) {
    if (absl::StrContains(line, '"')) continue;
    widths.insert(std::vector<absl::string_view>(absl::StrSplit(line, ',')).size());
  }
  EXPECT_EQ(widths.size(), 1u) << csv;
  EXPECT_TRUE(absl::StrContains(ask({"compare", "tiny", "--output", "markdown"}), "| "));
  EXPECT_TRUE(absl::StrContains(ask({"show", "1"}), "Serving Benchmark Result"));
  const Json shown = Json::parse(ask({"show", "1", "--output", "json"}), nullptr, false);
  EXPECT_TRUE(shown.contains("trial") && shown.contains("spec")) << shown;
  const Json flat = Json::parse(ask({"show", "1", "--output", "vllm"}), nullptr, false);
  EXPECT_TRUE(flat.contains("output_throughput")) << flat;
  EXPECT_TRUE(absl::StrContains(ask({"show", "1", "--requests"}), "output_digest"));
  EXPECT_TRUE(absl::StrContains(ask({"logs", "1"}), "local"));
  const Json list = Json::parse(ask({"list", "--output", "json"}), nullptr, false);
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0]["state"], "finished");
  const ProcessResult unknown = RunProgram("kvsweep", {"show", "99999", "--store", store()});
  EXPECT_EQ(unknown.exit_code, 2) << unknown.err;
  const ProcessResult writing =
      RunProgram("kvsweep", {"query", "--store", store(), "--sql", "DELETE FROM trial"});
  EXPECT_EQ(writing.exit_code, 2) << writing.err;
}

TEST_F(RunTest, DryRunMakesNoStore) {
  const ProcessResult dry = Run({"--dry-run"});
  EXPECT_EQ(dry.exit_code, 0) << dry.err;
  EXPECT_TRUE(absl::StrContains(dry.out, "8 trials in 4 rounds")) << dry.out;
  EXPECT_EQ(RunProgram("kvsweep", {"list", "--store", store()}).exit_code, 3);
}

// Ctrl-C in the middle: 130, a store that can be asked, and the same command does the rest. No
// round is measured twice.
TEST_F(RunTest, GoesOnAfterCtrlC) {
  const std::vector<std::string> more = {"-S", "repeats=60"};
  const ProcessResult stopped = RunAndInterrupt(more);
  ASSERT_EQ(stopped.exit_code, 130) << stopped.err;
  EXPECT_TRUE(absl::StrContains(stopped.out, "paged")) << stopped.out;
  const int64_t before = Ask("SELECT count(*) FROM v_rounds WHERE state = 'done'");
  EXPECT_GT(before, 0);
  EXPECT_LT(before, 120);

  const ProcessResult rest = Run(more);
  EXPECT_EQ(rest.exit_code, 0) << rest.err;
  EXPECT_EQ(Ask("SELECT count(*) FROM v_experiments"), 1);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_rounds WHERE state = 'done'"), 120);
  EXPECT_EQ(Ask("SELECT count(*) FROM v_attempts WHERE state = 'accepted'"), 120);
}

// What was left unfinished does not stand in the way of another spec, and is not lost.
TEST_F(RunTest, AnotherSpecCancelsWhatWasLeft) {
  ASSERT_EQ(RunAndInterrupt({"-S", "repeats=60"}).exit_code, 130);
  const int64_t kept = Ask("SELECT count(*) FROM v_rounds WHERE state = 'done'");
  const ProcessResult other = Run({"-S", "repeats=1", "-S", "name=other"});
  EXPECT_EQ(other.exit_code, 0) << other.err;
  EXPECT_TRUE(absl::StrContains(other.err, "left unfinished and is cancelled")) << other.err;
  EXPECT_EQ(Ask("SELECT count(*) FROM v_rounds WHERE state IN ('queued', 'running')"), 0);

  const ProcessResult again = Run({"-S", "repeats=60"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_GE(Ask("SELECT served FROM v_experiments ORDER BY experiment_id DESC LIMIT 1"), kept);
}

// No memory for anyone is a result, said at once.
TEST_F(RunTest, OutOfMemoryIsAResult) {
  const ProcessResult result = Run({"-S", "repeats=1", "-S", "kv.device_bytes=4KiB"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_TRUE(absl::StrContains(result.err, "repeat 0: oom: ")) << result.err;
  EXPECT_EQ(Ask("SELECT count(*) FROM v_trials WHERE outcome = 'oom'"), 4);
}

TEST_F(RunTest, RefusesCudaWhereNoDeviceIs) {
  const bool has_device = std::filesystem::exists("/dev/nvidiactl");
  const ProcessResult asked = Run({"-S", "engine.backend=cuda", "-S", "engine.time=real"});
  EXPECT_EQ(asked.exit_code == 3, !has_device) << asked.out << asked.err;
  EXPECT_EQ(absl::StrContains(asked.err, "this machine has no device for it"), !has_device)
      << asked.err;
}

TEST_F(RunTest, NamesARunnerThatCannotStart) {
  const ProcessResult missing = Run({"--runner", folder_.Join("none")});
  EXPECT_EQ(missing.exit_code, 3);
  EXPECT_TRUE(absl::StrContains(missing.err, "--runner")) << missing.err;
}

}  // namespace
}  // namespace kvsweep
