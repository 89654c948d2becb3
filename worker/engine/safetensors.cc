#include "worker/engine/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace kvsweep {
namespace {

using nlohmann::json;
using Tensors = std::map<std::string, TensorView, std::less<>>;

static_assert(std::endian::native == std::endian::little,
              "tensors are read in place, as little endian");

constexpr int kMaxJsonDepth = 8;
constexpr size_t kLengthBytes = sizeof(uint64_t);
constexpr absl::string_view kIndexName = "model.safetensors.index.json";
constexpr absl::string_view kSingleName = "model.safetensors";

// How the format spells a type.
absl::string_view FormatName(DType type) {
  switch (type) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kFp8E4m3:
      break;  // keys and values only, never weights
  }
  KVSWEEP_CHECK(false);
  return "";
}

absl::Status Damaged(absl::string_view file, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(file, ": ", what));
}

// Parses JSON and refuses a key that occurs twice in one object, where the usual reading would
// silently keep the last, and nesting that no sound file has.
absl::StatusOr<json> ParseStrictJson(absl::string_view text, absl::string_view file) {
  std::vector<std::set<std::string>> open_objects;
  std::optional<std::string> repeated;
  bool too_deep = false;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (too_deep || depth > kMaxJsonDepth) {
      too_deep = true;
      return false;  // drop the value, read on
    }
    if (event == json::parse_event_t::object_start) {
      open_objects.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      open_objects.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second) repeated = key;
    }
    return true;
  };
  json value = json::parse(text.begin(), text.end(), check, /*allow_exceptions=*/false);
  if (repeated.has_value()) {
    return Damaged(file, absl::StrCat("\"", *repeated, "\" occurs twice"));
  }
  if (too_deep || !value.is_object()) return Damaged(file, "its JSON is no object, or damaged");
  return value;
}

absl::StatusOr<DType> ParseType(const json& tensor, absl::string_view where) {
  const auto field = tensor.find("dtype");
  if (field == tensor.end() || !field->is_string()) {
    return Damaged(where, "dtype is missing");
  }
  const auto& name = field->get_ref<const std::string&>();
  for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
    if (name == FormatName(type)) return type;
  }
  return absl::UnimplementedError(
      absl::StrCat(where, ": dtype ", name, " is not supported; BF16, F16 and F32 are"));
}

// A list of non-negative integers no larger than `maximum`.
absl::StatusOr<std::vector<int64_t>> ParseNumbers(const json& tensor, const char* name,
                                                  int64_t maximum, absl::string_view where) {
  const auto field = tensor.find(name);
  if (field == tensor.end() || !field->is_array() ||
      static_cast<int64_t>(field->size()) > limits::kTensorDimensions) {
    return Damaged(where, absl::StrCat(name, " is not a list of at most ",
                                       limits::kTensorDimensions, " numbers"));
  }
  std::vector<int64_t> numbers;
  for (const json& number : *field) {
    if (!number.is_number_unsigned() || number.get<uint64_t>() > static_cast<uint64_t>(maximum)) {
      return Damaged(where, absl::StrCat(name, " must hold integers from 0 to ", maximum));
    }
    numbers.push_back(number.get<int64_t>());
  }
  return numbers;
}

// Bytes of a tensor of `shape`, or nullopt when they exceed `limit`; the
// product is never formed past it, so it cannot overflow.
std::optional<int64_t> TensorBytes(std::span<const int64_t> shape, DType type, int64_t limit) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  int64_t bytes = DTypeBytes(type);
  for (const int64_t dimension : shape) {
    if (bytes > limit / dimension) return std::nullopt;
    bytes *= dimension;
  }
  return bytes <= limit ? std::optional(bytes) : std::nullopt;
}

