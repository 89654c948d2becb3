// The weights of a model, by role, on a backend's device: matrices in the backend's weight type,
// norms and biases as f32.
//
// One contiguous allocation holds all of them. Matrices keep the layout of the
// checkpoints, [out, in], so a product is x · Wᵀ. What is always multiplied by
// the same input lies together as one matrix: Q, K and V, and gate and up.
// Every tensor (fused ones as a whole) starts on a boundary of 256 bytes.
//
// Which tensors there are, their shapes and where each goes is a plan made from
// the ModelConfig alone; loading from a folder and drawing at random are two
// ways of filling the same plan.
#ifndef KVSWEEP_WORKER_ENGINE_WEIGHTS_H_
#define KVSWEEP_WORKER_ENGINE_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/digest.h"
#include "kernels/backend.h"
#include "worker/engine/model_config.h"

namespace kvsweep {

// A matrix of the backend's weight type, row after row.
struct MatrixWeights {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
};

// A scale and a shift [D]; the shift is nullptr for NormKind::kRms.
struct NormWeights {
  const float* weight = nullptr;  // [D]
  const float* bias = nullptr;    // [D] or nullptr
};

// A linear map y = W x + b; the bias is nullptr where the model has none.
struct LinearWeights {
  MatrixWeights weight;         // [out, in]
  const float* bias = nullptr;  // [out] or nullptr
};

struct LayerWeights {
  NormWeights attention_norm;      // before attention, or after it (ModelConfig::norm_before)
  LinearWeights qkv;               // [(Hq + 2 Hk) d, D]: all Q, all K, all V
  LinearWeights attention_output;  // [D, Hq d]
  NormWeights ffn_norm;            // likewise of the FFN
  LinearWeights ffn_in;            // [2F, D]: gate, then up; [F, D] if not gated
  LinearWeights ffn_out;           // [D, F]
};

// Gives memory back to the backend that it came from.
struct BackendFree {
  Backend* backend = nullptr;
  void operator()(std::byte* memory) const { backend->Free(memory); }
};
using BackendMemory = std::unique_ptr<std::byte, BackendFree>;

struct ModelWeights {
  MatrixWeights token_embedding;     // [V, E]
  MatrixWeights position_embedding;  // [max + offset, D]; data nullptr: none
  LinearWeights project_in;          // [D, E]; data nullptr where E = D
  std::vector<LayerWeights> layers;  // [L]
  NormWeights final_norm;            // weight nullptr where the model has none
  LinearWeights project_out;         // [E, D]; data nullptr where E = D
  MatrixWeights output;              // [V, E]; the embedding itself when tied

  BackendMemory storage;  // all of the above, its gaps zero
  uint64_t storage_bytes = 0;
};

// Device bytes of a model whose matrices are of that type.
uint64_t WeightBytes(const ModelConfig& config, DType weight_dtype);

// Parameters of the model, a tied matrix counted once, padding not at all.
int64_t ParameterCount(const ModelConfig& config);

// Reads the checkpoint of `folder` (safetensors.h) as `config` describes it.
// Names are accepted with and without the leading "model.". A tensor that is
// missing, superfluous, of another shape, or not finite is an error naming the
// tensor, its file, what was expected and what was found. A tied model may
// store its output matrix once more if it is the same. ResourceExhausted when
// the weights do not fit. Takes one pass over the data, through a pinned buffer
// of a few MiB whatever the size of the model.
absl::StatusOr<ModelWeights> LoadWeights(const std::string& folder, const ModelConfig& config,
                                         Backend* backend);

// Weights for a shape without a checkpoint: matrices and biases normal with
// standard deviation 0.02, norms one (their shifts zero), each tensor from a
// stream of its own, so that the same seed gives the same tensors on every
// backend, up to the rounding of its weight type.
absl::StatusOr<ModelWeights> RandomWeights(const ModelConfig& config, uint64_t seed,
                                           Backend* backend);

// Checks a model folder without loading it: config.json, the headers of all safetensors files, every
// tensor's name and shape, and, in models of up to 1 GiB, that no value is NaN or infinite. Errors
// as of LoadModelConfig and LoadWeights.
absl::Status CheckModelFolder(const std::string& folder);

// The digest of what makes up a model: names and contents, in order of name, of
// config.json, the safetensors files with their index, and the tokenizer's
// files. Other files of the folder (reports, licences) do not count. NotFound
// when the folder has no config.json.
absl::StatusOr<Digest> DigestModelFolder(const std::string& folder);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_WEIGHTS_H_
