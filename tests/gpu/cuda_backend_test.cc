// Memory, streams, events, graphs and counters of the CUDA backend, and its products against sums
// in float64.
#include "kernels/cuda/cuda_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

std::unique_ptr<Backend> NewCuda(const CudaBackendOptions& options) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(options);
  KVSWEEP_CHECK_OK(backend);
  return *std::move(backend);
}

// Device memory of elements, filled and read through copies.
class Buffer {
 public:
  Buffer(Backend* backend, DType dtype, const std::vector<float>& values)
      : backend_(backend), dtype_(dtype), count_(values.size()) {
    std::vector<std::byte> bytes(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
    FromFloats(values, dtype, bytes.data());
    memory_ = backend->Allocate(Tier::kDevice, bytes.size()).value();
    backend->Copy(memory_, bytes.data(), bytes.size(), Stream::kCompute);
    KVSWEEP_CHECK_OK(backend->WaitAll());
  }
  ~Buffer() { backend_->Free(memory_); }
  Buffer(const Buffer&) = delete;

  std::byte* data() const { return memory_; }
  std::vector<float> Read() const {
    std::vector<std::byte> bytes(count_ * static_cast<size_t>(DTypeBytes(dtype_)));
    backend_->Copy(bytes.data(), memory_, bytes.size(), Stream::kCompute);
    KVSWEEP_CHECK_OK(backend_->WaitAll());
    std::vector<float> values(count_);
    ToFloats(bytes.data(), dtype_, values);
    return values;
  }

 private:
  Backend* backend_;
  DType dtype_;
  size_t count_;
  std::byte* memory_;
};

// Normal values that `dtype` holds exactly.
std::vector<float> Values(Random& random, int64_t count, DType dtype) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(random.Normal());
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
  FromFloats(values, dtype, bytes.data());
  ToFloats(bytes.data(), dtype, values);
  return values;
}

struct Product {
  int32_t rows, out_columns, in_columns;
  bool bias = false, relu = false, accumulate = false, f32_out = false;
};

// Rows have a gap behind them that must stay as it was.
void CheckProduct(Backend* backend, Random& random, const Product& shape) {
  const DType dtype = backend->info().activation_dtype;
  const DType out_dtype = shape.f32_out ? DType::kF32 : dtype;
  const int64_t in_stride = shape.in_columns + 8;
  const int64_t out_stride = shape.out_columns + 8;
  const std::vector<float> in = Values(random, shape.rows * in_stride, dtype);
  const std::vector<float> weight =
      Values(random, int64_t{shape.out_columns} * shape.in_columns, dtype);
  const std::vector<float> bias = Values(random, shape.out_columns, DType::kF32);
  const std::vector<float> before = Values(random, shape.rows * out_stride, out_dtype);
  const Buffer in_memory(backend, dtype, in);
  const Buffer weight_memory(backend, dtype, weight);
  const Buffer bias_memory(backend, DType::kF32, bias);
  const Buffer out_memory(backend, out_dtype, before);
  backend->Gemm({.out = {out_memory.data(), out_stride},
                 .in = {in_memory.data(), in_stride},
                 .weight = weight_memory.data(),
                 .bias = shape.bias ? reinterpret_cast<const float*>(bias_memory.data()) : nullptr,
                 .relu = shape.relu,
                 .accumulate = shape.accumulate,
                 .f32_out = shape.f32_out,
                 .rows = shape.rows,
                 .out_columns = shape.out_columns,
                 .in_columns = shape.in_columns},
                Stream::kCompute);
  const std::vector<float> out = out_memory.Read();
  const double epsilon = out_dtype == DType::kF32 ? 0x1p-24 : 0x1p-8;
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t column = 0; column < out_stride; ++column) {
      const auto at = static_cast<size_t>(row * out_stride + column);
      if (column >= shape.out_columns) {
        ASSERT_EQ(out[at], before[at]) << "gap behind row " << row;
        continue;
      }
      double sum = shape.bias ? bias[static_cast<size_t>(column)] : 0;
      double bound = std::abs(sum);
      for (int64_t k = 0; k < shape.in_columns; ++k) {
        const double term = double{in[static_cast<size_t>(row * in_stride + k)]} *
                            weight[static_cast<size_t>(column * shape.in_columns + k)];
        sum += term;
        bound += std::abs(term);
      }
      if (shape.relu) sum = std::max(sum, 0.0);
      if (shape.accumulate) {
        sum += before[at];
        bound += std::abs(before[at]);
      }
      // Sums in f32, in any order; then up to three roundings to the output's format.
      const double tolerance = (std::sqrt(shape.in_columns) + 8) * 0x1p-23 * bound +
                               3 * epsilon * (std::abs(sum) + std::abs(double{before[at]}) + 4);
      ASSERT_NEAR(out[at], sum, tolerance)
          << "rows " << shape.rows << " out " << shape.out_columns << " in " << shape.in_columns
          << ": row " << row << " column " << column;
    }
  }
}

