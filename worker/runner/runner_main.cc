// kvsweep-runner: runs trials on one slot's devices for the worker that started it, frames over the
// socket that --fd names. Or, for people, one trial from a text file, records to stdout.

#include <fcntl.h>
#include <google/protobuf/text_format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bounded_queue.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "experiments/matrix.h"
#include "kernels/cost.h"
#include "kernels/cpu/cpu_backend.h"
#include "proto/runner.pb.h"
#include "worker/frames.h"
#include "worker/runner/device_backend.h"
#include "worker/runner/generate.h"
#include "worker/runner/input_cache.h"
#include "worker/runner/node.h"
#include "worker/runner/recorder.h"
#include "worker/runner/trial.h"
#include "worker/runner/warm_device.h"

namespace kvsweep {
namespace {

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options) {
  CpuBackendOptions cpu{.threads = options.threads,
                        .batch_invariant = options.batch_invariant,
                        .shuffle_streams = options.stream_seed != 0,
                        .stream_seed = options.stream_seed,
                        .costs_alone = options.costs_alone};
  if (!options.profile.empty()) {
    ASSIGN_OR_RETURN(cpu.modelled, FindDeviceProfile(options.profile));
  }
  return CreateCpuBackend(cpu);
}

// Modelled time is the CPU backend's, whatever the machine has.
BackendFactory FactoryOf(const std::string& backend, int device, const std::string& dtype) {
  if (backend == "cpu") return MakeCpuBackend;
  const DType type = dtype == "f32" ? DType::kF32 : DType::kBf16;
  return [device, type](const BackendOptions& options) {
    return options.profile.empty() ? MakeDeviceBackend(device, type, options)
                                   : MakeCpuBackend(options);
  };
}

// For kvsweep-worker, which chooses a runner by the exit code and shows the line.
int PrintProbe(int device) {
  absl::Status status = ProbeDevice(device);
  if (status.ok()) {
    const absl::StatusOr<std::unique_ptr<Backend>> backend =
        MakeDeviceBackend(device, DType::kBf16, {});
    status = backend.status();
    if (status.ok()) {
      std::cout << (*backend)->info().device << ", " << (*backend)->info().driver << std::endl;
    }
  }
  if (!status.ok()) std::cout << status.message() << std::endl;
  return status.ok() ? 0 : 1;
}

FromRunner MakeHello(const BackendInfo& info, const Node& node) {
  FromRunner frame;
  RunnerHello* hello = frame.mutable_hello();
  hello->set_backend(info.backend);
  hello->set_device(info.device);
  hello->set_device_class(info.device_class);
  hello->set_device_memory_bytes(info.device_memory_bytes);
  hello->set_runner_build(GetBuildInfo().runner_digest);
  hello->set_method_version(kMethodVersion);
  for (const auto& [name, value] : node.Facts()) (*hello->mutable_facts())[name] = value;
  return frame;
}

// The worker's side of the socket: trials to run, and which of them to give up. Its thread ends the
// process when the worker has gone, whatever the engine is doing.
class Inbox {
 public:
  explicit Inbox(int fd) : reader_(fd), trials_(kTrials), thread_([this] { Run(); }) {}
  // REQUIRES: Next has returned nullopt; the thread has then ended by itself.
  ~Inbox() { thread_.join(); }

  // The next trial; nullopt after Shutdown.
  std::optional<RunTrial> Next() { return trials_.Pop(RealClock::Get(), kNeverNs); }

  // Set while the trial that runs is to be given up.
  const std::atomic<bool>* cancel() const { return &cancel_; }

  // Around each trial, so that a cancel reaches the right one.
  void Begin(uint64_t trial_id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = trial_id;
    cancel_ = stopping_ || cancelled_ == trial_id;
  }

 private:
  // The worker sends a trial when the one before is done.
  static constexpr size_t kTrials = 16;

