#include "base/ids.h"

#include <gtest/gtest.h>

#include <sstream>
#include <type_traits>
#include <unordered_set>

#include "absl/container/flat_hash_set.h"

namespace kvsweep {
namespace {

// The point of the template: one kind of number cannot stand for another, nor a bare number for
// either.
static_assert(!std::is_convertible_v<uint64_t, TrialId>);
static_assert(!std::is_convertible_v<TrialId, uint64_t>);
static_assert(!std::is_constructible_v<TrialId, RoundId>);

TEST(StrongId, ComparesAndOrdersByValue) {
  EXPECT_EQ(TrialId(7), TrialId(7));
  EXPECT_NE(TrialId(7), TrialId());
  EXPECT_LT(Attempt(1), Attempt(2));
  EXPECT_LT(WorkerId("a"), WorkerId("b"));
}

TEST(StrongId, HashesInBothKindsOfTables) {
  EXPECT_EQ((absl::flat_hash_set<TrialId>{TrialId(1), TrialId(2), TrialId(1)}.size()), 2u);
  EXPECT_EQ((std::unordered_set<WorkerId>{WorkerId("a"), WorkerId("a")}.size()), 1u);
}

TEST(StrongId, PrintsItsValue) {
  std::ostringstream out;
  out << TrialId(42) << " " << WorkerId("gpu-3");
  EXPECT_EQ(out.str(), "42 gpu-3");
}

}  // namespace
}  // namespace kvsweep
