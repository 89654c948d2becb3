// Folders that nobody has seen: models of every supported family drawn at random, loaded by the
// engine and held against a second forward pass that shares no code with it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "tests/worker/engine/engine_fixture.h"
#include "tests/worker/engine/random_model.h"
#include "tests/worker/engine/reference_model.h"

namespace kvsweep {
namespace {

constexpr int kModels = 60;
constexpr int32_t kPromptTokens = 41;
constexpr int32_t kOutputTokens = 6;

std::unique_ptr<LoadedModel> Load(Backend* backend, const TempDir& folder) {
  absl::StatusOr<std::unique_ptr<LoadedModel>> model = LoadedModel::Load(backend, folder.path());
  KVSWEEP_CHECK_OK(model);
  return *std::move(model);
}

// Whole prompts and decode steps under the full cache give the second program's logits. What the
// arithmetic may differ by: sums of at most 900 f32 products through at most 3 layers, near one.
TEST(ModelFamilies, LogitsAreThoseOfTheSecondForwardPass) {
  std::set<std::string> seen;
  for (int i = 0; i < kModels; ++i) {
    const uint64_t seed = 8100 + static_cast<uint64_t>(i);
    const RandomModel drawn = RandomModelBuilder(seed).Draw();
    SCOPED_TRACE(absl::StrCat("seed ", seed, ": ", drawn.config.dump()));
    seen.insert(drawn.config["model_type"]);
    const TempDir folder;
    drawn.Write(folder, 1 + i % 3);
    const auto backend = MakeBackend({.threads = 1});
    const auto model = Load(backend.get(), folder);
    Random random(seed);
    const std::vector<int32_t> prompt =
        RandomIds(random, kPromptTokens, model->config().vocabulary);
    EngineOptions options = SmallEngine(kPromptTokens + kOutputTokens);
    options.logits = LogitsMode::kAll;
    options.max_batched_tokens = 16;  // prompts come in chunks
    const auto vocabulary = static_cast<size_t>(model->config().vocabulary);
    std::vector<std::vector<float>> logits;
    const auto take = [&](int32_t row, const StepResult& result) {
      const auto begin = result.logits.begin() + row * static_cast<std::ptrdiff_t>(vocabulary);
      logits.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(vocabulary));
    };
    const absl::StatusOr<TestRun> run =
        RunRequests(backend.get(), *model, PagedArm(), options,
                    {{.prompt = prompt, .output_tokens = kOutputTokens}}, {},
                    [&](const StepPlan& plan, const StepResult& result) {
                      for (const Segment& segment : plan.decode) take(segment.first_row, result);
                      for (const Segment& segment : plan.prefill) {
                        for (int32_t r = 0; r < segment.rows; ++r) {
                          take(segment.first_row + r, result);
                        }
                      }
                    });
    ASSERT_TRUE(run.ok()) << run.status();
    std::vector<int32_t> ids = prompt;
    ids.insert(ids.end(), run->outputs[0].begin(), run->outputs[0].end() - 1);
    const auto expected = ReferenceModel(drawn.config, drawn.tensors).Logits(ids);
    ASSERT_EQ(logits.size(), expected.size());
    double worst = 0;
    for (size_t t = 0; t < logits.size(); ++t) {
      for (size_t v = 0; v < vocabulary; ++v) {
        worst = std::max(worst, std::abs(logits[t][v] - expected[t][v]));
      }
    }
    EXPECT_LT(worst, 2e-4);
  }
  EXPECT_EQ(seen.size(), 4u) << "the draws left a family out";
}

// Heads that are not D / Hq wide, odd groups, projected embeddings, norms after: nothing of it may
// matter to a strategy. With an ample budget all give the full cache's tokens.
TEST(ModelFamilies, EveryStrategyGivesTheFullCachesTokens) {
  for (int i = 0; i < kModels / 3; ++i) {
    const uint64_t seed = 8300 + static_cast<uint64_t>(i);
    const RandomModel drawn = RandomModelBuilder(seed).Draw();
    SCOPED_TRACE(absl::StrCat("seed ", seed, ": ", drawn.config.dump()));
    const TempDir folder;
    drawn.Write(folder, 1);
    const auto backend = MakeBackend({.threads = 1, .batch_invariant = true});
    const auto model = Load(backend.get(), folder);
    Random random(seed);
    std::vector<TestRequest> requests;
    for (int r = 0; r < 3; ++r) {
      requests.push_back(
          {.prompt = RandomIds(random, 20 + random.Uniform(40), model->config().vocabulary),
           .output_tokens = 8,
           .arrival_step = r});
    }
    const std::vector<int32_t> calibration = RandomIds(random, 256, model->config().vocabulary);
    const auto run = [&](const Arm& arm) {
      const auto result =
          RunRequests(backend.get(), *model, arm, SmallEngine(128), requests, calibration);
      KVSWEEP_CHECK_OK(result);
      return result->outputs;
    };
    const auto expected = run(PagedArm());
    EXPECT_EQ(run(H2oArm(0.5, 0.5)), expected);
    Arm streaming;
    streaming.set_strategy("streaming_llm");
    streaming.mutable_streaming_llm()->set_sink_tokens(4);
    streaming.mutable_streaming_llm()->set_window_size(128);
    streaming.mutable_streaming_llm()->set_positions(StreamingLlm::POSITIONS_ORIGINAL);
    EXPECT_EQ(run(streaming), expected);
    const auto layers = static_cast<uint32_t>(model->config().layers);
    if (layers == 1) continue;  // then InfiniGen has none to speculate for
    Arm infinigen = AmpleInfinigenArm();
    infinigen.mutable_infinigen()->set_n_full_layers(std::min(2u, layers - 1));
    EXPECT_EQ(run(infinigen), expected);
  }
}

TEST(ModelFamilies, ASlidingWindowBoundsTheContext) {
  uint64_t seed = 8400;
  RandomModel drawn = RandomModelBuilder(seed).Draw();
  while (drawn.config["model_type"] != "mistral") drawn = RandomModelBuilder(++seed).Draw();
  drawn.config["sliding_window"] = 64;
  const TempDir folder;
  drawn.Write(folder, 1);
  const auto backend = MakeBackend({.threads = 1});
  const auto model = Load(backend.get(), folder);
  EXPECT_TRUE(
      InferenceEngine::Create(backend.get(), model.get(), PagedArm(), SmallEngine(64), {}).ok());
  EXPECT_THAT(std::string(InferenceEngine::Create(backend.get(), model.get(), PagedArm(),
                                                  SmallEngine(65), {})
                              .status()
                              .message()),
              testing::HasSubstr("64 positions (its sliding window"));
}

}  // namespace
}  // namespace kvsweep
