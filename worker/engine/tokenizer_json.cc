// The files of Hugging Face's tokenizers that hold a byte-level BPE: tokenizer.json, or the older
// pair of vocab.json and merges.txt, with tokenizer_config.json beside them.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"
#include "worker/engine/byte_bpe_tokenizer.h"
#include "worker/engine/json_object.h"
#include "worker/engine/tokenizer.h"
#include "worker/engine/utf8.h"

namespace kvsweep {
namespace {

using nlohmann::json;

// How GPT-2 splits text: contractions, words and numbers with the space before them, other runs,
// and white space of which the last space is left to the word behind it.
constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// GPT-2's alphabet: every byte as a printable character. Printable bytes of Latin-1 stand for
// themselves, the others for U+0100 and up in their order.
std::map<uint32_t, uint8_t> ByteAlphabet() {
  std::map<uint32_t, uint8_t> byte_of;
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) ||
                           (byte >= 0xae && byte <= 0xff);
    byte_of[printable ? byte : next++] = static_cast<uint8_t>(byte);
  }
  return byte_of;
}

// One tokenizer's files on the way to a ByteBpeModel. Each Read takes a part of the JSON.
class Reader {
 public:
  explicit Reader(absl::string_view file_name) : file_(file_name), byte_of_(ByteAlphabet()) {}

  absl::Status ReadVocabulary(const json& vocabulary) {
    if (!vocabulary.is_object() || vocabulary.empty()) return Wrong("model.vocab is no object");
    for (const auto& [text, id] : vocabulary.items()) {
      RETURN_IF_ERROR(CheckId(id, "model.vocab", text));
      RETURN_IF_ERROR(Place(id.get<int32_t>(), text, Bytes(text)));
    }
    return absl::OkStatus();
  }

  absl::Status AddMerge(absl::string_view left, absl::string_view right) {
    const auto id = [&](absl::string_view text) {
      const auto found = id_of_.find(text);
      return found == id_of_.end() ? -1 : found->second;
    };
    const std::string joined = absl::StrCat(left, right);
    const ByteBpeModel::Merge merge{id(left), id(right), id(joined)};
    if (merge.left < 0 || merge.right < 0 || merge.joined < 0) {
      return Wrong(absl::StrCat("merge ", model_.merges.size(), ", \"", left, " ", right,
                                "\", names a token that the vocabulary lacks"));
    }
    model_.merges.push_back(merge);
    return absl::OkStatus();
  }

  // "a b" or, in newer files, ["a", "b"].
  absl::Status ReadMerges(const json& merges) {
    if (!merges.is_array()) return Wrong("model.merges is no list");
    for (const json& merge : merges) {
      std::vector<std::string> parts;
      if (merge.is_string()) {
        parts = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        parts = {merge[0], merge[1]};
      }
      if (parts.size() != 2) return Wrong("model.merges holds an entry that is no pair of tokens");
      RETURN_IF_ERROR(AddMerge(parts[0], parts[1]));
    }
    return absl::OkStatus();
  }

