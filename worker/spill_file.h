#ifndef KVSWEEP_WORKER_SPILL_FILE_H_
#define KVSWEEP_WORKER_SPILL_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/outbox.h"

namespace kvsweep {

// A spill file on disk, without a name: it is gone when the process is, however that ends. Made in
// `folder` at the first write. Not synced; rows are durable when the coordinator says so. Not
// thread-safe.
class DiskSpillFile final : public SpillFile {
 public:
  explicit DiskSpillFile(std::string folder) : folder_(std::move(folder)) {}
  ~DiskSpillFile() override;
  DiskSpillFile(const DiskSpillFile&) = delete;
  DiskSpillFile& operator=(const DiskSpillFile&) = delete;

  absl::Status Write(uint64_t offset, absl::string_view data) override;
  absl::StatusOr<std::string> Read(uint64_t offset, uint64_t size) override;
  void Clear() override;

 private:
  absl::Status Open();

  const std::string folder_;
  int fd_ = -1;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_SPILL_FILE_H_
