#ifndef KVSWEEP_TESTS_BENCH_STEP_H_
#define KVSWEEP_TESTS_BENCH_STEP_H_

#include "absl/status/statusor.h"
#include "tests/bench/cases.h"
#include "worker/engine/model_config.h"

namespace kvsweep {

// One decode step of a model of this shape with random weights over a paged cache: the operations
// that the engine enqueues for the paged strategy, in its order. Axes: B, context.
absl::StatusOr<PreparedCase> PrepareStep(CaseMemory& memory, const ModelConfig& model, int64_t rows,
                                         int64_t context);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_STEP_H_
