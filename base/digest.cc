#include "base/digest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace kvsweep {

struct DigestBuilder::Context {
  Context() : evp(EVP_MD_CTX_new()) { KVSWEEP_CHECK(evp != nullptr); }
  ~Context() { EVP_MD_CTX_free(evp); }
  EVP_MD_CTX* evp;
};

absl::StatusOr<Digest> Digest::FromHex(absl::string_view hex) {
  if (hex.size() != 2 * kBytes || !std::all_of(hex.begin(), hex.end(), absl::ascii_isxdigit)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a SHA-256 has 64 hexadecimal digits, not \"", hex.substr(0, 80), "\""));
  }
  return FromBytes(absl::HexStringToBytes(hex));
}

absl::StatusOr<Digest> Digest::FromBytes(absl::string_view bytes) {
  if (bytes.size() != kBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a SHA-256 has 32 bytes, not ", bytes.size()));
  }
  Digest digest;
  std::copy(bytes.begin(), bytes.end(), digest.bytes_.begin());
  return digest;
}

std::string Digest::Hex() const { return absl::BytesToHexString(bytes()); }

absl::string_view Digest::bytes() const {
  return absl::string_view(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
}

Digest Sha256(absl::string_view bytes) { return DigestBuilder().AddRaw(bytes).Finish(); }

absl::StatusOr<Digest> DigestFile(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             std::fclose);
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  DigestBuilder builder;
  std::vector<char> buffer(1 << 20);
  while (const size_t count = std::fread(buffer.data(), 1, buffer.size(), file.get())) {
    builder.AddRaw(absl::string_view(buffer.data(), count));
  }
  if (std::ferror(file.get()))
    return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
  return builder.Finish();
}

DigestBuilder::DigestBuilder() : context_(std::make_unique<Context>()) {
  KVSWEEP_CHECK(EVP_DigestInit_ex(context_->evp, EVP_sha256(), nullptr) == 1);
}

DigestBuilder::~DigestBuilder() = default;
DigestBuilder::DigestBuilder(const DigestBuilder& other) : context_(std::make_unique<Context>()) {
  KVSWEEP_CHECK(EVP_MD_CTX_copy_ex(context_->evp, other.context_->evp) == 1);
}
DigestBuilder& DigestBuilder::operator=(const DigestBuilder& other) {
  return *this = DigestBuilder(other);
}
DigestBuilder::DigestBuilder(DigestBuilder&&) noexcept = default;
DigestBuilder& DigestBuilder::operator=(DigestBuilder&&) noexcept = default;

DigestBuilder& DigestBuilder::Add(absl::string_view part) {
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(uint64_t{part.size()} >> (8 * i));
  AddRaw(absl::string_view(reinterpret_cast<const char*>(length), sizeof(length)));
  return AddRaw(part);
}

DigestBuilder& DigestBuilder::AddNumber(uint64_t number) {
  char bytes[8];
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(number >> (8 * i));
  return Add(absl::string_view(bytes, sizeof(bytes)));
}

DigestBuilder& DigestBuilder::AddRaw(absl::string_view bytes) {
  KVSWEEP_CHECK(EVP_DigestUpdate(context_->evp, bytes.data(), bytes.size()) == 1);
  return *this;
}

Digest DigestBuilder::Finish() const {
  const Context copy;  // finishing destroys a context, so that a copy is finished
  KVSWEEP_CHECK(EVP_MD_CTX_copy_ex(copy.evp, context_->evp) == 1);
  std::array<uint8_t, Digest::kBytes> bytes;
  KVSWEEP_CHECK(EVP_DigestFinal_ex(copy.evp, bytes.data(), nullptr) == 1);
  return Digest(bytes);
}

}  // namespace kvsweep
