#ifndef KVSWEEP_STORAGE_STORE_H_
#define KVSWEEP_STORAGE_STORE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"
#include "proto/experiment.pb.h"

// The store: all that must outlive a process. Experiments, their rounds and trials, who ran them,
// what was measured.
//
// *Writing* is done by one thread, the coordinator's, in turns: it gathers what happened into a
// WriteBatch and commits it as one transaction. When Commit returns OK the batch is durable, and
// only then do replies go out, so that acknowledged means stored. Operations are applied in order
// and each sees the effects of those before it; one that is refused changes nothing and does not
// disturb the others.
//
// *The store makes delivery exactly once.* Measurements arrive at least once, as (attempt,
// sequence, record). Attempts are numbers that only grow, one for each lease of a round to a
// worker's slot, and at most one attempt of a round is open. An attempt goes
//
//     open --AcceptAttempt--> accepted          its records are the result of the round, for good
//     open --VoidAttempt, broken rule--> void   its records are never shown; the round waits again
//
// and rows of an attempt that is not open are refused. An attempt is accepted whole or not at all.
//
// Nothing here asks for the time: operations carry it, as wall time in ns since 1970.

namespace kvsweep {

// -------------------------------------------------------------------------------------- operations

// A trial to be, in the order of its round.
struct NewTrial {
  uint32_t arm_index = 0;      // into SubmitExperiment::arms
  std::string content_key;     // 32 bytes
  std::string quality_key;     // content key of the quality trial that belongs to it; empty: none
  std::string canonical_spec;  // JSON
};

// A round to be. INVARIANT: trials.size() == spec.trials_size() > 0, in the same (running) order.
// The store assigns trial ids and writes ids and content keys into its copy of `spec`.
struct NewRound {
  uint32_t cell_index = 0;  // into SubmitExperiment::cells
  uint32_t repeat = 0;
  TrialSpec::Kind kind = TrialSpec::KIND_LOAD;
  RoundSpec spec;
  std::vector<NewTrial> trials;

