// Paged's accounts: reference counts, cached prefixes, forks, swap, victims and reservations, over
// random runs with a batcher and step by step.
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/worker/strategies/manager_runs.h"

namespace kvsweep {
namespace {

PagedLayout Layout(int32_t pages, int32_t block_size, const Paged& parameters = {}) {
  return {.parameters = parameters,
          .block_size = block_size,
          .token_bytes = 8,
          .fixed_bytes = 100,
          .pages = pages,
          .host_pages = parameters.preemption() == Paged::PREEMPTION_SWAP ? pages : 0,
          .max_context = 100};
}

TierBytes BudgetOf(const PagedLayout& layout) {
  return {layout.fixed_bytes + static_cast<uint64_t>(layout.pages) * layout.page_bytes(),
          static_cast<uint64_t>(layout.host_pages) * layout.page_bytes()};
}

Paged Shared() {
  Paged paged;
  paged.set_prefix_caching(Paged::PREFIX_CACHING_SHARED);
  return paged;
}

Paged Swap() {
  Paged paged;
  paged.set_preemption(Paged::PREEMPTION_SWAP);
  return paged;
}

// A manager whose requests have the given tokens.
struct WithTokens {
  explicit WithTokens(const PagedLayout& layout) : manager(layout) {
    manager.ReadTokensFrom(
        [this](RequestId id) { return std::span<const int32_t>(tokens.at(id)); });
  }
  // Admits a whole prompt; tokens that the cache had of it.
  int32_t Admit(RequestId id, std::vector<int32_t> prompt) {
    const auto count = static_cast<int32_t>(prompt.size());
    tokens[id] = std::move(prompt);
    const RequestShape shape{count, 10};
    const int32_t cached = manager.FindCached(id, shape);
    EXPECT_TRUE(manager.Admit(id, shape, count));
    manager.EndPrompt(id);
    manager.CheckInvariants();
    return cached;
  }
  std::map<RequestId, std::vector<int32_t>> tokens;
  PagedManager manager;
};

std::vector<int32_t> Count(int32_t first, int32_t count) {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < count; ++i) ids.push_back(first + i);
  return ids;
}

// ------------------------------------------------------------------------------------ invariants

// Each way to run a paged cache.
std::map<std::string, Paged> Ways() {
  std::map<std::string, Paged> ways;
  ways["own"];
  ways["off"].set_prefix_caching(Paged::PREFIX_CACHING_OFF);
  ways["shared"] = Shared();
  ways["swap"] = Swap();
  ways["swap_shared_most_blocks"] = Swap();
  ways["swap_shared_most_blocks"].set_prefix_caching(Paged::PREFIX_CACHING_SHARED);
  ways["swap_shared_most_blocks"].set_victim(Paged::VICTIM_MOST_BLOCKS);
  ways["swap_least_computed"] = Swap();
  ways["swap_least_computed"].set_victim(Paged::VICTIM_LEAST_COMPUTED);
  ways["shared_least_computed"] = Shared();
  ways["shared_least_computed"].set_victim(Paged::VICTIM_LEAST_COMPUTED);
  ways["most_blocks_whole_prompt"].set_victim(Paged::VICTIM_MOST_BLOCKS);
  ways["most_blocks_whole_prompt"].set_admit_whole_prompt(true);
  ways["most_blocks_whole_prompt"].set_watermark(0.1);
  ways["max"].set_reservation(Paged::RESERVATION_MAX);
  ways["pow2"].set_reservation(Paged::RESERVATION_POW2);
  ways["oracle"].set_reservation(Paged::RESERVATION_ORACLE);
  return ways;
}

class WaysTest : public testing::TestWithParam<std::string> {};

RunCounts RunWay(const Paged& parameters, uint64_t seed) {
  Random random(seed);
  const auto draw = [&](int32_t least, int32_t most) {
    return least + static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(most - least + 1)));
  };
  const int32_t block_size = draw(1, 9);
  // From just one request of 80 tokens to about five of the mean.
  const int32_t pages = PagesFor(draw(90, 240), block_size) + 1;
  PagedLayout layout = Layout(pages, block_size, parameters);
  layout.host_pages = layout.host_pages == 0 ? 0 : draw(0, 2 * pages);
  layout.watermark_pages = static_cast<int32_t>(parameters.watermark() * pages) / 2;
  const std::unique_ptr<PageManager> manager = MakePagedManager(layout);
  RunOptions options{.seed = seed,
                     .batcher = {.max_sequences = draw(4, 9),
                                 .max_batched_tokens = draw(9, 60),
                                 .chunked_prefill = random.Bernoulli(0.75),
                                 .budget = BudgetOf(layout)},
                     .requests = draw(10, 50),
                     .most_samples = draw(1, 3)};
  ManagerRun run(options, manager.get(), &layout);
  return run.Run();
}

