// InfiniGen as a whole: equal results by different ways, bytes, memory, what is recorded, what is
// refused. infinigen_selection_test.cc holds what is selected to the rules.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "tests/worker/strategies/infinigen_lab.h"
#include "worker/engine/calibration.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {
namespace {

// Invariant: m does not fall when alpha grows.
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

// ------------------------------------------------------------------------------------- equal
// results

// Requests with prompts of several chunks, some of which decode while others are prefilled.
std::vector<TestRequest> SomeRequests(int32_t vocabulary) {
  Random random(21);
  std::vector<TestRequest> requests;
  for (const int32_t prompt : {171, 40, 97, 1}) {
    requests.push_back({.prompt = RandomIds(random, static_cast<size_t>(prompt), vocabulary),
                        .output_tokens = 24,
                        .max_tokens = 28,
                        .arrival_step = static_cast<int32_t>(requests.size())});
  }
  return requests;
}

TestRun Serve(Backend* backend, const LoadedModel& model, const Arm& arm, EngineOptions options) {
  const int32_t vocabulary = model.config().vocabulary;
  Random random(22);
  absl::StatusOr<TestRun> run = RunRequests(backend, model, arm, options, SomeRequests(vocabulary),
                                            RandomIds(random, 256, vocabulary));
  KVSWEEP_CHECK_OK(run);
  return *std::move(run);
}

// Ways of doing the same.
std::vector<Variant> EqualVariants() {
  return {{"as it is", [](Infinigen*) {}},
          {"no prefetch", [](Infinigen* p) { p->set_prefetch(false); }},
          {"no graphs", [](Infinigen*) {}, 64, false},
          {"staged gather", [](Infinigen* p) { p->set_gather(Infinigen::GATHER_STAGED); }},
          {"staged, no prefetch",
           [](Infinigen* p) {
             p->set_gather(Infinigen::GATHER_STAGED);
             p->set_prefetch(false);
           }},
          {"full layers on the device", [](Infinigen* p) { p->set_full_layers_on_device(true); }},
          {"history on the device",
           [](Infinigen* p) { p->set_prefill_history(Infinigen::PREFILL_HISTORY_DEVICE); }},
          {"both",
           [](Infinigen* p) {
             p->set_full_layers_on_device(true);
             p->set_prefill_history(Infinigen::PREFILL_HISTORY_DEVICE);
           }},
          {"whole prompts",
           [](Infinigen* p) { p->set_prefill_history(Infinigen::PREFILL_HISTORY_WHOLE); }, 208}};
}

// Invariant: prefetch or not, zero-copy or staged, graph or none, wherever full layers and earlier
// chunks lie: the same tokens, the same entries read. Sums over tiles round otherwise than sums
// over all at once, so no margin of these requests lies within rounding of alpha (one did at 3).
TEST(InfinigenTest, WaysOfDoingTheSameGiveTheSame) {
  const std::vector<std::pair<std::string, LabShape>> models = {
      {"books-opt-16m", {}},
      {"books-llama-14m", {}},
      {"", {.rotary = true, .layers = 5, .group = 3, .kv_heads = 2, .head_dim = 8}},
      {"", {.rotary = false, .layers = 3, .group = 1, .kv_heads = 3, .head_dim = 64}}};
  for (const auto& [name, shape] : models) {
    const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
    const auto model =
        name.empty() ? MakeModel(backend.get(), shape) : LoadModel(backend.get(), name);
    TestRun first;
    for (const Variant& variant : EqualVariants()) {
      SCOPED_TRACE(testing::Message() << name << ": " << variant.name);
      EngineOptions options = SmallEngine(208);
      options.max_batched_tokens = variant.max_batched_tokens;
      options.graphs = variant.graphs;
      const Arm arm = InfinigenWith({.alpha = 3.1, .max_kv_ratio = 0.3}, variant.change);
      const TestRun run = Serve(backend.get(), *model, arm, options);
      if (first.outputs.empty()) first = run;
      EXPECT_EQ(run.outputs, first.outputs);
      EXPECT_EQ(run.attended, first.attended);
    }
  }
}

// What parameters that change no token, or how many entries move, are there for: bytes over the
// link, and the time of a machine whose link is slow.
TEST(InfinigenTest, ParametersOfTransfersShowInBytesAndTime) {
  DeviceProfile profile = *FindDeviceProfile("laptop");
  profile.link_bytes_per_s = 5e8;
  struct Cost {
    uint64_t to_device = 0;
    int64_t ns = 0;
  };
  const auto cost = [&](const auto& change) {
    const auto backend = MakeBackend({.threads = 2, .modelled = profile});
    const auto model = LoadModel(backend.get(), "stories260K");
    Random random(31);
    const std::vector<TestRequest> requests = {
        {.prompt = RandomIds(random, 150, 512), .output_tokens = 30, .max_tokens = 60}};
    const absl::StatusOr<TestRun> run = RunRequests(
        backend.get(), *model,
        InfinigenWith({.alpha = std::numeric_limits<double>::infinity(), .max_kv_ratio = 0.4},
                      change),
        SmallEngine(256), requests, RandomIds(random, 256, 512));
    KVSWEEP_CHECK_OK(run);
    return Cost{run->traffic.to_device, backend->modelled_ns()};
  };
  const Cost plain = cost([](Infinigen*) {});
  const Cost eager = cost([](Infinigen* p) { p->set_prefetch(false); });
  EXPECT_EQ(eager.to_device, plain.to_device);
  EXPECT_GT(eager.ns, plain.ns) << "nothing hides the transfers";
  const auto less = [&](const auto& change) { EXPECT_LT(cost(change).to_device, plain.to_device); };
  const auto more = [&](const auto& change) { EXPECT_GT(cost(change).to_device, plain.to_device); };
  less([](Infinigen* p) { p->set_full_layers_on_device(true); });
  less([](Infinigen* p) { p->set_max_kv_ratio(0.1); });
  less([](Infinigen* p) { p->set_budget_base(BUDGET_BASE_PROMPT); });
  less([](Infinigen* p) {
    p->set_budget_base(BUDGET_BASE_FIXED);
    p->set_budget_tokens(100);
  });
  less([](Infinigen* p) { p->set_n_full_layers(1); });
  more([](Infinigen* p) { p->set_n_full_layers(3); });
  more([](Infinigen* p) { p->set_fetch(Infinigen::FETCH_ALL); });
}

// Invariant: with alpha infinite and room for all, logits are the full cache's, for any ratio and
// every way of speculating.
TEST(InfinigenTest, AmpleParametersGiveTheFullCachesLogits) {
  const double all = std::numeric_limits<double>::infinity();
  const std::vector<std::function<void(Infinigen*)>> changes = {
      [](Infinigen*) {},
      [](Infinigen* p) { p->set_partial_weight_ratio(0.05); },
      [](Infinigen* p) { p->set_count_scope(Infinigen::COUNT_SCOPE_HEAD); },
      [](Infinigen* p) { p->set_column_score(Infinigen::COLUMN_SCORE_UNION); },
      [](Infinigen* p) { p->set_rope_speculation(Infinigen::ROPE_SPECULATION_PAIRED); },
      [](Infinigen* p) { p->set_fetch(Infinigen::FETCH_ALL); },
      [](Infinigen* p) { p->set_force_fetch_ratio(1); },
      [](Infinigen* p) { p->set_skew(Infinigen::SKEW_FOLDED); }};
  int32_t prompt = 31;
  for (const LabShape& shape : LabShapes()) {
    const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
    const auto model = MakeModel(backend.get(), shape);
    for (size_t i = 0; i < changes.size(); ++i) {
      if (shape.rotary && i + 1 == changes.size()) continue;  // folded: learned positions only
      SCOPED_TRACE(testing::Message() << "group " << shape.group << " change " << i);
      Lab full(backend.get(), model.get(), PagedArm(), LabOptions());
      Lab lab(backend.get(), model.get(),
              InfinigenWith({.alpha = all, .max_kv_ratio = 1}, changes[i]), LabOptions());
      for (Lab* each : {&full, &lab}) {
        each->Start(0, prompt, prompt + 30);
        each->Start(1, 150, 180);
      }
      for (int step = 0; step < 6; ++step) {
        const auto expected = full.Decode({0, 1});
        const auto got = lab.Decode({0, 1});
        for (size_t row = 0; row < 2; ++row) {
          for (size_t v = 0; v < expected[row].size(); ++v) {
            ASSERT_NEAR(got[row][v], expected[row][v], 1e-5 * (1 + std::abs(expected[row][v])));
          }
        }
      }
      prompt += 2;
    }
  }
}

// Invariant: with count_scope request the order of a batch changes no request's logits.
TEST(InfinigenTest, TheOrderOfABatchChangesNothing) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "books-llama-14m");
  const Arm arm = InfinigenArm({.alpha = 3});
  Lab forward(backend.get(), model.get(), arm, LabOptions());
  Lab backward(backend.get(), model.get(), arm, LabOptions());
  for (RequestId id = 0; id < 4; ++id) {
    forward.Start(id, 50 + 21 * id, 150);
    backward.Start(id, 50 + 21 * id, 150);
  }
  for (int step = 0; step < 6; ++step) {
    const auto a = forward.Decode({0, 1, 2, 3});
    const auto b = backward.Decode({3, 1, 0, 2});
    EXPECT_EQ(a[0], b[2]);
    EXPECT_EQ(a[1], b[1]);
    EXPECT_EQ(a[2], b[3]);
    EXPECT_EQ(a[3], b[0]);
  }
}

