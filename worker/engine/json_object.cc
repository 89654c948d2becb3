#include "worker/engine/json_object.h"

namespace kvsweep {

using nlohmann::json;

std::optional<json> ParseJsonObject(absl::string_view text) {
  constexpr int kMaxDepth = 16;
  bool too_deep = false;
  json object = json::parse(
      text.begin(), text.end(),
      [&](int depth, json::parse_event_t, json&) {
        too_deep |= depth > kMaxDepth;
        return !too_deep;
      },
      /*allow_exceptions=*/false);
  if (too_deep || !object.is_object()) return std::nullopt;
  return object;
}

}  // namespace kvsweep