TEST(CudaBackendTest, Products) {
  for (const DType dtype : {DType::kBf16, DType::kF32}) {
    for (const bool invariant : {false, true}) {
      const auto backend = NewCuda({.dtype = dtype, .batch_invariant = invariant});
      Random random(7);
      for (const int32_t rows : {1, 2, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 100, 300}) {
        const auto out_columns = static_cast<int32_t>(8 * (1 + random.Uniform(60)));
        const auto in_columns = static_cast<int32_t>(8 * (1 + random.Uniform(80)));
        CheckProduct(backend.get(), random, {rows, out_columns, in_columns});
        CheckProduct(backend.get(), random,
                     {.rows = rows,
                      .out_columns = out_columns,
                      .in_columns = in_columns,
                      .bias = true,
                      .relu = true});
        CheckProduct(backend.get(), random,
                     {.rows = rows,
                      .out_columns = out_columns,
                      .in_columns = in_columns,
                      .bias = true,
                      .accumulate = true});
        CheckProduct(
            backend.get(), random,
            {.rows = rows, .out_columns = out_columns, .in_columns = in_columns, .f32_out = true});
        // Columns that allow no wide access.
        CheckProduct(backend.get(), random,
                     {.rows = rows, .out_columns = 172, .in_columns = 43, .accumulate = true});
      }
      CheckProduct(backend.get(), random, {5, 3000, 1024});
      CheckProduct(backend.get(), random, {64, 1000, 4096});
      CheckProduct(backend.get(), random, {1, 130, 8200});
    }
  }
}

// Outputs of one tile a block, of several, and of several passes.
class InvariantProductTest : public ::testing::TestWithParam<int32_t> {};

TEST_P(InvariantProductTest, DoesNotDependOnOtherRows) {
  const auto backend = NewCuda({.batch_invariant = true});
  Random random(3);
  const int32_t outputs = GetParam();
  constexpr int32_t kIn = 1096;
  const Buffer in(backend.get(), DType::kBf16, Values(random, 200 * kIn, DType::kBf16));
  const Buffer weight(backend.get(), DType::kBf16, Values(random, outputs * kIn, DType::kBf16));
  std::vector<float> alone;
  for (const int32_t rows : {1, 9, 30, 33, 64, 65, 200}) {
    const Buffer out(backend.get(), DType::kBf16,
                     std::vector<float>(static_cast<size_t>(rows) * outputs));
    backend->Gemm({.out = {out.data(), outputs},
                   .in = {in.data(), kIn},
                   .weight = weight.data(),
                   .rows = rows,
                   .out_columns = outputs,
                   .in_columns = kIn},
                  Stream::kCompute);
    std::vector<float> first = out.Read();
    first.resize(outputs);
    if (alone.empty()) alone = first;
    EXPECT_EQ(first, alone) << rows << " rows";
  }
  // Nor on where in a step it stands.
  const Buffer together(backend.get(), DType::kBf16, std::vector<float>(size_t{200} * outputs));
  const Buffer single(backend.get(), DType::kBf16, std::vector<float>(outputs));
  const auto multiply = [&](std::byte* from, std::byte* to, int32_t rows) {
    backend->Gemm({.out = {to, outputs},
                   .in = {from, kIn},
                   .weight = weight.data(),
                   .rows = rows,
                   .out_columns = outputs,
                   .in_columns = kIn},
                  Stream::kCompute);
  };
  multiply(in.data(), together.data(), 200);
  const std::vector<float> all = together.Read();
  for (const int32_t row : {7, 15, 31, 32, 150}) {
    multiply(in.data() + int64_t{row} * kIn * 2, single.data(), 1);
    EXPECT_TRUE(
        std::ranges::equal(single.Read(), std::span(all).subspan(int64_t{row} * outputs, outputs)))
        << "row " << row;
  }
}
INSTANTIATE_TEST_SUITE_P(Outputs, InvariantProductTest, ::testing::Values(520, 4320, 17040));

