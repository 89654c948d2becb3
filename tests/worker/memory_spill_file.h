#ifndef KVSWEEP_TESTS_WORKER_MEMORY_SPILL_FILE_H_
#define KVSWEEP_TESTS_WORKER_MEMORY_SPILL_FILE_H_

#include <string>

#include "absl/status/statusor.h"
#include "base/check.h"
#include "worker/outbox.h"

namespace kvsweep {

// A spill file in memory, which can be told to fail. Holds its user to the contract: writes at the
// end only, reads of what was written.
class MemorySpillFile final : public SpillFile {
 public:
  absl::Status Write(uint64_t offset, absl::string_view data) override {
    KVSWEEP_CHECK_EQ(offset, content_.size());
    if (fail_writes) return absl::DataLossError("no space left on device");
    content_.append(data.data(), data.size());
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Read(uint64_t offset, uint64_t size) override {
    KVSWEEP_CHECK_LE(offset + size, content_.size());
    if (fail_reads) return absl::DataLossError("input/output error");
    return content_.substr(offset, size);
  }
  void Clear() override { content_.clear(); }

  size_t size() const { return content_.size(); }

  bool fail_writes = false;
  bool fail_reads = false;

 private:
  std::string content_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_MEMORY_SPILL_FILE_H_
