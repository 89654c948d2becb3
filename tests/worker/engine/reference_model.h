// A second forward pass, to hold the engine's against: plain loops in double over a whole text at
// once, written from the models' published definitions (transformers' modelling code) and straight
// from config.json and the checkpoint's tensors. It shares no code with the engine: no ModelConfig,
// no fused matrices, no cache, no chunks.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_REFERENCE_MODEL_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_REFERENCE_MODEL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "tests/worker/engine/model_folder.h"

namespace kvsweep {

class ReferenceModel {
 public:
  using Rows = std::vector<std::vector<double>>;  // [tokens, width]

  ReferenceModel(nlohmann::json config, std::map<std::string, TestTensor> tensors)
      : config_(std::move(config)), tensors_(std::move(tensors)) {}

  // Logits of every position [tokens, V].
  Rows Logits(std::span<const int32_t> ids) const {
    return is_opt() ? OptLogits(ids) : LlamaLogits(ids);
  }

 private:
  bool is_opt() const { return config_["model_type"] == "opt"; }
  int Int(const char* name) const { return config_.at(name).get<int>(); }
  int IntOr(const char* name, int fallback) const { return config_.value(name, fallback); }

  const TestTensor* Find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  std::vector<double> RowOf(const std::string& name, int row) const {
    const TestTensor& table = tensors_.at(name);
    const auto width = static_cast<std::ptrdiff_t>(table.shape[1]);
    return {table.values.begin() + row * width, table.values.begin() + (row + 1) * width};
  }

  // x W^T + b, where there is a b.
  Rows Linear(const Rows& in, const std::string& name) const {
    const TestTensor& weight = tensors_.at(name + ".weight");
    const TestTensor* bias = Find(name + ".bias");
    Rows out;
    for (const std::vector<double>& x : in) {
      std::vector<double> y(static_cast<size_t>(weight.shape[0]));
      for (size_t row = 0; row < y.size(); ++row) {
        if (bias != nullptr) y[row] = bias->values[row];
        for (size_t i = 0; i < x.size(); ++i) y[row] += x[i] * weight.values[row * x.size() + i];
      }
      out.push_back(std::move(y));
    }
    return out;
  }

  Rows RmsNorm(Rows rows, const std::string& name) const {
    const TestTensor& weight = tensors_.at(name + ".weight");
    const double epsilon = config_.value("rms_norm_eps", 1e-6);
    for (std::vector<double>& x : rows) {
      double squares = 0;
      for (const double value : x) squares += value * value;
      const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
      for (size_t i = 0; i < x.size(); ++i) x[i] *= scale * weight.values[i];
    }
    return rows;
  }

  Rows LayerNorm(Rows rows, const std::string& name) const {
    const TestTensor& weight = tensors_.at(name + ".weight");
    const TestTensor& bias = tensors_.at(name + ".bias");
    for (std::vector<double>& x : rows) {
      double mean = 0;
      for (const double value : x) mean += value / static_cast<double>(x.size());
      double variance = 0;
      for (const double value : x) variance += (value - mean) * (value - mean);
      const double scale = 1 / std::sqrt(variance / static_cast<double>(x.size()) + 1e-5);
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = (x[i] - mean) * scale * weight.values[i] + bias.values[i];
      }
    }
    return rows;
  }

  static void Add(Rows& sum, const Rows& other) {
    for (size_t t = 0; t < sum.size(); ++t) {
      for (size_t i = 0; i < sum[t].size(); ++i) sum[t][i] += other[t][i];
    }
  }

  double Frequency(int j, int head_dim) const {
    double frequency = std::pow(config_.value("rope_theta", 10000.0), -2.0 * j / head_dim);
    if (!config_.contains("rope_scaling") || config_["rope_scaling"].is_null()) return frequency;
    const nlohmann::json& scaling = config_["rope_scaling"];
    const double factor = scaling["factor"];
    if (scaling["rope_type"] == "linear") return frequency / factor;
    const double turns = scaling["original_max_position_embeddings"].get<double>() * frequency /
                         (2 * std::numbers::pi);  // of this pair over the original context
    const double low = scaling["low_freq_factor"];
    const double high = scaling["high_freq_factor"];
    const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    return frequency * (kept + (1 - kept) / factor);
  }

  void Rotate(Rows& rows, int head_dim) const {
    for (size_t t = 0; t < rows.size(); ++t) {
      for (size_t head = 0; head < rows[t].size(); head += static_cast<size_t>(head_dim)) {
        for (int j = 0; j < head_dim / 2; ++j) {
          const double angle = static_cast<double>(t) * Frequency(j, head_dim);
          double& low = rows[t][head + static_cast<size_t>(j)];
          double& high = rows[t][head + static_cast<size_t>(j + head_dim / 2)];
          const double x = low;
          low = x * std::cos(angle) - high * std::sin(angle);
          high = high * std::cos(angle) + x * std::sin(angle);
        }
      }
    }
  }