  // An accepted round, found by FindAccepted, that answers this one: nothing is run. Every content
  // key of `trials` must be among those of that round.
  std::optional<RoundId> served_by;
};

struct NewArm {
  std::string name;
  std::string strategy;
};

struct NewCell {
  std::string name;                                         // "rate=4/s device_bytes=3MiB"
  std::vector<std::pair<std::string, std::string>> values;  // dotted path, value
};

// Stores an experiment with its rounds. Result: SubmitResult. A known client_id changes nothing and
// gives the result of the first time. InvalidArgument if a file that travels is not in the store,
// or a round breaks its invariant.
struct SubmitExperiment {
  std::string client_id;
  std::string name;
  std::string spec_text;  // as the person wrote it
  Experiment experiment;
  std::vector<NewArm> arms;  // expanded
  uint32_t reference_arm = 0;
  std::vector<NewCell> cells;
  ModelReference model;  // empty digest: random weights
  std::vector<FileReference> files;
  std::vector<NewRound> rounds;
  int64_t submitted_unix_ns = 0;
};

// Stores a file under the SHA-256 of its content; a known digest changes nothing. InvalidArgument
// if the digest is not the content's, or the content is longer than limits::kTravellingFileBytes.
struct PutFile {
  std::string digest;  // 32 bytes
  std::string content;
};

// What is known of a worker, replacing what was known.
struct UpsertWorker {
  std::string worker_id;
  uint64_t incarnation = 0;
  std::string machine;
  std::string runner_build;
  uint32_t method_version = 0;
  std::map<std::string, std::string> facts;  // labels, devices, preflight: for people
  int64_t seen_unix_ns = 0;
};

// Opens an attempt of a queued round. FailedPrecondition if the round is not queued or `attempt` is
// not greater than every attempt before.
struct GrantAttempt {
  Attempt attempt;
  RoundId round;
  std::string worker_id;
  uint64_t incarnation = 0;
  std::string machine;
  uint32_t slot = 0;
  uint32_t neighbours = 0;  // other open attempts on the machine at that instant
  int64_t granted_unix_ns = 0;
};

// Stores serialised records with sequences first_sequence, first_sequence + 1, … of an attempt.
// Result: AppendResult.
struct AppendRecords {
  Attempt attempt;
  uint64_t first_sequence = 0;
  std::vector<std::string> records;
  int64_t received_unix_ns = 0;
};

// Accepts a finished attempt: recomputes count and digest from the stored rows, compares them with
// the finish record, computes the summaries and marks the round done. Result: AcceptResult.
struct AcceptAttempt {
  Attempt attempt;
  int64_t accepted_unix_ns = 0;
};

// Ends an open attempt; its round is queued again. Result: none. FailedPrecondition if the attempt
// is not open.
struct VoidAttempt {
  Attempt attempt;
  std::string reason;
  bool worker_lost = false;              // counts towards poisoning; otherwise the attempt failed
  std::optional<TrialId> running_trial;  // when that happened, if known
  int64_t voided_unix_ns = 0;
};

// Ends a round without a result; an open attempt of it is voided with the same reason.
// FailedPrecondition if the round has already ended.
struct FinishRound {
  enum class State { kFailed, kCancelled, kPoisoned };
  RoundId round;
  State state = State::kFailed;
  std::optional<TrialId> poisoned_trial;  // of kPoisoned: during which the workers were lost
  std::string reason;
  int64_t finished_unix_ns = 0;
};

// Cancels the rounds of an experiment that have not ended, voiding their open attempts. Result:
// CancelResult.
struct CancelExperiment {
  ExperimentId experiment;
  int64_t cancelled_unix_ns = 0;
};

// One line about a round, for `kvsweep logs`.
struct AddLogLine {
  RoundId round;
  std::optional<TrialId> trial;
  std::optional<Attempt> attempt;
  int64_t unix_ns = 0;
  std::string text;
};

// Sets a named value of the store itself (ReadMeta).
struct PutMeta {
  std::string key;
  std::string value;
};

using Operation =
    std::variant<SubmitExperiment, PutFile, UpsertWorker, GrantAttempt, AppendRecords,
                 AcceptAttempt, VoidAttempt, FinishRound, CancelExperiment, AddLogLine, PutMeta>;

struct WriteBatch {
  std::vector<Operation> operations;
};

// ----------------------------------------------------------------------------------------- results

struct SubmitResult {
  struct Round {
    RoundId round;
    std::vector<TrialId> trials;  // in the order of NewRound::trials
    bool served = false;
  };
  ExperimentId experiment;
  std::vector<Round> rounds;
  bool repeated = false;  // the client id was known
};

// What became of an AppendRecords.
struct AppendResult {
  enum class State {
    kStored,   // what could be stored is: see acknowledged_through. Equal repeats are ignored;
               // records that would leave a gap are not stored, and acknowledged_through says from
               // where to send again
    kRefused,  // the attempt is unknown, accepted or void: stop sending
    kVoided,   // a record broke a rule (unequal repeat, not of this round, NaN, after the finish,
               // …): the attempt is void from now on
  };
  State state = State::kRefused;
  uint64_t acknowledged_through = 0;  // highest sequence up to which all is durable; 0: nothing
  bool finished = false;              // the finish record is stored: ready for AcceptAttempt
  std::string reason;                 // of kRefused and kVoided
};

struct AcceptResult {
  enum class State {
    kAccepted,
    kUnfinished,  // the finish record has not arrived; nothing changed
    kRefused,     // unknown, accepted before or void; nothing changed
    kVoided,      // what is stored is not what the worker finished: the attempt is void, the round
                  // queued again
  };
  State state = State::kRefused;
  std::string reason;
};

struct CancelResult {
  std::vector<RoundId> rounds;    // cancelled now
  std::vector<Attempt> attempts;  // voided with them
};

// The outcome of one operation. `status` is not OK when it was refused as its comment says; `value`
// is set for the operations that have a result and whose status is OK.
struct OperationResult {
  absl::Status status;
  std::variant<std::monostate, SubmitResult, AppendResult, AcceptResult, CancelResult> value;
};

// INVARIANT: one entry for each operation of the batch, in order.
struct CommitResult {
  std::vector<OperationResult> operations;

