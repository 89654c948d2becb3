#include "worker/engine/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/random.h"
#include "nlohmann/json.hpp"
#include "tests/worker/engine/model_folder.h"

namespace kvsweep {
namespace {

using nlohmann::json;

constexpr char kBooks[] = "experiments/models/books-llama-14m";
constexpr char kStories[] = "experiments/models/stories260K";
constexpr char kSpmEncode[] = "/usr/bin/spm_encode";

std::unique_ptr<Tokenizer> LoadOrDie(const std::string& folder) {
  auto tokenizer = LoadTokenizer(folder);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::string ReadOrDie(const std::string& path) {
  auto content = ReadFile(path, 64 << 20);
  EXPECT_TRUE(content.ok()) << content.status();
  return *std::move(content);
}

// ------------------------------------------------------------------ a SentencePiece file, by hand

std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  bytes.push_back(static_cast<char>(value));
  return bytes;
}

std::string Number(uint64_t field, uint64_t value) { return Varint(field << 3) + Varint(value); }

std::string Bytes(uint64_t field, const std::string& bytes) {
  return Varint(field << 3 | 2) + Varint(bytes.size()) + bytes;
}

std::string Piece(const std::string& text, float score, int type) {
  std::string bits(sizeof(score), '\0');
  std::memcpy(bits.data(), &score, sizeof(score));
  return Bytes(1, Bytes(1, text) + Varint(2 << 3 | 5) + bits + Number(3, type));
}

// unk, <s>, </s> and the 256 bytes.
std::string CommonPieces() {
  std::string pieces = Piece("<unk>", 0, 2) + Piece("<s>", 0, 3) + Piece("</s>", 0, 3);
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "<0x%02X>", byte);
    pieces += Piece(text, 0, 6);
  }
  return pieces;
}

const std::string kBpe = Bytes(2, Number(3, 2));
const std::string kIdentity = Bytes(3, Bytes(1, "identity") + Number(4, 0));

std::string Refusal(const std::string& bytes) {
  const auto tokenizer = ParseSentencePieceModel(bytes, "tokenizer.model");
  return tokenizer.ok() ? "accepted" : tokenizer.status().ToString();
}

// ------------------------------------------------------------------------------------ the oracles

// The ids that SentencePiece's own program gives to each text. It reads lines, so newlines go in as
// byte 1 and come out as id 4; in this vocabulary neither byte is part of any other piece.
std::vector<int32_t> IdsBySentencePiece(const std::string& text) {
  const TempDir folder;
  EXPECT_FALSE(absl::StrContains(text, '\1'));
  EXPECT_TRUE(
      WriteFileAtomic(folder.Join("in"), absl::StrReplaceAll(text, {{"\n", "\1"}}) + "\n").ok());
  const std::string command =
      absl::StrCat(kSpmEncode, " --model=", kBooks, "/tokenizer.model --output_format=id < ",
                   folder.Join("in"), " > ", folder.Join("out"));
  EXPECT_EQ(std::system(command.c_str()), 0);
  std::istringstream numbers(ReadOrDie(folder.Join("out")));
  std::vector<int32_t> ids;
  for (int32_t id; numbers >> id;) ids.push_back(id == 4 ? 13 : id);
  return ids;
}

// Byte pair encoding by its definition: look at all pairs, join the best, start again.
std::vector<int32_t> IdsByDefinition(
    std::vector<std::string> symbols,
    const std::map<std::string, std::pair<float, int32_t>>& pieces) {
  while (true) {
    size_t best = symbols.size();
    float best_score = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto joined = pieces.find(symbols[i] + symbols[i + 1]);
      if (joined == pieces.end()) continue;
      if (best == symbols.size() || joined->second.first > best_score) {
        best = i;
        best_score = joined->second.first;
      }
    }
    if (best == symbols.size()) break;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<int64_t>(best) + 1);
  }
  std::vector<int32_t> ids;
  for (const std::string& symbol : symbols) {
    if (const auto piece = pieces.find(symbol); piece != pieces.end()) {
      ids.push_back(piece->second.second);
    } else {
      for (const char byte : symbol) ids.push_back(3 + static_cast<uint8_t>(byte));
    }
  }
  return ids;
}

