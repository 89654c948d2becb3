// A calibration forward: what InfiniGen's skewing is computed from.
#ifndef KVSWEEP_WORKER_ENGINE_CALIBRATION_H_
#define KVSWEEP_WORKER_ENGINE_CALIBRATION_H_

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/strategies/skewing.h"

namespace kvsweep {

class LoadedModel;

// Runs the model once over `ids` with full attention, takes queries and keys of every layer after
// rotary embedding, and computes the skewing. Kept with the model: the same ids again cost nothing.
// InvalidArgument when there are fewer ids than columns of a head or more than the model has
// positions.
absl::StatusOr<std::shared_ptr<const Skewing>> CalibrateSkewing(Backend* backend,
                                                                const LoadedModel* model,
                                                                std::span<const int32_t> ids);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_CALIBRATION_H_
