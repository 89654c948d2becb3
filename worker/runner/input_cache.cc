#include "worker/runner/input_cache.h"

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "worker/engine/token_file.h"

namespace kvsweep {
namespace {

// Entries kept of each kind. A round needs one; an experiment's axis may walk through several.
constexpr size_t kEntries = 16;

}  // namespace

void InputCache::Trim() {
  if (traces_.size() >= kEntries) traces_.clear();
  if (texts_.size() >= kEntries) texts_.clear();
}

absl::StatusOr<InputCache::Place> InputCache::FindPlace(const RunTrial& request,
                                                        const std::string& path) {
  const auto found = request.file_paths().find(path);
  if (found == request.file_paths().end()) {
    return absl::NotFoundError(absl::StrCat(path, ": the trial came without this file"));
  }
  Place place{.path = found->second, .digest = {}};
  for (const FileReference& file : request.spec().files()) {
    if (file.path() != path) continue;
    ASSIGN_OR_RETURN(place.digest, Digest::FromBytes(file.digest()));
  }
  return place;
}

absl::StatusOr<std::string> InputCache::ReadFile(const Place& place, const std::string& name,
                                                 int64_t most_bytes) {
  ASSIGN_OR_RETURN(std::string content, kvsweep::ReadFile(place.path, most_bytes));
  if (!place.digest.empty() && Sha256(content) != place.digest) {
    return absl::FailedPreconditionError(absl::StrCat(
        name, ": ", place.path, " is not the file that was submitted (its digest is not ",
        place.digest.Hex(), ")"));
  }
  return content;
}

absl::StatusOr<const Trace*> InputCache::FindTrace(const RunTrial& request,
                                                   const std::string& path) {
  ASSIGN_OR_RETURN(const Place place, FindPlace(request, path));
  const std::string key = absl::StrCat(place.digest.Hex(), " ", place.path);
  if (const auto found = traces_.find(key); found != traces_.end()) return &found->second;
  ASSIGN_OR_RETURN(const std::string content, ReadFile(place, path, limits::kTraceFileBytes));
  ASSIGN_OR_RETURN(Trace trace, ParseTrace(content, path));
  return &(traces_[key] = std::move(trace));
}

absl::StatusOr<std::span<const int32_t>> InputCache::TextIds(const RunTrial& request,
                                                             const std::string& path,
                                                             const Tokenizer& tokenizer,
                                                             absl::string_view model) {
  ASSIGN_OR_RETURN(const Place place, FindPlace(request, path));
  const std::string key = absl::StrCat(place.digest.Hex(), " ", place.path, " ", model);
  if (const auto found = texts_.find(key); found != texts_.end()) return found->second;
  ASSIGN_OR_RETURN(const std::string content, ReadFile(place, path, limits::kTextFileBytes));
  ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(content));
  return (texts_[key] = std::move(ids));
}

absl::StatusOr<std::span<const int32_t>> InputCache::TokenIds(const RunTrial& request,
                                                              const std::string& path,
                                                              int32_t vocabulary) {
  ASSIGN_OR_RETURN(const Place place, FindPlace(request, path));
  const std::string key = absl::StrCat(place.digest.Hex(), " ", place.path, " ids ", vocabulary);
  if (const auto found = texts_.find(key); found != texts_.end()) return found->second;
  ASSIGN_OR_RETURN(const std::string content, ReadFile(place, path, limits::kTextFileBytes));
  ASSIGN_OR_RETURN(std::vector<int32_t> ids, ParseTokenFile(content, path, vocabulary));
  return (texts_[key] = std::move(ids));
}

}  // namespace kvsweep
