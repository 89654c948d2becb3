#ifndef KVSWEEP_CLI_CONTROL_CLIENT_H_
#define KVSWEEP_CLI_CONTROL_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "base/ids.h"
#include "proto/control.pb.h"
#include "storage/query.h"

namespace grpc {
class Channel;
class ClientContext;
}  // namespace grpc

namespace kvsweep {

// People's side of control.proto, with plain values and statuses: the one file of the command line
// that includes gRPC. The channel leads to a coordinator far away or inside this process; commands
// do not know which. Calls wait for their answer, for two minutes at most (Watch: as long as it
// takes). Unavailable says where nobody answered and what to do.
//
// All functions may be called from many threads.
class ControlClient {
 public:
  // `address` is what the channel leads to, for messages.
  ControlClient(std::shared_ptr<grpc::Channel> channel, std::string address);
  ~ControlClient();

  // InvalidArgument for an address that may not be dialled. Does not wait for the connection.
  static absl::StatusOr<std::unique_ptr<ControlClient>> Dial(const std::string& address);

  absl::StatusOr<SubmitReply> Submit(const SubmitRequest& request);
  absl::Status UploadFile(const Digest& digest, absl::string_view content);

  // Calls `on_event` for each event until the experiment has finished (OK), Interrupt was called
  // (Cancelled) or the coordinator went away (Unavailable).
  absl::Status Watch(ExperimentId experiment,
                     const std::function<void(const WatchEvent&)>& on_event);

  // Ends the Watch that runs and every later one.
  void Interrupt();

  // How many rounds were cancelled.
  absl::StatusOr<uint64_t> Cancel(ExperimentId experiment);
  absl::StatusOr<Table> Workers();
  absl::StatusOr<Table> Query(absl::string_view sql, uint64_t row_limit);

 private:
  class Stub;
  absl::Status Annotated(absl::Status status) const;

  const std::unique_ptr<Stub> stub_;
  const std::string address_;
  std::mutex mutex_;
  bool interrupted_ = false;              // guarded by mutex_
  grpc::ClientContext* watch_ = nullptr;  // guarded by mutex_
};

// The store of a coordinator far away. The client must outlive it.
std::unique_ptr<TableSource> NewRemoteSource(ControlClient& client);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_CONTROL_CLIENT_H_
