#include "base/text.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"

namespace kvsweep {
namespace {

TEST(EditDistance, CountsEdits) {
  EXPECT_EQ(EditDistance("", ""), 0u);
  EXPECT_EQ(EditDistance("", "abc"), 3u);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3u);
  EXPECT_EQ(EditDistance("reqeusts", "requests"), 1u);
}

TEST(NearestName, FindsWhatWasMeantAndNothingFarAway) {
  const std::vector<std::string> names = {"repeats", "requests", "seed", "rate"};
  EXPECT_EQ(NearestName("repeat", names), "repeats");
  EXPECT_EQ(NearestName("reqests", names), "requests");
  EXPECT_EQ(NearestName("Rate", names), "rate");
  EXPECT_EQ(NearestName("zebra", names), std::nullopt);
  EXPECT_EQ(NearestName("x", std::vector<std::string>{}), std::nullopt);
}

TEST(ParseBytes, TakesUnitsOfBothKinds) {
  EXPECT_EQ(*ParseBytes("0"), 0);
  EXPECT_EQ(*ParseBytes("4096"), 4096);
  EXPECT_EQ(*ParseBytes("6GiB"), int64_t{6} << 30);
  EXPECT_EQ(*ParseBytes("12MB"), 12'000'000);
  EXPECT_EQ(*ParseBytes(" 1.5 KiB "), 1536);
  // Fractions that binary numbers only approximate still come out whole.
  for (int tenths = 1; tenths < 10'000; ++tenths) {
    const std::string text = absl::StrCat(tenths / 10, ".", tenths % 10, "GB");
    EXPECT_EQ(ParseBytes(text).value_or(-1), tenths * int64_t{100'000'000}) << text;
  }
  EXPECT_EQ(*ParseBytes("9223372036854775807"), std::numeric_limits<int64_t>::max());
}

TEST(ParseBytes, RefusesTheRest) {
  for (const char* text : {"", "GiB", "-1", "-1GiB", "1.0001kB x", "6gib", "6 G", "1.5", "0.3KiB",
                           "nan", "inf", "1e30GiB", "9223372036854775808", "12MB/s", "0x10"}) {
    EXPECT_FALSE(ParseBytes(text).ok()) << text;
  }
  EXPECT_EQ(ParseBytes("6gib").status().message(),
            "\"6gib\" is not a size in bytes; write for example 512, 640KiB, 12MiB or 1.5GiB");
}

TEST(ParseDurationNs, TakesUnits) {
  EXPECT_EQ(*ParseDurationNs("0"), 0);
  EXPECT_EQ(*ParseDurationNs("500ms"), 500'000'000);
  EXPECT_EQ(*ParseDurationNs("250us"), 250'000);
  EXPECT_EQ(*ParseDurationNs("2h"), int64_t{7'200'000'000'000});
  EXPECT_EQ(*ParseDurationNs("1.5 s"), 1'500'000'000);
  EXPECT_EQ(*ParseDurationNs("1e-9s"), 1);
  for (const char* text : {"", "5", "-5s", "5sec", "inf", "1e30s", "300000d 1"}) {
    EXPECT_FALSE(ParseDurationNs(text).ok()) << text;
  }
}

TEST(ParseRatePerSecond, TakesUnits) {
  EXPECT_EQ(*ParseRatePerSecond("4/s"), 4);
  EXPECT_EQ(*ParseRatePerSecond("90/min"), 1.5);
  EXPECT_EQ(*ParseRatePerSecond("36 /h"), 0.01);
  EXPECT_TRUE(std::isinf(*ParseRatePerSecond("inf")));
  for (const char* text : {"", "4", "4/", "4/day", "-1/s", "/s", "nan/s"}) {
    EXPECT_FALSE(ParseRatePerSecond(text).ok()) << text;
  }
}

TEST(ParseBytesPerSecond, TakesUnitsOfBytes) {
  EXPECT_EQ(*ParseBytesPerSecond("55GB/s"), 55e9);
  EXPECT_EQ(*ParseBytesPerSecond("1 MiB/s"), 1048576);
  EXPECT_FALSE(ParseBytesPerSecond("55GB").ok());
}

TEST(ParseNumber, TakesPlainNumbers) {
  EXPECT_EQ(*ParseNumber("0.25"), 0.25);
  EXPECT_EQ(*ParseNumber("-3e2"), -300);
  EXPECT_TRUE(std::isinf(*ParseNumber("inf")));
  for (const char* text : {"", "one", "1 2", "nan", "1e999", "4/s"}) {
    EXPECT_FALSE(ParseNumber(text).ok()) << text;
  }
}

TEST(Format, IsShortAndReadable) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(int64_t{12} << 20), "12 MiB");
  EXPECT_EQ(FormatBytes((int64_t{1} << 20) - 1), "1 MiB");
  EXPECT_EQ(FormatDurationNs(0), "0 s");
  EXPECT_EQ(FormatDurationNs(250'000), "250 us");
  EXPECT_EQ(FormatDurationNs(-1'500'000), "-1.5 ms");
  EXPECT_EQ(FormatDurationNs(12'345'678'901), "12.3 s");
  EXPECT_EQ(FormatDurationNs(245 * int64_t{1'000'000'000}), "4 min 5 s");
  EXPECT_EQ(FormatDurationNs(9000 * int64_t{1'000'000'000}), "2 h 30 min");
  EXPECT_EQ(FormatDurationNs(86400 * int64_t{1'000'000'000}), "1 d");
  EXPECT_EQ(FormatRatePerSecond(4), "4/s");
  EXPECT_EQ(FormatRatePerSecond(std::numeric_limits<double>::infinity()), "inf");
}

TEST(FormatNumber, ReadsBackAsTheSameDouble) {
  Random random(11);
  for (int i = 0; i < 1000; ++i) {
    const double value = random.Normal() * std::pow(10, static_cast<int>(random.Uniform(60)) - 30);
    EXPECT_EQ(*ParseNumber(FormatNumber(value)), value);
  }
  EXPECT_EQ(FormatNumber(0.1), "0.1");
  EXPECT_EQ(FormatNumber(std::numeric_limits<double>::infinity()), "inf");
}

// Whatever the bytes, parsing ends in a value in range or a status.
TEST(Parse, SurvivesNoise) {
  Random random(77);
  const std::string alphabet("0123456789.eE+-/ kKMGiBnsuminhdaf\0\xff", 35);
  for (int i = 0; i < 50'000; ++i) {
    std::string text;
    for (uint64_t n = random.Uniform(12); n > 0; --n)
      text += alphabet[random.Uniform(alphabet.size())];
    EXPECT_GE(ParseBytes(text).value_or(0), 0) << text;
    EXPECT_GE(ParseDurationNs(text).value_or(0), 0) << text;
    EXPECT_GE(ParseRatePerSecond(text).value_or(0), 0) << text;
    EXPECT_FALSE(std::isnan(ParseNumber(text).value_or(0))) << text;
  }
}

}  // namespace
}  // namespace kvsweep
