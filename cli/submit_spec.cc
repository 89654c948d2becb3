#include "cli/submit_spec.h"

#include <map>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "cli/follow.h"
#include "cli/source.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

constexpr size_t kDigestDigits = 32;

// Where the content with this digest lies on this machine; nullopt: nowhere.
std::optional<std::string> LocalPath(const LoadedExperiment& loaded, absl::string_view digest) {
  const ResolvedInputs& resolved = loaded.resolved;
  for (const FileReference& file : resolved.inputs.files) {
    const auto path = resolved.local_paths.find(file.path());
    if (file.digest() == digest && path != resolved.local_paths.end()) return path->second;
  }
  const auto folder = resolved.local_paths.find(loaded.experiment.model().path());
  if (!resolved.inputs.model.has_value() || folder == resolved.local_paths.end()) {
    return std::nullopt;
  }
  for (const FileReference& file : resolved.inputs.model->files()) {
    if (file.digest() == digest) return absl::StrCat(folder->second, "/", file.path());
  }
  return std::nullopt;
}

absl::Status Upload(ControlClient& client, const LoadedExperiment& loaded,
                    absl::string_view missing) {
  ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(missing));
  const std::optional<std::string> path = LocalPath(loaded, missing);
  if (!path.has_value()) {
    return absl::InternalError(absl::StrCat(
        "the coordinator asks for a file that the spec does not name: ", digest.Hex()));
  }
  ASSIGN_OR_RETURN(const std::string content, ReadFile(*path, limits::kTravellingFileBytes));
  return Annotate(client.UploadFile(digest, content), absl::StrCat("sending ", *path));
}

}  // namespace

SubmitRequest MakeSubmitRequest(const LoadedExperiment& loaded, const ReuseFlags& reuse) {
  SubmitRequest request;
  *request.mutable_experiment() = loaded.experiment;
  request.set_spec_text(loaded.text);
  if (loaded.resolved.inputs.model.has_value()) {
    *request.mutable_model() = *loaded.resolved.inputs.model;
  }
  for (const FileReference& file : loaded.resolved.inputs.files) *request.add_files() = file;
  request.set_fresh(reuse.fresh);
  request.set_same_method(reuse.reuse == "same-method");
  return request;
}

std::string DeriveClientId(const LoadedExperiment& loaded, const ReuseFlags& reuse,
                           absl::string_view prefix, absl::string_view where) {
  if (reuse.fresh) return absl::StrCat(prefix, "-fresh-", absl::Hex(EntropySeed()));
  DigestBuilder digest;
  digest.Add(CanonicalJson(loaded.experiment)).Add(where).Add(reuse.reuse);
  // An empty group is not in the text above, and this one adds rounds.
  if (loaded.experiment.has_quality()) digest.Add("quality");
  digest.Add(GetBuildInfo().runner_digest);
  const ExperimentInputs& inputs = loaded.resolved.inputs;
  if (inputs.model.has_value()) digest.Add(inputs.model->digest());
  for (const FileReference& file : inputs.files) digest.Add(file.path()).Add(file.digest());
  return absl::StrCat(prefix, "-", digest.Finish().Hex().substr(0, kDigestDigits));
}

absl::StatusOr<std::string> NextTry(TableSource& tables, const std::string& client_id) {
  ASSIGN_OR_RETURN(const Table found,
                   tables.Run(absl::StrCat("SELECT experiment_id, client_id FROM v_experiments "
                                           "WHERE client_id = ",
                                           SqlText(client_id), " OR client_id LIKE ",
                                           SqlText(client_id + "-try-%"),
                                           " ORDER BY experiment_id DESC LIMIT 1"),
                              QueryLimits()));
  if (found.rows.empty()) return client_id;
  const std::string newest = TextAt(found, 0, 1);
  ASSIGN_OR_RETURN(const Standing standing,
                   ReadStanding(tables, ExperimentId(static_cast<uint64_t>(IntAt(found, 0, 0)))));
  if (!standing.finished() || !standing.has_failures()) return newest;
  absl::string_view number = newest;
  uint64_t tries = 1;
  if (absl::ConsumePrefix(&number, client_id + "-try-")) (void)absl::SimpleAtoi(number, &tries);
  return absl::StrCat(client_id, "-try-", tries + 1);
}

absl::StatusOr<SubmitReply> SubmitWithFiles(ControlClient& client, const LoadedExperiment& loaded,
                                            const SubmitRequest& request) {
  ASSIGN_OR_RETURN(SubmitReply reply, client.Submit(request));
  if (reply.missing_files().empty()) return reply;
  for (const std::string& digest : reply.missing_files()) {
    RETURN_IF_ERROR(Upload(client, loaded, digest));
  }
  ASSIGN_OR_RETURN(reply, client.Submit(request));
  if (reply.missing_files().empty()) return reply;
  return absl::UnavailableError("the coordinator lost files that were just sent; try again");
}

}  // namespace kvsweep
