#include "base/check.h"

#include <gtest/gtest.h>

namespace kvsweep {
namespace {

TEST(CheckDeathTest, FailureNamesPlaceConditionAndWords) {
  const int free = 3;
  EXPECT_DEATH(KVSWEEP_CHECK(free == 4) << "block " << 7,
               "check_test.cc:[0-9]+: check failed: free == 4 block 7");
  EXPECT_DEATH(KVSWEEP_CHECK_EQ(free, 4) << "blocks", "\\(3 vs 4\\) blocks");
  EXPECT_DEATH(KVSWEEP_CHECK_OK(absl::NotFoundError("no such trial")), "NOT_FOUND: no such trial");
  EXPECT_DEATH(KVSWEEP_CHECK_OK(absl::StatusOr<int>(absl::DataLossError("torn"))), "torn");
}

TEST(Check, PassingChecksEvaluateTheirConditionOnceAndNoWords) {
  int conditions = 0;
  int words = 0;
  KVSWEEP_CHECK(++conditions == 1) << ++words;
  EXPECT_EQ(conditions, 1);
  EXPECT_EQ(words, 0);
  KVSWEEP_CHECK_LE(1, 1);
  KVSWEEP_CHECK_OK(absl::OkStatus());
  KVSWEEP_CHECK_OK(absl::StatusOr<int>(1));
}

// Without braces, so that the macro must not capture the else.
TEST(Check, IsOneExpressionInsideIfElse) {
  for (const bool first : {true, false}) {
    bool took_else = false;
    if (first)
      KVSWEEP_CHECK(first) << "never";
    else
      took_else = true;
    EXPECT_EQ(took_else, !first);
  }
}

}  // namespace
}  // namespace kvsweep
