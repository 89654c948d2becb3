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
#include "worker/strategies/model_shape.h"

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

// How the frequencies of rotary embeddings depart from theta^(-2j/d).
enum class RopeScaling {
  kNone,
  kLinear,  // all divided by a factor
  kLlama3,  // by wavelength: short ones stay, long ones are divided, a smooth passage between
};

enum class Activation { kSilu, kRelu };

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;

  // Dimensions. Hq % Hk == 0; Hq * d need not be D.
  int32_t hidden_size = 0;     // D
  int32_t layers = 0;          // L
  int32_t query_heads = 0;     // Hq
  int32_t kv_heads = 0;        // Hk
  int32_t head_dim = 0;        // d, even when positions are rotary
  int32_t ffn_size = 0;        // F
  int32_t vocabulary = 0;      // V
  int32_t embedding_size = 0;  // E, width of the embeddings; projected in and out where not D
  int32_t max_positions = 0;   // tokens that one sequence may have
  // Set where the model looks back that many tokens only. max_positions is then at most that: up
  // to there its attention is the full one.
  std::optional<int32_t> sliding_window;

  NormKind norm = NormKind::kRms;
  double norm_epsilon = 1e-5;
  bool norm_before = true;  // norms stand before attention and FFN, else after their residual sums
  bool final_norm = true;   // one more before the output matrix

  PositionKind positions = PositionKind::kRotary;
  double rope_theta = 10000;  // this and the next five: read only when positions are rotary
  RopeScaling rope_scaling = RopeScaling::kNone;
  double rope_factor = 1;
  double rope_low_frequency = 1;        // llama3: wavelengths past original / this are divided
  double rope_high_frequency = 4;       // llama3: those below original / this stay
  int32_t rope_original_positions = 0;  // llama3: context before scaling
  int32_t position_offset = 0;          // row of position 0 in the learned table

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
  bool projects_embeddings() const { return embedding_size != hidden_size; }
  // The dimensions that strategies need. Frequencies lie on a device: LoadedModel::shape.
  ModelShape shape() const;

  bool operator==(const ModelConfig&) const = default;
};

// The features that all models of an architecture share (norm, positions, biases
// and so on); its dimensions are still zero.
ModelConfig ArchitectureFeatures(Architecture architecture);

// Reads the text of a Hugging Face config.json of `model_type` llama, mistral,
// qwen2 or opt; fields that are absent take transformers' defaults. `file_name`
// only serves the messages. Every dimension is bounded (base/limits.h) and
// checked against the others. What would change the results and is not
// supported (rotary embeddings scaled otherwise than linear or llama3, other
// activations, quantisation, other model types) is refused by its field's name:
// InvalidArgument for a value that is wrong, Unimplemented for one that is a
// model we cannot run. A sliding window bounds max_positions instead.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json_text,
                                             absl::string_view file_name);

// Reads `folder`/config.json. NotFound when there is none.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder);

// Checks the relations between the fields that every user relies on (all sizes
// positive and bounded, Hq % Hk == 0, ids inside the vocabulary).
// `source` begins the message. The reader and the catalogue of shapes both end
// with it, so a config in hand has passed.
absl::Status CheckModelConfig(const ModelConfig& config, absl::string_view source);

// The angle by which each pair of a head's columns turns from one position to the next [d/2], in
// f32 arithmetic as transformers computes them. REQUIRES: rotary positions.
std::vector<float> InverseFrequencies(const ModelConfig& config);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_MODEL_CONFIG_H_
