#include "base/digest.h"

#include <gtest/gtest.h>

#include "base/file.h"

namespace kvsweep {
namespace {

// FIPS 180-2, appendix B.1.
constexpr char kAbcHex[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST(Digest, MatchesTheStandardsExample) {
  EXPECT_EQ(Sha256("abc").Hex(), kAbcHex);
  EXPECT_EQ(DigestBuilder().AddRaw("a").AddRaw("bc").Finish(), Sha256("abc"));
}

TEST(Digest, ReadsBackFromHexAndBytes) {
  const Digest digest = Sha256("abc");
  EXPECT_EQ(*Digest::FromHex(kAbcHex), digest);
  EXPECT_EQ(*Digest::FromHex("BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD"),
            digest);
  EXPECT_EQ(*Digest::FromBytes(digest.bytes()), digest);
  EXPECT_FALSE(digest.empty());
  EXPECT_TRUE(Digest().empty());
}

TEST(Digest, RefusesWhatIsNoDigest) {
  EXPECT_FALSE(Digest::FromHex("").ok());
  EXPECT_FALSE(Digest::FromHex(std::string(kAbcHex).substr(1)).ok());
  EXPECT_FALSE(Digest::FromHex(std::string(63, 'a') + "g").ok());
  EXPECT_FALSE(Digest::FromBytes("short").ok());
}

TEST(DigestBuilder, LengthsKeepPartsApart) {
  EXPECT_NE(DigestBuilder().Add("ab").Add("c").Finish(),
            DigestBuilder().Add("a").Add("bc").Finish());
  EXPECT_NE(DigestBuilder().Add("").Finish(), DigestBuilder().Finish());
  EXPECT_NE(DigestBuilder().AddNumber(1).Finish(), DigestBuilder().AddNumber(256).Finish());
}

TEST(DigestBuilder, FinishMayBeAskedOnTheWay) {
  DigestBuilder builder;
  builder.Add("a");
  const Digest first = builder.Finish();
  EXPECT_EQ(builder.Finish(), first);
  builder.Add("b");
  EXPECT_EQ(builder.Finish(), DigestBuilder().Add("a").Add("b").Finish());
}

TEST(DigestFile, ReadsMoreThanOneBufferAndNamesAMissingFile) {
  const TempDir dir;
  const std::string content(3'000'001, 'x');
  ASSERT_TRUE(WriteFileAtomic(dir.Join("large"), content).ok());
  EXPECT_EQ(*DigestFile(dir.Join("large")), Sha256(content));
  const auto missing = DigestFile(dir.Join("missing"));
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(missing.status().message().find("missing"), absl::string_view::npos);
}

}  // namespace
}  // namespace kvsweep