  void Run() {
    ToRunner frame;
    while (true) {
      const absl::StatusOr<FrameReader::Result> result = reader_.Read(&frame);
      if (!result.ok()) {
        LogError("reading from the worker: ", result.status().ToString());
        std::_Exit(1);
      }
      if (*result == FrameReader::Result::kEnd) std::_Exit(0);
      const bool last = frame.has_shutdown();
      Take(std::move(frame));
      if (last) return;
    }
  }

  void Take(ToRunner frame) {
    switch (frame.body_case()) {
      case ToRunner::kRun: {
        // A cancel that came before was for an earlier execution: a round that was taken away may
        // come back, with the same trials.
        const std::lock_guard<std::mutex> lock(mutex_);
        if (cancelled_ == frame.run().trial_id()) cancelled_.reset();
        if (!trials_.TryPush(std::move(*frame.mutable_run()))) {
          LogError("more trials than one at a time");
          std::_Exit(1);
        }
        break;
      }
      case ToRunner::kCancel: {
        const std::lock_guard<std::mutex> lock(mutex_);
        cancelled_ = frame.cancel().trial_id();
        if (running_ == cancelled_) cancel_ = true;
        break;
      }
      case ToRunner::kShutdown: {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        cancel_ = true;
        trials_.Close();
        break;
      }
      case ToRunner::BODY_NOT_SET:
        break;
    }
  }

  FrameReader reader_;
  BoundedQueue<RunTrial> trials_;
  std::mutex mutex_;
  std::optional<uint64_t> running_;
  std::optional<uint64_t> cancelled_;
  bool stopping_ = false;
  std::atomic<bool> cancel_ = false;
  std::thread thread_;
};

void RunOne(const RunTrial& request, const TrialContext& context) {
  LogInfo("trial ", request.trial_id(), ": ", request.spec().arm().name());
  Trial(request, context).Run();
  context.recorder->Finish(request.trial_id());
}

// Serves the worker until it says so or goes away.
absl::Status ServeWorker(int fd, WarmDevice* device, Node* node) {
  // A backend before the first trial tells who we are.
  ASSIGN_OR_RETURN(const Backend* backend, device->UseBackend(device->OptionsOf(Engine())));
  const BackendInfo info = backend->info();
  node->Update(info);
  RETURN_IF_ERROR(WriteFrame(fd, MakeHello(info, *node)));
  InputCache inputs;
  KnownReference reference;
  Recorder recorder([fd](const FromRunner& frame) { return WriteFrame(fd, frame); });
  Inbox inbox(fd);
  while (const std::optional<RunTrial> request = inbox.Next()) {
    inbox.Begin(request->trial_id());
    node->Update(info);
    RunOne(*request, {.device = device,
                      .inputs = &inputs,
                      .reference = &reference,
                      .recorder = &recorder,
                      .cancel = inbox.cancel(),
                      .node = node,
                      .slot_device_class = info.device_class});
    // The trial has its outcome, and the worker starts another process. Nothing here can be taken
    // down in order: the inbox waits for the worker, and memory cannot be freed.
    if (const absl::Status lost = device->CheckDevice(); !lost.ok()) {
      LogError(lost.message());
      std::_Exit(1);
    }
  }
  return absl::OkStatus();
}

// Runs the RunTrial in a text file and prints each frame.
absl::Status RunFile(const std::string& path, WarmDevice* device, Node* node) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limits::kMessageBytes));
  RunTrial request;
  if (!google::protobuf::TextFormat::ParseFromString(text, &request)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not a RunTrial in protobuf text format"));
  }
  InputCache inputs;
  KnownReference reference;
  Recorder recorder([](const FromRunner& frame) {
    std::cout << frame.DebugString() << std::flush;
    return absl::OkStatus();
  });
  ASSIGN_OR_RETURN(const Backend* backend,
                   device->UseBackend(device->OptionsOf(request.spec().engine())));
  node->Update(backend->info());
  const std::atomic<bool> never = false;
  RunOne(request, {.device = device,
                   .inputs = &inputs,
                   .reference = &reference,
                   .recorder = &recorder,
                   .cancel = &never,
                   .node = node});
  return absl::OkStatus();
}