// Offloaded requests come back as they were, whatever is kept of them: tokens equal those of an
// unpreempted run.
TEST(InfinigenTest, ResumesToTheBit) {
  const std::vector<Variant> variants = {
      {"bounded, counts", [](Infinigen* p) { p->set_capacity(0.5); }},
      {"bounded, lru",
       [](Infinigen* p) {
         p->set_capacity(0.5);
         p->set_eviction_policy(Infinigen::EVICTION_POLICY_LRU);
       }},
      {"resident full layers", [](Infinigen* p) { p->set_full_layers_on_device(true); }},
      {"bounded, resident",
       [](Infinigen* p) {
         p->set_capacity(0.7);
         p->set_full_layers_on_device(true);
       }},
      {"request columns", [](Infinigen* p) {
         p->set_columns(Infinigen::COLUMNS_REQUEST);
         p->set_prefill_history(Infinigen::PREFILL_HISTORY_WHOLE);
       }}};
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(78);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  std::vector<TestRequest> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back({.prompt = RandomIds(random, 9, 512), .output_tokens = 110});
  }
  for (const Variant& variant : variants) {
    SCOPED_TRACE(variant.name);
    const Arm arm = InfinigenWith({.alpha = 2, .max_kv_ratio = 0.3}, variant.change);
    EngineOptions options = SmallEngine(128);
    absl::StatusOr<TestRun> unpreempted =
        RunRequests(backend.get(), *model, arm, options, requests, calibration);
    ASSERT_TRUE(unpreempted.ok()) << unpreempted.status();
    EXPECT_EQ(std::ranges::max(unpreempted->preemptions), 0);
    {
      absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
          InferenceEngine::Create(backend.get(), model.get(), arm, options, calibration);
      ASSERT_TRUE(engine.ok());
      const KvManager& manager = (*engine)->manager();
      options.device_bytes = manager.FixedBytes().device + 3 * manager.PeakBytes({9, 110}).device;
    }
    absl::StatusOr<TestRun> preempted =
        RunRequests(backend.get(), *model, arm, options, requests, calibration);
    ASSERT_TRUE(preempted.ok()) << preempted.status();
    EXPECT_GT(std::ranges::max(preempted->preemptions), 0);
    EXPECT_EQ(preempted->outputs, unpreempted->outputs);
    EXPECT_EQ(preempted->attended, unpreempted->attended);
  }
}

