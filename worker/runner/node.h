// The node that a runner runs on, as far as a trial's numbers depend on it: its GPU's readings
// while a trial runs, and what it was measured to carry. On the CPU backend there is neither.
#ifndef KVSWEEP_WORKER_RUNNER_NODE_H_
#define KVSWEEP_WORKER_RUNNER_NODE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "kernels/backend.h"
#include "worker/telemetry/nvml.h"
#include "worker/telemetry/preflight.h"

namespace kvsweep {

struct NodeOptions {
  std::string cache;  // folder where the preflight is kept between starts; empty: it is not
  // File that every runner of the host locks while it measures: preflights share the host's memory
  // and links, and would measure each other. The same whatever worker or cache it belongs to.
  std::string lock = "/tmp/kvsweep-preflight.lock";
  int64_t lock_patience_ns = 60 * kNsPerSecond;  // then it measures beside the others, and warns
  // A backend of its own for the preflight: what it takes goes back to the driver.
  std::function<absl::StatusOr<std::unique_ptr<Backend>>()> make_backend;
  std::function<absl::StatusOr<std::vector<double>>()> read_device;  // LimitsOptions
};

// One thread, but Nvml::Read, which is the sampler's while a trial is measured.
class Node {
 public:
  explicit Node(NodeOptions options) : options_(std::move(options)) {}

  // To be called at start and between trials, with the backend's description: opens NVML, and takes
  // the preflight from the cache or measures it (some seconds, one runner of the host at a time)
  // where there is none, or the last is kPreflightAgeNs old. What cannot be had is told by Facts.
  void Update(const BackendInfo& info);

  // nullptr: none.
  const Nvml* nvml() const { return nvml_.get(); }
  const Preflight* preflight() const { return preflight_ ? &*preflight_ : nullptr; }

  // For people: driver, limits of power and clocks, the link, the preflight. Empty on the CPU
  // backend.
  std::map<std::string, std::string> Facts() const;

 private:
  void OpenNvml(const BackendInfo& info);
  absl::StatusOr<Preflight> MeasurePreflight(const BackendInfo& info);

  const NodeOptions options_;
  bool opened_ = false;
  std::unique_ptr<Nvml> nvml_;
  std::map<std::string, std::string> device_facts_;
  std::optional<Preflight> preflight_;
  absl::Status preflight_status_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_NODE_H_
