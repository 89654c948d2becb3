#include "experiments/files.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

namespace fs = std::filesystem;

// Where a path may be meant: beside the spec, then here. An absolute path means itself.
std::vector<std::string> Candidates(const std::string& path, const std::string& spec_folder) {
  if (fs::path(path).is_absolute() || spec_folder.empty()) return {path};
  const std::string beside = (fs::path(spec_folder) / path).lexically_normal().string();
  if (beside == fs::path(path).lexically_normal().string()) return {beside};
  return {beside, path};
}

// The first candidate that is there, as a folder or as a regular file.
std::optional<std::string> FindPath(const std::vector<std::string>& candidates, bool folder) {
  for (const std::string& candidate : candidates) {
    std::error_code error;
    const bool found =
        folder ? fs::is_directory(candidate, error) : fs::is_regular_file(candidate, error);
    if (found) return candidate;
  }
  return std::nullopt;
}

absl::StatusOr<FileReference> DescribeFile(const std::string& path, const std::string& local_path,
                                           int64_t max_bytes) {
  std::error_code error;
  const uintmax_t bytes = fs::file_size(local_path, error);
  if (error) return absl::NotFoundError(absl::StrCat(local_path, ": ", error.message()));
  if (bytes > static_cast<uintmax_t>(max_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(local_path, " has ", bytes, " bytes, more than ", max_bytes));
  }
  ASSIGN_OR_RETURN(const Digest digest, DigestFile(local_path));
  FileReference reference;
  reference.set_path(path);
  reference.set_digest(std::string(digest.bytes()));
  reference.set_bytes(bytes);
  return reference;
}

// Whether a file of a model folder decides what the model computes.
bool IsModelFile(absl::string_view name) {
  static constexpr absl::string_view kNames[] = {"config.json",
                                                 "generation_config.json",
                                                 "tokenizer.model",
                                                 "tokenizer.json",
                                                 "tokenizer_config.json",
                                                 "tok512.bin",
                                                 "vocab.json",
                                                 "merges.txt"};
  return absl::EndsWith(name, ".safetensors") || absl::EndsWith(name, ".index.json") ||
         std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

std::string FolderName(const std::string& folder) {
  fs::path path = fs::path(folder).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  return path.filename().string();
}

}  // namespace

const FileReference* ExperimentInputs::FindFile(absl::string_view path) const {
  for (const FileReference& file : files) {
    if (file.path() == path) return &file;
  }
  return nullptr;
}

ResolvedInputs ResolveInputs(const Experiment& experiment, const std::string& spec_folder,
                             ProblemList* problems) {
  ResolvedInputs resolved;
  std::set<std::string> seen;
  for (const NamedPath& named : FindNamedPaths(experiment)) {
    if (!seen.insert(named.value).second) continue;
    const auto report = [&](std::string what, std::string remedy) {
      problems->Add({.field = named.field,
                     .value = named.value,
                     .what = std::move(what),
                     .remedy = std::move(remedy)});
    };
    const std::vector<std::string> candidates = Candidates(named.value, spec_folder);
    const std::optional<std::string> local_path = FindPath(candidates, named.folder);
    if (!local_path) {
      report(named.folder ? "no such folder" : "no such file",
             absl::StrCat("looked for ", absl::StrJoin(candidates, " and ")));
      continue;
    }
    resolved.local_paths[named.value] = *local_path;
    if (named.folder) {
      absl::StatusOr<ModelReference> model = DescribeModelFolder(*local_path);
      if (model.ok()) {
        resolved.inputs.model = *std::move(model);
      } else {
        report(std::string(model.status().message()), "name a folder in the Hugging Face layout");
      }
    } else {
      absl::StatusOr<FileReference> file =
          DescribeFile(named.value, *local_path, limits::kTravellingFileBytes);
      if (file.ok()) {
        resolved.inputs.files.push_back(*std::move(file));
      } else {
        report(std::string(file.status().message()), "name a part of it");
      }
    }
  }
  std::sort(resolved.inputs.files.begin(), resolved.inputs.files.end(),
            [](const FileReference& a, const FileReference& b) { return a.path() < b.path(); });
  return resolved;
}

absl::StatusOr<ModelReference> DescribeModelFolder(const std::string& folder) {
  std::error_code error;
  if (!fs::is_regular_file(fs::path(folder) / "config.json", error)) {
    return absl::NotFoundError(absl::StrCat(folder, " holds no config.json"));
  }
  std::vector<std::string> names;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    std::error_code kind_error;
    std::string name = entry->path().filename().string();
    if (IsModelFile(name) && entry->is_regular_file(kind_error)) names.push_back(std::move(name));
    if (names.size() > static_cast<size_t>(limits::kModelShards)) {
      return absl::ResourceExhaustedError(
          absl::StrCat(folder, " holds more than ", limits::kModelShards, " model files"));
    }
  }
  if (error) return absl::UnavailableError(absl::StrCat(folder, ": ", error.message()));
  std::sort(names.begin(), names.end());

  ModelReference model;
  model.set_name(FolderName(folder));
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(*model.add_files(),
                     DescribeFile(name, (fs::path(folder) / name).string(), limits::kModelBytes));
    model.set_bytes(model.bytes() + model.files(model.files_size() - 1).bytes());
  }
  model.set_digest(ModelDigest(model));
  return model;
}

std::string ModelDigest(const ModelReference& model) {
  std::vector<const FileReference*> files;
  for (const FileReference& file : model.files()) files.push_back(&file);
  std::sort(files.begin(), files.end(),
            [](const auto* a, const auto* b) { return a->path() < b->path(); });
  DigestBuilder builder;
  for (const FileReference* file : files) {
    builder.Add(file->path()).AddNumber(file->bytes()).Add(file->digest());
  }
  return std::string(builder.Finish().bytes());
}

}  // namespace kvsweep