  absl::Status ReadModel(const json& model) {
    if (!model.is_object()) return Wrong("model is missing");
    const std::string type = Type(model);
    // Files of the library's first years do not name the type.
    if (type != "BPE" && !(type.empty() && model.contains("merges"))) {
      return Refused("model.type", type, "only BPE is");
    }
    if (Flag(model, "byte_fallback")) {
      return Refused("model.byte_fallback", "true",
                     "it marks a SentencePiece model; put its tokenizer.model into the folder");
    }
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const std::string value = Text(model, name);
      if (!value.empty()) return Refused(absl::StrCat("model.", name), value, "only none is");
    }
    if (model.contains("dropout") && !model["dropout"].is_null() && model["dropout"] != 0.0) {
      return Refused("model.dropout", model["dropout"].dump(), "merges must not be random");
    }
    model_.whole_words_first = Flag(model, "ignore_merges");
    RETURN_IF_ERROR(ReadVocabulary(model.value("vocab", json())));
    return ReadMerges(model.value("merges", json()));
  }

  // Special tokens never stand for text; the others are recognised wherever they occur.
  absl::Status ReadAddedTokens(const json& added) {
    if (added.is_null()) return absl::OkStatus();
    if (!added.is_array()) return Wrong("added_tokens is no list");
    for (const json& token : added) {
      const std::string content = Text(token, "content");
      if (content.empty()) return Wrong("added_tokens holds a token without content");
      RETURN_IF_ERROR(CheckId(token.value("id", json()), "added_tokens", content));
      const bool special = Flag(token, "special");
      for (const char* name : {"single_word", "lstrip", "rstrip"}) {
        if (!special && Flag(token, name)) {
          return Refused(absl::StrCat("added_tokens: \"", content, "\": ", name), "true",
                         "tokens that are no special ones must be recognised everywhere");
        }
      }
      const auto id = token["id"].get<int32_t>();
      const auto known = id_of_.find(content);
      if (known != id_of_.end() && known->second != id) {
        return Wrong(absl::StrCat("added_tokens: \"", content, "\" has id ", id,
                                  ", but the vocabulary says ", known->second));
      }
      // Its content is text as it is, not in the alphabet of the vocabulary.
      if (known == id_of_.end()) RETURN_IF_ERROR(Place(id, content, content));
      model_.tokens[id] = {.bytes = content, .special = special};
      if (!special) model_.added.push_back(id);
    }
    return absl::OkStatus();
  }

  absl::Status ReadNormalizer(const json& normalizer) {
    if (normalizer.is_null()) return absl::OkStatus();
    const std::string type = Type(normalizer);
    if (type == "Sequence") {
      return ForEach(normalizer, "normalizers",
                     [&](const json& part) { return ReadNormalizer(part); });
    }
    if (type != "NFC") return Refused("normalizer", type, "none and NFC are");
    model_.normal_form_c = true;
    return absl::OkStatus();
  }

  absl::Status ReadPreTokenizer(const json& step) {
    if (!step.is_object()) {
      return Refused("pre_tokenizer", "null", "byte-level BPE needs ByteLevel");
    }
    const std::string type = Type(step);
    if (type == "Sequence") {
      return ForEach(step, "pretokenizers",
                     [&](const json& part) { return ReadPreTokenizer(part); });
    }
    if (type == "Split") return ReadSplit(step);
    if (type == "Digits") {
      return AddSplit(Flag(step, "individual_digits") ? R"(\p{N})" : R"(\p{N}+)", true);
    }
    if (type != "ByteLevel") {
      return Refused("pre_tokenizer", type, "ByteLevel, Split and Digits are");
    }
    has_byte_level_ = true;
    if (!step.contains("add_prefix_space") || Flag(step, "add_prefix_space")) {
      model_.steps.push_back({});
    }
    if (step.contains("use_regex") && !Flag(step, "use_regex")) return absl::OkStatus();
    return AddSplit(kGpt2Pattern, true);
  }

  absl::Status AddSplit(const std::string& expression, bool keep_gaps) {
    absl::StatusOr<TextPattern> pattern = TextPattern::Compile(expression);
    if (!pattern.ok()) return Wrong(absl::StrCat("pre_tokenizer: ", pattern.status().message()));
    model_.steps.push_back(
        {.pattern = std::make_shared<TextPattern>(*std::move(pattern)), .keep_gaps = keep_gaps});
    return absl::OkStatus();
  }

  // A template says what stands before a text; the other kinds put nothing there that matters.
  absl::Status ReadPostProcessor(const json& processor) {
    if (!processor.is_object()) return absl::OkStatus();
    const std::string type = Type(processor);
    if (type == "Sequence") {
      return ForEach(processor, "processors",
                     [&](const json& part) { return ReadPostProcessor(part); });
    }
    if (type == "ByteLevel") return absl::OkStatus();
    if (type != "TemplateProcessing") {
      return Refused("post_processor", type, "ByteLevel and TemplateProcessing are");
    }
    const json single = processor.value("single", json::array());
    if (!single.is_array() || single.empty()) return Wrong("post_processor.single is no list");
    if (!single[0].contains("SpecialToken")) return absl::OkStatus();
    if (single.size() > 1 && single[1].contains("SpecialToken")) {
      return Refused("post_processor.single", single.dump(), "one token before a text is");
    }
    model_.bos_id = Find(Text(single[0]["SpecialToken"], "id"));
    if (!model_.bos_id) return Wrong("post_processor.single begins with an unknown token");
    return absl::OkStatus();
  }

  absl::Status RequireByteLevel() const {
    if (has_byte_level_) return absl::OkStatus();
    return absl::UnimplementedError(
        absl::StrCat(file_, ": pre_tokenizer has no ByteLevel; only byte-level BPE is supported"));
  }

  // What tokenizer_config.json adds: the end of a text, and a beginning where the tokenizer itself
  // puts none but is asked to (OPT).
  void ReadConfig(const json& config) {
    const auto named = [&](const char* name) {
      const json token = config.is_object() ? config.value(name, json()) : json();
      return Find(token.is_string() ? token.get<std::string>() : Text(token, "content"));
    };
    model_.eos_id = named("eos_token");
    if (!model_.bos_id && config.is_object() && Flag(config, "add_bos_token")) {
      model_.bos_id = named("bos_token");
    }
    // The pair of files does not say which tokens are special; this does.
    for (const char* name : {"bos_token", "eos_token", "unk_token", "pad_token"}) {
      const std::optional<int32_t> id = named(name);
      if (id.has_value()) model_.tokens[*id].special = true;
    }
  }

  ByteBpeModel Take() { return std::move(model_); }

 private:
  absl::Status Wrong(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(file_, ": ", what));
  }
  absl::Status Refused(absl::string_view field, absl::string_view value,
                       absl::string_view supported) const {
    return absl::UnimplementedError(
        absl::StrCat(file_, ": ", field, " ", value, " is not supported: ", supported));
  }

  static bool Flag(const json& object, const char* name) {
    return object.is_object() && object.contains(name) && object[name] == true;
  }
  static std::string Text(const json& object, const char* name) {
    if (!object.is_object() || !object.contains(name) || !object[name].is_string()) return "";
    return object[name].get<std::string>();
  }
  static std::string Type(const json& object) { return Text(object, "type"); }

  template <typename Read>
  absl::Status ForEach(const json& object, const char* name, Read read) const {
    // Deeper than a few levels no file goes; the parser has bounded the depth already.
    const json parts = object.value(name, json());
    if (!parts.is_array()) return Wrong(absl::StrCat("a Sequence has no list ", name));
    for (const json& part : parts) RETURN_IF_ERROR(read(part));
    return absl::OkStatus();
  }

  absl::Status ReadSplit(const json& step) {
    const std::string behavior = Text(step, "behavior");
    const bool invert = Flag(step, "invert");
    const bool isolated = behavior == "Isolated" && !invert;
    if (!isolated && !(behavior == "Removed" && invert)) {
      return Refused("pre_tokenizer: Split.behavior",
                     absl::StrCat(behavior, invert ? " (inverted)" : ""),
                     "Isolated, and Removed (inverted), are");
    }
    const std::string expression = Text(step.value("pattern", json()), "Regex");
    if (expression.empty()) return Wrong("pre_tokenizer: Split.pattern.Regex is missing");
    return AddSplit(expression, isolated);
  }

  absl::Status CheckId(const json& id, absl::string_view where, absl::string_view text) const {
    if (id.is_number_unsigned() && id.get<uint64_t>() < uint64_t{limits::kVocabulary}) {
      return absl::OkStatus();
    }
    return Wrong(
        absl::StrCat(where, ": \"", text, "\" has no id from 0 to ", limits::kVocabulary - 1));
  }

  absl::Status Place(int32_t id, absl::string_view text, std::string bytes) {
    if (static_cast<size_t>(id) >= model_.tokens.size()) model_.tokens.resize(id + size_t{1});
    ByteBpeModel::Token& token = model_.tokens[id];
    if (!token.bytes.empty()) {
      return Wrong(absl::StrCat("id ", id, " is given twice, to \"", text, "\" and another"));
    }
    if (bytes.empty()) return Wrong(absl::StrCat("token ", id, " is empty"));
    token.bytes = std::move(bytes);
    id_of_.emplace(std::string(text), id);
    return absl::OkStatus();
  }

  // The bytes that a token of the vocabulary stands for; a token with characters outside the
  // alphabet is text as it is.
  std::string Bytes(absl::string_view text) const {
    std::string bytes;
    for (absl::string_view rest = text; !rest.empty();) {
      const size_t length = CharacterBytes(rest);
      uint32_t value = static_cast<uint8_t>(rest[0]);
      if (length == 2) value = (value & 0x1fu) << 6 | (static_cast<uint8_t>(rest[1]) & 0x3fu);
      const auto byte = length == 1 || length == 2 ? byte_of_.find(value) : byte_of_.end();
      if (byte == byte_of_.end()) return std::string(text);
      bytes.push_back(static_cast<char>(byte->second));
      rest.remove_prefix(length);
    }
    return bytes;
  }

  std::optional<int32_t> Find(const std::string& text) const {
    const auto found = id_of_.find(text);
    return found == id_of_.end() ? std::nullopt : std::optional(found->second);
  }

  const std::string file_;
  const std::map<uint32_t, uint8_t> byte_of_;
  std::map<std::string, int32_t, std::less<>> id_of_;  // by the file's spelling
  ByteBpeModel model_;
  bool has_byte_level_ = false;
};

