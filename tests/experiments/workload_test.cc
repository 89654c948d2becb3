#include "experiments/workload.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

using ::testing::HasSubstr;

constexpr char kConversation[] = "experiments/data/azure_llm_2023_conv.csv";

Trace ReadTrace(const char* path) {
  absl::StatusOr<Trace> trace = ParseTrace(*ReadFile(path, 8 << 20), path);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return trace.ok() ? *std::move(trace) : Trace();
}

Load FixedLoad(uint32_t requests, uint32_t input, uint32_t output) {
  Load load;
  load.mutable_arrivals()->set_requests(requests);
  load.mutable_arrivals()->set_rate(4);
  load.mutable_lengths()->set_input(input);
  load.mutable_lengths()->set_output(output);
  ApplyDefaults(&load);
  return load;
}

Load TraceLoad(uint32_t requests, double scale, uint32_t max_total) {
  Load load = FixedLoad(requests, 1, 1);
  load.mutable_lengths()->clear_input();
  load.mutable_lengths()->clear_output();
  load.mutable_lengths()->set_trace("t");
  load.mutable_lengths()->set_scale(scale);
  load.mutable_lengths()->set_max_total(max_total);
  return load;
}

Seeds SeedsFrom(uint64_t seed) {
  Seeds seeds;
  seeds.set_content(seed);
  seeds.set_order(seed + 1);
  seeds.set_schedule(seed + 2);
  return seeds;
}

Workload Built(const Load& load, const Seeds& seeds, const WorkloadInputs& inputs) {
  absl::StatusOr<Workload> workload = Workload::Build(load, seeds, inputs);
  EXPECT_TRUE(workload.ok()) << workload.status();
  return *std::move(workload);
}

TEST(WorkloadLengths, AreScaledThenClippedByTheStatedRule) {
  const Trace trace = {.rows = {{0, 100, 50}, {0, 1000, 400}, {0, 1, 1}, {0, 20, 3000}}};
  Load load = TraceLoad(4, 0.25, 128);
  load.mutable_lengths()->set_max_output(60);
  const Workload workload =
      Built(load, SeedsFrom(1), {.context_tokens = 512, .vocabulary = 100, .trace = &trace});
  std::set<std::vector<uint32_t>> lengths;
  for (const WorkloadRequest& request : workload.requests()) {
    lengths.insert({request.prompt_tokens, request.output_tokens, request.max_tokens});
  }
  // 100+50 -> 25+13; 1000+400 -> 250+100 -> output 60 -> prompt 127, output 1; 1+1 -> at least 1;
  // 20+3000 -> 5+60.
  EXPECT_EQ(lengths, (std::set<std::vector<uint32_t>>{
                         {25, 13, 103}, {127, 1, 1}, {1, 1, 127}, {5, 60, 123}}));
}

TEST(WorkloadLengths, PropertiesHoldForTheRealTrace) {
  const Trace trace = ReadTrace(kConversation);
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Workload workload = Built(TraceLoad(1000, 0.25, 640), SeedsFrom(seed),
                                    {.context_tokens = 2048, .vocabulary = 4096, .trace = &trace});
    EXPECT_EQ(workload.max_total(), 640u);
    for (const WorkloadRequest& request : workload.requests()) {
      EXPECT_GE(request.prompt_tokens, 1u);
      EXPECT_GE(request.output_tokens, 1u);
      EXPECT_LE(request.output_tokens, request.max_tokens);
      EXPECT_EQ(request.prompt_tokens + request.max_tokens, 640u) << "what an arm may know";
    }
  }
}

// Rows run out: the drawn order begins again, so that every row is used equally often.
TEST(WorkloadLengths, RowsAreDrawnWithoutRepetitionUntilTheyRunOut) {
  Trace trace;
  for (uint32_t i = 1; i <= 10; ++i) trace.rows.push_back({0, i, 1});
  const Workload workload = Built(TraceLoad(20, 1, 64), SeedsFrom(4),
                                  {.context_tokens = 64, .vocabulary = 100, .trace = &trace});
  std::multiset<uint32_t> prompts;
  for (const WorkloadRequest& request : workload.requests()) prompts.insert(request.prompt_tokens);
  for (uint32_t i = 1; i <= 10; ++i) EXPECT_EQ(prompts.count(i), 2u);
}

