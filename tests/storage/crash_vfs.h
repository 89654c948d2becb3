#ifndef KVSWEEP_TESTS_STORAGE_CRASH_VFS_H_
#define KVSWEEP_TESTS_STORAGE_CRASH_VFS_H_

#include <sqlite3.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/random.h"

namespace kvsweep {

// A disk that can lose power. While an object lives, SQLite's files go through it: what is written
// is seen by readers at once, but is *durable* only once the file was synced. At a chosen write,
// sync or deletion the power fails: that call and all later ones fail. WriteImage then puts what a
// disk may hold after that into a folder.
//
// One object at a time, one thread.
class CrashVfs {
 public:
  CrashVfs();
  ~CrashVfs();
  CrashVfs(const CrashVfs&) = delete;
  CrashVfs& operator=(const CrashVfs&) = delete;

  // From now on: counts from 0, fails at the `crash_at`th call (0: never).
  void Arm(uint64_t crash_at);
  uint64_t calls() const { return calls_; }
  bool crashed() const { return crash_at_ != 0 && calls_ >= crash_at_; }

  // What becomes of the writes that were not synced.
  enum class Fate {
    kDropped,   // none of them arrived
    kPrefix,    // some first of them, the last one torn at a multiple of 512 bytes
    kAnySubset  // any of them, in any order of arrival
  };
  // Writes the files of `folder` as they are after the crash into `target`, under the same names.
  void WriteImage(const std::string& folder, const std::string& target, Fate fate, Random& random);

 private:
  struct Change {  // a write, or with no data a truncation to `offset`
    int64_t offset = 0;
    std::optional<std::string> data;
  };
  struct Image {
    std::string durable;
    std::vector<Change> pending;
  };

  static void Apply(const Change& change, std::string* content);
  // Counts a call; false if the power is off.
  bool Count();

  static int Open(sqlite3_vfs*, const char* name, sqlite3_file* file, int flags, int* out_flags);
  static int Delete(sqlite3_vfs*, const char* name, int sync_directory);
  static int Write(sqlite3_file* file, const void* data, int amount, sqlite3_int64 offset);
  static int Truncate(sqlite3_file* file, sqlite3_int64 size);
  static int Sync(sqlite3_file* file, int flags);

  static CrashVfs* current_;

  sqlite3_vfs* const real_;
  sqlite3_vfs vfs_;
  uint64_t calls_ = 0;
  uint64_t crash_at_ = 0;
  std::map<std::string, Image> images_;  // by path
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_STORAGE_CRASH_VFS_H_
