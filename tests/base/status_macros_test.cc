#include "base/status_macros.h"

#include <gtest/gtest.h>

#include <memory>

#include "absl/strings/cord.h"

namespace kvsweep {
namespace {

absl::StatusOr<std::unique_ptr<int>> Make(bool succeed) {
  if (!succeed) return absl::NotFoundError("no number");
  return std::make_unique<int>(7);
}

absl::StatusOr<int> Chain(bool first, bool second) {
  ASSIGN_OR_RETURN(const std::unique_ptr<int> number, Annotate(Make(first), "first"));
  RETURN_IF_ERROR(Annotate(Make(second).status(), "second"));
  return *number;
}

TEST(StatusMacros, PassValuesAndReturnTheFirstError) {
  EXPECT_EQ(*Chain(true, true), 7);
  EXPECT_EQ(Chain(false, true).status(), absl::NotFoundError("first: no number"));
  EXPECT_EQ(Chain(true, false).status(), absl::NotFoundError("second: no number"));
}

TEST(Annotate, KeepsPayloadsAndLeavesOkAlone) {
  absl::Status status = absl::DataLossError("torn page");
  status.SetPayload("trial", absl::Cord("9"));
  const absl::Status annotated = Annotate(Annotate(status, "page 3"), "store");
  EXPECT_EQ(annotated.message(), "store: page 3: torn page");
  EXPECT_EQ(*annotated.GetPayload("trial"), "9");
  EXPECT_TRUE(Annotate(absl::OkStatus(), "store").ok());
}

}  // namespace
}  // namespace kvsweep