  // Causal attention of `heads` query heads, neighbours sharing KV heads.
  static Rows Attention(const Rows& q, const Rows& k, const Rows& v, int heads, int kv_heads) {
    const size_t d = q[0].size() / static_cast<size_t>(heads);
    Rows out(q.size(), std::vector<double>(q[0].size()));
    for (size_t t = 0; t < q.size(); ++t) {
      for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
        const size_t kv = h / static_cast<size_t>(heads / kv_heads) * d;
        std::vector<double> weight(t + 1);
        for (size_t s = 0; s <= t; ++s) {
          for (size_t i = 0; i < d; ++i) weight[s] += q[t][h * d + i] * k[s][kv + i];
          weight[s] /= std::sqrt(static_cast<double>(d));
        }
        const double maximum = *std::ranges::max_element(weight);
        double sum = 0;
        for (double& w : weight) sum += w = std::exp(w - maximum);
        for (size_t s = 0; s <= t; ++s) {
          for (size_t i = 0; i < d; ++i) out[t][h * d + i] += weight[s] / sum * v[s][kv + i];
        }
      }
    }
    return out;
  }

  Rows LlamaLogits(std::span<const int32_t> ids) const {
    const int heads = Int("num_attention_heads");
    const int kv_heads = IntOr("num_key_value_heads", heads);
    const int head_dim = IntOr("head_dim", Int("hidden_size") / heads);
    Rows x;
    for (const int32_t id : ids) x.push_back(RowOf("model.embed_tokens.weight", id));
    for (int layer = 0; layer < Int("num_hidden_layers"); ++layer) {
      const std::string at = absl::StrCat("model.layers.", layer, ".");
      const Rows input = RmsNorm(x, at + "input_layernorm");
      Rows q = Linear(input, at + "self_attn.q_proj");
      Rows k = Linear(input, at + "self_attn.k_proj");
      Rotate(q, head_dim);
      Rotate(k, head_dim);
      const Rows attended =
          Attention(q, k, Linear(input, at + "self_attn.v_proj"), heads, kv_heads);
      Add(x, Linear(attended, at + "self_attn.o_proj"));
      const Rows normed = RmsNorm(x, at + "post_attention_layernorm");
      Rows gate = Linear(normed, at + "mlp.gate_proj");
      const Rows up = Linear(normed, at + "mlp.up_proj");
      for (size_t t = 0; t < gate.size(); ++t) {
        for (size_t i = 0; i < gate[t].size(); ++i) {
          gate[t][i] *= up[t][i] / (1 + std::exp(-gate[t][i]));
        }
      }
      Add(x, Linear(gate, at + "mlp.down_proj"));
    }
    return Linear(RmsNorm(x, "model.norm"), Head("model.embed_tokens"));
  }

  Rows OptLogits(std::span<const int32_t> ids) const {
    const std::string body = "model.decoder.";
    const bool norm_before = config_.value("do_layer_norm_before", true);
    const bool projects = Find(body + "project_in.weight") != nullptr;
    const int heads = Int("num_attention_heads");
    Rows x;
    for (const int32_t id : ids) x.push_back(RowOf(body + "embed_tokens.weight", id));
    if (projects) x = Linear(x, body + "project_in");
    Rows positions;
    for (size_t t = 0; t < ids.size(); ++t) {
      positions.push_back(RowOf(body + "embed_positions.weight", static_cast<int>(t) + 2));
    }
    Add(x, positions);
    for (int layer = 0; layer < Int("num_hidden_layers"); ++layer) {
      const std::string at = absl::StrCat(body, "layers.", layer, ".");
      const Rows input = norm_before ? LayerNorm(x, at + "self_attn_layer_norm") : x;
      const Rows attended =
          Attention(Linear(input, at + "self_attn.q_proj"), Linear(input, at + "self_attn.k_proj"),
                    Linear(input, at + "self_attn.v_proj"), heads, heads);
      Add(x, Linear(attended, at + "self_attn.out_proj"));
      if (!norm_before) x = LayerNorm(x, at + "self_attn_layer_norm");
      Rows inner = Linear(norm_before ? LayerNorm(x, at + "final_layer_norm") : x, at + "fc1");
      for (std::vector<double>& row : inner) {
        for (double& value : row) value = std::max(value, 0.0);
      }
      Add(x, Linear(inner, at + "fc2"));
      if (!norm_before) x = LayerNorm(x, at + "final_layer_norm");
    }
    if (Find(body + "final_layer_norm.weight") != nullptr)
      x = LayerNorm(x, body + "final_layer_norm");
    if (projects) x = Linear(x, body + "project_out");
    return Linear(x, Head(body + "embed_tokens"));
  }

  std::string Head(const std::string& embedding) const {
    return Find("lm_head.weight") != nullptr ? "lm_head" : embedding;
  }

  nlohmann::json config_;
  std::map<std::string, TestTensor> tensors_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_REFERENCE_MODEL_H_
