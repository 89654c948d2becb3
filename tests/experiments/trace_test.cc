#include "experiments/trace.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kConversation[] = "experiments/data/azure_llm_2023_conv.csv";
constexpr char kShareGpt[] = "experiments/data/sharegpt_8k_lengths_llama2.csv";
constexpr char kMooncake[] = "experiments/data/mooncake_fast25_conversation.jsonl";

Trace Parsed(absl::string_view text) {
  absl::StatusOr<Trace> trace = ParseTrace(text, "t.csv");
  EXPECT_TRUE(trace.ok()) << trace.status();
  return trace.ok() ? *std::move(trace) : Trace();
}

std::vector<TraceRow> RowsOf(absl::string_view text) { return Parsed(text).rows; }

std::string TraceError(absl::string_view text) {
  return std::string(ParseTrace(text, "t.csv").status().message());
}

TEST(AzureTrace, NativeFileIsReadToTheLastByte) {
  const auto text = ReadFile(kConversation, 1 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  ASSERT_NE(text->back(), '\n') << "the file ends without a newline";
  const std::vector<TraceRow> rows = RowsOf(*text);
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
  const std::vector<TraceRow> rows = RowsOf(
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
    const auto rows = ParseTrace(text, "t.csv");
    EXPECT_TRUE(rows.ok() || rows.status().code() == absl::StatusCode::kInvalidArgument);
  }
}

TEST(ShareGptTrace, NativeFileIsReadWholeAndHasNoTimes) {
  const Trace trace = Parsed(*ReadFile(kShareGpt, 1 << 20));
  EXPECT_FALSE(trace.has_times);
  ASSERT_EQ(trace.rows.size(), 30'731u);
  EXPECT_EQ(trace.rows[0].context_tokens, 74u);
  EXPECT_EQ(trace.rows[0].generated_tokens, 918u);
  EXPECT_TRUE(trace.BlocksOf(trace.rows[0]).empty());
}

TEST(ShareGptTrace, ErrorsNameTheLine) {
  const auto error = [](absl::string_view row) {
    return TraceError(absl::StrCat(
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n1,2,3,0.5\n", row));
  };
  EXPECT_THAT(error("1,2,4,0.5"), HasSubstr("t.csv:3: \"1,2,4,0.5\": num_total_tokens is not"));
  EXPECT_THAT(error("1,2"), HasSubstr("no token counts"));
  EXPECT_THAT(error("1,-2,3,0.5"), HasSubstr("no token counts"));
  EXPECT_THAT(error("4000000000,1,4000000001,1"), HasSubstr("more tokens than any"));
}

TEST(MooncakeTrace, NativeFileIsReadWhole) {
  const Trace trace = Parsed(*ReadFile(kMooncake, 8 << 20));
  EXPECT_TRUE(trace.has_times);
  ASSERT_EQ(trace.rows.size(), 12'031u);
  EXPECT_EQ(trace.block_ids.size(), 288'500u);
  EXPECT_EQ(trace.rows[0].context_tokens, 6758u);
  EXPECT_EQ(trace.rows[0].generated_tokens, 500u);
  EXPECT_EQ(trace.BlocksOf(trace.rows[0]).size(), 14u);
  EXPECT_THAT(trace.BlocksOf(trace.rows[3]), ElementsAre(0, 42, 43, 44, 45));
  // 59 minutes, as published.
  EXPECT_NEAR(static_cast<double>(trace.rows.back().time_ns) / 1e9, 3537, 1);
}

TEST(MooncakeTrace, ErrorsNameTheLine) {
  const std::string good =
      R"({"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]})";
  EXPECT_EQ(Parsed(good).rows.size(), 1u);
  EXPECT_EQ(Parsed(good + "\r\n" + good + "\n").rows.size(), 2u);
  const auto error = [&](absl::string_view row) {
    return TraceError(absl::StrCat(good, "\n", row));
  };
  EXPECT_THAT(error("{"), HasSubstr("t.csv:2: \"{\": not a JSON object; write"));
  EXPECT_THAT(error("[1]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error("\n" + good), HasSubstr("t.csv:2: \"\": not a JSON object"));
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string row = good;
    row.replace(row.find(from), from.size(), to);
    return error(row);
  };
  EXPECT_THAT(with("output", "outptu"), HasSubstr("a field is missing or no whole number"));
  EXPECT_THAT(with("600", "600.5"), HasSubstr("a field is missing or no whole number"));
  EXPECT_THAT(with("600", "-600"), HasSubstr("a field is missing or no whole number"));
  EXPECT_THAT(with("600", "500"), HasSubstr("2 hash_ids for 500 tokens; 1 blocks of 512 need 1"));
  EXPECT_THAT(with("1]", "\"x\"]"), HasSubstr("a hash id that is no whole number"));
  EXPECT_THAT(with("600", "99999999999"), HasSubstr("more tokens than any model"));
  EXPECT_THAT(with("5,", "4,"), HasSubstr("its time lies before that of the line above"));
  EXPECT_THAT(with("5,", "9999999999999999,"), HasSubstr("more than a century"));
  EXPECT_THAT(error(std::string(limits::kTraceLineBytes + 1, '{')), HasSubstr("longer than"));
}

TEST(MooncakeTrace, SurvivesRandomDamage) {
  const uint64_t seed = 6;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  for (int round = 0; round < 2000; ++round) {
    std::string text =
        "{\"timestamp\": 0, \"input_length\": 9, \"output_length\": 1, \"hash_ids\": [0]}\n"
        "{\"timestamp\": 1, \"input_length\": 513, \"output_length\": 1, \"hash_ids\": [0, 7]}";
    for (int i = 0; i < 3; ++i) {
      text[1 + random.Uniform(text.size() - 1)] = static_cast<char>(random.Uniform(256));
    }
    const auto trace = ParseTrace(text, "t.jsonl");
    EXPECT_TRUE(trace.ok() || trace.status().code() == absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace kvsweep
