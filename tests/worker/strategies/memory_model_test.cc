#include "worker/strategies/memory_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/worker/engine/engine_fixture.h"
#include "worker/engine/shape_catalogue.h"
#include "worker/strategies/catalogue.h"
#include "worker/strategies/tile_ring.h"

namespace kvsweep {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;

StrategySizes SizesOf(const ModelConfig& config, DType kv_dtype) {
  return {.shape = config.shape(),
          .kv_dtype = kv_dtype,
          .device_bytes = uint64_t{24} << 20,
          .host_bytes = uint64_t{48} << 20,
          .max_sequences = 6,
          .max_context = 384,
          .max_rows = 128,
          .max_decode_rows = PaddedDecodeRows(6)};
}

Arm StreamingLlmArm(double window_ratio) {
  Arm arm;
  arm.set_strategy("streaming_llm");
  arm.mutable_streaming_llm()->set_sink_tokens(4);
  arm.mutable_streaming_llm()->set_window_ratio(window_ratio);
  return arm;
}

// One of each kind whose memory has a shape of its own.
std::vector<Arm> Arms() {
  std::vector<Arm> arms = {PagedArm(),         PagedArm(64),         H2oArm(0.1, 0.1),
                           H2oArm(0.1, 0.1),   StreamingLlmArm(0.2), InfinigenArm({}),
                           AmpleInfinigenArm()};
  arms[3].mutable_h2o()->set_full_layers(2);
  return arms;
}

class MemoryModelTest : public testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = MakeBackend();
  std::unique_ptr<LoadedModel> model_ = LoadModel(backend_.get(), "stories260K");
};

// The strategy in an engine takes from the backend what the model says without one: fixed bytes,
// pages, and every request's share of them.
TEST_F(MemoryModelTest, IsWhatTheArenasTake) {
  for (const Arm& arm : Arms()) {
    SCOPED_TRACE(arm.ShortDebugString());
    const StrategySizes sizes = SizesOf(model_->config(), DType::kF32);
    absl::StatusOr<MemoryModel> memory = MemoryModel::Create(arm, sizes, 128);
    ASSERT_TRUE(memory.ok()) << memory.status();

    const std::vector<int32_t> calibration(256, 5);
    auto engine = InferenceEngine::Create(backend_.get(), model_.get(), arm,
                                          {.max_sequences = sizes.max_sequences,
                                           .max_batched_tokens = sizes.max_rows,
                                           .max_context = sizes.max_context,
                                           .device_bytes = sizes.device_bytes,
                                           .host_bytes = sizes.host_bytes},
                                          calibration);
    ASSERT_TRUE(engine.ok()) << engine.status();
    KvManager& manager = (*engine)->manager();
    EXPECT_EQ(manager.FixedBytes(), memory->fixed());
    Random random(7);
    for (int i = 0; i < 200; ++i) {
      const auto prompt = static_cast<int32_t>(1 + random.Uniform(383));
      const RequestShape shape{prompt, static_cast<int32_t>(1 + random.Uniform(384u - prompt))};
      EXPECT_EQ(manager.PeakBytes(shape), memory->PeakBytes(shape)) << prompt;
    }
    EXPECT_GE(memory->FitAtOnce({300, 80}), 1);
    absl::StatusOr<std::unique_ptr<KvManager>> other = MakeManager(arm, sizes);
    ASSERT_TRUE(other.ok());
    EXPECT_EQ((*other)->ReservedBytes(), manager.ReservedBytes());
  }
}

// Pages are handed out until the budget is used up to less than a page of each kind.
TEST_F(MemoryModelTest, TheLastRequestThatFitsLeavesNoRoomForAnother) {
  StrategySizes sizes = SizesOf(model_->config(), DType::kF32);
  sizes.max_sequences = 64;
  sizes.max_decode_rows = 64;
  sizes.device_bytes = uint64_t{4} << 20;
  for (const Arm& arm : Arms()) {
    SCOPED_TRACE(arm.ShortDebugString());
    absl::StatusOr<MemoryModel> memory = MemoryModel::Create(arm, sizes, 128);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const RequestShape shape{250, 100};
    const int32_t fit = memory->FitAtOnce(shape);
    ASSERT_GE(fit, 1);
    EXPECT_EQ(memory->FitAtOnce(shape), fit) << "asking changes nothing";
    const RequestMemory one = memory->Follow(shape);
    const auto all_but_one = static_cast<uint64_t>(fit - 1);
    EXPECT_LE(memory->fixed().device + one.at_end.device + all_but_one * one.at_end.device,
              sizes.device_bytes);
    EXPECT_LE(memory->fixed().host + static_cast<uint64_t>(fit) * one.at_end.host,
              sizes.host_bytes);
    EXPECT_LE(one.at_end.device, memory->PeakBytes(shape).device);
    EXPECT_LE(one.prompt_peak.device, memory->PeakBytes(shape).device);
    EXPECT_FALSE(memory->CanRun({300, 100})) << "longer than the trial's longest";
  }
}