TEST(WorkloadSeeds, EachRulesOneThing) {
  const Trace trace = ReadTrace(kConversation);
  std::vector<int32_t> text(5000);
  std::iota(text.begin(), text.end(), 0);
  const WorkloadInputs inputs = {
      .context_tokens = 512, .vocabulary = 5000, .bos_id = 1, .text_ids = text, .trace = &trace};
  const auto columns = [&](const Seeds& seeds) {
    std::vector<int64_t> arrivals, lengths, offsets;
    const Workload workload = Built(TraceLoad(50, 0.1, 512), seeds, inputs);
    for (const WorkloadRequest& request : workload.requests()) {
      arrivals.push_back(request.arrival.time_ns);
      lengths.push_back(request.prompt_tokens);
      offsets.push_back(static_cast<int64_t>(request.text_offset));
    }
    return std::tuple(arrivals, lengths, offsets);
  };
  const Seeds seeds = SeedsFrom(10);
  const auto [arrivals, lengths, offsets] = columns(seeds);
  Seeds other = seeds;
  other.set_schedule(99);
  EXPECT_NE(std::get<0>(columns(other)), arrivals);
  EXPECT_EQ(std::get<1>(columns(other)), lengths);
  EXPECT_EQ(std::get<2>(columns(other)), offsets);
  other = seeds;
  other.set_content(99);
  EXPECT_EQ(std::get<0>(columns(other)), arrivals);
  EXPECT_EQ(std::get<1>(columns(other)), lengths);
  EXPECT_NE(std::get<2>(columns(other)), offsets);
  other = seeds;
  other.set_order(99);
  EXPECT_EQ(std::get<0>(columns(other)), arrivals);
  EXPECT_NE(std::get<1>(columns(other)), lengths);
  EXPECT_EQ(columns(seeds), std::tuple(arrivals, lengths, offsets));
}

TEST(WorkloadPrompts, AreCutFromTheTextBehindBos) {
  std::vector<int32_t> text(100);
  std::iota(text.begin(), text.end(), 1000);
  const Workload workload =
      Built(FixedLoad(50, 20, 4), SeedsFrom(1),
            {.context_tokens = 64, .vocabulary = 5000, .bos_id = 1, .text_ids = text});
  std::set<uint64_t> offsets;
  for (size_t i = 0; i < workload.requests().size(); ++i) {
    std::vector<int32_t> prompt(20);
    workload.CopyPrompt(i, prompt);
    EXPECT_EQ(prompt[0], 1);
    EXPECT_EQ(prompt[1], 1000 + static_cast<int32_t>(workload.requests()[i].text_offset));
    EXPECT_EQ(prompt[19], prompt[1] + 18);
    offsets.insert(workload.requests()[i].text_offset);
  }
  EXPECT_GT(offsets.size(), 20u);
  EXPECT_LE(*offsets.rbegin(), 81u);
}

TEST(WorkloadPrompts, WithoutTextIdsAreUniformAndRepeatable) {
  const WorkloadInputs inputs = {.context_tokens = 64, .vocabulary = 100};
  const Workload workload = Built(FixedLoad(50, 20, 4), SeedsFrom(1), inputs);
  std::vector<int32_t> first(20), again(20), other(20);
  workload.CopyPrompt(3, first);
  Built(FixedLoad(10, 20, 4), SeedsFrom(1), inputs).CopyPrompt(3, again);
  workload.CopyPrompt(4, other);
  EXPECT_EQ(first, again) << "a longer run begins with the same requests";
  EXPECT_NE(first, other);
  for (const int32_t id : first) EXPECT_TRUE(id >= 0 && id < 100);
}

Distribution Uniform(uint32_t min, uint32_t max) {
  Distribution distribution;
  distribution.set_min(min);
  distribution.set_max(max);
  ApplyDefaults(&distribution);
  return distribution;
}

Distribution Lognormal(double mean, double deviation, uint32_t max) {
  Distribution distribution = Uniform(1, max);
  distribution.set_kind(Distribution::KIND_LOGNORMAL);
  distribution.set_mean(mean);
  distribution.set_deviation(deviation);
  return distribution;
}

