#ifndef KVSWEEP_WORKER_FRAMES_H_
#define KVSWEEP_WORKER_FRAMES_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "google/protobuf/message_lite.h"

// The wire between worker and runner: over a stream socket, each message preceded by its length as
// 4 bytes, little endian. A frame holds at most limits::kFrameBytes, checked before anything is
// allocated for it.

namespace kvsweep {

// Descriptor on which a runner finds its end of the socket pair (told to it as `--fd 3`).
inline constexpr int kRunnerSocket = 3;

// Writes one frame, whole. Works on blocking and non-blocking sockets; a peer that has gone is an
// error, never a signal. DeadlineExceeded when the peer reads nothing for `patience_ms` (-1: wait
// for ever): the stream is then broken in the middle of a frame. Only one thread may write at a
// time.
absl::Status WriteFrame(int socket, const google::protobuf::MessageLite& message,
                        int patience_ms = -1);

// Reads frames from a socket that it does not own. One thread at a time.
class FrameReader {
 public:
  enum class Result {
    kFrame,  // *message holds the next one
    kWait,   // no whole frame has arrived yet
    kEnd,    // the peer closed the stream between two frames
  };

  explicit FrameReader(int socket) : socket_(socket) {}

  // Waits for a whole frame; never returns kWait.
  absl::StatusOr<Result> Read(google::protobuf::MessageLite* message);

  // Takes what has arrived, without waiting; call it until it says kWait.
  absl::StatusOr<Result> TryRead(google::protobuf::MessageLite* message);

  // Both: InvalidArgument for a length beyond the limit or a frame that does not parse, DataLoss
  // when the stream ends inside a frame, the system's error otherwise. After an error the stream
  // cannot be read on.

 private:
  absl::StatusOr<Result> Fill();

  const int socket_;
  std::string buffer_;    // of the part (length or body) that is arriving
  size_t filled_ = 0;     // bytes of it that have arrived
  bool in_body_ = false;  // buffer_ is a body
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_FRAMES_H_
