#include "worker/runner/recorder.h"

#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"

namespace kvsweep {
namespace {

constexpr int64_t kProgressIntervalNs = 100 * kNsPerMs;
constexpr int64_t kRoomPauseNs = kNsPerMs;

// Bytes after which a frame is closed; far below limits::kFrameBytes.
constexpr size_t kBatchBytes = size_t{1} << 19;

}  // namespace

Recorder::Recorder(Send send, size_t capacity)
    : send_(std::move(send)), queue_(capacity), thread_([this] { Run(); }) {}

Recorder::~Recorder() {
  queue_.Close();
  thread_.join();
}

bool Recorder::Offer(Record record) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!queue_.TryPush(std::move(record))) return false;
  ++taken_;
  return true;
}

void Recorder::Put(Record record) {
  while (!Offer(record)) {
    RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + kRoomPauseNs);
  }
}

void Recorder::SetProgress(Progress progress) {
  const std::lock_guard<std::mutex> lock(mutex_);
  progress_ = std::move(progress);
}

void Recorder::Flush() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t taken = taken_;
  sent_changed_.wait(lock, [&] { return sent_ >= taken; });
}

void Recorder::Finish(uint64_t trial_id) {
  Flush();
  std::unique_lock<std::mutex> lock(mutex_);
  KVSWEEP_CHECK_EQ(sent_, taken_) << "records after the end of trial " << trial_id;
  finished_ = trial_id;
  sent_changed_.wait(lock, [&] { return !finished_.has_value(); });
}

void Recorder::Run() {
  Clock& clock = RealClock::Get();
  while (true) {
    std::vector<Record> records = queue_.PopBatch(clock, clock.NowNs() + kProgressIntervalNs / 4,
                                                  static_cast<size_t>(limits::kBatchRows));
    if (records.empty() && queue_.closed() && queue_.size() == 0) return;
    RecordBatch batch;
    size_t bytes = 0;
    for (Record& record : records) {
      const size_t record_bytes = record.ByteSizeLong();
      if (bytes + record_bytes > kBatchBytes) SendRecords(std::exchange(batch, {}));
      bytes = batch.records_size() == 0 ? record_bytes : bytes + record_bytes;
      *batch.add_records() = std::move(record);
    }
    SendRecords(std::move(batch));
    SendProgress();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!finished_.has_value() || sent_ < taken_) continue;
    FromRunner frame;
    frame.mutable_done()->set_trial_id(*finished_);
    SendFrame(frame);
    finished_.reset();
    sent_changed_.notify_all();
  }
}

void Recorder::SendRecords(RecordBatch batch) {
  const int count = batch.records_size();
  if (count == 0) return;
  FromRunner frame;
  *frame.mutable_records() = std::move(batch);
  SendFrame(frame);
  const std::lock_guard<std::mutex> lock(mutex_);
  sent_ += static_cast<uint64_t>(count);
  sent_changed_.notify_all();
}

void Recorder::SendProgress() {
  const int64_t now_ns = RealClock::Get().NowNs();
  FromRunner frame;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!progress_.has_value() || now_ns - progress_sent_ns_ < kProgressIntervalNs) return;
    *frame.mutable_progress() = *std::exchange(progress_, std::nullopt);
  }
  progress_sent_ns_ = now_ns;
  SendFrame(frame);
}

void Recorder::SendFrame(const FromRunner& frame) {
  if (broken_) return;
  const absl::Status status = send_(frame);
  if (status.ok()) return;
  broken_ = true;
  LogError("nobody takes the records: ", status.ToString());
}

}  // namespace kvsweep
