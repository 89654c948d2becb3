// Byte-level byte pair encoding, as in GPT-2, OPT, Llama 3 and Qwen 2: text is split into words by
// regular expressions, each word becomes its bytes, and adjacent tokens are joined in the order in
// which the merges were learned. tokenizer_json.cc reads the files; everyone else sees Tokenizer.
#ifndef KVSWEEP_WORKER_ENGINE_BYTE_BPE_TOKENIZER_H_
#define KVSWEEP_WORKER_ENGINE_BYTE_BPE_TOKENIZER_H_

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

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/engine/text_pattern.h"
#include "worker/engine/tokenizer.h"

namespace kvsweep {

// A step of splitting text into words.
struct SplitStep {
  std::shared_ptr<const TextPattern> pattern;  // nullptr: put a space before words without one
  bool keep_gaps = true;                       // text between matches is words as well
};

struct ByteBpeModel {
  struct Token {
    std::string bytes;     // empty: no such token
    bool special = false;  // a control token: no text becomes it, and it has no text
  };
  struct Merge {
    int32_t left = 0;
    int32_t right = 0;
    int32_t joined = 0;
  };
  std::vector<Token> tokens;       // by id
  std::vector<Merge> merges;       // the first learned first
  std::vector<int32_t> added;      // tokens recognised in the text itself, before any step
  std::vector<SplitStep> steps;    // each splits the words of the one before
  bool whole_words_first = false;  // a word that is a token is not built from merges
  bool normal_form_c = false;      // text is composed first (Unicode NFC)
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
};

class ByteBpeTokenizer final : public Tokenizer {
 public:
  // Indexes the model. InvalidArgument for ids or merges that contradict each other, Unimplemented
  // where a byte has no token. `file_name` begins the messages.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Make(ByteBpeModel model,
                                                         absl::string_view file_name);

  int32_t vocabulary_size() const override { return static_cast<int32_t>(model_.tokens.size()); }
  std::optional<int32_t> bos_id() const override { return model_.bos_id; }
  std::optional<int32_t> eos_id() const override { return model_.eos_id; }

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override;
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids) const override;

 private:
  struct Joined {
    int32_t rank = 0;
    int32_t id = 0;
  };
  struct Ids {
    std::vector<int32_t> values;
    size_t most = 0;
    bool full() const { return values.size() >= most; }
  };

  ByteBpeTokenizer(ByteBpeModel model, absl::string_view file_name)
      : model_(std::move(model)), file_name_(file_name) {}
  absl::Status Index();

  // Bytes of the added token at the start of `text` (the longest), and its id; 0 bytes: none.
  std::pair<size_t, int32_t> AddedAt(absl::string_view text) const;
  absl::Status EncodeStretch(absl::string_view text, Ids& ids) const;
  absl::Status SplitFrom(size_t step, absl::string_view text, Ids& ids) const;
  void JoinWord(absl::string_view word, Ids& ids) const;
  const Joined* FindMerge(int32_t left, int32_t right) const;

  ByteBpeModel model_;
  std::string file_name_;
  std::array<int32_t, 256> byte_id_{};
  std::unordered_map<uint64_t, Joined> merge_of_;        // by left and right
  std::unordered_map<std::string_view, int32_t> id_of_;  // of what text can become
  std::array<bool, 256> starts_added_{};                 // first bytes of added tokens
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_BYTE_BPE_TOKENIZER_H_