// A text of characters that matter to a tokenizer, valid UTF-8.
std::string RandomText(Random& random, size_t characters) {
  static const std::vector<std::string> kAlphabet = {
      "a",  "b",      "e",      "t",    "h",   "T",      "he ",  " ",    " ",    "  ",
      "\n", "\t",     "0",      "7",    ".",   ",",      "'",    "é",    "ß",    "日",
      "😀",  "\u2581", "\u00a0", "\r\n", "<s>", "<0x41>", "\x7f", "the ", "whale"};
  std::string text;
  for (size_t i = 0; i < characters; ++i) text += kAlphabet[random.Uniform(kAlphabet.size())];
  return text;
}

// -------------------------------------------------------------------------------------- the tests

TEST(TokenizerTest, BooksModelMatchesItsGoldenIds) {
  const auto tokenizer = LoadOrDie(kBooks);
  EXPECT_EQ(tokenizer->vocabulary_size(), 4096);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  const json golden = json::parse(ReadOrDie("tests/golden/tokenizer/books.json"));
  ASSERT_GT(golden["cases"].size(), 40u);
  for (const json& example : golden["cases"]) {
    const auto text = example["text"].get<std::string>();
    EXPECT_EQ(*tokenizer->Encode(text), example["ids"].get<std::vector<int32_t>>()) << text;
  }
}

TEST(TokenizerTest, BooksModelMatchesSentencePieceOnAWholeBook) {
  ASSERT_TRUE(std::filesystem::exists(kSpmEncode)) << "scripts/install-packages brings it";
  const auto tokenizer = LoadOrDie(kBooks);
  const std::string book = ReadOrDie("experiments/data/moby_dick.txt");
  const std::vector<int32_t> ids = *tokenizer->Encode(book);
  EXPECT_GT(ids.size(), 300'000u);
  EXPECT_TRUE(ids == IdsBySentencePiece(book));
}

TEST(TokenizerTest, BooksModelMatchesSentencePieceOnRandomText) {
  ASSERT_TRUE(std::filesystem::exists(kSpmEncode)) << "scripts/install-packages brings it";
  const auto tokenizer = LoadOrDie(kBooks);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    Random random(seed);
    const std::string text = RandomText(random, 2000);
    EXPECT_TRUE(*tokenizer->Encode(text) == IdsBySentencePiece(text)) << "seed " << seed;
  }
}

TEST(TokenizerTest, StoriesModelMatchesItsGoldenIds) {
  const auto tokenizer = LoadOrDie(kStories);
  EXPECT_EQ(tokenizer->vocabulary_size(), 512);
  const json golden = json::parse(ReadOrDie("experiments/models/stories260K/golden.json"));
  for (const json& story : golden["tinystories_sample"]) {
    const auto ids = story["ids"].get<std::vector<int32_t>>();
    const auto text = tokenizer->Decode(ids);
    ASSERT_TRUE(text.ok()) << text.status();
    EXPECT_TRUE(absl::StrContains(ReadOrDie("experiments/data/tinystories_sample.txt"), *text));
    EXPECT_EQ(*tokenizer->Encode(*text, {.add_bos = true}), ids);
  }
  auto greedy = golden["greedy_from_bos_257"].get<std::vector<int32_t>>();
  greedy.resize(201);
  EXPECT_EQ(*tokenizer->Decode(greedy), golden["greedy_text_first_201_ids"].get<std::string>());
}

TEST(TokenizerTest, ValidTextsComeBackUnchanged) {
  for (const char* folder : {kBooks, kStories}) {
    const auto tokenizer = LoadOrDie(folder);
    for (uint64_t seed = 1; seed <= 200; ++seed) {
      Random random(seed);
      std::string text = RandomText(random, random.Uniform(60));
      // SentencePiece writes a space as this mark, so the mark itself comes back as a space.
      if (folder == kBooks) text = absl::StrReplaceAll(text, {{"\u2581", ""}});
      EXPECT_EQ(*tokenizer->Decode(*tokenizer->Encode(text)), text) << folder << " seed " << seed;
    }
  }
}

