#ifndef KVSWEEP_STORAGE_OPERATION_RESULTS_H_
#define KVSWEEP_STORAGE_OPERATION_RESULTS_H_

#include <cstdint>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "storage/database.h"
#include "storage/store.h"

// Small words that the writer's operations share.

namespace kvsweep {

inline OperationResult Refused(absl::Status status) {
  return {.status = std::move(status), .value = {}};
}

template <typename Result>
OperationResult Done(Result result) {
  return {.status = absl::OkStatus(), .value = std::move(result)};
}

inline OperationResult Done() { return {}; }

// Binds an id, or null for none.
template <typename Id>
void BindOptional(Statement& statement, int parameter, const std::optional<Id>& id) {
  if (id.has_value()) {
    statement.BindInt(parameter, static_cast<int64_t>(id->value()));
  } else {
    statement.BindNull(parameter);
  }
}

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_OPERATION_RESULTS_H_