TEST(WorkloadLengths, AreDrawnFromDistributions) {
  Load load = FixedLoad(20'000, 1, 1);
  load.mutable_lengths()->clear_input();
  load.mutable_lengths()->clear_output();
  *load.mutable_lengths()->mutable_input_distribution() = Uniform(10, 19);
  *load.mutable_lengths()->mutable_output_distribution() = Lognormal(100, 50, 2000);
  const WorkloadInputs inputs = {.context_tokens = 4096, .vocabulary = 100};
  const Workload workload = Built(load, SeedsFrom(1), inputs);
  std::vector<int> counts(10);
  double sum = 0;
  double squares = 0;
  for (const WorkloadRequest& request : workload.requests()) {
    ASSERT_TRUE(request.prompt_tokens >= 10 && request.prompt_tokens <= 19);
    ++counts[request.prompt_tokens - 10];
    sum += request.output_tokens;
    squares += static_cast<double>(request.output_tokens) * request.output_tokens;
  }
  for (const int count : counts) EXPECT_NEAR(count, 2000, 200) << "4.5 deviations";
  const double mean = sum / 20'000;
  EXPECT_NEAR(mean, 100, 2);
  EXPECT_NEAR(std::sqrt(squares / 20'000 - mean * mean), 50, 3);
  // The draws of one do not shift those of the other, and depend on the index alone.
  load.mutable_lengths()->clear_input_distribution();
  load.mutable_lengths()->set_input(5);
  load.mutable_arrivals()->set_requests(50);
  const Workload shorter = Built(load, SeedsFrom(1), inputs);
  for (size_t i = 0; i < 50; ++i) {
    EXPECT_EQ(shorter.requests()[i].output_tokens, workload.requests()[i].output_tokens);
  }
}

TEST(WorkloadLengths, ReplayTakesTheRowsInTheirOwnOrder) {
  Trace trace = {.rows = {}, .has_times = true};
  for (uint32_t i = 1; i <= 10; ++i) trace.rows.push_back({i * 1'000, i, 1});
  Load load = TraceLoad(7, 1, 64);
  load.mutable_arrivals()->set_process(Arrivals::PROCESS_REPLAY);
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const Workload workload =
        Built(load, SeedsFrom(seed), {.context_tokens = 64, .vocabulary = 100, .trace = &trace});
    for (uint32_t i = 0; i < 7; ++i) {
      EXPECT_EQ(workload.requests()[i].prompt_tokens, i + 1);
      EXPECT_EQ(workload.requests()[i].arrival.time_ns, (i + 1) * 1'000);
    }
  }
}

// ------------------------------------------------------------------------------- shared prefixes

std::vector<int32_t> PromptOf(const Workload& workload, size_t index) {
  std::vector<int32_t> prompt(workload.requests()[index].prompt_tokens);
  workload.CopyPrompt(index, prompt);
  return prompt;
}

// Tokens that two prompts begin with alike.
size_t CommonPrefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const size_t shorter = std::min(a.size(), b.size());
  return std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(shorter), b.begin())
             .first -
         a.begin();
}

// Blocks of 512 * 1/32 = 16 tokens, over the whole trace, with text and without: what the ids say
// is shared is shared, and nothing more to speak of.
TEST(WorkloadPrefixes, EqualHashIdsGiveEqualTokens) {
  const Trace trace = ReadTrace("experiments/data/mooncake_fast25_conversation.jsonl");
  std::vector<int32_t> text(50'000);
  Random random(1);
  for (int32_t& id : text) id = static_cast<int32_t>(random.Uniform(4096));
  Load load = TraceLoad(300, 1.0 / 32, 1024);
  load.mutable_arrivals()->set_process(Arrivals::PROCESS_REPLAY);
  for (const bool with_text : {true, false}) {
    const Workload workload =
        Built(load, SeedsFrom(3),
              {.context_tokens = 1024,
               .vocabulary = 4096,
               .bos_id = 1,
               .text_ids = with_text ? std::span<const int32_t>(text) : std::span<const int32_t>(),
               .trace = &trace});
    // Each request beside the earlier one that the trace says it shares most with.
    size_t shared = 0;
    for (size_t i = 1; i < 300; ++i) {
      const auto ids = trace.BlocksOf(trace.rows[i]);
      size_t blocks = 0;
      size_t nearest = 0;
      for (size_t k = 0; k < i; ++k) {
        const auto other = trace.BlocksOf(trace.rows[k]);
        const size_t most = std::min(ids.size(), other.size());
        const size_t equal = static_cast<size_t>(
            std::mismatch(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(most),
                          other.begin())
                .first -
            ids.begin());
        if (equal > blocks) nearest = k;
        blocks = std::max(blocks, equal);
      }
      const std::vector<int32_t> a = PromptOf(workload, nearest);
      const std::vector<int32_t> b = PromptOf(workload, i);
      ASSERT_EQ(a[0], 1) << "BOS";
      const size_t expected = std::min({blocks * 16, a.size(), b.size()});
      EXPECT_GE(CommonPrefix(a, b), expected) << i;
      if (expected < std::min(a.size(), b.size())) {
        EXPECT_LE(CommonPrefix(a, b), expected + 3) << i << ": alike by chance";
      }
      shared += expected / 16;
    }
    EXPECT_GT(shared, 2 * 299u) << "more than the first block, which all share";
  }
}

TEST(WorkloadPrefixes, ContentSeedsAndIdsChangeTheTokens) {
  const Trace trace = {.rows = {{0, 1024, 4, 2, 0}, {1, 1024, 4, 2, 2}, {2, 1024, 4, 2, 4}},
                       .block_ids = {7, 8, 7, 9, 5, 8},
                       .has_times = true};
  Load load = TraceLoad(3, 0.0625, 128);
  load.mutable_arrivals()->set_process(Arrivals::PROCESS_REPLAY);
  const WorkloadInputs inputs = {.context_tokens = 128, .vocabulary = 10'000, .trace = &trace};
  const Workload workload = Built(load, SeedsFrom(1), inputs);
  const std::vector<int32_t> first = PromptOf(workload, 0);
  const std::vector<int32_t> second = PromptOf(workload, 1);
  const std::vector<int32_t> third = PromptOf(workload, 2);
  ASSERT_EQ(first.size(), 64u);
  EXPECT_EQ(CommonPrefix(first, second), 32u);
  EXPECT_EQ(CommonPrefix(first, third), 0u);
  EXPECT_TRUE(std::equal(first.begin() + 32, first.end(), third.begin() + 32))
      << "a block is a function of its id, wherever it stands";
  EXPECT_NE(PromptOf(Built(load, SeedsFrom(2), inputs), 0), first);
}

// Rounding may leave tokens behind the last block: they belong to the request alone.
TEST(WorkloadPrefixes, WhatRoundingLeavesIsTheRequestsOwn) {
  // 512 * 0.0028 = 1.43 -> blocks of 1 token, 4 of them; the prompt has 2048 * 0.0028 = 5.7 -> 6.
  const Trace trace = {.rows = {{0, 2048, 4, 4, 0}, {1, 2048, 4, 4, 0}},
                       .block_ids = {1, 2, 3, 4},
                       .has_times = true};
  Load load = TraceLoad(2, 0.0028, 64);
  load.mutable_arrivals()->set_process(Arrivals::PROCESS_REPLAY);
  const Workload workload =
      Built(load, SeedsFrom(1), {.context_tokens = 64, .vocabulary = 1'000'000, .trace = &trace});
  ASSERT_EQ(workload.requests()[0].prompt_tokens, 6u);
  EXPECT_EQ(CommonPrefix(PromptOf(workload, 0), PromptOf(workload, 1)), 4u);
}

// ---------------------------------------------------------------------------------------- sessions

Load ChatLoad(uint32_t sessions, uint32_t turns) {
  Load load = FixedLoad(sessions, 20, 10);
  load.mutable_sessions()->set_turns(turns);
  load.mutable_sessions()->set_turn_input(5);
  load.mutable_sessions()->set_think_time(2'000'000'000);
  ApplyDefaults(&load);
  return load;
}

TEST(WorkloadSessions, EachTurnCarriesTheConversationSoFar) {
  const WorkloadInputs inputs = {.context_tokens = 128, .vocabulary = 100};
  const Workload chats = Built(ChatLoad(200, 4), SeedsFrom(1), inputs);
  const Workload plain = Built(FixedLoad(200, 20, 10), SeedsFrom(1), inputs);
  ASSERT_EQ(chats.requests().size(), 800u);
  double think_s = 0;
  for (size_t i = 0; i < 800; ++i) {
    const WorkloadRequest& request = chats.requests()[i];
    EXPECT_EQ(request.session, i / 4);
    ASSERT_EQ(request.turn, i % 4);
    EXPECT_EQ(request.last_turn, request.turn == 3);
    EXPECT_EQ(request.prompt_tokens, 20 + 15 * request.turn);
    EXPECT_EQ(request.output_tokens, 10u);
    EXPECT_EQ(request.max_tokens, 128 - request.prompt_tokens);
    if (request.turn == 0) {
      EXPECT_EQ(request.history_tokens, 0u);
      EXPECT_EQ(request.arrival.time_ns, plain.requests()[i / 4].arrival.time_ns);
      EXPECT_EQ(PromptOf(chats, i), PromptOf(plain, i / 4)) << "first turns are plain requests";
      continue;
    }
    EXPECT_EQ(request.history_tokens, request.prompt_tokens - 5);
    think_s += static_cast<double>(request.think_ns) / 1e9;
    std::vector<int32_t> added(5), before(5);
    chats.CopyPrompt(i, added);
    if (request.turn > 1) {
      chats.CopyPrompt(i - 1, before);
      EXPECT_NE(added, before);
    }
  }
  EXPECT_NEAR(think_s / 600, 2, 0.3) << "exponential: three and a half deviations of the mean";
}

TEST(WorkloadSessions, EndWhereTheNextPromptWouldFillTheContext) {
  Load load = ChatLoad(3, 10);
  load.mutable_lengths()->set_max_total(60);
  const Workload chats = Built(load, SeedsFrom(1), {.context_tokens = 128, .vocabulary = 100});
  // Prompts of 20, 35 and 50 tokens; the third has room for 10 more and nothing after it.
  ASSERT_EQ(chats.requests().size(), 9u);
  EXPECT_EQ(chats.requests()[2].prompt_tokens, 50u);
  EXPECT_EQ(chats.requests()[2].output_tokens, 10u);
  EXPECT_TRUE(chats.requests()[2].last_turn);
  EXPECT_EQ(chats.max_total(), 60u);
}

TEST(WorkloadSessions, LaterOutputsAreDrawnLikeTheFirst) {
  Trace trace;
  for (uint32_t i = 1; i <= 100; ++i) trace.rows.push_back({0, 1, i});
  Load load = TraceLoad(10, 1, 2048);
  load.mutable_sessions()->set_turns(5);
  load.mutable_sessions()->set_turn_input(1);
  const Workload chats =
      Built(load, SeedsFrom(1), {.context_tokens = 2048, .vocabulary = 100, .trace = &trace});
  ASSERT_EQ(chats.requests().size(), 50u);
  std::set<uint32_t> outputs;
  for (const WorkloadRequest& request : chats.requests()) outputs.insert(request.output_tokens);
  EXPECT_EQ(outputs.size(), 50u) << "each turn takes a row of its own";
}

TEST(WorkloadErrors, NameTheFieldAndTheRemedy) {
  const std::vector<int32_t> text(10);
  Load load = FixedLoad(2, 20, 4);
  const auto message = [&](const WorkloadInputs& inputs) {
    return std::string(Workload::Build(load, SeedsFrom(1), inputs).status().message());
  };
  EXPECT_THAT(message({.context_tokens = 64, .vocabulary = 9, .text_ids = text}),
              HasSubstr("load.text: its 10 tokens are fewer than the 20 of a prompt"));
  load.mutable_lengths()->set_max_total(128);
  EXPECT_THAT(message({.context_tokens = 64, .vocabulary = 9}),
              HasSubstr("load.lengths.max_total: 128 exceeds the model's context of 64"));
}

TEST(WorkloadWarmup, IsABurstOfOtherRequestsOfTheSameKind) {
  const WorkloadInputs inputs = {.context_tokens = 64, .vocabulary = 100};
  const auto warmup = Workload::BuildWarmup(FixedLoad(50, 20, 4), SeedsFrom(1), inputs, 3);
  ASSERT_TRUE(warmup.ok());
  ASSERT_EQ(warmup->requests().size(), 3u);
  std::vector<int32_t> first(20), measured(20);
  warmup->CopyPrompt(0, first);
  Built(FixedLoad(50, 20, 4), SeedsFrom(1), inputs).CopyPrompt(0, measured);
  EXPECT_NE(first, measured);
  EXPECT_EQ(warmup->requests()[2].arrival.time_ns, 0);
}

}  // namespace
}  // namespace kvsweep
