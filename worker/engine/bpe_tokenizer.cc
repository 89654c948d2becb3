#include "worker/engine/bpe_tokenizer.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "worker/engine/utf8.h"

namespace kvsweep {
namespace {

// The value of a byte piece, spelt "<0x0A>", or -1.
int ByteOfPiece(absl::string_view text) {
  constexpr absl::string_view kDigits = "0123456789ABCDEF";
  if (text.size() != 6 || !absl::StartsWith(text, "<0x") || text[5] != '>') {
    return -1;
  }
  const size_t high = kDigits.find(text[3]);
  const size_t low = kDigits.find(text[4]);
  if (high == absl::string_view::npos || low == absl::string_view::npos) {
    return -1;
  }
  return static_cast<int>(high * 16 + low);
}

// Whether `space` stands anywhere but at the start of the piece.
bool HoldsInnerSpace(absl::string_view piece, absl::string_view space) {
  while (absl::ConsumePrefix(&piece, space)) {
  }
  return absl::StrContains(piece, space);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> BpeTokenizer::Make(Vocabulary vocabulary,
                                                              absl::string_view file_name) {
  auto tokenizer = std::unique_ptr<BpeTokenizer>(new BpeTokenizer(std::move(vocabulary)));
  RETURN_IF_ERROR(tokenizer->Index(file_name));
  return tokenizer;
}

absl::Status BpeTokenizer::IndexPiece(int32_t id, absl::string_view where) {
  const Piece& piece = vocabulary_.pieces[id];
  if (piece.text.empty() || RepairUtf8(piece.text) != piece.text) {
    return absl::InvalidArgumentError(absl::StrCat(where, " is empty or not UTF-8"));
  }
  if (!std::isfinite(piece.score)) {
    return absl::InvalidArgumentError(absl::StrCat(where, " has a score that is not finite"));
  }
  switch (piece.type) {
    case PieceType::kUnknown:
    case PieceType::kControl:
      return absl::OkStatus();
    case PieceType::kUnused:
      return absl::UnimplementedError(absl::StrCat(where, " is of type unused, not supported"));
    case PieceType::kByte: {
      const int byte = ByteOfPiece(piece.text);
      if (byte < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(where, " is of type byte but not spelt <0x00> to <0xFF>"));
      }
      byte_id_[byte] = id;
      return absl::OkStatus();
    }
    case PieceType::kUserDefined:
      user_defined_.push_back(piece.text);
      break;
    case PieceType::kNormal:
      break;
  }
  const auto [entry, is_new] = id_of_.emplace(piece.text, id);
  if (!is_new) {
    return absl::InvalidArgumentError(absl::StrCat(where, " repeats piece ", entry->second));
  }
  if (HoldsInnerSpace(piece.text, vocabulary_.space)) spaces_split_ = false;
  return absl::OkStatus();
}

absl::Status BpeTokenizer::Index(absl::string_view file_name) {
  byte_id_.fill(-1);
  for (int32_t id = 0; id < vocabulary_size(); ++id) {
    RETURN_IF_ERROR(IndexPiece(id, absl::StrCat(file_name, ": piece ", id)));
  }
  std::ranges::stable_sort(user_defined_, std::greater<>(),
                           [](absl::string_view piece) { return piece.size(); });
  const auto missing = std::ranges::find(byte_id_, -1);
  if (missing == byte_id_.end()) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(file_name, ": no piece for byte ", missing - byte_id_.begin(),
                   "; only models with byte fallback (all 256 byte pieces) are supported"));
}

size_t BpeTokenizer::UserDefinedBytes(absl::string_view text) const {
  for (const absl::string_view piece : user_defined_) {
    if (absl::StartsWith(text, piece)) return piece.size();
  }
  return 0;
}

std::vector<BpeTokenizer::Symbol> BpeTokenizer::SplitCharacters(absl::string_view text) const {
  std::vector<Symbol> symbols;
  while (!text.empty()) {
    const size_t user_defined = UserDefinedBytes(text);
    const size_t bytes = user_defined > 0 ? user_defined : CharacterBytes(text);
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({.text = text.substr(0, bytes),
                       .id = Find(text.substr(0, bytes)),
                       .previous = index - 1,
                       .next = bytes == text.size() ? -1 : index + 1,
                       .is_final = user_defined > 0});
    text.remove_prefix(bytes);
  }
  return symbols;
}

void BpeTokenizer::JoinSymbols(std::vector<Symbol>& symbols) const {
  std::priority_queue<Merge> merges;
  const auto consider = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const Symbol& first = symbols[left];
    const Symbol& second = symbols[right];
    if (first.is_final || second.is_final) return;
    // Symbols lie side by side in the text, so their union is a view of it.
    const absl::string_view joined(first.text.data(), first.text.size() + second.text.size());
    const int32_t id = Find(joined);
    if (id < 0) return;
    merges.push({vocabulary_.pieces[id].score, left, right, id, joined.size()});
  };
  for (size_t i = 1; i < symbols.size(); ++i) {
    consider(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
  }
  while (!merges.empty()) {
    const Merge merge = merges.top();
    merges.pop();
    Symbol& left = symbols[merge.left];
    Symbol& right = symbols[merge.right];
    if (left.text.empty() || right.text.empty() ||
        left.text.size() + right.text.size() != merge.bytes) {
      continue;
    }
    left.text = absl::string_view(left.text.data(), merge.bytes);
    left.id = merge.id;
    left.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = merge.left;
    right.text = absl::string_view();
    consider(left.previous, merge.left);
    consider(merge.left, left.next);
  }
}

void BpeTokenizer::EncodeSpan(absl::string_view text, std::vector<int32_t>& ids) const {
  std::vector<Symbol> symbols = SplitCharacters(text);
  JoinSymbols(symbols);
  for (const Symbol& symbol : symbols) {
    if (symbol.text.empty()) continue;
    if (symbol.id >= 0) {
      ids.push_back(symbol.id);
      continue;
    }
    for (const char byte : symbol.text) {
      ids.push_back(byte_id_[static_cast<uint8_t>(byte)]);
    }
  }
}

// Joining never looks past a place that no piece can reach over, so the ids of a text are those of
// its spans, one after the other. Such a place is, with spaces_split_, the start of a run of
// spaces.
void BpeTokenizer::TakeSpan(absl::string_view& text, bool is_first, std::string& span) const {
  const absl::string_view space = vocabulary_.space;
  span.clear();
  if (is_first && vocabulary_.add_dummy_prefix) span.append(space.data(), space.size());
  bool was_space = is_first && vocabulary_.remove_extra_whitespaces;
  while (!text.empty()) {
    if (text[0] == ' ') {
      if (!was_space) span.append(space.data(), space.size());
      was_space = vocabulary_.remove_extra_whitespaces;
      text.remove_prefix(1);
      continue;
    }
    const size_t bytes = std::min(text.find(' '), text.size());
    span.append(RepairUtf8(text.substr(0, bytes)));
    text.remove_prefix(bytes);
    was_space = false;
    // A space mark in the text itself looks like a space: not the start of a run then.
    if (spaces_split_ && !absl::EndsWith(span, space)) return;
  }
  if (!vocabulary_.remove_extra_whitespaces) return;
  while (absl::EndsWith(span, space)) span.resize(span.size() - space.size());
}

absl::StatusOr<std::vector<int32_t>> BpeTokenizer::Encode(absl::string_view text,
                                                          const EncodeOptions& options) const {
  std::vector<int32_t> ids;
  if (options.add_bos && vocabulary_.bos_id.has_value()) ids.push_back(*vocabulary_.bos_id);
  if (vocabulary_.remove_extra_whitespaces) {
    text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  }
  std::string span;
  for (bool is_first = true; !text.empty() && ids.size() < options.max_tokens; is_first = false) {
    TakeSpan(text, is_first, span);
    EncodeSpan(span, ids);
  }
  if (ids.size() > options.max_tokens) ids.resize(options.max_tokens);
  return ids;
}

absl::StatusOr<std::string> BpeTokenizer::Decode(std::span<const int32_t> ids) const {
  constexpr absl::string_view kUnknownText = " \xe2\x81\x87 ";  // as SentencePiece shows it
  std::string text;
  std::string bytes;        // of byte pieces, which may form a character together
  bool at_start = true;     // no piece with a text yet
  bool drop_space = false;  // the first text begins with the space that encoding puts there
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocabulary_size()) {
      return absl::OutOfRangeError(
          absl::StrCat("token id ", id, " is outside the vocabulary of ", vocabulary_size()));
    }
    const Piece& piece = vocabulary_.pieces[id];
    if (piece.type == PieceType::kControl) continue;
    if (piece.type == PieceType::kByte) {
      bytes.push_back(static_cast<char>(ByteOfPiece(piece.text)));
    } else {
      absl::StrAppend(&text, RepairUtf8(bytes));
      bytes.clear();
      if (at_start) {
        drop_space =
            vocabulary_.add_dummy_prefix && absl::StartsWith(piece.text, vocabulary_.space);
      }
      absl::StrAppend(&text, piece.type == PieceType::kUnknown
                                 ? std::string(kUnknownText)
                                 : absl::StrReplaceAll(piece.text, {{vocabulary_.space, " "}}));
    }
    at_start = false;
  }
  absl::StrAppend(&text, RepairUtf8(bytes));
  if (vocabulary_.remove_extra_whitespaces) {
    return text.substr(std::min(text.find_first_not_of(' '), text.size()));
  }
  return drop_space ? text.substr(1) : text;
}

}  // namespace kvsweep
