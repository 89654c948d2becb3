// What InfiniGen takes and moves, to the byte, and what it records of its choices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "tests/worker/strategies/infinigen_lab.h"
#include "worker/engine/calibration.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {
namespace {

// Invariant: bytes over the link are those of the formula, exactly, both ways, counted where they
// are moved: to the device m rows of each speculating layer (of each head its own number) and n of
// each full one that is not resident; to the host each token's keys, values and partial keys.
TEST(InfinigenMemoryTest, LinkBytesAreTheFormula) {
  const std::vector<Variant> variants = {
      {"as it is", [](Infinigen*) {}},
      {"head scope", [](Infinigen* p) { p->set_count_scope(Infinigen::COUNT_SCOPE_HEAD); }},
      {"staged", [](Infinigen* p) { p->set_gather(Infinigen::GATHER_STAGED); }},
      {"resident", [](Infinigen* p) { p->set_full_layers_on_device(true); }},
      {"all", [](Infinigen* p) { p->set_fetch(Infinigen::FETCH_ALL); }},
      {"bounded", [](Infinigen* p) { p->set_capacity(0.5); }}};
  const LabShape shape{.rotary = true, .layers = 5, .group = 2, .kv_heads = 3, .head_dim = 64};
  for (const Variant& variant : variants) {
    for (const DType dtype : {DType::kF32, DType::kBf16}) {
      SCOPED_TRACE(variant.name);
      const auto backend = MakeBackend({.threads = 1});
      const auto model = MakeModel(backend.get(), shape);
      EngineOptions options = LabOptions();
      options.kv_dtype = dtype;
      const Arm arm = InfinigenWith({.alpha = 0.01, .max_kv_ratio = 0.3}, variant.change);
      Lab lab(backend.get(), model.get(), arm, options);
      for (RequestId id = 0; id < 3; ++id) lab.Start(id, 60 + 17 * id, 150);
      const bool all = arm.infinigen().fetch() == Infinigen::FETCH_ALL;
      const int32_t full = all ? 5 : 2;
      const uint64_t row = 2 * 64 * static_cast<uint64_t>(DTypeBytes(dtype));  // of one head
      for (int step = 0; step < 10; ++step) {
        lab.Decode({0, 1, 2});
        uint64_t rows = 0;
        for (RequestId id = 0; id < 3; ++id) {
          const uint64_t n = static_cast<uint64_t>(
              std::min(lab.held(id) - 1, InfinigenCapacity(arm.infinigen(), {60, 90})));
          if (!arm.infinigen().full_layers_on_device()) rows += full * 3 * n;
          const InfinigenHostScratch& host = lab.strategy().host_scratch();
          for (int32_t layer = full; layer < 5; ++layer) {
            for (int32_t head = 0; head < 3; ++head) {
              rows += static_cast<uint64_t>(host.selected[(layer * 4 + id) * 3 + head]);
            }
          }
        }
        EXPECT_EQ(lab.traffic().to_device, rows * row);
        const uint64_t partial = all ? 0 : 3 * 3 * 24 * static_cast<uint64_t>(DTypeBytes(dtype));
        EXPECT_EQ(lab.traffic().to_host, 3 * (5 * 3 * row + partial));
      }
    }
  }
}

// What the layout says is what the arenas take, to the byte, and a request's peak is reached.
TEST(InfinigenMemoryTest, TheLayoutIsWhatTheArenasTake) {
  Random random(31);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const LabShape shape = LabShapes()[random.Uniform(6)];
    const auto backend = MakeBackend({.threads = 1});
    const auto model = MakeModel(backend.get(), shape);
    const auto one_in = [&](uint64_t n) { return random.Uniform(n) == 0; };
    const Arm arm = InfinigenWith(
        {.partial_weight_ratio = 0.1 * (1 + static_cast<double>(random.Uniform(10))),
         .max_kv_ratio = 0.1 * static_cast<double>(random.Uniform(11)),
         .n_full_layers = 1 + static_cast<uint32_t>(random.Uniform(3))},
        [&](Infinigen* p) {
          if (one_in(2)) p->set_capacity(0.1 * (1 + static_cast<double>(random.Uniform(9))));
          p->set_eviction_policy(static_cast<Infinigen::EvictionPolicy>(random.Uniform(3)));
          p->set_full_layers_on_device(one_in(2));
          p->set_prefill_history(static_cast<Infinigen::PrefillHistory>(random.Uniform(3)));
          if (one_in(3)) p->set_gather(Infinigen::GATHER_STAGED);
          if (one_in(3)) p->set_force_fetch_ratio(0.3);
          if (one_in(4)) p->set_column_score(Infinigen::COLUMN_SCORE_UNION);
          if (one_in(4)) p->set_rope_speculation(Infinigen::ROPE_SPECULATION_PAIRED);
          if (one_in(4)) p->set_columns(Infinigen::COLUMNS_REQUEST);
          if (one_in(4)) p->set_skew(Infinigen::SKEW_FOLDED);
          if (one_in(5)) p->set_fetch(Infinigen::FETCH_ALL);
        });
    EngineOptions options = LabOptions();
    options.max_batched_tokens = 40 + static_cast<int32_t>(random.Uniform(100));
    options.device_bytes = uint64_t{8} << 20;
    options.host_bytes = uint64_t{3} << 20;
    options.kv_dtype = one_in(2) ? DType::kF32 : DType::kBf16;
    const std::vector<int32_t> calibration = RandomIds(random, 256, 97);
    const absl::Status status =
        InferenceEngine::CreateWith(
            backend.get(), model.get(), options,
            [&](const StrategyContext& given) -> absl::StatusOr<std::unique_ptr<CacheStrategy>> {
              StrategyContext context = given;
              context.calibrate = [&](int32_t tokens) {
                return CalibrateSkewing(backend.get(), model.get(),
                                        std::span(calibration).first(tokens));
              };
              const uint64_t device = backend->allocated_bytes(Tier::kDevice);
              const uint64_t host = backend->allocated_bytes(Tier::kHost);
              const uint64_t state = context.step_state->device_bytes();
              absl::StatusOr<std::unique_ptr<CacheStrategy>> made = MakeStrategy(arm, context);
              if (!made.ok()) return made.status();
              absl::StatusOr<InfinigenLayout> layout =
                  InfinigenLayoutOf(arm.infinigen(), static_cast<StrategySizes>(context));
              EXPECT_TRUE(layout.ok());
              const auto pages = static_cast<uint64_t>(layout->pages);
              EXPECT_EQ(backend->allocated_bytes(Tier::kDevice) - device +
                            context.step_state->device_bytes() - state,
                        layout->fixed_device_bytes + pages * layout->page_bytes);
              EXPECT_EQ(backend->allocated_bytes(Tier::kHost) - host,
                        layout->fixed_host_bytes +
                            static_cast<uint64_t>(layout->host_pages) * layout->host_page_bytes());
              return made;
            })
            .status();
    // Contradictions are refused before anything is taken.
    EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
  }
}

