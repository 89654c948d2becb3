#include "worker/frames.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/limits.h"
#include "base/random.h"
#include "proto/runner.pb.h"

namespace kvsweep {
namespace {

class FramesTest : public testing::Test {
 protected:
  FramesTest() { KVSWEEP_CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends_), 0); }
  ~FramesTest() override {
    Close(0);
    Close(1);
  }
  void Close(int end) {
    if (ends_[end] >= 0) close(ends_[end]);
    ends_[end] = -1;
  }
  void WriteRaw(const std::string& bytes) {
    ASSERT_EQ(send(ends_[0], bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  }
  static FromRunner ProgressFrame(uint64_t done, const std::string& phase) {
    FromRunner frame;
    frame.mutable_progress()->set_done(done);
    frame.mutable_progress()->set_phase(phase);
    return frame;
  }

  int ends_[2];
};

TEST_F(FramesTest, FramesArriveWholeAndInOrder) {
  FrameReader reader(ends_[1]);
  FromRunner frame;
  EXPECT_EQ(*reader.TryRead(&frame), FrameReader::Result::kWait);
  ASSERT_TRUE(WriteFrame(ends_[0], ProgressFrame(1, "load")).ok());
  ASSERT_TRUE(WriteFrame(ends_[0], FromRunner()).ok());  // an empty body is a frame
  ASSERT_TRUE(WriteFrame(ends_[0], ProgressFrame(2, "measure")).ok());
  Close(0);
  ASSERT_EQ(*reader.Read(&frame), FrameReader::Result::kFrame);
  EXPECT_EQ(frame.progress().phase(), "load");
  ASSERT_EQ(*reader.Read(&frame), FrameReader::Result::kFrame);
  EXPECT_EQ(frame.body_case(), FromRunner::BODY_NOT_SET);
  ASSERT_EQ(*reader.TryRead(&frame), FrameReader::Result::kFrame);
  EXPECT_EQ(frame.progress().done(), 2u);
  EXPECT_EQ(*reader.Read(&frame), FrameReader::Result::kEnd);
}

// More than a socket buffer holds, so that writes and reads are partial, on a blocking and a
// non-blocking socket.
TEST_F(FramesTest, LargeFramesPassInPieces) {
  for (const bool blocking : {true, false}) {
    if (!blocking) fcntl(ends_[0], F_SETFL, O_NONBLOCK);
    const FromRunner large = ProgressFrame(7, std::string(5'000'000, 'x'));
    std::thread writer([&] { EXPECT_TRUE(WriteFrame(ends_[0], large).ok()); });
    FrameReader reader(ends_[1]);
    FromRunner frame;
    EXPECT_EQ(*reader.Read(&frame), FrameReader::Result::kFrame);
    EXPECT_EQ(frame.progress().phase().size(), 5'000'000u);
    writer.join();
  }
}

TEST_F(FramesTest, BytesOneByOneMakeTheSameFrames) {
  std::string body;
  ASSERT_TRUE(ProgressFrame(3, "drain").SerializeToString(&body));
  const std::string bytes =
      std::string(1, static_cast<char>(body.size())) + std::string(3, '\0') + body;
  FrameReader reader(ends_[1]);
  FromRunner frame;
  for (size_t i = 0; i < bytes.size(); ++i) {
    EXPECT_EQ(*reader.TryRead(&frame), FrameReader::Result::kWait);
    WriteRaw(bytes.substr(i, 1));
  }
  ASSERT_EQ(*reader.TryRead(&frame), FrameReader::Result::kFrame);
  EXPECT_EQ(frame.progress().phase(), "drain");
}

TEST_F(FramesTest, ALengthBeyondTheLimitIsRefusedBeforeItIsRead) {
  WriteRaw("\xff\xff\xff\xff");
  FromRunner frame;
  const absl::Status status = FrameReader(ends_[1]).Read(&frame).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            absl::StrCat("a frame of 4294967295 bytes; at most ", limits::kFrameBytes));
}

TEST_F(FramesTest, TooLargeAMessageIsNotSent) {
  const FromRunner large = ProgressFrame(7, std::string(limits::kFrameBytes, 'x'));
  EXPECT_EQ(WriteFrame(ends_[0], large).code(), absl::StatusCode::kInvalidArgument);
  FromRunner frame;
  EXPECT_EQ(*FrameReader(ends_[1]).TryRead(&frame), FrameReader::Result::kWait);
}

TEST_F(FramesTest, AnEndInsideAFrameIsDataLoss) {
  WriteRaw(std::string("\x05\0\0\0ab", 6));
  Close(0);
  FromRunner frame;
  const absl::Status status = FrameReader(ends_[1]).Read(&frame).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(status.message(), "the stream ended inside a frame, after 2 of 5 bytes");
}

TEST_F(FramesTest, AFrameThatIsNoMessageIsRefused) {
  WriteRaw(std::string("\x02\0\0\0\xff\xff", 6));
  FromRunner frame;
  EXPECT_EQ(FrameReader(ends_[1]).Read(&frame).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(FramesTest, APeerThatHasGoneIsAnErrorAndNoSignal) {
  Close(1);
  EXPECT_FALSE(WriteFrame(ends_[0], ProgressFrame(1, "load")).ok());
}

TEST_F(FramesTest, APeerThatDoesNotReadExhaustsPatience) {
  const FromRunner large = ProgressFrame(7, std::string(5'000'000, 'x'));
  EXPECT_EQ(WriteFrame(ends_[0], large, 1).code(), absl::StatusCode::kDeadlineExceeded);
}

// Whatever bytes come, reading ends in frames, a wait or an error, and never asks for more than the
// limit.
TEST_F(FramesTest, RandomBytesNeverCrashTheReader) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    std::string bytes(random.Uniform(200), '\0');
    for (char& byte : bytes)
      byte = static_cast<char>(random.Bernoulli(0.5) ? random.Uniform(4) : random.Next64());
    ASSERT_EQ(write(ends[0], bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
    FrameReader reader(ends[1]);
    FromRunner frame;
    size_t frames = 0;
    while (true) {
      const absl::StatusOr<FrameReader::Result> result = reader.TryRead(&frame);
      if (!result.ok() || *result != FrameReader::Result::kFrame) break;
      ++frames;
    }
    EXPECT_LE(frames, bytes.size() / 4);
    close(ends[0]);
    close(ends[1]);
  }
}

}  // namespace
}  // namespace kvsweep
