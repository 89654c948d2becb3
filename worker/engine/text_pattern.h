// A compiled regular expression over Unicode text, as tokenizers split text by: PCRE2 with Unicode
// properties. Only byte_bpe_tokenizer.cc and its reader need this.
#ifndef KVSWEEP_WORKER_ENGINE_TEXT_PATTERN_H_
#define KVSWEEP_WORKER_ENGINE_TEXT_PATTERN_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct pcre2_real_code_8;

namespace kvsweep {

class TextPattern {
 public:
  // InvalidArgument for an expression that cannot be read, with the place.
  static absl::StatusOr<TextPattern> Compile(const std::string& expression);

  struct Match {
    size_t begin = 0;
    size_t end = 0;  // > begin: empty matches do not count
  };
  // The first match in `text` at or behind byte `from`. Several threads may search at once.
  // InvalidArgument when the expression takes more steps, or memory, than any sound one does.
  // REQUIRES: valid UTF-8 without U+180E (PCRE2 alone takes it for a space).
  absl::StatusOr<std::optional<Match>> Find(absl::string_view text, size_t from) const;

 private:
  struct Free {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::unique_ptr<pcre2_real_code_8, Free> code_;
  std::string expression_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_TEXT_PATTERN_H_