// Strategies' invariants 2 and 5 of a paged cache, and that every token is read where it was
// stored: over random lives with preemptions, forks, hits and swaps.
TEST_P(WaysTest, RandomRunsKeepEveryPromise) {
  const Paged parameters = Ways().at(GetParam());
  RunCounts counts;
  int runs = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed, ++runs) {
    SCOPED_TRACE(testing::Message() << GetParam() << " seed " << seed);
    counts += RunWay(parameters, seed);
    if (HasFailure()) return;
  }
  std::printf(
      "%s: %d runs, %lld steps, %lld preemptions, %lld tokens cached, %lld forks, %lld resumed\n",
      GetParam().c_str(), runs, static_cast<long long>(counts.steps),
      static_cast<long long>(counts.preemptions), static_cast<long long>(counts.cached_tokens),
      static_cast<long long>(counts.forks), static_cast<long long>(counts.resumed));
  // The runs are worth something only if they go through what they are about.
  EXPECT_GT(counts.steps, 20'000);
  if (parameters.reservation() != Paged::RESERVATION_PAGED) return;
  EXPECT_GT(counts.preemptions, 500);
  EXPECT_GT(counts.forks, 500);
  EXPECT_EQ(counts.most_batches > 1, parameters.preemption() == Paged::PREEMPTION_SWAP);
  EXPECT_EQ(counts.cached_tokens > 500, parameters.prefix_caching() != Paged::PREFIX_CACHING_OFF);
}

INSTANTIATE_TEST_SUITE_P(Ways, WaysTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const auto& [name, parameters] : Ways()) names.push_back(name);
                           return names;
                         }()),
                         [](const auto& info) { return info.param; });

// Invariant 7.
TEST(PagedManagerTest, AmplePoolNeverPreemptsAndAPoolOfOneServesAllInTurn) {
  for (const bool ample : {true, false}) {
    // 40 + 40 tokens, the last of which is never stored: 20 pages of 4.
    const PagedLayout layout = Layout(ample ? 1000 : 20, 4);
    PagedManager manager(layout);
    Batcher batcher({.max_sequences = 8, .max_batched_tokens = 64, .budget = BudgetOf(layout)},
                    &manager);
    std::map<RequestId, std::vector<int32_t>> tokens;
    for (RequestId id = 0; id < 12; ++id) ASSERT_TRUE(batcher.Add(id, {40, 40}, 40));
    EXPECT_FALSE(!ample && batcher.Add(12, {40, 42}, 1)) << "never fits";
    int64_t preemptions = 0;
    std::vector<RequestId> finished;
    while (!batcher.idle()) {
      preemptions += static_cast<int64_t>(batcher.Plan().preempted.size());
      const StepEffects& effects = batcher.Complete();
      finished.insert(finished.end(), effects.finished.begin(), effects.finished.end());
      batcher.CheckInvariants();
    }
    EXPECT_EQ(finished.size(), 12u);
    EXPECT_TRUE(std::ranges::is_sorted(finished));
    EXPECT_TRUE(!ample || preemptions == 0) << preemptions;
  }
}

// Invariant 3: fork and one append: exactly one page is copied; the parent's pages stay.
TEST(PagedManagerTest, AForkAndOneAppendCopyOnePage) {
  PagedManager manager(Layout(20, 4));
  ASSERT_TRUE(manager.Admit(0, {10, 10}, 10));
  manager.EndPrompt(0);
  const std::vector<PageIndex> before(manager.Pages(0).begin(), manager.Pages(0).end());
  const TierBytes reserved = manager.ReservedBytes();
  manager.Fork(0, 1);
  EXPECT_EQ(manager.ReservedBytes(), reserved) << "a fork takes nothing";
  EXPECT_EQ(manager.Sharing(), (std::pair<int64_t, int64_t>{6, 3}));
  ASSERT_TRUE(manager.Grow(1, 11));
  const std::vector<PagePair> forks = manager.TakeForks();
  ASSERT_EQ(forks.size(), 1u);
  EXPECT_EQ(forks[0].source, before[2]);
  EXPECT_EQ(manager.Pages(1)[2], forks[0].target);
  EXPECT_TRUE(std::ranges::equal(manager.Pages(0), before));
  // Nobody shares the parent's last page any more: it appends in place.
  ASSERT_TRUE(manager.Grow(0, 11));
  EXPECT_TRUE(manager.TakeForks().empty());
  manager.CheckInvariants();
}

