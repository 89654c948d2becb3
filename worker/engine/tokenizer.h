// Text to token ids and back.
//
// A Tokenizer is immutable once made, so any number of threads may use it.
// Readers: SentencePiece BPE models with the identity normaliser (Llama 1 and
// 2, Mistral, the shipped books models), byte-level BPE from tokenizer.json or
// from vocab.json and merges.txt (GPT-2, OPT, Llama 3, Qwen2), and the tok*.bin
// files of llama2.c.
// Other kinds of tokenizer are refused by name when they are loaded: a
// tokenizer that is slightly wrong would spoil every number quietly.
//
// The files are parsed here, because the SentencePiece library carries its own
// copy of libprotobuf and cannot live in one process with ours.
#ifndef KVSWEEP_WORKER_ENGINE_TOKENIZER_H_
#define KVSWEEP_WORKER_ENGINE_TOKENIZER_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvsweep {

struct EncodeOptions {
  bool add_bos = false;
  // Stop once that many ids (a BOS included) exist. With the usual
  // vocabularies, whose pieces hold a space only at their start, only about as
  // much of the text is looked at as those ids need.
  size_t max_tokens = std::numeric_limits<size_t>::max();
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int32_t vocabulary_size() const = 0;
  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;

  // The ids of `text`. Bytes that are not UTF-8 are read as U+FFFD, as SentencePiece does; every
  // other text comes back from Decode unchanged, unless the model itself tidies whitespace or
  // composes characters (NFC), or the text holds the mark U+2581 that SentencePiece writes for a
  // space. Special tokens are never
  // recognised inside a text. An empty text has no ids (but BOS if asked for). The first n ids do
  // not depend on `max_tokens`. Takes O(n log n). InvalidArgument, with the
  // tokenizer's file, where the file's own expression cannot split the text.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                                      const EncodeOptions& options) const = 0;

  // The text of `ids`; control tokens have none, and the space that encoding
  // puts before a text is dropped. Byte tokens that do not form UTF-8 become
  // U+FFFD. OutOfRange for an id outside the vocabulary.
  virtual absl::StatusOr<std::string> Decode(std::span<const int32_t> ids) const = 0;

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text) const {
    return Encode(text, EncodeOptions{});
  }
};

// Reads a SentencePiece model (tokenizer.model) from its bytes. `file_name`
// serves the messages. InvalidArgument for bytes that are no such model,
// Unimplemented for a kind that is not supported (unigram, other normalisers,
// no byte fallback), each naming the field.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePieceModel(absl::string_view bytes,
                                                                   absl::string_view file_name);

// Reads a llama2.c tokenizer file (tok512.bin): int32 longest piece, then for
// each id {float32 score, int32 length, bytes} to the end of the file. Ids 0, 1
// and 2 are unknown, BOS and EOS; 3 to 258 are the bytes.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseLlama2cTokenizer(absl::string_view bytes,
                                                                 absl::string_view file_name);

// Reads a byte-level BPE from the text of a tokenizer.json; `config_text`, which
// may be empty, is that of tokenizer_config.json, which names the end of a text
// and whether a BOS is put before it. InvalidArgument for a damaged file,
// Unimplemented for another model, normaliser, pre-tokeniser or post-processor,
// by name.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(absl::string_view text,
                                                              absl::string_view config_text,
                                                              absl::string_view file_name);

// The same from GPT-2's pair of files, whose rules are fixed. Only the tokens
// that tokenizer_config.json names as BOS, EOS and so on are special.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseVocabularyAndMerges(absl::string_view vocabulary,
                                                                    absl::string_view merges,
                                                                    absl::string_view config_text,
                                                                    absl::string_view file_name);

// The file that LoadTokenizer would read in `folder`: tokenizer.model, else the
// first tok*.bin, else tokenizer.json, else vocab.json beside a merges.txt.
// NotFound when there is none, saying what was looked for.
absl::StatusOr<std::string> FindTokenizerFile(const std::string& folder);

// The tokenizer of a model folder, read from FindTokenizerFile.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_TOKENIZER_H_
