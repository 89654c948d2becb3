#include "kernels/cpu/cpu_backend.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

TEST(CpuBackend, MemoryIsAlignedZeroedCountedAndBounded) {
  absl::StatusOr<std::unique_ptr<Backend>> created =
      CreateCpuBackend({.threads = 1, .device_memory_bytes = 1000, .host_memory_bytes = 2000});
  ASSERT_TRUE(created.ok()) << created.status();
  Backend& backend = **created;
  std::byte* const first = *backend.Allocate(Tier::kDevice, 600);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 256, 0u);
  EXPECT_EQ(std::vector<std::byte>(first, first + 600), std::vector<std::byte>(600));
  EXPECT_EQ(backend.allocated_bytes(Tier::kDevice), 600u);
  EXPECT_EQ(backend.allocated_bytes(Tier::kHost), 0u);

  const absl::Status refused = backend.Allocate(Tier::kDevice, 401).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(), "device memory: asked 401, available 400 of 1000 bytes");
  EXPECT_TRUE(backend.Allocate(Tier::kHost, 2000).ok()) << "the tiers have bounds of their own";
  EXPECT_TRUE(backend.Allocate(Tier::kDevice, 400).ok());
  backend.Free(first);
  EXPECT_EQ(backend.allocated_bytes(Tier::kDevice), 400u);
  EXPECT_TRUE(backend.Allocate(Tier::kDevice, 600).ok());
}

TEST(CpuBackend, SaysWhatItIs) {
  EXPECT_FALSE(CreateCpuBackend({.threads = -1}).ok());
  const CpuBackend real({.threads = 2});
  EXPECT_EQ(real.info().backend, "cpu");
  EXPECT_NE(real.info().device_class.find("2 threads"), std::string::npos);
  EXPECT_GT(real.info().device_memory_bytes, 0u);
  const CpuBackend modelled({.threads = 2, .modelled = *FindDeviceProfile("h200")});
  EXPECT_EQ(modelled.info().device_class, "modelled h200");
}

// A copy reads ordinary memory when it runs, as a GPU would.
TEST(CpuBackend, CopiesReadWhenTheyRun) {
  Device device;
  int32_t* const target = device.Room<int32_t>(1);
  int32_t source = 1;
  device.backend.Copy(target, &source, sizeof source, Stream::kHostToDevice);
  source = 2;
  EXPECT_EQ(*target, 0);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(*target, 2);
  device.backend.Zero(target, sizeof source, Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(*target, 0);
}

TEST(CpuBackend, ArgumentsAreFixedByTheCall) {
  Device device;
  const Activations out = device.RoomRows(1, 2);
  int32_t* const row = device.Put(std::vector<int32_t>{1});
  TakeRowsArgs args{
      .out = out, .in = device.PutRows({1, 2, 3, 4}, 2, 2), .row = row, .rows = 1, .columns = 2};
  device.backend.BeginCapture();
  device.backend.TakeRows(args, Stream::kCompute);
  const Graph graph = device.backend.EndCapture().value();
  args.columns = 1;  // the caller's variable may go: the graph holds the value
  for (int32_t wanted : {1, 0}) {
    *row = wanted;  // what lies behind a pointer is read anew by each launch
    device.backend.Launch(graph);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    EXPECT_EQ(Device::GetRows(out, 1, 2),
              wanted == 1 ? (std::vector<float>{3, 4}) : (std::vector<float>{1, 2}));
  }
  device.backend.DestroyGraph(graph);
}

TEST(CpuBackendDeathTest, ACapturedCopyFromACallersVariableIsRefused) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  Device device({.threads = 1});
  int32_t* const target = device.Room<int32_t>(1);
  const int32_t source = 1;
  device.backend.BeginCapture();
  EXPECT_DEATH(device.backend.Copy(target, &source, sizeof source, Stream::kCompute),
               "must lie in memory of the backend");
}

TEST(CpuBackendDeathTest, ArgumentsThatNoCallerMayPassAreRefusedAtTheCall) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  Device device({.threads = 1});
  EXPECT_DEATH(device.backend.DecodeAttention({.rows = 1, .query_heads = 3, .kv_heads = 2},
                                              Stream::kCompute),
               "query_heads % kv_heads");
  EXPECT_DEATH(
      device.backend.Gemm({.rows = 1, .out_columns = 1, .in_columns = 1}, Stream::kCompute),
      "activations.data != nullptr");
}