TEST(PagedManagerTest, AFullLastPageIsSharedForGood) {
  PagedManager manager(Layout(20, 4));
  ASSERT_TRUE(manager.Admit(0, {8, 10}, 8));
  manager.EndPrompt(0);
  manager.Fork(0, 1);
  ASSERT_TRUE(manager.Grow(1, 9) && manager.Grow(0, 9));
  EXPECT_TRUE(manager.TakeForks().empty());
  EXPECT_EQ(manager.Pages(0)[1], manager.Pages(1)[1]);
}

// Invariant 6, the counts: hits are whole pages before the last token.
TEST(PagedManagerTest, ASecondPromptFindsAllFullPagesButKeepsATokenToCompute) {
  for (int32_t prompt = 1; prompt <= 17; ++prompt) {
    WithTokens with(Layout(40, 4, Shared()));
    EXPECT_EQ(with.Admit(0, Count(0, prompt)), 0);
    const int32_t cached = with.Admit(1, Count(0, prompt));
    EXPECT_EQ(cached, (prompt - 1) / 4 * 4);
    EXPECT_TRUE(prompt - cached >= 1 && prompt - cached <= 4) << prompt;
    EXPECT_EQ(with.manager.CacheLookups(), (std::pair<int64_t, int64_t>{2 * prompt, cached}));
  }
}

TEST(PagedManagerTest, OnlyEqualPrefixesHitAndOwnPagesOnlyTheirOwner) {
  WithTokens shared(Layout(40, 4, Shared()));
  shared.Admit(0, Count(0, 12));
  std::vector<int32_t> other = Count(0, 12);
  other[2] = 77;  // in the first page: later pages are equal, but not what precedes them
  EXPECT_EQ(shared.Admit(1, other), 0);
  other[2] = 2;
  other[9] = 77;
  EXPECT_EQ(shared.Admit(2, other), 8);

  WithTokens own(Layout(40, 4));
  own.Admit(0, Count(0, 12));
  EXPECT_EQ(own.Admit(1, Count(0, 12)), 0);
  own.manager.Preempt(0);
  EXPECT_EQ(own.Admit(0, Count(0, 12)), 8);

  Paged none;
  none.set_prefix_caching(Paged::PREFIX_CACHING_OFF);
  WithTokens off(Layout(40, 4, none));
  off.Admit(0, Count(0, 12));
  off.manager.Preempt(0);
  EXPECT_EQ(off.Admit(0, Count(0, 12)), 0);
}

// The queue of free pages: a request's tail goes first, the oldest content is lost first, a hit
// takes its page out of the queue.
TEST(PagedManagerTest, TheLeastRecentlyFreedContentIsLostFirst) {
  WithTokens with(Layout(8, 4, Shared()));
  with.Admit(0, Count(0, 13));    // pages A0 A1 A2 and a part
  with.Admit(1, Count(100, 13));  // B0 B1 B2 and a part
  with.manager.Release(0);        // frees: part, A2, A1, A0
  with.manager.Release(1);        // behind them: part, B2, B1, B0
  with.Admit(2, Count(200, 8));   // takes A's part and A2
  with.manager.Release(2);
  EXPECT_EQ(with.Admit(3, Count(0, 13)), 8) << "A0 and A1 are left; A2 was taken";
  EXPECT_EQ(with.Admit(4, Count(100, 13)), 8) << "for the rest of it, B2 was taken";
}

// ------------------------------------------------------------------------------------------ swap

