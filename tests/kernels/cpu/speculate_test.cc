// InfiniGen's way from thin queries to fetched rows: speculate, gather_rows, and the
// ring's copy_tile.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/cpu/kv_rows.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

TEST(Speculate, EqualsTheReference) {
  Random random(1);
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const auto& [group, d] : {std::pair{1, 8}, {2, 24}, {3, 16}, {4, 40}, {7, 64}}) {
      SCOPED_TRACE(absl::StrCat(DTypeName(dtype), " group ", group, " d' ", d));
      Device device;
      const std::vector<int32_t> lengths = {0, 1, 9, 64, 150, 5};
      const Cache cache = MakeCache(
          device, random,
          {.lengths = lengths, .kv_heads = 2, .head_dim = d, .dtype = dtype, .with_values = false});
      const std::vector<float> query = RandomFloats(random, 6 * 2 * group * d, true);
      const SpeculateArgs args{.margin = device.Room<float>(6 * 2 * 150),
                               .margin_stride = 150,
                               .count = device.Put(std::vector<int32_t>(12, -1)),
                               .query = device.PutRows(query, 6, 2 * group * d),
                               .partial_key = cache.view,
                               .row_active = device.Put(std::vector<int32_t>{1, 1, 1, 1, 1, 0}),
                               .alpha = 4.0f,
                               .rows = 6,
                               .query_heads = 2 * group,
                               .kv_heads = 2,
                               .partial_dim = d};
      device.backend.Speculate(args, Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      for (int32_t row = 0; row < 6; ++row) {
        for (int32_t head = 0; head < 2; ++head) {
          const int32_t n = row == 5 ? 0 : lengths[row];
          std::vector<double> margin(n, -std::numeric_limits<double>::infinity());
          double bound = 0;
          for (int32_t q = head * group; n > 0 && q < (head + 1) * group; ++q) {
            std::vector<double> score(n, 0.0);
            for (int32_t t = 0; t < n; ++t) {
              double size = 0;
              for (int32_t i = 0; i < d; ++i) {
                const double term =
                    double{query[(row * 2 * group + q) * d + i]} * cache.Key(row, t, head)[i];
                score[t] += term;
                size += std::abs(term);
              }
              bound = std::max(bound, size);
            }
            const double highest = *std::max_element(score.begin(), score.end());
            for (int32_t t = 0; t < n; ++t) margin[t] = std::max(margin[t], score[t] - highest);
          }
          const double tolerance = 2 * (d / 8 + 4) * 1.2e-7 * bound;
          int32_t least = 0;
          int32_t most = 0;
          const float* const line = args.margin + (row * 2 + head) * 150;
          for (int32_t t = 0; t < n; ++t) {
            EXPECT_NEAR(line[t], margin[t], tolerance);
            least += margin[t] > -4 + tolerance ? 1 : 0;
            most += margin[t] > -4 - tolerance ? 1 : 0;
          }
          EXPECT_GE(args.count[row * 2 + head], least);
          EXPECT_LE(args.count[row * 2 + head], most);
        }
      }
    }
  }
}

