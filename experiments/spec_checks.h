// What the checks of a spec share. Not for others; experiments/spec.h is the interface.
#ifndef KVSWEEP_EXPERIMENTS_SPEC_CHECKS_H_
#define KVSWEEP_EXPERIMENTS_SPEC_CHECKS_H_

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "proto/experiment.pb.h"
#include "proto/schema.h"

namespace kvsweep {

// Reports problems under a common prefix.
class Reporter {
 public:
  Reporter(std::string prefix, ProblemList* problems)
      : prefix_(std::move(prefix)), problems_(*problems) {}

  void Add(absl::string_view field, std::string what, std::string remedy) const {
    problems_.Add(
        {.field = absl::StrCat(prefix_, prefix_.empty() || field.empty() ? "" : ".", field),
         .what = std::move(what),
         .remedy = std::move(remedy)});
  }

  // A setting that would be recorded and never take effect.
  void Useless(bool written, absl::string_view field, absl::string_view why) const {
    if (written) Add(field, absl::StrCat("has no effect: ", why), "remove it");
  }

 private:
  const std::string prefix_;
  ProblemList& problems_;
};

// Checks what the fields of `load` mean together. It may be without defaults.
void CheckLoad(const Load& load, const std::string& path, ProblemList* problems);

// Checks that load and engine can be what `regime` claims. `engine` has its defaults.
void CheckRegime(Experiment::Regime regime, const Load& load, const Engine& engine,
                 ProblemList* problems);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_SPEC_CHECKS_H_
