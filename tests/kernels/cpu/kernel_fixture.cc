#include "tests/kernels/cpu/kernel_fixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace kvsweep {
namespace {

constexpr int64_t kPadding = 3;  // elements between rows of activations

}  // namespace

Activations Device::RoomRows(int64_t rows, int64_t columns) {
  const int64_t stride = columns + kPadding;
  float* const data =
      Put(std::vector<float>(rows * stride + kPadding, std::numeric_limits<float>::quiet_NaN()));
  return {.data = data, .stride = stride};
}

Activations Device::PutRows(const std::vector<float>& values, int64_t rows, int64_t columns) {
  const Activations room = RoomRows(rows, columns);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(values.begin() + r * columns, columns,
                static_cast<float*>(room.data) + r * room.stride);
  }
  return room;
}

std::vector<float> Device::GetRows(const Activations& from, int64_t rows, int64_t columns) {
  std::vector<float> values;
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = static_cast<const float*>(from.data) + r * from.stride;
    values.insert(values.end(), row, row + columns);
  }
  return values;
}

std::vector<float> RandomFloats(Random& random, int64_t count, bool outliers) {
  std::vector<float> values(count);
  for (float& value : values) {
    value = static_cast<float>(random.Normal());
    if (outliers && random.Uniform(16) == 0) value *= 10;
  }
  return values;
}

std::vector<float> RandomExactFloats(Random& random, int64_t count) {
  std::vector<float> values(count);
  // Integers below 256 fill the eight bits that bf16 has.
  for (float& value : values) {
    value = (static_cast<float>(random.Uniform(511)) - 255.0f) / 64.0f;
  }
  return values;
}

Cache MakeCache(Device& device, Random& random, const CacheShape& shape) {
  Cache cache{.shape = shape, .view = {}, .key = {}, .value = {}};
  const int64_t rows = static_cast<int64_t>(shape.lengths.size());
  const int64_t width = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t longest = *std::max_element(shape.lengths.begin(), shape.lengths.end());
  const int64_t table_stride = longest / shape.block_size + 1 + shape.spare_blocks;
  const int64_t blocks = rows * table_stride;
  std::vector<int32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  random.Shuffle(std::span<int32_t>(order));

  KvView& view = cache.view;
  view.dtype = shape.dtype;
  view.block_size = shape.block_size;
  view.token_stride = shape.head_dim;
  view.head_stride = int64_t{shape.block_size} * shape.head_dim;
  view.block_stride = shape.block_size * width;
  view.block_table = device.Put(order);
  view.block_table_stride = static_cast<int32_t>(table_stride);
  view.length = device.Put(shape.lengths);
  const int64_t bytes = blocks * view.block_stride * DTypeBytes(shape.dtype);
  view.key = device.Room<std::byte>(bytes, shape.tier);
  std::memset(view.key, 0xff, bytes);  // a NaN in every format
  if (shape.with_values) {
    view.value = device.Room<std::byte>(bytes, shape.tier);
    std::memset(view.value, 0xff, bytes);
  }

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t tokens = shape.lengths[row];
    std::vector<float> keys = RandomExactFloats(random, tokens * width);
    std::vector<float> values = RandomExactFloats(random, tokens * width);
    std::vector<int32_t> slots(tokens);
    std::iota(slots.begin(), slots.end(), 0);
    if (tokens > 0) {
      device.backend.Append(
          {.target = view,
           .key = device.PutRows(keys, tokens, width),
           .value = device.PutRows(values, tokens, width),
           .table_row = device.Put(std::vector<int32_t>(tokens, static_cast<int32_t>(row))),
           .slot = device.Put(slots),
           .rows = static_cast<int32_t>(tokens),
           .kv_heads = shape.kv_heads,
           .head_dim = shape.head_dim},
          Stream::kCompute);
    }
    cache.key.emplace_back();
    cache.value.emplace_back();
    for (int64_t t = 0; t < tokens; ++t) {
      cache.key.back().emplace_back(keys.begin() + t * width, keys.begin() + (t + 1) * width);
      cache.value.back().emplace_back(values.begin() + t * width, values.begin() + (t + 1) * width);
    }
  }
  KVSWEEP_CHECK_OK(device.backend.WaitAll());
  return cache;
}

SlotView MakeSlots(Device& device, const Cache& cache) {
  SlotView slots;
  slots.block_size = cache.view.block_size;
  slots.head_stride = cache.view.block_size;
  slots.block_stride = int64_t{cache.view.block_size} * cache.shape.kv_heads;
  slots.block_table = cache.view.block_table;
  slots.block_table_stride = cache.view.block_table_stride;
  const int64_t rows = static_cast<int64_t>(cache.shape.lengths.size());
  slots.data =
      device.Put(std::vector<int32_t>(rows * slots.block_table_stride * slots.block_stride, -1));
  return slots;
}

ReferenceAttention Attend(const float* query, const std::vector<const float*>& keys,
                          const std::vector<const float*>& values, int head_dim, double scale) {
  ReferenceAttention result;
  result.output.assign(head_dim, 0.0);
  result.maximum = -std::numeric_limits<double>::infinity();
  for (const float* key : keys) {
    double score = 0;
    double bound = 0;
    for (int i = 0; i < head_dim; ++i) {
      score += static_cast<double>(query[i]) * key[i];
      bound += std::abs(static_cast<double>(query[i]) * key[i]);
    }
    result.probability.push_back(score * scale);
    result.maximum = std::max(result.maximum, score * scale);
    result.score_bound = std::max(result.score_bound, bound * scale);
  }
  for (double& p : result.probability) {
    p = std::exp(p - result.maximum);
    result.sum += p;
  }
  for (size_t t = 0; t < keys.size(); ++t) {
    result.probability[t] /= result.sum;
    for (int i = 0; i < head_dim; ++i) result.output[i] += result.probability[t] * values[t][i];
  }
  return result;
}

double AttentionTolerance(const ReferenceAttention& reference, int head_dim) {
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
  constexpr double kLargestValue = 4;  // of RandomExactFloats
  // Eight lanes add d / 8 products each, then three levels; exponentials are good to 2 ulp.
  const double score_error = (head_dim / 8 + 4) * kEpsilon * reference.score_bound;
  const double sum_error = (static_cast<double>(reference.probability.size()) + 4) * kEpsilon;
  return 2 * (score_error + sum_error) * kLargestValue;
}

}  // namespace kvsweep
