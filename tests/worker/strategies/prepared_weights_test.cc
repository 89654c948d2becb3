#include "worker/strategies/prepared_weights.h"

#include <gtest/gtest.h>

#include <string>

namespace kvsweep {
namespace {

class PreparedWeightsTest : public testing::Test {
 protected:
  // Asks for a matrix of 8 bytes of weights and one float; returns the first of its bytes.
  int Ask(const std::string& name, int value) {
    const auto matrix =
        weights_.Get(Sha256(name), [&]() -> absl::StatusOr<PreparedWeights::Matrix> {
          ++made_;
          return PreparedWeights::Matrix{.weight = std::vector(8, static_cast<std::byte>(value)),
                                         .bias = {1.0f}};
        });
    return static_cast<int>((*matrix)->weight[0]);
  }

  PreparedWeights weights_{/*most_bytes=*/30};
  int made_ = 0;
};

TEST_F(PreparedWeightsTest, AreMadeOnce) {
  EXPECT_EQ(Ask("a", 1), 1);
  EXPECT_EQ(Ask("a", 2), 1);
  EXPECT_EQ(made_, 1);
  EXPECT_EQ(weights_.bytes(), 12u);
}

TEST_F(PreparedWeightsTest, TheLongestUnusedAreForgotten) {
  Ask("a", 1);
  Ask("b", 2);
  Ask("a", 1);
  Ask("c", 3);  // there is room for two
  EXPECT_EQ(weights_.bytes(), 24u);
  EXPECT_EQ(Ask("a", 4), 1);
  EXPECT_EQ(Ask("b", 5), 5);
}

TEST_F(PreparedWeightsTest, WhatIsTooLargeIsNotKept) {
  Ask("a", 1);
  for (int i = 0; i < 2; ++i) {
    const auto large = weights_.Get(Sha256("large"), [&] {
      ++made_;
      return PreparedWeights::Matrix{.weight = std::vector<std::byte>(31), .bias = {}};
    });
    EXPECT_EQ((*large)->weight.size(), 31u);
  }
  EXPECT_EQ(made_, 3);
  EXPECT_EQ(Ask("a", 2), 1);
}

TEST_F(PreparedWeightsTest, ErrorsAreReturnedAndNotKept) {
  const auto failed = weights_.Get(Sha256("a"), []() -> absl::StatusOr<PreparedWeights::Matrix> {
    return absl::InternalError("no");
  });
  EXPECT_EQ(failed.status(), absl::InternalError("no"));
  EXPECT_EQ(Ask("a", 1), 1);
}

}  // namespace
}  // namespace kvsweep