absl::StatusOr<json> ParseObject(absl::string_view text, absl::string_view file) {
  std::optional<json> object = ParseJsonObject(text);
  if (!object.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(file, " is not a JSON object, or is damaged"));
  }
  return *std::move(object);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(absl::string_view text,
                                                              absl::string_view config_text,
                                                              absl::string_view file_name) {
  ASSIGN_OR_RETURN(const json object, ParseObject(text, file_name));
  Reader reader(file_name);
  RETURN_IF_ERROR(reader.ReadNormalizer(object.value("normalizer", json())));
  RETURN_IF_ERROR(reader.ReadModel(object.value("model", json())));
  RETURN_IF_ERROR(reader.ReadAddedTokens(object.value("added_tokens", json())));
  RETURN_IF_ERROR(reader.ReadPreTokenizer(object.value("pre_tokenizer", json())));
  RETURN_IF_ERROR(reader.RequireByteLevel());
  RETURN_IF_ERROR(reader.ReadPostProcessor(object.value("post_processor", json())));
  reader.ReadConfig(ParseJsonObject(config_text).value_or(json()));
  return ByteBpeTokenizer::Make(reader.Take(), file_name);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseVocabularyAndMerges(absl::string_view vocabulary,
                                                                    absl::string_view merges,
                                                                    absl::string_view config_text,
                                                                    absl::string_view file_name) {
  ASSIGN_OR_RETURN(const json object, ParseObject(vocabulary, file_name));
  Reader reader(file_name);
  RETURN_IF_ERROR(reader.ReadVocabulary(object));
  for (absl::string_view line : absl::StrSplit(merges, '\n')) {
    if (absl::EndsWith(line, "\r")) line.remove_suffix(1);
    if (line.empty() || absl::StartsWith(line, "#version")) continue;
    const std::vector<absl::string_view> parts = absl::StrSplit(line, ' ');
    if (parts.size() != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat(file_name, ": \"", line, "\" of merges.txt is no pair of tokens"));
    }
    RETURN_IF_ERROR(reader.AddMerge(parts[0], parts[1]));
  }
  RETURN_IF_ERROR(reader.AddSplit(kGpt2Pattern, true));
  reader.ReadConfig(ParseJsonObject(config_text).value_or(json()));
  return ByteBpeTokenizer::Make(reader.Take(), file_name);
}

}  // namespace kvsweep