TEST(PagedManagerTest, SwapTakesAllPagesOrNone) {
  PagedLayout layout = Layout(10, 4, Swap());
  layout.host_pages = 3;
  PagedManager manager(layout);
  ASSERT_TRUE(manager.Admit(0, {16, 10}, 16));
  ASSERT_TRUE(manager.Admit(1, {12, 10}, 12));
  manager.EndPrompt(0);
  manager.EndPrompt(1);
  EXPECT_FALSE(manager.CanOffload(0)) << "four pages, three on the host";
  ASSERT_TRUE(manager.CanOffload(1));
  const std::vector<PageIndex> pages(manager.Pages(1).begin(), manager.Pages(1).end());
  manager.Preempt(1);
  const std::vector<PagePair> outs = manager.swaps()->TakeOuts();
  ASSERT_EQ(outs.size(), 3u);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(outs[i].source, pages[i]);
  EXPECT_EQ(manager.ReservedBytes().host, 3 * layout.page_bytes());
  manager.CheckInvariants();
  ASSERT_TRUE(manager.Resume(1, 13));
  EXPECT_FALSE(manager.Arrived(1));
  const std::vector<PagePair> ins = manager.swaps()->TakeIns();
  ASSERT_EQ(ins.size(), 3u) << "the page of the next token holds nothing yet";
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(ins[i].source, outs[i].target);
  manager.CheckInvariants();
  manager.SwapInsLanded();
  EXPECT_TRUE(manager.Arrived(1));
  EXPECT_EQ(manager.ReservedBytes().host, 0u);
}

TEST(PagedManagerTest, WithoutHostMemoryAVictimIsComputedAgain) {
  PagedLayout layout = Layout(10, 4, Swap());
  layout.host_pages = 0;
  PagedManager manager(layout);
  Batcher batcher({.max_sequences = 4, .max_batched_tokens = 64, .budget = BudgetOf(layout)},
                  &manager);
  for (RequestId id = 0; id < 3; ++id) ASSERT_TRUE(batcher.Add(id, {10, 20}, 20));
  while (!batcher.idle()) {
    batcher.Plan();
    batcher.Complete();
  }
  EXPECT_GT(batcher.tally(2).preemptions, 0);
  EXPECT_GT(batcher.tally(2).recomputed_tokens, 0);
}

TEST(PagedManagerTest, ARequestThatIsPreemptedWhileItArrivesKeepsItsState) {
  PagedManager manager(Layout(10, 4, Swap()));
  ASSERT_TRUE(manager.Admit(0, {9, 10}, 9));
  manager.EndPrompt(0);
  manager.Preempt(0);
  const std::vector<PagePair> outs = manager.swaps()->TakeOuts();
  ASSERT_TRUE(manager.Resume(0, 10));
  manager.swaps()->TakeIns();
  manager.Preempt(0);
  EXPECT_TRUE(manager.swaps()->TakeGivenUp());
  EXPECT_TRUE(manager.swaps()->TakeOuts().empty()) << "it still lies on the host";
  manager.CheckInvariants();
  // It may come back while the copy that was given up is still under way, by one of its own.
  ASSERT_TRUE(manager.Resume(0, 10));
  const std::vector<PagePair> ins = manager.swaps()->TakeIns();
  ASSERT_EQ(ins.size(), outs.size());
  for (size_t i = 0; i < ins.size(); ++i) EXPECT_EQ(ins[i].source, outs[i].target);
  manager.SwapInsLanded();
  EXPECT_FALSE(manager.Arrived(0)) << "the copy that was given up has landed, not its own";
  manager.SwapInsLanded();
  EXPECT_TRUE(manager.Arrived(0));
  EXPECT_EQ(manager.ReservedBytes().host, 0u);
}

// Each step that resumes somebody begins a batch, up to as many as may be under way.
TEST(PagedManagerTest, SeveralBatchesOfSwapsAreUnderWay) {
  PagedManager manager(Layout(20, 4, Swap()));
  constexpr RequestId kMost = PageSwaps::kMostBatches;
  for (RequestId id = 0; id <= kMost; ++id) {
    ASSERT_TRUE(manager.Admit(id, {6, 10}, 6));
    manager.EndPrompt(id);
  }
  for (RequestId id = 0; id <= kMost; ++id) manager.Preempt(id);
  manager.swaps()->TakeOuts();
  for (RequestId id = 0; id < kMost; ++id) {
    ASSERT_TRUE(manager.Resume(id, 7));
    EXPECT_EQ(manager.swaps()->TakeIns().size(), 2u);
  }
  EXPECT_FALSE(manager.Resume(kMost, 7)) << "the link is busy";
  manager.SwapInsLanded();
  EXPECT_TRUE(manager.Arrived(0) && !manager.Arrived(1)) << "they land in order";
  EXPECT_TRUE(manager.Resume(kMost, 7));
  manager.CheckInvariants();
}

// --------------------------------------------------------------------------------------- admission

