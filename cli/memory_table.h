#ifndef KVSWEEP_CLI_MEMORY_TABLE_H_
#define KVSWEEP_CLI_MEMORY_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "experiments/matrix.h"
#include "experiments/spec.h"
#include "storage/query.h"

namespace kvsweep {

// What each arm of each cell takes of device and host, by its strategy's own formula: fixed bytes,
// the bytes of the median and of the largest request of the first repeat, how many such requests
// fit at once, and how many requests can never run. Nothing is computed but plans. At most `limit`
// rows; `in_words`: bytes as "12.5 MiB" instead of numbers. Errors as of the model's config and of
// the trace.
absl::StatusOr<Table> MemoryTable(const Matrix& matrix, const LoadedExperiment& experiment,
                                  bool in_words, uint64_t limit);

// A sentence for each arm and cell that has requests which can never run (or none that can), with
// their number, what the largest would take and what to do.
absl::StatusOr<std::vector<std::string>> MemoryWarnings(const Matrix& matrix,
                                                        const LoadedExperiment& experiment);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_MEMORY_TABLE_H_