// A product and its gate in one start before the kernel ahead has ended, and read what it writes.
TEST(CudaBackendTest, GatedProductsReadWhatTheKernelAheadWrote) {
  const auto backend = NewCuda({});
  Random random(5);
  constexpr int32_t kHidden = 1024;
  constexpr int32_t kInner = 4096;
  constexpr int32_t kTurns = 20;
  const Buffer first(backend.get(), DType::kBf16, Values(random, kHidden * kHidden, DType::kBf16));
  const Buffer second(backend.get(), DType::kBf16,
                      Values(random, 2 * kInner * kHidden, DType::kBf16));
  for (const int32_t rows : {1, 8, 20, 33, 64}) {
    const Buffer in(backend.get(), DType::kBf16,
                    Values(random, int64_t{kTurns} * rows * kHidden, DType::kBf16));
    const Buffer middle(backend.get(), DType::kBf16,
                        std::vector<float>(static_cast<size_t>(rows) * kHidden));
    const Buffer ungated(backend.get(), DType::kBf16,
                         std::vector<float>(size_t{2} * rows * kInner));
    std::vector<std::vector<float>> runs;
    for (const bool waits : {true, false}) {
      const Buffer gated(backend.get(), DType::kBf16,
                         std::vector<float>(static_cast<size_t>(kTurns) * rows * kInner));
      for (int32_t turn = 0; turn < kTurns; ++turn) {
        backend->Gemm({.out = {middle.data(), kHidden},
                       .in = {in.data() + int64_t{turn} * rows * kHidden * 2, kHidden},
                       .weight = first.data(),
                       .rows = rows,
                       .out_columns = kHidden,
                       .in_columns = kHidden},
                      Stream::kCompute);
        if (waits) KVSWEEP_CHECK_OK(backend->WaitAll());
        backend->GatedGemm({.product = {.out = {ungated.data(), 2 * kInner},
                                        .in = {middle.data(), kHidden},
                                        .weight = second.data(),
                                        .rows = rows,
                                        .out_columns = 2 * kInner,
                                        .in_columns = kHidden},
                            .gated = {gated.data() + int64_t{turn} * rows * kInner * 2, kInner}},
                           Stream::kCompute);
        if (waits) KVSWEEP_CHECK_OK(backend->WaitAll());
      }
      runs.push_back(gated.Read());
    }
    EXPECT_EQ(runs[0], runs[1]) << rows << " rows";
  }
}

// Decode rows behind the projection that makes their queries, keys and values; each round has other
// ones, all store at the same places.
struct AppendingRows {
  static constexpr int32_t kQueryHeads = 8;
  static constexpr int32_t kKvHeads = 2;
  static constexpr int32_t kHeadDim = 128;
  static constexpr int32_t kHidden = 256;
  static constexpr int32_t kColumns = (kQueryHeads + 2 * kKvHeads) * kHeadDim;
  static constexpr int32_t kPage = 16;
  static constexpr int32_t kPages = 65;  // of a row
  static constexpr int32_t kRounds = 6;
  int32_t rows;
  AttentionPlan plan;

