// Random runs of the batcher over every strategy's KV manager: whatever comes, budgets hold, what
// was taken is given back, every request ends. Paged has more to show in paged_manager_test.
#include "tests/worker/strategies/manager_runs.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>

#include "base/check.h"
#include "worker/strategies/h2o_manager.h"
#include "worker/strategies/infinigen_layout.h"
#include "worker/strategies/infinigen_manager.h"
#include "worker/strategies/streaming_llm.h"

namespace kvsweep {
namespace {

using MakeManager = std::function<std::unique_ptr<KvManager>(const StrategySizes&)>;

MakeManager MakeH2o(const H2o& parameters) {
  return [parameters](const StrategySizes& sizes) {
    return std::make_unique<H2oManager>(*H2oLayoutOf(parameters, sizes));
  };
}

MakeManager MakeInfinigen(const Infinigen& parameters) {
  return [parameters](const StrategySizes& sizes) {
    return std::make_unique<InfinigenManager>(*InfinigenLayoutOf(parameters, sizes));
  };
}

std::map<std::string, MakeManager> Ways() {
  std::map<std::string, MakeManager> ways;
  H2o h2o;
  h2o.set_heavy_ratio(0.1);
  h2o.set_recent_ratio(0.2);
  h2o.set_preemption(H2o::PREEMPTION_NONE);
  ways["h2o_reserved"] = MakeH2o(h2o);
  // A large budget is filled token by token, so that there is something to run out of.
  h2o.set_heavy_ratio(0.4);
  h2o.set_recent_ratio(0.5);
  h2o.set_preemption(H2o::PREEMPTION_SWAP);
  ways["h2o_swap"] = MakeH2o(h2o);
  h2o.set_preemption(H2o::PREEMPTION_RECOMPUTE);
  ways["h2o_recompute"] = MakeH2o(h2o);
  Infinigen infinigen;
  infinigen.set_partial_weight_ratio(0.3);
  infinigen.set_alpha(4);
  infinigen.set_max_kv_ratio(0.3);
  infinigen.set_n_full_layers(1);
  infinigen.set_capacity(1);
  ways["infinigen"] = MakeInfinigen(infinigen);
  StreamingLlm streaming;
  streaming.set_sink_tokens(4);
  ways["streaming_llm"] = [streaming](const StrategySizes& sizes) {
    return std::make_unique<H2oManager>(*StreamingLlmLayoutOf(streaming, sizes));
  };
  return ways;
}

class ManagerRunsTest : public testing::TestWithParam<std::string> {};

StrategySizes AmpleSizes() {
  return {.shape = {.layers = 3,
                    .hidden_size = 32,
                    .query_heads = 4,
                    .kv_heads = 2,
                    .head_dim = 8,
                    .max_positions = 400},
          .device_bytes = uint64_t{1} << 30,
          .host_bytes = uint64_t{1} << 30,
          .max_sequences = 8,
          .max_context = 200,
          .max_rows = 256,
          .max_decode_rows = 8};
}

RunCounts RunWay(const MakeManager& make, uint64_t seed) {
  Random random(seed);
  const auto draw = [&](int32_t least, int32_t most) {
    return least + static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(most - least + 1)));
  };
  const int32_t sequences = draw(3, 8);
  StrategySizes sizes = AmpleSizes();
  sizes.max_sequences = sizes.max_decode_rows = sequences;
  // Between what one of the longest requests needs and what several do.
  const RequestShape longest{60, 80, 140};
  const std::unique_ptr<KvManager> ample = make(sizes);
  TierBytes budget = ample->FixedBytes();
  for (int32_t part = draw(4, 14); part > 0; --part) {
    budget.device += (ample->PeakBytes(longest).device + 3) / 4;
    budget.host += (ample->PeakBytes(longest).host + 3) / 4;
  }
  // Fixed structures depend a little on the budget.
  budget.device += 4000;
  budget.host = 4000 + 4 * budget.host + budget.device / 2;
  sizes.device_bytes = budget.device;
  sizes.host_bytes = budget.host;
  const std::unique_ptr<KvManager> manager = make(sizes);
  const RunOptions options{.seed = seed,
                           .batcher = {.max_sequences = sequences,
                                       .max_batched_tokens = draw(128, 256),
                                       .chunk_alignment = 128,
                                       .chunked_prefill = random.Bernoulli(0.75),
                                       .budget = budget},
                           .requests = draw(20, 60),
                           .longest_prompt = 60,
                           .longest_output = 80};
  ManagerRun run(options, manager.get(), nullptr);
  return run.Run();
}

TEST_P(ManagerRunsTest, EveryRequestEndsWithinTheBudgets) {
  const MakeManager make = Ways().at(GetParam());
  RunCounts counts;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(testing::Message() << GetParam() << " seed " << seed);
    counts += RunWay(make, seed);
    if (HasFailure()) return;
  }
  std::printf("%s: 200 runs, %lld steps, %lld preemptions, %lld resumed, %lld refused\n",
              GetParam().c_str(), static_cast<long long>(counts.steps),
              static_cast<long long>(counts.preemptions), static_cast<long long>(counts.resumed),
              static_cast<long long>(counts.refused));
  EXPECT_GT(counts.steps, 50'000);
  if (make(AmpleSizes())->preemption_mode() != PreemptionMode::kNone) {
    EXPECT_GT(counts.preemptions, 100);
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, ManagerRunsTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const auto& [name, make] : Ways()) names.push_back(name);
                           return names;
                         }()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvsweep
