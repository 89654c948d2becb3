#include "worker/engine/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"
#include "worker/engine/json_object.h"

namespace kvsweep {
namespace {

using nlohmann::json;

// A config.json being read. Each Get returns the field or its fallback; the
// first field that is wrong is remembered and every later Get is harmless, so
// the readers below are plain lists of fields.
class Fields {
 public:
  // `where` begins the messages: the file, and inside it the object.
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const absl::Status& status() const { return status_; }

  // Begins the messages of the object that field `name` holds.
  std::string Inside(const char* name) const { return absl::StrCat(where_, ": ", name); }

  // The first error of a nested object is one of this object's.
  void Adopt(const Fields& nested) { status_.Update(nested.status()); }

  // JSON null counts as absent, as it does in transformers.
  bool Has(const char* name) const {
    const auto field = object_.find(name);
    return field != object_.end() && !field->is_null();
  }

  bool IsNull(const char* name) const {
    const auto field = object_.find(name);
    return field != object_.end() && field->is_null();
  }

  int32_t GetInt(const char* name, std::optional<int32_t> fallback, int64_t minimum,
                 int64_t maximum) {
    if (!Has(name)) {
      if (!fallback.has_value()) Fail(name, "is missing");
      return fallback.value_or(static_cast<int32_t>(minimum));
    }
    const json& value = object_.at(name);
    const std::string range = absl::StrCat("must be an integer from ", minimum, " to ", maximum);
    // Unsigned values past int64 turn negative here and fall below the minimum.
    const int64_t number = value.is_number_integer() ? value.get<int64_t>() : minimum - 1;
    if (number >= minimum && number <= maximum) return static_cast<int32_t>(number);
    return Refuse(name, range, static_cast<int32_t>(minimum));
  }

  double GetPositive(const char* name, std::optional<double> fallback, double maximum) {
    if (!Has(name)) {
      if (!fallback.has_value()) Fail(name, "is missing");
      return fallback.value_or(maximum);
    }
    const json& value = object_.at(name);
    const double number = value.is_number() ? value.get<double>() : 0.0;
    if (number > 0.0 && number <= maximum) return number;
    return Refuse(name, absl::StrCat("must be a number above 0 and at most ", maximum), maximum);
  }

  bool GetBool(const char* name, bool fallback) {
    if (!Has(name)) return fallback;
    const json& value = object_.at(name);
    if (value.is_boolean()) return value.get<bool>();
    return Refuse(name, "must be true or false", fallback);
  }

  std::string GetString(const char* name, absl::string_view fallback) {
    if (!Has(name)) return std::string(fallback);
    const json& value = object_.at(name);
    if (value.is_string()) return value.get<std::string>();
    return Refuse(name, "must be a string", std::string(fallback));
  }

  // One id or a list of them; absent is an empty list.
  std::vector<int32_t> GetIds(const char* name) {
    std::vector<int32_t> ids;
    if (!Has(name)) return ids;
    const json& value = object_.at(name);
    const json list = value.is_array() ? value : json::array({value});
    if (list.size() > kMaxEosIds) {
      return Refuse(name, absl::StrCat("may hold at most ", kMaxEosIds, " ids"), ids);
    }
    for (const json& id : list) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
        return Refuse(name, "must be a token id, or a list of them", ids);
      }
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }

  const json* GetObject(const char* name) {
    if (!Has(name)) return nullptr;
    const json& value = object_.at(name);
    if (value.is_object()) return &value;
    return Refuse(name, "must be an object", nullptr);
  }

  // Refuses the model for the field `name` when `supported` does not hold.
  void Require(bool supported, const char* name, absl::string_view what) {
    if (supported || !status_.ok()) return;
    status_ = absl::UnimplementedError(
        absl::StrCat(where_, ": ", name, " ", Text(name), " is not supported: ", what));
  }

