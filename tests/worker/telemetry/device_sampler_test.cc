#include "worker/telemetry/device_sampler.h"

#include <gtest/gtest.h>

#include <atomic>

namespace kvsweep {
namespace {

// Readings with the energies given, nothing wrong with them.
std::vector<DeviceReading> Readings(const std::vector<double>& energies_j) {
  std::vector<DeviceReading> readings;
  for (const double energy_j : energies_j) {
    readings.push_back({.energy_j = energy_j,
                        .power_w = 100 + energy_j,
                        .sm_clock_mhz = 1980 - energy_j,
                        .temperature_c = 40 + energy_j / 10,
                        .clock_reasons = 0,
                        .processes = 1});
  }
  return readings;
}

std::vector<double> Rising(int count) {
  std::vector<double> energies_j;
  for (int i = 0; i <= count; ++i) energies_j.push_back(10.0 * i);
  return energies_j;
}

TEST(Aggregate, TakesTheEnergyBetweenFirstAndLast) {
  const DeviceUse use = Aggregate(Readings(Rising(kEnergyUpdates)));
  EXPECT_EQ(use.energy_j, 10.0 * kEnergyUpdates);
  EXPECT_EQ(use.energy_updates, kEnergyUpdates);
  EXPECT_EQ(use.energy_doubts, 0u);
  EXPECT_EQ(use.power_w_max, 100 + 10.0 * kEnergyUpdates);
  EXPECT_EQ(use.power_w_mean, 100 + 5.0 * kEnergyUpdates);
  EXPECT_EQ(use.sm_clock_mhz_min, 1980 - 10.0 * kEnergyUpdates);
}

TEST(Aggregate, DoubtsTheEnergyOfATrialOfFewUpdates) {
  std::vector<double> energies_j = Rising(kEnergyUpdates - 1);
  energies_j.insert(energies_j.end(), 100, energies_j.back());  // read often, moved seldom
  const DeviceUse use = Aggregate(Readings(energies_j));
  EXPECT_EQ(use.energy_doubts, kEnergyTooFewUpdates);
  EXPECT_EQ(use.energy_j, 10.0 * (kEnergyUpdates - 1)) << "it is told, if not compared";
}

TEST(Aggregate, DoubtsTheEnergyOfASharedDevice) {
  std::vector<DeviceReading> readings = Readings(Rising(kEnergyUpdates));
  readings[3].processes = 2;
  EXPECT_EQ(Aggregate(readings).energy_doubts, kEnergyShared);
}

TEST(Aggregate, DoubtsTheEnergyWhereClocksWereHeldDown) {
  std::vector<DeviceReading> readings = Readings(Rising(99));
  for (int i = 0; i < 5; ++i) readings[static_cast<size_t>(i)].clock_reasons = 0x20;
  EXPECT_EQ(Aggregate(readings).energy_doubts, 0u) << "5 of 100";
  readings[5].clock_reasons = 0x4;
  const DeviceUse use = Aggregate(readings);
  EXPECT_EQ(use.energy_doubts, kEnergyThrottled);
  EXPECT_NEAR(use.clock_reason_shares.at("thermal"), 0.05, 1e-12);
  EXPECT_NEAR(use.clock_reason_shares.at("power_cap"), 0.01, 1e-12);
  EXPECT_EQ(use.clock_reason_shares.size(), 2u);
  EXPECT_EQ(use.throttled_share, 0.06);
  for (DeviceReading& reading : readings) reading.clock_reasons = 0x1;
  EXPECT_EQ(Aggregate(readings).energy_doubts, 0u) << "a device at rest is not held down";
}

TEST(Aggregate, ACounterThatWentBackIsNotRead) {
  const DeviceUse use = Aggregate(Readings({500, 0, 10}));
  EXPECT_EQ(use.energy_doubts, kEnergyNotRead);
  EXPECT_FALSE(use.energy_j.has_value());
}

TEST(DeviceSampler, ReadsFromBeginToEnd) {
  std::atomic<int> asked = 0;
  DeviceSampler sampler([&] { return DeviceReading{.energy_j = 1.0 * asked++}; },
                        /*period_ns=*/kNsPerMs);
  EXPECT_GE(asked, 1) << "the first reading is taken at once";
  while (asked < 10) RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + kNsPerMs);
  const DeviceUse use = sampler.End();
  const int all = asked;
  EXPECT_EQ(use.readings, all);
  EXPECT_EQ(use.energy_j, all - 1.0);
}

TEST(DeviceSampler, CanBeLeftWithoutAnEnd) {
  const DeviceSampler sampler([] { return DeviceReading(); }, kNsPerSecond);
}

}  // namespace
}  // namespace kvsweep