// Answers the GenerateRequest in a file; a request that cannot be carried out is answered too.
absl::Status AnswerGenerate(const std::string& path, WarmDevice* device) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path, limits::kFrameBytes));
  GenerateRequest request;
  if (!request.ParseFromString(bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a GenerateRequest"));
  }
  absl::StatusOr<GenerateReply> reply = Generate(request, device);
  if (!reply.ok()) {
    const absl::Status status = reply.status();
    reply = GenerateReply();
    reply->set_status_code(static_cast<uint32_t>(status.code()));
    reply->set_status_message(std::string(status.message()));
  }
  return WriteFileAtomic(absl::StrCat(path, ".reply"), reply->SerializeAsString());
}

int Main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  int fd = -1;
  int threads = 0;
  std::string backend = "auto";
  std::string dtype = "bf16";
  int device = 0;
  bool probe = false;
  std::string cache;
  std::string trial;
  std::string generate_path;
  std::string log_level = "warning";
  CLI::App app("Runs trials on one slot's devices; started by kvsweep-worker.", "kvsweep-runner");
  app.set_version_flag("--version",
                       absl::StrCat(GetBuildInfo().version, " ", GetBuildInfo().commit));
  auto* socket = app.add_option("--fd", fd, "Descriptor of the worker's socket");
  auto* file = app.add_option("--trial", trial,
                              "Run the RunTrial of this text file instead, records to stdout");
  auto* generate = app.add_option("--generate", generate_path,
                                  "Answer the GenerateRequest of this file in FILE.reply instead; "
                                  "`kvsweep generate` writes it");
  app.add_option("--backend", backend, "Where to compute; auto takes what this program has")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_option("--device", device, "Number of the CUDA device")->check(CLI::Range(0, 63));
  app.add_option("--dtype", dtype, "Format of weights and activations on a CUDA device")
      ->check(CLI::IsMember({"bf16", "f32"}));
  app.add_flag("--probe", probe, "Say whether there is a device, and end");
  app.add_option("--cache", cache,
                 "Folder where the node's preflight is kept between starts; by default it is not");
  app.add_option("--threads", threads, "Threads of the CPU backend; 0: one for each core")
      ->check(CLI::Range(0, 1024));
  app.add_option("--log-level", log_level, "debug, info, warning, error or off");
  socket->excludes(file)->excludes(generate);
  file->excludes(generate);
  app.footer("Example: kvsweep-runner --trial trial.textproto");
  CLI11_PARSE(app, argc, argv);

  const absl::StatusOr<LogLevel> level = ParseLogLevel(log_level);
  SetLog("kvsweep-runner", level.value_or(LogLevel::kWarning));
  absl::Status status = level.status();
  if (status.ok() && probe) return PrintProbe(device);
  if (status.ok() && backend != "cpu") {
    const absl::Status found = ProbeDevice(device);
    if (backend == "cuda") status = Annotate(found, "--backend cuda");
    if (!found.ok()) LogInfo("computing on the CPU: ", found.message());
    backend = found.ok() ? "cuda" : "cpu";
  }
  if (status.ok() && fd < 0 && trial.empty() && generate_path.empty()) {
    status = absl::InvalidArgumentError("give --fd or --trial; see --help");
  }
  if (status.ok()) {
    if (threads == 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const BackendFactory factory = FactoryOf(backend, device, dtype);
    WarmDevice warm(factory, threads);
    Node node({.cache = cache,
               .make_backend = [factory] { return factory({}); },
               .read_device = [device] { return MeasureDeviceReading(device); }});
    if (!generate_path.empty()) {
      status = AnswerGenerate(generate_path, &warm);
    } else {
      status = fd >= 0 ? ServeWorker(fd, &warm, &node) : RunFile(trial, &warm, &node);
    }
  }
  if (status.ok()) return 0;
  LogError(status.message());
  return 1;
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) { return kvsweep::Main(argc, argv); }