  // Refuses the model when the first field is no multiple of the second; both are there.
  void RequireMultiple(const char* name, const char* divisor) {
    if (!status_.ok() ||
        object_.at(name).get<int64_t>() % object_.at(divisor).get<int64_t>() == 0) {
      return;
    }
    Fail(name, absl::StrCat(Text(name), " is not a multiple of ", divisor, " ", Text(divisor)));
  }

  // Refuses the model when the first field is not above the second; both are there.
  void RequireAbove(const char* name, const char* other) {
    if (!status_.ok() || object_.at(name).get<double>() > object_.at(other).get<double>()) return;
    Fail(name, absl::StrCat(Text(name), " is not above ", other, " ", Text(other)));
  }

  void RequireAbsent(const char* name, absl::string_view what) { Require(!Has(name), name, what); }

 private:
  static constexpr size_t kMaxEosIds = 16;

  // The field's value, cut where a message would get unreadable.
  std::string Text(const char* name) const {
    if (!Has(name)) return "(absent)";
    std::string text = object_.at(name).dump(-1, ' ', false, json::error_handler_t::replace);
    if (text.size() > 80) text = text.substr(0, 77) + "...";
    return text;
  }

  template <typename T>
  T Refuse(const char* name, absl::string_view must, T fallback) {
    Fail(name, absl::StrCat("is ", Text(name), "; it ", must));
    return fallback;
  }

  void Fail(const char* name, absl::string_view what) {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", name, " ", what));
  }

  const json& object_;
  const std::string where_;
  absl::Status status_;
};

void ReadDtype(Fields& fields, ModelConfig& config) {
  // transformers 5 renamed the field.
  const char* name = fields.Has("dtype") ? "dtype" : "torch_dtype";
  const std::string dtype = fields.GetString(name, "float32");
  fields.Require(dtype == "float32" || dtype == "bfloat16" || dtype == "float16", name,
                 "float32, bfloat16 and float16 are");
  config.dtype = dtype == "bfloat16"  ? DType::kBf16
                 : dtype == "float16" ? DType::kF16
                                      : DType::kF32;
}

// What both families spell alike.
void ReadCommon(Fields& fields, ModelConfig& config) {
  config.hidden_size = fields.GetInt("hidden_size", std::nullopt, 1, limits::kHiddenSize);
  config.layers = fields.GetInt("num_hidden_layers", std::nullopt, 1, limits::kLayers);
  config.embedding_size = config.hidden_size;
  config.query_heads = fields.GetInt("num_attention_heads", std::nullopt, 1, limits::kHeads);
  config.vocabulary = fields.GetInt("vocab_size", std::nullopt, 1, limits::kVocabulary);
  config.max_positions =
      fields.GetInt("max_position_embeddings", std::nullopt, 1, limits::kContextTokens);
  config.tie_embeddings = fields.GetBool("tie_word_embeddings", config.tie_embeddings);
  const std::vector<int32_t> bos_ids = fields.GetIds("bos_token_id");
  if (!bos_ids.empty()) config.bos_id = bos_ids[0];
  config.eos_ids = fields.GetIds("eos_token_id");
  ReadDtype(fields, config);
  fields.RequireAbsent("quantization_config", "weights must be plain float32, bfloat16 or float16");
}

// Scaling as `rope_scaling` holds it, or `rope_parameters` from transformers 5 on.
void ReadRopeScaling(Fields& rope, ModelConfig& config) {
  // "rope_type" was "type" once.
  const char* name = rope.Has("rope_type") ? "rope_type" : "type";
  const std::string type = rope.GetString(name, "default");
  if (type == "default") return;
  rope.Require(
      type == "linear" || type == "llama3", name,
      "default, linear and llama3 are; without it the model holds for its original context");
  config.rope_scaling = type == "linear" ? RopeScaling::kLinear : RopeScaling::kLlama3;
  config.rope_factor = rope.GetPositive("factor", std::nullopt, 1e6);
  if (config.rope_scaling == RopeScaling::kLinear) return;
  config.rope_low_frequency = rope.GetPositive("low_freq_factor", std::nullopt, 1e6);
  config.rope_high_frequency = rope.GetPositive("high_freq_factor", std::nullopt, 1e6);
  config.rope_original_positions =
      rope.GetInt("original_max_position_embeddings", std::nullopt, 1, limits::kContextTokens);
  rope.RequireAbove("high_freq_factor", "low_freq_factor");
}

// Rotary embeddings come as `rope_theta` and `rope_scaling`, or, from transformers 5, together as
// `rope_parameters`.
void ReadRope(Fields& fields, ModelConfig& config) {
  config.rope_theta = fields.GetPositive("rope_theta", 10000.0, 1e12);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const json* object = fields.GetObject(name);
    if (object == nullptr) continue;
    Fields rope(*object, fields.Inside(name));
    config.rope_theta = rope.GetPositive("rope_theta", config.rope_theta, 1e12);
    ReadRopeScaling(rope, config);
    fields.Adopt(rope);
  }
}