  // What attention gave in all rounds, and then the pool.
  std::vector<float> Run(Backend* backend, bool in_one) const {
    const DType dtype = backend->info().activation_dtype;
    const int64_t size = DTypeBytes(dtype);
    Random random(11);
    const auto buffer = [&](int64_t count) {
      return std::make_unique<Buffer>(backend, dtype, Values(random, count, dtype));
    };
    const auto integers = [&](const std::vector<int32_t>& values) {
      std::vector<float> bits(values.size());
      std::memcpy(bits.data(), values.data(), values.size() * sizeof(int32_t));
      return std::make_unique<Buffer>(backend, DType::kF32, bits);
    };
    const auto pointer = [](const std::unique_ptr<Buffer>& memory) {
      return reinterpret_cast<const int32_t*>(memory->data());
    };
    std::vector<int32_t> table(static_cast<size_t>(rows) * kPages);
    std::iota(table.begin(), table.end(), 0);
    random.Shuffle(std::span<int32_t>(table));
    std::vector<int32_t> length;
    std::vector<int32_t> row_number;
    std::vector<float> frequency(kHeadDim / 2);
    for (int32_t row = 0; row < rows; ++row) {
      // Own tokens at the borders of tiles and of splits, and of rows with nothing stored.
      const std::vector<int32_t> lengths = {1023, 1024, 0, 127, 128, 1000, 383, 512, 17, 640};
      length.push_back(lengths[static_cast<size_t>(row) % lengths.size()]);
      row_number.push_back(row);
    }
    for (size_t j = 0; j < frequency.size(); ++j) {
      frequency[j] = std::pow(10000.0f, -2.0f * static_cast<float>(j) / kHeadDim);
    }
    const auto in = buffer(int64_t{kRounds} * rows * kHidden);
    const auto weight = buffer(int64_t{kColumns} * kHidden);
    const auto pool = buffer(int64_t{rows} * kPages * kPage * kKvHeads * 2 * kHeadDim);
    const auto row = buffer(int64_t{rows} * kColumns);
    const auto out = buffer(int64_t{kRounds} * rows * kQueryHeads * kHeadDim);
    const auto tables = integers(table);
    const auto lengths = integers(length);
    const auto rows_of_table = integers(row_number);
    const Buffer frequencies(backend, DType::kF32, frequency);
    const auto columns = [&](int32_t first) {
      return Activations{row->data() + first * size, kColumns};
    };
    const KvView view = {.key = pool->data(),
                         .value = pool->data() + kPage * kHeadDim * size,
                         .dtype = dtype,
                         .block_size = kPage,
                         .block_stride = int64_t{kPage} * kKvHeads * 2 * kHeadDim,
                         .token_stride = kHeadDim,
                         .head_stride = 2 * kPage * kHeadDim,
                         .block_table = pointer(tables),
                         .block_table_stride = kPages,
                         .length = pointer(lengths)};
    AppendAndAttendArgs args;
    args.append = {
        .target = view,
        .key = columns(kQueryHeads * kHeadDim),
        .value = columns((kQueryHeads + kKvHeads) * kHeadDim),
        .table_row = pointer(rows_of_table),
        .slot = pointer(lengths),
        .rotary = {.data = columns(0),
                   .position = pointer(lengths),
                   .inverse_frequency = reinterpret_cast<const float*>(frequencies.data()),
                   .rows = rows,
                   .heads = kQueryHeads + kKvHeads,
                   .head_dim = kHeadDim},
        .rows = rows,
        .kv_heads = kKvHeads,
        .head_dim = kHeadDim};
    args.attention = {.query = columns(0),
                      .current_key = args.append.key,
                      .current_value = args.append.value,
                      .view = view,
                      .plan = plan,
                      .rows = rows,
                      .query_heads = kQueryHeads,
                      .kv_heads = kKvHeads,
                      .head_dim = kHeadDim,
                      .scale = 0.02f};
    for (int32_t round = 0; round < kRounds; ++round) {
      backend->Gemm({.out = columns(0),
                     .in = {in->data() + int64_t{round} * rows * kHidden * size, kHidden},
                     .weight = weight->data(),
                     .rows = rows,
                     .out_columns = kColumns,
                     .in_columns = kHidden},
                    Stream::kCompute);
      args.attention.out = {out->data() + int64_t{round} * rows * kQueryHeads * kHeadDim * size,
                            kQueryHeads * kHeadDim};
      if (in_one) {
        backend->AppendAndAttend(args, Stream::kCompute);
        continue;
      }
      KVSWEEP_CHECK_OK(backend->WaitAll());
      backend->Append(args.append, Stream::kCompute);
      KVSWEEP_CHECK_OK(backend->WaitAll());
      backend->DecodeAttention(args.attention, Stream::kCompute);
      KVSWEEP_CHECK_OK(backend->WaitAll());
    }
    std::vector<float> all = out->Read();
    const std::vector<float> stored = pool->Read();
    all.insert(all.end(), stored.begin(), stored.end());
    return all;
  }
};

