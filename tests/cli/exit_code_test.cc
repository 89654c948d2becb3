#include "cli/exit_code.h"

#include <gtest/gtest.h>

namespace kvsweep {
namespace {

// The table of docs/CLI.md.
TEST(ExitCodeTest, SaysWhoseFaultItWas) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("the query took more than 30 s")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("a bad spec")), 2);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("no such experiment")), 2);
  EXPECT_EQ(ExitCodeOf(absl::ResourceExhaustedError("more than 1000000 trials")), 2);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("nobody answers")), 3);
  EXPECT_EQ(ExitCodeOf(absl::DataLossError("a damaged store")), 3);
  EXPECT_EQ(ExitCodeOf(absl::CancelledError("interrupted")), 130);
}

}  // namespace
}  // namespace kvsweep
