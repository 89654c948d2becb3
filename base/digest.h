#ifndef KVSWEEP_BASE_DIGEST_H_
#define KVSWEEP_BASE_DIGEST_H_

#include <array>
#include <compare>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// SHA-256, by OpenSSL. Files, content keys and streams of measurements are named by it.

namespace kvsweep {

// 32 bytes. The default value is all zeros and stands for "none".
class Digest {
 public:
  static constexpr size_t kBytes = 32;

  Digest() = default;
  explicit Digest(const std::array<uint8_t, kBytes>& bytes) : bytes_(bytes) {}

  // From 64 hexadecimal digits of either case, or from 32 raw bytes. InvalidArgument otherwise.
  static absl::StatusOr<Digest> FromHex(absl::string_view hex);
  static absl::StatusOr<Digest> FromBytes(absl::string_view bytes);

  // 64 lower-case hexadecimal digits.
  std::string Hex() const;
  absl::string_view bytes() const;
  bool empty() const { return *this == Digest(); }

  friend bool operator==(const Digest&, const Digest&) = default;
  friend auto operator<=>(const Digest&, const Digest&) = default;
  template <typename H>
  friend H AbslHashValue(H hash, const Digest& digest) {
    return H::combine(std::move(hash), digest.bytes_);
  }
  friend std::ostream& operator<<(std::ostream& out, const Digest& digest) {
    return out << digest.Hex();
  }

 private:
  std::array<uint8_t, kBytes> bytes_{};
};

// The plain SHA-256 of `bytes`.
Digest Sha256(absl::string_view bytes);

// The plain SHA-256 of a file's content, read in pieces. NotFound and the like name the path.
absl::StatusOr<Digest> DigestFile(const std::string& path);

// Takes a sequence of parts, each fed with its length in front, so that ("ab", "c") and ("a", "bc")
// differ. A copy goes on from the same point by itself. Not thread-safe.
class DigestBuilder {
 public:
  DigestBuilder();
  ~DigestBuilder();
  DigestBuilder(const DigestBuilder& other);
  DigestBuilder& operator=(const DigestBuilder& other);
  DigestBuilder(DigestBuilder&&) noexcept;
  DigestBuilder& operator=(DigestBuilder&&) noexcept;

  // Adds a part: 8 bytes of length, little endian, then the bytes.
  DigestBuilder& Add(absl::string_view part);

  // Adds a number as a part of 8 bytes, little endian.
  DigestBuilder& AddNumber(uint64_t number);

  // Adds bytes without a length, for content that comes in pieces.
  DigestBuilder& AddRaw(absl::string_view bytes);

  // The digest of all that was added so far; more may be added after.
  Digest Finish() const;

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_DIGEST_H_
