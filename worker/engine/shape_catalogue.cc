#include "worker/engine/shape_catalogue.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/text.h"

namespace kvsweep {
namespace {

// What a model has beside its family's features.
enum class Extra {
  kNone,
  kLlama3Rope,           // frequencies scaled as in Llama 3.1
  kQkvBias,              // as every Qwen2
  kNarrowEmbeddings512,  // OPT-350M: projected embeddings, norms after, none at the end
};

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
  Extra extra = Extra::kNone;
};

constexpr Architecture kLlama = Architecture::kLlama;
constexpr Architecture kOpt = Architecture::kOpt;
constexpr DType kF16 = DType::kF16;
constexpr DType kBf16 = DType::kBf16;
constexpr DType kF32 = DType::kF32;

// clang-format off
// From the config.json that each model was published with (OPT-175B: from the paper, Zhang et al.
// 2022, table 1). The two tiny ones are ours: small, but with grouped heads (Llama) and every bias
// (OPT).
constexpr std::array kShapes = {
    // name           family     D   L  Hq  Hk      F       V     max   theta     bos     eos  dtype
    Shape{"tiny-opt",     kOpt,     64,  4,  4,  4,   256,    512,    512,     0,      1,      2, kF32},
    Shape{"opt-125m",     kOpt,    768, 12, 12, 12,  3072,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-350m",     kOpt,   1024, 24, 16, 16,  4096,  50272,   2048,     0,      2,      2, kF16, Extra::kNarrowEmbeddings512},
    Shape{"opt-1.3b",     kOpt,   2048, 24, 32, 32,  8192,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-2.7b",     kOpt,   2560, 32, 32, 32, 10240,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-6.7b",     kOpt,   4096, 32, 32, 32, 16384,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-13b",      kOpt,   5120, 40, 40, 40, 20480,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-30b",      kOpt,   7168, 48, 56, 56, 28672,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-66b",      kOpt,   9216, 64, 72, 72, 36864,  50272,   2048,     0,      2,      2, kF16},
    Shape{"opt-175b",     kOpt,  12288, 96, 96, 96, 49152,  50272,   2048,     0,      2,      2, kF16},
    Shape{"tiny-llama",   kLlama,   64,  4,  8,  4,   172,    512,    512, 10000,      1,      2, kF32},
    Shape{"llama-2-7b",   kLlama, 4096, 32, 32, 32, 11008,  32000,   4096, 10000,      1,      2, kF16},
    Shape{"llama-2-13b",  kLlama, 5120, 40, 40, 40, 13824,  32000,   4096, 10000,      1,      2, kF16},
    Shape{"llama-2-70b",  kLlama, 8192, 80, 64,  8, 28672,  32000,   4096, 10000,      1,      2, kF16},
    Shape{"llama-3.1-8b", kLlama, 4096, 32, 32,  8, 14336, 128256, 131072, 5e5, 128000, 128001, kBf16, Extra::kLlama3Rope},
    Shape{"llama-3.1-70b", kLlama, 8192, 80, 64, 8, 28672, 128256, 131072, 5e5, 128000, 128001, kBf16, Extra::kLlama3Rope},
    Shape{"qwen2.5-7b",   kLlama, 3584, 28, 28,  4, 18944, 152064, 131072, 1e6, 151643, 151643, kBf16, Extra::kQkvBias},
};
// clang-format on

void AddExtra(Extra extra, ModelConfig* config) {
  switch (extra) {
    case Extra::kNone:
      break;
    case Extra::kLlama3Rope:
      config->rope_scaling = RopeScaling::kLlama3;
      config->rope_factor = 8;
      config->rope_low_frequency = 1;
      config->rope_high_frequency = 4;
      config->rope_original_positions = 8192;
      break;
    case Extra::kQkvBias:
      config->qkv_bias = true;
      break;
    case Extra::kNarrowEmbeddings512:
      config->embedding_size = 512;
      config->norm_before = false;
      config->final_norm = false;
      break;
  }
}

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
  config.embedding_size = shape.hidden_size;
  config.dtype = shape.dtype;
  config.bos_id = shape.bos_id;
  config.eos_ids = {shape.eos_id};
  AddExtra(shape.extra, &config);
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

void ExtendPositions(int32_t tokens, ModelConfig* config) {
  config->max_positions = std::max(config->max_positions, tokens);
}

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

}  // namespace kvsweep
