#include "worker/telemetry/preflight.h"

#include <unistd.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "base/digest.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr absl::string_view kHeading = "kvsweep preflight 1";
constexpr size_t kDigestLetters = 8;

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

std::string ShortDigest(absl::string_view text) {
  return Sha256(text).Hex().substr(0, kDigestLetters);
}

}  // namespace

std::string Preflight::Name() const {
  return absl::StrCat(absl::FormatTime("%Y%m%dT%H%M%SZ", absl::FromUnixNanos(measured_unix_ns),
                                       absl::UTCTimeZone()),
                      "-", ShortDigest(PreflightText(*this)));
}

DeviceProfile Preflight::Profile() const { return ProfileOf(subject, element_bytes, limits); }

std::map<std::string, std::string> Preflight::Facts() const {
  std::map<std::string, std::string> facts;
  facts["preflight"] = Name();
  for (const Limit& limit : limits) {
    facts[absl::StrCat("limit: ", limit.name)] =
        absl::StrFormat("%.4g %s, spread %.1f %%", limit.value, limit.unit, 100 * limit.spread);
  }
  return facts;
}

std::string PreflightSubject(const BackendInfo& info, absl::string_view build) {
  return absl::StrCat(info.device_class, "; ", info.pci_address, "; ", info.driver, "; ",
                      HostName(), "; ", build);
}

std::string PreflightText(const Preflight& preflight) {
  std::string text =
      absl::StrCat(kHeading, "\n", preflight.subject, "\n", preflight.measured_unix_ns, "\t");
  absl::StrAppendFormat(&text, "%.17g\n", preflight.element_bytes);
  for (const Limit& limit : preflight.limits) {
    absl::StrAppendFormat(&text, "%s\t%.17g\t%s\t%.17g\n", limit.name, limit.value, limit.unit,
                          limit.spread);
  }
  return text;
}

absl::StatusOr<Preflight> ParsePreflight(absl::string_view text) {
  const std::vector<absl::string_view> lines = absl::StrSplit(text, '\n', absl::SkipEmpty());
  const auto broken = [](size_t line) {
    return absl::InvalidArgumentError(
        absl::StrCat("line ", line + 1, " is no part of a preflight"));
  };
  if (lines.size() < 3 || lines[0] != kHeading) return broken(0);
  Preflight preflight;
  preflight.subject = std::string(lines[1]);
  const std::vector<absl::string_view> head = absl::StrSplit(lines[2], '\t');
  if (head.size() != 2 || !absl::SimpleAtoi(head[0], &preflight.measured_unix_ns) ||
      !absl::SimpleAtod(head[1], &preflight.element_bytes)) {
    return broken(2);
  }
  for (size_t i = 3; i < lines.size(); ++i) {
    const std::vector<absl::string_view> parts = absl::StrSplit(lines[i], '\t');
    Limit limit;
    if (parts.size() != 4 || !absl::SimpleAtod(parts[1], &limit.value) ||
        !absl::SimpleAtod(parts[3], &limit.spread)) {
      return broken(i);
    }
    limit.name = std::string(parts[0]);
    limit.unit = std::string(parts[2]);
    preflight.limits.push_back(std::move(limit));
  }
  return preflight;
}

std::string PreflightPath(const std::string& cache, absl::string_view subject) {
  return absl::StrCat(cache, "/preflight-", ShortDigest(subject), ".txt");
}

}  // namespace kvsweep
