#include "worker/runner/trial.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "experiments/matrix.h"
#include "experiments/metrics.h"
#include "experiments/spec.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

constexpr char kSpec[] = R"(
schema_version: 1
name: test
model: {path: experiments/models/stories260K}
load:
  arrivals: {process: poisson, rate: 400/s, requests: 16, seed: 7}
  lengths: {trace: experiments/data/azure_llm_2023_conv.csv, scale: 0.1, max_total: 300}
  text: experiments/data/tinystories_sample.txt
kv: {device_bytes: 1MiB, host_bytes: 16MiB, dtype: f32}
engine: {time: modelled, device_profile: laptop, max_num_seqs: 4, max_num_batched_tokens: 256}
arms:
  - {name: paged, strategy: paged}
  - {name: h2o, strategy: h2o, h2o: {heavy_ratio: 0.1, recent_ratio: 0.1}}
  - {name: infinigen, strategy: infinigen, infinigen: {calibration_tokens: 128}}
repeats: 1
quality: {text_tokens: 600, context: 256, prefill: 64}
)";

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options) {
  CpuBackendOptions cpu{.threads = options.threads, .batch_invariant = options.batch_invariant};
  if (!options.profile.empty()) cpu.modelled = *FindDeviceProfile(options.profile);
  return CreateCpuBackend(cpu);
}

// A machine on which everything takes long: a second passes whenever it is looked at.
class SlowWall final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_ += kNsPerSecond; }
  int64_t UnixNs() const override { return NowNs(); }
  void SleepUntilNs(int64_t) override {}
  void WaitUntilNs(std::condition_variable&, std::unique_lock<std::mutex>&, int64_t) override {}

 private:
  mutable int64_t now_ns_ = 0;
};

class TrialTest : public testing::Test {
 protected:
  TrialTest() {
    const absl::StatusOr<Experiment> experiment = ParseExperiment(kSpec, "test", {});
    EXPECT_TRUE(experiment.ok()) << experiment.status();
    ProblemList problems;
    resolved_ = ResolveInputs(*experiment, "", &problems);
    EXPECT_TRUE(problems.empty()) << problems.ToStatus("test");
    matrix_ = std::make_unique<Matrix>(*Matrix::Create(*experiment, resolved_.inputs));
  }

  RunTrial Request(const TrialSpec& spec) const {
    RunTrial request;
    request.set_trial_id(42);
    request.set_execution(1);
    *request.mutable_spec() = spec;
    request.set_model_path("experiments/models/stories260K");
    for (const FileReference& file : spec.files()) {
      (*request.mutable_file_paths())[file.path()] = resolved_.local_paths.at(file.path());
    }
    return request;
  }
  RunTrial LoadRequest(size_t arm) const { return Request(matrix_->LoadTrial(arm, 0, 0)); }

  std::vector<Record> Run(const RunTrial& request, bool cancelled = false) {
    std::vector<Record> records;
    const std::atomic<bool> cancel = cancelled;
    {
      Recorder recorder([&](const FromRunner& frame) {
        records.insert(records.end(), frame.records().records().begin(),
                       frame.records().records().end());
        return absl::OkStatus();
      });
      Trial(request, {.device = &device_,
                      .inputs = &inputs_,
                      .reference = &reference_,
                      .recorder = &recorder,
                      .cancel = &cancel,
                      .wall = wall_})
          .Run();
      recorder.Finish(request.trial_id());
    }
    EXPECT_GE(records.size(), 2u);
    EXPECT_TRUE(records.front().has_start());
    EXPECT_TRUE(records.back().has_outcome());
    for (const Record& record : records) EXPECT_EQ(record.trial_id(), 42u);
    return records;
  }

  TrialOutcome OutcomeOf(const RunTrial& request, bool cancelled = false) {
    return Run(request, cancelled).back().outcome();
  }

  static std::vector<RequestRow> Rows(const std::vector<Record>& records) {
    std::vector<RequestRow> rows;
    for (const Record& record : records) {
      if (record.has_request()) rows.push_back(record.request());
    }
    return rows;
  }

  ResolvedInputs resolved_;
  std::unique_ptr<Matrix> matrix_;
  WarmDevice device_{MakeBackend, 1};
  InputCache inputs_;
  KnownReference reference_;
  const Clock* wall_ = &RealClock::Get();
};

TEST_F(TrialTest, TheLimitOfATrialHoldsForTheWallOfModelledTime) {
  SlowWall wall;
  wall_ = &wall;
  RunTrial load = LoadRequest(0);
  load.mutable_spec()->mutable_limits()->set_trial(8 * kNsPerSecond);
  const TrialOutcome outcome = OutcomeOf(load);
  EXPECT_EQ(outcome.outcome(), OUTCOME_TIMEOUT) << outcome.DebugString();
  EXPECT_TRUE(absl::StrContains(outcome.evidence(), "ns of real time; raise limits.trial"))
      << outcome.evidence();
}