TEST(TokenizerTest, LimitGivesAPrefixOfTheWhole) {
  const auto tokenizer = LoadOrDie(kBooks);
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Random random(seed);
    const std::string text = RandomText(random, 300);
    const auto whole = *tokenizer->Encode(text, {.add_bos = true});
    const size_t limit = random.Uniform(whole.size() + 5);
    const auto part = *tokenizer->Encode(text, {.add_bos = true, .max_tokens = limit});
    ASSERT_EQ(part.size(), std::min(limit, whole.size())) << "seed " << seed;
    EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin())) << "seed " << seed;
  }
  EXPECT_TRUE(tokenizer->Encode("text", {.max_tokens = 0})->empty());
}

TEST(TokenizerTest, BytesThatAreNotUtf8BecomeTheReplacementCharacter) {
  const auto tokenizer = LoadOrDie(kBooks);
  const std::string replacement = "\xef\xbf\xbd";
  // A stray continuation, an overlong slash, a surrogate, past U+10FFFF, and a cut character.
  for (const std::string bad : {"\x80", "\xc0", "\xff", "\xe6\x97"}) {
    std::string expected = "a";
    for (size_t i = 0; i < bad.size(); ++i) expected += replacement;
    EXPECT_EQ(*tokenizer->Encode("a" + bad + " b"), *tokenizer->Encode(expected + " b"));
  }
  EXPECT_EQ(*tokenizer->Encode("\xed\xa0\x80"),
            *tokenizer->Encode(replacement + replacement + replacement));
  EXPECT_EQ(*tokenizer->Encode("\xf4\x90\x80\x80"),
            *tokenizer->Encode(replacement + replacement + replacement + replacement));
  EXPECT_EQ(*tokenizer->Decode(std::vector<int32_t>{261, 3 + 0xe6, 3 + 0x97}),
            "a" + replacement + replacement);
}

TEST(TokenizerTest, DecodeSkipsControlsAndRefusesStrangers) {
  const auto tokenizer = LoadOrDie(kBooks);
  auto ids = *tokenizer->Encode("The whale", {.add_bos = true});
  ids.push_back(*tokenizer->eos_id());
  EXPECT_EQ(*tokenizer->Decode(ids), "The whale");
  EXPECT_EQ(*tokenizer->Decode(std::vector<int32_t>{}), "");
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{5, 4096}).status().ToString(),
            "OUT_OF_RANGE: token id 4096 is outside the vocabulary of 4096");
  EXPECT_FALSE(tokenizer->Decode(std::vector<int32_t>{-1}).ok());
}

// Random vocabularies, with ties and with pieces that reach over spaces, against the definition.
TEST(TokenizerTest, AgreesWithTheDefinitionOnRandomVocabularies) {
  const std::string mark = "\u2581";
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    Random random(seed);
    const std::vector<std::string> letters = {"a", "b", "c", mark};
    const bool inner_spaces = random.Bernoulli(0.3);
    std::map<std::string, std::pair<float, int32_t>> pieces;
    std::string model = CommonPieces();
    for (int tries = 0; tries < 60; ++tries) {
      std::string piece;
      for (uint64_t length = 1 + random.Uniform(4); length > 0; --length) {
        piece += letters[random.Uniform(inner_spaces || piece.empty() ? 4 : 3)];
      }
      const auto score = -static_cast<float>(random.Uniform(8));
      const auto id = static_cast<int32_t>(259 + pieces.size());
      if (!pieces.emplace(piece, std::pair(score, id)).second) continue;
      model += Piece(piece, score, 1);
    }
    const auto tokenizer = ParseSentencePieceModel(model + kBpe + kIdentity, "m");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    std::string text;
    std::vector<std::string> symbols = {mark};  // the space put before the text
    for (uint64_t length = 1 + random.Uniform(40); length > 0; --length) {
      const std::string& letter = letters[random.Uniform(4)];
      symbols.push_back(letter);
      text += letter == mark ? " " : letter;
    }
    EXPECT_EQ(*(*tokenizer)->Encode(text), IdsByDefinition(symbols, pieces))
        << "seed " << seed << ": " << text;
  }
}

