// From the engine's thread to the wire: records go into a bounded queue, and a thread of the
// recorder packs them into frames. So what recording costs never sits inside a timed step, and a
// slow reader never makes the engine wait: a full queue refuses.
#ifndef KVSWEEP_WORKER_RUNNER_RECORDER_H_
#define KVSWEEP_WORKER_RUNNER_RECORDER_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "base/bounded_queue.h"
#include "base/limits.h"
#include "proto/runner.pb.h"

namespace kvsweep {

class Recorder {
 public:
  // Writes one frame; called by the recorder's thread alone. After an error nothing more is sent.
  using Send = std::function<absl::Status(const FromRunner& frame)>;

  // Starts the thread. `capacity` records wait at most.
  explicit Recorder(Send send, size_t capacity = static_cast<size_t>(limits::kRecorderRows));
  // Sends what is left, then stops.
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  // Takes a record without waiting. False: the queue is full, and the record is lost.
  [[nodiscard]] bool Offer(Record record);

  // Takes a record, waiting for room: for the few that frame a trial.
  void Put(Record record);

  // Where the trial stands; the latest is sent, at most every 100 ms.
  void SetProgress(Progress progress);

  // Returns when all records taken so far have been sent.
  void Flush();

  // All records of the trial have been taken: sends them, then TrialDone. Returns when they are
  // sent.
  void Finish(uint64_t trial_id);

 private:
  void Run();
  void SendRecords(RecordBatch batch);
  void SendProgress();
  void SendFrame(const FromRunner& frame);

  Send send_;
  BoundedQueue<Record> queue_;
  std::mutex mutex_;
  std::condition_variable sent_changed_;
  uint64_t taken_ = 0;                // records put into the queue
  uint64_t sent_ = 0;                 // of these, handed to send_
  std::optional<Progress> progress_;  // to be sent
  std::optional<uint64_t> finished_;  // trial whose TrialDone is to be sent
  int64_t progress_sent_ns_ = 0;      // the thread's own
  bool broken_ = false;               // the thread's own
  std::thread thread_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_RECORDER_H_
