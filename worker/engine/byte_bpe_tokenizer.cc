#include "worker/engine/byte_bpe_tokenizer.h"

#include <algorithm>
#include <queue>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "worker/engine/utf8.h"

namespace kvsweep {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// A token of the word that is being joined, in a doubly linked list; id -1 once its left neighbour
// has swallowed it.
struct Symbol {
  int32_t id;
  int32_t previous;
  int32_t next;
};

// Two neighbours that join; out of date when they no longer join to `id`.
struct Candidate {
  int32_t rank;
  int32_t left;
  int32_t id;
  // First learned first, then leftmost: std::priority_queue pops the largest.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : left > other.left;
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ByteBpeTokenizer::Make(ByteBpeModel model,
                                                                  absl::string_view file_name) {
  auto tokenizer =
      std::unique_ptr<ByteBpeTokenizer>(new ByteBpeTokenizer(std::move(model), file_name));
  RETURN_IF_ERROR(tokenizer->Index());
  return tokenizer;
}

absl::Status ByteBpeTokenizer::Index() {
  byte_id_.fill(-1);
  for (int32_t id = 0; id < vocabulary_size(); ++id) {
    const ByteBpeModel::Token& token = model_.tokens[id];
    if (token.special || token.bytes.empty()) continue;
    if (token.bytes.size() == 1) byte_id_[static_cast<uint8_t>(token.bytes[0])] = id;
    const auto [entry, is_new] = id_of_.emplace(token.bytes, id);
    if (!is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat(file_name_, ": token ", id, " repeats token ", entry->second));
    }
  }
  const auto missing = std::ranges::find(byte_id_, -1);
  if (missing != byte_id_.end()) {
    return absl::UnimplementedError(
        absl::StrCat(file_name_, ": no token for byte ", missing - byte_id_.begin(),
                     "; only byte-level vocabularies (all 256 bytes) are supported"));
  }
  for (size_t rank = 0; rank < model_.merges.size(); ++rank) {
    const ByteBpeModel::Merge& merge = model_.merges[rank];
    // The first of equals counts, as in the library.
    merge_of_.emplace(PairKey(merge.left, merge.right),
                      Joined{.rank = static_cast<int32_t>(rank), .id = merge.joined});
  }
  for (const int32_t id : model_.added) {
    starts_added_[static_cast<uint8_t>(model_.tokens[id].bytes[0])] = true;
  }
  return absl::OkStatus();
}

const ByteBpeTokenizer::Joined* ByteBpeTokenizer::FindMerge(int32_t left, int32_t right) const {
  const auto found = merge_of_.find(PairKey(left, right));
  return found == merge_of_.end() ? nullptr : &found->second;
}

void ByteBpeTokenizer::JoinWord(absl::string_view word, Ids& ids) const {
  if (model_.whole_words_first) {
    const auto whole = id_of_.find(std::string_view(word.data(), word.size()));
    if (whole != id_of_.end()) return ids.values.push_back(whole->second);
  }
  const auto count = static_cast<int32_t>(word.size());
  std::vector<Symbol> symbols;
  for (int32_t i = 0; i < count; ++i) {
    symbols.push_back({.id = byte_id_[static_cast<uint8_t>(word[i])],
                       .previous = i - 1,
                       .next = i + 1 < count ? i + 1 : -1});
  }
  std::priority_queue<Candidate> candidates;
  const auto consider = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const Joined* joined = FindMerge(symbols[left].id, symbols[symbols[left].next].id);
    if (joined != nullptr) candidates.push({joined->rank, left, joined->id});
  };
  for (int32_t i = 0; i + 1 < count; ++i) consider(i);
  while (!candidates.empty()) {
    const Candidate candidate = candidates.top();
    candidates.pop();
    Symbol& left = symbols[candidate.left];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Joined* joined = FindMerge(left.id, right.id);
    if (joined == nullptr || joined->id != candidate.id) continue;
    left.id = joined->id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = candidate.left;
    consider(left.previous);
    consider(candidate.left);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.values.push_back(symbol.id);
  }
}

