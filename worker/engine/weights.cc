#include "worker/engine/weights.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "worker/engine/safetensors.h"

namespace kvsweep {
namespace {

constexpr int64_t kAlignment = 256;         // bytes
constexpr size_t kStagingFloats = 2 << 20;  // of a tensor at a time, on its way to the device
constexpr float kRandomDeviation = 0.02f;

enum class Fill { kNormal, kOne, kZero };  // how RandomWeights makes a tensor

// One tensor of the checkpoint and its place in the storage.
struct Placement {
  std::string name;  // without the leading "model."
  std::vector<int64_t> shape;
  Fill fill = Fill::kNormal;
  DType dtype = DType::kF32;  // in the storage
  int64_t offset = 0;         // bytes from the start of the storage
  int64_t count = 0;          // elements
};

// Walks over the tensors of a model, gives each its place and, once there is
// storage, the pointers to them. The walk below runs twice: first to learn the
// size, then with the allocation in hand, so the two cannot disagree.
class Planner {
 public:
  // `storage` is nullptr in the first walk.
  Planner(std::byte* storage, DType matrix_dtype)
      : storage_(storage), matrix_dtype_(matrix_dtype) {}

  // Places matrices of the same width, one below the other.
  MatrixWeights Matrix(std::vector<Placement> parts) {
    MatrixWeights matrix{.columns = parts[0].shape[1]};
    for (const Placement& part : parts) matrix.rows += part.shape[0];
    matrix.data = Place(std::move(parts), matrix_dtype_);
    return matrix;
  }

  // Places vectors, one behind the other.
  const float* Vector(std::vector<Placement> parts) {
    return reinterpret_cast<const float*>(Place(std::move(parts), DType::kF32));
  }

  int64_t end() const { return end_; }
  const std::vector<Placement>& placements() const { return placements_; }

