// StreamingLLM against its definition: the first tokens and a window of the last, at their places
// in the cache or where they stood.
#include "worker/strategies/streaming_llm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/worker/engine/engine_fixture.h"
#include "tests/worker/strategies/attention_harness.h"
#include "tests/worker/strategies/h2o_oracle.h"

namespace kvsweep {
namespace {

Arm StreamingArm(uint32_t sinks, uint32_t window, bool in_cache) {
  Arm arm;
  arm.set_strategy("streaming_llm");
  arm.mutable_streaming_llm()->set_sink_tokens(sinks);
  arm.mutable_streaming_llm()->set_window_size(window);
  arm.mutable_streaming_llm()->set_positions(in_cache ? StreamingLlm::POSITIONS_CACHE
                                                      : StreamingLlm::POSITIONS_ORIGINAL);
  return arm;
}

// The oracle of H2O knows it as sinks and a window.
H2o Definition(uint32_t sinks, uint32_t window, bool in_cache) {
  H2o h2o;
  h2o.set_heavy_size(0);
  h2o.set_recent_size(window);
  h2o.set_sink_tokens(sinks);
  h2o.set_positions(in_cache ? H2o::POSITIONS_ROLLING : H2o::POSITIONS_ORIGINAL);
  return h2o;
}

double Difference(const std::vector<float>& row, const std::vector<double>& expected) {
  double largest = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    largest = std::max(largest, std::abs(row[i] - expected[i]));
  }
  return largest;
}

TEST(StreamingLlmTest, IsItsDefinition) {
  for (const HarnessShape& shape :
       {HarnessShape{.layers = 2, .query_heads = 2, .kv_heads = 2},
        HarnessShape{.layers = 1, .query_heads = 7, .kv_heads = 1, .head_dim = 64},
        HarnessShape{.layers = 2, .query_heads = 6, .kv_heads = 2, .rotary = false}}) {
    for (const bool in_cache : {true, false}) {
      for (const auto& [sinks, window] : {std::pair{4u, 13u}, {0u, 9u}, {1u, 2u}, {8u, 64u}}) {
        SCOPED_TRACE(absl::StrCat("sinks ", sinks, " window ", window, " in_cache ", in_cache,
                                  " rotary ", shape.rotary));
        // Learned positions cannot be re-assigned: they stay.
        const H2o definition = Definition(sinks, window, in_cache && shape.rotary);
        AttentionHarness harness(shape, StreamingArm(sinks, window, in_cache),
                                 {.max_context = 128, .max_rows = 128});
        ASSERT_TRUE(harness.status().ok()) << harness.status();
        std::vector<RequestShape> requests = {{47, 40}, {5, 40}};
        std::vector<std::vector<H2oOracle>> oracles(requests.size());
        for (RequestId id = 0; id < 2; ++id) {
          const RequestShape& request = requests[static_cast<size_t>(id)];
          const H2oBudget budget = H2oBudgetOf(definition, request);
          harness.prompt_outputs.clear();
          harness.Prefill(id, request, 20);
          for (int32_t layer = 0; layer < shape.layers; ++layer) {
            H2oOracle& oracle = oracles[static_cast<size_t>(id)].emplace_back(
                definition, shape, harness.frequency(), budget, false);
            for (int32_t t = 0; t < request.prompt_tokens; ++t) {
              const std::vector<double> expected =
                  oracle.Attend(InventToken(shape, static_cast<uint64_t>(id), t, layer), t);
              ASSERT_LT(
                  Difference(harness.prompt_outputs[static_cast<size_t>(
                                 t / 20)][static_cast<size_t>(layer)][static_cast<size_t>(t % 20)],
                             expected),
                  1e-4)
                  << t;
            }
            oracle.Prune();
          }
        }
        for (int32_t step = 0; step < 39; ++step) {
          std::vector<Segment> segments;
          for (RequestId id = 0; id < 2; ++id) {
            const int32_t position = requests[static_cast<size_t>(id)].prompt_tokens + step;
            ASSERT_TRUE(harness.manager().Grow(id, position + 1));
            segments.push_back(harness.DecodeToken(id, position));
          }
          const auto outputs = harness.Step(segments, {}, 2);
          for (RequestId id = 0; id < 2; ++id) {
            const int32_t position = requests[static_cast<size_t>(id)].prompt_tokens + step;
            for (int32_t layer = 0; layer < shape.layers; ++layer) {
              H2oOracle& oracle = oracles[static_cast<size_t>(id)][static_cast<size_t>(layer)];
              const std::vector<double> expected = oracle.Attend(
                  InventToken(shape, static_cast<uint64_t>(id), position, layer), position);
              oracle.Evict();
              ASSERT_LT(Difference(outputs[static_cast<size_t>(layer)][static_cast<size_t>(id)],
                                   expected),
                        1e-4)
                  << "step " << step << " request " << id << " layer " << layer;
            }
          }
        }
      }
    }
  }
}

// Without sinks and with the positions where they stood it is h2o without heavy hitters.
TEST(StreamingLlmTest, WithoutSinksItIsThePlainWindow) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  for (const char* name : {"books-llama-14m", "books-opt-16m"}) {
    const auto model = LoadModel(backend.get(), name);
    Random random(4);
    const std::vector<TestRequest> requests = {
        {.prompt = RandomIds(random, 70, 4096), .output_tokens = 30},
        {.prompt = RandomIds(random, 11, 4096), .output_tokens = 50}};
    Arm window = H2oArm(0, 0.2);
    window.mutable_h2o()->set_heavy_size(0);
    window.mutable_h2o()->set_recent_size(24);
    const absl::StatusOr<TestRun> plain =
        RunRequests(backend.get(), *model, window, SmallEngine(128), requests, {});
    ASSERT_TRUE(plain.ok()) << plain.status();
    const absl::StatusOr<TestRun> streaming = RunRequests(
        backend.get(), *model, StreamingArm(0, 24, false), SmallEngine(128), requests, {});
    ASSERT_TRUE(streaming.ok()) << streaming.status();
    EXPECT_EQ(streaming->outputs, plain->outputs) << name;
    EXPECT_EQ(streaming->attended, plain->attended) << name;
  }
}

