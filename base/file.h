#ifndef KVSWEEP_BASE_FILE_H_
#define KVSWEEP_BASE_FILE_H_

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// Files as whole values: read with a bound, written so that a reader sees the old content or the
// new, or mapped. Errors carry the system's reason and the path.

namespace kvsweep {

// The content of a regular file (or pipe) of at most max_bytes. ResourceExhausted if it is larger,
// found before more than the bound is read.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes);

// Replaces or creates `path` with `content`: written beside it, synced, renamed, and the folder
// synced. On failure the old content stands.
absl::Status WriteFileAtomic(const std::string& path, absl::string_view content);

// A regular file mapped for reading; the bytes live as long as this object. Movable. Another
// process that truncates the file while it is mapped kills the reader (SIGBUS); model folders are
// taken to be still.
class MappedFile {
 public:
  // ResourceExhausted if the file is larger than max_bytes, InvalidArgument if it is no regular
  // file. An empty file gives an empty span.
  static absl::StatusOr<MappedFile> Open(const std::string& path, int64_t max_bytes);

  MappedFile() = default;
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const uint8_t> bytes() const { return bytes_; }

 private:
  std::span<const uint8_t> bytes_;
};

// A new folder, private to this user, that is removed with all its content when the object goes.
// For tests and scratch space.
class TempDir {
 public:
  // Made under $TMPDIR or /tmp; aborts if that is impossible.
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }

  // path() + "/" + name.
  std::string Join(absl::string_view name) const;

 private:
  std::string path_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_FILE_H_