TEST(CpuBackend, AfterAnErrorNothingIsComputedUntilItIsTaken) {
  Random random(1);
  Device device;
  const Cache cache = MakeCache(device, random, {.lengths = {4}});
  const Activations rows = device.PutRows(std::vector<float>(8, 1.0f), 1, 8);
  AppendArgs append{.target = cache.view,
                    .key = rows,
                    .value = rows,
                    .table_row = device.Put(std::vector<int32_t>{0}),
                    .slot = device.Put(std::vector<int32_t>{-5}),
                    .rows = 1,
                    .kv_heads = 1,
                    .head_dim = 8};
  int32_t* const mark = device.Put(std::vector<int32_t>{7});
  device.backend.Append(append, Stream::kCompute);
  device.backend.Zero(mark, 4, Stream::kCompute);
  const absl::Status status = device.backend.WaitAll();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message().substr(0, 8), "Append: ");
  EXPECT_EQ(*mark, 7);
  device.backend.Zero(mark, 4, Stream::kCompute);
  EXPECT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(*mark, 0);
}

// Prefetch on the host-to-device stream beside a projection on the compute stream, then attention
// that needs both: in modelled time the longer of the two counts, to the nanosecond, for every
// seed.
TEST(CpuBackend, ModelledTimeOverlapsTransferAndCompute) {
  DeviceProfile profile{.name = "test",
                        .device_bytes_per_s = 1e9,
                        .link_bytes_per_s = 1e8,
                        .operations_per_s = 1e9,
                        .operation_ns = 10,
                        .element_bytes = 2};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Device device(
        {.threads = 2, .shuffle_streams = true, .stream_seed = seed, .modelled = profile});
    std::byte* const pinned = device.Room<std::byte>(1000, Tier::kHost);
    std::byte* const fetched = device.Room<std::byte>(1000);
    const Event arrived = device.backend.CreateEvent();
    device.backend.Copy(fetched, pinned, 1000, Stream::kHostToDevice);  // 1000 B / 1e8 = 10 us
    device.backend.RecordEvent(arrived, Stream::kHostToDevice);
    const GemmArgs gemm{.out = device.RoomRows(1, 16),
                        .in = device.PutRows(std::vector<float>(16, 1.0f), 1, 16),
                        .weight = device.Put(std::vector<float>(256, 1.0f)),
                        .rows = 1,
                        .out_columns = 16,
                        .in_columns = 16};
    device.backend.Gemm(gemm, Stream::kCompute);  // (256 + 32) * 2 B / 1e9 = 576 ns
    device.backend.WaitEvent(arrived, Stream::kCompute);
    device.backend.Zero(fetched, 500, Stream::kCompute);  // 500 ns
    ASSERT_TRUE(device.backend.WaitAll().ok());
    EXPECT_EQ(device.backend.modelled_ns(), 10'000 + 10 + 500 + 10);
    EXPECT_EQ(device.backend.link_bytes_to_device(), 1000u);
    EXPECT_EQ(device.backend.total_cost().link_bytes, 1000);
    EXPECT_EQ(device.backend.total_cost().operations, 512);
  }
}

