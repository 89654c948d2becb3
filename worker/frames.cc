#include "worker/frames.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "base/limits.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr size_t kLengthBytes = 4;

// Waits until the socket is ready for `events` or broken. False: patience ran out.
absl::StatusOr<bool> WaitFor(int socket, short events, int patience_ms) {
  pollfd descriptor = {.fd = socket, .events = events, .revents = 0};
  while (true) {
    const int ready = poll(&descriptor, 1, patience_ms);
    if (ready > 0) return true;
    if (ready == 0) return false;
    if (errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
  }
}

uint32_t DecodeLength(const std::string& bytes) {
  uint32_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | static_cast<uint8_t>(bytes[i]);
  return length;
}

}  // namespace

absl::Status WriteFrame(int socket, const google::protobuf::MessageLite& message, int patience_ms) {
  const size_t length = message.ByteSizeLong();
  if (length > static_cast<size_t>(limits::kFrameBytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a frame of ", length, " bytes; at most ", limits::kFrameBytes));
  }
  std::string frame;
  frame.reserve(kLengthBytes + length);
  for (size_t i = 0; i < kLengthBytes; ++i) frame.push_back(static_cast<char>(length >> (8 * i)));
  if (!message.AppendToString(&frame)) return absl::InternalError("a message does not serialise");

  size_t written = 0;
  while (written < frame.size()) {
    const ssize_t count =
        send(socket, frame.data() + written, frame.size() - written, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count >= 0) {
      written += static_cast<size_t>(count);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      ASSIGN_OR_RETURN(const bool ready, WaitFor(socket, POLLOUT, patience_ms));
      if (!ready) {
        return absl::DeadlineExceededError(
            absl::StrCat("the other side has read nothing for ", patience_ms, " ms"));
      }
    } else if (errno != EINTR) {
      return absl::ErrnoToStatus(errno, "cannot write a frame");
    }
  }
  return absl::OkStatus();
}

// Completes buffer_: kFrame when all its bytes are there.
absl::StatusOr<FrameReader::Result> FrameReader::Fill() {
  while (filled_ < buffer_.size()) {
    const ssize_t count =
        recv(socket_, buffer_.data() + filled_, buffer_.size() - filled_, MSG_DONTWAIT);
    if (count > 0) {
      filled_ += static_cast<size_t>(count);
    } else if (count == 0 || errno == ECONNRESET) {
      if (!in_body_ && filled_ == 0) return Result::kEnd;
      return absl::DataLossError(absl::StrCat("the stream ended inside a frame, after ", filled_,
                                              " of ", buffer_.size(), " bytes"));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return Result::kWait;
    } else if (errno != EINTR) {
      return absl::ErrnoToStatus(errno, "cannot read a frame");
    }
  }
  return Result::kFrame;
}

absl::StatusOr<FrameReader::Result> FrameReader::Read(google::protobuf::MessageLite* message) {
  while (true) {
    ASSIGN_OR_RETURN(const Result result, TryRead(message));
    if (result != Result::kWait) return result;
    RETURN_IF_ERROR(WaitFor(socket_, POLLIN, -1).status());
  }
}

absl::StatusOr<FrameReader::Result> FrameReader::TryRead(google::protobuf::MessageLite* message) {
  if (!in_body_) {
    buffer_.resize(kLengthBytes);
    ASSIGN_OR_RETURN(const Result result, Fill());
    if (result != Result::kFrame) return result;
    const uint32_t length = DecodeLength(buffer_);
    if (length > static_cast<uint64_t>(limits::kFrameBytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a frame of ", length, " bytes; at most ", limits::kFrameBytes));
    }
    in_body_ = true;
    filled_ = 0;
    buffer_.resize(length);
  }
  ASSIGN_OR_RETURN(const Result result, Fill());
  if (result != Result::kFrame) return result;
  in_body_ = false;
  filled_ = 0;
  if (!message->ParseFromString(buffer_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a frame of ", buffer_.size(), " bytes is not the expected message"));
  }
  return Result::kFrame;
}

}  // namespace kvsweep