TEST(StreamingLlmTest, TheArenaIsTheLayouts) {
  for (const bool in_cache : {true, false}) {
    const Arm arm = StreamingArm(4, 20, in_cache);
    AttentionHarness harness({.layers = 3}, arm, {.max_context = 200, .device_bytes = 1'000'000});
    ASSERT_TRUE(harness.status().ok()) << harness.status();
    const absl::StatusOr<H2oLayout> layout =
        StreamingLlmLayoutOf(arm.streaming_llm(), harness.sizes());
    ASSERT_TRUE(layout.ok());
    EXPECT_EQ(harness.allocated().device,
              layout->fixed_bytes + static_cast<uint64_t>(layout->pages) * layout->page_bytes());
    EXPECT_EQ(layout->slot_bytes, 3u * 2 * 2 * 8 * 4) << "keys and values alone";
    EXPECT_EQ(harness.allocated().host, 0u);
  }
}

TEST(StreamingLlmTest, RatiosAreTheTokensOfEveryOtherArm) {
  StreamingLlm parameters;
  parameters.set_sink_tokens(4);
  parameters.set_window_ratio(0.2);
  Arm arm;
  arm.set_strategy("streaming_llm");
  *arm.mutable_streaming_llm() = parameters;
  AttentionHarness harness({}, arm, {.max_context = 640});
  ASSERT_TRUE(harness.status().ok());
  EXPECT_EQ(harness.strategy().TokenBudget({500, 139}), 126);
  EXPECT_EQ(harness.strategy().TokenBudget({500, 140}), 128);
  EXPECT_EQ(harness.strategy().PromptEvictions({500, 140}, 500), 372);
  EXPECT_TRUE(harness.strategy().EngagementExpected({500, 140}, 130));
  EXPECT_FALSE(harness.strategy().EngagementExpected({500, 140}, 129)) << "128 are stored";
  EXPECT_FALSE(harness.strategy().EngagementExpected({100, 540}, 128));
}

}  // namespace
}  // namespace kvsweep
