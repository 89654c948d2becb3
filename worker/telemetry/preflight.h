// What a node was measured to carry, kept in a file so that it need not be measured at every start,
// and named by each trial that ran on it.
#ifndef KVSWEEP_WORKER_TELEMETRY_PREFLIGHT_H_
#define KVSWEEP_WORKER_TELEMETRY_PREFLIGHT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "kernels/limits.h"

namespace kvsweep {

// After so long a preflight is measured anew.
inline constexpr int64_t kPreflightAgeNs = 3600 * kNsPerSecond;

struct Preflight {
  std::string subject;  // what was measured, as PreflightSubject has it
  int64_t measured_unix_ns = 0;
  double element_bytes = 2;  // of a weight on the device
  std::vector<Limit> limits;

  // "20261129T031245Z-9f86d081": when, and the begin of a digest of the figures.
  std::string Name() const;
  DeviceProfile Profile() const;
  // For people: the name, and each limit as "limit: read" -> "4.61e+12 B/s, spread 0.3 %".
  std::map<std::string, std::string> Facts() const;

  bool IsFresh(int64_t unix_ns) const {
    return unix_ns >= measured_unix_ns && unix_ns - measured_unix_ns < kPreflightAgeNs;
  }
};

// Device, place, driver, the machine's name and the build of the programs: another one of them is
// another preflight.
std::string PreflightSubject(const BackendInfo& info, absl::string_view build);

// Lines of text, numbers to the last bit. InvalidArgument, naming the line, for anything else.
std::string PreflightText(const Preflight& preflight);
absl::StatusOr<Preflight> ParsePreflight(absl::string_view text);

// The file of a subject in the folder `cache`.
std::string PreflightPath(const std::string& cache, absl::string_view subject);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_PREFLIGHT_H_