// ------------------------------------------------------------------------------------------
// settings

TEST(InfinigenTest, ContradictionsAreRefused) {
  const auto backend = MakeBackend();
  const auto model = LoadModel(backend.get(), "stories260K");
  const std::vector<std::pair<std::string, std::function<void(Infinigen*)>>> refused = {
      {"infinigen.skew:", [](Infinigen* p) { p->set_skew(Infinigen::SKEW_FOLDED); }},
      {"infinigen.budget_base:", [](Infinigen* p) { p->set_budget_base(BUDGET_BASE_FINAL); }},
      {"infinigen.columns:", [](Infinigen* p) { p->set_columns(Infinigen::COLUMNS_REQUEST); }},
      {"infinigen.columns:",
       [](Infinigen* p) {
         p->set_columns(Infinigen::COLUMNS_REQUEST);
         p->set_prefill_history(Infinigen::PREFILL_HISTORY_WHOLE);
         p->set_rope_speculation(Infinigen::ROPE_SPECULATION_PAIRED);
       }},
      {"infinigen.column_score:",
       [](Infinigen* p) {
         p->set_rope_speculation(Infinigen::ROPE_SPECULATION_PAIRED);
         p->set_column_score(Infinigen::COLUMN_SCORE_UNION);
       }},
      {"infinigen.full_layers_on_device:",
       [](Infinigen* p) {
         p->set_fetch(Infinigen::FETCH_ALL);
         p->set_full_layers_on_device(true);
       }},
      {"infinigen.eviction_policy:", [](Infinigen* p) {
         p->set_fetch(Infinigen::FETCH_ALL);
         p->set_capacity(0.5);
       }}};
  for (const auto& [field, change] : refused) {
    const absl::Status status =
        InferenceEngine::Create(backend.get(), model.get(), InfinigenWith({}, change),
                                SmallEngine(256), std::vector<int32_t>(256, 3))
            .status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), testing::StartsWith(field));
  }
}

