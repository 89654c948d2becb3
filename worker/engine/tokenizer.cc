#include "worker/engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "worker/engine/bpe_tokenizer.h"

namespace kvsweep {
namespace {

// SentencePiece's file: a protocol buffer, read by its wire format

struct WireField {
  uint64_t number = 0;
  uint64_t value = 0;       // of a varint, or the bits of a fixed-size field
  absl::string_view bytes;  // of a length-delimited field
};

// Reads the fields of one message in order. Every length is held against what is left.
class WireReader {
 public:
  explicit WireReader(absl::string_view message) : rest_(message) {}

  bool done() const { return rest_.empty(); }

  // The next field, or nullopt for bytes that are no protocol buffer.
  std::optional<WireField> Next() {
    const std::optional<uint64_t> key = Varint();
    if (!key.has_value()) return std::nullopt;
    WireField field;
    field.number = *key >> 3;
    switch (*key & 7) {
      case 0: {
        const std::optional<uint64_t> value = Varint();
        if (!value.has_value()) return std::nullopt;
        field.value = *value;
        return field;
      }
      case 1:
        return Fixed(8, field);
      case 2: {
        const std::optional<uint64_t> length = Varint();
        if (!length.has_value() || *length > rest_.size()) return std::nullopt;
        field.bytes = rest_.substr(0, *length);
        rest_.remove_prefix(*length);
        return field;
      }
      case 5:
        return Fixed(4, field);
      default:
        return std::nullopt;  // groups have never been part of this format
    }
  }

 private:
  std::optional<uint64_t> Varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && !rest_.empty(); shift += 7) {
      const auto byte = static_cast<uint8_t>(rest_[0]);
      rest_.remove_prefix(1);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
    return std::nullopt;
  }

  std::optional<WireField> Fixed(size_t bytes, WireField field) {
    if (bytes > rest_.size()) return std::nullopt;
    std::memcpy(&field.value, rest_.data(), bytes);
    rest_.remove_prefix(bytes);
    return field;
  }

  absl::string_view rest_;
};

// What the fields of the model file that matter here come to, with the format's own defaults.
// Numbers in comments are the fields' numbers in sentencepiece_model.proto.
struct SentencePieceModel {
  Vocabulary vocabulary;
  uint64_t model_type = 1;              // trainer_spec 3: unigram 1, BPE 2, word 3, character 4
  bool whitespace_as_suffix = false;    // trainer_spec 24
  std::string bos_piece = "<s>";        // trainer_spec 46
  std::string eos_piece = "</s>";       // trainer_spec 47
  std::string normalizer = "identity";  // normalizer_spec 1
  bool has_character_map = false;       // normalizer_spec 2 or 6, or denormalizer_spec 2
  bool escape_whitespaces = true;       // normalizer_spec 5
};

// Calls `take` for each field of `message`; false when it is no protocol buffer.
template <typename Take>
bool ForEachField(absl::string_view message, Take take) {
  for (WireReader reader(message); !reader.done();) {
    const std::optional<WireField> field = reader.Next();
    if (!field.has_value() || !take(*field)) return false;
  }
  return true;
}

bool ReadPiece(absl::string_view message, std::vector<Piece>& pieces) {
  Piece piece;
  const bool good = ForEachField(message, [&](const WireField& field) {
    if (field.number == 1) piece.text = std::string(field.bytes);
    if (field.number == 2) {
      const auto bits = static_cast<uint32_t>(field.value);
      std::memcpy(&piece.score, &bits, sizeof(bits));
    }
    if (field.number == 3) {
      if (field.value < 1 || field.value > 6) return false;
      piece.type = static_cast<PieceType>(field.value);
    }
    return true;
  });
  pieces.push_back(std::move(piece));
  return good && static_cast<int64_t>(pieces.size()) <= limits::kVocabulary;
}

bool ReadTrainerSpec(absl::string_view message, SentencePieceModel& model) {
  return ForEachField(message, [&](const WireField& field) {
    if (field.number == 3) model.model_type = field.value;
    if (field.number == 24) model.whitespace_as_suffix = field.value != 0;
    if (field.number == 46) model.bos_piece = std::string(field.bytes);
    if (field.number == 47) model.eos_piece = std::string(field.bytes);
    return true;
  });
}

bool ReadNormalizerSpec(absl::string_view message, SentencePieceModel& model) {
  model.vocabulary.remove_extra_whitespaces = true;  // the format's default
  return ForEachField(message, [&](const WireField& field) {
    if (field.number == 1) model.normalizer = std::string(field.bytes);
    if (field.number == 2 || field.number == 6) model.has_character_map |= !field.bytes.empty();
    if (field.number == 3) model.vocabulary.add_dummy_prefix = field.value != 0;
    if (field.number == 4) model.vocabulary.remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) model.escape_whitespaces = field.value != 0;
    return true;
  });
}

bool ReadModel(absl::string_view bytes, SentencePieceModel& model) {
  return ForEachField(bytes, [&](const WireField& field) {
    switch (field.number) {
      case 1:
        return ReadPiece(field.bytes, model.vocabulary.pieces);
      case 2:
        return ReadTrainerSpec(field.bytes, model);
      case 3:
        return ReadNormalizerSpec(field.bytes, model);
      case 5:  // denormalizer_spec
        return ForEachField(field.bytes, [&](const WireField& inner) {
          model.has_character_map |= inner.number == 2 && !inner.bytes.empty();
          return true;
        });
      default:
        return true;
    }
  });
}