// A prompt's peak: on the device its history is reserved at admission and given back at its end.
TEST(InfinigenMemoryTest, APromptsHistoryIsReservedAtAdmission) {
  const auto backend = MakeBackend({.threads = 1});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(41);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  std::map<Infinigen::PrefillHistory, uint64_t> peaks;
  for (const auto history : {Infinigen::PREFILL_HISTORY_HOST, Infinigen::PREFILL_HISTORY_DEVICE}) {
    const Arm arm = InfinigenWith({}, [&](Infinigen* p) { p->set_prefill_history(history); });
    absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
        InferenceEngine::Create(backend.get(), model.get(), arm, SmallEngine(256), calibration);
    ASSERT_TRUE(engine.ok());
    KvManager& manager = (*engine)->manager();
    const RequestShape shape{200, 20};
    ASSERT_TRUE(manager.Admit(0, shape, 64));
    const uint64_t first = manager.RequestBytes(0).device;
    ASSERT_TRUE(manager.Grow(0, 200));
    peaks[history] = manager.RequestBytes(0).device;
    EXPECT_LE(peaks[history], manager.PeakBytes(shape).device);
    manager.EndPrompt(0);
    // kappa of 200 tokens, in whole pages for each of 5 layers.
    const uint64_t given_back = peaks[history] - manager.RequestBytes(0).device;
    if (history == Infinigen::PREFILL_HISTORY_HOST) {
      EXPECT_EQ(given_back, 0u);
    } else {
      EXPECT_EQ(peaks[history], manager.PeakBytes(shape).device);
      EXPECT_GE(first, given_back) << "taken at admission";
      EXPECT_GE(given_back, 200u * 5 * 2 * 4 * 8 * sizeof(float));
    }
  }
}

