#include "cli/exit_code.h"

#include <cstdio>
#include <string>

namespace kvsweep {

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kResourceExhausted:
      return kExitUsage;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitFailed;
    case absl::StatusCode::kCancelled:
      return kExitInterrupted;
    default:
      return kExitUnreachable;
  }
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "kvsweep: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int FailSpec(const absl::Status& status) {
  const std::string text(status.message());
  std::fprintf(stderr, "%s%s", text.c_str(), text.empty() || text.back() != '\n' ? "\n" : "");
  return kExitUsage;
}

}  // namespace kvsweep
