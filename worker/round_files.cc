#include "worker/round_files.h"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "experiments/files.h"

namespace kvsweep {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kDescriptionBytes = limits::kMiB;

// Folders directly in `folder`, sorted; none if it cannot be read.
std::vector<std::string> Subfolders(const std::string& folder) {
  std::vector<std::string> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (entry.is_directory(error)) found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

bool IsModelFolder(const std::string& folder) {
  std::error_code error;
  return fs::is_regular_file(fs::path(folder) / "config.json", error);
}

// Names, sizes and times of the files: changes when any of them is written.
absl::StatusOr<Digest> Fingerprint(const std::string& folder) {
  std::vector<std::string> lines;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    std::error_code entry_error;
    if (!entry.is_regular_file(entry_error)) continue;
    const uintmax_t bytes = entry.file_size(entry_error);
    const auto written = entry.last_write_time(entry_error).time_since_epoch().count();
    if (entry_error) return absl::ErrnoToStatus(entry_error.value(), entry.path().string());
    lines.push_back(absl::StrCat(entry.path().string(), " ", bytes, " ", written));
  }
  if (error) return absl::ErrnoToStatus(error.value(), folder);
  std::sort(lines.begin(), lines.end());
  return Sha256(absl::StrJoin(lines, "\n"));
}

absl::Status MakeFolder(const std::string& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) return absl::ErrnoToStatus(error.value(), absl::StrCat("cannot make folder ", folder));
  return absl::OkStatus();
}

// A name that stays inside its folder.
bool IsPlainName(absl::string_view name) {
  return !name.empty() && name[0] != '.' && name.size() <= 255 && !absl::StrContains(name, '/') &&
         !absl::StrContains(name, '\0');
}

}  // namespace

// ----------------------------------------------------------------------------------------- models

ModelShelf::ModelShelf(std::vector<std::string> roots, std::string cache_folder)
    : roots_(std::move(roots)), cache_folder_(std::move(cache_folder)) {}

std::vector<std::string> ModelShelf::ListFolders() const {
  std::vector<std::string> folders;
  for (const std::string& root : roots_) {
    if (IsModelFolder(root)) folders.push_back(root);
    for (const std::string& folder : Subfolders(root)) {
      if (IsModelFolder(folder)) folders.push_back(folder);
      for (const std::string& snapshot : Subfolders(folder + "/snapshots")) {
        if (IsModelFolder(snapshot)) folders.push_back(snapshot);
      }
    }
  }
  return folders;
}

absl::StatusOr<ShelvedModel> ModelShelf::Describe(const std::string& folder) const {
  ASSIGN_OR_RETURN(const Digest fingerprint, Fingerprint(folder));
  const std::string note = absl::StrCat(cache_folder_, "/models/", fingerprint.Hex());
  ModelReference model;
  const absl::StatusOr<std::string> noted = ReadFile(note, kDescriptionBytes);
  if (!noted.ok() || !model.ParseFromString(*noted) || model.digest().size() != Digest::kBytes) {
    ASSIGN_OR_RETURN(model, DescribeModelFolder(folder));
    // Only the next start suffers when this cannot be kept.
    absl::Status kept = MakeFolder(cache_folder_ + "/models");
    if (kept.ok()) kept = WriteFileAtomic(note, model.SerializeAsString());
    if (!kept.ok()) LogWarning("the digest of ", folder, " is not kept: ", kept.message());
  }
  ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(model.digest()));
  return ShelvedModel{.name = model.name(), .digest = digest, .path = folder};
}

bool ModelShelf::Scan() {
  std::vector<ShelvedModel> models;
  for (const std::string& folder : ListFolders()) {
    absl::StatusOr<ShelvedModel> model = Describe(folder);
    if (!model.ok()) {
      LogWarning("model folder ", folder, " is left out: ", model.status().message());
    } else if (models.size() < static_cast<size_t>(limits::kDigestsPerWorker)) {
      models.push_back(*std::move(model));
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool changed = !std::equal(models.begin(), models.end(), models_.begin(), models_.end(),
                                   [](const ShelvedModel& a, const ShelvedModel& b) {
                                     return a.digest == b.digest && a.path == b.path;
                                   });
  models_ = std::move(models);
  return changed;
}

std::vector<ShelvedModel> ModelShelf::models() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return models_;
}

absl::StatusOr<std::string> ModelShelf::Find(const ModelReference& model) const {
  ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(model.digest()));
  std::string others;
  for (const ShelvedModel& held : models()) {
    if (held.digest == digest) return held.path;
    if (held.name == model.name())
      absl::StrAppend(&others, "; ", held.path, " has digest ", held.digest.Hex());
  }
  return absl::NotFoundError(absl::StrCat("no folder of --models holds model ", model.name(),
                                          " (digest ", digest.Hex(), ")", others));
}