// One entry of the header, with a view into `data`.
absl::StatusOr<TensorView> ParseTensor(const json& entry, std::span<const uint8_t> data,
                                       absl::string_view file, absl::string_view name) {
  const std::string where = absl::StrCat(file, ": tensor ", name);
  if (!entry.is_object()) return Damaged(where, "is not described by an object");
  TensorView tensor;
  tensor.file = std::string(file);
  ASSIGN_OR_RETURN(tensor.type, ParseType(entry, where));
  ASSIGN_OR_RETURN(tensor.shape, ParseNumbers(entry, "shape", limits::kModelBytes, where));
  ASSIGN_OR_RETURN(const std::vector<int64_t> offsets,
                   ParseNumbers(entry, "data_offsets", limits::kModelBytes, where));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return Damaged(where, "data_offsets must be [begin, end]");
  }
  const auto size = static_cast<int64_t>(data.size());
  if (offsets[1] > size) {
    return Damaged(
        where, absl::StrCat("ends at byte ", offsets[1], " of the data, but the file holds ", size,
                            "; is the file cut short?"));
  }
  const int64_t bytes = offsets[1] - offsets[0];
  if (TensorBytes(tensor.shape, tensor.type, size) != bytes) {
    return Damaged(where,
                   absl::StrCat("shape ", ShapeText(tensor.shape), " of ", FormatName(tensor.type),
                                " does not take the ", bytes, " bytes of its data_offsets"));
  }
  tensor.bytes = data.subspan(offsets[0], bytes);
  return tensor;
}

// The tensors of a file must cover its data exactly.
absl::Status CheckTiling(const Tensors& tensors, std::span<const uint8_t> data,
                         absl::string_view file) {
  std::vector<std::pair<const std::string*, std::span<const uint8_t>>> parts;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.bytes.empty()) parts.emplace_back(&name, tensor.bytes);
  }
  std::sort(parts.begin(), parts.end(),
            [](const auto& a, const auto& b) { return a.second.data() < b.second.data(); });
  const uint8_t* expected = data.data();
  const std::string* previous = nullptr;
  for (const auto& [name, bytes] : parts) {
    if (bytes.data() < expected) {
      return Damaged(file, absl::StrCat("tensors ", *previous, " and ", *name, " overlap"));
    }
    if (bytes.data() > expected) {
      return Damaged(file, absl::StrCat("the data before tensor ", *name, " belongs to no tensor"));
    }
    expected = bytes.data() + bytes.size();
    previous = name;
  }
  const auto rest = data.data() + data.size() - expected;
  if (rest == 0) return absl::OkStatus();
  return Damaged(file, absl::StrCat("the last ", rest, " bytes belong to no tensor"));
}

// A shard's name must be a plain file name: the index comes from outside and
// must not lead out of the model's folder.
bool IsPlainFileName(absl::string_view name) {
  return !name.empty() && name[0] != '.' &&
         name.find_first_of(absl::string_view("/\\\0", 3)) == absl::string_view::npos;
}

// The index's map from tensor to shard.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limits::kModelIndexBytes));
  ASSIGN_OR_RETURN(const json index, ParseStrictJson(text, path));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object()) {
    return Damaged(path, "weight_map is missing");
  }
  std::map<std::string, std::string> shard_of;
  if (static_cast<int64_t>(map->size()) > limits::kTensors) {
    return Damaged(path, absl::StrCat("lists ", map->size(), " tensors; at most ", limits::kTensors,
                                      " are possible"));
  }
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !IsPlainFileName(shard.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", tensor, " is said to be in ",
                       shard.dump(-1, ' ', false, json::error_handler_t::replace),
                       "; a shard must be a file of the model's own folder"));
    }
    shard_of[tensor] = shard.get<std::string>();
  }
  return shard_of;
}

