// Whole blocks between pools and tiers, and what the host may learn of a copy under way.
#include <numeric>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

constexpr int64_t kBlock = 8;  // int32 values

std::vector<int32_t> Pool(int32_t first, int32_t blocks) {
  std::vector<int32_t> values(static_cast<size_t>(blocks * kBlock));
  std::iota(values.begin(), values.end(), first);
  return values;
}

CopyBlocksArgs Blocks(int32_t* target, const int32_t* source, const int32_t* pair, int32_t count) {
  return {.target = reinterpret_cast<std::byte*>(target),
          .source = reinterpret_cast<const std::byte*>(source),
          .pair = pair,
          .block_bytes = kBlock * 4,
          .count = count};
}

TEST(CopyBlocks, CopiesTheNamedBlocksAndNoOther) {
  for (const Tier source_tier : {Tier::kDevice, Tier::kHost}) {
    for (const Tier target_tier : {Tier::kDevice, Tier::kHost}) {
      Device device;
      const int32_t* const source = device.Put(Pool(1000, 6), source_tier);
      int32_t* const target = device.Put(Pool(0, 5), target_tier);
      const int32_t* const pair = device.Put(std::vector<int32_t>{5, 0, 2, 4, 5, 3});
      device.backend.CopyBlocks(Blocks(target, source, pair, 3), Stream::kHostToDevice);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      std::vector<int32_t> expected = Pool(0, 5);
      for (const auto& [from, to] : {std::pair{5, 0}, {2, 4}, {5, 3}}) {
        std::copy_n(source + from * kBlock, kBlock, expected.begin() + to * kBlock);
      }
      EXPECT_EQ(std::vector<int32_t>(target, target + 5 * kBlock), expected);
      const bool in = source_tier == Tier::kHost && target_tier == Tier::kDevice;
      const bool out = source_tier == Tier::kDevice && target_tier == Tier::kHost;
      EXPECT_EQ(device.backend.link_bytes_to_device(), in ? 3u * kBlock * 4 : 0u);
      EXPECT_EQ(device.backend.link_bytes_to_host(), out ? 3u * kBlock * 4 : 0u);
    }
  }
}

TEST(CopyBlocks, ANegativeBlockIsAnError) {
  Device device;
  int32_t* const pool = device.Put(Pool(0, 4));
  const int32_t* const pair = device.Put(std::vector<int32_t>{0, 1, 2, -1});
  device.backend.CopyBlocks(Blocks(pool, pool, pair, 2), Stream::kCompute);
  const absl::Status status = device.backend.WaitAll();
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("CopyBlocks"));
  EXPECT_EQ(pool[kBlock], kBlock) << "nothing was written";
}

// In modelled time a copy is reached when the host's clock has passed it, and lasts what it moves.
TEST(Reached, SaysWhetherACopyLiesInTheHostsPast) {
  DeviceProfile profile = *FindDeviceProfile("h200");
  profile.link_bytes_per_s = 1e9;
  profile.operation_ns = 0;
  Device device({.threads = 1, .modelled = profile});
  Backend& backend = device.backend;
  const Event begun = backend.CreateEvent();
  const Event done = backend.CreateEvent();
  const Event compute = backend.CreateEvent();
  EXPECT_TRUE(backend.Reached(done)) << "never recorded";
  std::byte* const host = device.Room<std::byte>(5000, Tier::kHost);
  std::byte* const target = device.Room<std::byte>(5000);
  backend.RecordEvent(begun, Stream::kHostToDevice);
  backend.Copy(target, host, 5000, Stream::kHostToDevice);  // 5 us
  backend.RecordEvent(done, Stream::kHostToDevice);
  backend.Copy(host, target, 2000, Stream::kDeviceToHost);  // 2 us
  backend.RecordEvent(compute, Stream::kDeviceToHost);
  ASSERT_TRUE(backend.Wait(compute).ok());
  EXPECT_FALSE(backend.Reached(done));
  EXPECT_EQ(backend.modelled_ns(), 2000);
  ASSERT_TRUE(backend.Wait(done).ok());
  EXPECT_TRUE(backend.Reached(done));
  EXPECT_EQ(backend.ElapsedNs(begun, done), 5000);
}

}  // namespace
}  // namespace kvsweep
