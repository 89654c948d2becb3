#include "kernels/shapes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace kvsweep {
namespace {

TEST(Fp8E4m3Test, EveryByteComesBack) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto stored = static_cast<uint8_t>(byte);
    const float value = WidenFp8E4m3(stored);
    EXPECT_EQ(std::isnan(value), (byte & 0x7f) == 0x7f) << byte;
    EXPECT_EQ(NarrowFp8E4m3(value), stored) << byte;
  }
  EXPECT_EQ(WidenFp8E4m3(0x7e), 448.0f);
  EXPECT_EQ(WidenFp8E4m3(0x01), 0x1p-9f);
  EXPECT_EQ(WidenFp8E4m3(0x38), 1.0f);
  EXPECT_EQ(WidenFp8E4m3(0xb8), -1.0f);
}

// Between two neighbours the nearer one wins, in the middle the even one.
TEST(Fp8E4m3Test, RoundsToNearestEvenAndSaturates) {
  for (int byte = 0; byte < 0x7e; ++byte) {
    const float low = WidenFp8E4m3(static_cast<uint8_t>(byte));
    const float high = WidenFp8E4m3(static_cast<uint8_t>(byte + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(NarrowFp8E4m3(middle), byte % 2 == 0 ? byte : byte + 1) << byte;
    EXPECT_EQ(NarrowFp8E4m3(std::nextafter(middle, 0.0f)), byte) << byte;
    EXPECT_EQ(NarrowFp8E4m3(std::nextafter(middle, 1e9f)), byte + 1) << byte;
    EXPECT_EQ(NarrowFp8E4m3(-std::nextafter(middle, 1e9f)), (byte + 1) | 0x80) << byte;
  }
  for (const float large : {448.0f, 460.0f, 1e9f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(NarrowFp8E4m3(large), 0x7e);
    EXPECT_EQ(NarrowFp8E4m3(-large), 0xfe);
  }
  EXPECT_TRUE(std::isnan(WidenFp8E4m3(NarrowFp8E4m3(std::nanf("")))));
}

TEST(Fp8E4m3Test, IsOneByteAndConvertsInRows) {
  EXPECT_EQ(DTypeBytes(DType::kFp8E4m3), 1);
  EXPECT_STREQ(DTypeName(DType::kFp8E4m3), "fp8_e4m3");
  const std::vector<float> in = {1.0f, 1.06f, -500.0f, 0.0f};
  std::vector<uint8_t> stored(in.size());
  FromFloats(in, DType::kFp8E4m3, stored.data());
  std::vector<float> out(in.size());
  ToFloats(stored.data(), DType::kFp8E4m3, out);
  EXPECT_EQ(out, (std::vector<float>{1.0f, 1.0f, -448.0f, 0.0f}));
}

}  // namespace
}  // namespace kvsweep
