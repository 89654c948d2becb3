#ifndef KVSWEEP_TESTS_COORDINATOR_TRANSCRIPT_H_
#define KVSWEEP_TESTS_COORDINATOR_TRANSCRIPT_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "coordinator/scheduler.h"

namespace kvsweep {

// Plays a transcript (tests/golden/scheduler/*.txt): every line that does not start with two blanks
// is a command or a comment and is copied; after each command stand, indented, the plan or answer
// that it led to. Aborts on a command that it does not know, so that a typing error cannot pass.
//
//   at TIME                                   lets time pass ("3s", "1500ms")
//   submit EXPERIMENT FIRST-LAST [devices=N] [backend=B] [class=C] [model=M] [travels] [host]
//   [modelled] join WORKER [inc=N] [machine=M] [slots=N] [devices=N] [backend=B] [class=C]
//   [models=A,B] [draining] [unhealthy=R] hold WORKER SLOT ATTEMPT PHASE [trial=N] [reason=R] the
//   worker speaks; so do `idle` and `beat` idle WORKER SLOT | beat WORKER | break WORKER [inc=N]
//   accept ATTEMPT | refuse ATTEMPT REASON | cancel EXPERIMENT | drain WORKER on|off
//   restart                                   a new scheduler that knows what the rows of the plans
//   say why EXPERIMENT | progress EXPERIMENT | running EXPERIMENT | workers
class Transcript {
 public:
  Transcript();

  // The text with every answer recomputed.
  std::string Play(absl::string_view text);

 private:
  struct Stored {  // what a store would hold of the plans' rows
    std::map<ExperimentId, std::vector<RoundDescriptor>> rounds;  // not done
    std::map<ExperimentId, std::array<uint64_t, 5>> ended;
    std::map<Attempt, GrantRow> open;
    std::map<RoundId, std::vector<Mishap>> mishaps;
    Attempt highest;
  };

  std::string Run(const std::vector<std::string>& words);
  std::string Question(const std::vector<std::string>& words);
  void Event(const std::vector<std::string>& words);
  void Join(const std::vector<std::string>& words);
  void Restart();
  void Submit(const std::vector<std::string>& words);
  void EndRound(RoundId round, RoundEnd end);
  void Store(const SchedulerPlan& plan);
  std::string Show(const SchedulerPlan& plan) const;

  int64_t now_ns_ = 0;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<std::string, WorkerReport> workers_;
  Stored stored_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_COORDINATOR_TRANSCRIPT_H_
