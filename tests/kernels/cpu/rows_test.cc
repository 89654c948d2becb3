// The operations that work row by row: embedding, norms, gate, rotary embedding, rows taken,
// argmax, append, heads projected.
#include "kernels/cpu/rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Embed, TakesHostTokensOrSampledOnesAndAddsPositions) {
  Device device;
  const int32_t columns = 5;
  std::vector<float> table(7 * columns);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i);
  std::vector<float> positions(6 * columns);
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<float>(i) * 1000;
  EmbedArgs args{.out = device.RoomRows(3, columns),
                 .token_id = device.Put(std::vector<int32_t>{4, -1, -3}),
                 .sampled = device.Put(std::vector<int32_t>{6, 0, 2}),
                 .position = device.Put(std::vector<int32_t>{0, 3, 1}),
                 .table = device.Put(table),
                 .rows = 3,
                 .columns = columns};
  for (bool with_positions : {false, true}) {
    args.position_table = with_positions ? device.Put(positions) : nullptr;
    args.position_offset = with_positions ? 2 : 0;
    device.backend.Embed(args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    const std::vector<float> out = Device::GetRows(args.out, 3, columns);
    const int32_t token[] = {4, 6, 2};
    const int32_t position[] = {2, 5, 3};
    for (int32_t r = 0; r < 3; ++r) {
      for (int32_t c = 0; c < columns; ++c) {
        const float added = with_positions ? positions[position[r] * columns + c] : 0.0f;
        EXPECT_EQ(out[r * columns + c], table[token[r] * columns + c] + added);
      }
    }
  }
}

