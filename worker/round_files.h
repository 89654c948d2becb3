#ifndef KVSWEEP_WORKER_ROUND_FILES_H_
#define KVSWEEP_WORKER_ROUND_FILES_H_

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/digest.h"
#include "proto/experiment.pb.h"

// What a round needs on this machine: models and files, found or fetched, always by digest. All
// classes may be used from many threads.

namespace kvsweep {

struct ShelvedModel {
  std::string name;
  Digest digest;
  std::string path;  // folder
};

// The models that this machine holds: every folder with a config.json that is one of `roots`, lies
// in one of them, or in a Hugging Face cache there (models--ORG--NAME/snapshots/REVISION). A
// model's digest is computed once and kept in `cache_folder` under the names, sizes and times of
// its files, so that a start takes as long as listing them.
class ModelShelf {
 public:
  ModelShelf(std::vector<std::string> roots, std::string cache_folder);

  // Looks again. Slow when there is a new large model; reads go on meanwhile. Problems are logged:
  // one bad folder does not hide the others. Returns whether the shelf changed.
  bool Scan();

  std::vector<ShelvedModel> models() const;

  // The folder of the model with this digest. NotFound says what is held under the name instead.
  absl::StatusOr<std::string> Find(const ModelReference& model) const;

 private:
  std::vector<std::string> ListFolders() const;
  absl::StatusOr<ShelvedModel> Describe(const std::string& folder) const;

  const std::vector<std::string> roots_;
  const std::string cache_folder_;
  mutable std::mutex mutex_;
  std::vector<ShelvedModel> models_;  // guarded by mutex_
};

// Small files by digest, kept in a folder from round to round. A file is checked each time before
// it is handed out.
class FileCache {
 public:
  // Brings the content of a file; the cache checks it.
  using Fetch = std::function<absl::StatusOr<std::string>(const FileReference& file)>;

  explicit FileCache(std::string folder);

  // Path of a file with this content.
  absl::StatusOr<std::string> Get(const FileReference& file, const Fetch& fetch);

  // A folder with the files of a small model.
  absl::StatusOr<std::string> GetModel(const ModelReference& model, const Fetch& fetch);

 private:
  const std::string folder_;
  std::mutex mutex_;  // one fetch at a time
};

// Where one trial finds what it needs.
struct TrialFiles {
  std::string model_path;                         // empty: random weights of a catalogued shape
  std::map<std::string, std::string> file_paths;  // FileReference.path -> path here
};

// For all trials of a round, in order. A model comes from the shelf, or, if it is small, from the
// coordinator.
absl::StatusOr<std::vector<TrialFiles>> PrepareRoundFiles(const RoundSpec& round,
                                                          const ModelShelf& shelf, FileCache& cache,
                                                          const FileCache::Fetch& fetch);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ROUND_FILES_H_