// The full-offload control: no speculation, no partial keys, no calibration, no rule.
TEST(InfinigenTest, FetchAllIsAControlWithoutSpeculation) {
  const auto backend = MakeBackend({.threads = 2});
  const auto model = LoadModel(backend.get(), "stories260K");
  const Arm arm = InfinigenWith({}, [](Infinigen* p) { p->set_fetch(Infinigen::FETCH_ALL); });
  absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
      InferenceEngine::Create(backend.get(), model.get(), arm, SmallEngine(256), {});
  ASSERT_TRUE(engine.ok()) << engine.status();
  CacheStrategy& strategy = (*engine)->strategy();
  EXPECT_EQ(strategy.engagement_rule().text, "entries were fetched from the host");
  EXPECT_TRUE(strategy.EngagementExpected({100, 50}, 110));
  EXPECT_EQ(strategy.TokenBudget({100, 50}), -1);
  EXPECT_EQ(strategy.manager().PeakBytes({100, 50}).device, 0u);
  EXPECT_TRUE(model->skewing_cache().empty());
}

// One calibration serves all arms over the same text.
TEST(InfinigenTest, SkewingIsComputedOnce) {
  const auto backend = MakeBackend({.threads = 2});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(51);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  for (const double ratio : {0.3, 1.0}) {
    ASSERT_TRUE(InferenceEngine::Create(backend.get(), model.get(),
                                        InfinigenArm({.partial_weight_ratio = ratio}),
                                        SmallEngine(256), calibration)
                    .ok());
    EXPECT_EQ(model->skewing_cache().size(), 1u);
  }
}

// What an arm's preparation computes from the weights serves its next trial, to the same tokens.
TEST(InfinigenTest, ThinWeightsAreComputedOnceForAnArm) {
  const auto backend = MakeBackend({.threads = 2});
  const auto model = MakeModel(
      backend.get(), {.rotary = false, .layers = 3, .group = 1, .kv_heads = 3, .head_dim = 64});
  const int32_t vocabulary = model->config().vocabulary;
  Random random(54);
  const std::vector<int32_t> calibration = RandomIds(random, 256, vocabulary);
  const std::vector<TestRequest> requests = {
      {.prompt = RandomIds(random, 90, vocabulary), .output_tokens = 24},
      {.prompt = RandomIds(random, 40, vocabulary), .output_tokens = 12, .arrival_step = 3}};
  uint64_t bytes = 0;
  for (const double ratio : {0.3, 0.6}) {
    const Arm arm = InfinigenArm({.partial_weight_ratio = ratio, .alpha = 2, .max_kv_ratio = 0.3});
    const auto first =
        RunRequests(backend.get(), *model, arm, SmallEngine(256), requests, calibration);
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_GT(model->prepared_weights().bytes(), bytes);
    bytes = model->prepared_weights().bytes();
    const auto second =
        RunRequests(backend.get(), *model, arm, SmallEngine(256), requests, calibration);
    ASSERT_TRUE(second.ok()) << second.status();
    EXPECT_EQ(second->outputs, first->outputs);
    EXPECT_EQ(model->prepared_weights().bytes(), bytes);
  }
}

// Invariant, on trained models: each A is orthogonal.
TEST(InfinigenTest, SkewingOfTrainedModelsIsOrthogonal) {
  for (const char* name : {"books-llama-14m", "books-opt-16m"}) {
    const auto backend = MakeBackend({.threads = 2});
    const auto model = LoadModel(backend.get(), name);
    Random random(52);
    const auto skewing = CalibrateSkewing(backend.get(), model.get(), RandomIds(random, 256, 4096));
    ASSERT_TRUE(skewing.ok());
    const int32_t dim = model->config().head_dim;
    for (const LayerSkewing& layer : (*skewing)->layers) {
      for (int32_t head = 0; head < model->config().kv_heads; ++head) {
        const float* const a = layer.matrix.data() + head * dim * dim;
        for (int32_t i = 0; i < dim; i += 7) {
          for (int32_t j = 0; j < dim; ++j) {
            double dot = 0;
            for (int32_t k = 0; k < dim; ++k) dot += double{a[k * dim + i]} * a[k * dim + j];
            ASSERT_NEAR(dot, i == j, 1e-5);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvsweep
