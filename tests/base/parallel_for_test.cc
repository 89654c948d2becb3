#include "base/parallel_for.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace kvsweep {
namespace {

TEST(ParallelForTest, DoesEveryPieceOnce) {
  for (const size_t count : {0, 1, 2, 1000}) {
    std::vector<int> done(count, 0);
    ParallelFor(count, [&](size_t i) { ++done[i]; });
    EXPECT_THAT(done, testing::Each(1));
  }
}

}  // namespace
}  // namespace kvsweep
