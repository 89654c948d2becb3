#include "coordinator/submission.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "experiments/files.h"
#include "experiments/matrix.h"
#include "experiments/spec.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

bool Travels(const FileReference& file) {
  return file.bytes() <= static_cast<uint64_t>(limits::kTravellingFileBytes);
}

absl::Status CheckReference(const FileReference& file, absl::string_view what) {
  if (file.digest().size() != Digest::kBytes || file.path().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " '", file.path(), "': no path, or a digest that is not 32 bytes long"));
  }
  return absl::OkStatus();
}

absl::Status CheckRequest(const SubmitRequest& request) {
  if (request.client_id().empty() ||
      request.client_id().size() > static_cast<size_t>(limits::kNameLength)) {
    return absl::InvalidArgumentError(
        absl::StrCat("client_id must have 1 to ", limits::kNameLength, " characters"));
  }
  if (request.spec_text().size() > static_cast<size_t>(limits::kSpecFileBytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the spec has more than ", limits::kSpecFileBytes, " bytes"));
  }
  const int64_t files = request.files_size() + request.model().files_size();
  if (files > limits::kTravellingFilesPerExperiment) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the experiment names ", files, " files; at most ", limits::kTravellingFilesPerExperiment));
  }
  for (const FileReference& file : request.files()) {
    RETURN_IF_ERROR(CheckReference(file, "file"));
    if (!Travels(file)) {
      return absl::InvalidArgumentError(
          absl::StrCat("file '", file.path(), "' has ", file.bytes(), " bytes; files travel up to ",
                       limits::kTravellingFileBytes, " bytes: cut it to what the load needs"));
    }
  }
  for (const FileReference& file : request.model().files()) {
    RETURN_IF_ERROR(CheckReference(file, "model file"));
  }
  if (request.has_model() && request.model().digest() != ModelDigest(request.model())) {
    return absl::InvalidArgumentError("the model's digest is not that of its files");
  }
  return ValidateExperiment(request.experiment());
}

absl::StatusOr<std::vector<std::string>> MissingFiles(const SubmitRequest& request,
                                                      StoreReader& reader) {
  std::set<std::string> digests;
  for (const FileReference& file : request.files()) digests.insert(file.digest());
  if (ModelTravels(request.model())) {
    for (const FileReference& file : request.model().files()) digests.insert(file.digest());
  }
  std::vector<std::string> missing;
  for (const std::string& digest : digests) {
    ASSIGN_OR_RETURN(const bool known, reader.HasFile(digest));
    if (!known) missing.push_back(digest);
  }
  return missing;
}

// A round travels to its worker in one message.
absl::Status CheckRoundSize(const RoundSpec& spec) {
  const size_t limit = limits::kMessageBytes / 2;
  if (spec.ByteSizeLong() <= limit) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("a round of ", spec.trials_size(), " arms takes ", spec.ByteSizeLong(),
                   " bytes, more than ", limit, ": lower round_arms"));
}

// The part of a planned round that consists of the trials at `positions`, in running order.
NewRound Part(const PlannedRound& planned, const std::vector<size_t>& positions) {
  NewRound round;
  round.cell_index = static_cast<uint32_t>(planned.cell);
  round.repeat = planned.repeat;
  round.kind = planned.kind;
  round.spec.set_devices(planned.spec.devices());
  bool uses_host_tier = false;
  for (const size_t position : positions) {
    const PlannedTrial& trial = planned.spec.trials(static_cast<int>(position));
    *round.spec.add_trials() = trial;
    uses_host_tier |= UsesHostTier(trial.spec().arm());
    round.trials.push_back({.arm_index = static_cast<uint32_t>(planned.arms[position]),
                            .content_key = trial.content_key(),
                            .quality_key = planned.quality_keys[position],
                            .canonical_spec = CanonicalJson(trial.spec())});
  }
  round.spec.set_uses_host_tier(planned.spec.uses_host_tier() && uses_host_tier);
  return round;
}

absl::StatusOr<std::vector<AcceptedRound>> FindAnswers(const PlannedRound& planned,
                                                       const ReuseRules& rules,
                                                       StoreReader& reader) {
  std::vector<AcceptedRound> answers;
  if (rules.fresh) return answers;
  AcceptedQuery query;
  for (const PlannedTrial& trial : planned.spec.trials()) {
    query.content_keys.push_back(trial.content_key());
  }
  query.method_version = kMethodVersion;
  // Modelled numbers come from the profile that the content key names, not from the worker's
  // device.
  if (!RequirementOf(planned.spec).modelled_time) query.device_classes = rules.device_classes;
  if (rules.any_build) return reader.FindAccepted(query);
  for (const std::string& build : rules.runner_builds) {
    query.runner_build = build;
    ASSIGN_OR_RETURN(std::vector<AcceptedRound> found, reader.FindAccepted(query));
    answers.insert(answers.end(), std::make_move_iterator(found.begin()),
                   std::make_move_iterator(found.end()));
  }
  return answers;
}

