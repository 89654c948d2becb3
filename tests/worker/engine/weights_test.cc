#include "worker/engine/weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/worker/engine/model_folder.h"
#include "worker/engine/safetensors.h"
#include "worker/engine/shape_catalogue.h"

namespace kvsweep {
namespace {

// The CPU backend, whose device memory a test can read.
std::unique_ptr<Backend> NewBackend(uint64_t device_bytes = 0) {
  return CreateCpuBackend({.threads = 1, .device_memory_bytes = device_bytes}).value();
}

std::span<const float> Values(const MatrixWeights& matrix) {
  return {static_cast<const float*>(matrix.data),
          static_cast<size_t>(matrix.rows * matrix.columns)};
}

// A tensor of the checkpoint, widened.
std::vector<float> Widened(const Checkpoint& checkpoint, const std::string& name) {
  const TensorView* tensor = checkpoint.Find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(tensor->bytes.size() / DTypeBytes(tensor->type));
  WidenTensor(*tensor, values);
  return values;
}

// The tensors of the checkpoint one after the other: what a fused matrix must hold.
void ExpectHolds(const float* fused, const Checkpoint& checkpoint,
                 const std::vector<std::string>& names) {
  std::vector<float> expected;
  for (const std::string& name : names) {
    const std::vector<float> part = Widened(checkpoint, name);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), fused)) << names[0];
}
void ExpectHolds(const MatrixWeights& fused, const Checkpoint& checkpoint,
                 const std::vector<std::string>& names) {
  const TensorView* first = checkpoint.Find(names[0]);
  EXPECT_EQ(fused.columns, first->shape[1]) << names[0];
  ExpectHolds(static_cast<const float*>(fused.data), checkpoint, names);
}

