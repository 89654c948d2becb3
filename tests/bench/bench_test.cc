// What kvsweep-bench does before and after it measures: axes, medians, and that every kernel's case
// runs, small, on the CPU backend.
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/cases.h"
#include "tests/bench/measure.h"

namespace kvsweep {
namespace {

TEST(Axis, ReadsListsAndSingleValues) {
  EXPECT_EQ(ParseAxis("B=[1,8,32]")->values, (std::vector<int64_t>{1, 8, 32}));
  EXPECT_EQ(ParseAxis("context=4096")->name, "context");
  EXPECT_EQ(ParseAxis("context=4096")->values, std::vector<int64_t>{4096});
  for (const char* wrong : {"", "B", "B=", "B=[1,x]", "B=[1,]"}) {
    EXPECT_FALSE(ParseAxis(wrong).ok()) << wrong;
  }
}

TEST(Axis, ExpandsWithTheLastAxisFastest) {
  const std::vector<Point> points = Expand({{"a", {1, 2}}, {"b", {3, 4}}});
  ASSERT_EQ(points.size(), 4u);
  EXPECT_EQ(points[1].at("a"), 1);
  EXPECT_EQ(points[1].at("b"), 4);
  EXPECT_EQ(points[2].at("a"), 2);
  EXPECT_EQ(points[2].at("b"), 3);
}

TEST(Summary, TakesMedianAndQuartiles) {
  const Timing timing = Summarise({5, 1, 2, 4, 3});
  EXPECT_EQ(timing.median_ns, 3);
  EXPECT_DOUBLE_EQ(timing.spread, 2.0 / 3.0);
  EXPECT_EQ(timing.samples, 5);
}

// Shapes at which a case takes milliseconds.
int64_t Small(const std::string& axis, int64_t value) {
  if (axis == "B" || axis == "page" || axis == "splits" || axis == "probability") {
    return axis == "B" ? 2 : value;
  }
  if (axis == "history") return 128;
  if (axis == "Hq") return 4;
  if (axis == "Hk" || axis == "group") return 2;
  if (axis == "d" || axis == "partial" || axis == "selected") return 16;
  return 64;
}

TEST(KernelCases, AllRunAndSayWhatTheyMustMove) {
  CpuBackend backend({.threads = 2});
  for (const KernelCase& kernel : KernelCases()) {
    SCOPED_TRACE(kernel.name);
    Point point;
    for (const Axis& axis : kernel.axes) point.Set(axis.name, Small(axis.name, axis.values[0]));
    CaseMemory memory(backend);
    const absl::StatusOr<PreparedCase> prepared = kernel.prepare(memory, point);
    ASSERT_TRUE(prepared.ok()) << prepared.status();
    const absl::StatusOr<Timing> timing =
        Measure(backend, 2, prepared->enqueue, {.least_samples = 2, .seconds = 0});
    ASSERT_TRUE(timing.ok()) << timing.status();
    EXPECT_GT(timing->median_ns, 0);
    EXPECT_GT(prepared->cost.device_bytes + prepared->cost.link_bytes, 0);
  }
}

}  // namespace
}  // namespace kvsweep
