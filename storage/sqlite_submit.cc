// What a person submits: experiments with their rounds, files; and what is known of workers.
#include <zstd.h>

#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "experiments/spec.h"
#include "storage/json_text.h"
#include "storage/operation_results.h"
#include "storage/sqlite_reader.h"
#include "storage/sqlite_writer.h"

namespace kvsweep {
namespace {

absl::string_view BackendName(const Engine& engine) {
  switch (engine.backend()) {
    case Engine::BACKEND_CPU:
      return "cpu";
    case Engine::BACKEND_CUDA:
      return "cuda";
    default:
      return "";
  }
}

}  // namespace

// submitting

absl::StatusOr<OperationResult> SqliteWriter::Do(const SubmitExperiment& operation) {
  ASSIGN_OR_RETURN(std::optional<SubmitResult> known, FindSubmission(operation.client_id));
  if (known.has_value()) return Done(*std::move(known));
  ASSIGN_OR_RETURN(const absl::Status sound, CheckSubmission(operation));
  if (!sound.ok()) return Refused(sound);
  SubmitResult result;
  ASSIGN_OR_RETURN(result.experiment, InsertExperiment(operation));
  result.rounds.reserve(operation.rounds.size());
  for (const NewRound& round : operation.rounds) {
    ASSIGN_OR_RETURN(result.rounds.emplace_back(), InsertRound(result.experiment, round));
  }
  return Done(std::move(result));
}

absl::StatusOr<std::optional<SubmitResult>> SqliteWriter::FindSubmission(
    const std::string& client_id) {
  std::optional<SubmitResult> result;
  ASSIGN_OR_RETURN(
      Statement * query,
      database_.Prepare("SELECT e.experiment_id, r.round_id, r.state = 'served', t.trial_id "
                        "FROM experiment e LEFT JOIN round r USING (experiment_id) "
                        "LEFT JOIN trial t USING (round_id) WHERE e.client_id = ?1 "
                        "ORDER BY r.round_id, t.position"));
  const StatementUse use(*query);
  query->BindText(1, client_id);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, query->Step());
    if (!more) return result;
    if (!result.has_value()) {
      result.emplace();
      result->experiment = ExperimentId(query->Int(0));
      result->repeated = true;
    }
    if (query->IsNull(1)) continue;  // an experiment without rounds
    const RoundId round(query->Int(1));
    if (result->rounds.empty() || result->rounds.back().round != round) {
      result->rounds.push_back({.round = round, .trials = {}, .served = query->Int(2) != 0});
    }
    result->rounds.back().trials.push_back(TrialId(query->Int(3)));
  }
}