// The closed formulas, to the byte, with kappa = 2 L Hk d s.
TEST_F(MemoryModelTest, ClosedFormulas) {
  const ModelConfig& config = model_->config();
  const StrategySizes sizes = SizesOf(config, DType::kF16);
  const auto kappa = static_cast<uint64_t>(config.KvBytesPerToken(DType::kF16));
  const auto in_pages = [](uint64_t tokens, uint64_t page) {
    return (tokens + page - 1) / page * page;
  };
  const RequestShape shape{200, 120};

  MemoryModel paged = *MemoryModel::Create(PagedArm(16), sizes, 128);
  // The last token is never stored.
  EXPECT_EQ(paged.Follow(shape).at_end.device, in_pages(319, 16) * kappa);
  EXPECT_EQ(paged.Follow(shape).after_prompt.device, in_pages(200, 16) * kappa);
  EXPECT_EQ(paged.Follow(shape).at_end.host, 0u);

  // C = 2 floor(0.2 * 320 / 2) = 64 slots of keys, values, a score and a position for each head.
  MemoryModel h2o = *MemoryModel::Create(H2oArm(0.1, 0.1), sizes, 128);
  const uint64_t slot = kappa + 8 * static_cast<uint64_t>(config.layers * config.kv_heads);
  EXPECT_EQ(h2o.Follow(shape).at_end.device, in_pages(64, 16) * slot);
  EXPECT_EQ(h2o.Follow(shape).after_prompt.device, in_pages(64, 16) * slot) << "constant in output";
  EXPECT_EQ(h2o.PeakBytes(shape).device, in_pages(200, 16) * slot) << "the whole prompt, once";
  EXPECT_EQ(h2o.Follow(shape).at_end.host, 0u);
}

// A reservation for the length that a request will have holds that length and no more, however much
// longer its limit is.
TEST_F(MemoryModelTest, ARequestOfKnownLengthEndsThere) {
  const ModelConfig& config = model_->config();
  const StrategySizes sizes = SizesOf(config, DType::kF16);
  const auto kappa = static_cast<uint64_t>(config.KvBytesPerToken(DType::kF16));
  const RequestShape shape{.prompt_tokens = 200, .max_tokens = 120, .oracle_tokens = 240};
  Arm reserved = PagedArm(16);
  for (const auto reservation :
       {Paged::RESERVATION_PAGED, Paged::RESERVATION_POW2, Paged::RESERVATION_ORACLE}) {
    reserved.mutable_paged()->set_reservation(reservation);
    MemoryModel memory = *MemoryModel::Create(reserved, sizes, 128);
    const uint64_t tokens = reservation == Paged::RESERVATION_POW2 ? 272 : 240;
    EXPECT_EQ(memory.Follow(shape).at_end.device, tokens * kappa) << reservation;
  }
}

TEST(KvDtypeTest, TheModelsOwnButInTheFormatThatIsComputedWhereThatIsAsWide) {
  Kv kv;
  EXPECT_EQ(KvDtype(kv, DType::kF16, DType::kF32), DType::kF16);
  EXPECT_EQ(KvDtype(kv, DType::kF16, DType::kBf16), DType::kBf16);
  EXPECT_EQ(KvDtype(kv, DType::kF32, DType::kBf16), DType::kF32);
  kv.set_dtype(Kv::DTYPE_F16);
  EXPECT_EQ(KvDtype(kv, DType::kBf16, DType::kBf16), DType::kF16);
}

TEST(RingTokensTest, TilesAreLongWhereTheBudgetIsLarge) {
  constexpr uint64_t kToken = 16384;
  EXPECT_EQ(RingTokens(256, 100000, kToken, uint64_t{1} << 30), 256);
  EXPECT_EQ(RingTokens(256, 100000, kToken, (uint64_t{1} << 30) + 1), 1024);
  EXPECT_EQ(RingTokens(256, 700, kToken, uint64_t{20} << 30), 700);
  EXPECT_EQ(RingTokens(2048, 100000, kToken, uint64_t{20} << 30), 2048);
}

// Savings that H2O's published logs show, by the manager's own bytes: slabs are whole pages, and
// scores and positions cost 8 bytes a head, so they are up to 1.5 % below keys and values alone.
TEST(PublishedMemoryTest, H2oSavesWhatItsLogsShow) {
  struct Check {
    const char* shape;
    int32_t batch, prompt, output;
    double saved_gib;
  };
  for (const Check& check :
       {Check{"opt-6.7b", 24, 2048, 2048, 38.41}, Check{"opt-13b", 4, 5000, 5000, 24.41}}) {
    SCOPED_TRACE(check.shape);
    const absl::StatusOr<ModelConfig> config = FindShape(check.shape);
    ASSERT_TRUE(config.ok()) << config.status();
    StrategySizes sizes = SizesOf(*config, DType::kF16);
    sizes.device_bytes = uint64_t{100} << 30;
    sizes.max_context = check.prompt + check.output;
    sizes.max_sequences = check.batch;
    sizes.max_decode_rows = PaddedDecodeRows(check.batch);
    Arm arm = H2oArm(0.2, 0.2);  // of the prompt: its program's --hh-ratio 0.2
    arm.mutable_h2o()->set_budget_base(BUDGET_BASE_PROMPT);
    arm.mutable_h2o()->set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
    MemoryModel h2o = *MemoryModel::Create(arm, sizes, 512);
    MemoryModel full = *MemoryModel::Create(PagedArm(16), sizes, 512);
    const RequestShape shape{check.prompt, check.output};
    const double saved =
        check.batch *
        static_cast<double>(full.Follow(shape).at_end.device - h2o.Follow(shape).at_end.device) /
        kGiB;
    EXPECT_NEAR(saved, check.saved_gib, 0.015 * check.saved_gib);
    // Keys and values alone: C + 1 = 2 floor(0.2 P) of them instead of P + G.
    const double kappa = static_cast<double>(config->KvBytesPerToken(DType::kF16));
    const double kept = 2 * std::floor(0.2 * check.prompt);
    EXPECT_NEAR(check.batch * kappa * (shape.limit() - kept) / kGiB, check.saved_gib, 0.005);
  }
}

}  // namespace
}  // namespace kvsweep
