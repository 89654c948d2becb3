// Reading an experiment: from a file, a text or the wire to an Experiment that is known to be
// sound. proto/schema judges each field by its rule; here is what the fields mean together (one
// strategy an arm, arrivals that fit their process, lengths from a trace or fixed, budgets that add
// up, axes that can take effect).
//
// Start here: LoadExperiment, then Matrix::Create (experiments/matrix.h).
#ifndef KVSWEEP_EXPERIMENTS_SPEC_H_
#define KVSWEEP_EXPERIMENTS_SPEC_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "experiments/files.h"
#include "proto/experiment.pb.h"
#include "proto/schema.h"

namespace kvsweep {

struct LoadOptions {
  std::vector<std::string> overrides;  // "kv.device_bytes=6MiB", applied after reading
  Environment environment;             // for ${NAME}; see SystemEnvironment
  // What only the caller can judge (LoadExperiment alone), once all else is sound: `resolved` tells
  // where its files lie. Problems are told at the places of their fields.
  std::function<void(const Experiment& experiment, const ResolvedInputs& resolved,
                     ProblemList* problems)>
      check;
};

// A spec that was read, checked, and whose files were found.
struct LoadedExperiment {
  Experiment experiment;  // as written: defaults unset
  std::string text;       // exactly as the person wrote it
  std::string source;     // the file's name, for messages
  ResolvedInputs resolved;
};

// Reads a spec file and all that it names. InvalidArgument lists every problem as
// "file:line:column: field: value: what; remedy", a line each; NotFound when the spec itself is
// missing.
absl::StatusOr<LoadedExperiment> LoadExperiment(const std::string& path,
                                                const LoadOptions& options);

// Reads and checks a text, without looking for its files. `source` goes into the messages.
absl::StatusOr<Experiment> ParseExperiment(absl::string_view text, absl::string_view source,
                                           const LoadOptions& options);

// Checks an experiment off the wire: fields by their rules, then what they mean together.
absl::Status ValidateExperiment(const Experiment& experiment);

// Checks what the fields of `experiment` mean together. Its fields alone must be sound
// (CheckMessage).
void CheckExperiment(const Experiment& experiment, ProblemList* problems);

// Checks one complete trial: off the wire in the runner, and of each arm × cell in the matrix.
// `prefix` goes before the field paths.
void CheckTrial(const TrialSpec& trial, absl::string_view prefix, ProblemList* problems);

// "equal_device_bytes", "kv_fits", "equal_batch".
std::string RegimeName(Experiment::Regime regime);

// An axis of a sweep and where it stands: "grid", "zip" or "list".
struct SweepAxis {
  const Axis& axis;
  const char* group;
};

// All axes of a sweep, in the order of the cells' values: grid, zip, list.
std::vector<SweepAxis> SweepAxes(const Sweep& sweep);

// Fills in the defaults of the arm's own strategy block (made if it is not written), and of nothing
// else: what arm.kv overrides stays what was written.
void ApplyArmDefaults(Arm* arm);

// The process's environment.
Environment SystemEnvironment();

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_SPEC_H_