// ------------------------------------------------------------------------------------------ files

FileCache::FileCache(std::string folder) : folder_(std::move(folder)) {}

absl::StatusOr<std::string> FileCache::Get(const FileReference& file, const Fetch& fetch) {
  ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(file.digest()));
  if (file.bytes() > static_cast<uint64_t>(limits::kTravellingFileBytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(file.path(), " has ", file.bytes(), " bytes; at most ",
                     limits::kTravellingFileBytes, " travel to workers"));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::string path = absl::StrCat(folder_, "/files/", digest.Hex());
  const absl::StatusOr<Digest> held = DigestFile(path);
  if (held.ok() && *held == digest) return path;

  ASSIGN_OR_RETURN(const std::string content, Annotate(fetch(file), file.path()));
  if (Sha256(content) != digest) {
    return absl::DataLossError(absl::StrCat(file.path(), ": what was fetched has another digest"));
  }
  RETURN_IF_ERROR(MakeFolder(folder_ + "/files"));
  RETURN_IF_ERROR(WriteFileAtomic(path, content));
  return path;
}

absl::StatusOr<std::string> FileCache::GetModel(const ModelReference& model, const Fetch& fetch) {
  ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(model.digest()));
  if (ModelDigest(model) != model.digest()) {
    return absl::InvalidArgumentError(
        absl::StrCat("model ", model.name(), " is not what its digest says"));
  }
  const std::string folder = absl::StrCat(folder_, "/travelled/", digest.Hex());
  RETURN_IF_ERROR(MakeFolder(folder));
  for (const FileReference& file : model.files()) {
    if (!IsPlainName(file.path())) {
      return absl::InvalidArgumentError(
          absl::StrCat("model ", model.name(), " has a file \"", file.path(), "\""));
    }
    ASSIGN_OR_RETURN(const std::string path, Get(file, fetch));
    std::error_code error;
    const fs::path link = fs::path(folder) / file.path();
    if (fs::equivalent(path, link, error)) continue;
    // A runner of another slot may be reading the folder: the file is never away.
    const fs::path fresh = absl::StrCat(link.string(), ".", absl::Hex(EntropySeed()));
    fs::create_hard_link(path, fresh, error);
    if (!error) fs::rename(fresh, link, error);
    if (error) {
      return absl::ErrnoToStatus(error.value(), absl::StrCat("cannot link ", link.string()));
    }
  }
  return folder;
}

absl::StatusOr<std::vector<TrialFiles>> PrepareRoundFiles(const RoundSpec& round,
                                                          const ModelShelf& shelf, FileCache& cache,
                                                          const FileCache::Fetch& fetch) {
  std::vector<TrialFiles> prepared;
  std::map<std::string, std::string> model_paths;  // by digest
  std::map<std::string, std::string> file_paths;   // by digest
  for (const PlannedTrial& trial : round.trials()) {
    TrialFiles& files = prepared.emplace_back();
    if (trial.spec().has_model_reference()) {
      const ModelReference& model = trial.spec().model_reference();
      std::string& path = model_paths[model.digest()];
      if (path.empty()) {
        absl::StatusOr<std::string> found = shelf.Find(model);
        const bool travels = model.files_size() > 0 &&
                             model.bytes() <= static_cast<uint64_t>(limits::kTravellingFileBytes);
        if (absl::IsNotFound(found.status()) && travels) found = cache.GetModel(model, fetch);
        ASSIGN_OR_RETURN(path, std::move(found));
      }
      files.model_path = path;
    }
    for (const FileReference& file : trial.spec().files()) {
      std::string& path = file_paths[file.digest()];
      if (path.empty()) {
        ASSIGN_OR_RETURN(path, cache.Get(file, fetch));
      }
      files.file_paths[file.path()] = path;
    }
  }
  return prepared;
}

}  // namespace kvsweep
