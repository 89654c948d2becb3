#include "worker/engine/shape_catalogue.h"

#include <array>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/text.h"

namespace kvsweep {
namespace {

struct Shape {
  absl::string_view name;
  Architecture architecture;
  int32_t hidden_size;
  int32_t layers;
  int32_t query_heads;
  int32_t kv_heads;
  int32_t ffn_size;
  int32_t vocabulary;
  int32_t max_positions;
  double rope_theta;
  int32_t bos_id;
  int32_t eos_id;
  DType dtype;
};

constexpr Architecture kLlama = Architecture::kLlama;
constexpr Architecture kOpt = Architecture::kOpt;
constexpr DType kF16 = DType::kF16;
constexpr DType kBf16 = DType::kBf16;
constexpr DType kF32 = DType::kF32;

// clang-format off
// From the config.json that each model was published with. The two tiny ones
// are ours: small, but with grouped heads (Llama) and every bias (OPT).
// Llama 3.1 was published with frequency-scaled rotary embeddings; these change
// no size and no cost, so its shape stands here with the plain ones.
constexpr std::array kShapes = {
    // name           family     D   L  Hq  Hk      F       V     max   theta     bos     eos  dtype
    Shape{"tiny-opt",     kOpt,     64,  4,  4,  4,   256,    512,    512,     0,      1,      2, kF32},
    Shape{"opt-125m",     kOpt,    768, 12, 12, 12,  3072,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-1.3b",     kOpt,   2048, 24, 32, 32,  8192,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-2.7b",     kOpt,   2560, 32, 32, 32, 10240,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-6.7b",     kOpt,   4096, 32, 32, 32, 16384,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-13b",      kOpt,   5120, 40, 40, 40, 20480,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-30b",      kOpt,   7168, 48, 56, 56, 28672,  50272,   2048,     0,      2,      2, kF16},
    Shape{"tiny-llama",   kLlama,   64,  4,  8,  4,   172,    512,    512, 10000,      1,      2, kF32},
    Shape{"llama-2-7b",   kLlama, 4096, 32, 32, 32, 11008,  32000,   4096, 10000,      1,      2, kF16},
    Shape{"llama-2-13b",  kLlama, 5120, 40, 40, 40, 13824,  32000,   4096, 10000,      1,      2, kF16},
    Shape{"llama-3.1-8b", kLlama, 4096, 32, 32,  8, 14336, 128256, 131072, 5e5, 128000, 128001, kBf16},
};
// clang-format on

ModelConfig ConfigOf(const Shape& shape) {
  ModelConfig config = ArchitectureFeatures(shape.architecture);
  config.hidden_size = shape.hidden_size;
  config.layers = shape.layers;
  config.query_heads = shape.query_heads;
  config.kv_heads = shape.kv_heads;
  config.head_dim = shape.hidden_size / shape.query_heads;
  config.ffn_size = shape.ffn_size;
  config.vocabulary = shape.vocabulary;
  config.max_positions = shape.max_positions;
  config.rope_theta = shape.rope_theta;
  config.dtype = shape.dtype;
  config.bos_id = shape.bos_id;
  config.eos_ids = {shape.eos_id};
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> FindShape(absl::string_view name) {
  for (const Shape& shape : kShapes) {
    if (shape.name == name) return ConfigOf(shape);
  }
  const std::vector<std::string> names = ShapeNames();
  const std::optional<std::string> nearest = NearestName(name, names);
  return absl::NotFoundError(
      absl::StrCat("unknown model shape \"", name, "\"; ",
                   nearest.has_value() ? absl::StrCat("did you mean \"", *nearest, "\"?")
                                       : absl::StrCat("known are ", absl::StrJoin(names, ", "))));
}

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

}  // namespace kvsweep