TEST(Speculate, InfiniteAlphaCountsEverything) {
  Random random(2);
  Device device;
  const Cache cache =
      MakeCache(device, random, {.lengths = {77}, .head_dim = 8, .with_values = false});
  const SpeculateArgs args{.margin = device.Room<float>(80),
                           .margin_stride = 80,
                           .count = device.Room<int32_t>(1),
                           .query = device.PutRows(RandomFloats(random, 8, true), 1, 8),
                           .partial_key = cache.view,
                           .alpha = std::numeric_limits<float>::infinity(),
                           .rows = 1,
                           .query_heads = 1,
                           .kv_heads = 1,
                           .partial_dim = 8};
  device.backend.Speculate(args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(args.count[0], 77);
}

std::vector<float> Row(const KvView& view, const std::byte* pool, int64_t row, int64_t slot,
                       int64_t head, int32_t d) {
  std::vector<float> values(d);
  cpu::LoadElements(values.data(), pool, view.dtype, cpu::KvOffset(view, row, slot, head), d);
  return values;
}

void ExpectSlot(const Cache& target, int64_t row, int64_t slot, const Cache& source,
                int64_t source_row, int64_t token, int64_t head) {
  const int32_t d = source.shape.head_dim;
  const float* const key = source.Key(source_row, token, head);
  const float* const value = source.Value(source_row, token, head);
  EXPECT_EQ(Row(target.view, target.view.key, row, slot, head, d),
            std::vector<float>(key, key + d));
  EXPECT_EQ(Row(target.view, target.view.value, row, slot, head, d),
            std::vector<float>(value, value + d));
}

// Both copies, from a host pool to device buffers of another block size; link bytes are what was
// moved and nothing else.
TEST(GatherRows, BringsTheSelectedRowsAndCountsTheirBytes) {
  Random random(4);
  for (DType dtype : {DType::kF32, DType::kBf16}) {
    Device device;
    const Cache pool = MakeCache(device, random,
                                 {.lengths = {20, 7, 33},
                                  .kv_heads = 2,
                                  .block_size = 16,
                                  .dtype = dtype,
                                  .tier = Tier::kHost});
    const Cache buffer = MakeCache(
        device, random, {.lengths = {6, 6, 6}, .kv_heads = 2, .block_size = 4, .dtype = dtype});
    const std::vector<int32_t> selected = {3, 1, 2, 2, 5, 0};  // by row and head
    std::vector<int32_t> index(3 * 2 * 8, -1);
    for (int32_t pair = 0; pair < 6; ++pair) {
      for (int32_t j = 0; j < selected[pair]; ++j) {
        index[pair * 8 + j] = static_cast<int32_t>(random.Uniform(pool.shape.lengths[pair / 2]));
      }
    }
    const uint64_t before = device.backend.link_bytes_to_device();
    const uint64_t to_host = device.backend.link_bytes_to_host();
    device.backend.GatherRows({.target = buffer.view,
                               .source = pool.view,
                               .selected = device.Put(selected),
                               .index = device.Put(index),
                               .index_stride = 8,
                               .row_active = device.Put(std::vector<int32_t>{1, 0, 1}),
                               .rows = 3,
                               .kv_heads = 2,
                               .head_dim = 8},
                              Stream::kHostToDevice);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    EXPECT_EQ(device.backend.link_bytes_to_device() - before,
              static_cast<uint64_t>((3 + 1 + 5 + 0) * 2 * 8 * DTypeBytes(dtype)));
    EXPECT_EQ(device.backend.link_bytes_to_host(), to_host);
    for (int32_t row : {0, 2}) {
      for (int32_t head = 0; head < 2; ++head) {
        for (int32_t j = 0; j < selected[row * 2 + head]; ++j) {
          ExpectSlot(buffer, row, j, pool, row, index[(row * 2 + head) * 8 + j], head);
        }
      }
    }
    ExpectSlot(buffer, 1, 0, buffer, 1, 0, 0);  // inactive: as it was
  }
}

TEST(CopyTile, BringsATileOfEachRowOrOfOne) {
  Random random(5);
  Device device;
  const Cache pool =
      MakeCache(device, random,
                {.lengths = {20, 9, 33}, .kv_heads = 2, .block_size = 16, .tier = Tier::kHost});
  const Cache ring =
      MakeCache(device, random, {.lengths = {8, 8, 8}, .kv_heads = 2, .block_size = 4});
  CopyTileArgs args{.target = ring.view,
                    .source = pool.view,
                    .first_token = 8,
                    .tokens = 8,
                    .rows = 3,
                    .kv_heads = 2,
                    .head_dim = 8};
  uint64_t before = device.backend.link_bytes_to_device();
  device.backend.CopyTile(args, Stream::kHostToDevice);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  // 8, 1 and 8 tokens lie in [8, 16).
  EXPECT_EQ(device.backend.link_bytes_to_device() - before, 17u * 2 * 2 * 8 * 4);
  for (int32_t head = 0; head < 2; ++head) {
    for (int32_t t = 0; t < 8; ++t) {
      ExpectSlot(ring, 0, t, pool, 0, 8 + t, head);
      ExpectSlot(ring, 2, t, pool, 2, 8 + t, head);
    }
    ExpectSlot(ring, 1, 0, pool, 1, 8, head);
    ExpectSlot(ring, 1, 1, ring, 1, 1, head);  // past the row's end: as it was
  }

  args.row = 2;
  args.row_tokens = 21;  // of 33: what an earlier chunk had stored
  args.first_token = 16;
  before = device.backend.link_bytes_to_device();
  device.backend.CopyTile(args, Stream::kHostToDevice);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(device.backend.link_bytes_to_device() - before, 5u * 2 * 2 * 8 * 4);
  for (int32_t t = 0; t < 5; ++t) ExpectSlot(ring, 0, t, pool, 2, 16 + t, 1);
  ExpectSlot(ring, 0, 5, pool, 0, 13, 1);  // from the first copy
}

TEST(GatherRows, AnIndexOutsideTheSourceIsAnError) {
  Random random(6);
  Device device;
  const Cache pool = MakeCache(device, random, {.lengths = {20}, .tier = Tier::kHost});
  const Cache buffer = MakeCache(device, random, {.lengths = {6}});
  device.backend.GatherRows({.target = buffer.view,
                             .source = pool.view,
                             .selected = device.Put(std::vector<int32_t>{1}),
                             .index = device.Put(std::vector<int32_t>{4000}),
                             .index_stride = 1,
                             .rows = 1,
                             .kv_heads = 1,
                             .head_dim = 8},
                            Stream::kHostToDevice);
  const absl::Status status = device.backend.WaitAll();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message().substr(0, 19), "GatherRows: source:");
}

}  // namespace
}  // namespace kvsweep