TEST(WeightsTest, PlacesEveryTensorOfTheLlama) {
  const std::string folder = "experiments/models/books-llama-14m";
  const auto config = LoadModelConfig(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = LoadWeights(folder, *config, backend.get());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto checkpoint = Checkpoint::Open(folder);
  EXPECT_EQ(weights->storage_bytes, WeightBytes(*config, DType::kF32));
  EXPECT_EQ(backend->allocated_bytes(Tier::kDevice), weights->storage_bytes);
  EXPECT_EQ(backend->allocated_bytes(Tier::kHost), 0u);
  EXPECT_EQ(ParameterCount(*config), 28324608 / 2);  // total_size of the index, in bf16
  ExpectHolds(weights->token_embedding, *checkpoint, {"model.embed_tokens.weight"});
  EXPECT_EQ(weights->output.data, weights->token_embedding.data);
  EXPECT_EQ(weights->position_embedding.data, nullptr);
  ASSERT_EQ(weights->layers.size(), 8u);
  for (int i = 0; i < 8; ++i) {
    const LayerWeights& layer = weights->layers[i];
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    const std::string attention = prefix + "self_attn.";
    ExpectHolds(
        layer.qkv.weight, *checkpoint,
        {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"});
    EXPECT_EQ(layer.qkv.bias, nullptr);
    ExpectHolds(layer.attention_output.weight, *checkpoint, {attention + "o_proj.weight"});
    ExpectHolds(layer.ffn_in.weight, *checkpoint,
                {prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"});
    ExpectHolds(layer.ffn_out.weight, *checkpoint, {prefix + "mlp.down_proj.weight"});
    ExpectHolds(layer.attention_norm.weight, *checkpoint, {prefix + "input_layernorm.weight"});
    ExpectHolds(layer.ffn_norm.weight, *checkpoint, {prefix + "post_attention_layernorm.weight"});
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.qkv.weight.data) % 256, 0u);
  }
  ExpectHolds(weights->final_norm.weight, *checkpoint, {"model.norm.weight"});
}

TEST(WeightsTest, PlacesEveryTensorOfTheOpt) {
  const std::string folder = "experiments/models/books-opt-16m";
  const auto config = LoadModelConfig(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = LoadWeights(folder, *config, backend.get());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto checkpoint = Checkpoint::Open(folder);
  EXPECT_EQ(ParameterCount(*config), 33113088 / 2);
  const std::string decoder = "model.decoder.";
  ExpectHolds(weights->position_embedding, *checkpoint, {decoder + "embed_positions.weight"});
  EXPECT_EQ(weights->position_embedding.rows, 2050);
  for (int i = 0; i < 8; ++i) {
    const LayerWeights& layer = weights->layers[i];
    const std::string prefix = absl::StrCat(decoder, "layers.", i, ".");
    const std::string attention = prefix + "self_attn.";
    ExpectHolds(
        layer.qkv.weight, *checkpoint,
        {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"});
    ExpectHolds(layer.qkv.bias, *checkpoint,
                {attention + "q_proj.bias", attention + "k_proj.bias", attention + "v_proj.bias"});
    ExpectHolds(layer.attention_output.weight, *checkpoint, {attention + "out_proj.weight"});
    ExpectHolds(layer.attention_output.bias, *checkpoint, {attention + "out_proj.bias"});
    ExpectHolds(layer.ffn_in.weight, *checkpoint, {prefix + "fc1.weight"});
    ExpectHolds(layer.ffn_in.bias, *checkpoint, {prefix + "fc1.bias"});
    ExpectHolds(layer.ffn_out.weight, *checkpoint, {prefix + "fc2.weight"});
    ExpectHolds(layer.ffn_out.bias, *checkpoint, {prefix + "fc2.bias"});
    ExpectHolds(layer.attention_norm.bias, *checkpoint, {prefix + "self_attn_layer_norm.bias"});
    ExpectHolds(layer.ffn_norm.weight, *checkpoint, {prefix + "final_layer_norm.weight"});
  }
  ExpectHolds(weights->final_norm.weight, *checkpoint, {decoder + "final_layer_norm.weight"});
  ExpectHolds(weights->final_norm.bias, *checkpoint, {decoder + "final_layer_norm.bias"});
}

TEST(WeightsTest, ReadsASingleFileInFloat32) {
  const std::string folder = "experiments/models/stories260K";
  const auto config = LoadModelConfig(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(ParameterCount(*config), 260032);
  const std::unique_ptr<Backend> backend = NewBackend();
  EXPECT_TRUE(LoadWeights(folder, *config, backend.get()).ok());
}

// The smallest Llama, as tensors, for the folders below.
std::string SmallConfig(bool tied) {
  return absl::StrCat(
      R"({"model_type":"llama","hidden_size":4,"intermediate_size":6,"num_hidden_layers":1,)",
      R"("num_attention_heads":2,"num_key_value_heads":1,"vocab_size":5,)",
      R"("max_position_embeddings":8,"tie_word_embeddings":)", tied ? "true" : "false", "}");
}

TestTensor Filled(std::vector<int64_t> shape, float value) {
  size_t count = 1;
  for (const int64_t dimension : shape) count *= dimension;
  return {std::move(shape), std::vector<float>(count, value)};
}

std::map<std::string, TestTensor> SmallTensors(const std::string& prefix) {
  const std::string layer = prefix + "layers.0.";
  return {{prefix + "embed_tokens.weight", Filled({5, 4}, 1)},
          {layer + "input_layernorm.weight", Filled({4}, 2)},
          {layer + "self_attn.q_proj.weight", Filled({4, 4}, 3)},
          {layer + "self_attn.k_proj.weight", Filled({2, 4}, 4)},
          {layer + "self_attn.v_proj.weight", Filled({2, 4}, 5)},
          {layer + "self_attn.o_proj.weight", Filled({4, 4}, 6)},
          {layer + "post_attention_layernorm.weight", Filled({4}, 7)},
          {layer + "mlp.gate_proj.weight", Filled({6, 4}, 8)},
          {layer + "mlp.up_proj.weight", Filled({6, 4}, 9)},
          {layer + "mlp.down_proj.weight", Filled({4, 6}, 10)},
          {prefix + "norm.weight", Filled({4}, 11)}};
}

// What loading says to a folder of that config and those tensors.
std::string Load(const std::string& config_text, const std::map<std::string, TestTensor>& tensors) {
  const TempDir folder;
  WriteOrDie(folder, "config.json", config_text);
  WriteOrDie(folder, "model.safetensors", SafetensorsBytes(tensors));
  const auto config = LoadModelConfig(folder.path());
  EXPECT_TRUE(config.ok()) << config.status();
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = LoadWeights(folder.path(), *config, backend.get());
  return weights.ok() ? "loaded" : Shown(weights.status(), folder);
}

TEST(WeightsTest, AcceptsNamesWithAndWithoutPrefixButNotBoth) {
  EXPECT_EQ(Load(SmallConfig(true), SmallTensors("model.")), "loaded");
  EXPECT_EQ(Load(SmallConfig(true), SmallTensors("")), "loaded");
  auto tensors = SmallTensors("model.");
  tensors["norm.weight"] = Filled({4}, 1);
  EXPECT_EQ(Load(SmallConfig(true), tensors),
            "INVALID_ARGUMENT: DIR/model.safetensors: tensor norm.weight is stored both with and "
            "without \"model.\"");
}

TEST(WeightsTest, KnowsTheOutputMatrixByTheConfig) {
  auto tensors = SmallTensors("model.");
  EXPECT_EQ(Load(SmallConfig(false), tensors),
            "INVALID_ARGUMENT: DIR: tensor lm_head.weight is missing; expected shape [5, 4]");
  tensors["lm_head.weight"] = Filled({5, 4}, 1);
  EXPECT_EQ(Load(SmallConfig(false), tensors), "loaded");
  EXPECT_EQ(Load(SmallConfig(true), tensors), "loaded");  // the same matrix, stored twice
  tensors["lm_head.weight"].values[3] = 7;
  EXPECT_EQ(Load(SmallConfig(true), tensors),
            "INVALID_ARGUMENT: DIR/model.safetensors: tensor lm_head.weight differs from the "
            "embedding, although config.json says tie_word_embeddings");
}

TEST(WeightsTest, RefusesTensorsThatDoNotFitTheConfig) {
  auto missing = SmallTensors("model.");
  missing.erase("model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(Load(SmallConfig(true), missing),
            "INVALID_ARGUMENT: DIR: tensor layers.0.mlp.up_proj.weight is missing; expected shape "
            "[6, 4]");
  auto superfluous = SmallTensors("model.");
  superfluous["model.layers.0.self_attn.q_proj.bias"] = Filled({4}, 1);
  EXPECT_EQ(Load(SmallConfig(true), superfluous),
            "INVALID_ARGUMENT: DIR/model.safetensors: tensor layers.0.self_attn.q_proj.bias of "
            "shape [4] is not part of the model that config.json describes");
  auto transposed = SmallTensors("model.");
  transposed["model.layers.0.mlp.down_proj.weight"] = Filled({6, 4}, 1);
  EXPECT_EQ(Load(SmallConfig(true), transposed),
            "INVALID_ARGUMENT: DIR/model.safetensors: tensor layers.0.mlp.down_proj.weight has "
            "shape [6, 4]; config.json asks for [4, 6]");
  auto rotary = SmallTensors("model.");
  rotary["model.layers.0.self_attn.rotary_emb.inv_freq"] = Filled({1}, 1);
  EXPECT_EQ(Load(SmallConfig(true), rotary), "loaded");
}

TEST(WeightsTest, RefusesValuesThatAreNotFinite) {
  auto tensors = SmallTensors("model.");
  tensors["model.layers.0.self_attn.k_proj.weight"].values[6] = NAN;
  EXPECT_EQ(Load(SmallConfig(true), tensors),
            "DATA_LOSS: DIR/model.safetensors: tensor layers.0.self_attn.k_proj.weight holds NaN "
            "at element 6");
  tensors = SmallTensors("model.");
  tensors["model.norm.weight"].values[0] = -INFINITY;
  EXPECT_EQ(Load(SmallConfig(true), tensors),
            "DATA_LOSS: DIR/model.safetensors: tensor norm.weight holds infinity at element 0");
}

TEST(WeightsTest, RefusesATruncatedShard) {
  const std::string source = "experiments/models/books-llama-14m/";
  const TempDir folder;
  for (const std::string name :
       {"config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors"}) {
    std::filesystem::copy(source + name, folder.Join(name));
  }
  std::filesystem::permissions(folder.Join("model-00002-of-00002.safetensors"),
                               std::filesystem::perms::owner_all);
  std::filesystem::resize_file(folder.Join("model-00002-of-00002.safetensors"), 10'000'000);
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = LoadWeights(folder.path(), *LoadModelConfig(folder.path()), backend.get());
  const std::string message = Shown(weights.status(), folder);
  EXPECT_TRUE(absl::StartsWith(message, "DATA_LOSS: DIR/model-00002-of-00002.safetensors: tensor "))
      << message;
  EXPECT_TRUE(absl::EndsWith(message, "is the file cut short?")) << message;
}

TEST(WeightsTest, SaysWhatIsAskedOfADeviceThatIsTooSmall) {
  const auto config = FindShape("tiny-opt");
  const std::unique_ptr<Backend> backend = NewBackend(1000);
  const auto weights = RandomWeights(*config, 1, backend.get());
  EXPECT_EQ(weights.status().ToString(),
            absl::StrCat("RESOURCE_EXHAUSTED: weights: device memory: asked ",
                         WeightBytes(*config, DType::kF32), ", available 1000 of 1000 bytes"));
  EXPECT_EQ(backend->allocated_bytes(Tier::kDevice), 0u);
}

TEST(WeightsTest, NarrowMatricesTakeHalfTheBytes) {
  const auto config = FindShape("llama-3.1-8b");
  const uint64_t wide = WeightBytes(*config, DType::kF32);
  const uint64_t narrow = WeightBytes(*config, DType::kBf16);
  EXPECT_GT(narrow, wide / 2);
  EXPECT_LT(narrow, wide / 2 + (uint64_t{2} << 20));  // norms stay f32
}

TEST(WeightsTest, RandomWeightsFollowTheSeed) {
  const auto config = FindShape("tiny-opt");
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = RandomWeights(*config, 5, backend.get());
  ASSERT_TRUE(weights.ok());
  const auto same = RandomWeights(*config, 5, backend.get());
  const auto different = RandomWeights(*config, 6, backend.get());
  const auto bytes = [](const ModelWeights& all) {
    return std::span<const std::byte>(all.storage.get(), all.storage_bytes);
  };
  EXPECT_TRUE(std::ranges::equal(bytes(*weights), bytes(*same)));
  EXPECT_FALSE(std::ranges::equal(bytes(*weights), bytes(*different)));
}

TEST(WeightsTest, RandomWeightsHaveTheirDistribution) {
  const auto config = FindShape("tiny-opt");
  const std::unique_ptr<Backend> backend = NewBackend();
  const auto weights = RandomWeights(*config, 5, backend.get());
  for (const LayerWeights& layer : weights->layers) {
    double sum = 0;
    double squares = 0;
    for (const float value : Values(layer.qkv.weight)) {
      sum += value;
      squares += double{value} * value;
    }
    const auto count = static_cast<double>(Values(layer.qkv.weight).size());
    // Five standard errors of the mean and of the deviation over 12,288 draws.
    EXPECT_NEAR(sum / count, 0, 5 * 0.02 / std::sqrt(count));
    EXPECT_NEAR(std::sqrt(squares / count), 0.02, 5 * 0.02 / std::sqrt(2 * count));
    const int width = config->hidden_size;
    EXPECT_EQ(std::count(layer.ffn_norm.weight, layer.ffn_norm.weight + width, 1.0f), width);
    EXPECT_EQ(std::count(layer.ffn_norm.bias, layer.ffn_norm.bias + width, 0.0f), width);
    EXPECT_NE(layer.qkv.bias[0], 0.0f);
  }
}

TEST(WeightsTest, FolderDigestCoversWhatMakesTheModel) {
  const TempDir folder;
  WriteOrDie(folder, "model.safetensors", "weights");
  EXPECT_EQ(Shown(DigestModelFolder(folder.path()).status(), folder),
            "NOT_FOUND: model folder DIR has no config.json");
  WriteOrDie(folder, "config.json", "{}");
  const Digest before = *DigestModelFolder(folder.path());
  WriteOrDie(folder, "report.json", "a report");
  EXPECT_EQ(*DigestModelFolder(folder.path()), before);
  WriteOrDie(folder, "tokenizer.model", "pieces");
  const Digest with_tokenizer = *DigestModelFolder(folder.path());
  EXPECT_NE(with_tokenizer, before);
  WriteOrDie(folder, "config.json", "{ }");
  EXPECT_NE(*DigestModelFolder(folder.path()), with_tokenizer);
  EXPECT_EQ(DigestModelFolder(folder.Join("nowhere")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvsweep
