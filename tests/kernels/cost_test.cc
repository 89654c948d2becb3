#include "kernels/cost.h"

#include "gtest/gtest.h"

namespace kvsweep {
namespace {

TEST(DeviceProfile, IsFoundByNameAndTheErrorNamesTheKnownOnes) {
  for (const std::string& name : DeviceProfileNames()) {
    const DeviceProfile profile = FindDeviceProfile(name).value();
    EXPECT_EQ(profile.name, name);
    EXPECT_GT(profile.device_bytes_per_s, profile.link_bytes_per_s);
    EXPECT_GT(profile.operations_per_s, 0);
  }
  const absl::Status status = FindDeviceProfile("b300").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "unknown device profile \"b300\"; known are h100, h200, laptop");
}

TEST(DurationNs, IsTheSlowestPartPlusTheFixedCost) {
  const DeviceProfile profile{.name = "test",
                              .device_bytes_per_s = 2e9,
                              .link_bytes_per_s = 1e9,
                              .operations_per_s = 4e9,
                              .operation_ns = 7};
  EXPECT_EQ(DurationNs({.device_bytes = 200}, profile), 107);
  EXPECT_EQ(DurationNs({.device_bytes = 200, .link_bytes = 300, .operations = 100}, profile), 307);
  EXPECT_EQ(DurationNs({.operations = 4000}, profile), 1007);
}

// Hand-counted: one decode row of a model with 4 query heads, 2 KV heads of 64, bf16 cache of 100
// tokens.
TEST(Cost, OfADecodeStepIsWhatItMustMove) {
  const GemmArgs gemm{.rows = 1, .out_columns = 256, .in_columns = 512};
  EXPECT_EQ(GemmCost(gemm, 2).device_bytes, 2 * (256 * 512 + 256 + 512));
  EXPECT_EQ(GemmCost(gemm, 2).operations, 2.0 * 256 * 512);

  DecodeAttentionArgs attention{.rows = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
  attention.view.dtype = DType::kBf16;
  std::byte somewhere;
  attention.view.value = &somewhere;
  const double stored = 100 * 2 * (64 + 64) * 2;
  EXPECT_EQ(DecodeAttentionCost(attention, 200, 2, false).device_bytes, stored + 2 * 4 * 64 * 2);
  const Cost host = DecodeAttentionCost(attention, 200, 2, true);
  EXPECT_EQ(host.link_bytes, stored);
  EXPECT_EQ(host.operations, 4.0 * 100 * 4 * 64);
}

TEST(Cost, OfACopyDependsOnItsEnds) {
  EXPECT_EQ(CopyCost(10, true, false).link_bytes, 10);
  EXPECT_EQ(CopyCost(10, true, false).device_bytes, 10);
  EXPECT_EQ(CopyCost(10, false, true).link_bytes, 10);
  EXPECT_EQ(CopyCost(10, false, false).link_bytes, 0);
  EXPECT_EQ(CopyCost(10, false, false).device_bytes, 20);
  EXPECT_EQ(CopyCost(10, true, true).link_bytes, 0);
}

// Chunks of a prompt attend to the same pairs as the whole of it.
TEST(Cost, OfPrefillDoesNotDependOnChunks) {
  PrefillAttentionArgs whole{.rows = 300, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
  float somewhere;
  whole.chunk_key = whole.chunk_value = {.data = &somewhere, .stride = 128};
  PrefillAttentionArgs first = whole;
  first.rows = 128;
  PrefillAttentionArgs second = whole;
  second.rows = 172;
  second.history_tokens = 128;
  EXPECT_EQ(PrefillAttentionCost(whole, 2, false).operations,
            PrefillAttentionCost(first, 2, false).operations +
                PrefillAttentionCost(second, 2, false).operations);
}

}  // namespace
}  // namespace kvsweep