// --------------------------------------------------------------------------------------- diagnosis

// Invariant: recall and covered mass rise with the ratio, and with all columns the recall is still
// below 1, since the input is another layer's; with the true input it is 1.
TEST(InfinigenDiagnosisTest, RecallAndCoveredMassRiseWithTheRatio) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "books-opt-16m");
  const std::vector<int32_t> text = HeldOutIds("books-opt-16m");
  EngineOptions options = LabOptions();
  options.max_context = 320;
  struct Mean {
    double recall = 0;
    double mass = 0;
    double cosine = 0;
  };
  const auto measure = [&](double ratio, bool oracle) {
    // As many entries for every ratio, so that shares compare.
    Lab lab(backend.get(), model.get(),
            InfinigenArm({.partial_weight_ratio = ratio,
                          .alpha = std::numeric_limits<double>::infinity(),
                          .max_kv_ratio = 0.1}),
            options, text);
    if (oracle) lab.strategy().UseOracleInput();
    lab.strategy().Diagnose();
    for (RequestId id = 0; id < 4; ++id) lab.Start(id, 240 + 9 * id, 320);
    for (int step = 0; step < 48; ++step) lab.Decode({0, 1, 2, 3});
    Mean mean;
    std::map<std::string, int> layers;
    for (const CacheStrategy::Figure& figure : lab.strategy().Figures()) {
      ++layers[figure.name];
      if (figure.name == "speculation_recall") mean.recall += figure.value / 6;
      if (figure.name == "covered_mass") mean.mass += figure.value / 6;
      if (figure.name == "input_cosine") mean.cosine += figure.value / 7;
    }
    EXPECT_EQ(layers, (std::map<std::string, int>{{"partial_columns", 6},
                                                  {"fetched_entries", 6},
                                                  {"speculation_recall", 6},
                                                  {"covered_mass", 6},
                                                  {"input_cosine", 7}}));
    EXPECT_GT(mean.cosine, 0.5);
    EXPECT_LT(mean.cosine, 1.0);
    EXPECT_LE(mean.mass, 1.0 + 1e-9);
    return mean;
  };
  const Mean thin = measure(0.1, false);
  const Mean usual = measure(0.3, false);
  const Mean all = measure(1.0, false);
  EXPECT_LT(thin.recall, usual.recall);
  EXPECT_LE(usual.recall, all.recall + 0.01);
  EXPECT_LT(thin.mass, usual.mass + 0.005);
  EXPECT_LE(usual.mass, all.mass + 0.005);
  EXPECT_LT(all.recall, 0.999);
  // Near-ties may fall either way by rounding.
  EXPECT_GT(measure(1.0, true).recall, 0.999);
}

TEST(InfinigenDiagnosisTest, CountsByHand) {
  // One KV head shared by two queries, d = 1; keys 1, 2, 3 and a current one of 0.
  const std::vector<float> query = {1, -1};
  const std::vector<float> keys = {1, 2, 3};
  const std::vector<float> current = {0};
  const SelectionMatch match = MatchSelection({.query = query,
                                               .keys = keys,
                                               .current_key = current,
                                               .selected = {{1, 2}},
                                               .query_heads = 2,
                                               .kv_heads = 1,
                                               .head_dim = 1});
  // Margins: of the first query -2, -1, 0; of the second 0, -1, -2. Best two: slots 0 and 2.
  EXPECT_DOUBLE_EQ(match.recall, 0.5);
  const double e = std::exp(1);
  const double first = (e * e + e * e * e + 1) / (e + e * e + e * e * e + 1);
  const double second =
      (1 / (e * e) + 1 / (e * e * e) + 1) / (1 / e + 1 / (e * e) + 1 / (e * e * e) + 1);
  EXPECT_NEAR(match.covered_mass, (first + second) / 2, 1e-12);
  EXPECT_NEAR(Cosine(query, std::vector<float>{1, 1}), 0, 1e-12);
}

}  // namespace
}  // namespace kvsweep
