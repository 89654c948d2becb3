#include "kernels/limits.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

TEST(Limits, AreMeasuredAndMakeAProfile) {
  const std::unique_ptr<Backend> backend = *CreateCpuBackend({.threads = 1});
  const absl::StatusOr<MachineLimits> limits =
      MeasureLimits(*backend, {.all = true, .brief = true});
  ASSERT_TRUE(limits.ok()) << limits.status();
  EXPECT_EQ(limits->rows.size(), 12u);
  for (const Limit& limit : limits->rows) {
    EXPECT_GT(limit.value, 0) << limit.name;
    EXPECT_GE(limit.spread, 0) << limit.name;
  }
  const auto value = [&](absl::string_view name) {
    const auto found = std::ranges::find(limits->rows, name, &Limit::name);
    return found == limits->rows.end() ? 0 : found->value;
  };
  EXPECT_EQ(limits->profile.device_bytes_per_s, value("read"));
  EXPECT_EQ(limits->profile.link_bytes_per_s, value("link to device"));
  EXPECT_EQ(limits->profile.operations_per_s, value("f32 product of 1536^3 by the BLAS"));
  EXPECT_EQ(limits->profile.operation_ns, value("graph node"));
  EXPECT_EQ(limits->profile.element_bytes, 4);
  EXPECT_EQ(backend->allocated_bytes(Tier::kDevice), 0u);
  EXPECT_EQ(backend->allocated_bytes(Tier::kHost), 0u);
}

}  // namespace
}  // namespace kvsweep
