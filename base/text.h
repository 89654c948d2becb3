#ifndef KVSWEEP_BASE_TEXT_H_
#define KVSWEEP_BASE_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// Text that people write and read: names with typing errors, and quantities with units.
//
// Quantities are a decimal number and a unit, with or without one space ("500ms", "1.5 GiB",
// "4/s"). A parse error quotes the text and shows a correct example. Values below zero, NaN and
// what does not fit are errors.

namespace kvsweep {

// Levenshtein's distance in bytes: insertions, deletions, replacements; a swap of neighbours counts
// one.
size_t EditDistance(absl::string_view a, absl::string_view b);

// The candidate closest to `name` if it is near enough to be what was meant (a third of the name's
// length, at least 1); the first on a tie. Ignores case.
std::optional<std::string> NearestName(absl::string_view name,
                                       std::span<const std::string> candidates);

// Bytes: B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024); a bare whole
// number is bytes. The product must be a whole number of bytes.
absl::StatusOr<int64_t> ParseBytes(absl::string_view text);

// Nanoseconds: ns, us, ms, s, m or min, h, d. Only 0 may stand without a unit. Rounded to the
// nearest ns.
absl::StatusOr<int64_t> ParseDurationNs(absl::string_view text);

// Events per second: "4/s", "90/min", "10/h"; "inf" is infinity. Only 0 may stand without a unit.
absl::StatusOr<double> ParseRatePerSecond(absl::string_view text);

// Rates of data in bytes per second: any unit of ParseBytes followed by "/s" ("55GB/s").
absl::StatusOr<double> ParseBytesPerSecond(absl::string_view text);

// A plain number without unit, digits with optional fraction and exponent, or "inf" / "-inf".
absl::StatusOr<double> ParseNumber(absl::string_view text);

// "0 B", "640 B", "1.5 KiB", "12 MiB": at most three significant digits, powers of 1024.
std::string FormatBytes(int64_t bytes);

// "0 s", "250 us", "1.5 ms", "12.3 s", "4 min 5 s", "2 h 30 min", "3 d 4 h".
std::string FormatDurationNs(int64_t duration_ns);

// "4/s", "0.25/s", "inf".
std::string FormatRatePerSecond(double per_second);

// Shortest decimal text that reads back as the same double.
std::string FormatNumber(double value);

// Without overlong forms and surrogates.
bool IsValidUtf8(absl::string_view text);

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_TEXT_H_
