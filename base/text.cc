#include "base/text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/clock.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

struct Unit {
  absl::string_view name;
  double factor;
};

constexpr Unit kByteUnits[] = {
    {"", 1},
    {"B", 1},
    {"kB", 1e3},
    {"KB", 1e3},
    {"MB", 1e6},
    {"GB", 1e9},
    {"TB", 1e12},
    {"KiB", 1024.0},
    {"MiB", 1048576.0},
    {"GiB", 1073741824.0},
    {"TiB", 1099511627776.0},
};
constexpr Unit kDurationUnits[] = {
    {"ns", 1},   {"us", 1e3},   {"ms", 1e6},   {"s", 1e9},
    {"m", 60e9}, {"min", 60e9}, {"h", 3600e9}, {"d", 86400e9},
};
constexpr Unit kRateUnits[] = {{"/s", 1}, {"/min", 1.0 / 60}, {"/h", 1.0 / 3600}};

struct Quantity {
  double number;
  absl::string_view unit;
};

absl::Status BadQuantity(absl::string_view text, absl::string_view what,
                         absl::string_view example) {
  return absl::InvalidArgumentError(
      absl::StrCat("\"", text.substr(0, 80), "\" is not ", what, "; write for example ", example));
}

// The number in front and what follows it. Nullopt: no finite number there, or one below zero.
std::optional<Quantity> SplitQuantity(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  if (text.empty() || !(absl::ascii_isdigit(text[0]) || text[0] == '.')) return std::nullopt;
  double number;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || !std::isfinite(number)) return std::nullopt;
  absl::string_view unit = text.substr(static_cast<size_t>(end - text.data()));
  absl::ConsumePrefix(&unit, " ");
  return Quantity{number, unit};
}

// number * factor of the unit, or nullopt if there is no such number or unit. 0 needs no unit.
std::optional<double> ParseQuantity(absl::string_view text, std::span<const Unit> units) {
  const std::optional<Quantity> quantity = SplitQuantity(text);
  if (!quantity) return std::nullopt;
  for (const Unit& unit : units) {
    // Division by an exact reciprocal keeps "90/min" at 1.5.
    if (unit.name == quantity->unit) {
      return unit.factor < 1 ? quantity->number / std::round(1 / unit.factor)
                             : quantity->number * unit.factor;
    }
  }
  if (quantity->unit.empty() && quantity->number == 0) return 0.0;
  return std::nullopt;
}

bool FitsInt64(double value) { return value < 9223372036854775808.0; }

// Three significant digits without trailing zeros.
std::string ThreeDigits(double value) {
  return value >= 1000 ? absl::StrFormat("%.0f", value) : absl::StrFormat("%.3g", value);
}

// "2 h 30 min"; the second part only when it is not zero.
std::string TwoParts(int64_t count, int64_t per_major, absl::string_view major,
                     absl::string_view minor) {
  std::string text = absl::StrCat(count / per_major, " ", major);
  if (count % per_major != 0) absl::StrAppend(&text, " ", count % per_major, " ", minor);
  return text;
}

}  // namespace

size_t EditDistance(absl::string_view a, absl::string_view b) {
  // Rows of the usual table: two back (for swaps), one back, current.
  std::vector<size_t> before(b.size() + 1), previous(b.size() + 1), current(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) previous[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    current[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = previous[j - 1] + (a[i - 1] != b[j - 1]);
      current[j] = std::min({previous[j] + 1, current[j - 1] + 1, replaced});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        current[j] = std::min(current[j], before[j - 2] + 1);
      }
    }
    std::swap(before, previous);
    std::swap(previous, current);
  }
  return previous[b.size()];
}

std::optional<std::string> NearestName(absl::string_view name,
                                       std::span<const std::string> candidates) {
  const std::string wanted = absl::AsciiStrToLower(name);
  size_t best = std::max<size_t>(1, name.size() / 3) + 1;
  std::optional<std::string> nearest;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(wanted, absl::AsciiStrToLower(candidate));
    if (distance < best) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

absl::StatusOr<int64_t> ParseBytes(absl::string_view text) {
  constexpr absl::string_view kExample = "512, 640KiB, 12MiB or 1.5GiB";
  // Whole numbers without unit or fraction take no detour over double, which holds only 53 bits.
  int64_t whole;
  const absl::string_view digits = absl::StripAsciiWhitespace(text);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), whole);
  if (error == std::errc() && end == digits.data() + digits.size() && whole >= 0) return whole;

  const std::optional<double> bytes = ParseQuantity(text, kByteUnits);
  if (!bytes || !FitsInt64(*bytes)) return BadQuantity(text, "a size in bytes", kExample);
  // "2.3GB" is whole although 2.3 is no binary fraction: allow what rounding can have moved.
  const double rounded = std::round(*bytes);
  if (std::abs(*bytes - rounded) > *bytes * 1e-15) {
    return BadQuantity(text, "a whole number of bytes", kExample);
  }
  return static_cast<int64_t>(rounded);
}

