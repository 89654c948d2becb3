// What a decoder-only transformer is made of: the plain description that a
// model folder's config.json, or a named shape, comes down to.
//
// The engine switches on the features below (which norm, which positions, which
// biases), never on the architecture, so that a further family of models is a
// further reader of config.json and a further table of tensor names, not a
// further engine. `architecture` itself only picks that table.
//
// Symbols: D hidden size, L layers, Hq query heads, Hk KV heads, d head
// dimension, F FFN size, V vocabulary.
#ifndef KVSWEEP_WORKER_ENGINE_MODEL_CONFIG_H_
#define KVSWEEP_WORKER_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/shapes.h"

namespace kvsweep {

enum class Architecture { kLlama, kOpt };

enum class NormKind {
  kRms,    // x / rms(x) * weight
  kLayer,  // (x - mean) / standard deviation * weight + bias
};

enum class PositionKind {
  kRotary,   // q and k are rotated by position (rotate-half order)
  kLearned,  // a table is added to the embedding
};

enum class Activation { kSilu, kRelu };

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;

  // Dimensions. Hq * d == D and Hq % Hk == 0.
  int32_t hidden_size = 0;    // D
  int32_t layers = 0;         // L
  int32_t query_heads = 0;    // Hq
  int32_t kv_heads = 0;       // Hk
  int32_t head_dim = 0;       // d, even when positions are rotary
  int32_t ffn_size = 0;       // F
  int32_t vocabulary = 0;     // V
  int32_t max_positions = 0;  // tokens that one sequence may have

  NormKind norm = NormKind::kRms;
  double norm_epsilon = 1e-5;

  PositionKind positions = PositionKind::kRotary;
  double rope_theta = 10000;    // read only when positions are rotary
  int32_t position_offset = 0;  // row of position 0 in the learned table

  Activation activation = Activation::kSilu;
  bool gated_ffn = true;  // down(activation(gate x) * up x), else without gate

  bool qkv_bias = false;
  bool attention_output_bias = false;
  bool ffn_bias = false;
  bool tie_embeddings = false;  // the output matrix is the embedding

  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;  // any of them ends a text; may be empty

  // The type that the checkpoint declares: what `kv.dtype: model` means.
  DType dtype = DType::kF32;

  // Query heads that share one KV head: g = Hq / Hk.
  int32_t group_size() const { return query_heads / kv_heads; }
  // Rows of the fused projection: (Hq + 2 Hk) d.
  int64_t qkv_rows() const { return int64_t{query_heads + 2 * kv_heads} * head_dim; }
  // Bytes of keys and values that one token takes over all layers:
  // kappa = 2 L Hk d s, s being the bytes of `kv_type`.
  int64_t KvBytesPerToken(DType kv_type) const;

  bool operator==(const ModelConfig&) const = default;
};

// The features that all models of an architecture share (norm, positions, biases
// and so on); its dimensions are still zero.
ModelConfig ArchitectureFeatures(Architecture architecture);

// Reads the text of a Hugging Face config.json of `model_type` llama or opt.
// `file_name` only serves the messages. Every dimension is bounded
// (base/limits.h) and checked against the others. What would change the results
// and is not supported (scaled rotary embeddings, sliding windows, projected
// embeddings, quantisation, other model types) is refused by its field's name:
// InvalidArgument for a value that is wrong, Unimplemented for one that is a
// model we cannot run.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json_text,
                                             absl::string_view file_name);

// Reads `folder`/config.json. NotFound when there is none.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder);

// Checks the relations between the fields that every user relies on (all sizes
// positive and bounded, Hq * d == D, Hq % Hk == 0, ids inside the vocabulary).
// `source` begins the message. The reader and the catalogue of shapes both end
// with it, so a config in hand has passed.
absl::Status CheckModelConfig(const ModelConfig& config, absl::string_view source);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_MODEL_CONFIG_H_
