#include "worker/runner/node.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "base/version.h"

namespace kvsweep {
namespace {

constexpr int64_t kPreflightBytes = 64 << 10;

// The preflight of `subject` in the cache, if it is fresh.
std::optional<Preflight> FindPreflight(const std::string& path, const std::string& subject) {
  const absl::StatusOr<std::string> text = ReadFile(path, kPreflightBytes);
  if (!text.ok()) return std::nullopt;
  absl::StatusOr<Preflight> found = ParsePreflight(*text);
  if (!found.ok()) {
    LogWarning(path, ": ", found.status().message(), "; it is measured anew");
    return std::nullopt;
  }
  const bool fits = found->subject == subject && found->IsFresh(RealClock::Get().UnixNs());
  return fits ? std::optional<Preflight>(*std::move(found)) : std::nullopt;
}

void KeepPreflight(const std::string& cache, const std::string& path, const Preflight& preflight) {
  std::error_code error;
  std::filesystem::create_directories(cache, error);
  const absl::Status status = WriteFileAtomic(path, PreflightText(preflight));
  if (!status.ok()) LogWarning("the preflight is not kept: ", status.message());
}

// The right to measure, for as long as it lives: a lock of the host that goes with its process.
class PreflightTurn {
 public:
  // Waits for whoever measures. Without a lock at the end of `patience_ns`, or where the file
  // cannot be had, the turn may be taken all the same: a disturbed preflight is better than none.
  PreflightTurn(const std::string& path, int64_t patience_ns) {
    // Another user's file in a shared folder may be opened, but not with O_CREAT.
    descriptor_ = open(path.c_str(), kHow);
    if (descriptor_ < 0) {
      descriptor_ = open(path.c_str(), kHow | O_CREAT | O_EXCL, 0644);
      if (descriptor_ >= 0) {
        fchmod(descriptor_, 0644);  // for other users, whatever the umask
      } else {
        descriptor_ = open(path.c_str(), kHow);  // another runner was first
      }
    }
    if (descriptor_ < 0) {
      LogWarning("preflight: ", path, " cannot be opened: ", std::strerror(errno),
                 "; another runner may measure at the same time");
      return;
    }
    Clock& clock = RealClock::Get();
    const int64_t until_ns = clock.NowNs() + patience_ns;
    while (!(held_ = flock(descriptor_, LOCK_EX | LOCK_NB) == 0)) {
      if (clock.NowNs() >= until_ns) {
        if (patience_ns == 0) return;
        LogWarning("preflight: ", path, " was held by another runner for ",
                   FormatDurationNs(patience_ns), "; measuring beside it");
        return;
      }
      clock.SleepUntilNs(clock.NowNs() + kLookNs);
    }
  }
  PreflightTurn(const PreflightTurn&) = delete;
  PreflightTurn& operator=(const PreflightTurn&) = delete;
  ~PreflightTurn() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  bool held() const { return held_; }

 private:
  // What else may lie at a path that anybody can write must neither be followed nor hold us up.
  static constexpr int kHow = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  static constexpr int64_t kLookNs = 50 * kNsPerMs;

  int descriptor_;
  bool held_ = false;
};

}  // namespace

void Node::Update(const BackendInfo& info) {
  if (info.pci_address.empty()) return;
  if (!std::exchange(opened_, true)) OpenNvml(info);
  const bool is_old = preflight_.has_value();
  if (is_old && preflight_->IsFresh(RealClock::Get().UnixNs())) return;
  const std::string subject = PreflightSubject(info, GetBuildInfo().runner_digest);
  const std::string path = PreflightPath(options_.cache, subject);
  const auto take_kept = [&] {
    std::optional<Preflight> kept;
    if (!options_.cache.empty()) kept = FindPreflight(path, subject);
    if (kept) preflight_ = *std::move(kept);
    return kept.has_value();
  };
  if (take_kept()) return;
  // A trial waits behind this, and may be cancelled: an old preflight does until the next one.
  const PreflightTurn turn(options_.lock, is_old ? 0 : options_.lock_patience_ns);
  if (is_old && !turn.held()) return;
  // Whoever measured meanwhile may have measured this device.
  if (take_kept()) return;
  absl::StatusOr<Preflight> measured = MeasurePreflight(info);
  preflight_status_ = measured.status();
  if (!measured.ok()) {
    LogWarning("preflight: ", measured.status().message());
    return;
  }
  preflight_ = *std::move(measured);
  if (!options_.cache.empty()) KeepPreflight(options_.cache, path, *preflight_);
}

void Node::OpenNvml(const BackendInfo& info) {
  absl::StatusOr<std::unique_ptr<Nvml>> nvml = Nvml::Open(info.pci_address);
  if (!nvml.ok()) {
    device_facts_["nvml"] = absl::StrCat("none: ", nvml.status().message());
    return;
  }
  nvml_ = *std::move(nvml);
  const DeviceLimits limits = nvml_->ReadLimits();
  const DeviceReading now = nvml_->Read();
  const auto add = [this](const char* name, const std::optional<double>& value, const char* unit) {
    if (value) device_facts_[name] = absl::StrFormat("%g %s", *value, unit);
  };
  device_facts_["nvml"] = absl::StrCat("driver ", limits.driver);
  add("power_limit", limits.power_limit_w, "W");
  add("sm_clock_limit", limits.sm_clock_mhz, "MHz");
  add("memory_clock_limit", limits.memory_clock_mhz, "MHz");
  if (now.link_generation && now.link_width) {
    device_facts_["pcie"] =
        absl::StrCat("generation ", *now.link_generation, " x", *now.link_width, ", at most ",
                     limits.link_generation.value_or(*now.link_generation), " x",
                     limits.link_width.value_or(*now.link_width));
  }
}

absl::StatusOr<Preflight> Node::MeasurePreflight(const BackendInfo& info) {
  LogInfo("preflight: measuring what this node can carry");
  ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, options_.make_backend());
  const int64_t begun_ns = RealClock::Get().NowNs();
  ASSIGN_OR_RETURN(
      MachineLimits limits,
      MeasureLimits(*backend, {.all = true, .brief = true, .read_device = options_.read_device}));
  const double seconds = static_cast<double>(RealClock::Get().NowNs() - begun_ns) / kNsPerSecond;
  LogInfo("preflight: done in ", absl::StrFormat("%.1f", seconds), " s");
  return Preflight{.subject = PreflightSubject(info, GetBuildInfo().runner_digest),
                   .measured_unix_ns = RealClock::Get().UnixNs(),
                   .element_bytes = limits.profile.element_bytes,
                   .limits = std::move(limits.rows)};
}

std::map<std::string, std::string> Node::Facts() const {
  std::map<std::string, std::string> facts = device_facts_;
  if (preflight_) {
    facts.merge(preflight_->Facts());
  } else if (!preflight_status_.ok()) {
    facts["preflight"] = absl::StrCat("none: ", preflight_status_.message());
  }
  return facts;
}

}  // namespace kvsweep
