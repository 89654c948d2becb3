// A library with the names of NVML that answers from a table. The last digit of a device's address
// chooses what it can do:
//   0  everything, by the newer calls
//   1  what old boards can: no energy counter, no newer calls
//   2  everything, but other processes compute on it
// Another address is no device.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0;
constexpr int kNotSupported = 3;
constexpr int kNotFound = 6;
constexpr int kInsufficientSize = 7;

struct Device {
  bool is_old = false;
  unsigned processes = 1;
  unsigned long long energy_mj = 1'000'000;
};
Device devices[3] = {{}, {.is_old = true}, {.processes = 3}};

Device& Of(void* device) { return *static_cast<Device*>(device); }

int OnNewer(void* device) { return Of(device).is_old ? kNotSupported : kSuccess; }

}  // namespace

extern "C" {

int nvmlInit_v2() { return kSuccess; }
int nvmlShutdown() { return kSuccess; }
const char* nvmlErrorString(int result) { return result == kNotFound ? "Not Found" : "Failed"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  std::strncpy(text, "999.1", size);
  return kSuccess;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* address, void** device) {
  const size_t length = std::strlen(address);
  const int last = length == 0 ? -1 : address[length - 1] - '0';
  if (last < 0 || last > 2) return kNotFound;
  *device = &devices[last];
  return kSuccess;
}
// Moves by 5 J each time it is asked.
int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* millijoules) {
  *millijoules = Of(device).energy_mj += 5000;
  return OnNewer(device);
}
int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) {
  *milliwatts = 412'500;
  return kSuccess;
}
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) {
  *milliwatts = 700'000;
  return kSuccess;
}
int nvmlDeviceGetClockInfo(void*, unsigned which, unsigned* mhz) {
  *mhz = which == 1 ? 1755 : 2619;
  return kSuccess;
}
int nvmlDeviceGetMaxClockInfo(void*, unsigned which, unsigned* mhz) {
  *mhz = which == 1 ? 1980 : 3201;
  return kSuccess;
}
int nvmlDeviceGetTemperatureV(void* device, void* temperature) {
  struct Temperature {
    unsigned version, sensor;
    int degrees;
  };
  static_cast<Temperature*>(temperature)->degrees = 61;
  return OnNewer(device);
}
int nvmlDeviceGetTemperature(void*, unsigned, unsigned* degrees) {
  *degrees = 44;
  return kSuccess;
}
int nvmlDeviceGetCurrentClocksEventReasons(void* device, unsigned long long* reasons) {
  *reasons = 0x4;
  return OnNewer(device);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) {
  *reasons = 0x1;
  return kSuccess;
}
int nvmlDeviceGetMemoryInfo_v2(void* device, void* memory) {
  struct Memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
  };
  *static_cast<Memory*>(memory) = {0, 150ull << 30, 1ull << 30, 100ull << 30, 49ull << 30};
  return OnNewer(device);
}
int nvmlDeviceGetMemoryInfo(void*, void* memory) {
  struct Memory {
    unsigned long long total, free, used;
  };
  *static_cast<Memory*>(memory) = {16ull << 30, 9ull << 30, 7ull << 30};
  return kSuccess;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, void*) {
  const bool fits = *count >= Of(device).processes;
  *count = Of(device).processes;
  return fits ? kSuccess : kInsufficientSize;
}
int nvmlDeviceGetCurrPcieLinkGeneration(void*, unsigned* value) {
  *value = 5;
  return kSuccess;
}
int nvmlDeviceGetCurrPcieLinkWidth(void*, unsigned* value) {
  *value = 16;
  return kSuccess;
}
int nvmlDeviceGetMaxPcieLinkGeneration(void*, unsigned* value) {
  *value = 6;
  return kSuccess;
}
int nvmlDeviceGetMaxPcieLinkWidth(void*, unsigned* value) {
  *value = 16;
  return kSuccess;
}

}  // extern "C"
