#include "coordinator/persistence.h"

#include <gtest/gtest.h>

#include <variant>

namespace kvsweep {
namespace {

// A cancellation ends all that is open of its experiment; what the same plan ends beside it must
// have been applied by then, or the store refuses it.
TEST(RowsOf, CancelsComeBehindWhatEndsAndAheadOfWhatBegins) {
  SchedulerPlan plan;
  plan.cancels.push_back(ExperimentId(1));
  plan.voids.push_back({.attempt = Attempt(1), .round = RoundId(1), .mishap = {}});
  plan.finishes.push_back({.round = RoundId(2),
                           .experiment = ExperimentId(1),
                           .end = RoundEnd::kFailed,
                           .poisoned_trial = {},
                           .reason = "gave up"});
  plan.grants.emplace_back();
  const std::vector<Operation> rows = RowsOf(plan, 5);
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_TRUE(std::holds_alternative<CancelExperiment>(rows[2]));
  EXPECT_FALSE(std::holds_alternative<CancelExperiment>(rows[3]));
}

}  // namespace
}  // namespace kvsweep