 private:
  const std::byte* Place(std::vector<Placement> parts, DType dtype) {
    end_ = (end_ + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t begin = end_;
    for (Placement& part : parts) {
      part.count = 1;
      for (const int64_t dimension : part.shape) part.count *= dimension;
      part.dtype = dtype;
      part.offset = end_;
      end_ += part.count * DTypeBytes(dtype);
      placements_.push_back(std::move(part));
    }
    return storage_ == nullptr ? nullptr : storage_ + begin;
  }

  std::byte* const storage_;
  const DType matrix_dtype_;
  int64_t end_ = 0;
  std::vector<Placement> placements_;
};

// A projection of the checkpoint: its name and how many rows it has.
struct Projection {
  std::string name;
  int64_t rows;
};

// Places projections of the same input of width `columns` as one matrix.
LinearWeights PlaceLinear(Planner& planner, const std::vector<Projection>& projections,
                          int64_t columns, bool bias) {
  std::vector<Placement> weights;
  std::vector<Placement> biases;
  for (const auto& [name, rows] : projections) {
    weights.push_back({.name = absl::StrCat(name, ".weight"), .shape = {rows, columns}});
    biases.push_back({.name = absl::StrCat(name, ".bias"), .shape = {rows}});
  }
  LinearWeights linear;
  linear.weight = planner.Matrix(std::move(weights));
  if (bias) linear.bias = planner.Vector(std::move(biases));
  return linear;
}

NormWeights PlaceNorm(Planner& planner, const ModelConfig& config, absl::string_view name) {
  NormWeights norm;
  norm.weight = planner.Vector(
      {{.name = absl::StrCat(name, ".weight"), .shape = {config.hidden_size}, .fill = Fill::kOne}});
  if (config.norm == NormKind::kLayer) {
    norm.bias = planner.Vector({{.name = absl::StrCat(name, ".bias"),
                                 .shape = {config.hidden_size},
                                 .fill = Fill::kZero}});
  }
  return norm;
}

// How an architecture's checkpoints name the parts of a model.
struct TensorNames {
  absl::string_view body;  // before all names but lm_head's
  absl::string_view attention_norm;
  absl::string_view attention_output;
  absl::string_view ffn_norm;
  std::vector<absl::string_view> ffn_in;
  absl::string_view ffn_out;
  absl::string_view final_norm;
};

TensorNames NamesOf(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return {.body = "",
              .attention_norm = "input_layernorm",
              .attention_output = "self_attn.o_proj",
              .ffn_norm = "post_attention_layernorm",
              .ffn_in = {"mlp.gate_proj", "mlp.up_proj"},
              .ffn_out = "mlp.down_proj",
              .final_norm = "norm"};
    case Architecture::kOpt:
      return {.body = "decoder.",
              .attention_norm = "self_attn_layer_norm",
              .attention_output = "self_attn.out_proj",
              .ffn_norm = "final_layer_norm",
              .ffn_in = {"fc1"},
              .ffn_out = "fc2",
              .final_norm = "final_layer_norm"};
  }
  KVSWEEP_CHECK(false);
  return {};
}

LayerWeights PlaceLayer(Planner& planner, const ModelConfig& config, const TensorNames& names,
                        int32_t index) {
  const std::string prefix = absl::StrCat(names.body, "layers.", index, ".");
  const auto named = [&](absl::string_view name) { return absl::StrCat(prefix, name); };
  const int64_t query_rows = int64_t{config.query_heads} * config.head_dim;
  const int64_t kv_rows = int64_t{config.kv_heads} * config.head_dim;
  std::vector<Projection> ffn_in;
  for (const absl::string_view name : names.ffn_in) {
    ffn_in.push_back({named(name), config.ffn_size});
  }
  LayerWeights layer;
  layer.attention_norm = PlaceNorm(planner, config, named(names.attention_norm));
  layer.qkv = PlaceLinear(planner,
                          {{named("self_attn.q_proj"), query_rows},
                           {named("self_attn.k_proj"), kv_rows},
                           {named("self_attn.v_proj"), kv_rows}},
                          config.hidden_size, config.qkv_bias);
  layer.attention_output =
      PlaceLinear(planner, {{named(names.attention_output), config.hidden_size}}, query_rows,
                  config.attention_output_bias);
  layer.ffn_norm = PlaceNorm(planner, config, named(names.ffn_norm));
  layer.ffn_in = PlaceLinear(planner, ffn_in, config.hidden_size, config.ffn_bias);
  layer.ffn_out = PlaceLinear(planner, {{named(names.ffn_out), config.hidden_size}},
                              config.ffn_size, config.ffn_bias);
  return layer;
}

// The whole model, tensor by tensor.
ModelWeights PlaceModel(Planner& planner, const ModelConfig& config) {
  const TensorNames names = NamesOf(config.architecture);
  const int64_t width = config.hidden_size;
  const int64_t embedding = config.embedding_size;
  const auto projection = [&](absl::string_view name, int64_t rows, int64_t columns) {
    return PlaceLinear(planner, {{absl::StrCat(names.body, name), rows}}, columns, false);
  };
  ModelWeights weights;
  weights.token_embedding =
      planner.Matrix({{.name = absl::StrCat(names.body, "embed_tokens.weight"),
                       .shape = {config.vocabulary, embedding}}});
  if (config.positions == PositionKind::kLearned) {
    weights.position_embedding =
        planner.Matrix({{.name = absl::StrCat(names.body, "embed_positions.weight"),
                         .shape = {config.max_positions + config.position_offset, width}}});
  }
  if (config.projects_embeddings()) weights.project_in = projection("project_in", width, embedding);
  for (int32_t index = 0; index < config.layers; ++index) {
    weights.layers.push_back(PlaceLayer(planner, config, names, index));
  }
  if (config.final_norm) {
    weights.final_norm = PlaceNorm(planner, config, absl::StrCat(names.body, names.final_norm));
  }
  if (config.projects_embeddings()) {
    weights.project_out = projection("project_out", embedding, width);
  }
  weights.output =
      config.tie_embeddings
          ? weights.token_embedding
          : planner.Matrix({{.name = "lm_head.weight", .shape = {config.vocabulary, embedding}}});
  return weights;
}

// Weights with their storage allocated, and what has to be put into it.
struct Allocated {
  ModelWeights weights;
  std::vector<Placement> placements;
};

absl::StatusOr<Allocated> Allocate(const ModelConfig& config, Backend* backend) {
  const DType dtype = backend->info().weight_dtype;
  const uint64_t bytes = WeightBytes(config, dtype);
  ASSIGN_OR_RETURN(std::byte * memory,
                   Annotate(backend->Allocate(Tier::kDevice, bytes), "weights"));
  Planner planner(memory, dtype);
  Allocated result;
  result.weights = PlaceModel(planner, config);
  result.placements = planner.placements();
  result.weights.storage = BackendMemory(memory, BackendFree{backend});
  result.weights.storage_bytes = bytes;
  return result;
}

// The way of f32 values to the device: pinned memory that is filled and sent piece by piece.
class Staging {
 public:
  static absl::StatusOr<Staging> Create(Backend* backend) {
    ASSIGN_OR_RETURN(std::byte * memory,
                     Annotate(backend->Allocate(Tier::kHost, kStagingFloats * sizeof(float)),
                              "staging of weights"));
    return Staging(backend, BackendMemory(memory, BackendFree{backend}));
  }

