#include "tests/storage/crash_vfs.h"

#include <algorithm>
#include <filesystem>
#include <span>

#include "base/check.h"
#include "base/file.h"

namespace kvsweep {

namespace {

// Ours, with the real file behind it in the memory that SQLite gives.
struct File {
  sqlite3_file base;
  const char* name;
  sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
  static File& Of(sqlite3_file* file) { return *reinterpret_cast<File*>(file); }
};

sqlite3_file* Real(sqlite3_file* file) { return File::Of(file).real(); }

}  // namespace

CrashVfs* CrashVfs::current_ = nullptr;

CrashVfs::CrashVfs() : real_(sqlite3_vfs_find(nullptr)), vfs_(*real_) {
  KVSWEEP_CHECK(current_ == nullptr) << "one disk at a time";
  current_ = this;
  vfs_.pNext = nullptr;
  vfs_.zName = "crash";
  vfs_.szOsFile = static_cast<int>(sizeof(File)) + real_->szOsFile;
  vfs_.xOpen = &CrashVfs::Open;
  vfs_.xDelete = &CrashVfs::Delete;
  sqlite3_vfs_register(&vfs_, /*makeDflt=*/1);
}

CrashVfs::~CrashVfs() {
  sqlite3_vfs_unregister(&vfs_);
  sqlite3_vfs_register(real_, /*makeDflt=*/1);
  current_ = nullptr;
}

void CrashVfs::Arm(uint64_t crash_at) {
  calls_ = 0;
  crash_at_ = crash_at;
}

bool CrashVfs::Count() {
  if (crashed()) return false;
  ++calls_;
  return !crashed();
}

void CrashVfs::Apply(const Change& change, std::string* content) {
  const auto offset = static_cast<size_t>(change.offset);
  if (!change.data.has_value()) {
    content->resize(offset);
    return;
  }
  if (content->size() < offset + change.data->size()) content->resize(offset + change.data->size());
  content->replace(offset, change.data->size(), *change.data);
}

void CrashVfs::WriteImage(const std::string& folder, const std::string& target, Fate fate,
                          Random& random) {
  for (const auto& [path, image] : images_) {
    if (path.rfind(folder, 0) != 0) continue;
    std::string content = image.durable;
    std::vector<Change> kept = image.pending;
    if (fate == Fate::kDropped) {
      kept.clear();
    } else if (fate == Fate::kPrefix) {
      kept.resize(random.Uniform(kept.size() + 1));
      if (!kept.empty() && kept.back().data.has_value()) {
        std::string& last = *kept.back().data;
        last.resize(512 * random.Uniform(last.size() / 512 + 1));
      }
    } else {
      std::erase_if(kept, [&](const Change&) { return random.Bernoulli(0.5); });
      random.Shuffle(std::span<Change>(kept));
    }
    for (const Change& change : kept) Apply(change, &content);
    const std::string name = std::filesystem::path(path).filename();
    KVSWEEP_CHECK_OK(WriteFileAtomic(target + "/" + name, content));
  }
}

int CrashVfs::Delete(sqlite3_vfs*, const char* name, int sync_directory) {
  if (!current_->Count()) return SQLITE_IOERR_DELETE;
  current_->images_.erase(name);
  return current_->real_->xDelete(current_->real_, name, sync_directory);
}

int CrashVfs::Write(sqlite3_file* file, const void* data, int amount, sqlite3_int64 offset) {
  File& ours = File::Of(file);
  Change change{offset, std::string(static_cast<const char*>(data), amount)};
  const bool was_on = !current_->crashed();
  const bool on = current_->Count();
  // The write during which the power fails may have arrived, in whole or in part.
  if (was_on) current_->images_[ours.name].pending.push_back(std::move(change));
  if (!on) return SQLITE_IOERR_WRITE;
  return ours.real()->pMethods->xWrite(ours.real(), data, amount, offset);
}

int CrashVfs::Truncate(sqlite3_file* file, sqlite3_int64 size) {
  File& ours = File::Of(file);
  if (!current_->Count()) return SQLITE_IOERR_TRUNCATE;
  current_->images_[ours.name].pending.push_back({size, std::nullopt});
  return ours.real()->pMethods->xTruncate(ours.real(), size);
}

// The real file is not synced: this process does not lose power.
int CrashVfs::Sync(sqlite3_file* file, int) {
  File& ours = File::Of(file);
  if (!current_->Count()) return SQLITE_IOERR_FSYNC;
  Image& image = current_->images_[ours.name];
  for (const Change& change : image.pending) Apply(change, &image.durable);
  image.pending.clear();
  return SQLITE_OK;
}

int CrashVfs::Open(sqlite3_vfs*, const char* name, sqlite3_file* file, int flags, int* out_flags) {
  File& ours = File::Of(file);
  ours.name = name;
  ours.base.pMethods = nullptr;
  if (current_->crashed()) return SQLITE_CANTOPEN;
  const int code = current_->real_->xOpen(current_->real_, name, ours.real(), flags, out_flags);
  if (code != SQLITE_OK || name == nullptr) return code == SQLITE_OK ? SQLITE_CANTOPEN : code;
  current_->images_.try_emplace(name);
  // Everything but writing goes straight to the real file.
  static const sqlite3_io_methods kMethods = {
      .iVersion = 2,  // shared memory, but no memory-mapped pages, which would pass us by
      .xClose = [](sqlite3_file* f) { return Real(f)->pMethods->xClose(Real(f)); },
      .xRead =
          [](sqlite3_file* f, void* data, int amount, sqlite3_int64 offset) {
            return Real(f)->pMethods->xRead(Real(f), data, amount, offset);
          },
      .xWrite = &CrashVfs::Write,
      .xTruncate = &CrashVfs::Truncate,
      .xSync = &CrashVfs::Sync,
      .xFileSize = [](sqlite3_file* f,
                      sqlite3_int64* size) { return Real(f)->pMethods->xFileSize(Real(f), size); },
      .xLock = [](sqlite3_file* f, int level) { return Real(f)->pMethods->xLock(Real(f), level); },
      .xUnlock = [](sqlite3_file* f,
                    int level) { return Real(f)->pMethods->xUnlock(Real(f), level); },
      .xCheckReservedLock =
          [](sqlite3_file* f, int* result) {
            return Real(f)->pMethods->xCheckReservedLock(Real(f), result);
          },
      .xFileControl =
          [](sqlite3_file* f, int operation, void* argument) {
            return Real(f)->pMethods->xFileControl(Real(f), operation, argument);
          },
      .xSectorSize = [](sqlite3_file*) { return 512; },
      // Not even that a write does not disturb its neighbours.
      .xDeviceCharacteristics = [](sqlite3_file*) { return 0; },
      .xShmMap =
          [](sqlite3_file* f, int page, int bytes, int extend, void volatile** memory) {
            return Real(f)->pMethods->xShmMap(Real(f), page, bytes, extend, memory);
          },
      .xShmLock =
          [](sqlite3_file* f, int offset, int count, int flag) {
            return Real(f)->pMethods->xShmLock(Real(f), offset, count, flag);
          },
      .xShmBarrier = [](sqlite3_file* f) { Real(f)->pMethods->xShmBarrier(Real(f)); },
      .xShmUnmap = [](sqlite3_file* f,
                      int remove) { return Real(f)->pMethods->xShmUnmap(Real(f), remove); },
      .xFetch = nullptr,
      .xUnfetch = nullptr};
  ours.base.pMethods = &kMethods;
  return SQLITE_OK;
}

}  // namespace kvsweep
