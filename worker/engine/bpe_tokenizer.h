// Byte pair encoding, whatever file the vocabulary came from: tokenizer.cc reads the files,
// this encodes and decodes. Only tokenizer.cc needs this header; everyone else sees Tokenizer.
#ifndef KVSWEEP_WORKER_ENGINE_BPE_TOKENIZER_H_
#define KVSWEEP_WORKER_ENGINE_BPE_TOKENIZER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/engine/tokenizer.h"

namespace kvsweep {

// The numbers are those of SentencePiece's model format.
enum class PieceType {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

struct Piece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct Vocabulary {
  std::vector<Piece> pieces;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
  absl::string_view space = "\xe2\x96\x81";  // how the pieces write it; U+2581
  // Of the normaliser: a space is put before each text; runs of spaces become
  // one and those at the ends go.
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = false;
};

// Byte pair encoding as SentencePiece does it: starting from characters, the
// adjacent pair whose joined piece scores highest is joined first, the leftmost
// of equals, until no adjacent pair joins to a piece. Characters that are no
// piece become their bytes.
class BpeTokenizer final : public Tokenizer {
 public:
  // Checks the vocabulary and indexes it: pieces unique, not empty and UTF-8, scores finite, all
  // 256 byte pieces there. `file_name` begins the messages.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Make(Vocabulary vocabulary,
                                                         absl::string_view file_name);

  int32_t vocabulary_size() const override {
    return static_cast<int32_t>(vocabulary_.pieces.size());
  }
  std::optional<int32_t> bos_id() const override { return vocabulary_.bos_id; }
  std::optional<int32_t> eos_id() const override { return vocabulary_.eos_id; }

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override;
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids) const override;

 private:
  // A stretch of the text that is one piece, or not yet known to be one, in a
  // doubly linked list; empty once its left neighbour has swallowed it.
  struct Symbol {
    absl::string_view text;
    int32_t id;  // of `text`, or -1
    int32_t previous;
    int32_t next;
    bool is_final;  // a user-defined piece: never joined
  };

  // Two neighbours that join to a piece. Out of date when their texts no
  // longer add up to `bytes`.
  struct Merge {
    float score;
    int32_t left;
    int32_t right;
    int32_t id;
    size_t bytes;

    // Highest score first, then leftmost: std::priority_queue pops the largest.
    bool operator<(const Merge& other) const {
      return score != other.score ? score < other.score : left > other.left;
    }
  };

  struct TextHash {
    using is_transparent = void;
    size_t operator()(absl::string_view text) const {
      return std::hash<std::string_view>()({text.data(), text.size()});
    }
  };
  struct TextEqual {
    using is_transparent = void;
    bool operator()(absl::string_view a, absl::string_view b) const { return a == b; }
  };

  explicit BpeTokenizer(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)) {}

  // Fill the tables from the vocabulary.
  absl::Status Index(absl::string_view file_name);
  absl::Status IndexPiece(int32_t id, absl::string_view where);

  int32_t Find(absl::string_view text) const {
    const auto piece = id_of_.find(text);
    return piece == id_of_.end() ? -1 : piece->second;
  }

  // Moves the next stretch of `text` that can be encoded by itself into `span`, normalised. The
  // flag tells the first stretch of a text. REQUIRES: !text.empty().
  void TakeSpan(absl::string_view& text, bool is_first, std::string& span) const;

  size_t UserDefinedBytes(absl::string_view text) const;
  std::vector<Symbol> SplitCharacters(absl::string_view text) const;
  void JoinSymbols(std::vector<Symbol>& symbols) const;
  void EncodeSpan(absl::string_view text, std::vector<int32_t>& ids) const;

  Vocabulary vocabulary_;
  // Pieces that text can become. Keys point into vocabulary_.
  std::unordered_map<absl::string_view, int32_t, TextHash, TextEqual> id_of_;
  std::array<int32_t, 256> byte_id_{};
  std::vector<absl::string_view> user_defined_;  // longest first
  bool spaces_split_ = true;                     // no piece reaches over the start of a space run
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_BPE_TOKENIZER_H_
