#include "worker/telemetry/nvml.h"

#include <dlfcn.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvsweep {
namespace {

// The part of NVML's interface that is used here, declared after NVIDIA's reference manual: names,
// arguments and values are fixed by the versioned symbols.
using Result = int;  // 0: success
constexpr Result kSuccess = 0;
constexpr Result kInsufficientSize = 7;
constexpr unsigned kSmClock = 1;
constexpr unsigned kMemoryClock = 2;
constexpr unsigned kDieSensor = 0;
constexpr size_t kTextBytes = 96;

struct Memory {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
constexpr unsigned kMemoryV2 = sizeof(MemoryV2) | (2u << 24);
struct Process {
  unsigned pid;
  unsigned long long used_memory;
  unsigned gpu_instance, compute_instance;
};
struct Temperature {
  unsigned version;
  unsigned sensor;
  int degrees;
};
constexpr unsigned kTemperatureV1 = sizeof(Temperature) | (1u << 24);

template <typename Function>
void Find(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
}

// The value of a call that writes one number, scaled.
template <typename Number>
std::optional<double> Ask(Result (*function)(void*, Number*), void* device, double scale) {
  Number value = 0;
  if (function == nullptr || function(device, &value) != kSuccess) return std::nullopt;
  return scale * static_cast<double>(value);
}

// The same of a call that is told which of several.
std::optional<double> AskOf(Result (*function)(void*, unsigned, unsigned*), void* device,
                            unsigned which) {
  unsigned value = 0;
  if (function == nullptr || function(device, which, &value) != kSuccess) return std::nullopt;
  return value;
}

std::optional<int> AskCount(Result (*function)(void*, unsigned*), void* device) {
  const std::optional<double> value = Ask(function, device, 1);
  return value ? std::optional<int>(static_cast<int>(*value)) : std::nullopt;
}

}  // namespace

// Those of later drivers stand first; where they are missing, the older ones are asked.
struct Nvml::Functions {
  Result (*init)() = nullptr;
  Result (*shutdown)() = nullptr;
  const char* (*error_string)(Result) = nullptr;
  Result (*driver_version)(char*, unsigned) = nullptr;
  Result (*find_device)(const char*, void**) = nullptr;
  Result (*energy)(void*, unsigned long long*) = nullptr;
  Result (*power)(void*, unsigned*) = nullptr;
  Result (*power_limit)(void*, unsigned*) = nullptr;
  Result (*clock)(void*, unsigned, unsigned*) = nullptr;
  Result (*max_clock)(void*, unsigned, unsigned*) = nullptr;
  Result (*temperature_v)(void*, Temperature*) = nullptr;
  Result (*temperature)(void*, unsigned, unsigned*) = nullptr;
  Result (*clock_event_reasons)(void*, unsigned long long*) = nullptr;
  Result (*clock_throttle_reasons)(void*, unsigned long long*) = nullptr;
  Result (*memory_v2)(void*, MemoryV2*) = nullptr;
  Result (*memory)(void*, Memory*) = nullptr;
  Result (*processes)(void*, unsigned*, Process*) = nullptr;
  Result (*link_generation)(void*, unsigned*) = nullptr;
  Result (*link_width)(void*, unsigned*) = nullptr;
  Result (*max_link_generation)(void*, unsigned*) = nullptr;
  Result (*max_link_width)(void*, unsigned*) = nullptr;

  explicit Functions(void* library) {
    Find(library, "nvmlInit_v2", &init);
    Find(library, "nvmlShutdown", &shutdown);
    Find(library, "nvmlErrorString", &error_string);
    Find(library, "nvmlSystemGetDriverVersion", &driver_version);
    Find(library, "nvmlDeviceGetHandleByPciBusId_v2", &find_device);
    Find(library, "nvmlDeviceGetTotalEnergyConsumption", &energy);
    Find(library, "nvmlDeviceGetPowerUsage", &power);
    Find(library, "nvmlDeviceGetEnforcedPowerLimit", &power_limit);
    Find(library, "nvmlDeviceGetClockInfo", &clock);
    Find(library, "nvmlDeviceGetMaxClockInfo", &max_clock);
    Find(library, "nvmlDeviceGetTemperatureV", &temperature_v);
    Find(library, "nvmlDeviceGetTemperature", &temperature);
    Find(library, "nvmlDeviceGetCurrentClocksEventReasons", &clock_event_reasons);
    Find(library, "nvmlDeviceGetCurrentClocksThrottleReasons", &clock_throttle_reasons);
    Find(library, "nvmlDeviceGetMemoryInfo_v2", &memory_v2);
    Find(library, "nvmlDeviceGetMemoryInfo", &memory);
    Find(library, "nvmlDeviceGetComputeRunningProcesses_v3", &processes);
    Find(library, "nvmlDeviceGetCurrPcieLinkGeneration", &link_generation);
    Find(library, "nvmlDeviceGetCurrPcieLinkWidth", &link_width);
    Find(library, "nvmlDeviceGetMaxPcieLinkGeneration", &max_link_generation);
    Find(library, "nvmlDeviceGetMaxPcieLinkWidth", &max_link_width);
  }

