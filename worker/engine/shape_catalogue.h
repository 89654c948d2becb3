// Named model shapes: the ModelConfigs of well-known models, for experiments
// on random weights and on modelled time, where only the shape matters.
#ifndef KVSWEEP_WORKER_ENGINE_SHAPE_CATALOGUE_H_
#define KVSWEEP_WORKER_ENGINE_SHAPE_CATALOGUE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/engine/model_config.h"

namespace kvsweep {

// The config of the shape `name`, such as "opt-6.7b" or "llama-3.1-8b".
// NotFound, with the nearest name as a hint or else the list of all, when there is none.
absl::StatusOr<ModelConfig> FindShape(absl::string_view name);

// Makes room for sequences of `tokens` tokens: past the length that a model was published with, a
// shape on random weights has as good positions as before it (a learned table gets more rows).
void ExtendPositions(int32_t tokens, ModelConfig* config);

// All names, in the catalogue's order: by family, then by size.
std::vector<std::string> ShapeNames();

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_SHAPE_CATALOGUE_H_
