#include "worker/telemetry/device_sampler.h"

#include <algorithm>

namespace kvsweep {
namespace {

template <typename Value>
void Raise(const std::optional<Value>& value, std::optional<Value>* most) {
  if (value && (!*most || *value > **most)) *most = value;
}

template <typename Value>
void Lower(const std::optional<Value>& value, std::optional<Value>* least) {
  if (value && (!*least || *value < **least)) *least = value;
}

std::optional<double> MeanOf(const std::vector<DeviceReading>& readings,
                             std::optional<double> DeviceReading::*field) {
  double sum = 0;
  int count = 0;
  for (const DeviceReading& reading : readings) {
    if (!(reading.*field)) continue;
    sum += *(reading.*field);
    ++count;
  }
  return count == 0 ? std::nullopt : std::optional<double>(sum / count);
}

}  // namespace

DeviceUse Aggregate(const std::vector<DeviceReading>& readings) {
  DeviceUse use;
  use.readings = static_cast<int>(readings.size());
  if (readings.empty()) return use;
  use.power_w_mean = MeanOf(readings, &DeviceReading::power_w);
  use.sm_clock_mhz_mean = MeanOf(readings, &DeviceReading::sm_clock_mhz);
  int throttled = 0;
  std::optional<double> energy_j;
  for (const DeviceReading& reading : readings) {
    Raise(reading.power_w, &use.power_w_max);
    Lower(reading.sm_clock_mhz, &use.sm_clock_mhz_min);
    Lower(reading.memory_clock_mhz, &use.memory_clock_mhz_min);
    Raise(reading.temperature_c, &use.temperature_c_max);
    Raise(reading.memory_used_bytes, &use.memory_used_bytes_max);
    Raise(reading.processes, &use.processes_max);
    Raise(reading.link_generation, &use.link_generation_max);
    Raise(reading.link_width, &use.link_width_max);
    bool throttles = false;
    for (const ClockReason& reason : ClockReasons()) {
      if ((reading.clock_reasons.value_or(0) & reason.bit) == 0) continue;
      use.clock_reason_shares[reason.name] += 1.0 / use.readings;
      throttles |= reason.throttles;
    }
    throttled += throttles;
    use.energy_updates += energy_j && reading.energy_j && *reading.energy_j != *energy_j;
    if (reading.energy_j) energy_j = reading.energy_j;
  }
  use.throttled_share = static_cast<double>(throttled) / use.readings;
  const std::optional<double>& first_j = readings.front().energy_j;
  const std::optional<double>& last_j = readings.back().energy_j;
  if (!first_j || !last_j || *last_j < *first_j) return use;
  use.energy_j = *last_j - *first_j;
  use.energy_doubts = 0;
  if (use.energy_updates < kEnergyUpdates) use.energy_doubts |= kEnergyTooFewUpdates;
  if (use.processes_max.value_or(0) > 1) use.energy_doubts |= kEnergyShared;
  if (use.throttled_share > kThrottledShare) use.energy_doubts |= kEnergyThrottled;
  return use;
}

DeviceSampler::DeviceSampler(std::function<DeviceReading()> read, int64_t period_ns)
    : read_(std::move(read)), period_ns_(period_ns) {
  readings_.reserve(kMostReadings);
  readings_.push_back(read_());
  thread_ = std::thread([this] { Run(); });
}

DeviceSampler::~DeviceSampler() { Stop(); }

DeviceUse DeviceSampler::End() {
  Stop();
  readings_.push_back(read_());
  return Aggregate(readings_);
}

void DeviceSampler::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    stop_changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void DeviceSampler::Run() {
  RealClock& clock = RealClock::Get();
  int64_t next_ns = clock.NowNs() + period_ns_;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    while (!stop_ && clock.NowNs() < next_ns) clock.WaitUntilNs(stop_changed_, lock, next_ns);
    if (stop_) return;
    lock.unlock();
    readings_.push_back(read_());
    if (readings_.size() + 1 >= kMostReadings) {
      // The first stays: it is where the energy starts.
      for (size_t i = 0; 2 * i < readings_.size(); ++i) readings_[i] = readings_[2 * i];
      readings_.resize((readings_.size() + 1) / 2);
      period_ns_ *= 2;
    }
    next_ns = std::max(next_ns + period_ns_, clock.NowNs());
    lock.lock();
  }
}

}  // namespace kvsweep