  std::string ErrorText(Result result) const {
    return error_string == nullptr ? absl::StrCat("NVML error ", result) : error_string(result);
  }
};

std::span<const ClockReason> ClockReasons() {
  static constexpr ClockReason kReasons[] = {{0x1, "idle"},
                                             {0x2, "application_clocks"},
                                             {0x4, "power_cap", true},
                                             {0x8, "board", true},
                                             {0x10, "sync_boost"},
                                             {0x20, "thermal", true},
                                             {0x40, "board_thermal", true},
                                             {0x80, "power_brake", true},
                                             {0x100, "display_clocks"}};
  return kReasons;
}

absl::StatusOr<std::unique_ptr<Nvml>> Nvml::Open(const std::string& pci_address,
                                                 const std::string& library) {
  std::unique_ptr<Nvml> nvml(new Nvml());
  nvml->library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (nvml->library_ == nullptr) {
    return absl::NotFoundError(absl::StrCat(library, " is not installed"));
  }
  nvml->functions_ = std::make_unique<Functions>(nvml->library_);
  const Functions& functions = *nvml->functions_;
  if (functions.init == nullptr || functions.shutdown == nullptr ||
      functions.find_device == nullptr) {
    return absl::NotFoundError(absl::StrCat(library, " is no NVML of version 2 or later"));
  }
  Result result = functions.init();
  if (result != kSuccess) {
    return absl::NotFoundError(absl::StrCat(library, ": ", functions.ErrorText(result)));
  }
  nvml->initialised_ = true;
  result = functions.find_device(pci_address.c_str(), &nvml->device_);
  if (result != kSuccess) {
    return absl::NotFoundError(
        absl::StrCat(library, ": device ", pci_address, ": ", functions.ErrorText(result)));
  }
  return nvml;
}

Nvml::~Nvml() {
  if (initialised_) functions_->shutdown();
  if (library_ != nullptr) dlclose(library_);
}

DeviceLimits Nvml::ReadLimits() const {
  const Functions& ask = *functions_;
  DeviceLimits limits;
  char text[kTextBytes] = {};
  if (ask.driver_version != nullptr && ask.driver_version(text, kTextBytes) == kSuccess) {
    limits.driver = text;
  }
  limits.power_limit_w = Ask(ask.power_limit, device_, 1e-3);
  limits.sm_clock_mhz = AskOf(ask.max_clock, device_, kSmClock);
  limits.memory_clock_mhz = AskOf(ask.max_clock, device_, kMemoryClock);
  limits.link_generation = AskCount(ask.max_link_generation, device_);
  limits.link_width = AskCount(ask.max_link_width, device_);
  return limits;
}

DeviceReading Nvml::Read() const {
  const Functions& ask = *functions_;
  DeviceReading reading;
  reading.energy_j = Ask(ask.energy, device_, 1e-3);
  reading.power_w = Ask(ask.power, device_, 1e-3);
  reading.sm_clock_mhz = AskOf(ask.clock, device_, kSmClock);
  reading.memory_clock_mhz = AskOf(ask.clock, device_, kMemoryClock);
  Temperature temperature = {.version = kTemperatureV1, .sensor = kDieSensor, .degrees = 0};
  if (ask.temperature_v != nullptr && ask.temperature_v(device_, &temperature) == kSuccess) {
    reading.temperature_c = temperature.degrees;
  } else {
    reading.temperature_c = AskOf(ask.temperature, device_, kDieSensor);
  }
  unsigned long long reasons = 0;
  if (ask.clock_event_reasons != nullptr &&
      ask.clock_event_reasons(device_, &reasons) == kSuccess) {
    reading.clock_reasons = reasons;
  } else if (ask.clock_throttle_reasons != nullptr &&
             ask.clock_throttle_reasons(device_, &reasons) == kSuccess) {
    reading.clock_reasons = reasons;
  }
  MemoryV2 memory_v2 = {.version = kMemoryV2};
  Memory memory = {};
  if (ask.memory_v2 != nullptr && ask.memory_v2(device_, &memory_v2) == kSuccess) {
    reading.memory_used_bytes = static_cast<double>(memory_v2.used);
  } else if (ask.memory != nullptr && ask.memory(device_, &memory) == kSuccess) {
    reading.memory_used_bytes = static_cast<double>(memory.used);
  }
  unsigned processes = 0;
  if (ask.processes != nullptr) {
    const Result result = ask.processes(device_, &processes, nullptr);
    if (result == kSuccess || result == kInsufficientSize) {
      reading.processes = static_cast<int>(processes);
    }
  }
  reading.link_generation = AskCount(ask.link_generation, device_);
  reading.link_width = AskCount(ask.link_width, device_);
  return reading;
}

}  // namespace kvsweep
