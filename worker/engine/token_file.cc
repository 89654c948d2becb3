#include "worker/engine/token_file.h"

#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

static_assert(std::endian::native == std::endian::little, "ids are read as they lie");

absl::Status Wrong(absl::string_view file, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", what));
}

absl::Status CheckTokenId(absl::string_view file, size_t index, int64_t id, int32_t vocabulary) {
  if (id >= 0 && id < vocabulary) return absl::OkStatus();
  return Wrong(file, absl::StrCat("token ", index, " has id ", id, ", outside the vocabulary of ",
                                  vocabulary, "; is it a file for another model?"));
}

template <typename Number>
absl::StatusOr<std::vector<int32_t>> ReadNumbers(absl::string_view data, absl::string_view file,
                                                 int32_t vocabulary) {
  std::vector<int32_t> ids;
  ids.reserve(data.size() / sizeof(Number));
  for (size_t at = 0; at < data.size(); at += sizeof(Number)) {
    Number number;
    std::memcpy(&number, data.data() + at, sizeof(number));
    RETURN_IF_ERROR(CheckTokenId(file, ids.size(), static_cast<int64_t>(number), vocabulary));
    ids.push_back(static_cast<int32_t>(number));
  }
  return ids;
}

struct ArrayType {
  absl::string_view name;  // as NumPy writes it
  size_t bytes;
  absl::StatusOr<std::vector<int32_t>> (*read)(absl::string_view, absl::string_view, int32_t);
};

constexpr std::array<ArrayType, 4> kArrayTypes = {{{"<u2", 2, &ReadNumbers<uint16_t>},
                                                   {"<u4", 4, &ReadNumbers<uint32_t>},
                                                   {"<i4", 4, &ReadNumbers<int32_t>},
                                                   {"<i8", 8, &ReadNumbers<int64_t>}}};

// What follows 'key': in the header's Python dictionary, up to the end of it.
std::optional<absl::string_view> After(absl::string_view header, absl::string_view key) {
  const std::string quoted = absl::StrCat("'", key, "':");
  const size_t at = header.find(quoted);
  if (at == absl::string_view::npos) return std::nullopt;
  return absl::StripLeadingAsciiWhitespace(header.substr(at + quoted.size()));
}

// The elements of a one-dimensional shape, "(1000,)".
std::optional<uint64_t> OneDimension(absl::string_view shape) {
  if (!absl::ConsumePrefix(&shape, "(")) return std::nullopt;
  const size_t comma = shape.find(',');
  uint64_t count = 0;
  if (comma == absl::string_view::npos || !absl::SimpleAtoi(shape.substr(0, comma), &count)) {
    return std::nullopt;
  }
  shape = absl::StripLeadingAsciiWhitespace(shape.substr(comma + 1));
  return absl::StartsWith(shape, ")") ? std::optional(count) : std::nullopt;
}

// Splits a .npy file into its header and its data. Version 1 has a length of two bytes, 2 and 3 one
// of four.
bool SplitArray(absl::string_view bytes, absl::string_view* header, absl::string_view* data) {
  constexpr absl::string_view kMagic = "\x93NUMPY";
  if (!absl::StartsWith(bytes, kMagic) || bytes.size() < kMagic.size() + 6) return false;
  const auto version = static_cast<uint8_t>(bytes[kMagic.size()]);
  if (version < 1 || version > 3) return false;
  const size_t length_bytes = version == 1 ? 2 : 4;
  uint32_t length = 0;
  std::memcpy(&length, bytes.data() + kMagic.size() + 2, length_bytes);
  const size_t begin = kMagic.size() + 2 + length_bytes;
  if (length > bytes.size() - begin) return false;
  *header = bytes.substr(begin, length);
  *data = bytes.substr(begin + length);
  return true;
}

absl::StatusOr<std::vector<int32_t>> ParseArray(absl::string_view bytes, absl::string_view file,
                                                int32_t vocabulary) {
  absl::string_view header;
  absl::string_view data;
  if (!SplitArray(bytes, &header, &data)) return Wrong(file, "is no .npy file, or is damaged");
  const std::optional<absl::string_view> type = After(header, "descr");
  const std::optional<absl::string_view> shape = After(header, "shape");
  if (!type.has_value() || !shape.has_value())
    return Wrong(file, "its header names no type or shape");
  const std::optional<uint64_t> count = OneDimension(*shape);
  if (!count.has_value()) {
    return Wrong(file, absl::StrCat("has shape ", shape->substr(0, shape->find(')')),
                                    "); token ids must have one dimension"));
  }
  for (const ArrayType& candidate : kArrayTypes) {
    if (!absl::StartsWith(*type, absl::StrCat("'", candidate.name, "'"))) continue;
    if (data.size() / candidate.bytes != *count || data.size() % candidate.bytes != 0) {
      return Wrong(
          file, absl::StrCat("its header promises ", *count, " numbers of ", candidate.bytes,
                             " bytes, but ", data.size(), " bytes follow; is the file cut short?"));
    }
    return candidate.read(data, file, vocabulary);
  }
  return Wrong(file, absl::StrCat("holds numbers of type ", type->substr(0, type->find(',')),
                                  "; token ids must be u2, u4, i4 or i8, little endian"));
}

}  // namespace

bool IsTokenFile(absl::string_view path) {
  return absl::EndsWith(path, ".npy") || absl::EndsWith(path, ".u16");
}

absl::StatusOr<std::vector<int32_t>> ParseTokenFile(absl::string_view bytes,
                                                    absl::string_view file_name,
                                                    int32_t vocabulary) {
  if (absl::EndsWith(file_name, ".npy")) return ParseArray(bytes, file_name, vocabulary);
  if (bytes.size() % sizeof(uint16_t) != 0) {
    return Wrong(file_name, absl::StrCat("has ", bytes.size(), " bytes, no whole number of ids"));
  }
  return ReadNumbers<uint16_t>(bytes, file_name, vocabulary);
}

absl::StatusOr<std::vector<int32_t>> ParseTokenList(absl::string_view text,
                                                    absl::string_view file_name,
                                                    int32_t vocabulary) {
  std::vector<int32_t> ids;
  for (const absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(" \t\r\n,[]"), absl::SkipEmpty())) {
    int64_t id = 0;
    if (!absl::SimpleAtoi(word, &id)) {
      return Wrong(file_name, absl::StrCat("token ", ids.size(), " is \"", word.substr(0, 40),
                                           "\", no number"));
    }
    RETURN_IF_ERROR(CheckTokenId(file_name, ids.size(), id, vocabulary));
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

absl::Status CheckTokenIds(std::span<const int32_t> ids, int32_t vocabulary) {
  for (const int32_t id : ids) {
    if (id >= 0 && id < vocabulary) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("the tokenizer gives id ", id, " and the model has ", vocabulary,
                     "; put the tokenizer of this model into its folder"));
  }
  return absl::OkStatus();
}

}  // namespace kvsweep
