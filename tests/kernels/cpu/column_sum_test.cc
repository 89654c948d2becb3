#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

// A prompt whose keys all stand in the cache, run in chunks: attention for the log-sum-exp, then
// column sums.
struct Prompt {
  Prompt(Device& device, Random& random, int32_t tokens, int32_t kv_heads, int32_t group,
         int32_t head_dim, DType dtype)
      : device(device),
        tokens(tokens),
        heads(kv_heads * group),
        cache(MakeCache(device, random,
                        {.lengths = {2, tokens},
                         .kv_heads = kv_heads,
                         .head_dim = head_dim,
                         .block_size = 16,
                         .dtype = dtype})),
        query(RandomFloats(random, int64_t{tokens} * heads * head_dim, true)),
        scale(1.0f / std::sqrt(static_cast<float>(head_dim))) {
    const int32_t width = kv_heads * head_dim;
    std::vector<float> keys;
    std::vector<float> values;
    for (int32_t t = 0; t < tokens; ++t) {
      keys.insert(keys.end(), cache.Key(1, t, 0), cache.Key(1, t, 0) + width);
      values.insert(values.end(), cache.Value(1, t, 0), cache.Value(1, t, 0) + width);
    }
    query_rows = device.PutRows(query, tokens, heads * head_dim);
    key_rows = device.PutRows(keys, tokens, width);
    value_rows = device.PutRows(values, tokens, width);
  }

  static Activations From(Activations rows, int32_t first) {
    rows.data = static_cast<float*>(rows.data) + first * rows.stride;
    return rows;
  }

  // score [Hk][tokens] after chunks that end at `borders`.
  std::vector<std::vector<float>> Run(const std::vector<int32_t>& borders) {
    const SlotView score = MakeSlots(device, cache);
    float* const log_sum_exp = device.Room<float>(int64_t{tokens} * heads);
    int32_t first = 0;
    for (int32_t border : borders) {
      const int32_t rows = border - first;
      float* const chunk_log_sum_exp = log_sum_exp + int64_t{first} * heads;
      device.backend.PrefillAttention({.out = device.RoomRows(rows, heads * cache.shape.head_dim),
                                       .log_sum_exp = chunk_log_sum_exp,
                                       .query = From(query_rows, first),
                                       .chunk_key = From(key_rows, first),
                                       .chunk_value = From(value_rows, first),
                                       .history = cache.view,
                                       .history_row = 1,
                                       .history_tokens = first,
                                       .rows = rows,
                                       .query_heads = heads,
                                       .kv_heads = cache.shape.kv_heads,
                                       .head_dim = cache.shape.head_dim,
                                       .scale = scale},
                                      Stream::kCompute);
      device.backend.ColumnSum({.score = score,
                                .query = From(query_rows, first),
                                .log_sum_exp = chunk_log_sum_exp,
                                .keys = cache.view,
                                .table_row = 1,
                                .history_tokens = first,
                                .rows = rows,
                                .query_heads = heads,
                                .kv_heads = cache.shape.kv_heads,
                                .head_dim = cache.shape.head_dim,
                                .scale = scale},
                               Stream::kCompute);
      first = border;
    }
    const absl::Status status = device.backend.WaitAll();
    EXPECT_TRUE(status.ok()) << status;
    std::vector<std::vector<float>> result(cache.shape.kv_heads);
    ForEachSlot(score, [&, i = 0](float& slot) mutable { result[i++ / tokens].push_back(slot); });
    return result;
  }

  // Calls body for each slot of the prompt, head by head.
  template <typename Body>
  void ForEachSlot(const SlotView& score, Body body) const {
    for (int32_t head = 0; head < cache.shape.kv_heads; ++head) {
      for (int32_t t = 0; t < tokens; ++t) {
        const int32_t block = score.block_table[score.block_table_stride + t / score.block_size];
        body(static_cast<float*>(score.data)[block * score.block_stride + head * score.head_stride +
                                             t % score.block_size]);
      }
    }
  }

  Device& device;
  int32_t tokens;
  int32_t heads;
  Cache cache;
  std::vector<float> query;
  float scale;
  Activations query_rows;
  Activations key_rows;
  Activations value_rows;
};

TEST(ColumnSum, EqualsTheSumsOfTheExplicitMatrix) {
  Random random(1);
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const auto& [tokens, group, d] :
         {std::tuple{1, 1, 8}, {63, 3, 64}, {130, 7, 8}, {200, 2, 128}}) {
      SCOPED_TRACE(absl::StrCat(DTypeName(dtype), " ", tokens, " tokens group ", group, " d ", d));
      Device device;
      Prompt prompt(device, random, tokens, 2, group, d, dtype);
      const std::vector<std::vector<float>> score = prompt.Run({tokens});
      for (int32_t kv_head = 0; kv_head < 2; ++kv_head) {
        std::vector<double> expected(tokens, 0.0);
        double tolerance = 0;
        for (int32_t row = 0; row < tokens; ++row) {
          std::vector<const float*> keys;
          for (int32_t t = 0; t <= row; ++t) keys.push_back(prompt.cache.Key(1, t, kv_head));
          for (int32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const ReferenceAttention row_result = Attend(
                prompt.query.data() + (row * prompt.heads + head) * d, keys, keys, d, prompt.scale);
            for (int32_t t = 0; t <= row; ++t) expected[t] += row_result.probability[t];
            tolerance += AttentionTolerance(row_result, d);
          }
        }
        double total = 0;
        for (int32_t t = 0; t < tokens; ++t) {
          EXPECT_NEAR(score[kv_head][t], expected[t], tolerance) << t;
          total += score[kv_head][t];
        }
        EXPECT_NEAR(total, 1.0 * tokens * group, tokens * tolerance) << "each row gives away 1";
      }
    }
  }
}

TEST(ColumnSum, ChunkBordersThatAreMultiplesOfTheTileChangeNoBit) {
  static_assert(kColumnSumRows == 128);
  Random random(2);
  for (DType dtype : {DType::kF32, DType::kBf16}) {
    Device device;
    Prompt prompt(device, random, 600, 2, 3, 64, dtype);
    const std::vector<std::vector<float>> whole = prompt.Run({600});
    EXPECT_EQ(whole, prompt.Run({128, 256, 384, 512, 600}));
    EXPECT_EQ(whole, prompt.Run({384, 600}));
    EXPECT_EQ(whole, prompt.Run({256, 512, 600}));
  }
}

}  // namespace
}  // namespace kvsweep
