#include "worker/spill_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace kvsweep {

DiskSpillFile::~DiskSpillFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status DiskSpillFile::Open() {
  if (fd_ >= 0) return absl::OkStatus();
  std::string path = absl::StrCat(folder_, "/spill.XXXXXX");
  fd_ = mkostemp(path.data(), O_CLOEXEC);
  if (fd_ < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot make a file in ", folder_));
  unlink(path.c_str());
  return absl::OkStatus();
}

absl::Status DiskSpillFile::Write(uint64_t offset, absl::string_view data) {
  RETURN_IF_ERROR(Open());
  while (!data.empty()) {
    const ssize_t count = pwrite(fd_, data.data(), data.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      return absl::ErrnoToStatus(errno, absl::StrCat("cannot write rows to disk in ", folder_));
    }
    offset += static_cast<uint64_t>(count);
    data.remove_prefix(static_cast<size_t>(count));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> DiskSpillFile::Read(uint64_t offset, uint64_t size) {
  std::string data(size, '\0');
  size_t filled = 0;
  while (filled < size) {
    const ssize_t count =
        pread(fd_, data.data() + filled, size - filled, static_cast<off_t>(offset + filled));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      return absl::ErrnoToStatus(errno, absl::StrCat("cannot read rows back from ", folder_));
    }
    if (count == 0)
      return absl::DataLossError(absl::StrCat("rows are missing from the file in ", folder_));
    filled += static_cast<size_t>(count);
  }
  return data;
}

void DiskSpillFile::Clear() {
  // Closing it gives the space back at once; most attempts never make another.
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

}  // namespace kvsweep