  // Stores `values` (at most kStagingFloats) as `dtype` at `target`, and waits for it.
  absl::Status Send(std::span<const float> values, DType dtype, std::byte* target) {
    FromFloats(values, dtype, memory_.get());
    backend_->Copy(target, memory_.get(), values.size() * static_cast<size_t>(DTypeBytes(dtype)),
                   Stream::kCompute);
    return backend_->WaitAll();
  }

 private:
  Staging(Backend* backend, BackendMemory memory) : backend_(backend), memory_(std::move(memory)) {}
  Backend* backend_;
  BackendMemory memory_;
};

// The tensors of a checkpoint, by their name without the leading "model.".
using Checkpointed = std::map<absl::string_view, const TensorView*>;

absl::StatusOr<Checkpointed> StripNames(const Checkpoint& checkpoint) {
  Checkpointed stripped;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const absl::string_view short_name = absl::StripPrefix(name, "model.");
    if (!stripped.emplace(short_name, &tensor).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          tensor.file, ": tensor ", name, " is stored both with and without \"model.\""));
    }
  }
  return stripped;
}

absl::Status CheckFinite(std::span<const float> values, size_t first, const TensorView& tensor,
                         const Placement& placement) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    return absl::DataLossError(absl::StrCat(tensor.file, ": tensor ", placement.name, " holds ",
                                            std::isnan(values[i]) ? "NaN" : "infinity",
                                            " at element ", first + i));
  }
  return absl::OkStatus();
}

// The tensor of the checkpoint that a placement asks for, its shape checked.
absl::StatusOr<const TensorView*> FindTensor(const Placement& placement,
                                             const Checkpointed& checkpoint,
                                             const std::string& folder) {
  const auto found = checkpoint.find(placement.name);
  if (found == checkpoint.end()) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": tensor ", placement.name,
                                                   " is missing; expected shape ",
                                                   ShapeText(placement.shape)));
  }
  const TensorView& tensor = *found->second;
  if (tensor.shape != placement.shape) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor.file, ": tensor ", placement.name, " has shape ", ShapeText(tensor.shape),
        "; config.json asks for ", ShapeText(placement.shape)));
  }
  return &tensor;
}

// Hands out the values of a tensor in pieces, checked to be finite; `first` is the element that a
// piece begins with.
template <typename Take>
absl::Status ReadTensor(const Placement& placement, const TensorView& tensor, Take take) {
  const auto count = static_cast<size_t>(placement.count);
  std::vector<float> values(std::min(count, kStagingFloats));
  for (size_t first = 0; first < count; first += values.size()) {
    values.resize(std::min(values.size(), count - first));
    ToFloats(tensor.bytes.data() + first * static_cast<size_t>(DTypeBytes(tensor.type)),
             tensor.type, values);
    RETURN_IF_ERROR(CheckFinite(values, first, tensor, placement));
    RETURN_IF_ERROR(take(values, first));
  }
  return absl::OkStatus();
}

absl::Status LoadTensor(const Placement& placement, const Checkpointed& checkpoint,
                        const std::string& folder, std::byte* storage, Staging* staging) {
  ASSIGN_OR_RETURN(const TensorView* tensor, FindTensor(placement, checkpoint, folder));
  return ReadTensor(placement, *tensor, [&](const std::vector<float>& values, size_t first) {
    return staging->Send(
        values, placement.dtype,
        storage + placement.offset + static_cast<int64_t>(first) * DTypeBytes(placement.dtype));
  });
}

// Tensors that the plan has no place for are a sign of a model that we would
// compute wrongly, with two harmless exceptions.
absl::Status CheckNothingLeft(const std::vector<Placement>& placements,
                              const Checkpointed& checkpoint, const ModelConfig& config) {
  std::set<absl::string_view> placed;
  for (const Placement& placement : placements) placed.insert(placement.name);
  for (const auto& [name, tensor] : checkpoint) {
    if (placed.contains(name)) continue;
    // Old Llama checkpoints store the table that rope_theta gives.
    if (config.positions == PositionKind::kRotary && absl::EndsWith(name, ".rotary_emb.inv_freq")) {
      continue;
    }
    // A tied matrix may be stored twice, if it is the same.
    if (config.tie_embeddings && name == "lm_head.weight") {
      const TensorView& embedding = *checkpoint.at(placements[0].name);
      if (tensor->type == embedding.type && tensor->shape == embedding.shape &&
          std::ranges::equal(tensor->bytes, embedding.bytes)) {
        continue;
      }
      return absl::InvalidArgumentError(
          absl::StrCat(tensor->file, ": tensor lm_head.weight differs from the embedding, ",
                       "although config.json says tie_word_embeddings"));
    }
    return absl::InvalidArgumentError(
        absl::StrCat(tensor->file, ": tensor ", name, " of shape ", ShapeText(tensor->shape),
                     " is not part of the model that config.json describes"));
  }
  return absl::OkStatus();
}

