// Files are part of the question: every path that a spec names is resolved to content, once, at
// submission. Paths are tried relative to the spec's folder first, then to the current directory
// (the root of the tree, usually). From then on a file is its digest; the path stays only as a
// name.
#ifndef KVSWEEP_EXPERIMENTS_FILES_H_
#define KVSWEEP_EXPERIMENTS_FILES_H_

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/experiment.pb.h"
#include "proto/schema.h"

namespace kvsweep {

// What an experiment's paths came down to. This is what travels in a SubmitRequest.
struct ExperimentInputs {
  std::optional<ModelReference> model;  // absent: a shape with random weights
  std::vector<FileReference> files;     // one for each distinct path, sorted by path

  // The file that the spec calls `path`; null if none.
  const FileReference* FindFile(absl::string_view path) const;
};

// The same, with the places on this machine.
struct ResolvedInputs {
  ExperimentInputs inputs;
  std::map<std::string, std::string>
      local_paths;  // path as written -> path on this machine; model folder included
};

// Resolves all paths of `experiment`, values of axes included. `spec_folder` is the folder of the
// spec ("" when there is none). What is missing, unreadable or too large goes to `problems`, with
// the places tried.
ResolvedInputs ResolveInputs(const Experiment& experiment, const std::string& spec_folder,
                             ProblemList* problems);

// Describes a model folder by the files that decide its results: config.json,
// generation_config.json, weights
// (*.safetensors and their *.index.json), tokenizer files. `digest` covers the sorted names and
// contents; `name` is the folder's last component; `files` has one entry each. Used by `validate`,
// `submit` and by workers for what they hold. NotFound without a config.json; ResourceExhausted
// past the limits.
absl::StatusOr<ModelReference> DescribeModelFolder(const std::string& folder);

// The digest of a model from its parts: SHA-256 over name, size and digest of each file, sorted by
// name. 32 bytes.
std::string ModelDigest(const ModelReference& model);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_FILES_H_