// The tensors found and the tensors promised must be the same, shard by shard.
absl::Status CheckAgainstIndex(const Tensors& tensors,
                               const std::map<std::string, std::string>& shard_of,
                               const std::string& folder, const std::string& index_path) {
  for (const auto& [name, shard] : shard_of) {
    const auto tensor = tensors.find(name);
    const std::string path = absl::StrCat(folder, "/", shard);
    if (tensor == tensors.end() || tensor->second.file != path) {
      return Damaged(index_path,
                     absl::StrCat("tensor ", name, " is not in ", shard, ", where it should be"));
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (!shard_of.contains(name)) {
      return Damaged(index_path,
                     absl::StrCat("tensor ", name, " of ", tensor.file, " is not listed"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string ShapeText(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.end(), ", "), "]");
}

void WidenTensor(const TensorView& tensor, std::span<float> out) {
  KVSWEEP_CHECK(out.size() * DTypeBytes(tensor.type) == tensor.bytes.size());
  ToFloats(tensor.bytes.data(), tensor.type, out);
}

absl::StatusOr<Tensors> ParseSafetensors(std::span<const uint8_t> bytes,
                                         absl::string_view file_name) {
  if (bytes.size() < kLengthBytes) {
    return Damaged(file_name, "is too short for a safetensors file");
  }
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  const size_t available =
      std::min<size_t>(bytes.size() - kLengthBytes, limits::kSafetensorsHeaderBytes);
  if (header_bytes > available) {
    return Damaged(file_name, absl::StrCat("header is said to take ", header_bytes,
                                           " bytes; at most ", available, " are possible"));
  }
  const absl::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                                 header_bytes);
  ASSIGN_OR_RETURN(const json entries, ParseStrictJson(header, file_name));
  if (static_cast<int64_t>(entries.size()) > limits::kTensors) {
    return Damaged(file_name, absl::StrCat("holds ", entries.size(), " tensors; at most ",
                                           limits::kTensors, " are possible"));
  }
  const std::span<const uint8_t> data = bytes.subspan(kLengthBytes + header_bytes);
  Tensors tensors;
  for (const auto& [name, entry] : entries.items()) {
    if (name == "__metadata__") continue;  // free text of the writer's
    ASSIGN_OR_RETURN(tensors[name], ParseTensor(entry, data, file_name, name));
  }
  RETURN_IF_ERROR(CheckTiling(tensors, data, file_name));
  return tensors;
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& folder) {
  const std::string index_path = absl::StrCat(folder, "/", kIndexName);
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards = {std::string(kSingleName)};
  std::error_code ignored;
  const bool sharded = std::filesystem::exists(index_path, ignored);
  if (sharded) {
    ASSIGN_OR_RETURN(shard_of, ReadIndex(index_path));
    shards.clear();
    for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
    if (static_cast<int64_t>(shards.size()) > limits::kModelShards) {
      return Damaged(index_path, absl::StrCat("names ", shards.size(), " shards; at most ",
                                              limits::kModelShards, " are possible"));
    }
  } else if (!std::filesystem::exists(absl::StrCat(folder, "/", kSingleName), ignored)) {
    return absl::NotFoundError(
        absl::StrCat("model folder ", folder, " has neither ", kSingleName, " nor ", kIndexName));
  }
  Checkpoint checkpoint;
  for (const std::string& shard : shards) {
    const std::string path = absl::StrCat(folder, "/", shard);
    ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path, limits::kModelBytes));
    ASSIGN_OR_RETURN(Tensors tensors, ParseSafetensors(file.bytes(), path));
    checkpoint.files_.push_back(std::move(file));
    checkpoint.tensors_.merge(tensors);
    if (!tensors.empty()) {  // what merge left behind is there already
      return Damaged(path,
                     absl::StrCat("tensor ", tensors.begin()->first, " is also in another shard"));
    }
  }
  if (sharded) {
    RETURN_IF_ERROR(CheckAgainstIndex(checkpoint.tensors_, shard_of, folder, index_path));
  }
  return checkpoint;
}

const TensorView* Checkpoint::Find(absl::string_view name) const {
  const auto tensor = tensors_.find(std::string_view(name.data(), name.size()));
  return tensor == tensors_.end() ? nullptr : &tensor->second;
}

}  // namespace kvsweep