  // The result of operation `index`. REQUIRES: that kind of operation, with an OK status.
  template <typename Result>
  const Result& Get(size_t index) const {
    return std::get<Result>(operations[index].value);
  }
};

// ----------------------------------------------------------------------------------------- reading

enum class RoundState { kQueued, kRunning, kDone, kServed, kFailed, kCancelled, kPoisoned };
enum class AttemptState { kOpen, kAccepted, kVoid };

// "queued", "running", …: the words of the store's columns.
absl::string_view RoundStateName(RoundState state);
absl::string_view AttemptStateName(AttemptState state);

// How an attempt came to be void.
struct VoidedAttempt {
  Attempt attempt;
  std::string worker_id;
  std::string machine;
  bool worker_lost = false;
  std::optional<TrialId> running_trial;
  std::string reason;
  int64_t voided_unix_ns = 0;
};

struct StoredAttempt {
  Attempt attempt;
  RoundId round;
  AttemptState state = AttemptState::kOpen;
  std::string reason;  // of a void attempt
  std::string worker_id;
  uint64_t incarnation = 0;
  std::string machine;
  uint32_t slot = 0;
  uint64_t last_sequence = 0;  // all up to here is stored
  bool finished = false;       // the finish record is stored
};

struct QueuedRound {
  RoundId round;
  ExperimentId experiment;
  uint32_t devices = 1;
  bool uses_host_tier = false;
  std::string backend;  // "cpu", "cuda"; empty: any
  bool modelled_time = false;
  std::vector<TrialId> trials;  // in running order
  std::optional<StoredAttempt> open_attempt;
  std::vector<VoidedAttempt> void_attempts;  // oldest first
};

struct QueuedExperiment {
  ExperimentId experiment;
  std::string name;
  std::string model_name;
  std::string model_digest;
  uint64_t rounds = 0;
  uint64_t rounds_done = 0;  // accepted
  uint64_t rounds_served = 0;
  uint64_t rounds_failed = 0;
  uint64_t rounds_cancelled = 0;
  uint64_t rounds_poisoned = 0;
};

// All that the scheduler needs after a restart: what is not finished, in the order in which it was
// submitted.
struct Queue {
  std::vector<QueuedExperiment> experiments;  // those with unfinished rounds
  std::vector<QueuedRound> rounds;            // queued or running
  Attempt highest_attempt;                    // 0: none yet
};

struct StoredTrial {
  TrialId trial;
  std::string arm_name;
  uint32_t arm_index = 0;
  std::string strategy;
};

struct StoredRound {
  RoundId round;
  ExperimentId experiment;
  uint32_t cell_index = 0;
  std::string cell_name;
  uint32_t repeat = 0;
  TrialSpec::Kind kind = TrialSpec::KIND_LOAD;
  RoundState state = RoundState::kQueued;
  std::string reason;               // of a round that ended without a result
  RoundSpec spec;                   // with trial ids and content keys: what a worker is handed
  std::vector<StoredTrial> trials;  // in the order of spec.trials
  std::optional<RoundId> served_by;
};

struct AcceptedQuery {
  std::vector<std::string> content_keys;    // of the trials of one planned round
  std::optional<std::string> runner_build;  // nullopt: any build
  uint32_t method_version = 0;
  std::vector<std::string> device_classes;  // any of these; empty: any device class
};

struct AcceptedRound {
  RoundId round;
  std::vector<std::pair<TrialId, std::string>> trials;  // with content keys
};

// Reads what is committed. Each reader is for one thread at a time; any number may exist beside the
// writer, and each call sees one consistent state. Ids that are not there are NotFound.
class StoreReader {
 public:
  virtual ~StoreReader() = default;

  virtual absl::StatusOr<Queue> LoadQueue() = 0;
  virtual absl::StatusOr<StoredRound> GetRound(RoundId round) = 0;
  virtual absl::StatusOr<StoredAttempt> GetAttempt(Attempt attempt) = 0;

  // Accepted rounds that can answer a planned round, in whole: all their content keys are among
  // those asked for, they were measured by that method (and build, on that class of device), and
  // every trial ended with an outcome that a repetition would give again (ok, oom, infeasible,
  // unstable, timeout). Most trials first, then the newest.
  virtual absl::StatusOr<std::vector<AcceptedRound>> FindAccepted(const AcceptedQuery& query) = 0;

  // Whether an experiment of this client id is stored.
  virtual absl::StatusOr<bool> IsSubmitted(absl::string_view client_id) = 0;

  virtual absl::StatusOr<bool> HasFile(absl::string_view digest) = 0;
  virtual absl::StatusOr<std::string> GetFile(absl::string_view digest) = 0;

  // Serialised records of an attempt of any state with sequences from first_sequence on, at most
  // `limit`, in order.
  virtual absl::StatusOr<std::vector<std::string>> ReadRecords(Attempt attempt,
                                                               uint64_t first_sequence,
                                                               size_t limit) = 0;

  // nullopt: never set.
  virtual absl::StatusOr<std::optional<std::string>> ReadMeta(absl::string_view key) = 0;
};

class Store {
 public:
  virtual ~Store() = default;

  // Applies a batch in one transaction; OK means durable. One thread at a time. An error means that
  // nothing of the batch is known to be stored and the store can no longer be trusted to write
  // (disk full, failed sync, damaged file): the process should stop, and what the file holds is
  // found again at the next start.
  virtual absl::StatusOr<CommitResult> Commit(const WriteBatch& batch) = 0;

  // A further reader. Thread-safe. It must not outlive the store.
  virtual absl::StatusOr<std::unique_ptr<StoreReader>> OpenReader() = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_STORE_H_
