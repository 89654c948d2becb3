// Texts that are token ids already: .npy arrays, as the training programs of models leave them, and
// .u16 files, ids as raw little-endian 16-bit numbers.
#ifndef KVSWEEP_WORKER_ENGINE_TOKEN_FILE_H_
#define KVSWEEP_WORKER_ENGINE_TOKEN_FILE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvsweep {

// Whether `path` ends as a token file does. Everything else is text.
bool IsTokenFile(absl::string_view path);

// The ids in the `bytes` of a token file, whose kind is told by the end of `file_name`. .npy files
// may be of u2, u4, i4 or i8, little endian, with one dimension. InvalidArgument for a damaged
// file, another type or shape, and for an id outside `vocabulary`, naming its place.
absl::StatusOr<std::vector<int32_t>> ParseTokenFile(absl::string_view bytes,
                                                    absl::string_view file_name,
                                                    int32_t vocabulary);

// Ids written out as decimal numbers between white space, commas or the brackets of a JSON list.
// Errors as above.
absl::StatusOr<std::vector<int32_t>> ParseTokenList(absl::string_view text,
                                                    absl::string_view file_name,
                                                    int32_t vocabulary);

// InvalidArgument for an id outside `vocabulary`: a tokenizer that is not the model's gives such.
absl::Status CheckTokenIds(std::span<const int32_t> ids, int32_t vocabulary);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_TOKEN_FILE_H_
