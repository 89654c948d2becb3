#define PCRE2_CODE_UNIT_WIDTH 8
#include "worker/engine/text_pattern.h"

#include <pcre2.h>

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvsweep {
namespace {

std::string ErrorText(int code) {
  char text[256] = {};
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof(text));
  return text;
}

}  // namespace

void TextPattern::Free::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

absl::StatusOr<TextPattern> TextPattern::Compile(const std::string& expression) {
  int error = 0;
  PCRE2_SIZE place = 0;
  TextPattern pattern;
  pattern.expression_ = expression;
  // UTF, and classes such as \s by Unicode's properties.
  pattern.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()),
                                    expression.size(), PCRE2_UTF | PCRE2_UCP, &error, &place,
                                    nullptr));
  if (pattern.code_ != nullptr) return pattern;
  return absl::InvalidArgumentError(absl::StrCat(
      "the expression ", expression, " cannot be read at byte ", place, ": ", ErrorText(error)));
}

absl::StatusOr<std::optional<TextPattern::Match>> TextPattern::Find(absl::string_view text,
                                                                    size_t from) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create(1, nullptr), &pcre2_match_data_free);
  const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, data.get(), nullptr);
  if (found == PCRE2_ERROR_NOMATCH) return std::optional<Match>();
  if (found < 0) {
    return absl::InvalidArgumentError(absl::StrCat("the expression ", expression_,
                                                   " cannot split this text: ", ErrorText(found)));
  }
  const PCRE2_SIZE* const place = pcre2_get_ovector_pointer(data.get());
  return std::optional<Match>({.begin = place[0], .end = place[1]});
}

}  // namespace kvsweep
