#include "experiments/workload.h"

#include <algorithm>
#include <limits>
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

std::vector<TraceRow> Rows(absl::string_view text) {
  const auto rows = ParseAzureTrace(text, "t.csv");
  EXPECT_TRUE(rows.ok()) << rows.status();
  return rows.value_or(std::vector<TraceRow>());
}

std::string TraceError(absl::string_view text) {
  return std::string(ParseAzureTrace(text, "t.csv").status().message());
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

TEST(AzureTrace, NativeFileIsReadToTheLastByte) {
  const auto text = ReadFile(kConversation, 1 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  ASSERT_NE(text->back(), '\n') << "the file ends without a newline";
  const std::vector<TraceRow> rows = Rows(*text);
  ASSERT_EQ(rows.size(), 19366u);
  EXPECT_EQ(rows[0].context_tokens, 374u);
  EXPECT_EQ(rows[0].generated_tokens, 44u);
  EXPECT_EQ(rows[1].time_ns, 4'314'579'000) << "18:15:50.9951690 - 18:15:46.6805900";
  EXPECT_EQ(rows.back().context_tokens, 197u);
  EXPECT_EQ(rows.back().generated_tokens, 183u);
  uint64_t context = 0;
  for (const TraceRow& row : rows) context += row.context_tokens;
  EXPECT_NEAR(static_cast<double>(context) / 19366, 1154.7, 0.05) << "the published mean";
}

TEST(AzureTrace, LineEndsAndFractionsAreFree) {
  const std::vector<TraceRow> rows = Rows(
      "TIMESTAMP,ContextTokens,GeneratedTokens\n"
      "2023-12-31 23:59:59,1,2\r\n"
      "2024-01-01 00:00:00.5,3,4\n");
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1].time_ns, 1'500'000'000);
  EXPECT_EQ(rows[1].generated_tokens, 4u);
}

TEST(AzureTrace, ErrorsNameFileLineAndRemedy) {
  const std::string header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
  EXPECT_THAT(TraceError("a,b,c\n1\n"), HasSubstr("t.csv:1: \"a,b,c\": expected the header"));
  EXPECT_THAT(TraceError(header), HasSubstr("t.csv has no rows"));
  EXPECT_THAT(TraceError(""), HasSubstr("t.csv has no rows"));
  const auto row_error = [&](const char* row) {
    return TraceError(header + "2023-11-16 18:15:46,1,2\n" + row);
  };
  EXPECT_THAT(row_error("2023-11-16T18:15:46,1,2"), HasSubstr("t.csv:3: "));
  EXPECT_THAT(row_error("2023-02-30 18:15:46,1,2"), HasSubstr("no time; write as"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46.1234567890,1,2"), HasSubstr("no time"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46,-1,2"), HasSubstr("no token counts"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46,1"), HasSubstr("no token counts"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46,1,2,3"), HasSubstr("no token counts"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46,99999999999,2"), HasSubstr("no token counts"));
  EXPECT_THAT(row_error("2023-11-16 18:15:46,4294967295,2"), HasSubstr("more tokens than any"));
}

TEST(AzureTrace, SurvivesRandomDamage) {
  const uint64_t seed = 5;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  for (int round = 0; round < 2000; ++round) {
    std::string text =
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109";
    for (int i = 0; i < 3; ++i)
      text[42 + random.Uniform(text.size() - 42)] = static_cast<char>(random.Uniform(256));
    const auto rows = ParseAzureTrace(text, "t.csv");
    EXPECT_TRUE(rows.ok() || rows.status().code() == absl::StatusCode::kInvalidArgument);
  }
}

// vLLM's rule: the last request arrives at N / rate exactly, whatever the seed.
TEST(WorkloadArrivals, PoissonEndsAtRequestsOverRate) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Workload workload =
        Built(FixedLoad(200, 8, 8), SeedsFrom(seed), {.context_tokens = 64, .vocabulary = 100});
    const auto& requests = workload.requests();
    ASSERT_EQ(requests.size(), 200u);
    EXPECT_EQ(requests.back().arrival_ns, 50'000'000'000);
    EXPECT_TRUE(std::is_sorted(requests.begin(), requests.end(), [](const auto& a, const auto& b) {
      return a.arrival_ns < b.arrival_ns;
    }));
    EXPECT_GT(requests.front().arrival_ns, 0);
  }
}

TEST(WorkloadArrivals, GapsAreExponential) {
  const Workload workload =
      Built(FixedLoad(20'000, 8, 8), SeedsFrom(3), {.context_tokens = 64, .vocabulary = 100});
  double sum = 0;
  double squares = 0;
  int64_t before = 0;
  for (const WorkloadRequest& request : workload.requests()) {
    const double gap = static_cast<double>(request.arrival_ns - before) / 1e9;
    before = request.arrival_ns;
    sum += gap;
    squares += gap * gap;
  }
  EXPECT_NEAR(sum / 20'000, 0.25, 1e-9);
  EXPECT_NEAR(squares / 20'000, 2 * 0.25 * 0.25, 0.01) << "second moment of an exponential";
}

TEST(WorkloadArrivals, BurstInfiniteRateAndClosedLoop) {
  const WorkloadInputs inputs = {.context_tokens = 64, .vocabulary = 100};
  Load load = FixedLoad(5, 8, 8);
  load.mutable_arrivals()->set_rate(std::numeric_limits<double>::infinity());
  const Workload burst = Built(load, SeedsFrom(1), inputs);
  for (const WorkloadRequest& request : burst.requests()) {
    EXPECT_EQ(request.arrival_ns, 0);
  }
  load.mutable_arrivals()->set_process(Arrivals::PROCESS_CLOSED);
  load.mutable_arrivals()->set_concurrency(2);
  const Workload closed = Built(load, SeedsFrom(1), inputs);
  EXPECT_EQ(closed.concurrency(), 2u);
  EXPECT_EQ(closed.requests()[1].arrival_ns, 0);
  EXPECT_EQ(closed.requests()[2].arrival_ns, kArrivesOnFinish);
  load.mutable_arrivals()->set_concurrency(9);
  EXPECT_EQ(Built(load, SeedsFrom(1), inputs).requests()[4].arrival_ns, 0);
}

TEST(WorkloadLengths, AreScaledThenClippedByTheStatedRule) {
  const std::vector<TraceRow> rows = {{0, 100, 50}, {0, 1000, 400}, {0, 1, 1}, {0, 20, 3000}};
  Load load = TraceLoad(4, 0.25, 128);
  load.mutable_lengths()->set_max_output(60);
  const Workload workload =
      Built(load, SeedsFrom(1), {.context_tokens = 512, .vocabulary = 100, .trace = rows});
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
  const std::vector<TraceRow> rows = Rows(*ReadFile(kConversation, 1 << 20));
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Workload workload = Built(TraceLoad(1000, 0.25, 640), SeedsFrom(seed),
                                    {.context_tokens = 2048, .vocabulary = 4096, .trace = rows});
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
  std::vector<TraceRow> rows;
  for (uint32_t i = 1; i <= 10; ++i) rows.push_back({0, i, 1});
  const Workload workload = Built(TraceLoad(20, 1, 64), SeedsFrom(4),
                                  {.context_tokens = 64, .vocabulary = 100, .trace = rows});
  std::multiset<uint32_t> prompts;
  for (const WorkloadRequest& request : workload.requests()) prompts.insert(request.prompt_tokens);
  for (uint32_t i = 1; i <= 10; ++i) EXPECT_EQ(prompts.count(i), 2u);
}

TEST(WorkloadSeeds, EachRulesOneThing) {
  const std::vector<TraceRow> rows = Rows(*ReadFile(kConversation, 1 << 20));
  std::vector<int32_t> text(5000);
  std::iota(text.begin(), text.end(), 0);
  const WorkloadInputs inputs = {
      .context_tokens = 512, .vocabulary = 5000, .bos_id = 1, .text_ids = text, .trace = rows};
  const auto columns = [&](const Seeds& seeds) {
    std::vector<int64_t> arrivals, lengths, offsets;
    const Workload workload = Built(TraceLoad(50, 0.1, 512), seeds, inputs);
    for (const WorkloadRequest& request : workload.requests()) {
      arrivals.push_back(request.arrival_ns);
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
  EXPECT_EQ(warmup->requests()[2].arrival_ns, 0);
}

}  // namespace
}  // namespace kvsweep
