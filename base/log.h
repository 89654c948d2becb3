#ifndef KVSWEEP_BASE_LOG_H_
#define KVSWEEP_BASE_LOG_H_

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

// The program's log: lines on stderr with time, level, program name and text. Results never go
// here. The arguments of a call are joined as by absl::StrCat, and only when the level is on. All
// functions may be called from many threads; SetLog is for the first lines of main.

namespace kvsweep {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// "debug", "info", "warning", "error" or "off"; InvalidArgument otherwise.
absl::StatusOr<LogLevel> ParseLogLevel(absl::string_view name);

// What is shown from now on, and under which name. Before: warnings and errors, as "kvsweep".
void SetLog(absl::string_view program, LogLevel level);

bool LogIsOn(LogLevel level);

// Writes one line. The functions below are the usual way in.
void Log(LogLevel level, absl::string_view text);

template <typename... Parts>
void LogDebug(const Parts&... parts) {
  if (LogIsOn(LogLevel::kDebug)) Log(LogLevel::kDebug, absl::StrCat(parts...));
}
template <typename... Parts>
void LogInfo(const Parts&... parts) {
  if (LogIsOn(LogLevel::kInfo)) Log(LogLevel::kInfo, absl::StrCat(parts...));
}
template <typename... Parts>
void LogWarning(const Parts&... parts) {
  if (LogIsOn(LogLevel::kWarning)) Log(LogLevel::kWarning, absl::StrCat(parts...));
}
template <typename... Parts>
void LogError(const Parts&... parts) {
  if (LogIsOn(LogLevel::kError)) Log(LogLevel::kError, absl::StrCat(parts...));
}

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_LOG_H_