TEST(TokenizerTest, UserDefinedPiecesAreNeverJoined) {
  const std::string model = CommonPieces() + Piece("<x>", 0, 4) + Piece("<x>y", 0, 4) +
                            Piece("a", -1, 1) + Piece("a<x>", 0, 1) + kBpe +
                            Bytes(3, Bytes(1, "identity") + Number(3, 0) + Number(4, 0));
  const auto tokenizer = ParseSentencePieceModel(model, "m");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(*(*tokenizer)->Encode("a<x>a<x>y"), (std::vector<int32_t>{261, 259, 261, 260}));
}

TEST(TokenizerTest, HonoursTheWhitespaceFlags) {
  const std::string pieces = CommonPieces() + Piece("\u2581", -1, 1) + Piece("a", -2, 1);
  const auto tidy =
      ParseSentencePieceModel(pieces + kBpe + Bytes(3, Bytes(1, "identity") + Number(4, 1)), "m");
  ASSERT_TRUE(tidy.ok()) << tidy.status();
  EXPECT_EQ(*(*tidy)->Encode("  a   a  "), (std::vector<int32_t>{259, 260, 259, 260}));
  EXPECT_EQ(*(*tidy)->Decode(*(*tidy)->Encode("  a   a  ")), "a a");
  EXPECT_TRUE((*tidy)->Encode("   ")->empty());
  const auto bare = ParseSentencePieceModel(
      pieces + kBpe + Bytes(3, Bytes(1, "identity") + Number(3, 0) + Number(4, 0)), "m");
  EXPECT_EQ(*(*bare)->Encode(" a"), (std::vector<int32_t>{259, 260}));
  EXPECT_EQ(*(*bare)->Decode(*(*bare)->Encode(" a")), " a");
  const auto unescaped = ParseSentencePieceModel(
      CommonPieces() + Piece(" ", -1, 1) + Piece(" a", -2, 1) + Piece("a", -3, 1) + kBpe +
          Bytes(3, Bytes(1, "identity") + Number(4, 0) + Number(5, 0)),
      "m");
  EXPECT_EQ(*(*unescaped)->Encode("a a"), (std::vector<int32_t>{260, 260}));
}

TEST(TokenizerTest, RefusesOtherKindsByName) {
  EXPECT_EQ(Refusal(CommonPieces() + Bytes(2, Number(3, 1)) + kIdentity),
            "UNIMPLEMENTED: tokenizer.model: trainer_spec.model_type unigram is not supported: "
            "only BPE is");
  EXPECT_EQ(Refusal(CommonPieces() + Bytes(2, Number(3, 2) + Number(24, 1)) + kIdentity),
            "UNIMPLEMENTED: tokenizer.model: trainer_spec.treat_whitespace_as_suffix is not "
            "supported");
  EXPECT_EQ(Refusal(CommonPieces() + kBpe + Bytes(3, Bytes(1, "nmt_nfkc") + Bytes(2, "map"))),
            "UNIMPLEMENTED: tokenizer.model: normalizer_spec \"nmt_nfkc\" is not supported: only "
            "\"identity\", without a character map, is");
  EXPECT_EQ(Refusal(Piece("<unk>", 0, 2) + Piece("a", 0, 1) + kBpe + kIdentity),
            "UNIMPLEMENTED: tokenizer.model: no piece for byte 0; only models with byte fallback "
            "(all 256 byte pieces) are supported");
  EXPECT_EQ(Refusal(CommonPieces() + Piece("a", 0, 5) + kBpe + kIdentity),
            "UNIMPLEMENTED: tokenizer.model: piece 259 is of type unused, not supported");
}

