#ifndef KVSWEEP_COORDINATOR_DISPATCHER_H_
#define KVSWEEP_COORDINATOR_DISPATCHER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/bounded_queue.h"
#include "base/clock.h"
#include "base/limits.h"
#include "coordinator/scheduler.h"
#include "coordinator/submission.h"
#include "proto/control.pb.h"
#include "proto/worker.pb.h"
#include "storage/query.h"
#include "storage/store.h"

// The executor of the scheduler: one thread that turns what happened into rows, makes them durable,
// and only then answers. It knows neither gRPC nor sockets; those stand behind the three links.
//
// A turn: take all events that wait (at most kEventsPerTurn); feed the scheduler; commit the plan's
// rows, then the measurements that arrived, as ONE transaction; then send wishes, acknowledgements
// and answers; feed what the store decided (accepted, void) to the scheduler. The plan's rows go
// first, so that an attempt taken back in this turn refuses rows that arrived in it.
//
// A failed commit ends the process: nothing that was acknowledged can be missing from the file, and
// starting again from it is the path that tests walk all the time.

namespace kvsweep {

// The dispatcher's end of a worker's Synchronize stream. All functions are called by the
// dispatcher's thread and must not wait.
class WorkerLink {
 public:
  virtual ~WorkerLink() = default;
  virtual void Tell(DesiredState desired) = 0;  // replaces one that has not been sent yet
  virtual void ReadOn() = 0;                    // the last state is dealt with: read the next
  virtual void Close(const absl::Status& status) = 0;  // the last call
};

// Of a Report stream: each batch is answered once, in any order, which lets the next be read.
class ReportLink {
 public:
  virtual ~ReportLink() = default;
  virtual void Reply(ReportReply reply) = 0;
  virtual void Close(const absl::Status& status) = 0;
};

// Of a Watch call.
class WatchLink {
 public:
  virtual ~WatchLink() = default;
  virtual bool Ready() = 0;  // the last event has been sent; false also after the watcher has left
  virtual bool Gone() = 0;   // the watcher has left
  virtual void Send(WatchEvent event) = 0;
  virtual void Close(const absl::Status& status) = 0;
};

struct DispatcherOptions {
  SchedulerOptions scheduler;
  uint64_t queued_trials = limits::kQueuedTrials;  // not done, of all experiments together
  bool check_invariants = false;                   // after every turn; for tests
};

class Dispatcher {
 public:
  template <typename T>
  using Done = absl::AnyInvocable<void(T)>;

  // Reads what is unfinished from the store and starts the thread. `store` and `clock` must outlive
  // the dispatcher.
  static absl::StatusOr<std::unique_ptr<Dispatcher>> Start(const DispatcherOptions& options,
                                                           Store& store, Clock& clock);

  ~Dispatcher();

  // Ends the thread, after what was posted before. Idempotent.
  void Stop();

  // ---- from any thread; none waits ----
  // Each returns false, and drops its arguments, if the queue is full or the dispatcher is
  // stopping: answer kUnavailable. `done` is called on the dispatcher's thread, once what it
  // reports is durable.

  bool OnState(std::shared_ptr<WorkerLink> link, WorkerReport report, uint64_t generation);
  bool OnLinkEnded(std::shared_ptr<WorkerLink> link);
  bool OnBatch(std::shared_ptr<ReportLink> link, ReportBatch batch);

  bool Submit(Submission submission, Done<absl::StatusOr<SubmitReply>> done);
  bool PutFile(struct PutFile file, Done<absl::Status> done);
  bool Cancel(ExperimentId experiment, Done<uint64_t> done);
  bool Drain(WorkerId worker, bool draining, Done<bool> done);
  bool Workers(Done<Table> done);

  // Which builds and device classes stored rounds may come from to answer what is submitted now.
  bool Reuse(Done<ReuseRules> done);

  // Sends events until the experiment has finished or the watcher leaves. NotFound closes the link
  // if the experiment has no unfinished round in this life.
  bool Watch(std::shared_ptr<WatchLink> link, ExperimentId experiment);

  // Closes all links and takes no new ones.
  bool CloseLinks(Done<absl::Status> done);

 private:
  using Event = absl::AnyInvocable<void()>;

  struct Write {
    Operation operation;
    absl::AnyInvocable<void(const OperationResult&)> then;
  };

  // A live attempt, as the dispatcher needs it.
  struct LiveRound {
    ExperimentId experiment;
    std::string spec;                      // serialised RoundSpec
    std::map<TrialId, std::string> names;  // arm and cell, for people
    int64_t granted_ns = 0;                // 0: before this life
  };

  struct LinkedWorker {
    std::shared_ptr<WorkerLink> link;
    uint64_t incarnation = 0;
    uint64_t generation = 0;  // last heard
    bool unanswered = false;
  };

  struct Watcher {
    std::shared_ptr<WatchLink> link;
    ExperimentId experiment;
    std::deque<std::string> messages;
    uint64_t dropped_messages = 0;
    bool dirty = true;
    int64_t sent_ns = 0;
  };

  // Lengths of accepted rounds, for the time that is left.
  struct Pace {
    int64_t total_ns = 0;
    int64_t rounds = 0;
  };

  Dispatcher(const DispatcherOptions& options, Store& store, Clock& clock,
             std::unique_ptr<StoreReader> reader, Attempt next_attempt);

  absl::Status Recover(const Queue& queue);
  bool Post(Event event);
  void Run();
  void Turn();
  void LeaveOutStall(int64_t turn_ns, int64_t listening_ns, int64_t wake_ns);
  void Commit(const SchedulerPlan& plan);
  void FollowLeases(const SchedulerPlan& plan);
  void Tell(const SchedulerPlan& plan);
  void TellWorker(const WorkerWish& wish);

  void TakeState(std::shared_ptr<WorkerLink> link, WorkerReport report, uint64_t generation);
  bool AdoptLink(const std::shared_ptr<WorkerLink>& link, const WorkerReport& report);
  void TakeBatch(std::shared_ptr<ReportLink> link, ReportBatch batch);
  void AcceptIfFinished(Attempt attempt);
  void RoundAccepted(Attempt attempt);
  void RoundTakenBack(Attempt attempt, const std::string& reason);
  absl::Status CheckRoom(const Submission& submission);
  void Enqueue(const SubmitResult& submitted, std::vector<RoundRequirement> requirements);

  LiveRound& Live(Attempt attempt, RoundId round);
  void UpdateWatchers(const SchedulerPlan& plan);
  WatchEvent EventFor(Watcher& watcher);
  int64_t WatchDueNs(const Watcher& watcher) const;

  [[noreturn]] void EndProcess(const absl::Status& status) const;

  const DispatcherOptions options_;
  Store& store_;
  Clock& clock_;
  const std::unique_ptr<StoreReader> reader_;
  BoundedQueue<Event> events_;

  // The rest belongs to the thread.
  Scheduler scheduler_;
  uint64_t coordinator_incarnation_ = 0;
  int64_t now_ns_ = 0;
  int64_t wake_ns_ = 0;
  bool closing_ = false;
  std::vector<Write> first_;    // before the plan's rows
  std::vector<Write> later_;    // after them
  std::vector<Event> answers_;  // once the plan's rows are durable
  std::map<WorkerId, LinkedWorker> workers_;
  std::map<Attempt, LiveRound> live_;
  std::vector<Watcher> watchers_;
  std::map<ExperimentId, Pace> paces_;
  uint64_t arriving_trials_ = 0;  // of submissions in later_

  std::thread thread_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_DISPATCHER_H_