// Costs alone: products are not computed, copies are, and memory may exceed the machine's.
TEST(CpuBackend, CostsAloneComputesNoProducts) {
  Device device({.threads = 1, .modelled = *FindDeviceProfile("h200"), .costs_alone = true});
  const Activations out = device.RoomRows(1, 16);
  device.backend.Gemm({.out = out,
                       .in = device.PutRows(std::vector<float>(16, 1.0f), 1, 16),
                       .weight = device.Put(std::vector<float>(256, 1.0f)),
                       .rows = 1,
                       .out_columns = 16,
                       .in_columns = 16},
                      Stream::kCompute);
  float* const target = device.Room<float>(1);
  const float* const source = device.Put(std::vector<float>{7});
  device.backend.Copy(target, source, sizeof(float), Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_TRUE(std::isnan(*static_cast<const float*>(out.data))) << "it was written";
  EXPECT_EQ(*target, 7);
  EXPECT_GT(device.backend.modelled_ns(), 0);
  const absl::StatusOr<std::byte*> large =
      device.backend.Allocate(Tier::kDevice, uint64_t{1} << 40);
  ASSERT_TRUE(large.ok()) << large.status();
  (*large)[uint64_t{1} << 39] = std::byte{1};
  device.backend.Free(*large);
}

// A small decode step, eager and as a graph, again and again: the same numbers, and no allocation
// once it is warm.
TEST(CpuBackend, AGraphEqualsEagerStepsAndAllocatesNothingWhenWarm) {
  Random random(2);
  Device device({.threads = 2, .shuffle_streams = true, .stream_seed = 5});
  const Cache cache = MakeCache(
      device, random, {.lengths = {40, 3, 64}, .kv_heads = 2, .head_dim = 16, .block_size = 16});
  const int32_t rows = 3;
  const Activations hidden = device.PutRows(RandomFloats(random, rows * 64), rows, 64);
  const Activations qkv = device.RoomRows(rows, 128);
  const Activations out = device.RoomRows(rows, 64);
  const Activations logits = device.RoomRows(rows, 50);
  const float* const norm = device.Put(std::vector<float>(64, 1.0f));
  const float* const weight = device.Put(RandomFloats(random, 128 * 64));
  const float* const head = device.Put(RandomFloats(random, 50 * 64));
  const Activations key{.data = static_cast<float*>(qkv.data) + 64, .stride = qkv.stride};
  const Activations value{.data = static_cast<float*>(qkv.data) + 96, .stride = qkv.stride};
  int32_t* const position = device.Put(cache.shape.lengths);
  const float* const frequency = device.Put(RandomFloats(random, 8));
  int32_t* const token = device.Room<int32_t>(rows);
  const int32_t* const table_row = device.Put(std::vector<int32_t>{0, 1, 2});
  const Event appended = device.backend.CreateEvent();
  const auto step = [&] {
    CpuBackend& b = device.backend;
    const Stream s = Stream::kCompute;
    b.Norm({.out = out, .in = hidden, .weight = norm, .rows = rows, .columns = 64}, s);
    b.Gemm({.out = qkv,
            .in = out,
            .weight = weight,
            .rows = rows,
            .out_columns = 128,
            .in_columns = 64},
           s);
    b.Rotary({.data = qkv,
              .position = position,
              .inverse_frequency = frequency,
              .rows = rows,
              .heads = 6,
              .head_dim = 16},
             s);
    b.DecodeAttention({.out = out,
                       .query = qkv,
                       .current_key = key,
                       .current_value = value,
                       .view = cache.view,
                       .rows = rows,
                       .query_heads = 4,
                       .kv_heads = 2,
                       .head_dim = 16,
                       .scale = 0.25f},
                      s);
    b.RecordEvent(appended, s);
    b.WaitEvent(appended, Stream::kSpeculation);
    b.Append({.target = cache.view,
              .key = key,
              .value = value,
              .table_row = table_row,
              .slot = position,
              .rows = rows,
              .kv_heads = 2,
              .head_dim = 16},
             Stream::kSpeculation);
    b.RecordEvent(appended, Stream::kSpeculation);
    b.Gemm({.out = logits,
            .in = out,
            .weight = head,
            .rows = rows,
            .out_columns = 50,
            .in_columns = 64},
           s);
    b.Argmax({.token = token, .logits = logits, .target = table_row, .rows = rows, .columns = 50},
             s);
    b.WaitEvent(appended, s);
  };
  step();
  ASSERT_TRUE(device.backend.WaitAll().ok());
  const std::vector<float> eager = Device::GetRows(logits, rows, 50);
  device.backend.BeginCapture();
  step();
  const absl::StatusOr<Graph> graph = device.backend.EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status();
  int64_t warm = 0;
  for (int i = 0; i < 30; ++i) {
    i % 2 == 0 ? device.backend.Launch(*graph) : step();
    ASSERT_TRUE(device.backend.WaitAll().ok());
    EXPECT_EQ(Device::GetRows(logits, rows, 50), eager);
    if (i == 1) warm = device.backend.growths();
  }
  EXPECT_EQ(device.backend.growths(), warm);
}

// Drops every wait, as a bug in a strategy would: the fault shows as a wrong number within 100
// seeds.
class WithoutWaits : public CpuBackend {
 public:
  using CpuBackend::CpuBackend;
  void WaitEvent(Event, Stream) override {}
};

template <typename BackendUnderTest>
int WrongPrefetches() {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    BackendUnderTest backend({.threads = 1, .shuffle_streams = true, .stream_seed = seed});
    std::byte* const pinned = *backend.Allocate(Tier::kHost, 4);
    std::byte* const buffer = *backend.Allocate(Tier::kDevice, 4);
    std::byte* const used = *backend.Allocate(Tier::kDevice, 4);
    std::memset(pinned, 7, 4);
    const Event arrived = backend.CreateEvent();
    backend.Copy(buffer, pinned, 4, Stream::kHostToDevice);
    backend.RecordEvent(arrived, Stream::kHostToDevice);
    backend.WaitEvent(arrived, Stream::kCompute);
    backend.Copy(used, buffer, 4, Stream::kCompute);
    EXPECT_TRUE(backend.WaitAll().ok());
    wrong += used[0] == std::byte{7} ? 0 : 1;
  }
  return wrong;
}

TEST(CpuBackend, ADroppedWaitShowsAsAWrongNumber) {
  EXPECT_EQ(WrongPrefetches<CpuBackend>(), 0);
  EXPECT_GT(WrongPrefetches<WithoutWaits>(), 0);
}

}  // namespace
}  // namespace kvsweep
