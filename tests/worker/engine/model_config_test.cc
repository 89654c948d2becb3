#include "worker/engine/model_config.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "nlohmann/json.hpp"

namespace kvsweep {
namespace {

using nlohmann::json;

json SmallLlama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 172},
          {"num_hidden_layers", 5},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"vocab_size", 512},
          {"max_position_embeddings", 512},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

json SmallOpt() {
  return {{"architectures", {"OPTForCausalLM"}},
          {"model_type", "opt"},
          {"hidden_size", 64},
          {"ffn_dim", 256},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"vocab_size", 512},
          {"max_position_embeddings", 128}};
}

json SmallMistral() {
  json config = SmallLlama();
  config["architectures"] = {"MistralForCausalLM"};
  config["model_type"] = "mistral";
  config["max_position_embeddings"] = 32768;
  return config;
}

json SmallQwen2() {
  json config = SmallLlama();
  config["architectures"] = {"Qwen2ForCausalLM"};
  config["model_type"] = "qwen2";
  config["max_position_embeddings"] = 32768;
  config["sliding_window"] = 1024;
  config["use_sliding_window"] = false;
  return config;
}

// As Llama 3.1 states it.
json Llama3Scaling() {
  return {{"rope_type", "llama3"},
          {"factor", 8.0},
          {"low_freq_factor", 1.0},
          {"high_freq_factor", 4.0},
          {"original_max_position_embeddings", 8192}};
}

ModelConfig Parsed(const json& config) {
  const auto parsed = ParseModelConfig(config.dump(), "config.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.value_or(ModelConfig());
}

// What the reader says to `config` with one field changed.
std::string Refusal(json config, const std::string& field, const json& value) {
  config[field] = value;
  const auto parsed = ParseModelConfig(config.dump(), "config.json");
  return parsed.ok() ? "accepted" : parsed.status().ToString();
}

TEST(ModelConfigTest, ReadsTheShippedLlama) {
  const auto config = LoadModelConfig("experiments/models/books-llama-14m");
  ASSERT_TRUE(config.ok()) << config.status();
  ModelConfig expected;
  expected.hidden_size = 384;
  expected.layers = 8;
  expected.query_heads = 6;
  expected.kv_heads = 2;
  expected.head_dim = 64;
  expected.ffn_size = 1024;
  expected.vocabulary = 4096;
  expected.embedding_size = 384;
  expected.max_positions = 2048;
  expected.tie_embeddings = true;
  expected.bos_id = 1;
  expected.eos_ids = {2};
  expected.dtype = DType::kBf16;
  EXPECT_EQ(*config, expected);
  EXPECT_EQ(config->group_size(), 3);
  EXPECT_EQ(config->qkv_rows(), 640);
}

TEST(ModelConfigTest, ReadsTheShippedOpt) {
  const auto config = LoadModelConfig("experiments/models/books-opt-16m");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kOpt);
  EXPECT_EQ(config->kv_heads, 6);
  EXPECT_EQ(config->ffn_size, 1536);
  EXPECT_EQ(config->norm, NormKind::kLayer);
  EXPECT_EQ(config->positions, PositionKind::kLearned);
  EXPECT_EQ(config->position_offset, 2);
  EXPECT_EQ(config->activation, Activation::kRelu);
  EXPECT_FALSE(config->gated_ffn);
  EXPECT_TRUE(config->qkv_bias && config->attention_output_bias && config->ffn_bias);
  EXPECT_TRUE(config->tie_embeddings);
}

TEST(ModelConfigTest, AbsentFieldsTakeTheDefaultsOfTransformers) {
  const auto llama = ParseModelConfig(SmallLlama().dump(), "config.json");
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(llama->head_dim, 8);
  EXPECT_EQ(llama->norm_epsilon, 1e-6);
  EXPECT_EQ(llama->rope_theta, 10000.0);
  EXPECT_FALSE(llama->tie_embeddings);
  EXPECT_EQ(llama->dtype, DType::kF32);
  json multi_head = SmallLlama();
  multi_head.erase("num_key_value_heads");
  EXPECT_EQ(ParseModelConfig(multi_head.dump(), "config.json")->kv_heads, 8);
  const auto opt = ParseModelConfig(SmallOpt().dump(), "config.json");
  ASSERT_TRUE(opt.ok()) << opt.status();
  EXPECT_TRUE(opt->tie_embeddings);
  EXPECT_EQ(opt->bos_id, std::nullopt);
}

TEST(ModelConfigTest, ReadsBothSpellingsOfRopeAndDtype) {
  json config = SmallLlama();
  config["rope_parameters"] = {{"rope_theta", 5e5}, {"rope_type", "default"}};
  config["dtype"] = "float16";
  config["eos_token_id"] = {2, 3};
  config["attention_bias"] = true;
  config["rope_scaling"] = nullptr;
  const auto parsed = ParseModelConfig(config.dump(), "config.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->rope_theta, 5e5);
  EXPECT_EQ(parsed->dtype, DType::kF16);
  EXPECT_EQ(parsed->eos_ids, (std::vector<int32_t>{2, 3}));
  EXPECT_TRUE(parsed->qkv_bias && parsed->attention_output_bias);
  EXPECT_FALSE(parsed->ffn_bias);
}

TEST(ModelConfigTest, HeadsNeedNotFillTheHiddenSize) {
  json config = SmallLlama();
  config["head_dim"] = 20;
  const ModelConfig parsed = Parsed(config);
  EXPECT_EQ(parsed.head_dim, 20);
  EXPECT_EQ(parsed.qkv_rows(), (8 + 2 * 4) * 20);
}

TEST(ModelConfigTest, MistralIsALlamaThatMayLookBackSoFarOnly) {
  json config = SmallMistral();
  // Absent, the window is the class's default; null, there is none.
  EXPECT_EQ(Parsed(config).max_positions, 4096);
  EXPECT_EQ(Parsed(config).sliding_window, 4096);
  config["sliding_window"] = nullptr;
  EXPECT_EQ(Parsed(config).max_positions, 32768);
  EXPECT_EQ(Parsed(config).sliding_window, std::nullopt);
  config["sliding_window"] = 65536;  // farther than the context: no bound
  EXPECT_EQ(Parsed(config).max_positions, 32768);
  EXPECT_EQ(Parsed(config).sliding_window, std::nullopt);
  EXPECT_FALSE(Parsed(config).qkv_bias);
  config.erase("num_key_value_heads");
  EXPECT_EQ(Parsed(config).kv_heads, 8);
}

TEST(ModelConfigTest, Qwen2HasBiasesAndAWindowThatIsSwitchedOff) {
  json config = SmallQwen2();
  const ModelConfig parsed = Parsed(config);
  EXPECT_TRUE(parsed.qkv_bias);
  EXPECT_FALSE(parsed.attention_output_bias || parsed.ffn_bias);
  EXPECT_EQ(parsed.max_positions, 32768);
  config["use_sliding_window"] = true;
  EXPECT_EQ(Parsed(config).max_positions, 1024);
}

TEST(ModelConfigTest, OptMayProjectItsEmbeddingsAndNormAfterwards) {
  json config = SmallOpt();
  config["do_layer_norm_before"] = false;
  config["word_embed_proj_dim"] = 32;
  const ModelConfig parsed = Parsed(config);
  EXPECT_FALSE(parsed.norm_before || parsed.final_norm);
  EXPECT_TRUE(parsed.projects_embeddings());
  EXPECT_EQ(parsed.embedding_size, 32);
  EXPECT_TRUE(Parsed(SmallOpt()).final_norm);
  EXPECT_FALSE(Parsed(SmallOpt()).projects_embeddings());
}

TEST(ModelConfigTest, Llama3ScalingStretchesTheSlowPairsOnly) {
  json config = SmallLlama();
  config["head_dim"] = 128;
  config["rope_theta"] = 5e5;
  const std::vector<float> plain = InverseFrequencies(Parsed(config));
  config["rope_scaling"] = Llama3Scaling();
  const std::vector<float> scaled = InverseFrequencies(Parsed(config));
  ASSERT_EQ(scaled.size(), 64u);
  EXPECT_EQ(plain[0], 1.0f);
  for (size_t j = 0; j < scaled.size(); ++j) {
    // Wavelengths below 8192 / 4 stay (pairs up to 28), those past 8192 are eight times as long
    // (pairs from 35).
    const bool stays = j <= 28;
    const bool stretched = j >= 35;
    EXPECT_EQ(scaled[j] == plain[j], stays) << j;
    EXPECT_EQ(scaled[j] == plain[j] / 8, stretched) << j;
    EXPECT_TRUE(scaled[j] <= plain[j] && scaled[j] >= plain[j] / 8) << j;
  }
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  EXPECT_EQ(InverseFrequencies(Parsed(config))[40], plain[40] / 2);
}

TEST(ModelConfigTest, RefusesWrongValuesByField) {
  EXPECT_EQ(Refusal(SmallLlama(), "hidden_size", nullptr),
            "INVALID_ARGUMENT: config.json: hidden_size is missing");
  EXPECT_EQ(Refusal(SmallLlama(), "hidden_size", 0),
            "INVALID_ARGUMENT: config.json: hidden_size is 0; it must be an integer from 1 to "
            "131072");
  EXPECT_EQ(Refusal(SmallLlama(), "num_hidden_layers", UINT64_MAX),
            "INVALID_ARGUMENT: config.json: num_hidden_layers is 18446744073709551615; it must be "
            "an integer from 1 to 1024");
  EXPECT_EQ(Refusal(SmallLlama(), "num_hidden_layers", 2.5),
            "INVALID_ARGUMENT: config.json: num_hidden_layers is 2.5; it must be an integer from "
            "1 to 1024");
  EXPECT_EQ(Refusal(SmallLlama(), "num_attention_heads", 6),
            "INVALID_ARGUMENT: config.json: hidden_size 64 is not a multiple of "
            "num_attention_heads 6");
  EXPECT_EQ(Refusal(SmallLlama(), "num_key_value_heads", 3),
            "INVALID_ARGUMENT: config.json: num_attention_heads 8 is not a multiple of "
            "num_key_value_heads 3");
  EXPECT_EQ(Refusal(SmallLlama(), "num_attention_heads", 64),
            "INVALID_ARGUMENT: config.json: head dimension 1 is odd; rotary embeddings rotate "
            "pairs");
  EXPECT_EQ(Refusal(SmallLlama(), "rms_norm_eps", -1),
            "INVALID_ARGUMENT: config.json: rms_norm_eps is -1; it must be a number above 0 and "
            "at most 1");
  EXPECT_EQ(Refusal(SmallLlama(), "tie_word_embeddings", "yes"),
            "INVALID_ARGUMENT: config.json: tie_word_embeddings is \"yes\"; it must be true or "
            "false");
  EXPECT_EQ(Refusal(SmallLlama(), "eos_token_id", {2, 512}),
            "INVALID_ARGUMENT: config.json: eos_token_id 512 is outside the vocabulary of 512");
}

TEST(ModelConfigTest, RefusesModelsThatWouldComputeSomethingElse) {
  EXPECT_EQ(Refusal(SmallLlama(), "model_type", "mamba"),
            "UNIMPLEMENTED: config.json: model_type \"mamba\" is not supported: llama, mistral, "
            "qwen2 and opt are");
  EXPECT_EQ(Refusal(SmallLlama(), "architectures", {"LlamaForSequenceClassification"}),
            "UNIMPLEMENTED: config.json: architectures [\"LlamaForSequenceClassification\"] is "
            "not supported: a model of type llama must be LlamaForCausalLM");
  EXPECT_EQ(Refusal(SmallLlama(), "rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}),
            "INVALID_ARGUMENT: config.json: rope_scaling: low_freq_factor is missing");
  EXPECT_EQ(Refusal(SmallLlama(), "rope_scaling", {{"type", "dynamic"}, {"factor", 8.0}}),
            "UNIMPLEMENTED: config.json: rope_scaling: type \"dynamic\" is not supported: default, "
            "linear and llama3 are; without it the model holds for its original context");
  EXPECT_EQ(Refusal(SmallLlama(), "rope_parameters", {{"rope_type", "yarn"}}),
            "UNIMPLEMENTED: config.json: rope_parameters: rope_type \"yarn\" is not supported: "
            "default, linear and llama3 are; without it the model holds for its original context");
  json wrong_bands = Llama3Scaling();
  wrong_bands["high_freq_factor"] = 1.0;
  EXPECT_EQ(Refusal(SmallLlama(), "rope_scaling", wrong_bands),
            "INVALID_ARGUMENT: config.json: rope_scaling: high_freq_factor 1.0 is not above "
            "low_freq_factor 1.0");
  EXPECT_EQ(Refusal(SmallLlama(), "hidden_act", "gelu"),
            "UNIMPLEMENTED: config.json: hidden_act \"gelu\" is not supported: only silu is");
  EXPECT_EQ(Refusal(SmallLlama(), "head_dim", 0),
            "INVALID_ARGUMENT: config.json: head_dim is 0; it must be an integer from 1 to 131072");
  EXPECT_EQ(Refusal(SmallLlama(), "torch_dtype", "int8"),
            "UNIMPLEMENTED: config.json: torch_dtype \"int8\" is not supported: float32, bfloat16 "
            "and float16 are");
  EXPECT_EQ(Refusal(SmallLlama(), "quantization_config", {{"bits", 4}}),
            "UNIMPLEMENTED: config.json: quantization_config {\"bits\":4} is not supported: "
            "weights must be plain float32, bfloat16 or float16");
  EXPECT_EQ(Refusal(SmallOpt(), "activation_function", "gelu"),
            "UNIMPLEMENTED: config.json: activation_function \"gelu\" is not supported: only relu "
            "is");
}

TEST(ModelConfigTest, RefusesWhatIsNoConfigAtAll) {
  EXPECT_EQ(ParseModelConfig("{", "config.json").status().message(),
            "config.json is not a JSON object");
  EXPECT_EQ(ParseModelConfig("[1]", "config.json").status().message(),
            "config.json is not a JSON object");
  const std::string deep =
      "{\"model_type\": " + std::string(100'000, '[') + std::string(100'000, ']') + "}";
  EXPECT_EQ(ParseModelConfig(deep, "config.json").status().message(),
            "config.json is not a JSON object");
  EXPECT_EQ(ParseModelConfig(std::string(2 << 20, ' '), "config.json").status().message(),
            "config.json has 2097152 bytes; a model's config may have at most 1048576");
  EXPECT_EQ(LoadModelConfig("experiments/specs-that-are-not-there").status().code(),
            absl::StatusCode::kNotFound);
}

// Whatever single field is replaced by whatever value, the reader answers with a status or with a
// config that keeps its promises.
TEST(ModelConfigTest, AnyReplacedFieldIsRefusedOrHarmless) {
  const uint64_t seed = 20260412;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  const std::vector<json> values = {nullptr,    -1,         0,       1,   7,
                                    1e300,      INT64_MIN,  true,    "x", json::array(),
                                    {{"a", 1}}, UINT64_MAX, 1 << 20, 65,  {1, 2, "z"}};
  int accepted = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::vector<json> sound = {SmallLlama(), SmallMistral(), SmallQwen2(), SmallOpt()};
    json config = sound[random.Uniform(sound.size())];
    auto field = config.begin();
    std::advance(field, random.Uniform(config.size()));
    *field = values[random.Uniform(values.size())];
    const auto parsed = ParseModelConfig(config.dump(), "config.json");
    if (!parsed.ok()) continue;
    ++accepted;
    EXPECT_TRUE(CheckModelConfig(*parsed, "config").ok()) << config.dump();
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace kvsweep
