#ifndef KVSWEEP_KERNELS_CPU_STREAM_SCHEDULER_H_
#define KVSWEEP_KERNELS_CPU_STREAM_SCHEDULER_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "base/random.h"
#include "kernels/backend.h"
#include "kernels/cpu/operation.h"
#include "kernels/cpu/ring.h"

// The order of things: four queues, events, graphs, and the choice of what runs next. It knows
// operations only as values that it hands to an executor.
//
// Nothing runs before it is waited for. Then, one at a time, the operation at the head of a
// runnable stream is executed until the awaited point is reached. Which stream is a matter of
// chance: they have a random ranking, the first runnable one goes on, and the ranking is drawn anew
// after a number of operations that depends on the seed: each, or some, or hundreds. So over many
// seeds every order occurs that stream order and events allow, among them fine interleavings and
// those in which a side stream lags for whole steps as long as nothing waits for it. Without a seed
// operations run in the order they were enqueued.
//
// An event names its latest *record*, a mark in one stream's queue; a wait keeps hold of the record
// that was the latest when it was called. Captured graphs have streams and records of their own. A
// launch is one entry of the compute stream: while it runs, the graph's streams are drawn among the
// others, and the compute stream goes on when all of the graph is done.
//
// Modelled time: each stream has a clock. An entry starts when its stream is free, when the records
// that the stream waited for are reached, and not before the host enqueued it (the instant at which
// its last wait ended). Time is a function of the entries alone, so it is the same for every seed.
// Streams do not slow each other down: an overlap is worth its full length.

namespace kvsweep::cpu {

// Runs an operation and says how long it takes in modelled time.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual double Execute(const Operation& operation) = 0;  // ns
};

class StreamScheduler {
 public:
  // `executor` must outlive this. No seed: in the order of enqueueing.
  StreamScheduler(Executor* executor, std::optional<uint64_t> seed);
  ~StreamScheduler();

  void Enqueue(const Operation& operation, Stream stream);

  // Part of a step that entries belong to from now on.
  void Enter(StepPart part) { part_ = part; }
  // Where to note when each operation runs, in modelled time or by the clock; nullptr: nowhere.
  void NoteTimes(std::vector<OperationTime>* times, bool modelled) {
    times_ = times;
    modelled_times_ = modelled;
  }

  // As in Backend.
  Event CreateEvent();
  void RecordEvent(Event event, Stream stream);
  void WaitEvent(Event event, Stream stream);
  void BeginCapture();
  absl::StatusOr<Graph> EndCapture();
  void Launch(Graph graph);
  void DestroyGraph(Graph graph);

  bool capturing() const { return capture_ != nullptr; }

  // Runs work until the event's latest record is reached, or until nothing is left.
  void RunUntil(Event event);
  void RunAll();
  // Runs work until the event's latest record is reached, without the host waiting: whether that lies
  // in its modelled past.
  bool Reached(Event event);
  // With a seed: whether chance lets an event that has not been reached wait for longer, as a busy
  // device would.
  bool Lags(Event event);

  // When the event's latest record was reached, in modelled time and by the clock. REQUIRES: it was.
  double ModelledNs(Event event) const { return ReachedRecord(event).time_ns; }
  double WallNs(Event event) const { return static_cast<double>(ReachedRecord(event).wall_ns); }

  // The modelled instant at which the host's last wait ended.
  double host_ns() const { return host_ns_; }

  // How often a queue or a table has had to allocate.
  int64_t growths() const;

 private:
  struct RecordEntry {
    int32_t record;
  };
  struct WaitEntry {
    int32_t record;
  };
  struct LaunchEntry {
    int32_t graph;
  };
  struct Entry {
    std::variant<Operation, RecordEntry, WaitEntry, LaunchEntry> what;
    int64_t sequence = 0;  // order of enqueueing over all streams
    double enqueued_ns = 0;
    StepPart part = StepPart::kNone;
  };

  // A mark in a stream's queue. Freed when its event has a later one and nothing waits for it any
  // more.
  struct Record {
    bool reached = false;
    double time_ns = 0;
    int64_t wall_ns = 0;
    int32_t references = 0;
  };

  struct CapturedGraph {
    std::array<std::vector<Entry>, kStreams> entries;
    int32_t records = 0;
    int32_t pending_launches = 0;
    // Of the launch that is running.
    std::array<size_t, kStreams> next = {};
    std::array<double, kStreams> clock_ns = {};
    std::vector<Record> record;
  };

  // What a capture must know to find streams that were never joined: for each stream, how many
  // entries of every stream come before its end by stream order and events.
  using Joined = std::array<size_t, kStreams>;
  struct Capture {
    std::unique_ptr<CapturedGraph> graph;
    std::array<Joined, kStreams> joined = {};
    std::vector<Joined> record_joined;
    std::vector<int32_t> event_record;  // by event; -1: not recorded in this capture
    absl::Status error;
  };

  // Something that could run next.
  struct Candidate {
    bool in_graph = false;
    int stream = 0;
    int64_t sequence = 0;
  };

  const Record& ReachedRecord(Event event) const;
  void Push(Entry entry, Stream stream);
  int32_t NewRecord();
  void Release(int32_t record);
  // Runs one entry of a runnable stream; false if there is none.
  bool RunOne();
  // Index of the candidate whose stream has the best rank.
  int Draw(std::span<const Candidate> candidates);
  void RunQueued(int stream);
  void RunGraphEntry(int stream);
  void FinishLaunch();
  // Executes an entry other than a launch against the records of its graph or of the streams.
  void RunEntry(const Entry& entry, int stream, std::vector<Record>& records, double& clock_ns);
  void Execute(const Entry& entry, int stream, double& clock_ns);
  bool Runnable(const Entry& entry, const std::vector<Record>& records) const;

  Executor* const executor_;
  std::optional<Random> random_;
  uint64_t ranking_lasts_ = 1;  // operations, in the mean
  std::array<int, 2 * kStreams> rank_ = {};  // of the streams, then of a running graph's
  std::array<Ring<Entry>, kStreams> queue_;
  std::array<double, kStreams> clock_ns_ = {};
  std::vector<Record> record_;
  std::vector<int32_t> free_records_;
  std::vector<int32_t> event_record_;  // by event: its latest record, -1 if none
  std::vector<std::unique_ptr<CapturedGraph>> graph_;
  CapturedGraph* running_ = nullptr;  // launched by the head of the compute stream
  int64_t running_sequence_ = 0;
  std::unique_ptr<Capture> capture_;
  int64_t next_sequence_ = 0;
  double host_ns_ = 0;
  int64_t table_growths_ = 0;
  StepPart part_ = StepPart::kNone;
  std::vector<OperationTime>* times_ = nullptr;
  bool modelled_times_ = false;
};

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_STREAM_SCHEDULER_H_