// What sets Llama and the models built like it apart, as far as a config says or assumes it.
struct LlamaKind {
  std::optional<int32_t> kv_heads;        // default; nullopt: as many as query heads
  std::optional<int32_t> sliding_window;  // default
  bool biases_are_settings = false;       // attention_bias and mlp_bias are read
  bool window_is_switched = false;        // use_sliding_window, false unless set
};

void ReadSlidingWindow(Fields& fields, const LlamaKind& kind, ModelConfig& config) {
  if (kind.window_is_switched && !fields.GetBool("use_sliding_window", false)) return;
  // Null is "none" where absence is the default.
  if (!fields.Has("sliding_window") && (fields.IsNull("sliding_window") || !kind.sliding_window)) {
    return;
  }
  const int32_t window =
      fields.GetInt("sliding_window", kind.sliding_window, 1, limits::kContextTokens);
  if (window >= config.max_positions) return;
  config.sliding_window = window;
  config.max_positions = window;
}

void ReadLlama(Fields& fields, const LlamaKind& kind, ModelConfig& config) {
  config.ffn_size = fields.GetInt("intermediate_size", std::nullopt, 1, limits::kHiddenSize);
  config.kv_heads = fields.GetInt("num_key_value_heads", kind.kv_heads.value_or(config.query_heads),
                                  1, limits::kHeads);
  if (!fields.Has("head_dim")) fields.RequireMultiple("hidden_size", "num_attention_heads");
  config.head_dim =
      fields.GetInt("head_dim", config.hidden_size / config.query_heads, 1, limits::kHiddenSize);
  config.norm_epsilon = fields.GetPositive("rms_norm_eps", 1e-6, 1.0);
  ReadRope(fields, config);
  if (kind.biases_are_settings) {
    const bool attention_bias = fields.GetBool("attention_bias", false);
    config.qkv_bias = attention_bias;
    config.attention_output_bias = attention_bias;
    config.ffn_bias = fields.GetBool("mlp_bias", false);
  }
  fields.Require(fields.GetString("hidden_act", "silu") == "silu", "hidden_act", "only silu is");
  ReadSlidingWindow(fields, kind, config);
  fields.Require(fields.GetInt("pretraining_tp", 1, 1, INT32_MAX) == 1, "pretraining_tp",
                 "only 1 is");
  fields.Require(fields.GetPositive("partial_rotary_factor", 1.0, 1.0) == 1.0,
                 "partial_rotary_factor", "only 1 is");
}

void ReadOpt(Fields& fields, ModelConfig& config) {
  config.ffn_size = fields.GetInt("ffn_dim", std::nullopt, 1, limits::kHiddenSize);
  config.kv_heads = config.query_heads;
  fields.RequireMultiple("hidden_size", "num_attention_heads");
  config.head_dim = config.hidden_size / config.query_heads;
  config.embedding_size =
      fields.GetInt("word_embed_proj_dim", config.hidden_size, 1, limits::kHiddenSize);
  config.norm_before = fields.GetBool("do_layer_norm_before", true);
  config.final_norm = config.norm_before && !fields.GetBool("_remove_final_layer_norm", false);
  const bool biases = fields.GetBool("enable_bias", true);
  config.qkv_bias = biases;
  config.attention_output_bias = biases;
  config.ffn_bias = biases;
  fields.Require(fields.GetBool("layer_norm_elementwise_affine", true),
                 "layer_norm_elementwise_affine", "LayerNorm needs its weight and bias");
  fields.Require(fields.GetString("activation_function", "relu") == "relu", "activation_function",
                 "only relu is");
}

// A model_type that is supported: the class that transformers computes it with, and its reader.
struct Family {
  absl::string_view model_type;
  absl::string_view model_class;
  Architecture architecture;
  LlamaKind kind;  // of all but OPT
};

constexpr std::array<Family, 4> kFamilies = {
    {{"llama", "LlamaForCausalLM", Architecture::kLlama, {.biases_are_settings = true}},
     {"mistral",
      "MistralForCausalLM",
      Architecture::kLlama,
      {.kv_heads = 8, .sliding_window = 4096}},
     {"qwen2",
      "Qwen2ForCausalLM",
      Architecture::kLlama,
      {.kv_heads = 32, .sliding_window = 4096, .window_is_switched = true}},
     {"opt", "OPTForCausalLM", Architecture::kOpt, {}}}};

absl::Status CheckSize(absl::string_view source, const char* name, int32_t value, int64_t maximum) {
  if (value >= 1 && value <= maximum) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(source, ": ", name, " is ", value, "; it must be from 1 to ", maximum));
}

absl::Status CheckTokenId(absl::string_view source, const char* name, int32_t id,
                          int32_t vocabulary) {
  if (id >= 0 && id < vocabulary) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(source, ": ", name, " ", id, " is outside the vocabulary of ", vocabulary));
}

}  // namespace

int64_t ModelConfig::KvBytesPerToken(DType kv_type) const {
  return 2 * int64_t{layers} * kv_heads * head_dim * DTypeBytes(kv_type);
}

ModelShape ModelConfig::shape() const {
  return {.layers = layers,
          .hidden_size = hidden_size,
          .query_heads = query_heads,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .max_positions = max_positions,
          .rotary = positions == PositionKind::kRotary};
}

ModelConfig ArchitectureFeatures(Architecture architecture) {
  ModelConfig config;  // its defaults are Llama's
  config.architecture = architecture;
  if (architecture == Architecture::kOpt) {
    config.norm = NormKind::kLayer;
    config.positions = PositionKind::kLearned;
    config.rope_theta = 0;
    config.position_offset = 2;
    config.activation = Activation::kRelu;
    config.gated_ffn = false;
    config.qkv_bias = true;
    config.attention_output_bias = true;
    config.ffn_bias = true;
    config.tie_embeddings = true;
  }
  return config;
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json_text,
                                             absl::string_view file_name) {
  if (static_cast<int64_t>(json_text.size()) > limits::kModelConfigBytes) {
    return absl::InvalidArgumentError(absl::StrCat(file_name, " has ", json_text.size(),
                                                   " bytes; a model's config may have at most ",
                                                   limits::kModelConfigBytes));
  }
  const std::optional<json> parsed = ParseJsonObject(json_text);
  if (!parsed.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(file_name, " is not a JSON object"));
  }
  const json& object = *parsed;
  Fields fields(object, std::string(file_name));
  const std::string model_type = fields.GetString("model_type", "");
  const auto family = std::ranges::find(kFamilies, model_type, &Family::model_type);
  fields.Require(family != kFamilies.end(), "model_type", "llama, mistral, qwen2 and opt are");
  RETURN_IF_ERROR(fields.status());

  ModelConfig config = ArchitectureFeatures(family->architecture);
  fields.Require(!fields.Has("architectures") ||
                     object["architectures"] == json::array({std::string(family->model_class)}),
                 "architectures",
                 absl::StrCat("a model of type ", model_type, " must be ", family->model_class));
  ReadCommon(fields, config);
  if (family->architecture == Architecture::kLlama) {
    // Its biases are no settings: the class has them.
    config.qkv_bias = model_type == "qwen2";
    ReadLlama(fields, family->kind, config);
  } else {
    ReadOpt(fields, config);
  }
  RETURN_IF_ERROR(fields.status());
  RETURN_IF_ERROR(CheckModelConfig(config, file_name));
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/config.json");
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limits::kModelConfigBytes));
  return ParseModelConfig(text, path);
}

