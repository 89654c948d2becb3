// What a device did during a trial: NVML asked a few times a second by a thread of its own, so that
// neither the engine's thread nor its steps know of it.
#ifndef KVSWEEP_WORKER_TELEMETRY_DEVICE_SAMPLER_H_
#define KVSWEEP_WORKER_TELEMETRY_DEVICE_SAMPLER_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "worker/telemetry/nvml.h"

namespace kvsweep {

// Why the energy of a trial is no figure to compare by; bits.
enum EnergyDoubt : uint32_t {
  kEnergyNotRead = 1,        // no GPU, no NVML, or the device has no such counter
  kEnergyTooFewUpdates = 2,  // the counter moved too rarely for its jumps not to matter
  kEnergyShared = 4,         // other processes computed on the device
  kEnergyThrottled = 8,      // heat, power or the board held the clocks down
};

// Jumps of the energy counter that make a difference of two readings a figure: with n of them it is
// off by at most one part in n.
inline constexpr int kEnergyUpdates = 20;
// Of the readings, so many may find the clocks held down.
inline constexpr double kThrottledShare = 0.05;

// A trial's readings put together. Absent: never read.
struct DeviceUse {
  int readings = 0;
  std::optional<double> energy_j;
  uint32_t energy_doubts = kEnergyNotRead;
  int energy_updates = 0;
  std::optional<double> power_w_mean;
  std::optional<double> power_w_max;
  std::optional<double> sm_clock_mhz_mean;
  std::optional<double> sm_clock_mhz_min;
  std::optional<double> memory_clock_mhz_min;
  std::optional<double> temperature_c_max;
  std::optional<double> memory_used_bytes_max;
  std::optional<int> processes_max;
  std::optional<int> link_generation_max;
  std::optional<int> link_width_max;
  // Of the readings, those with each reason of ClockReasons that was seen, and those with one that
  // throttles.
  std::map<std::string, double> clock_reason_shares;
  double throttled_share = 0.0;
};

// REQUIRES: the readings stand in the order in which they were taken.
DeviceUse Aggregate(const std::vector<DeviceReading>& readings);

class DeviceSampler {
 public:
  static constexpr int64_t kPeriodNs = 100 * kNsPerMs;

  // Takes the first reading before it returns. `read` is called by one thread at a time, the
  // sampler's own in between.
  explicit DeviceSampler(std::function<DeviceReading()> read, int64_t period_ns = kPeriodNs);
  ~DeviceSampler();
  DeviceSampler(const DeviceSampler&) = delete;
  DeviceSampler& operator=(const DeviceSampler&) = delete;

  // Takes the last reading. To be called once.
  DeviceUse End();

 private:
  // Beyond so many, every other reading is dropped and the period doubles.
  static constexpr size_t kMostReadings = 4096;

  void Run();
  void Stop();

  const std::function<DeviceReading()> read_;
  int64_t period_ns_;
  std::vector<DeviceReading> readings_;  // of the thread while it runs
  std::mutex mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_DEVICE_SAMPLER_H_