TEST_F(TrialTest, EveryArmServesTheSameRequestsToTheEnd) {
  std::vector<std::vector<uint32_t>> lengths;
  for (size_t arm = 0; arm < 3; ++arm) {
    SCOPED_TRACE(matrix_->arms()[arm].name());
    const std::vector<Record> records = Run(LoadRequest(arm));
    EXPECT_EQ(records.back().outcome().outcome(), OUTCOME_OK) << records.back().DebugString();
    EXPECT_EQ(records.back().outcome().phase(), "summarise");
    const std::vector<RequestRow> rows = Rows(records);
    EXPECT_EQ(rows.size(), 16u);
    std::map<uint32_t, uint32_t> by_index;
    for (const RequestRow& row : rows) {
      by_index[row.index()] = row.prompt_tokens() * 1000 + row.output_tokens();
    }
    lengths.emplace_back();
    for (const auto& [index, length] : by_index) lengths.back().push_back(length);
    EXPECT_EQ(records.front().start().time_mode(), "modelled:laptop");
    EXPECT_EQ(records.front().start().facts().at("kv_dtype"), "f32");
    std::map<std::string, int> names;
    for (const Record& record : records) {
      if (record.has_counter()) ++names[record.counter().name()];
      if (record.has_sample()) ++names[record.sample().name()];
    }
    for (const char* name :
         {recorded::kKvDeviceBytesPeak, recorded::kSteps, recorded::kKvBytesHostToDevice,
          recorded::kKvLiveBytes, recorded::kRunning, recorded::kStepNs}) {
      EXPECT_GT(names[name], 0) << name;
      EXPECT_LE(names[name], 200) << name;
    }
    EXPECT_EQ(names["attended_fraction"], 6) << "one for each layer, one for all";
  }
  EXPECT_EQ(lengths[0], lengths[1]);
  EXPECT_EQ(lengths[0], lengths[2]);
}

// The value of each counter about the whole trial.
std::map<std::string, double> Counters(const std::vector<Record>& records) {
  std::map<std::string, double> counters;
  for (const Record& record : records) {
    if (record.has_counter() && record.counter().layer() < 0) {
      counters[record.counter().name()] = record.counter().value();
    }
  }
  return counters;
}

TEST_F(TrialTest, ADecodeStepIsTakenApartAndComparedWithItsFloor) {
  for (size_t arm = 0; arm < 3; ++arm) {
    SCOPED_TRACE(matrix_->arms()[arm].name());
    const std::map<std::string, double> counters = Counters(Run(LoadRequest(arm)));
    double parts_ns = 0;
    for (const char* part : {"projections", "attention", "selection", "speculation", "transfer",
                             "mlp", "sampling", "other", "idle"}) {
      const std::string name = absl::StrCat("stack_", part, "_ns");
      ASSERT_TRUE(counters.contains(name)) << name;
      EXPECT_GE(counters.at(name), 0) << name;
      parts_ns += counters.at(name);
    }
    EXPECT_NEAR(parts_ns, counters.at("profile_step_ns"), 1e-6 * parts_ns);
    EXPECT_GT(counters.at("stack_projections_ns"), 0);
    EXPECT_GT(counters.at("stack_attention_ns"), 0);
    EXPECT_GT(counters.at("stack_mlp_ns"), counters.at("stack_other_ns"));
    EXPECT_GT(counters.at("stack_prefill_mlp_ns"), 0);
    EXPECT_GE(counters.at("profile_rows"), 1);
    const bool fetches = matrix_->arms()[arm].strategy() == "infinigen";
    EXPECT_EQ(counters.at("stack_transfer_ns") > 0, fetches);
    EXPECT_EQ(counters.at("stack_selection_ns") > 0, arm > 0);
    EXPECT_EQ(counters.contains(recorded::kTransferNs), fetches);
    if (fetches) {
      EXPECT_GE(counters.at(recorded::kTransferNs), counters.at(recorded::kTransferExposedNs));
    }
    // Modelled time charges each operation its fixed cost, so a step is longer than its floor.
    EXPECT_GT(counters.at("predicted_decode_step_ns"), 0);
    EXPECT_GT(counters.at("decode_step_ns"), counters.at("predicted_decode_step_ns"));
  }
}

TEST_F(TrialTest, TheSameTrialGivesTheSameRecords) {
  for (size_t arm = 0; arm < 3; ++arm) {
    const auto bytes = [&] {
      std::string all;
      for (Record& record : Run(LoadRequest(arm))) {
        // When it ran is the one thing that may differ.
        if (record.has_start()) record.mutable_start()->clear_started_unix_ns();
        if (record.has_start()) record.mutable_start()->clear_facts();
        all += record.SerializeAsString();
      }
      return all;
    };
    const std::string first = bytes();
    EXPECT_EQ(first, bytes()) << matrix_->arms()[arm].name();
  }
}