// Splits a planned round into parts that accepted rounds answer, and at most one that is to be run.
// Every part has the reference arm, so that its differences are paired.
absl::StatusOr<std::vector<NewRound>> SplitRound(const PlannedRound& planned, size_t reference_arm,
                                                 const ReuseRules& rules, StoreReader& reader) {
  size_t reference = planned.arms.size();
  std::set<size_t> open;  // positions not answered yet, without the reference
  for (size_t position = 0; position < planned.arms.size(); ++position) {
    if (planned.arms[position] == reference_arm) {
      reference = position;
    } else {
      open.insert(position);
    }
  }
  const bool has_reference = reference < planned.arms.size();
  const bool reference_alone = open.empty();
  bool reference_answered = false;

  ASSIGN_OR_RETURN(const std::vector<AcceptedRound> answers, FindAnswers(planned, rules, reader));
  std::vector<NewRound> parts;
  for (const AcceptedRound& answer : answers) {
    // A stored trial answers one arm: two of equal parameters are two measurements.
    std::multiset<std::string> keys;
    for (const auto& [trial, key] : answer.trials) keys.insert(key);
    std::vector<size_t> positions;
    const auto take = [&](size_t position) {
      const auto key = keys.find(planned.spec.trials(static_cast<int>(position)).content_key());
      if (key == keys.end()) return;
      keys.erase(key);
      positions.push_back(position);
    };
    if (has_reference) take(reference);
    for (const size_t position : open) take(position);
    std::sort(positions.begin(), positions.end());
    const bool with_reference =
        std::find(positions.begin(), positions.end(), reference) != positions.end();
    const size_t needed = has_reference && !reference_alone ? 2 : 1;
    if (positions.size() < needed || (has_reference && !with_reference) ||
        (reference_alone && reference_answered)) {
      continue;
    }
    parts.push_back(Part(planned, positions));
    parts.back().served_by = answer.round;
    reference_answered = reference_answered || with_reference;
    for (const size_t position : positions) open.erase(position);
  }
  if (!open.empty() || (reference_alone && has_reference && !reference_answered)) {
    std::vector<size_t> positions(open.begin(), open.end());
    if (has_reference) {
      positions.insert(std::lower_bound(positions.begin(), positions.end(), reference), reference);
    }
    parts.push_back(Part(planned, positions));
  }
  return parts;
}

}  // namespace

absl::Status QueueFullError(uint64_t trials, uint64_t held, uint64_t limit) {
  return absl::ResourceExhaustedError(absl::StrCat(
      "the experiment has ", trials, " trials to run, and ", held,
      " of all experiments are queued or running; together at most ", limit,
      held == 0
          ? ": submit a smaller matrix, or fewer repeats"
          : ": wait until some are done, cancel an experiment with `kvsweep cancel`, or submit "
            "a smaller matrix"));
}

bool ModelTravels(const ModelReference& model) {
  return std::all_of(model.files().begin(), model.files().end(), Travels);
}

RoundRequirement RequirementOf(const RoundSpec& spec) {
  RoundRequirement requirement;
  requirement.devices = std::max(1u, spec.devices());
  requirement.uses_host_tier = spec.uses_host_tier();
  if (spec.trials_size() == 0) return requirement;
  // All trials of a round share model and engine.
  const TrialSpec& trial = spec.trials(0).spec();
  if (trial.engine().backend() == Engine::BACKEND_CPU) requirement.backend = "cpu";
  if (trial.engine().backend() == Engine::BACKEND_CUDA) requirement.backend = "cuda";
  requirement.modelled_time = trial.engine().time() == Engine::TIME_MODELLED;
  requirement.model_digest = trial.model_reference().digest();
  requirement.model_name = trial.model_reference().name();
  requirement.model_travels = ModelTravels(trial.model_reference());
  return requirement;
}

absl::StatusOr<Submission> PlanSubmission(const SubmitRequest& request, const ReuseRules& rules,
                                          int64_t unix_ns, StoreReader& reader) {
  RETURN_IF_ERROR(CheckRequest(request));
  Submission submission;
  ASSIGN_OR_RETURN(submission.missing_files, MissingFiles(request, reader));
  if (!submission.missing_files.empty()) return submission;

  ExperimentInputs inputs;
  if (request.has_model()) inputs.model = request.model();
  inputs.files.assign(request.files().begin(), request.files().end());
  ASSIGN_OR_RETURN(const Matrix matrix, Matrix::Create(request.experiment(), inputs));

  SubmitExperiment& operation = submission.operation;
  operation.client_id = request.client_id();
  operation.name = request.experiment().name();
  operation.spec_text = request.spec_text();
  operation.experiment = request.experiment();
  operation.model = request.model();
  operation.files = inputs.files;
  operation.submitted_unix_ns = unix_ns;
  operation.reference_arm = static_cast<uint32_t>(matrix.reference());
  for (const Arm& arm : matrix.arms()) operation.arms.push_back({arm.name(), arm.strategy()});
  for (const Cell& cell : matrix.cells()) operation.cells.push_back({cell.name, cell.values});
  for (uint64_t index = 0; index < matrix.round_count(); ++index) {
    ASSIGN_OR_RETURN(std::vector<NewRound> parts,
                     SplitRound(matrix.RoundAt(index), matrix.reference(), rules, reader));
    for (NewRound& part : parts) {
      RETURN_IF_ERROR(CheckRoundSize(part.spec));
      submission.trials += part.trials.size();
      if (part.served_by.has_value()) {
        ++submission.rounds_served;
      } else {
        submission.queued_trials += part.trials.size();
      }
      operation.rounds.push_back(std::move(part));
    }
  }
  if (submission.queued_trials > static_cast<uint64_t>(limits::kQueuedTrials)) {
    return QueueFullError(submission.queued_trials, /*held=*/0, limits::kQueuedTrials);
  }
  return submission;
}

}  // namespace kvsweep