absl::StatusOr<int64_t> ParseDurationNs(absl::string_view text) {
  const std::optional<double> duration_ns = ParseQuantity(text, kDurationUnits);
  if (!duration_ns || !FitsInt64(*duration_ns)) {
    return BadQuantity(text, "a duration", "250us, 500ms, 1.5s, 10min or 2h");
  }
  return static_cast<int64_t>(std::llround(*duration_ns));
}

absl::StatusOr<double> ParseRatePerSecond(absl::string_view text) {
  if (absl::StripAsciiWhitespace(text) == "inf") return std::numeric_limits<double>::infinity();
  const std::optional<double> rate = ParseQuantity(text, kRateUnits);
  if (!rate) return BadQuantity(text, "a rate", "4/s, 90/min or inf");
  return *rate;
}

absl::StatusOr<double> ParseBytesPerSecond(absl::string_view text) {
  absl::string_view size = absl::StripAsciiWhitespace(text);
  const std::optional<double> bytes =
      absl::ConsumeSuffix(&size, "/s") ? ParseQuantity(size, kByteUnits) : std::nullopt;
  if (!bytes) return BadQuantity(text, "a data rate", "55GB/s or 800MiB/s");
  return *bytes;
}

absl::StatusOr<double> ParseNumber(absl::string_view text) {
  const absl::string_view number = absl::StripAsciiWhitespace(text);
  if (number == "inf") return std::numeric_limits<double>::infinity();
  if (number == "-inf") return -std::numeric_limits<double>::infinity();
  double value;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
  if (error != std::errc() || end != number.data() + number.size() || !std::isfinite(value)) {
    return BadQuantity(text, "a number", "4, 0.25, 1e-3 or inf");
  }
  return value;
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::array<absl::string_view, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (std::abs(value) >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return absl::StrCat(ThreeDigits(value), " ", kUnits[unit]);
}

std::string FormatDurationNs(int64_t duration_ns) {
  if (duration_ns < 0) return absl::StrCat("-", FormatDurationNs(-duration_ns));
  if (duration_ns == 0) return "0 s";
  const double value = static_cast<double>(duration_ns);
  if (duration_ns < kNsPerUs) return absl::StrCat(duration_ns, " ns");
  if (duration_ns < kNsPerMs) return absl::StrCat(ThreeDigits(value / kNsPerUs), " us");
  if (duration_ns < kNsPerSecond) return absl::StrCat(ThreeDigits(value / kNsPerMs), " ms");
  if (duration_ns < 60 * kNsPerSecond) return absl::StrCat(ThreeDigits(value / kNsPerSecond), " s");
  const int64_t seconds = duration_ns / kNsPerSecond;
  if (seconds < 3600) return TwoParts(seconds, 60, "min", "s");
  if (seconds < 86400) return TwoParts(seconds / 60, 60, "h", "min");
  return TwoParts(seconds / 3600, 24, "d", "h");
}

std::string FormatRatePerSecond(double per_second) {
  if (std::isinf(per_second)) return "inf";
  return absl::StrCat(ThreeDigits(per_second), "/s");
}

std::string FormatNumber(double value) {
  char buffer[64];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return error == std::errc() ? std::string(buffer, end) : std::string("nan");
}

bool IsValidUtf8(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t at) { return static_cast<uint8_t>(text[at]); };
    const uint8_t lead = byte(i);
    const size_t length = lead < 0x80   ? 1
                          : lead < 0xC2 ? 0
                          : lead < 0xE0 ? 2
                          : lead < 0xF0 ? 3
                          : lead < 0xF5 ? 4
                                        : 0;
    if (length == 0 || i + length > text.size()) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((byte(i + k) & 0xC0) != 0x80) return false;
    }
    // Overlong forms, surrogates and what lies past U+10FFFF.
    if (lead == 0xE0 && byte(i + 1) < 0xA0) return false;
    if (lead == 0xED && byte(i + 1) > 0x9F) return false;
    if (lead == 0xF0 && byte(i + 1) < 0x90) return false;
    if (lead == 0xF4 && byte(i + 1) > 0x8F) return false;
    i += length;
  }
  return true;
}

}  // namespace kvsweep
