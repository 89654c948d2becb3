// Model folders drawn at random: any Llama, Mistral, Qwen2 or OPT that a config.json can describe,
// small enough to compute by hand.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_RANDOM_MODEL_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_RANDOM_MODEL_H_

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "nlohmann/json.hpp"
#include "tests/worker/engine/model_folder.h"

namespace kvsweep {

struct RandomModel {
  nlohmann::json config;
  std::map<std::string, TestTensor> tensors;

  // Writes the folder, in one safetensors file or in `shards` with an index.
  void Write(const TempDir& folder, int shards) const {
    WriteOrDie(folder, "config.json", config.dump());
    if (shards == 1) return WriteOrDie(folder, "model.safetensors", SafetensorsBytes(tensors));
    std::vector<std::map<std::string, TestTensor>> parts(static_cast<size_t>(shards));
    nlohmann::json index;
    size_t next = 0;
    for (const auto& [name, tensor] : tensors) {
      const size_t part = next++ % parts.size();
      parts[part][name] = tensor;
      index["weight_map"][name] = ShardName(part, parts.size());
    }
    WriteOrDie(folder, "model.safetensors.index.json", index.dump());
    for (size_t part = 0; part < parts.size(); ++part) {
      WriteOrDie(folder, ShardName(part, parts.size()), SafetensorsBytes(parts[part]));
    }
  }

  static std::string ShardName(size_t part, size_t parts) {
    return absl::StrCat("model-0000", part + 1, "-of-0000", parts, ".safetensors");
  }
};

class RandomModelBuilder {
 public:
  explicit RandomModelBuilder(uint64_t seed) : random_(seed) {}

  RandomModel Draw() {
    const std::string type = Pick<std::string>({"llama", "mistral", "qwen2", "opt"});
    model_ = {};
    config()["model_type"] = type;
    config()["vocab_size"] = Pick<int>({61, 128});
    config()["num_hidden_layers"] = Pick<int>({1, 2, 3});
    config()["max_position_embeddings"] = 256;
    if (type == "opt") {
      DrawOpt();
    } else {
      DrawLlama(type);
    }
    return model_;
  }

 private:
  nlohmann::json& config() { return model_.config; }
  bool Coin() { return random_.Bernoulli(0.5); }
  template <typename T>
  T Pick(const std::vector<T>& values) {
    return values[random_.Uniform(values.size())];
  }

  // Weights that keep activations near one, so that every part of the model shows in the logits.
  void Matrix(const std::string& name, int64_t rows, int64_t columns) {
    Tensor(name, {rows, columns}, 0, 1 / std::sqrt(static_cast<double>(columns)));
  }
  void Tensor(const std::string& name, std::vector<int64_t> shape, double mean, double deviation) {
    int64_t count = 1;
    for (const int64_t dimension : shape) count *= dimension;
    TestTensor tensor{.shape = std::move(shape), .values = {}};
    for (int64_t i = 0; i < count; ++i) {
      tensor.values.push_back(static_cast<float>(mean + deviation * random_.Normal()));
    }
    model_.tensors[name] = std::move(tensor);
  }
  void Linear(const std::string& name, int64_t rows, int64_t columns, bool bias) {
    Matrix(name + ".weight", rows, columns);
    if (bias) Tensor(name + ".bias", {rows}, 0, 0.3);
  }
  void Norm(const std::string& name, int64_t width, bool bias) {
    Tensor(name + ".weight", {width}, 1, 0.2);
    if (bias) Tensor(name + ".bias", {width}, 0, 0.2);
  }
  void Embedding(const std::string& name, int64_t rows, int64_t width) {
    Tensor(name, {rows, width}, 0, 1);
  }

