#ifndef KVSWEEP_BASE_STATUS_MACROS_H_
#define KVSWEEP_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// How fallible calls are chained: early return on error, and a prefix of context added at each
// level, so that the message that reaches a person reads from the outside in ("loading model:
// config.json: ...").

namespace kvsweep {

// `status` with "prefix: " before its message; code and payloads are kept. An OK status passes
// unchanged.
absl::Status Annotate(absl::Status status, absl::string_view prefix);

// As above for a result: the value passes unchanged, an error gets the prefix.
template <typename T>
absl::StatusOr<T> Annotate(absl::StatusOr<T> result, absl::string_view prefix) {
  if (result.ok()) return result;
  return Annotate(std::move(result).status(), prefix);
}

}  // namespace kvsweep

// Returns from the enclosing function if `expression` (an absl::Status) is an error.
#define RETURN_IF_ERROR(expression)                                                              \
  do {                                                                                           \
    if (absl::Status kvsweep_status = (expression); !kvsweep_status.ok()) return kvsweep_status; \
  } while (false)

// Assigns the value of `expression` (an absl::StatusOr) to `target`, which may declare a variable,
// or returns its status. Expands to several statements: not for the body of an `if` without braces.
#define ASSIGN_OR_RETURN(target, ...) \
  KVSWEEP_ASSIGN_OR_RETURN_(KVSWEEP_CONCAT_(kvsweep_result_, __LINE__), target, (__VA_ARGS__))

#define KVSWEEP_ASSIGN_OR_RETURN_(result, target, expression) \
  auto result = expression;                                   \
  if (!result.ok()) return std::move(result).status();        \
  target = *std::move(result)
#define KVSWEEP_CONCAT_(a, b) KVSWEEP_CONCAT_INNER_(a, b)
#define KVSWEEP_CONCAT_INNER_(a, b) a##b

#endif  // KVSWEEP_BASE_STATUS_MACROS_H_
