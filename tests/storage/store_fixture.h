#ifndef KVSWEEP_TESTS_STORAGE_STORE_FIXTURE_H_
#define KVSWEEP_TESTS_STORAGE_STORE_FIXTURE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/random.h"
#include "proto/experiment.pb.h"
#include "storage/store.h"

// Experiments, records and attempts as tests of the store need them.

namespace kvsweep {

// A content key made of one number.
std::string TestKey(uint64_t number);

struct TestExperimentOptions {
  std::string client_id = "client-1";
  uint32_t rounds = 2;
  uint32_t arms = 2;       // each round has a trial of each
  uint64_t first_key = 1;  // content keys count up from here
};
SubmitExperiment MakeExperiment(const TestExperimentOptions& options);

// A record with random content in every field, of any kind but finish and discard.
Record RandomRecord(Random& random, uint64_t trial_id);
Record RandomRequest(Random& random, uint64_t trial_id, uint32_t index);

// Builds the records of an attempt as a worker would, with the right finish record at the end.
class AttemptScript {
 public:
  void Add(const Record& record);
  // The start of an execution, of method 1 by build "build-1" on device class "class-1".
  void Start(uint64_t trial_id, uint32_t execution = 1);
  void Requests(uint64_t trial_id, Random& random, uint32_t count);
  void Discard(uint64_t trial_id);
  void Outcome(uint64_t trial_id, kvsweep::Outcome outcome = OUTCOME_OK);
  void Finish();

  // All of `trials`, each with a start, some requests and an outcome, then the finish.
  static std::vector<std::string> Whole(const std::vector<TrialId>& trials, Random& random,
                                        uint32_t requests = 3);

  std::vector<std::string> records;

 private:
  std::vector<std::string> kept_;  // that the finish covers
  size_t kept_before_trial_ = 0;
};

// Applies one operation in a batch of its own; a failed commit is a failed test.
OperationResult Apply(Store& store, Operation operation);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_STORAGE_STORE_FIXTURE_H_
