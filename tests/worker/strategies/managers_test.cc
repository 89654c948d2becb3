// The strategies' accounts: what a manager says it takes is what lies in the arena, to the byte;
// random runs never lose a page; budgets and selections are what the parameters say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <vector>

#include "tests/worker/engine/engine_fixture.h"
#include "worker/strategies/h2o.h"
#include "worker/strategies/infinigen.h"
#include "worker/strategies/paged.h"
#include "worker/strategies/token_budget.h"

namespace kvsweep {
namespace {

TEST(TokenBudgetTest, EqualRatiosAreEqualTokens) {
  EXPECT_EQ(BudgetTokens(0.2, 640, 1), 128);
  EXPECT_EQ(BudgetBaseTokens(BUDGET_BASE_PROMPT, 0, {100, 900}), 100);
  // Preempted after 800 tokens: these are no more of a prompt than they were.
  EXPECT_EQ(BudgetBaseTokens(BUDGET_BASE_PROMPT, 0, {900, 100, 0, 800}), 100);
  EXPECT_EQ(BudgetTokens(0.2, 639, 1), 126);  // 2 * floor(63.9)
  EXPECT_EQ(BudgetTokens(0.0, 640, 2), 2);
  const H2o h2o = H2oArm(0.1, 0.1).h2o();
  EXPECT_EQ(H2oBudgetOf(h2o, {500, 140}).total(), 128);
  EXPECT_EQ(H2oBudgetOf(h2o, {500, 140}).heavy, 64);
  EXPECT_EQ(InfinigenFetchLimit(InfinigenArm({.max_kv_ratio = 0.2}).infinigen(), {500, 140}), 128);
}

TEST(TokenBudgetTest, TheBaseIsWhatItsNameSays) {
  H2o h2o = H2oArm(0.1, 0.3).h2o();
  h2o.set_budget_base(BUDGET_BASE_PROMPT);
  EXPECT_EQ(H2oBudgetOf(h2o, {100, 900}).total(), 40);
  EXPECT_EQ(H2oBudgetOf(h2o, {100, 900}).heavy, 10);
  h2o.set_budget_base(BUDGET_BASE_FIXED);
  h2o.set_budget_tokens(256);
  EXPECT_EQ(H2oBudgetOf(h2o, {100, 900}).total(), 102);
}

TEST(TokenBudgetTest, NoHeavyHittersIsAWindow) {
  const H2oBudget budget = H2oBudgetOf(H2oArm(0, 0.2).h2o(), {500, 140});
  EXPECT_EQ(budget.heavy, 0);
  EXPECT_EQ(budget.recent, 128);
}

// A manager over invented sizes, for random runs without a tensor.
std::unique_ptr<KvManager> MakeManager(const std::string& strategy, int32_t pages) {
  if (strategy == "paged") {
    return std::make_unique<PagedManager>(
        PagedLayout{.block_size = 16, .token_bytes = 4096, .fixed_bytes = 1000, .pages = pages});
  }
  if (strategy == "h2o") {
    return std::make_unique<H2oManager>(H2oLayout{.parameters = H2oArm(0.1, 0.1).h2o(),
                                                  .slot_bytes = 4224,
                                                  .fixed_bytes = 1000,
                                                  .pages = pages});
  }
  return std::make_unique<InfinigenManager>(
      InfinigenLayout{.parameters = InfinigenArm({}).infinigen(),
                      .layers = 8,
                      .full_layers = 2,
                      .page_tokens = 16,
                      .fetch_page_rows = 18,
                      .partial_token_bytes = 576,
                      .key_value_token_bytes = 4096,
                      .page_bytes = 16 * 576,
                      .fixed_device_bytes = 1000,
                      .fixed_host_bytes = 100,
                      .pages = pages,
                      .host_pages = 4 * pages});
}

class ManagerTest : public testing::TestWithParam<std::string> {};

// A million steps in all over the three: whatever comes, in use plus free is constant and budgets
// hold.
TEST_P(ManagerTest, RandomLivesConserveMemory) {
  constexpr int kRuns = 70;
  constexpr int kSteps = 5000;
  for (uint64_t seed = 1; seed <= kRuns; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    const std::unique_ptr<KvManager> manager = MakeManager(GetParam(), 60);
    struct Life {
      RequestShape shape;
      int32_t tokens = 0;
      bool prompt_ended = false;
      bool offloaded = false;
    };
    std::map<RequestId, Life> lives;
    RequestId next = 0;
    for (int step = 0; step < kSteps; ++step) {
      auto chosen = lives.begin();
      if (!lives.empty()) std::advance(chosen, random.Uniform(lives.size()));
      const uint64_t what = random.Uniform(10);
      if (lives.empty() || what == 0) {
        const RequestShape shape{1 + static_cast<int32_t>(random.Uniform(300)),
                                 1 + static_cast<int32_t>(random.Uniform(200))};
        const int32_t first = 1 + static_cast<int32_t>(random.Uniform(shape.prompt_tokens));
        if (manager->Admit(next, shape, first)) lives[next++] = {shape, first};
        continue;
      }
      auto& [id, life] = *chosen;
      if (life.offloaded) {
        if (manager->Resume(id, life.tokens)) life.offloaded = false;
      } else if (what == 1) {
        manager->Release(id);
        lives.erase(chosen);
      } else if (what == 2 &&
                 (!life.prompt_ended || manager->preemption_mode() != PreemptionMode::kNone)) {
        const bool keeps =
            life.prompt_ended && manager->preemption_mode() == PreemptionMode::kOffload;
        manager->Preempt(id);
        if (keeps) {
          life.offloaded = true;
        } else {
          lives.erase(chosen);
        }
      } else if (!life.prompt_ended) {
        if (life.tokens == life.shape.prompt_tokens) {
          manager->EndPrompt(id);
          life.prompt_ended = true;
        } else {
          const int32_t more =
              1 + static_cast<int32_t>(random.Uniform(life.shape.prompt_tokens - life.tokens));
          if (manager->Grow(id, life.tokens + more)) life.tokens += more;
        }
      } else if (life.tokens < life.shape.limit() - 1) {
        if (manager->Grow(id, life.tokens + 1)) ++life.tokens;
      }
      if (step % 16 == 0) {
        manager->CheckInvariants();
        TierBytes sum = manager->FixedBytes();
        for (const auto& [held, unused] : lives) {
          sum += manager->RequestBytes(held);
          ASSERT_LE(manager->RequestBytes(held).device,
                    manager->PeakBytes(lives[held].shape).device);
          ASSERT_LE(manager->RequestBytes(held).host, manager->PeakBytes(lives[held].shape).host);
        }
        ASSERT_EQ(sum, manager->ReservedBytes());
        ASSERT_LE(manager->LiveBytes().device, manager->ReservedBytes().device);
        ASSERT_LE(manager->LiveBytes().host, manager->ReservedBytes().host);
      }
    }
    for (const auto& [id, life] : lives) manager->Release(id);
    EXPECT_EQ(manager->ReservedBytes(), manager->FixedBytes());
  }
}

TEST_P(ManagerTest, AdmitsWhatJustFitsAndNothingMore) {
  const RequestShape shape{160, 32};
  const uint64_t peak_device = MakeManager(GetParam(), 60)->PeakBytes(shape).device;
  const uint64_t page =
      MakeManager(GetParam(), 60)->PeakBytes({1, 1}).device / (GetParam() == "infinigen" ? 3 : 1);
  const auto pages = static_cast<int32_t>(peak_device / page);
  const std::unique_ptr<KvManager> exact = MakeManager(GetParam(), pages);
  EXPECT_TRUE(exact->Admit(0, shape, 160));
  EXPECT_TRUE(exact->Grow(0, 160));
  exact->EndPrompt(0);
  for (int32_t tokens = 161; tokens < shape.limit(); ++tokens) {
    EXPECT_TRUE(exact->Grow(0, tokens)) << tokens;
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, ManagerTest, testing::Values("paged", "h2o", "infinigen"));

// Memory while a real engine runs: H2O's bytes are constant in the output's length once its prompt
// has ended; what the managers reserve fits what the backend has allocated for them.
TEST(MemoryTest, H2oBytesAreConstantInTheOutput) {
  const auto backend = MakeBackend({.threads = 1});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(9);
  const std::vector<int32_t> prompt = RandomIds(random, 100, 512);
  std::set<uint64_t> reserved;
  absl::StatusOr<std::unique_ptr<InferenceEngine>> created =
      InferenceEngine::Create(backend.get(), model.get(), H2oArm(0.1, 0.1), SmallEngine(256), {});
  ASSERT_TRUE(created.ok());
  InferenceEngine& engine = **created;
  Batcher batcher({.max_sequences = 8,
                   .max_batched_tokens = 256,
                   .chunk_alignment = engine.chunk_alignment(),
                   .budget = {256 << 20, 256 << 20}},
                  &engine.manager());
  engine.AddSequence(0, prompt, 100);
  ASSERT_TRUE(batcher.Add(0, {100, 150}, 150));
  double attended = 0;
  while (!batcher.idle()) {
    const StepPlan& plan = batcher.Plan();
    ASSERT_TRUE(engine.Execute(plan).ok());
    if (!plan.decode.empty()) {
      reserved.insert(engine.manager().RequestBytes(0).device);
      attended = engine.CollectDecode(0, {}).attended / 5;
    }
    batcher.Complete();
  }
  // C = 2 * floor(0.2 * 250 / 2) = 50: four pages of 16 slots, each 5 layers x 4 heads x (2 x 8 x 4
  // + 8) bytes a slot.
  EXPECT_THAT(reserved, testing::ElementsAre(uint64_t{4 * 16 * 5 * 4 * (2 * 8 * 4 + 8)}));
  EXPECT_EQ(attended, 51);  // the budget and the current token
}

}  // namespace
}  // namespace kvsweep