TEST(Norm, EqualsTheReference) {
  Random random(1);
  for (int32_t columns : {1, 7, 8, 64, 385}) {
    for (bool layer_norm : {false, true}) {
      Device device;
      const int32_t rows = 5;
      std::vector<float> in = RandomFloats(random, int64_t{rows} * columns, true);
      for (float& x : in) x += 3;  // a mean that a root-mean-square norm must not take out
      const std::vector<float> weight = RandomFloats(random, columns);
      const std::vector<float> bias = RandomFloats(random, columns);
      const NormArgs args{.out = device.RoomRows(rows, columns),
                          .in = device.PutRows(in, rows, columns),
                          .weight = device.Put(weight),
                          .bias = layer_norm ? device.Put(bias) : nullptr,
                          .epsilon = 1e-5f,
                          .rows = rows,
                          .columns = columns};
      device.backend.Norm(args, Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      const std::vector<float> out = Device::GetRows(args.out, rows, columns);
      for (int32_t r = 0; r < rows; ++r) {
        double mean = 0;
        double square = 0;
        const float* const x = in.data() + r * columns;
        for (int32_t c = 0; layer_norm && c < columns; ++c) mean += x[c] / double{1.0 * columns};
        for (int32_t c = 0; c < columns; ++c) square += (x[c] - mean) * (x[c] - mean) / columns;
        for (int32_t c = 0; c < columns; ++c) {
          const double scale = weight[c] / std::sqrt(square + 1e-5);
          const double expected = (x[c] - mean) * scale + (layer_norm ? bias[c] : 0.0);
          const double size = (std::abs(x[c]) + std::abs(mean)) * std::abs(scale) + 4;
          EXPECT_NEAR(out[r * columns + c], expected, (columns / 8 + 10) * kEpsilon * size);
        }
      }
    }
  }
}

TEST(SiluGate, EqualsTheReferenceAlsoFarFromZero) {
  Random random(2);
  for (int32_t columns : {1, 8, 27}) {
    Device device;
    std::vector<float> in = RandomFloats(random, 2 * columns);
    in[0] = 200;
    if (columns > 2) {
      in[1] = -200;  // the exponential leaves the range of f32
      in[2] = -87.5f;
    }
    const SiluGateArgs args{.out = device.RoomRows(1, columns),
                            .in = device.PutRows(in, 1, 2 * columns),
                            .rows = 1,
                            .columns = columns};
    device.backend.SiluGate(args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    const std::vector<float> out = Device::GetRows(args.out, 1, columns);
    for (int32_t c = 0; c < columns; ++c) {
      const double expected = in[c] / (1 + std::exp(-double{in[c]})) * in[columns + c];
      EXPECT_NEAR(out[c], expected, 8 * kEpsilon * std::abs(expected) + 1e-30) << in[c];
    }
  }
}

TEST(Rotary, TurnsHalvesByTheirFrequency) {
  Random random(3);
  Device device;
  constexpr int32_t kHeads = 3;
  constexpr int32_t kDim = 16;
  const std::vector<int32_t> position = {0, 1, 17, 4095};
  // Any frequencies: the operation knows no formula for them.
  const std::vector<float> frequency = {1, 0.31f, 0.1f, 0, 3.1e-2f, 5e-3f, 1e-3f, 7e-4f};
  const std::vector<float> in = RandomFloats(random, 4 * kHeads * kDim);
  const RotaryArgs args{.data = device.PutRows(in, 4, kHeads * kDim),
                        .position = device.Put(position),
                        .inverse_frequency = device.Put(frequency),
                        .rows = 4,
                        .heads = kHeads,
                        .head_dim = kDim};
  device.backend.Rotary(args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  const std::vector<float> out = Device::GetRows(args.data, 4, kHeads * kDim);
  for (int32_t r = 0; r < 4; ++r) {
    for (int32_t h = 0; h < kHeads; ++h) {
      for (int32_t j = 0; j < kDim / 2; ++j) {
        const double angle = double{frequency[j]} * position[r];
        const int64_t low = (r * kHeads + h) * kDim + j;
        const int64_t high = low + kDim / 2;
        const double tolerance = 8 * kEpsilon * (4 + angle);  // the angle itself is rounded to f32
        EXPECT_NEAR(out[low], in[low] * std::cos(angle) - in[high] * std::sin(angle), tolerance);
        EXPECT_NEAR(out[high], in[high] * std::cos(angle) + in[low] * std::sin(angle), tolerance);
      }
    }
  }
}

TEST(TakeRows, CopiesRowsAndZeroes) {
  Device device;
  const Activations in = device.PutRows({1, 2, 3, 4, 5, 6}, 3, 2);
  const Activations out = device.RoomRows(4, 2);
  device.backend.TakeRows({.out = out,
                           .in = in,
                           .row = device.Put(std::vector<int32_t>{2, -1, 0, 2}),
                           .rows = 4,
                           .columns = 2},
                          Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(Device::GetRows(out, 4, 2), (std::vector<float>{5, 6, 0, 0, 1, 2, 5, 6}));
}

TEST(Argmax, TakesTheLowestOfEqualsAndSkipsPaddedRows) {
  Device device;
  int32_t* const token = device.Put(std::vector<int32_t>{-7, -7, -7});
  device.backend.Argmax(
      {.token = token,
       .logits = device.PutRows({1, 3, 3, 2, kNan, kNan, kNan, kNan, -5, -4, -6, -4}, 3, 4),
       .target = device.Put(std::vector<int32_t>{2, -1, 0}),
       .rows = 3,
       .columns = 4},
      Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(std::vector<int32_t>(token, token + 3), (std::vector<int32_t>{1, -7, 1}));
}

TEST(Append, RoundsToNearestEvenAndLeavesTheRestAlone) {
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    Random random(4);
    Device device;
    const Cache cache = MakeCache(
        device, random, {.lengths = {2, 3}, .kv_heads = 1, .head_dim = 8, .dtype = dtype});
    // 1 + 2^-8 lies between two bf16 numbers and goes to the even one, 1; 1 + 3 * 2^-8 goes up to 1
    // + 2^-6. Likewise 2^-11 for f16; 65,520 is the first that f16 calls infinite, 2^-24 its
    // smallest.
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> in = {1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1p-11f, 1 + 0x3p-11f,
                                   65520.0f,    0x1p-24f,    -0x1.8p-25f,  kNan};
    const std::vector<float> bf16 = {1, 1 + 0x1p-6f, 1, 1, 65536.0f, 0x1p-24f, -0x1.8p-25f, kNan};
    const std::vector<float> f16 = {1 + 0x1p-8f, 1 + 0x3p-8f, 1,         1 + 0x1p-9f,
                                    inf,         0x1p-24f,    -0x1p-24f, kNan};
    const Activations rows = device.PutRows(in, 1, 8);
    device.backend.Append({.target = cache.view,
                           .key = rows,
                           .value = rows,
                           .table_row = device.Put(std::vector<int32_t>{1}),
                           .slot = device.Put(std::vector<int32_t>{3}),
                           .rows = 1,
                           .kv_heads = 1,
                           .head_dim = 8},
                          Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    const std::vector<float> expected =
        dtype == DType::kF32 ? in : (dtype == DType::kBf16 ? bf16 : f16);
    std::vector<float> stored(8);
    const int64_t slot = cache.view.block_table[cache.view.block_table_stride] * 4 + 3;
    const std::byte* const base = cache.view.value + slot * 8 * DTypeBytes(dtype);
    for (int i = 0; i < 8; ++i) {
      if (dtype == DType::kF32) {
        std::memcpy(&stored[i], base + 4 * i, 4);
      } else {
        uint16_t bits;
        std::memcpy(&bits, base + 2 * i, 2);
        const double mantissa = bits & (dtype == DType::kBf16 ? 0x7f : 0x3ff);
        const int width = dtype == DType::kBf16 ? 7 : 10;
        const int bias = dtype == DType::kBf16 ? 127 : 15;
        const int exponent = (bits & 0x7fff) >> width;
        double value = exponent == 0
                           ? std::ldexp(mantissa, 1 - bias - width)
                           : std::ldexp(1 + std::ldexp(mantissa, -width), exponent - bias);
        if (exponent == 2 * bias + 1) value = mantissa == 0 ? inf : kNan;
        stored[i] = static_cast<float>((bits & 0x8000) != 0 ? -value : value);
      }
    }
    for (int i = 0; i < 7; ++i) EXPECT_EQ(stored[i], expected[i]) << DTypeName(dtype) << " " << i;
    EXPECT_TRUE(std::isnan(stored[7]));
  }
}

TEST(Append, RowsWithoutATableRowAreNotStored) {
  Random random(5);
  Device device;
  const Cache cache = MakeCache(device, random, {.lengths = {4}});
  const int64_t bytes = 3 * cache.view.block_stride * 4;
  const std::vector<std::byte> before(cache.view.key, cache.view.key + bytes);
  const Activations rows = device.PutRows(std::vector<float>(8, 1.0f), 1, 8);
  AppendArgs args{.target = cache.view,
                  .key = rows,
                  .value = rows,
                  .table_row = device.Put(std::vector<int32_t>{-1}),
                  .slot = device.Put(std::vector<int32_t>{1}),
                  .rows = 1,
                  .kv_heads = 1,
                  .head_dim = 8};
  device.backend.Append(args, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_TRUE(std::equal(before.begin(), before.end(), cache.view.key));

  args.table_row = device.Put(std::vector<int32_t>{0});
  args.slot = device.Put(std::vector<int32_t>{1000});
  device.backend.Append(args, Stream::kCompute);
  EXPECT_EQ(device.backend.WaitAll().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ProjectHeads, EqualsTheReference) {
  Random random(6);
  for (const auto& [rows, d, thin] :
       {std::tuple{1, 8, 8}, {13, 64, 24}, {50, 128, 5}, {7, 9, 17}}) {
    Device device;
    const int32_t heads = 6;
    const int32_t group = 3;
    const std::vector<float> in = RandomFloats(random, int64_t{rows} * heads * d);
    const std::vector<float> matrix = RandomFloats(random, int64_t{heads / group} * d * thin);
    const ProjectHeadsArgs args{.out = device.RoomRows(rows, heads * thin),
                                .in = device.PutRows(in, rows, heads * d),
                                .matrix = device.Put(matrix),
                                .rows = rows,
                                .heads = heads,
                                .group = group,
                                .in_dim = d,
                                .out_dim = thin};
    device.backend.ProjectHeads(args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    const std::vector<float> out = Device::GetRows(args.out, rows, heads * thin);
    for (int64_t i = 0; i < int64_t{rows} * heads; ++i) {
      const int64_t head = i % heads;
      for (int32_t c = 0; c < thin; ++c) {
        double sum = 0;
        double bound = 0;
        for (int32_t k = 0; k < d; ++k) {
          const double term = double{in[i * d + k]} * matrix[(head / group * d + k) * thin + c];
          sum += term;
          bound += std::abs(term);
        }
        EXPECT_NEAR(out[i * thin + c], sum, d * kEpsilon * bound);
      }
    }
  }
}

}  // namespace
}  // namespace kvsweep
