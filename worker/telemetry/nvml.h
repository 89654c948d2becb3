// What a GPU says of itself: energy, power, clocks, temperature, what throttles it, memory, its
// link to the host. Through NVML, the management library that comes with NVIDIA's driver, loaded at
// run time: where it is not installed, this says so and nothing else changes.
#ifndef KVSWEEP_WORKER_TELEMETRY_NVML_H_
#define KVSWEEP_WORKER_TELEMETRY_NVML_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace kvsweep {

// What a device said at one instant. Absent: this device or driver does not tell.
struct DeviceReading {
  std::optional<double> energy_j;  // since the driver was loaded; its counter moves in small jumps
  std::optional<double> power_w;
  std::optional<double> sm_clock_mhz;
  std::optional<double> memory_clock_mhz;
  std::optional<double> temperature_c;
  std::optional<uint64_t> clock_reasons;    // why clocks are not higher: bits of ClockReasons
  std::optional<double> memory_used_bytes;  // by all processes, the driver's own share left out
  std::optional<int> processes;             // that compute on it and can be seen from here
  std::optional<int> link_generation;       // PCIe, now; a device at rest lowers it
  std::optional<int> link_width;            // lanes
};

// What does not change during a trial.
struct DeviceLimits {
  std::string driver;
  std::optional<double> power_limit_w;
  std::optional<double> sm_clock_mhz;  // the highest
  std::optional<double> memory_clock_mhz;
  std::optional<int> link_generation;  // the best that device and slot can do
  std::optional<int> link_width;
};

// What a bit of clock_reasons stands for.
struct ClockReason {
  uint64_t bit = 0;
  const char* name = "";   // "power_cap"
  bool throttles = false;  // heat, power or the board hold the clocks down: measured times are then
                           // not the device's best
};
std::span<const ClockReason> ClockReasons();

// One device. One thread at a time.
class Nvml {
 public:
  static constexpr char kLibrary[] = "libnvidia-ml.so.1";

  // The device at a PCI address ("00000000:1B:00.0"). NotFound, with the reason, when the library
  // is not installed, lacks what it must have, or knows no such device.
  static absl::StatusOr<std::unique_ptr<Nvml>> Open(const std::string& pci_address,
                                                    const std::string& library = kLibrary);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  DeviceLimits ReadLimits() const;
  DeviceReading Read() const;

 private:
  struct Functions;
  Nvml() = default;

  void* library_ = nullptr;
  void* device_ = nullptr;
  std::unique_ptr<Functions> functions_;
  bool initialised_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_NVML_H_
