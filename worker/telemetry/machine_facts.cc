#include "worker/telemetry/machine_facts.h"

#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/file.h"

namespace kvsweep {
namespace {

constexpr int64_t kMostBytes = 16 << 20;

std::string ReadLine(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMostBytes);
  return text.ok() ? std::string(absl::StripAsciiWhitespace(*text)) : "";
}

// The kernel's files hold kHz.
std::optional<double> ReadGhz(const std::string& path) {
  double khz = 0;
  if (!absl::SimpleAtod(ReadLine(path), &khz)) return std::nullopt;
  return khz / 1e6;
}

// Mean of the "cpu MHz" lines, one for each core.
std::optional<double> MeanGhz(const std::string& root) {
  const absl::StatusOr<std::string> text =
      ReadFile(absl::StrCat(root, "/proc/cpuinfo"), kMostBytes);
  if (!text.ok()) return std::nullopt;
  double sum = 0;
  int cores = 0;
  for (absl::string_view line : absl::StrSplit(*text, '\n')) {
    if (!absl::ConsumePrefix(&line, "cpu MHz")) continue;
    line = absl::StripLeadingAsciiWhitespace(line);
    double mhz = 0;
    if (!absl::ConsumePrefix(&line, ":") || !absl::SimpleAtod(line, &mhz)) continue;
    sum += mhz;
    ++cores;
  }
  return cores == 0 ? std::nullopt : std::optional<double>(sum / cores / 1e3);
}

}  // namespace

std::string HostClockText(const std::string& root) {
  const std::string folder = absl::StrCat(root, "/sys/devices/system/cpu/cpu0/cpufreq/");
  std::optional<double> now = MeanGhz(root);
  if (!now) now = ReadGhz(folder + "scaling_cur_freq");
  if (!now) return "the kernel does not tell";
  std::string text = absl::StrFormat("%.2f GHz", *now);
  const std::optional<double> least = ReadGhz(folder + "scaling_min_freq");
  const std::optional<double> most = ReadGhz(folder + "scaling_max_freq");
  if (least && most) absl::StrAppendFormat(&text, " (%.2f to %.2f)", *least, *most);
  const std::string governor = ReadLine(folder + "scaling_governor");
  if (!governor.empty()) absl::StrAppend(&text, ", governor ", governor);
  return text;
}

}  // namespace kvsweep
