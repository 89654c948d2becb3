#include "kernels/step_state.h"

#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

TEST(StepState, FieldsLieApartAndTheDeviceSeesEachStep) {
  CpuBackend backend({.threads = 1, .shuffle_streams = true, .stream_seed = 1});
  StepState state(&backend);
  const StepState::Field lengths = state.Add(3);
  const StepState::Field empty = state.Add(0);
  const StepState::Field tables = state.Add(20);
  EXPECT_EQ(state.device_bytes(), (16u + 32u) * sizeof(int32_t));
  ASSERT_TRUE(state.Build(2).ok());
  EXPECT_EQ(backend.allocated_bytes(Tier::kDevice), state.device_bytes());
  EXPECT_EQ(backend.allocated_bytes(Tier::kHost), 2 * state.device_bytes());
  EXPECT_EQ(empty.count, 0);
  const int32_t* const address = state.Device(tables);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(address) % 64, 0u);

  for (int32_t step = 0; step < 5; ++step) {
    ASSERT_TRUE(state.Begin().ok());
    for (int32_t& x : state.Host(lengths)) x = step;
    for (int32_t& x : state.Host(tables)) x = -step;
    state.Commit();
    ASSERT_TRUE(backend.WaitAll().ok());
    EXPECT_EQ(state.Device(lengths)[2], step);
    EXPECT_EQ(state.Device(tables)[19], -step);
    EXPECT_EQ(state.Device(tables), address);
  }
}

// The host runs ahead of the device, and a captured step adds up what it finds behind its pointer:
// every step sees its own values although there are fewer pinned copies than steps.
TEST(StepState, ARunningAheadHostOverwritesNothing) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    CpuBackend backend({.threads = 1, .shuffle_streams = true, .stream_seed = seed});
    constexpr int32_t kSteps = 10;
    StepState state(&backend);
    const StepState::Field row = state.Add(1);
    ASSERT_TRUE(state.Build(3).ok());
    float* const in = reinterpret_cast<float*>(*backend.Allocate(Tier::kDevice, kSteps * 4));
    float* const out = reinterpret_cast<float*>(*backend.Allocate(Tier::kDevice, 4));
    float* const log = reinterpret_cast<float*>(*backend.Allocate(Tier::kDevice, kSteps * 4));
    for (int32_t i = 0; i < kSteps; ++i) in[i] = static_cast<float>(i + 1);
    backend.BeginCapture();
    backend.TakeRows({.out = {.data = out, .stride = 1},
                      .in = {.data = in, .stride = 1},
                      .row = state.Device(row),
                      .rows = 1,
                      .columns = 1},
                     Stream::kCompute);
    const Graph graph = backend.EndCapture().value();
    for (int32_t step = 0; step < kSteps; ++step) {
      ASSERT_TRUE(state.Begin().ok());
      state.Host(row)[0] = step;
      state.Commit();
      backend.Launch(graph);
      backend.Copy(log + step, out, 4, Stream::kCompute);
    }
    ASSERT_TRUE(backend.WaitAll().ok());
    for (int32_t step = 0; step < kSteps; ++step) {
      EXPECT_EQ(log[step], static_cast<float>(step + 1)) << "seed " << seed;
    }
  }
}

TEST(StepState, AFullDeviceIsAnError) {
  CpuBackend backend({.threads = 1, .device_memory_bytes = 100});
  StepState state(&backend);
  state.Add(1000);
  EXPECT_EQ(state.Build().code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvsweep
