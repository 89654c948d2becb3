// Reads the JSON of a model's folder.
#ifndef KVSWEEP_WORKER_ENGINE_JSON_OBJECT_H_
#define KVSWEEP_WORKER_ENGINE_JSON_OBJECT_H_

#include <optional>

#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace kvsweep {

// The object that `text` is. Nothing where it is no JSON object, or nested deeper than any config
// or tokenizer is, so that reading or showing it cannot run out of stack.
std::optional<nlohmann::json> ParseJsonObject(absl::string_view text);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_JSON_OBJECT_H_
