#ifndef KVSWEEP_STORAGE_JSON_TEXT_H_
#define KVSWEEP_STORAGE_JSON_TEXT_H_

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

// Writing the few JSON texts that the store keeps or shows.

namespace kvsweep {

// `text`, which is UTF-8, as a JSON string with its quotes.
std::string JsonString(absl::string_view text);

// A JSON object of texts, in the order of `pairs` (a map, or a vector of pairs).
template <typename Pairs>
std::string JsonObject(const Pairs& pairs) {
  std::string json;
  for (const auto& [name, value] : pairs) {
    absl::StrAppend(&json, json.empty() ? "{" : ",", JsonString(name), ":", JsonString(value));
  }
  return json.empty() ? "{}" : json + "}";
}

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_JSON_TEXT_H_