absl::StatusOr<absl::Status> SqliteWriter::CheckSubmission(const SubmitExperiment& operation) {
  if (operation.client_id.empty()) return absl::InvalidArgumentError("the client id is empty");
  if (operation.reference_arm >= operation.arms.size()) {
    return absl::InvalidArgumentError("the reference arm is none of the arms");
  }
  for (const FileReference& file : operation.files) {
    if (static_cast<int64_t>(file.bytes()) > limits::kTravellingFileBytes) continue;
    ASSIGN_OR_RETURN(const bool known, ReadHasFile(database_, file.digest()));
    if (!known) {
      return absl::InvalidArgumentError(absl::StrCat("file ", file.path(), " is not in the store"));
    }
  }
  for (size_t i = 0; i < operation.rounds.size(); ++i) {
    const NewRound& round = operation.rounds[i];
    if (round.trials.empty() ||
        round.trials.size() != static_cast<size_t>(round.spec.trials_size()) ||
        round.cell_index >= operation.cells.size() ||
        absl::c_any_of(round.trials, [&](const NewTrial& trial) {
          return trial.arm_index >= operation.arms.size();
        })) {
      return absl::InvalidArgumentError(absl::StrCat("round ", i, " does not fit its experiment"));
    }
    ASSIGN_OR_RETURN(const absl::Status served, CheckServed(round));
    if (!served.ok()) return served;
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Status> SqliteWriter::CheckServed(const NewRound& round) {
  if (!round.served_by.has_value()) return absl::OkStatus();
  const absl::Status refused = absl::InvalidArgumentError(
      absl::StrCat("round ", round.served_by->value(), " cannot serve another"));
  const absl::StatusOr<StoredRound> source = ReadRound(database_, *round.served_by);
  if (absl::IsNotFound(source.status())) return refused;
  RETURN_IF_ERROR(source.status());
  if (source->state != RoundState::kDone) return refused;
  for (const NewTrial& trial : round.trials) {
    if (!absl::c_any_of(source->spec.trials(), [&](const PlannedTrial& planned) {
          return planned.content_key() == trial.content_key;
        })) {
      return refused;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ExperimentId> SqliteWriter::InsertExperiment(const SubmitExperiment& operation) {
  ASSIGN_OR_RETURN(Statement * insert,
                   database_.Prepare("INSERT INTO experiment (client_id, name, spec_text, spec, "
                                     "reference_arm, model_name, model_digest, submitted_unix_ns, "
                                     "regime) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"));
  const std::string spec = operation.experiment.SerializeAsString();
  const std::string regime = RegimeName(operation.experiment.regime());
  RETURN_IF_ERROR(insert->BindText(1, operation.client_id)
                      .BindText(2, operation.name)
                      .BindText(3, operation.spec_text)
                      .BindBlob(4, spec)
                      .BindInt(5, operation.reference_arm)
                      .BindText(6, operation.model.name())
                      .BindBlob(7, operation.model.digest())
                      .BindInt(8, operation.submitted_unix_ns)
                      .BindText(9, regime)
                      .Run());
  const int64_t id = sqlite3_last_insert_rowid(database_.get());
  ASSIGN_OR_RETURN(Statement * file, database_.Prepare("INSERT OR IGNORE INTO experiment_file "
                                                       "VALUES (?1, ?2, ?3, ?4)"));
  for (const FileReference& reference : operation.files) {
    RETURN_IF_ERROR(file->BindInt(1, id)
                        .BindText(2, reference.path())
                        .BindBlob(3, reference.digest())
                        .BindInt(4, static_cast<int64_t>(reference.bytes()))
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement * arm, database_.Prepare("INSERT INTO arm VALUES (?1, ?2, ?3, ?4)"));
  for (size_t i = 0; i < operation.arms.size(); ++i) {
    RETURN_IF_ERROR(arm->BindInt(1, id)
                        .BindInt(2, static_cast<int64_t>(i))
                        .BindText(3, operation.arms[i].name)
                        .BindText(4, operation.arms[i].strategy)
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement * cell, database_.Prepare("INSERT INTO cell VALUES (?1, ?2, ?3, ?4)"));
  for (size_t i = 0; i < operation.cells.size(); ++i) {
    const std::string axes = JsonObject(operation.cells[i].values);
    RETURN_IF_ERROR(cell->BindInt(1, id)
                        .BindInt(2, static_cast<int64_t>(i))
                        .BindText(3, operation.cells[i].name)
                        .BindText(4, axes)
                        .Run());
  }
  return ExperimentId(id);
}

absl::StatusOr<SubmitResult::Round> SqliteWriter::InsertRound(ExperimentId experiment,
                                                              const NewRound& round) {
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO round (experiment_id, cell_index, repeat, kind, devices, "
                        "uses_host_tier, backend, modelled_time, state, served_by) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"));
  const Engine& engine = round.spec.trials(0).spec().engine();
  const bool served = round.served_by.has_value();
  insert->BindInt(1, static_cast<int64_t>(experiment.value()))
      .BindInt(2, round.cell_index)
      .BindInt(3, round.repeat)
      .BindText(4, round.kind == TrialSpec::KIND_QUALITY ? "quality" : "load")
      .BindInt(5, round.spec.devices())
      .BindInt(6, round.spec.uses_host_tier())
      .BindText(7, BackendName(engine))
      .BindInt(8, engine.time() == Engine::TIME_MODELLED)
      .BindText(9, RoundStateName(served ? RoundState::kServed : RoundState::kQueued));
  BindOptional(*insert, 10, round.served_by);
  RETURN_IF_ERROR(insert->Run());
  SubmitResult::Round result{
      .round = RoundId(sqlite3_last_insert_rowid(database_.get())), .trials = {}, .served = served};
  for (size_t i = 0; i < round.trials.size(); ++i) {
    ASSIGN_OR_RETURN(result.trials.emplace_back(), InsertTrial(result.round, round, i));
  }
  return result;
}

absl::StatusOr<TrialId> SqliteWriter::InsertTrial(RoundId round, const NewRound& from,
                                                  size_t position) {
  // Its own rows answer a trial, or those of the equal trial of the round that serves it: of equal
  // arms each has its own.
  ASSIGN_OR_RETURN(
      Statement * insert,
      database_.Prepare("INSERT INTO trial (round_id, position, arm_index, content_key, "
                        "quality_key, spec, canonical_spec, measured_trial_id) "
                        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, "
                        "(SELECT trial_id FROM trial WHERE round_id = ?8 AND content_key = ?4 "
                        "ORDER BY position LIMIT 1 OFFSET ?9))"));
  const NewTrial& trial = from.trials[position];
  const auto earlier =
      std::count_if(from.trials.begin(), from.trials.begin() + static_cast<ptrdiff_t>(position),
                    [&](const NewTrial& other) { return other.content_key == trial.content_key; });
  const std::string spec = from.spec.trials(static_cast<int>(position)).spec().SerializeAsString();
  insert->BindInt(1, static_cast<int64_t>(round.value()))
      .BindInt(2, static_cast<int64_t>(position))
      .BindInt(3, trial.arm_index)
      .BindBlob(4, trial.content_key)
      .BindBlob(5, trial.quality_key)
      .BindBlob(6, spec)
      .BindText(7, trial.canonical_spec);
  BindOptional(*insert, 8, from.served_by);
  insert->BindInt(9, earlier);
  RETURN_IF_ERROR(insert->Run());
  return TrialId(sqlite3_last_insert_rowid(database_.get()));
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const PutFile& operation) {
  if (static_cast<int64_t>(operation.content.size()) > limits::kTravellingFileBytes) {
    return Refused(absl::InvalidArgumentError(
        absl::StrCat("a file of ", operation.content.size(), " bytes is larger than ",
                     limits::kTravellingFileBytes, ", the most that the store takes")));
  }
  if (Sha256(operation.content).bytes() != operation.digest) {
    return Refused(absl::InvalidArgumentError("the digest is not that of the file's content"));
  }
  ASSIGN_OR_RETURN(const bool known, ReadHasFile(database_, operation.digest));
  if (known) return Done();
  std::string compressed(ZSTD_compressBound(operation.content.size()), '\0');
  const size_t size = ZSTD_compress(compressed.data(), compressed.size(), operation.content.data(),
                                    operation.content.size(), ZSTD_CLEVEL_DEFAULT);
  KVSWEEP_CHECK(!ZSTD_isError(size));  // the buffer is as large as it can need
  ASSIGN_OR_RETURN(Statement * insert, database_.Prepare("INSERT INTO file VALUES (?1, ?2, ?3)"));
  RETURN_IF_ERROR(insert->BindBlob(1, operation.digest)
                      .BindInt(2, static_cast<int64_t>(operation.content.size()))
                      .BindBlob(3, absl::string_view(compressed.data(), size))
                      .Run());
  return Done();
}

absl::StatusOr<OperationResult> SqliteWriter::Do(const UpsertWorker& operation) {
  ASSIGN_OR_RETURN(Statement * insert, database_.Prepare("INSERT OR REPLACE INTO worker VALUES "
                                                         "(?1, ?2, ?3, ?4, ?5, ?6, ?7)"));
  const std::string facts = JsonObject(operation.facts);
  RETURN_IF_ERROR(insert->BindText(1, operation.worker_id)
                      .BindInt(2, static_cast<int64_t>(operation.incarnation))
                      .BindText(3, operation.machine)
                      .BindText(4, operation.runner_build)
                      .BindInt(5, operation.method_version)
                      .BindText(6, facts)
                      .BindInt(7, operation.seen_unix_ns)
                      .Run());
  return Done();
}

}  // namespace kvsweep
