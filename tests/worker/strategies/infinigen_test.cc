// InfiniGen as a whole.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/strategies/infinigen_lab.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {
namespace {

// Fetched bytes = sum over layers of selected entries, counted where they are moved.
TEST(MemoryTest, InfinigenLinkBytesEqualTheSelections) {
  const auto backend = MakeBackend({.threads = 1});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(10);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  for (const bool prefetch : {true, false}) {
    const Arm arm = InfinigenArm({.alpha = 3, .max_kv_ratio = 0.3, .prefetch = prefetch});
    absl::StatusOr<std::unique_ptr<InferenceEngine>> created =
        InferenceEngine::Create(backend.get(), model.get(), arm, SmallEngine(256), calibration);
    ASSERT_TRUE(created.ok());
    InferenceEngine& engine = **created;
    Batcher batcher({.max_sequences = 8,
                     .max_batched_tokens = 256,
                     .chunk_alignment = 1,
                     .budget = {256 << 20, 256 << 20}},
                    &engine.manager());
    for (RequestId id = 0; id < 3; ++id) {
      engine.AddSequence(id, RandomIds(random, 60 + 10 * static_cast<size_t>(id), 512),
                         60 + 10 * id);
      ASSERT_TRUE(batcher.Add(id, {60 + 10 * id, 40}, 40));
    }
    while (!batcher.idle()) {
      const StepPlan& plan = batcher.Plan();
      absl::StatusOr<StepResult> result = engine.Execute(plan);
      ASSERT_TRUE(result.ok());
      double fetched = 0;
      for (size_t i = 0; i < plan.decode.size(); ++i) {
        fetched += engine.CollectDecode(i, {}).fetched;
      }
      if (plan.prefill.empty()) {
        const double entry_bytes = 2 * 4 * 8 * sizeof(float);  // K and V, 4 heads of 8 numbers
        EXPECT_EQ(static_cast<double>(result->kv_bytes_to_device), fetched * entry_bytes);
      }
      batcher.Complete();
    }
  }
}

// Strategies' law: m does not fall when alpha grows.
TEST(InfinigenTest, FetchesMoreWithLargerAlpha) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "books-llama-14m");
  Random random(12);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 4096);
  const TestRequest request{.prompt = RandomIds(random, 150, 4096), .output_tokens = 2};
  double previous = 0;
  for (const double alpha : {0.0, 1.0, 2.0, 4.0, 8.0, 1e6}) {
    const Arm arm = InfinigenArm({.alpha = alpha, .max_kv_ratio = 1});
    absl::StatusOr<TestRun> run =
        RunRequests(backend.get(), *model, arm, SmallEngine(256), {request}, calibration);
    ASSERT_TRUE(run.ok());
    EXPECT_GE(run->attended[0], previous) << "alpha " << alpha;
    previous = run->attended[0];
    if (alpha == 0.0) {
      // One entry for each query head at most, and the current token; two full layers.
      EXPECT_LE(run->attended[0], 2 * 151 + 6 * (3 + 1));
    }
  }
  EXPECT_EQ(previous, 8 * 151);
}

// Prefetch on and off read the same rows.
TEST(InfinigenTest, PrefetchChangesNoToken) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "books-opt-16m");
  Random random(13);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 4096);
  const std::vector<TestRequest> requests = {
      {.prompt = RandomIds(random, 120, 4096), .output_tokens = 20},
      {.prompt = RandomIds(random, 90, 4096), .output_tokens = 20}};
  std::vector<TestRun> runs;
  for (const bool prefetch : {true, false}) {
    absl::StatusOr<TestRun> run =
        RunRequests(backend.get(), *model, InfinigenArm({.prefetch = prefetch}), SmallEngine(256),
                    requests, calibration);
    ASSERT_TRUE(run.ok());
    runs.push_back(*std::move(run));
  }
  EXPECT_EQ(runs[0].outputs, runs[1].outputs);
  EXPECT_EQ(runs[0].attended, runs[1].attended);
}

TEST(InfinigenTest, RefusesAModelWithoutSpeculatingLayers) {
  const auto backend = MakeBackend();
  const auto model = LoadModel(backend.get(), "stories260K");
  const absl::Status status =
      InferenceEngine::Create(backend.get(), model.get(), InfinigenArm({.n_full_layers = 5}),
                              SmallEngine(256), std::vector<int32_t>(256, 3))
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("use at most 4"));
}

TEST(InfinigenTest, RefusesACalibrationWithFewerTokensThanColumns) {
  const auto backend = MakeBackend();
  const auto model = LoadModel(backend.get(), "stories260K");
  const absl::Status status = InferenceEngine::Create(backend.get(), model.get(), InfinigenArm({}),
                                                      SmallEngine(256), std::vector<int32_t>(7, 3))
                                  .status();
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("needs at least 8"));
}

}  // namespace
}  // namespace kvsweep
