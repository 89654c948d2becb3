#include "worker/telemetry/nvml.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "worker/telemetry/device_sampler.h"

namespace kvsweep {
namespace {

constexpr double kGibi = 1ull << 30;

std::unique_ptr<Nvml> OpenFake(const std::string& address) {
  absl::StatusOr<std::unique_ptr<Nvml>> nvml = Nvml::Open(address, KVSWEEP_FAKE_NVML);
  EXPECT_TRUE(nvml.ok()) << nvml.status();
  return nvml.ok() ? *std::move(nvml) : nullptr;
}

TEST(Nvml, ReadsEverythingThatTheDeviceTells) {
  const std::unique_ptr<Nvml> nvml = OpenFake("0000:1b:00.0");
  ASSERT_NE(nvml, nullptr);
  const DeviceReading first = nvml->Read();
  const DeviceReading second = nvml->Read();
  EXPECT_EQ(*second.energy_j - *first.energy_j, 5);
  EXPECT_EQ(first.power_w, 412.5);
  EXPECT_EQ(first.sm_clock_mhz, 1755);
  EXPECT_EQ(first.memory_clock_mhz, 2619);
  EXPECT_EQ(first.temperature_c, 61);
  EXPECT_EQ(first.clock_reasons, 0x4u);
  EXPECT_EQ(first.memory_used_bytes, 49 * kGibi) << "what the driver keeps is left out";
  EXPECT_EQ(first.processes, 1);
  EXPECT_EQ(first.link_generation, 5);
  EXPECT_EQ(first.link_width, 16);
  const DeviceLimits limits = nvml->ReadLimits();
  EXPECT_EQ(limits.driver, "999.1");
  EXPECT_EQ(limits.power_limit_w, 700);
  EXPECT_EQ(limits.sm_clock_mhz, 1980);
  EXPECT_EQ(limits.memory_clock_mhz, 3201);
  EXPECT_EQ(limits.link_generation, 6);
}

TEST(Nvml, FallsBackToOlderCallsAndLeavesOutWhatIsNotSupported) {
  const std::unique_ptr<Nvml> nvml = OpenFake("0000:1b:00.1");
  ASSERT_NE(nvml, nullptr);
  const DeviceReading reading = nvml->Read();
  EXPECT_FALSE(reading.energy_j.has_value());
  EXPECT_EQ(reading.temperature_c, 44);
  EXPECT_EQ(reading.clock_reasons, 0x1u);
  EXPECT_EQ(reading.memory_used_bytes, 7 * kGibi);
  const DeviceUse use = Aggregate({reading, reading});
  EXPECT_EQ(use.energy_doubts, kEnergyNotRead);
  EXPECT_FALSE(use.energy_j.has_value());
  EXPECT_EQ(use.power_w_mean, 412.5);
}

TEST(Nvml, CountsOtherProcessesOnTheDevice) {
  const std::unique_ptr<Nvml> nvml = OpenFake("0000:1b:00.2");
  ASSERT_NE(nvml, nullptr);
  EXPECT_EQ(nvml->Read().processes, 3);
}

TEST(Nvml, SaysWhyThereIsNone) {
  const absl::Status absent = Nvml::Open("0000:1b:00.0", "libno-such-nvml.so.1").status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(absent.message(), "libno-such-nvml.so.1 is not installed");
  const absl::Status other = Nvml::Open("0000:1b:00.0", "libm.so.6").status();
  EXPECT_EQ(other.message(), "libm.so.6 is no NVML of version 2 or later");
  const absl::Status unknown = Nvml::Open("0000:1b:00.9", KVSWEEP_FAKE_NVML).status();
  EXPECT_TRUE(absl::StrContains(unknown.message(), "0000:1b:00.9: Not Found")) << unknown;
}

}  // namespace
}  // namespace kvsweep
