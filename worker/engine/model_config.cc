#include "worker/engine/model_config.h"

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace kvsweep {
namespace {

using nlohmann::json;

// A config.json being read. Each Get returns the field or its fallback; the
// first field that is wrong is remembered and every later Get is harmless, so
// the readers below are plain lists of fields.
class Fields {
 public:
  Fields(const json& object, absl::string_view file_name)
      : object_(object), file_name_(file_name) {}

  const absl::Status& status() const { return status_; }

  // JSON null counts as absent, as it does in transformers.
  bool Has(const char* name) const {
    const auto field = object_.find(name);
    return field != object_.end() && !field->is_null();
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

  double GetPositive(const char* name, double fallback, double maximum) {
    if (!Has(name)) return fallback;
    const json& value = object_.at(name);
    const double number = value.is_number() ? value.get<double>() : 0.0;
    if (number > 0.0 && number <= maximum) return number;
    return Refuse(name, absl::StrCat("must be a number above 0 and at most ", maximum), fallback);
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
        absl::StrCat(file_name_, ": ", name, " ", Text(name), " is not supported: ", what));
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
    status_ = absl::InvalidArgumentError(absl::StrCat(file_name_, ": ", name, " ", what));
  }

  const json& object_;
  const absl::string_view file_name_;
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

// Rotary embeddings come as `rope_theta` and `rope_scaling`, or, from
// transformers 5, together as `rope_parameters`.
void ReadRope(Fields& fields, absl::string_view file_name, ModelConfig& config) {
  constexpr absl::string_view kPlainOnly = "only plain rotary embeddings (rope_theta alone) are";
  fields.RequireAbsent("rope_scaling", kPlainOnly);
  config.rope_theta = fields.GetPositive("rope_theta", 10000.0, 1e12);
  const json* parameters = fields.GetObject("rope_parameters");
  if (parameters == nullptr) return;
  Fields rope(*parameters, file_name);
  const std::string type = rope.GetString("rope_type", "default");
  fields.Require(type == "default", "rope_parameters", kPlainOnly);
  config.rope_theta = rope.GetPositive("rope_theta", config.rope_theta, 1e12);
  fields.Require(rope.status().ok(), "rope_parameters", kPlainOnly);
}

void ReadLlama(Fields& fields, absl::string_view file_name, ModelConfig& config) {
  config.ffn_size = fields.GetInt("intermediate_size", std::nullopt, 1, limits::kHiddenSize);
  config.kv_heads = fields.GetInt("num_key_value_heads", config.query_heads, 1, limits::kHeads);
  config.head_dim =
      fields.GetInt("head_dim", config.hidden_size / config.query_heads, 0, limits::kHiddenSize);
  config.norm_epsilon = fields.GetPositive("rms_norm_eps", 1e-6, 1.0);
  ReadRope(fields, file_name, config);
  const bool attention_bias = fields.GetBool("attention_bias", false);
  config.qkv_bias = attention_bias;
  config.attention_output_bias = attention_bias;
  config.ffn_bias = fields.GetBool("mlp_bias", false);
  fields.Require(fields.GetString("hidden_act", "silu") == "silu", "hidden_act",
                 "Llama models use silu");
  fields.RequireAbsent("sliding_window", "every layer must attend to the whole context");
  fields.Require(fields.GetInt("pretraining_tp", 1, 1, INT32_MAX) == 1, "pretraining_tp",
                 "only 1 is");
  fields.Require(fields.GetPositive("partial_rotary_factor", 1.0, 1.0) == 1.0,
                 "partial_rotary_factor", "only 1 is");
}

void ReadOpt(Fields& fields, ModelConfig& config) {
  config.ffn_size = fields.GetInt("ffn_dim", std::nullopt, 1, limits::kHiddenSize);
  config.kv_heads = config.query_heads;
  config.head_dim = config.hidden_size / config.query_heads;
  fields.Require(fields.GetInt("word_embed_proj_dim", config.hidden_size, 1, limits::kHiddenSize) ==
                     config.hidden_size,
                 "word_embed_proj_dim",
                 "embeddings must be as wide as hidden_size (as in every OPT but 350m)");
  fields.Require(fields.GetBool("do_layer_norm_before", true), "do_layer_norm_before",
                 "LayerNorm must come before attention and FFN");
  fields.Require(!fields.GetBool("_remove_final_layer_norm", false), "_remove_final_layer_norm",
                 "the final LayerNorm is needed");
  fields.Require(fields.GetBool("enable_bias", true), "enable_bias",
                 "OPT layers need their biases");
  fields.Require(fields.GetBool("layer_norm_elementwise_affine", true),
                 "layer_norm_elementwise_affine", "LayerNorm needs its weight and bias");
  fields.Require(fields.GetString("activation_function", "relu") == "relu", "activation_function",
                 "OPT models use relu");
}

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
  const json object = json::parse(json_text.begin(), json_text.end(), nullptr,
                                  /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file_name, " is not a JSON object"));
  }
  Fields fields(object, file_name);
  const std::string model_type = fields.GetString("model_type", "");
  fields.Require(model_type == "llama" || model_type == "opt", "model_type",
                 "\"llama\" (LlamaForCausalLM) and \"opt\" (OPTForCausalLM) "
                 "are");
  RETURN_IF_ERROR(fields.status());

  ModelConfig config =
      ArchitectureFeatures(model_type == "llama" ? Architecture::kLlama : Architecture::kOpt);
  const std::string expected = model_type == "llama" ? "LlamaForCausalLM" : "OPTForCausalLM";
  fields.Require(!fields.Has("architectures") || object["architectures"] == json::array({expected}),
                 "architectures",
                 absl::StrCat("a model of type ", model_type, " must be ", expected));
  ReadCommon(fields, config);
  if (config.architecture == Architecture::kLlama) {
    ReadLlama(fields, file_name, config);
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
  if (config.hidden_size % config.query_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": hidden_size ", config.hidden_size,
                                                   " is not a multiple of num_attention_heads ",
                                                   config.query_heads));
  }
  if (config.head_dim != config.hidden_size / config.query_heads) {
    return absl::UnimplementedError(
        absl::StrCat(source, ": head_dim ", config.head_dim,
                     " is not supported: it must be hidden_size / num_attention_heads = ",
                     config.hidden_size / config.query_heads));
  }
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

}  // namespace kvsweep