absl::Status CheckSupported(const SentencePieceModel& model, absl::string_view file_name) {
  constexpr std::array<absl::string_view, 5> kTypes = {"?", "unigram", "BPE", "word", "character"};
  if (model.model_type != 2) {
    return absl::UnimplementedError(
        absl::StrCat(file_name, ": trainer_spec.model_type ",
                     model.model_type < kTypes.size() ? kTypes[model.model_type] : kTypes[0],
                     " is not supported: only BPE is"));
  }
  if (model.whitespace_as_suffix) {
    return absl::UnimplementedError(
        absl::StrCat(file_name, ": trainer_spec.treat_whitespace_as_suffix is not supported"));
  }
  if (model.normalizer != "identity" || model.has_character_map) {
    return absl::UnimplementedError(
        absl::StrCat(file_name, ": normalizer_spec \"", model.normalizer,
                     "\" is not supported: only \"identity\", without a character map, is"));
  }
  return absl::OkStatus();
}

std::optional<int32_t> FindControl(const std::vector<Piece>& pieces, absl::string_view text) {
  const auto piece = std::ranges::find_if(pieces, [&](const Piece& candidate) {
    return candidate.type == PieceType::kControl && candidate.text == text;
  });
  if (piece == pieces.end()) return std::nullopt;
  return static_cast<int32_t>(piece - pieces.begin());
}

bool IsLlama2cName(absl::string_view name) {
  return absl::StartsWith(name, "tok") && absl::EndsWith(name, ".bin");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePieceModel(absl::string_view bytes,
                                                                   absl::string_view file_name) {
  SentencePieceModel model;
  if (!ReadModel(bytes, model) || model.vocabulary.pieces.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_name, " is not a SentencePiece model, or is damaged"));
  }
  RETURN_IF_ERROR(CheckSupported(model, file_name));
  Vocabulary& vocabulary = model.vocabulary;
  if (!model.escape_whitespaces) vocabulary.space = " ";
  vocabulary.bos_id = FindControl(vocabulary.pieces, model.bos_piece);
  vocabulary.eos_id = FindControl(vocabulary.pieces, model.eos_piece);
  return BpeTokenizer::Make(std::move(vocabulary), file_name);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseLlama2cTokenizer(absl::string_view bytes,
                                                                 absl::string_view file_name) {
  constexpr int32_t kFirstByteId = 3;
  const absl::Status damaged = absl::InvalidArgumentError(
      absl::StrCat(file_name, " is not a llama2.c tokenizer, or is damaged"));
  const auto take = [&bytes](auto& value) {
    if (bytes.size() < sizeof(value)) return false;
    std::memcpy(&value, bytes.data(), sizeof(value));
    bytes.remove_prefix(sizeof(value));
    return true;
  };
  int32_t longest = 0;
  if (!take(longest)) return damaged;
  Vocabulary vocabulary;
  vocabulary.space = " ";
  while (!bytes.empty()) {
    Piece piece;
    int32_t length = 0;
    if (!take(piece.score) || !take(length) || length < 0 || length > longest ||
        static_cast<size_t>(length) > bytes.size() ||
        static_cast<int64_t>(vocabulary.pieces.size()) == limits::kVocabulary) {
      return damaged;
    }
    piece.text = std::string(bytes.substr(0, length));
    bytes.remove_prefix(length);
    const auto id = static_cast<int32_t>(vocabulary.pieces.size());
    if (id == 0) piece.type = PieceType::kUnknown;
    if (id == 1 || id == 2) piece.type = PieceType::kControl;
    if (id >= kFirstByteId && id < kFirstByteId + 256) {
      piece.type = PieceType::kByte;
    }
    vocabulary.pieces.push_back(std::move(piece));
  }
  vocabulary.bos_id = 1;
  vocabulary.eos_id = 2;
  return BpeTokenizer::Make(std::move(vocabulary), file_name);
}

absl::StatusOr<std::string> FindTokenizerFile(const std::string& folder) {
  std::error_code error;
  std::set<std::string> names;
  for (auto entry = std::filesystem::directory_iterator(folder, error);
       !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    names.insert(entry->path().filename().string());
  }
  if (error) {
    return absl::NotFoundError(absl::StrCat("model folder ", folder, ": ", error.message()));
  }
  if (names.contains("tokenizer.model")) return absl::StrCat(folder, "/tokenizer.model");
  const auto llama2c = std::ranges::find_if(names, IsLlama2cName);
  if (llama2c != names.end()) return absl::StrCat(folder, "/", *llama2c);
  if (names.contains("tokenizer.json")) return absl::StrCat(folder, "/tokenizer.json");
  if (names.contains("vocab.json") && names.contains("merges.txt")) {
    return absl::StrCat(folder, "/vocab.json");
  }
  return absl::NotFoundError(
      absl::StrCat("model folder ", folder, " has no tokenizer: neither tokenizer.model, ",
                   "tok*.bin, tokenizer.json nor vocab.json with merges.txt"));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder) {
  ASSIGN_OR_RETURN(const std::string path, FindTokenizerFile(folder));
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path, limits::kTokenizerFileBytes));
  if (absl::EndsWith(path, ".model")) return ParseSentencePieceModel(bytes, path);
  if (absl::EndsWith(path, ".bin")) return ParseLlama2cTokenizer(bytes, path);
  std::string config;
  const std::string config_path = absl::StrCat(folder, "/tokenizer_config.json");
  if (std::error_code ignored; std::filesystem::exists(config_path, ignored)) {
    ASSIGN_OR_RETURN(config, ReadFile(config_path, limits::kModelConfigBytes));
  }
  if (absl::EndsWith(path, "tokenizer.json")) return ParseTokenizerJson(bytes, config, path);
  ASSIGN_OR_RETURN(const std::string merges,
                   ReadFile(absl::StrCat(folder, "/merges.txt"), limits::kTokenizerFileBytes));
  return ParseVocabularyAndMerges(bytes, merges, config, path);
}

}  // namespace kvsweep
