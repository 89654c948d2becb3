// Builds model folders for tests, sound ones and broken ones.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_MODEL_FOLDER_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_MODEL_FOLDER_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/file.h"
#include "nlohmann/json.hpp"

namespace kvsweep {

struct TestTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// A safetensors file of the JSON header and the data as they are, sound or not.
inline std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return absl::StrCat(bytes, header, data);
}

// A sound safetensors file of f32 tensors.
inline std::string SafetensorsBytes(const std::map<std::string, TestTensor>& tensors) {
  nlohmann::json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(tensor.values.data()),
                tensor.values.size() * sizeof(float));
    header[name] = {
        {"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return SafetensorsBytes(header.dump(), data);
}

inline void WriteOrDie(const TempDir& folder, const std::string& name, absl::string_view content) {
  ASSERT_TRUE(WriteFileAtomic(folder.Join(name), content).ok());
}

// The status as people see it, with the folder's random path written as DIR.
inline std::string Shown(const absl::Status& status, const TempDir& folder) {
  return absl::StrReplaceAll(status.ToString(), {{folder.path(), "DIR"}});
}

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_MODEL_FOLDER_H_