TEST(TokenizerTest, RefusesDamagedModels) {
  const std::string damaged =
      "INVALID_ARGUMENT: tokenizer.model is not a SentencePiece model, or is damaged";
  const std::string sound = CommonPieces() + kBpe + kIdentity;
  EXPECT_EQ(Refusal(sound), "accepted");
  EXPECT_EQ(Refusal(""), damaged);
  EXPECT_EQ(Refusal("plain text"), damaged);
  EXPECT_EQ(Refusal(sound.substr(0, sound.size() - 3)), damaged);
  EXPECT_EQ(Refusal(std::string(20, '\xff')), damaged);
  EXPECT_EQ(Refusal(CommonPieces() + Piece("a", 0, 9) + kBpe + kIdentity), damaged);
  EXPECT_EQ(Refusal(CommonPieces() + Piece("a", 0, 1) + Piece("a", 0, 1) + kBpe + kIdentity),
            "INVALID_ARGUMENT: tokenizer.model: piece 260 repeats piece 259");
  EXPECT_EQ(Refusal(CommonPieces() + Piece("", 0, 1) + kBpe + kIdentity),
            "INVALID_ARGUMENT: tokenizer.model: piece 259 is empty or not UTF-8");
  EXPECT_EQ(Refusal(CommonPieces() + Piece("a", NAN, 1) + kBpe + kIdentity),
            "INVALID_ARGUMENT: tokenizer.model: piece 259 has a score that is not finite");
  EXPECT_EQ(Refusal(CommonPieces() + Piece("<0x0>", 0, 6) + kBpe + kIdentity),
            "INVALID_ARGUMENT: tokenizer.model: piece 259 is of type byte but not spelt <0x00> to "
            "<0xFF>");
}

TEST(TokenizerTest, RefusesDamagedLlama2cFiles) {
  const std::string sound = ReadOrDie("experiments/models/stories260K/tok512.bin");
  EXPECT_TRUE(ParseLlama2cTokenizer(sound, "tok512.bin").ok());
  for (const size_t length : {0, 3, 11, 6000}) {
    EXPECT_EQ(ParseLlama2cTokenizer(sound.substr(0, length), "tok512.bin").status().ToString(),
              "INVALID_ARGUMENT: tok512.bin is not a llama2.c tokenizer, or is damaged");
  }
}

// Whatever bytes change, a model is refused or works on any text.
TEST(TokenizerTest, MutatedModelsAreRefusedOrWork) {
  const std::string sound = CommonPieces() + Piece("\u2581a", -1, 1) + Piece("ab", -2, 1) +
                            Piece("u", -3, 4) + kBpe + kIdentity;
  int accepted = 0;
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    Random random(seed);
    std::string bytes = sound;
    for (uint64_t edits = 1 + random.Uniform(3); edits > 0; --edits) {
      // Mostly at the end: in the specs and the last pieces.
      const size_t back = 1 + random.Uniform(random.Bernoulli(0.8) ? 90 : bytes.size() - 1);
      bytes[bytes.size() - back] = static_cast<char>(random.Uniform(256));
    }
    const auto tokenizer = ParseSentencePieceModel(bytes, "m");
    if (!tokenizer.ok()) continue;
    ++accepted;
    const auto ids = (*tokenizer)->Encode(RandomText(random, 30));
    for (const int32_t id : *ids) {
      ASSERT_TRUE(id >= 0 && id < (*tokenizer)->vocabulary_size()) << "seed " << seed;
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(TokenizerTest, NamesWhatAFolderLacks) {
  const TempDir folder;
  EXPECT_EQ(Shown(LoadTokenizer(folder.path()).status(), folder),
            "NOT_FOUND: model folder DIR has no tokenizer: neither tokenizer.model, tok*.bin, "
            "tokenizer.json nor vocab.json with merges.txt");
  WriteOrDie(folder, "tokenizer.json", "{}");
  EXPECT_EQ(Shown(LoadTokenizer(folder.path()).status(), folder),
            "INVALID_ARGUMENT: DIR/tokenizer.json: model is missing");
  EXPECT_EQ(LoadTokenizer(folder.Join("nowhere")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvsweep
