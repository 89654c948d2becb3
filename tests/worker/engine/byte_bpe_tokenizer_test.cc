// Byte-level BPE against Hugging Face's own library. tests/golden/tokenizer holds small tokenizers
// of the three kinds (GPT-2 and OPT, Llama 3, Qwen2), trained on 300 KB of text, and the ids that
// the library gives for plain, odd and random texts under each of them.
#include "worker/engine/byte_bpe_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/file.h"
#include "base/random.h"
#include "nlohmann/json.hpp"
#include "tests/worker/engine/model_folder.h"
#include "worker/engine/tokenizer.h"
#include "worker/engine/utf8.h"

namespace kvsweep {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr char kGolden[] = "tests/golden/tokenizer/";

std::string ReadOrDie(const std::string& name) {
  auto content = ReadFile(kGolden + name, 1 << 20);
  EXPECT_TRUE(content.ok()) << content.status();
  return content.value_or("");
}

std::unique_ptr<Tokenizer> ParseOrDie(const json& tokenizer) {
  auto parsed = ParseTokenizerJson(tokenizer.dump(), "", "tokenizer.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return *std::move(parsed);
}

class ByteBpeGoldenTest : public testing::TestWithParam<std::string> {
 protected:
  ByteBpeGoldenTest()
      : golden_(json::parse(ReadOrDie("byte_level.json"))),
        tokenizer_(ParseOrDie(json::parse(ReadOrDie(GetParam() + ".json")))) {}

  json golden_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_P(ByteBpeGoldenTest, IdsAreTheLibrarys) {
  const json& ids = golden_[GetParam()]["ids"];
  ASSERT_EQ(ids.size(), golden_["texts"].size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string text = golden_["texts"][i];
    EXPECT_THAT(*tokenizer_->Encode(text), ElementsAreArray(ids[i].get<std::vector<int32_t>>()))
        << "text " << i << ": " << golden_["texts"][i].dump(-1, ' ', true);
  }
}

TEST_P(ByteBpeGoldenTest, TextsComeBack) {
  for (const json& value : golden_["texts"]) {
    const std::string text = value;
    const std::string expected = GetParam() == "qwen2" ? NormalFormC(text) : text;
    EXPECT_EQ(*tokenizer_->Decode(*tokenizer_->Encode(text)), expected);
  }
}

TEST_P(ByteBpeGoldenTest, BosIsWhatTheTemplateSays) {
  EncodeOptions options{.add_bos = true};
  EXPECT_THAT(*tokenizer_->Encode("Call me", options),
              ElementsAreArray(golden_[GetParam()]["with_bos"].get<std::vector<int32_t>>()));
}

TEST_P(ByteBpeGoldenTest, FewerTokensAreThoseOfTheBeginning) {
  const std::string text = golden_["texts"][6];
  const std::vector<int32_t> all = *tokenizer_->Encode(text);
  for (size_t most = 0; most <= all.size() + 1; ++most) {
    const std::vector<int32_t> some = *tokenizer_->Encode(text, {.max_tokens = most});
    EXPECT_THAT(some, ElementsAreArray(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(
                                                                      std::min(most, all.size()))));
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, ByteBpeGoldenTest, testing::Values("gpt2", "llama3", "qwen2"));

TEST(ByteBpe, GoldenTextsReachEveryKindOfToken) {
  const json golden = json::parse(ReadOrDie("byte_level.json"));
  EXPECT_GT(golden["texts"].size(), 200u);
  // A word that is a token but that no merges lead to (Llama 3's ignore_merges), and a token that
  // is recognised in text (Qwen2): without them the golden ids would show nothing of either.
  EXPECT_NE(golden["llama3"]["ids"][13], golden["gpt2"]["ids"][13]);
  EXPECT_THAT(golden["qwen2"]["ids"].dump(), HasSubstr("518"));
}

TEST(ByteBpe, SpecialTokensAreNeverReadFromText) {
  const auto tokenizer = ParseOrDie(json::parse(ReadOrDie("llama3.json")));
  const int32_t bos = *tokenizer->bos_id();
  const std::string text = "<|begin_of_text|>";
  EXPECT_THAT(*tokenizer->Encode(text), testing::Not(testing::Contains(bos)));
  EXPECT_EQ(*tokenizer->Decode(*tokenizer->Encode(text)), text);
  EXPECT_EQ(*tokenizer->Decode(std::vector<int32_t>{bos}), "");
}

TEST(ByteBpe, BytesThatAreNoTextAreReplaced) {
  const auto tokenizer = ParseOrDie(json::parse(ReadOrDie("gpt2.json")));
  EXPECT_EQ(*tokenizer->Encode("a\xff"), *tokenizer->Encode("a\xef\xbf\xbd"));
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{-1}).status().code(),
            absl::StatusCode::kOutOfRange);
}

// The pair of files that OPT and GPT-2 were published with says the same as their tokenizer.json.
TEST(ByteBpe, VocabularyAndMergesAreTheSameTokenizer) {
  const json golden = json::parse(ReadOrDie("byte_level.json"));
  const json whole = json::parse(ReadOrDie("gpt2.json"));
  std::string merges = "#version: 0.2\n";
  for (const json& merge : whole["model"]["merges"]) {
    absl::StrAppend(&merges, merge.get<std::string>(), "\n");
  }
  const TempDir folder;
  WriteOrDie(folder, "vocab.json", whole["model"]["vocab"].dump());
  WriteOrDie(folder, "merges.txt", merges);
  WriteOrDie(folder, "tokenizer_config.json",
             R"({"add_bos_token": true, "bos_token": {"content": "<|endoftext|>"},
                 "eos_token": "<|endoftext|>"})");
  const auto tokenizer = LoadTokenizer(folder.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (size_t i = 0; i < golden["texts"].size(); ++i) {
    EXPECT_THAT(*(*tokenizer)->Encode(golden["texts"][i].get<std::string>()),
                ElementsAreArray(golden["gpt2"]["ids"][i].get<std::vector<int32_t>>()));
  }
  EXPECT_EQ((*tokenizer)->bos_id(), (*tokenizer)->vocabulary_size() - 1);
  EXPECT_EQ((*tokenizer)->eos_id(), (*tokenizer)->bos_id());
}

// What the reader says to the Llama 3 tokenizer with one part replaced.
std::string Refusal(const std::string& pointer, const json& value) {
  json tokenizer = json::parse(ReadOrDie("llama3.json"));
  tokenizer[json::json_pointer(pointer)] = value;
  const auto parsed = ParseTokenizerJson(tokenizer.dump(), "", "tokenizer.json");
  return parsed.ok() ? "accepted" : parsed.status().ToString();
}

TEST(ByteBpe, OtherKindsAreRefusedByName) {
  EXPECT_EQ(Refusal("/model/type", "Unigram"),
            "UNIMPLEMENTED: tokenizer.json: model.type Unigram is not supported: only BPE is");
  EXPECT_EQ(Refusal("/model/byte_fallback", true),
            "UNIMPLEMENTED: tokenizer.json: model.byte_fallback true is not supported: it marks a "
            "SentencePiece model; put its tokenizer.model into the folder");
  EXPECT_EQ(Refusal("/model/end_of_word_suffix", "</w>"),
            "UNIMPLEMENTED: tokenizer.json: model.end_of_word_suffix </w> is not supported: only "
            "none is");
  EXPECT_EQ(Refusal("/normalizer", {{"type", "Lowercase"}}),
            "UNIMPLEMENTED: tokenizer.json: normalizer Lowercase is not supported: none and NFC "
            "are");
  EXPECT_EQ(Refusal("/pre_tokenizer", {{"type", "Metaspace"}}),
            "UNIMPLEMENTED: tokenizer.json: pre_tokenizer Metaspace is not supported: ByteLevel, "
            "Split and Digits are");
  EXPECT_EQ(Refusal("/pre_tokenizer/pretokenizers/0/behavior", "MergedWithNext"),
            "UNIMPLEMENTED: tokenizer.json: pre_tokenizer: Split.behavior MergedWithNext is not "
            "supported: Isolated, and Removed (inverted), are");
  EXPECT_EQ(Refusal("/post_processor", {{"type", "BertProcessing"}}),
            "UNIMPLEMENTED: tokenizer.json: post_processor BertProcessing is not supported: "
            "ByteLevel and TemplateProcessing are");
  EXPECT_EQ(Refusal("/pre_tokenizer/pretokenizers/0/pattern/Regex", "(a"),
            "INVALID_ARGUMENT: tokenizer.json: pre_tokenizer: the expression (a cannot be read at "
            "byte 2: missing closing parenthesis");
  EXPECT_EQ(Refusal("/model/merges/0", "onlyone"),
            "INVALID_ARGUMENT: tokenizer.json: model.merges holds an entry that is no pair of "
            "tokens");
  EXPECT_EQ(Refusal("/model/merges/0", {"qq", "zz"}),
            "INVALID_ARGUMENT: tokenizer.json: merge 0, \"qq zz\", names a token that the "
            "vocabulary lacks");
  EXPECT_EQ(Refusal("/model/vocab/a", 1 << 20),
            "INVALID_ARGUMENT: tokenizer.json: model.vocab: \"a\" has no id from 0 to 1048575");
  EXPECT_EQ(ParseTokenizerJson("[1]", "", "tokenizer.json").status().message(),
            "tokenizer.json is not a JSON object, or is damaged");
}

// An expression that is sound to read may take steps without end on some texts: that is said of
// those texts, with the file, and the process lives.
TEST(ByteBpe, AnExpressionThatTakesTooManyStepsIsAnError) {
  json tokenizer = json::parse(ReadOrDie("llama3.json"));
  tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(?:a|aa)+[bc]";
  const auto parsed = ParseOrDie(tokenizer);
  EXPECT_TRUE(parsed->Encode("aaab").ok());
  const absl::Status refused = parsed->Encode(std::string(100, 'a')).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("tokenizer.json: the expression (?:a|aa)+"));
  EXPECT_TRUE(parsed->Encode("aaab").ok());
}

TEST(ByteBpe, AnyReplacedPartIsRefusedOrWorks) {
  const uint64_t seed = 514;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  const json flat = json::parse(ReadOrDie("qwen2.json")).flatten();
  std::vector<std::string> pointers;
  for (const auto& [pointer, value] : flat.items()) {
    // Hundreds of merges and tokens would drown the rest.
    const bool bulk =
        pointer.rfind("/model/vocab/", 0) == 0 || pointer.rfind("/model/merges/", 0) == 0;
    if (!bulk || random.Bernoulli(0.05)) pointers.push_back(pointer);
  }
  const std::vector<json> values = {nullptr,       -1,        0, 3, 1e300, true, "x", "",
                                    json::array(), {{"a", 1}}};
  int accepted = 0;
  for (int i = 0; i < 400; ++i) {
    json broken = flat;
    broken[pointers[random.Uniform(pointers.size())]] = values[random.Uniform(values.size())];
    // Empty containers do not unflatten everywhere; such a draw says nothing.
    json whole;
    try {
      whole = broken.unflatten();
    } catch (const json::exception&) {
      continue;
    }
    const auto parsed = ParseTokenizerJson(whole.dump(), "", "tokenizer.json");
    if (!parsed.ok()) continue;
    ++accepted;
    const auto ids = (*parsed)->Encode("Call me Ishmael 12  <tool_call>");
    ASSERT_TRUE(ids.ok()) << ids.status();
    for (const int32_t id : *ids) {
      EXPECT_LT(id, (*parsed)->vocabulary_size());
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace kvsweep
