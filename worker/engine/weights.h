// The weights of a model, by role, as f32.
//
// One contiguous allocation holds all of them. Matrices keep the layout of the
// checkpoints, [out, in], so a product is x · Wᵀ. What is always multiplied by
// the same input lies together as one matrix: Q, K and V, and gate and up.
// Every tensor (fused ones as a whole) starts on a boundary of 64 bytes.
//
// Which tensors there are, their shapes and where each goes is a plan made from
// the ModelConfig alone; loading from a folder and drawing at random are two
// ways of filling the same plan.
#ifndef KVSWEEP_WORKER_ENGINE_WEIGHTS_H_
#define KVSWEEP_WORKER_ENGINE_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/digest.h"
#include "worker/engine/model_config.h"

namespace kvsweep {

// A scale and a shift [D]; the shift is empty for NormKind::kRms.
struct NormWeights {
  std::span<const float> weight;  // [D]
  std::span<const float> bias;    // [D] or empty
};

// A linear map y = W x + b; the bias is empty where the model has none.
struct LinearWeights {
  std::span<const float> weight;  // [out, in]
  std::span<const float> bias;    // [out] or empty
};

struct LayerWeights {
  NormWeights attention_norm;      // before attention
  LinearWeights qkv;               // [(Hq + 2 Hk) d, D]: all Q, all K, all V
  LinearWeights attention_output;  // [D, Hq d]
  NormWeights ffn_norm;            // before the FFN
  LinearWeights ffn_in;            // [2F, D]: gate, then up; [F, D] if not gated
  LinearWeights ffn_out;           // [D, F]
};

struct ModelWeights {
  std::span<const float> token_embedding;     // [V, D]
  std::span<const float> position_embedding;  // [max + offset, D] or empty
  std::vector<LayerWeights> layers;           // [L]
  NormWeights final_norm;
  std::span<const float> output;  // [V, D]; the embedding itself when tied

  std::span<const float> storage;  // all of the above, with its padding
};

// Hands out `count` floats aligned to 64 bytes that outlive the weights, or
// nullptr when they cannot be had. Called once per model.
using FloatAllocator = std::function<float*(size_t count)>;

// How many floats the allocator will be asked for.
size_t WeightFloats(const ModelConfig& config);

// Parameters of the model, a tied matrix counted once, padding not at all.
int64_t ParameterCount(const ModelConfig& config);

// Reads the checkpoint of `folder` (safetensors.h) as `config` describes it.
// Names are accepted with and without the leading "model.". A tensor that is
// missing, superfluous, of another shape, or not finite is an error naming the
// tensor, its file, what was expected and what was found. A tied model may
// store its output matrix once more if it is the same. ResourceExhausted when
// the allocator returns nullptr. Takes one pass over the data.
absl::StatusOr<ModelWeights> LoadWeights(const std::string& folder, const ModelConfig& config,
                                         const FloatAllocator& allocate);

// Weights for a shape without a checkpoint: matrices and biases normal with
// standard deviation 0.02, norms one (their shifts zero), each tensor from a
// stream of its own, so that the same seed gives the same tensors.
absl::StatusOr<ModelWeights> RandomWeights(const ModelConfig& config, uint64_t seed,
                                           const FloatAllocator& allocate);

// The digest of what makes up a model: names and contents, in order of name, of
// config.json, the safetensors files with their index, and the tokenizer's
// files. Other files of the folder (reports, licences) do not count. NotFound
// when the folder has no config.json.
absl::StatusOr<Digest> DigestModelFolder(const std::string& folder);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_WEIGHTS_H_
