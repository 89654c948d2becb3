#include "worker/engine/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace kvsweep {
namespace {

constexpr absl::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

}  // namespace

size_t CharacterBytes(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const auto continues = [&](size_t i) { return i < text.size() && (byte(i) & 0xc0) == 0x80; };
  if (byte(0) < 0x80) return 1;
  if (byte(0) >= 0xc2 && byte(0) < 0xe0) return continues(1) ? 2 : 0;
  if ((byte(0) & 0xf0) == 0xe0 && continues(1) && continues(2)) {
    const uint32_t value = (byte(0) & 0x0fu) << 12 | (byte(1) & 0x3fu) << 6;
    return value >= 0x800 && (value < 0xd800 || value >= 0xe000) ? 3 : 0;
  }
  if (byte(0) >= 0xf0 && byte(0) < 0xf5 && continues(1) && continues(2) && continues(3)) {
    const uint32_t value = (byte(0) & 0x07u) << 18 | (byte(1) & 0x3fu) << 12;
    return value >= 0x10000 && value < 0x110000 ? 4 : 0;
  }
  return 0;
}

std::string RepairUtf8(absl::string_view text) {
  std::string repaired;
  repaired.reserve(text.size());
  while (!text.empty()) {
    const size_t bytes = CharacterBytes(text);
    absl::StrAppend(&repaired, bytes == 0 ? kReplacement : text.substr(0, bytes));
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return repaired;
}

std::string NormalFormC(absl::string_view text) {
  utf8proc_uint8_t* normal = nullptr;
  const utf8proc_ssize_t bytes =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &normal,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  KVSWEEP_CHECK_GE(bytes, 0) << utf8proc_errmsg(bytes);
  std::string result(reinterpret_cast<const char*>(normal), static_cast<size_t>(bytes));
  std::free(normal);
  return result;
}

}  // namespace kvsweep
