#ifndef KVSWEEP_STORAGE_SQLITE_STORE_H_
#define KVSWEEP_STORAGE_SQLITE_STORE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "storage/store.h"

// The store in one SQLite file: write-ahead log, synchronous=FULL, one writing connection.
// docs/STORAGE.md describes the file, which is itself a public interface. Local file systems only:
// the write-ahead log needs shared memory.

namespace kvsweep {

// Opens the store for writing, creating the file if there is none. A second process that opens the
// same file for writing is refused (FailedPrecondition); readers are not. A file of another
// program, or of a later version, is FailedPrecondition; a damaged one DataLoss; each says what to
// do.
absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& path);

// Opens only a reader on an existing store file (NotFound otherwise), also beside a writer in
// another process.
absl::StatusOr<std::unique_ptr<StoreReader>> OpenSqliteReader(const std::string& path);

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_SQLITE_STORE_H_