absl::Status ByteBpeTokenizer::SplitFrom(size_t step, absl::string_view text, Ids& ids) const {
  if (text.empty() || ids.full()) return absl::OkStatus();
  if (step == model_.steps.size()) {
    JoinWord(text, ids);
    return absl::OkStatus();
  }
  const SplitStep& split = model_.steps[step];
  if (split.pattern == nullptr) {
    if (text[0] == ' ') return SplitFrom(step + 1, text, ids);
    return SplitFrom(step + 1, absl::StrCat(" ", text), ids);
  }
  // U+180E was a space until Unicode 6.3 and is one to the pattern's library still. Another
  // character of its length and kind (U+200B) stands for it while places are sought.
  std::string seen;
  absl::string_view subject = text;
  if (absl::StrContains(text, "\xe1\xa0\x8e")) {
    seen = absl::StrReplaceAll(text, {{"\xe1\xa0\x8e", "\xe2\x80\x8b"}});
    subject = seen;
  }
  size_t at = 0;
  while (at < text.size() && !ids.full()) {
    const absl::StatusOr<std::optional<TextPattern::Match>> found =
        split.pattern->Find(subject, at);
    if (!found.ok()) return Annotate(found.status(), file_name_);
    const std::optional<TextPattern::Match>& match = *found;
    const size_t begin = match.has_value() ? match->begin : text.size();
    if (split.keep_gaps) RETURN_IF_ERROR(SplitFrom(step + 1, text.substr(at, begin - at), ids));
    if (!match.has_value()) return absl::OkStatus();
    RETURN_IF_ERROR(SplitFrom(step + 1, text.substr(begin, match->end - begin), ids));
    at = match->end;
  }
  return absl::OkStatus();
}

std::pair<size_t, int32_t> ByteBpeTokenizer::AddedAt(absl::string_view text) const {
  std::pair<size_t, int32_t> longest{0, -1};
  if (!starts_added_[static_cast<uint8_t>(text[0])]) return longest;
  for (const int32_t id : model_.added) {
    const std::string& token = model_.tokens[id].bytes;
    if (token.size() > longest.first && absl::StartsWith(text, token)) longest = {token.size(), id};
  }
  return longest;
}

absl::Status ByteBpeTokenizer::EncodeStretch(absl::string_view text, Ids& ids) const {
  if (text.empty()) return absl::OkStatus();
  if (model_.normal_form_c) return SplitFrom(0, NormalFormC(text), ids);
  return SplitFrom(0, text, ids);
}

absl::StatusOr<std::vector<int32_t>> ByteBpeTokenizer::Encode(absl::string_view text,
                                                              const EncodeOptions& options) const {
  Ids ids{.values = {}, .most = options.max_tokens};
  if (options.add_bos && model_.bos_id.has_value()) ids.values.push_back(*model_.bos_id);
  const std::string repaired = RepairUtf8(text);
  absl::string_view rest = repaired;
  size_t plain = 0;  // bytes of `rest` up to the next added token
  while (plain < rest.size() && !ids.full()) {
    const auto [bytes, id] = AddedAt(rest.substr(plain));
    if (bytes == 0) {
      ++plain;
      continue;
    }
    RETURN_IF_ERROR(EncodeStretch(rest.substr(0, plain), ids));
    ids.values.push_back(id);
    rest.remove_prefix(plain + bytes);
    plain = 0;
  }
  RETURN_IF_ERROR(EncodeStretch(rest, ids));
  if (ids.values.size() > options.max_tokens) ids.values.resize(options.max_tokens);
  return std::move(ids.values);
}

absl::StatusOr<std::string> ByteBpeTokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocabulary_size()) {
      return absl::OutOfRangeError(
          absl::StrCat("token id ", id, " is outside the vocabulary of ", vocabulary_size()));
    }
    const ByteBpeModel::Token& token = model_.tokens[id];
    if (!token.special) text += token.bytes;
  }
  return RepairUtf8(text);
}

}  // namespace kvsweep