// Whether a file of a model folder is part of the model itself.
bool BelongsToModel(absl::string_view name) {
  return name == "config.json" || absl::EndsWith(name, ".safetensors") ||
         name == "model.safetensors.index.json" || name == "tokenizer.model" ||
         name == "tokenizer.json" ||
         (absl::StartsWith(name, "tok") && absl::EndsWith(name, ".bin"));
}

}  // namespace

uint64_t WeightBytes(const ModelConfig& config, DType weight_dtype) {
  Planner planner(nullptr, weight_dtype);
  PlaceModel(planner, config);
  return static_cast<uint64_t>(planner.end());
}

int64_t ParameterCount(const ModelConfig& config) {
  Planner planner(nullptr, DType::kF32);
  PlaceModel(planner, config);
  int64_t parameters = 0;
  for (const Placement& placement : planner.placements()) {
    parameters += placement.count;
  }
  return parameters;
}

absl::StatusOr<ModelWeights> LoadWeights(const std::string& folder, const ModelConfig& config,
                                         Backend* backend) {
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(folder));
  ASSIGN_OR_RETURN(const Checkpointed tensors, StripNames(checkpoint));
  ASSIGN_OR_RETURN(Allocated model, Allocate(config, backend));
  ASSIGN_OR_RETURN(Staging staging, Staging::Create(backend));
  for (const Placement& placement : model.placements) {
    RETURN_IF_ERROR(LoadTensor(placement, tensors, folder, model.weights.storage.get(), &staging));
  }
  RETURN_IF_ERROR(CheckNothingLeft(model.placements, tensors, config));
  return std::move(model.weights);
}

absl::StatusOr<ModelWeights> RandomWeights(const ModelConfig& config, uint64_t seed,
                                           Backend* backend) {
  ASSIGN_OR_RETURN(Allocated model, Allocate(config, backend));
  ASSIGN_OR_RETURN(Staging staging, Staging::Create(backend));
  for (size_t index = 0; index < model.placements.size(); ++index) {
    const Placement& placement = model.placements[index];
    std::byte* const target = model.weights.storage.get() + placement.offset;
    if (placement.fill == Fill::kNormal) {
      backend->FillNormal({.out = target,
                           .dtype = placement.dtype,
                           .count = placement.count,
                           .seed = MixSeed(seed, index),
                           .deviation = kRandomDeviation},
                          Stream::kCompute);
    } else {
      const std::vector<float> values(static_cast<size_t>(placement.count),
                                      placement.fill == Fill::kOne ? 1.0f : 0.0f);
      RETURN_IF_ERROR(staging.Send(values, placement.dtype, target));
    }
  }
  RETURN_IF_ERROR(backend->WaitAll());
  return std::move(model.weights);
}

absl::Status CheckModelFolder(const std::string& folder) {
  constexpr int64_t kReadBytes = int64_t{1} << 30;
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(folder));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(folder));
  ASSIGN_OR_RETURN(const Checkpointed tensors, StripNames(checkpoint));
  Planner planner(nullptr, DType::kF32);
  PlaceModel(planner, config);
  const bool reads = planner.end() <= kReadBytes;
  for (const Placement& placement : planner.placements()) {
    ASSIGN_OR_RETURN(const TensorView* tensor, FindTensor(placement, tensors, folder));
    if (!reads) continue;
    RETURN_IF_ERROR(ReadTensor(placement, *tensor,
                               [](const std::vector<float>&, size_t) { return absl::OkStatus(); }));
  }
  return CheckNothingLeft(planner.placements(), tensors, config);
}

absl::StatusOr<Digest> DigestModelFolder(const std::string& folder) {
  std::error_code error;
  std::set<std::string> names;
  for (auto entry = std::filesystem::directory_iterator(folder, error);
       !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (BelongsToModel(name)) names.insert(name);
  }
  if (error || !names.contains("config.json")) {
    return absl::NotFoundError(absl::StrCat("model folder ", folder, " has no config.json",
                                            error ? absl::StrCat(": ", error.message()) : ""));
  }
  DigestBuilder builder;
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(const Digest content, DigestFile(absl::StrCat(folder, "/", name)));
    builder.Add(name).Add(content.bytes());
  }
  return builder.Finish();
}

}  // namespace kvsweep
