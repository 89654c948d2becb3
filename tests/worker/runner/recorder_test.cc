#include "worker/runner/recorder.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <vector>

namespace kvsweep {
namespace {

Record Numbered(uint64_t number) {
  Record record;
  record.set_trial_id(7);
  record.mutable_counter()->set_value(static_cast<double>(number));
  return record;
}

// A wire that keeps what it is sent, and can be held shut.
class Wire {
 public:
  Recorder::Send send() {
    return [this](const FromRunner& frame) {
      std::unique_lock<std::mutex> lock(mutex_);
      opened_.wait(lock, [this] { return open_; });
      frames_.push_back(frame);
      return status_;
    };
  }
  void Open(bool open) {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = open;
    opened_.notify_all();
  }
  void Break() {
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = absl::UnavailableError("gone");
  }
  std::vector<FromRunner> frames() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return frames_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = true;
  absl::Status status_;
  std::vector<FromRunner> frames_;
};

TEST(RecorderTest, SendsRecordsInOrderAndDoneLast) {
  Wire wire;
  {
    Recorder recorder(wire.send());
    for (uint64_t i = 0; i < 1000; ++i) ASSERT_TRUE(recorder.Offer(Numbered(i)));
    recorder.Finish(7);
  }
  const std::vector<FromRunner> frames = wire.frames();
  uint64_t next = 0;
  for (const FromRunner& frame : frames) {
    EXPECT_LE(frame.records().records_size(), limits::kBatchRows);
    for (const Record& record : frame.records().records()) {
      EXPECT_EQ(record.counter().value(), static_cast<double>(next++));
    }
  }
  EXPECT_EQ(next, 1000u);
  ASSERT_TRUE(frames.back().has_done());
  EXPECT_EQ(frames.back().done().trial_id(), 7u);
}

TEST(RecorderTest, AFullQueueRefusesInsteadOfWaiting) {
  Wire wire;
  wire.Open(false);
  Recorder recorder(wire.send(), 8);
  int taken = 0;
  // One batch of up to 8 may already be in the sender's hands.
  for (uint64_t i = 0; i < 100; ++i) taken += recorder.Offer(Numbered(i));
  EXPECT_GE(taken, 8);
  EXPECT_LE(taken, 16);
  wire.Open(true);
  recorder.Put(Numbered(100));
  recorder.Finish(7);
  int sent = 0;
  for (const FromRunner& frame : wire.frames()) sent += frame.records().records_size();
  EXPECT_EQ(sent, taken + 1);
}

TEST(RecorderTest, OnlyTheLatestProgressIsSent) {
  Wire wire;
  {
    Recorder recorder(wire.send());
    for (uint64_t i = 0; i < 1000; ++i) {
      Progress progress;
      progress.set_done(i);
      recorder.SetProgress(progress);
    }
    recorder.Finish(1);
  }
  int progress_frames = 0;
  for (const FromRunner& frame : wire.frames()) progress_frames += frame.has_progress();
  EXPECT_LE(progress_frames, 2);
}

TEST(RecorderTest, ABrokenWireEndsQuietly) {
  Wire wire;
  wire.Break();
  Recorder recorder(wire.send());
  recorder.Put(Numbered(1));
  recorder.Finish(7);
  const size_t frames = wire.frames().size();
  EXPECT_EQ(frames, 1u) << "nothing is sent after an error";
}

}  // namespace
}  // namespace kvsweep