absl::Status CheckModelConfig(const ModelConfig& config, absl::string_view source) {
  RETURN_IF_ERROR(CheckSize(source, "hidden_size", config.hidden_size, limits::kHiddenSize));
  RETURN_IF_ERROR(CheckSize(source, "layers", config.layers, limits::kLayers));
  RETURN_IF_ERROR(CheckSize(source, "attention heads", config.query_heads, limits::kHeads));
  RETURN_IF_ERROR(CheckSize(source, "KV heads", config.kv_heads, limits::kHeads));
  RETURN_IF_ERROR(CheckSize(source, "FFN size", config.ffn_size, limits::kHiddenSize));
  RETURN_IF_ERROR(CheckSize(source, "vocabulary", config.vocabulary, limits::kVocabulary));
  RETURN_IF_ERROR(CheckSize(source, "positions", config.max_positions, limits::kContextTokens));
  RETURN_IF_ERROR(CheckSize(source, "head_dim", config.head_dim, limits::kHiddenSize));
  RETURN_IF_ERROR(CheckSize(source, "embedding size", config.embedding_size, limits::kHiddenSize));
  if (config.query_heads % config.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": num_attention_heads ", config.query_heads,
                     " is not a multiple of num_key_value_heads ", config.kv_heads));
  }
  if (config.positions == PositionKind::kRotary && config.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": head dimension ", config.head_dim,
                                                   " is odd; rotary embeddings rotate pairs"));
  }
  if (config.bos_id.has_value()) {
    RETURN_IF_ERROR(CheckTokenId(source, "bos_token_id", *config.bos_id, config.vocabulary));
  }
  for (const int32_t id : config.eos_ids) {
    RETURN_IF_ERROR(CheckTokenId(source, "eos_token_id", id, config.vocabulary));
  }
  return absl::OkStatus();
}

std::vector<float> InverseFrequencies(const ModelConfig& config) {
  KVSWEEP_CHECK(config.positions == PositionKind::kRotary);
  const auto factor = static_cast<float>(config.rope_factor);
  const auto low = static_cast<float>(config.rope_low_frequency);
  const auto high = static_cast<float>(config.rope_high_frequency);
  const auto original = static_cast<float>(config.rope_original_positions);
  std::vector<float> frequencies;
  for (int32_t j = 0; j < config.head_dim / 2; ++j) {
    float frequency =
        1.0f / std::pow(static_cast<float>(config.rope_theta),
                        static_cast<float>(2 * j) / static_cast<float>(config.head_dim));
    if (config.rope_scaling == RopeScaling::kLinear) frequency /= factor;
    if (config.rope_scaling == RopeScaling::kLlama3) {
      const float wavelength = 2 * std::numbers::pi_v<float> / frequency;
      if (wavelength > original / low) {
        frequency /= factor;
      } else if (wavelength >= original / high) {
        const float smooth = (original / wavelength - low) / (high - low);
        frequency = (1 - smooth) * frequency / factor + smooth * frequency;
      }
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

}  // namespace kvsweep