// One block a row and head; clusters, of two and of more; splits that join through memory.
TEST(CudaBackendTest, AttentionThatAppendsSaysWhatTheTwoSayWhenAllWaits) {
  const auto backend = NewCuda({});
  const std::vector<AppendingRows> shapes = {{.rows = 40, .plan = {1, 0}},
                                             {.rows = 40, .plan = {2, 576}},
                                             {.rows = 3, .plan = {9, 128}},
                                             {.rows = 40, .plan = {3, 384}}};
  for (const AppendingRows& shape : shapes) {
    EXPECT_EQ(shape.Run(backend.get(), true), shape.Run(backend.get(), false))
        << shape.rows << " rows, " << shape.plan.splits << " splits";
  }
}

TEST(CudaBackendTest, RandomNumbersAreThoseOfTheCpuBackend) {
  const auto cuda = NewCuda({});
  const auto cpu = CreateCpuBackend({.threads = 1}).value();
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    std::vector<std::vector<float>> values;
    for (Backend* backend : {cuda.get(), cpu.get()}) {
      const Buffer memory(backend, dtype, std::vector<float>(100'001));
      backend->FillNormal(
          {.out = memory.data(), .dtype = dtype, .count = 100'001, .seed = 42, .deviation = 0.02f},
          Stream::kCompute);
      values.push_back(memory.Read());
    }
    EXPECT_EQ(values[0], values[1]);
  }
}

TEST(CudaBackendTest, MemoryIsZeroedCountedAndBounded) {
  const auto backend = NewCuda({.device_memory_bytes = 1 << 20, .host_memory_bytes = 1 << 16});
  std::byte* const first = backend->Allocate(Tier::kDevice, 700'000).value();
  EXPECT_EQ(backend->allocated_bytes(Tier::kDevice), 700'000u);
  const auto refused = backend->Allocate(Tier::kDevice, 700'000);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(refused.status().message(), "asked 700000, available 348576"))
      << refused.status();
  EXPECT_FALSE(backend->Allocate(Tier::kHost, 1 << 17).ok());
  // Freed memory comes back clean.
  std::vector<uint8_t> ones(700'000, 1);
  backend->Copy(first, ones.data(), ones.size(), Stream::kHostToDevice);
  ASSERT_TRUE(backend->WaitAll().ok());
  EXPECT_EQ(backend->link_bytes_to_device(), 700'000u);
  backend->Free(first);
  std::byte* const again = backend->Allocate(Tier::kDevice, 690'000).value();
  backend->Copy(ones.data(), again, 690'000, Stream::kDeviceToHost);
  ASSERT_TRUE(backend->WaitAll().ok());
  EXPECT_EQ(backend->link_bytes_to_host(), 690'000u);
  EXPECT_EQ(std::count(ones.begin(), ones.begin() + 690'000, 0), 690'000);
}

// Small ones are a kernel's, others the copy engine's: of sizes and places that four or sixteen
// bytes divide or do not, on either side of the bound.
TEST(CudaBackendTest, CopiesOfAnySizeCarryTheirBytesAndNoOthers) {
  const std::unique_ptr<Backend> backend = NewCuda({});
  constexpr size_t kRoom = 300 * 1024;
  std::byte* const device = backend->Allocate(Tier::kDevice, kRoom).value();
  std::byte* const from = backend->Allocate(Tier::kHost, kRoom).value();
  std::byte* const back = backend->Allocate(Tier::kHost, kRoom).value();
  for (size_t i = 0; i < kRoom; ++i) from[i] = static_cast<std::byte>(i * 7 + i / 256);
  for (const size_t bytes : {1, 4, 12, 16, 1020, 4096, 262144, 262148, 262160}) {
    for (const size_t begin : {0, 4, 16, 18}) {
      backend->Zero(device, kRoom, Stream::kCompute);
      backend->Copy(device + begin, from + begin, bytes, Stream::kCompute);
      std::fill_n(back, kRoom, std::byte{0xee});
      backend->Copy(back + begin, device + begin, bytes, Stream::kCompute);
      ASSERT_TRUE(backend->WaitAll().ok());
      const bool same = std::equal(from + begin, from + begin + bytes, back + begin);
      EXPECT_TRUE(same) << bytes << " bytes from " << begin;
      EXPECT_EQ(back[begin + bytes], std::byte{0xee}) << bytes << " bytes from " << begin;
      if (begin > 0) {
        EXPECT_EQ(back[begin - 1], std::byte{0xee});
      }
      // Neither were the device's other bytes touched.
      backend->Copy(back, device, kRoom, Stream::kCompute);
      ASSERT_TRUE(backend->WaitAll().ok());
      EXPECT_EQ(back[begin + bytes], std::byte{0});
      if (begin > 0) {
        EXPECT_EQ(back[begin - 1], std::byte{0});
      }
    }
  }
  for (std::byte* const memory : {device, from, back}) backend->Free(memory);
}

TEST(CudaBackendTest, GraphsJoinStreamsAndReadNewValuesBehindOldPointers) {
  const auto backend = NewCuda({.dtype = DType::kF32});
  const auto floats = [&](Tier tier) {
    return reinterpret_cast<float*>(backend->Allocate(tier, 4096).value());
  };
  float* const host = floats(Tier::kHost);
  float* const device = floats(Tier::kDevice);
  float* const back = floats(Tier::kHost);
  const Event sent = backend->CreateEvent();
  const Event done = backend->CreateEvent();
  backend->BeginCapture();
  backend->Copy(device, host, 4096, Stream::kHostToDevice);
  backend->RecordEvent(sent, Stream::kHostToDevice);
  backend->WaitEvent(sent, Stream::kDeviceToHost);
  backend->Copy(back, device, 4096, Stream::kDeviceToHost);
  backend->RecordEvent(done, Stream::kDeviceToHost);
  backend->WaitEvent(done, Stream::kCompute);
  const absl::StatusOr<Graph> graph = backend->EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int step = 1; step <= 3; ++step) {
    for (int i = 0; i < 1024; ++i) host[i] = static_cast<float>(step * 10'000 + i);
    backend->Launch(*graph);
    ASSERT_TRUE(backend->WaitAll().ok());
    for (int i = 0; i < 1024; ++i) ASSERT_EQ(back[i], static_cast<float>(step * 10'000 + i));
    EXPECT_EQ(backend->link_bytes_to_device(), 4096u * static_cast<unsigned>(step));
  }
  backend->DestroyGraph(*graph);

  backend->BeginCapture();
  backend->Copy(device, host, 4096, Stream::kHostToDevice);
  EXPECT_EQ(backend->EndCapture().status().code(), absl::StatusCode::kFailedPrecondition);
  // The stream is usable again.
  backend->Copy(device, host, 4096, Stream::kHostToDevice);
  EXPECT_TRUE(backend->WaitAll().ok());
  backend->RecordEvent(sent, Stream::kCompute);
  backend->BeginCapture();
  backend->WaitEvent(sent, Stream::kCompute);
  EXPECT_EQ(backend->EndCapture().status().code(), absl::StatusCode::kFailedPrecondition);
}

// What a profile tells of the latest launch of a graph and of work outside of it: parts as entered,
// lengths that the memory could carry, one stream's operations one behind the other.
TEST(CudaBackendTest, ProfilesTellWhenOperationsRan) {
  const auto backend = NewCuda({});
  constexpr uint64_t kBytes = 64 << 20;
  std::byte* const device = backend->Allocate(Tier::kDevice, 2 * kBytes).value();
  std::byte* const host = backend->Allocate(Tier::kHost, kBytes).value();
  backend->BeginProfile();
  backend->BeginCapture();
  backend->Enter(StepPart::kMlp);
  backend->Copy(device + kBytes, device, kBytes, Stream::kCompute);
  backend->Enter(StepPart::kSampling);
  backend->Zero(device, kBytes, Stream::kCompute);
  backend->Enter(StepPart::kNone);
  const absl::StatusOr<Graph> graph = backend->EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int launch = 0; launch < 3; ++launch) {
    backend->Launch(*graph);
    backend->Launch(*graph);
    backend->Copy(device, host, kBytes, Stream::kHostToDevice);
    const absl::StatusOr<std::vector<OperationTime>> times = backend->TakeProfile();
    ASSERT_TRUE(times.ok()) << times.status();
    ASSERT_EQ(times->size(), 3u) << "of two launches the last";
    std::map<std::string, OperationTime> by_stream_and_name;
    for (const OperationTime& time : *times) {
      by_stream_and_name[absl::StrCat(static_cast<int>(time.stream), time.name)] = time;
    }
    const OperationTime& inside = by_stream_and_name.at("0Copy");
    const OperationTime& zeroed = by_stream_and_name.at("0Zero");
    const OperationTime& across = by_stream_and_name.at("2Copy");
    EXPECT_EQ(inside.part, StepPart::kMlp);
    EXPECT_EQ(zeroed.part, StepPart::kSampling);
    EXPECT_EQ(across.part, StepPart::kNone);
    EXPECT_GE(zeroed.begin_ns, inside.end_ns);
    EXPECT_GT(inside.end_ns - inside.begin_ns, 2.0 * kBytes / 20e12 * 1e9);
    EXPECT_GT(across.end_ns - across.begin_ns, kBytes / 1e12 * 1e9);
  }
  backend->EndProfile();
  backend->Zero(device, kBytes, Stream::kCompute);
  EXPECT_TRUE(backend->TakeProfile()->empty());
  backend->DestroyGraph(*graph);
}

TEST(CudaBackendTest, FetchesCanBeLeftOut) {
  const auto backend = NewCuda({});
  std::byte* const device = backend->Allocate(Tier::kDevice, 4096).value();
  std::byte* const host = backend->Allocate(Tier::kHost, 4096).value();
  std::byte* const pair = backend->Allocate(Tier::kDevice, 256).value();
  CopyBlocksArgs fetch;
  fetch.target = device;
  fetch.source = host;
  fetch.pair = reinterpret_cast<const int32_t*>(pair);
  fetch.count = 1;
  fetch.block_bytes = 1024;
  CopyBlocksArgs store = fetch;
  store.target = host;
  store.source = device;
  const auto moved = [&] {
    backend->CopyBlocks(fetch, Stream::kHostToDevice);
    backend->CopyBlocks(store, Stream::kDeviceToHost);
    EXPECT_TRUE(backend->WaitAll().ok());
    return std::pair(backend->link_bytes_to_device(), backend->link_bytes_to_host());
  };
  backend->SkipFetches(true);
  EXPECT_EQ(moved(), std::pair(uint64_t{0}, uint64_t{1024}));
  backend->SkipFetches(false);
  EXPECT_EQ(moved(), std::pair(uint64_t{1024}, uint64_t{2048}));
}

TEST(CudaBackendTest, ErrorsNameTheOperation) {
  const auto backend = NewCuda({.dtype = DType::kF32});
  std::byte* const memory = backend->Allocate(Tier::kDevice, 1 << 20).value();
  auto* const floats = reinterpret_cast<float*>(memory);
  backend->Norm({.out = {memory, 100'000},
                 .in = {memory, 100'000},
                 .weight = floats,
                 .rows = 1,
                 .columns = 100'000},
                Stream::kCompute);
  const absl::Status status = backend->WaitAll();
  EXPECT_TRUE(absl::StrContains(status.message(), "Norm: ")) << status;
  EXPECT_TRUE(backend->WaitAll().ok());
}

}  // namespace
}  // namespace kvsweep