TEST_F(TrialTest, AQualityTrialScoresItsWindows) {
  for (size_t arm = 0; arm < 3; ++arm) {
    SCOPED_TRACE(matrix_->arms()[arm].name());
    const std::vector<Record> records = Run(Request(matrix_->QualityTrial(arm, 0)));
    EXPECT_EQ(records.back().outcome().outcome(), OUTCOME_OK) << records.back().DebugString();
    int windows = 0;
    for (const Record& record : records) {
      if (!record.has_quality()) continue;
      ++windows;
      EXPECT_EQ(record.quality().scored_tokens(), 192u);
      const double kl = record.quality().kl_sum() / 192;
      if (arm == 0) {
        EXPECT_LT(kl, 1e-6);
      } else {
        EXPECT_GT(record.quality().dropped_tokens(), 0u);
        EXPECT_LT(record.quality().attended_fraction(), 1);
      }
    }
    EXPECT_EQ(windows, 4);  // of 192 scored tokens each, for 600
  }
}

TEST_F(TrialTest, TooLittleMemoryForTheFixedStructuresIsOom) {
  RunTrial request = LoadRequest(0);
  request.mutable_spec()->mutable_kv()->set_device_bytes(4096);
  const TrialOutcome outcome = OutcomeOf(request);
  EXPECT_EQ(outcome.outcome(), OUTCOME_OOM) << outcome.DebugString();
  EXPECT_GT(outcome.asked_bytes(), 4096u);
  EXPECT_EQ(outcome.available_bytes(), 4096u);
  EXPECT_EQ(outcome.phase(), "prepare");
}

TEST_F(TrialTest, RequestsThatCanNeverFitAreCounted) {
  RunTrial request = LoadRequest(0);
  request.mutable_spec()->mutable_kv()->set_device_bytes(200'000);  // about 150 tokens
  const std::vector<Record> records = Run(request);
  const TrialOutcome& outcome = records.back().outcome();
  EXPECT_EQ(outcome.outcome(), OUTCOME_INFEASIBLE) << outcome.DebugString();
  EXPECT_TRUE(absl::StrContains(outcome.evidence(), "can never fit")) << outcome.evidence();
  EXPECT_EQ(Rows(records).size(), 16u);
}

TEST_F(TrialTest, LimitsAndCancelEndATrial) {
  RunTrial request = LoadRequest(0);
  request.mutable_spec()->mutable_limits()->set_trial(10 * kNsPerMs);
  EXPECT_EQ(OutcomeOf(request).outcome(), OUTCOME_TIMEOUT);
  request = LoadRequest(0);
  request.mutable_spec()->mutable_limits()->set_prepare(1);
  EXPECT_EQ(OutcomeOf(request).outcome(), OUTCOME_TIMEOUT);
  EXPECT_EQ(OutcomeOf(LoadRequest(0), true).outcome(), OUTCOME_CANCELLED);
}

TEST_F(TrialTest, OtherContentThanSubmittedIsRefused) {
  RunTrial request = LoadRequest(0);
  request.mutable_spec()->mutable_files(0)->set_digest(std::string(32, 'x'));
  EXPECT_EQ(OutcomeOf(request).outcome(), OUTCOME_INFEASIBLE);
  request = LoadRequest(0);
  request.mutable_spec()->mutable_model_reference()->set_digest(std::string(32, 'x'));
  const TrialOutcome outcome = OutcomeOf(request);
  EXPECT_EQ(outcome.outcome(), OUTCOME_INFEASIBLE);
  EXPECT_TRUE(absl::StrContains(outcome.evidence(), "not the model that was submitted"));
  EXPECT_EQ(outcome.phase(), "load");
}

TEST_F(TrialTest, SettingsThatTheArmCannotHaveAreToldApart) {
  RunTrial request = LoadRequest(1);  // h2o computes prompts in tiles
  request.mutable_spec()->mutable_engine()->set_max_num_batched_tokens(64);
  const TrialOutcome outcome = OutcomeOf(request);
  EXPECT_EQ(outcome.outcome(), OUTCOME_INFEASIBLE);
  EXPECT_TRUE(absl::StrContains(outcome.evidence(), "max_num_batched_tokens"))
      << outcome.evidence();
}

TEST(OutcomeTest, ErrorsBecomeOutcomes) {
  const TrialOutcome oom = OutcomeOfError(
      absl::ResourceExhaustedError("weights: asked 4096 bytes, available 1024 bytes"));
  EXPECT_EQ(oom.outcome(), OUTCOME_OOM);
  EXPECT_EQ(oom.asked_bytes(), 4096u);
  EXPECT_EQ(oom.available_bytes(), 1024u);
  EXPECT_EQ(OutcomeOfError(absl::InternalError("Gemm")).outcome(), OUTCOME_CRASHED);
  EXPECT_EQ(OutcomeOfError(absl::DeadlineExceededError("")).outcome(), OUTCOME_TIMEOUT);
}

}  // namespace
}  // namespace kvsweep
