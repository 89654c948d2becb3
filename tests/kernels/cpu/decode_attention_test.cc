#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

struct Case {
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t head_dim = 64;
  int32_t block_size = 16;
  DType dtype = DType::kF32;
  std::vector<int32_t> lengths;
  bool current = true;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const std::vector<int32_t> lengths = {0, 1, 5, 63, 64, 65, 200};
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (int32_t group : {1, 2, 3, 4, 7}) {
      for (int32_t head_dim : {8, 64, 128}) {
        cases.push_back({.kv_heads = group % 2 + 1,
                         .group = group,
                         .head_dim = head_dim,
                         .block_size = head_dim == 8 ? 7 : 16,
                         .dtype = dtype,
                         .lengths = lengths,
                         .current = group != 2});
      }
    }
  }
  return cases;
}

// One batch over a random cache, and the reference for each of its heads.
struct Batch {
  Batch(Device& device, Random& random, const Case& c)
      : shape(c),
        rows(static_cast<int32_t>(c.lengths.size())),
        heads(c.kv_heads * c.group),
        cache(MakeCache(device, random,
                        {.lengths = c.lengths,
                         .kv_heads = c.kv_heads,
                         .head_dim = c.head_dim,
                         .block_size = c.block_size,
                         .dtype = c.dtype})),
        query(RandomFloats(random, int64_t{rows} * heads * c.head_dim, true)),
        key(RandomExactFloats(random, int64_t{rows} * c.kv_heads * c.head_dim)),
        value(RandomExactFloats(random, int64_t{rows} * c.kv_heads * c.head_dim)) {
    const int32_t width = c.kv_heads * c.head_dim;
    args.out = device.RoomRows(rows, heads * c.head_dim);
    args.query = device.PutRows(query, rows, heads * c.head_dim);
    if (c.current) {
      args.current_key = device.PutRows(key, rows, width);
      args.current_value = device.PutRows(value, rows, width);
    }
    args.view = cache.view;
    args.rows = rows;
    args.query_heads = heads;
    args.kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }

  ReferenceAttention Reference(int32_t row, int32_t head, int32_t first, int32_t end) const {
    const int32_t d = shape.head_dim;
    const int32_t kv_head = head / shape.group;
    std::vector<const float*> keys;
    std::vector<const float*> values;
    for (int32_t t = first; t < std::min(end, shape.lengths[row]); ++t) {
      keys.push_back(cache.Key(row, t, kv_head));
      values.push_back(cache.Value(row, t, kv_head));
    }
    if (shape.current && end > shape.lengths[row]) {
      keys.push_back(key.data() + (row * shape.kv_heads + kv_head) * d);
      values.push_back(value.data() + (row * shape.kv_heads + kv_head) * d);
    }
    return Attend(query.data() + (row * heads + head) * d, keys, values, d, args.scale);
  }

  void ExpectOutput(int32_t row, const char* what) const {
    const std::vector<float> out = Device::GetRows(args.out, rows, heads * shape.head_dim);
    for (int32_t head = 0; head < heads; ++head) {
      const ReferenceAttention expected =
          Reference(row, head, 0, std::numeric_limits<int32_t>::max());
      for (int32_t i = 0; i < shape.head_dim; ++i) {
        EXPECT_NEAR(out[(row * heads + head) * shape.head_dim + i], expected.output[i],
                    AttentionTolerance(expected, shape.head_dim))
            << what << " row " << row << " head " << head << " column " << i;
      }
    }
  }

  Case shape;
  int32_t rows;
  int32_t heads;
  Cache cache;
  std::vector<float> query;
  std::vector<float> key;
  std::vector<float> value;
  DecodeAttentionArgs args;
};

TEST(DecodeAttention, EqualsTheReferenceForAllShapes) {
  Random random(1);
  for (const Case& c : Cases()) {
    SCOPED_TRACE(absl::StrCat(DTypeName(c.dtype), " group ", c.group, " d ", c.head_dim));
    Device device;
    Batch batch(device, random, c);
    device.backend.DecodeAttention(batch.args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    for (int32_t row = 0; row < batch.rows; ++row) batch.ExpectOutput(row, "out");
  }
}

TEST(DecodeAttention, SplitsGiveTheSameResult) {
  Random random(2);
  Device device;
  Batch batch(device, random,
              {.kv_heads = 2, .group = 3, .head_dim = 64, .lengths = {0, 64, 127, 128, 500}});
  batch.args.plan = {.splits = 4, .split_tokens = 64};
  batch.args.probability_stride = 512;
  batch.args.probability = device.Room<float>(int64_t{batch.rows} * batch.heads * 512);
  device.backend.DecodeAttention(batch.args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  for (int32_t row = 0; row < batch.rows; ++row) {
    batch.ExpectOutput(row, "out");
    for (int32_t head = 0; head < batch.heads; ++head) {
      const ReferenceAttention expected = batch.Reference(row, head, 0, 1000);
      const float* const line = batch.args.probability + (row * batch.heads + head) * 512;
      for (size_t t = 0; t < expected.probability.size(); ++t) {
        EXPECT_NEAR(line[t], expected.probability[t], AttentionTolerance(expected, 64));
      }
    }
  }
}

// InfiniGen's and the ring's way: parts of the tokens, one after the other, end in the same numbers
// as all of them at once.
TEST(DecodeAttention, PartsAccumulateToTheWhole) {
  Random random(3);
  for (DType dtype : {DType::kF32, DType::kF16}) {
    Device device;
    Batch batch(device, random,
                {.kv_heads = 2,
                 .group = 2,
                 .head_dim = 64,
                 .dtype = dtype,
                 .lengths = {0, 1, 30, 64, 100, 161}});
    const int64_t parts = int64_t{batch.rows} * batch.heads;
    const PartialAttention partial{.output = device.Room<float>(parts * 64),
                                   .maximum = device.Room<float>(parts),
                                   .sum = device.Room<float>(parts)};
    // Slots 0 .. 63 without the current token, written to partial; slots from 64 on through a
    // shifted view, with it.
    DecodeAttentionArgs first = batch.args;
    first.out = {};
    first.partial = partial;
    first.current_key = first.current_value = {};
    first.view.max_tokens = 64;
    device.backend.DecodeAttention(first, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    for (int32_t head = 0; head < batch.heads; ++head) {
      EXPECT_EQ(partial.sum[head], 0.0f);  // row 0 is empty
      EXPECT_EQ(partial.maximum[head], -std::numeric_limits<float>::infinity());
    }

    DecodeAttentionArgs second = batch.args;
    second.partial = partial;
    second.accumulate = true;
    second.view.block_table += 64 / second.view.block_size;
    second.view.first_token = 64;
    device.backend.DecodeAttention(second, Stream::kCompute);
    const absl::Status status = device.backend.WaitAll();
    ASSERT_TRUE(status.ok()) << status;
    for (int32_t row = 0; row < batch.rows; ++row) batch.ExpectOutput(row, "merged");
  }
}

TEST(DecodeAttention, InactiveAndEmptyRowsGiveZero) {
  Random random(4);
  Device device;
  Batch batch(device, random,
              {.kv_heads = 1, .group = 4, .head_dim = 8, .lengths = {9, 3, 0}, .current = false});
  // Row 1 is padding: its table may hold anything.
  const_cast<int32_t*>(batch.args.view.block_table)[batch.args.view.block_table_stride] = -1;
  batch.args.row_active = device.Put(std::vector<int32_t>{1, 0, 1});
  batch.args.probability_stride = 10;
  batch.args.probability = device.Room<float>(3 * 4 * 10);
  device.backend.DecodeAttention(batch.args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  batch.ExpectOutput(0, "active");
  const std::vector<float> out = Device::GetRows(batch.args.out, 3, 32);
  for (int i = 32; i < 96; ++i) EXPECT_EQ(out[i], 0.0f);
}

TEST(DecodeAttention, BatchInvariantRowsDoNotDependOnTheirNeighbours) {
  Random random(5);
  Device device({.threads = 2, .batch_invariant = true});
  Batch batch(device, random,
              {.kv_heads = 2, .group = 3, .head_dim = 64, .lengths = {700, 1, 129, 700, 64}});
  batch.args.plan = device.backend.PlanAttention(batch.rows, 701, 2);
  device.backend.DecodeAttention(batch.args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  const std::vector<float> together = Device::GetRows(batch.args.out, batch.rows, batch.heads * 64);
  for (int32_t row = 0; row < batch.rows; ++row) {
    DecodeAttentionArgs alone = batch.args;
    alone.rows = 1;
    alone.out = device.RoomRows(1, batch.heads * 64);
    alone.plan = device.backend.PlanAttention(1, batch.shape.lengths[row] + 1, 2);
    for (Activations* rows : {&alone.query, &alone.current_key, &alone.current_value}) {
      rows->data = static_cast<float*>(rows->data) + row * rows->stride;
    }
    alone.view.block_table += row * alone.view.block_table_stride;
    alone.view.length += row;
    device.backend.DecodeAttention(alone, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    const std::vector<float> out = Device::GetRows(alone.out, 1, batch.heads * 64);
    for (int32_t i = 0; i < batch.heads * 64; ++i) {
      EXPECT_EQ(out[i], together[row * batch.heads * 64 + i]);
    }
  }
}

TEST(DecodeAttention, ALengthPastTheBlockTableIsAnError) {
  Random random(6);
  Device device;
  Batch batch(device, random, {.lengths = {20}});
  const_cast<int32_t*>(batch.args.view.length)[0] = 1000;
  device.backend.DecodeAttention(batch.args, Stream::kCompute);
  const absl::Status status = device.backend.WaitAll();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "DecodeAttention: view: row 0 holds 1000 tokens, more than its 3 blocks of 16");
  EXPECT_TRUE(device.backend.WaitAll().ok()) << "an error is reported once";
}

}  // namespace
}  // namespace kvsweep