  void DrawLlama(const std::string& type) {
    const int hidden = Pick<int>({32, 48, 64});
    const int group = Pick<int>({1, 2, 3, 4, 7});
    const int kv_heads = Pick<int>({1, 2});
    const int heads = group * kv_heads;
    const int head_dim = Pick<int>({8, 10, 16, 64, 128});
    const int ffn = Pick<int>({40, 96});
    const bool tied = Coin();
    config()["hidden_size"] = hidden;
    config()["intermediate_size"] = ffn;
    config()["num_attention_heads"] = heads;
    config()["num_key_value_heads"] = kv_heads;
    config()["head_dim"] = head_dim;
    config()["tie_word_embeddings"] = tied;
    config()["rms_norm_eps"] = Pick<double>({1e-6, 1e-5, 0.01});
    config()["rope_theta"] = Pick<double>({100, 10000, 1e6});
    DrawRopeScaling();
    bool qkv_bias = type == "qwen2";
    bool output_bias = false;
    bool ffn_bias = false;
    if (type == "mistral") config()["sliding_window"] = nullptr;
    if (type == "qwen2") config()["use_sliding_window"] = false;
    if (type == "llama") {
      config()["attention_bias"] = qkv_bias = output_bias = Coin();
      config()["mlp_bias"] = ffn_bias = Coin();
    }
    const int vocabulary = config()["vocab_size"];
    Embedding("model.embed_tokens.weight", vocabulary, hidden);
    for (int layer = 0; layer < config()["num_hidden_layers"].get<int>(); ++layer) {
      const std::string at = absl::StrCat("model.layers.", layer, ".");
      Norm(at + "input_layernorm", hidden, false);
      Norm(at + "post_attention_layernorm", hidden, false);
      Linear(at + "self_attn.q_proj", heads * head_dim, hidden, qkv_bias);
      Linear(at + "self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias);
      Linear(at + "self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias);
      Linear(at + "self_attn.o_proj", hidden, heads * head_dim, output_bias);
      Linear(at + "mlp.gate_proj", ffn, hidden, ffn_bias);
      Linear(at + "mlp.up_proj", ffn, hidden, ffn_bias);
      Linear(at + "mlp.down_proj", hidden, ffn, ffn_bias);
    }
    Norm("model.norm", hidden, false);
    if (!tied) Matrix("lm_head.weight", vocabulary, hidden);
  }

  void DrawRopeScaling() {
    const int kind = Pick<int>({0, 1, 2});
    if (kind == 1) config()["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 2.5}};
    if (kind == 2) {
      // So short an original context that the wavelengths of even a small head lie in all bands.
      config()["rope_scaling"] = {{"rope_type", "llama3"},
                                  {"factor", 8.0},
                                  {"low_freq_factor", 1.0},
                                  {"high_freq_factor", 4.0},
                                  {"original_max_position_embeddings", 40}};
    }
  }

  void DrawOpt() {
    const int heads = Pick<int>({1, 2, 3, 4});
    const int hidden = heads * Pick<int>({8, 20, 64});
    const int ffn = Pick<int>({40, 96});
    const bool norm_before = Coin();
    const bool final_norm = norm_before && Coin();
    const bool bias = Coin();
    const int embedding = Coin() ? hidden : Pick<int>({24, 80});
    config()["hidden_size"] = hidden;
    config()["ffn_dim"] = ffn;
    config()["num_attention_heads"] = heads;
    config()["do_layer_norm_before"] = norm_before;
    config()["word_embed_proj_dim"] = embedding;
    if (norm_before && !final_norm) config()["_remove_final_layer_norm"] = true;
    if (!bias) config()["enable_bias"] = false;
    const std::string body = "model.decoder.";
    Embedding(body + "embed_tokens.weight", config()["vocab_size"], embedding);
    Embedding(body + "embed_positions.weight", 256 + 2, hidden);
    if (embedding != hidden) {
      Linear(body + "project_in", hidden, embedding, false);
      Linear(body + "project_out", embedding, hidden, false);
    }
    for (int layer = 0; layer < config()["num_hidden_layers"].get<int>(); ++layer) {
      const std::string at = absl::StrCat(body, "layers.", layer, ".");
      Norm(at + "self_attn_layer_norm", hidden, true);
      Norm(at + "final_layer_norm", hidden, true);
      for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
        Linear(absl::StrCat(at, "self_attn.", name), hidden, hidden, bias);
      }
      Linear(at + "fc1", ffn, hidden, bias);
      Linear(at + "fc2", hidden, ffn, bias);
    }
    if (final_norm) Norm(body + "final_layer_norm", hidden, true);
  }

  Random random_;
  RandomModel model_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_RANDOM_MODEL_H_
