#include "worker/engine/weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "tests/worker/engine/model_folder.h"
#include "worker/engine/safetensors.h"
#include "worker/engine/shape_catalogue.h"

namespace kvsweep {
namespace {

// An allocator for one model that keeps its memory as long as it lives.
class Memory {
 public:
  FloatAllocator allocator() {
    return [this](size_t count) {
      const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      storage_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      count_ = count;
      return storage_.get();
    };
  }
  size_t count() const { return count_; }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> storage_;
  size_t count_ = 0;
};

// A tensor of the checkpoint, widened.
std::vector<float> Widened(const Checkpoint& checkpoint, const std::string& name) {
  const TensorView* tensor = checkpoint.Find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(tensor->bytes.size() / DTypeBytes(tensor->type));
  WidenTensor(*tensor, values);
  return values;
}

// The tensors of the checkpoint one after the other: what a fused matrix must hold.
void ExpectHolds(std::span<const float> fused, const Checkpoint& checkpoint,
                 const std::vector<std::string>& names) {
  std::vector<float> expected;
  for (const std::string& name : names) {
    const std::vector<float> part = Widened(checkpoint, name);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  EXPECT_TRUE(std::ranges::equal(fused, expected)) << names[0];
}

TEST(WeightsTest, PlacesEveryTensorOfTheLlama) {
  const std::string folder = "experiments/models/books-llama-14m";
  const auto config = LoadModelConfig(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  Memory memory;
  const auto weights = LoadWeights(folder, *config, memory.allocator());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_EQ(memory.count(), WeightFloats(*config));
  EXPECT_EQ(ParameterCount(*config), 28324608 / 2);  // total_size of the index, in bf16
  ExpectHolds(weights->token_embedding, *checkpoint, {"model.embed_tokens.weight"});
  EXPECT_EQ(weights->output.data(), weights->token_embedding.data());
  EXPECT_TRUE(weights->position_embedding.empty());
  ASSERT_EQ(weights->layers.size(), 8u);
  for (int i = 0; i < 8; ++i) {
    const LayerWeights& layer = weights->layers[i];
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    const std::string attention = prefix + "self_attn.";
    ExpectHolds(
        layer.qkv.weight, *checkpoint,
        {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"});
    EXPECT_TRUE(layer.qkv.bias.empty());
    ExpectHolds(layer.attention_output.weight, *checkpoint, {attention + "o_proj.weight"});
    ExpectHolds(layer.ffn_in.weight, *checkpoint,
                {prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"});
    ExpectHolds(layer.ffn_out.weight, *checkpoint, {prefix + "mlp.down_proj.weight"});
    ExpectHolds(layer.attention_norm.weight, *checkpoint, {prefix + "input_layernorm.weight"});
    ExpectHolds(layer.ffn_norm.weight, *checkpoint, {prefix + "post_attention_layernorm.weight"});
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.qkv.weight.data()) % 64, 0u);
  }
  ExpectHolds(weights->final_norm.weight, *checkpoint, {"model.norm.weight"});
}

TEST(WeightsTest, PlacesEveryTensorOfTheOpt) {
  const std::string folder = "experiments/models/books-opt-16m";
  const auto config = LoadModelConfig(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  Memory memory;
  const auto weights = LoadWeights(folder, *config, memory.allocator());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto checkpoint = Checkpoint::Open(folder);
  EXPECT_EQ(ParameterCount(*config), 33113088 / 2);
  const std::string decoder = "model.decoder.";
  ExpectHolds(weights->position_embedding, *checkpoint, {decoder + "embed_positions.weight"});
  EXPECT_EQ(weights->position_embedding.size(), 2050u * 384u);
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
  Memory memory;
  EXPECT_TRUE(LoadWeights(folder, *config, memory.allocator()).ok());
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
  Memory memory;
  const auto weights = LoadWeights(folder.path(), *config, memory.allocator());
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
  Memory memory;
  const auto weights =
      LoadWeights(folder.path(), *LoadModelConfig(folder.path()), memory.allocator());
  const std::string message = Shown(weights.status(), folder);
  EXPECT_TRUE(absl::StartsWith(message, "DATA_LOSS: DIR/model-00002-of-00002.safetensors: tensor "))
      << message;
  EXPECT_TRUE(absl::EndsWith(message, "is the file cut short?")) << message;
}

TEST(WeightsTest, SaysWhenTheAllocatorHasNothingLeft) {
  const auto config = FindShape("tiny-opt");
  const auto weights = RandomWeights(*config, 1, [](size_t) -> float* { return nullptr; });
  EXPECT_EQ(weights.status().ToString(),
            absl::StrCat("RESOURCE_EXHAUSTED: no memory for weights of ",
                         WeightFloats(*config) * sizeof(float), " bytes"));
}

TEST(WeightsTest, RandomWeightsFollowTheSeed) {
  const auto config = FindShape("tiny-opt");
  Memory first, again, other;
  const auto weights = RandomWeights(*config, 5, first.allocator());
  ASSERT_TRUE(weights.ok());
  const auto same = RandomWeights(*config, 5, again.allocator());
  const auto different = RandomWeights(*config, 6, other.allocator());
  EXPECT_TRUE(std::ranges::equal(weights->storage, same->storage));
  EXPECT_FALSE(std::ranges::equal(weights->storage, different->storage));
}

TEST(WeightsTest, RandomWeightsHaveTheirDistribution) {
  const auto config = FindShape("tiny-opt");
  Memory memory;
  const auto weights = RandomWeights(*config, 5, memory.allocator());
  for (const LayerWeights& layer : weights->layers) {
    double sum = 0;
    double squares = 0;
    for (const float value : layer.qkv.weight) {
      sum += value;
      squares += double{value} * value;
    }
    const auto count = static_cast<double>(layer.qkv.weight.size());
    // Five standard errors of the mean and of the deviation over 12,288 draws.
    EXPECT_NEAR(sum / count, 0, 5 * 0.02 / std::sqrt(count));
    EXPECT_NEAR(std::sqrt(squares / count), 0.02, 5 * 0.02 / std::sqrt(2 * count));
    EXPECT_EQ(std::ranges::count(layer.ffn_norm.weight, 1.0f), config->hidden_size);
    EXPECT_EQ(std::ranges::count(layer.ffn_norm.bias, 0.0f), config->hidden_size);
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
