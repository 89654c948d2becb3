#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

struct Case {
  int32_t history = 0;
  int32_t rows = 1;
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t head_dim = 64;
  DType dtype = DType::kF32;
  bool chunk_keys = true;
};

// A chunk of one prompt whose earlier tokens stand in a cache.
struct Chunk {
  Chunk(Device& device, Random& random, const Case& c)
      : shape(c),
        heads(c.kv_heads * c.group),
        width(c.kv_heads * c.head_dim),
        cache(MakeCache(device, random,
                        {.lengths = {3, c.history},
                         .kv_heads = c.kv_heads,
                         .head_dim = c.head_dim,
                         .block_size = 16,
                         .dtype = c.dtype})),
        query(RandomFloats(random, int64_t{c.rows} * heads * c.head_dim, true)),
        key(RandomExactFloats(random, int64_t{c.rows} * width)),
        value(RandomExactFloats(random, int64_t{c.rows} * width)) {
    args.out = device.RoomRows(c.rows, heads * c.head_dim);
    args.log_sum_exp = device.Room<float>(int64_t{c.rows} * heads);
    args.query = device.PutRows(query, c.rows, heads * c.head_dim);
    if (c.chunk_keys) {
      args.chunk_key = device.PutRows(key, c.rows, width);
      args.chunk_value = device.PutRows(value, c.rows, width);
    }
    args.history = cache.view;
    args.history_row = 1;
    args.history_tokens = c.history;
    args.rows = c.rows;
    args.query_heads = heads;
    args.kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }

  void ExpectOutput() const {
    const int32_t d = shape.head_dim;
    const std::vector<float> out = Device::GetRows(args.out, shape.rows, heads * d);
    for (int32_t row = 0; row < shape.rows; ++row) {
      for (int32_t head = 0; head < heads; ++head) {
        const int32_t kv_head = head / shape.group;
        std::vector<const float*> keys;
        std::vector<const float*> values;
        for (int32_t t = 0; t < shape.history; ++t) {
          keys.push_back(cache.Key(1, t, kv_head));
          values.push_back(cache.Value(1, t, kv_head));
        }
        for (int32_t t = 0; shape.chunk_keys && t <= row; ++t) {
          keys.push_back(key.data() + t * width + kv_head * d);
          values.push_back(value.data() + t * width + kv_head * d);
        }
        const ReferenceAttention expected =
            Attend(query.data() + (row * heads + head) * d, keys, values, d, args.scale);
        const double tolerance = AttentionTolerance(expected, d);
        for (int32_t i = 0; i < d; ++i) {
          ASSERT_NEAR(out[(row * heads + head) * d + i], expected.output[i], tolerance)
              << "row " << row << " head " << head << " column " << i;
        }
        if (args.log_sum_exp != nullptr && !keys.empty()) {
          ASSERT_NEAR(args.log_sum_exp[row * heads + head],
                      expected.maximum + std::log(expected.sum), tolerance);
        }
      }
    }
  }

  Case shape;
  int32_t heads;
  int32_t width;
  Cache cache;
  std::vector<float> query;
  std::vector<float> key;
  std::vector<float> value;
  PrefillAttentionArgs args;
};

TEST(PrefillAttention, EqualsTheReferenceForAllShapes) {
  std::vector<Case> cases;
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (int32_t group : {1, 2, 3, 4, 7}) {
      for (int32_t head_dim : {8, 64, 128}) {
        cases.push_back({.history = group * 37 % 100,
                         .rows = 33 + group,
                         .kv_heads = group % 2 + 1,
                         .group = group,
                         .head_dim = head_dim,
                         .dtype = dtype});
      }
    }
  }
  for (int32_t rows : {1, 64, 65, 130}) cases.push_back({.history = 0, .rows = rows});
  for (int32_t history : {1, 64, 200}) {
    cases.push_back({.history = history, .rows = 5, .chunk_keys = false});
  }
  cases.push_back({.history = 0, .rows = 3, .chunk_keys = false});  // nothing to attend to: 0
  Random random(1);
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(DTypeName(c.dtype), " group ", c.group, " d ", c.head_dim,
                              " history ", c.history, " rows ", c.rows));
    Device device;
    Chunk chunk(device, random, c);
    device.backend.PrefillAttention(chunk.args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    chunk.ExpectOutput();
  }
}

TEST(PrefillAttention, HistoryInPartsAccumulatesToTheWhole) {
  Random random(2);
  Device device;
  Chunk chunk(device, random,
              {.history = 160, .rows = 40, .kv_heads = 2, .group = 2, .dtype = DType::kBf16});
  const int64_t parts = 40 * 4;
  const PartialAttention partial{.output = device.Room<float>(parts * 64),
                                 .maximum = device.Room<float>(parts),
                                 .sum = device.Room<float>(parts)};
  // 96 tokens of history first, then the other 64 and the chunk itself.
  PrefillAttentionArgs first = chunk.args;
  first.out = first.chunk_key = first.chunk_value = {};
  first.log_sum_exp = nullptr;
  first.partial = partial;
  first.history_tokens = 96;
  device.backend.PrefillAttention(first, Stream::kCompute);
  PrefillAttentionArgs second = chunk.args;
  second.partial = partial;
  second.accumulate = true;
  second.history.block_table += 96 / 16;
  second.history_tokens = 64;
  device.backend.PrefillAttention(second, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  chunk.ExpectOutput();
}

// A token's row is the same to the bit wherever the prompt was cut, and also when it is computed as
// a decode row: what makes a request that was preempted and recomputed go on with the same tokens.
TEST(PrefillAttention, RowsDoNotDependOnChunkBorders) {
  constexpr int32_t kTokens = 150;
  constexpr int32_t kHeads = 6;
  constexpr int32_t kKvHeads = 2;
  constexpr int32_t kDim = 64;
  for (DType dtype : {DType::kF32, DType::kBf16}) {
    Random random(3);
    Device device({.threads = 2, .batch_invariant = true});
    Cache cache = MakeCache(device, random,
                            {.lengths = {kTokens},
                             .kv_heads = kKvHeads,
                             .head_dim = kDim,
                             .block_size = 16,
                             .dtype = dtype});
    // Keys that the cache's format does not hold exactly.
    const Activations key =
        device.PutRows(RandomFloats(random, kTokens * kKvHeads * kDim), kTokens, kKvHeads * kDim);
    const Activations value =
        device.PutRows(RandomFloats(random, kTokens * kKvHeads * kDim), kTokens, kKvHeads * kDim);
    const Activations query =
        device.PutRows(RandomFloats(random, kTokens * kHeads * kDim, true), kTokens, kHeads * kDim);
    std::vector<int32_t> slot(kTokens);
    for (int32_t t = 0; t < kTokens; ++t) slot[t] = t;
    device.backend.Append({.target = cache.view,
                           .key = key,
                           .value = value,
                           .table_row = device.Put(std::vector<int32_t>(kTokens, 0)),
                           .slot = device.Put(slot),
                           .rows = kTokens,
                           .kv_heads = kKvHeads,
                           .head_dim = kDim},
                          Stream::kCompute);
    const auto from = [](Activations rows, int32_t first) {
      rows.data = static_cast<float*>(rows.data) + first * rows.stride;
      return rows;
    };
    const auto run = [&](const std::vector<int32_t>& borders) {
      const Activations out = device.RoomRows(kTokens, kHeads * kDim);
      int32_t first = 0;
      for (int32_t border : borders) {
        device.backend.PrefillAttention({.out = from(out, first),
                                         .query = from(query, first),
                                         .chunk_key = from(key, first),
                                         .chunk_value = from(value, first),
                                         .history = cache.view,
                                         .history_tokens = first,
                                         .rows = border - first,
                                         .query_heads = kHeads,
                                         .kv_heads = kKvHeads,
                                         .head_dim = kDim,
                                         .scale = 0.125f},
                                        Stream::kCompute);
        first = border;
      }
      EXPECT_TRUE(device.backend.WaitAll().ok());
      return Device::GetRows(out, kTokens, kHeads * kDim);
    };
    const std::vector<float> whole = run({kTokens});
    EXPECT_EQ(whole, run({1, 17, 64, 100, kTokens}));

    int32_t* const length = const_cast<int32_t*>(cache.view.length);
    length[0] = kTokens - 1;
    const Activations decoded = device.RoomRows(1, kHeads * kDim);
    device.backend.DecodeAttention({.out = decoded,
                                    .query = from(query, kTokens - 1),
                                    .current_key = from(key, kTokens - 1),
                                    .current_value = from(value, kTokens - 1),
                                    .view = cache.view,
                                    .rows = 1,
                                    .query_heads = kHeads,
                                    .kv_heads = kKvHeads,
                                    .head_dim = kDim,
                                    .scale = 0.125f},
                                   Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    EXPECT_EQ(Device::GetRows(decoded, 1, kHeads * kDim),
              std::vector<float>(whole.end() - kHeads * kDim, whole.end()));
  }
}

}  // namespace
}  // namespace kvsweep
