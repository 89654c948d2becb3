// UTF-8 as tokenizers need it: what is a character, and what becomes of bytes that are none.
#ifndef KVSWEEP_WORKER_ENGINE_UTF8_H_
#define KVSWEEP_WORKER_ENGINE_UTF8_H_

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace kvsweep {

// Bytes of the UTF-8 character at the start of `text`, or 0 when there is none:
// stray or missing continuation bytes, overlong forms, surrogates, and values
// past U+10FFFF are not characters. REQUIRES: !text.empty().
size_t CharacterBytes(absl::string_view text);

// `text` with each byte that is part of no character replaced by U+FFFD.
std::string RepairUtf8(absl::string_view text);

// The characters of `text` in Unicode's normal form C. REQUIRES: valid UTF-8.
std::string NormalFormC(absl::string_view text);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_UTF8_H_