TEST(PagedManagerTest, TheWatermarkAndTheWholePromptHoldBackAdmission) {
  PagedLayout layout = Layout(10, 4);
  layout.watermark_pages = 2;
  PagedManager watermark(layout);
  EXPECT_FALSE(watermark.Admit(0, {36, 4}, 36)) << "nine of ten pages";
  EXPECT_TRUE(watermark.Admit(0, {32, 4}, 32));
  EXPECT_TRUE(watermark.Grow(0, 36)) << "growth may take what admission leaves";

  Paged whole;
  whole.set_admit_whole_prompt(true);
  PagedManager manager(Layout(10, 4, whole));
  ASSERT_TRUE(manager.Admit(0, {16, 4}, 4));
  ASSERT_TRUE(manager.Grow(0, 16));
  EXPECT_FALSE(manager.Admit(1, {28, 4}, 4)) << "its first chunk fits, its prompt does not";
  EXPECT_TRUE(manager.Admit(1, {24, 4}, 4));
  PagedManager first_chunk(Layout(10, 4));
  ASSERT_TRUE(first_chunk.Admit(0, {16, 4}, 16));
  EXPECT_TRUE(first_chunk.Admit(1, {28, 4}, 4));
}

TEST(PagedManagerTest, VictimRulesNameWhomTheySay) {
  const auto first_victim = [](Paged::Victim rule) {
    Paged parameters;
    parameters.set_victim(rule);
    PagedManager manager(Layout(30, 2, parameters));
    Batcher batcher(
        {.max_sequences = 8, .max_batched_tokens = 100, .budget = BudgetOf(Layout(30, 2))},
        &manager);
    // Pages at admission: 5, 12, 3, 8.
    for (const int32_t prompt : {10, 24, 6, 16}) {
      EXPECT_TRUE(batcher.Add(static_cast<RequestId>(prompt), {prompt, 20}, 20));
    }
    while (true) {
      const StepPlan& plan = batcher.Plan();
      if (!plan.preempted.empty()) return plan.preempted.front();
      batcher.Complete();
    }
  };
  EXPECT_EQ(first_victim(Paged::VICTIM_LAST_IN), 16);
  EXPECT_EQ(first_victim(Paged::VICTIM_LEAST_COMPUTED), 6);
  EXPECT_EQ(first_victim(Paged::VICTIM_MOST_BLOCKS), 24);
}

// ------------------------------------------------------------------------------------- reservation

TEST(ContiguousManagerTest, ReservesWhatEachRuleSays) {
  const auto reserved = [](Paged::Reservation rule) {
    Paged parameters;
    parameters.set_reservation(rule);
    return ContiguousManager(Layout(100, 1, parameters)).ReservedTokens({20, 50, 45});
  };
  EXPECT_EQ(reserved(Paged::RESERVATION_MAX), 100);
  EXPECT_EQ(reserved(Paged::RESERVATION_POW2), 20 + 32);  // the output is 25
  EXPECT_EQ(reserved(Paged::RESERVATION_ORACLE), 44);     // the last token is never stored
}

TEST(ContiguousManagerTest, HolesKeepOutWhatWouldFitInAll) {
  Paged oracle;
  oracle.set_reservation(Paged::RESERVATION_ORACLE);
  ContiguousManager manager(Layout(12, 1, oracle));
  for (RequestId id = 0; id < 3; ++id) ASSERT_TRUE(manager.Admit(id, {4, 1, 5}, 4));
  manager.Release(0);
  manager.Release(2);
  EXPECT_FALSE(manager.Admit(3, {8, 1, 9}, 8)) << "eight pages are free, in two holes";
  EXPECT_TRUE(manager.Admit(4, {4, 1, 5}, 4));
  EXPECT_EQ(manager.Pages(4)[0], 0) << "the first hole";
  manager.CheckInvariants();
}

TEST(IndependentGroupsTest, NoPageIsReadAndWrittenInOneGroup) {
  EXPECT_TRUE(IndependentGroups({}).empty());
  const std::vector<PagePair> fan = {{1, 2}, {1, 3}, {4, 5}};
  EXPECT_EQ(IndependentGroups(fan), std::vector<size_t>{3});
  const std::vector<PagePair> reused = {{1, 2}, {3, 1}, {2, 4}, {5, 4}};
  EXPECT_EQ(IndependentGroups(reused), (std::vector<size_t>{1, 3, 4}));
}

}  // namespace
}  // namespace kvsweep
