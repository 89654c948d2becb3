#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cpu/operation.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/products.h"
#include "kernels/cuda/read_bandwidth.h"
#include "kernels/host_node.h"

namespace kvsweep {
namespace {

constexpr int kLeastArchitecture = 80;
constexpr size_t kWorkspaceBytes = size_t{64} << 20;  // of each stream
constexpr int kTickets = 16 * 1024;                   // of each stream
constexpr int kCompute = static_cast<int>(Stream::kCompute);
constexpr const char* kStreamNames[kStreams] = {"compute", "speculation", "host to device",
                                                "device to host"};

std::string VersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

uint64_t PhysicalMemoryBytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

// "0000:1b:00.0"; empty if the driver does not tell.
std::string PciAddress(int device) {
  char address[32] = {};
  if (cudaDeviceGetPCIBusId(address, sizeof(address) - 1, device) != cudaSuccess) return "";
  return absl::AsciiStrToLower(address);
}

absl::Status ToStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat(what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const CudaBackendOptions& options) : options_(options) {}
  ~CudaBackend() override;
  absl::Status Open();

  const BackendInfo& info() const override { return info_; }

  absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes) override;
  void Free(std::byte* memory) override { memory_->Free(memory); }
  uint64_t allocated_bytes(Tier tier) const override { return memory_->allocated_bytes(tier); }

  Event CreateEvent() override;
  void RecordEvent(Event event, Stream stream) override;
  void WaitEvent(Event event, Stream stream) override;
  bool Reached(Event event) override;
  double ElapsedNs(Event from, Event to) const override;
  absl::Status Wait(Event event) override;
  absl::Status WaitAll() override;

  void BeginCapture() override;
  absl::StatusOr<Graph> EndCapture() override;
  void Launch(Graph graph) override;
  void DestroyGraph(Graph graph) override;

  int64_t modelled_ns() const override { return 0; }

  void Enter(StepPart part) override;
  void BeginProfile() override;
  void EndProfile() override;
  absl::StatusOr<std::vector<OperationTime>> TakeProfile() override;
  void SkipFetches(bool skip) override { skip_fetches_ = skip; }

  uint64_t link_bytes_to_device() const override { return link_bytes_[0] + counted_[0]; }
  uint64_t link_bytes_to_host() const override { return link_bytes_[1] + counted_[1]; }

  AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const override {
    return cuda::PlanAttention(rows, max_tokens, kv_heads, context_[kCompute]);
  }

  void Copy(void* target, const void* source, uint64_t bytes, Stream stream) override;
  void Zero(void* target, uint64_t bytes, Stream stream) override;
  void Gemm(const GemmArgs& args, Stream stream) override;
  void GatedGemm(const GatedGemmArgs& args, Stream stream) override;

  void FillNormal(const FillNormalArgs& args, Stream stream) override { Run(args, stream); }
  void Embed(const EmbedArgs& args, Stream stream) override { Run(args, stream); }
  void Norm(const NormArgs& args, Stream stream) override { Run(args, stream); }
  void SiluGate(const SiluGateArgs& args, Stream stream) override { Run(args, stream); }
  void Rotary(const RotaryArgs& args, Stream stream) override { Run(args, stream); }
  void TakeRows(const TakeRowsArgs& args, Stream stream) override { Run(args, stream); }
  void Argmax(const ArgmaxArgs& args, Stream stream) override { Run(args, stream); }
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    Run(args, stream);
  }
  void AppendAndAttend(const AppendAndAttendArgs& args, Stream stream) override;
  void PrefillAttention(const PrefillAttentionArgs& args, Stream stream) override {
    Run(args, stream);
  }
  void ColumnSum(const ColumnSumArgs& args, Stream stream) override { Run(args, stream); }
  void PruneHeavy(const PruneHeavyArgs& args, Stream stream) override { Run(args, stream); }
  void EvictHeavy(const EvictHeavyArgs& args, Stream stream) override { Run(args, stream); }
  void RepeatHeads(const RepeatHeadsArgs& args, Stream stream) override { Run(args, stream); }
  void ProjectHeads(const ProjectHeadsArgs& args, Stream stream) override { Run(args, stream); }
  void RankColumns(const RankColumnsArgs& args, Stream stream) override { Run(args, stream); }
  void Speculate(const SpeculateArgs& args, Stream stream) override { Run(args, stream); }
  void SelectTop(const SelectTopArgs& args, Stream stream) override { Run(args, stream); }
  void PlaceTokens(const PlaceTokensArgs& args, Stream stream) override { Run(args, stream); }
  void Append(const AppendArgs& args, Stream stream) override {
    // Activations lie on the device.
    Run(args, stream, OnHost(args.target.key) ? Link::kToHost : Link::kNone);
  }
  void GatherRows(const GatherRowsArgs& args, Stream stream) override {
    Fetch(args, stream, LinkOf(args.target.key, args.source.key));
  }
  void CopyTile(const CopyTileArgs& args, Stream stream) override {
    Fetch(args, stream, LinkOf(args.target.key, args.source.key));
  }
  // What stands behind it starts ordinarily: a dependent launch may read stored entries before it
  // waits, and these are some.
  void CopyBlocks(const CopyBlocksArgs& args, Stream stream) override {
    Fetch(args, stream, LinkOf(args.target, args.source));
    context_[static_cast<int>(stream)].follows_kernel = false;
  }
  // One process holds the whole model: its own part is the sum.
  void AllReduce(const AllReduceArgs& args, Stream stream) override { cpu::CheckArguments(args); }

 private:
  enum class Link { kNone, kToDevice, kToHost };

  // An event has one record among the streams and another in the capture under way.
  struct EventPair {
    cudaEvent_t outside = nullptr;
    cudaEvent_t captured = nullptr;
    bool recorded = false;          // outside
    int64_t recorded_capture = -1;  // the capture in which it was last recorded
  };
  // An operation between two events that a profile reads.
  struct Noted {
    absl::string_view name;
    StepPart part = StepPart::kNone;
    Stream stream = Stream::kCompute;
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
  };
  struct CapturedGraph {
    cudaGraphExec_t executable = nullptr;
    uint64_t link_bytes[2] = {};    // of plain copies
    bool counts_on_device = false;  // its kernels count
    std::vector<Noted> noted;       // captured during a profile
  };
  // Around the launch of an operation: its range in a profiler, and its note in a profile.
  class Scope {
   public:
    Scope(CudaBackend& backend, absl::string_view name, Stream stream)
        : backend_(backend), stream_(stream) {
      nvtxRangePushA(name.data());
      if (backend_.profiling_) backend_.BeginNote(name, stream);
    }
    ~Scope() {
      if (backend_.profiling_) backend_.EndNote(stream_);
      nvtxRangePop();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    CudaBackend& backend_;
    const Stream stream_;
  };

  bool OnHost(const void* pointer) const { return memory_->TierOf(pointer) == Tier::kHost; }
  Link LinkOf(const void* target, const void* source) const {
    const bool to_host = OnHost(target);
    if (to_host == OnHost(source)) return Link::kNone;
    return to_host ? Link::kToHost : Link::kToDevice;
  }

  // Names an error of the host's side of an operation, the first since the last wait.
  void Note(cudaError_t error, absl::string_view operation);
  // Readies a stream for work that is no kernel: joins it to a capture under way.
  cudaStream_t Use(Stream stream);
  // The same for a kernel: what its launcher runs with.
  cuda::LaunchContext ReadyKernel(Stream stream);
  template <typename Args>
  void Run(const Args& args, Stream stream, Link link = Link::kNone);
  template <typename Args>
  void Fetch(const Args& args, Stream stream, Link link) {
    if (!skip_fetches_ || link != Link::kToDevice) Run(args, stream, link);
  }
  void BeginNote(absl::string_view name, Stream stream);
  void EndNote(Stream stream);
  cudaEvent_t RecordMark(Stream stream);
  void CountLink(Link link, uint64_t bytes);
  absl::Status TakeError(cudaError_t waiting);

  const CudaBackendOptions options_;
  BackendInfo info_;
  std::unique_ptr<cuda::DeviceMemory> memory_;
  cuda::ProductLibrary products_;
  std::array<cudaStream_t, kStreams> stream_ = {};
  std::array<cuda::LaunchContext, kStreams> context_ = {};  // follows_kernel: see ReadyKernel
  std::array<bool, kStreams> busy_ = {};                    // used since the last WaitAll
  std::vector<EventPair> events_;
  std::vector<CapturedGraph> graphs_;

  bool capturing_ = false;
  int64_t capture_ = 0;  // number of the capture under way, or of the last
  cudaEvent_t fork_ = nullptr;
  std::array<bool, kStreams> forked_ = {};
  CapturedGraph open_graph_;
  absl::Status capture_error_;

  unsigned long long* device_counts_ = nullptr;  // [2], to device and to host
  unsigned long long* counted_ = nullptr;        // [2], pinned: their values at the last WaitAll
  bool counts_pending_ = false;
  uint64_t link_bytes_[2] = {};  // of plain copies

  StepPart part_ = StepPart::kNone;
  bool profiling_ = false;
  bool skip_fetches_ = false;
  std::vector<Noted> noted_;           // outside of graphs, since the last TakeProfile
  std::vector<int32_t> noted_graphs_;  // launched since then
  cudaEvent_t origin_ = nullptr;       // instant 0 of the next TakeProfile
  std::vector<cudaEvent_t> marks_;     // events of the profile; kept for the next one
  size_t marks_used_ = 0;
  size_t marks_captured_ = 0;  // of these, the first so many may be nodes of graphs

  absl::Status error_;
  std::string first_operation_;  // since the last wait
  std::string last_operation_;
};

// -------------------------------------------------------------------------------------------
// opening

absl::Status CudaBackend::Open() {
  RETURN_IF_ERROR(ProbeCuda(options_.device));
  RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "cudaSetDevice"));
  cudaDeviceProp properties = {};
  RETURN_IF_ERROR(
      ToStatus(cudaGetDeviceProperties(&properties, options_.device), "device properties"));
  int driver = 0;
  int runtime = 0;
  RETURN_IF_ERROR(ToStatus(cudaDriverGetVersion(&driver), "driver version"));
  RETURN_IF_ERROR(ToStatus(cudaRuntimeGetVersion(&runtime), "runtime version"));
  info_ = {.backend = "cuda",
           .device = properties.name,
           .device_class = absl::StrCat(properties.name, ", ", DTypeName(options_.dtype)),
           .driver = absl::StrCat("CUDA driver ", VersionText(driver), ", runtime ",
                                  VersionText(runtime)),
           .pci_address = PciAddress(options_.device),
           .beside_host = true,
           .batch_invariant = options_.batch_invariant,
           .device_memory_bytes = options_.device_memory_bytes > 0 ? options_.device_memory_bytes
                                                                   : properties.totalGlobalMem,
           .activation_dtype = options_.dtype,
           .weight_dtype = options_.dtype};
  const HostNode node = FindHostNode(info_.pci_address);
  info_.host_memory = node.Text();
  memory_ = std::make_unique<cuda::DeviceMemory>(
      info_.device_memory_bytes,
      options_.host_memory_bytes > 0 ? options_.host_memory_bytes : PhysicalMemoryBytes(),
      node.node);

  // Transfers and look-ahead are short and wait for nobody; the compute stream fills what is left.
  int least = 0;
  int greatest = 0;
  RETURN_IF_ERROR(ToStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities"));
  for (int i = 0; i < kStreams; ++i) {
    const int priority = i == kCompute ? least : greatest;
    RETURN_IF_ERROR(ToStatus(
        cudaStreamCreateWithPriority(&stream_[i], cudaStreamNonBlocking, priority), "streams"));
    void* workspace = nullptr;
    void* tickets = nullptr;
    RETURN_IF_ERROR(ToStatus(cudaMalloc(&workspace, kWorkspaceBytes), "workspace"));
    RETURN_IF_ERROR(ToStatus(cudaMalloc(&tickets, kTickets * sizeof(uint32_t)), "workspace"));
    RETURN_IF_ERROR(ToStatus(cudaMemset(tickets, 0, kTickets * sizeof(uint32_t)), "workspace"));
    context_[i] = {.stream = stream_[i],
                   .activation_dtype = options_.dtype,
                   .weight_dtype = options_.dtype,
                   .batch_invariant = options_.batch_invariant,
                   .multiprocessors = properties.multiProcessorCount,
                   .architecture = 10 * properties.major + properties.minor,
                   .workspace = static_cast<std::byte*>(workspace),
                   .workspace_bytes = kWorkspaceBytes,
                   .tickets = static_cast<uint32_t*>(tickets),
                   .ticket_count = kTickets};
  }
  RETURN_IF_ERROR(ToStatus(products_.Open(), "cublasLt"));
  RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming), "events"));
  RETURN_IF_ERROR(ToStatus(cudaEventCreate(&origin_), "events"));
  void* counts = nullptr;
  RETURN_IF_ERROR(ToStatus(cudaMalloc(&counts, 2 * sizeof(*device_counts_)), "counters"));
  device_counts_ = static_cast<unsigned long long*>(counts);
  RETURN_IF_ERROR(ToStatus(cudaMemset(counts, 0, 2 * sizeof(*device_counts_)), "counters"));
  RETURN_IF_ERROR(ToStatus(cudaHostAlloc(&counts, 2 * sizeof(*counted_), 0), "counters"));
  counted_ = static_cast<unsigned long long*>(counts);
  counted_[0] = counted_[1] = 0;
  return ToStatus(cudaDeviceSynchronize(), "opening the device");
}

CudaBackend::~CudaBackend() {
  cudaDeviceSynchronize();
  for (const CapturedGraph& graph : graphs_) {
    if (graph.executable != nullptr) cudaGraphExecDestroy(graph.executable);
  }
  for (const EventPair& event : events_) {
    cudaEventDestroy(event.outside);
    cudaEventDestroy(event.captured);
  }
  if (fork_ != nullptr) cudaEventDestroy(fork_);
  if (origin_ != nullptr) cudaEventDestroy(origin_);
  for (const cudaEvent_t mark : marks_) cudaEventDestroy(mark);
  for (int i = 0; i < kStreams; ++i) {
    cudaFree(context_[i].workspace);
    cudaFree(context_[i].tickets);
    if (stream_[i] != nullptr) cudaStreamDestroy(stream_[i]);
  }
  cudaFree(device_counts_);
  cudaFreeHost(counted_);
}

// --------------------------------------------------------------------------------------------
// memory

absl::StatusOr<std::byte*> CudaBackend::Allocate(Tier tier, uint64_t bytes) {
  KVSWEEP_CHECK(!capturing_) << "Allocate inside a capture";
  ASSIGN_OR_RETURN(std::byte* const memory, memory_->Allocate(tier, bytes));
  // Both tiers are zeroed by the device, which reaches host memory faster than one core does. What
  // was freed may still be read by work of its last owner.
  cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, stream_[kCompute]);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_[kCompute]);
  if (error == cudaSuccess) return memory;
  memory_->Free(memory);
  return ToStatus(error, absl::StrCat("zeroing ", bytes, " bytes"));
}

// -------------------------------------------------------------------------------------------
// running

void CudaBackend::Note(cudaError_t error, absl::string_view operation) {
  if (first_operation_.empty()) first_operation_ = std::string(operation);
  last_operation_ = std::string(operation);
  if (error == cudaSuccess || !error_.ok()) return;
  error_ = ToStatus(error, operation);
}

cudaStream_t CudaBackend::Use(Stream stream) {
  const int index = static_cast<int>(stream);
  if (!capturing_) {
    busy_[index] = true;
  } else if (!forked_[index]) {
    forked_[index] = true;
    Note(cudaStreamWaitEvent(stream_[index], fork_, 0), "fork of a captured stream");
  }
  context_[index].follows_kernel = false;
  return stream_[index];
}

cuda::LaunchContext CudaBackend::ReadyKernel(Stream stream) {
  cuda::LaunchContext& kept = context_[static_cast<int>(stream)];
  const bool follows_kernel = kept.follows_kernel;
  Use(stream);
  cuda::LaunchContext context = kept;
  context.follows_kernel = follows_kernel;
  kept.follows_kernel = true;
  return context;
}

namespace {

template <typename Args>
bool IsEmpty(const Args& args) {
  if constexpr (requires { args.rows; }) {
    return args.rows == 0;
  } else {
    return args.count == 0;
  }
}
bool IsEmpty(const PruneHeavyArgs& args) { return args.tokens == 0; }

}  // namespace

template <typename Args>
void CudaBackend::Run(const Args& args, Stream stream, Link link) {
  const cpu::Operation operation(args);
  cpu::CheckArguments(operation);
  if (IsEmpty(args)) return;
  const absl::string_view name = cpu::OperationName(operation);
  const Scope scope(*this, name, stream);
  cuda::LaunchContext context = ReadyKernel(stream);
  if (link != Link::kNone) {
    context.link_bytes = device_counts_ + (link == Link::kToHost ? 1 : 0);
    (capturing_ ? open_graph_.counts_on_device : counts_pending_) = true;
  }
  Note(cuda::Launch(args, context), name);
}

void CudaBackend::Gemm(const GemmArgs& args, Stream stream) {
  cpu::CheckArguments(args);
  if (args.rows == 0) return;
  const Scope scope(*this, "Gemm", stream);
  const cuda::LaunchContext context = ReadyKernel(stream);
  const bool skinny = cuda::IsSkinnyProduct(args, context);
  const bool panel = skinny && cuda::IsPanelProduct(args, context);
  cudaError_t error = cudaErrorNotSupported;
  if (panel && (options_.batch_invariant || cuda::IsPanelProductFaster(args, context))) {
    error = cuda::LaunchPanelProduct(args, context);
  } else if (!options_.batch_invariant && !(skinny && cuda::IsSkinnyProductFaster(args)) &&
             cuda::ProductLibrary::Takes(args, context)) {
    error = products_.Launch(args, context);
  }
  if (error == cudaErrorNotSupported) {
    error = skinny ? cuda::LaunchSkinnyProduct(args, context)
                   : cuda::LaunchGeneralProduct(args, context);
  }
  Note(error, "Gemm");
}

// In one not where a row's result must not depend on the rows beside it: of many rows it would be
// computed otherwise.
void CudaBackend::GatedGemm(const GatedGemmArgs& args, Stream stream) {
  const bool in_one = !options_.batch_invariant && args.product.rows > 0 &&
                      cuda::CanGate(args, context_[static_cast<int>(stream)]);
  if (!in_one) return Backend::GatedGemm(args, stream);
  cpu::CheckArguments(args.product);
  const Scope scope(*this, "GatedGemm", stream);
  Note(cuda::Launch(args, ReadyKernel(stream)), "GatedGemm");
}

void CudaBackend::AppendAndAttend(const AppendAndAttendArgs& args, Stream stream) {
  const bool in_one = args.append.rows > 0 && !OnHost(args.append.target.key) &&
                      cuda::CanAppendAndAttend(args, context_[static_cast<int>(stream)]);
  if (!in_one) return Backend::AppendAndAttend(args, stream);
  cpu::CheckArguments(args.append);
  cpu::CheckArguments(args.attention);
  const Scope scope(*this, "AppendAndAttend", stream);
  Note(cuda::Launch(args, ReadyKernel(stream)), "AppendAndAttend");
}

void CudaBackend::CountLink(Link link, uint64_t bytes) {
  if (link == Link::kNone) return;
  (capturing_ ? open_graph_.link_bytes : link_bytes_)[link == Link::kToHost ? 1 : 0] += bytes;
}

void CudaBackend::Copy(void* target, const void* source, uint64_t bytes, Stream stream) {
  if (bytes == 0) return;
  KVSWEEP_CHECK(target != nullptr && source != nullptr);
  const bool own = memory_->Holds(target) && memory_->Holds(source);
  KVSWEEP_CHECK(!capturing_ || own) << "a captured copy must lie in memory of the backend";
  const Link link = LinkOf(target, source);
  CountLink(link, bytes);
  const Scope scope(*this, "Copy", stream);
  if (own && link != Link::kNone && cuda::IsSmallCopy(target, source, bytes)) {
    Use(stream);
    const cuda::LaunchContext& context = context_[static_cast<int>(stream)];
    Note(cuda::LaunchSmallCopy(target, source, bytes, context), "Copy");
    return;
  }
  Note(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, Use(stream)), "Copy");
}

void CudaBackend::Zero(void* target, uint64_t bytes, Stream stream) {
  if (bytes == 0) return;
  KVSWEEP_CHECK(target != nullptr);
  const Scope scope(*this, "Zero", stream);
  Note(cudaMemsetAsync(target, 0, bytes, Use(stream)), "Zero");
}

// --------------------------------------------------------------------------------------------
// events

Event CudaBackend::CreateEvent() {
  EventPair pair;
  Note(cudaEventCreate(&pair.outside), "CreateEvent");
  Note(cudaEventCreateWithFlags(&pair.captured, cudaEventDisableTiming), "CreateEvent");
  events_.push_back(pair);
  return {static_cast<int32_t>(events_.size()) - 1};
}

void CudaBackend::RecordEvent(Event event, Stream stream) {
  EventPair& pair = events_.at(static_cast<size_t>(event.index));
  cuda::LaunchContext& context = context_[static_cast<int>(stream)];
  const bool follows_kernel = context.follows_kernel;
  const cudaStream_t target = Use(stream);
  if (capturing_) {
    context.follows_kernel = follows_kernel;  // a record is no node of the graph
    pair.recorded_capture = capture_;
    Note(cudaEventRecord(pair.captured, target), "RecordEvent");
  } else {
    pair.recorded = true;
    Note(cudaEventRecord(pair.outside, target), "RecordEvent");
  }
}

void CudaBackend::WaitEvent(Event event, Stream stream) {
  const EventPair& pair = events_.at(static_cast<size_t>(event.index));
  if (!capturing_) {
    if (pair.recorded) Note(cudaStreamWaitEvent(Use(stream), pair.outside, 0), "WaitEvent");
  } else if (pair.recorded_capture == capture_) {
    Note(cudaStreamWaitEvent(Use(stream), pair.captured, 0), "WaitEvent");
  } else if (pair.recorded && capture_error_.ok()) {
    capture_error_ = absl::FailedPreconditionError(absl::StrCat(
        "a captured stream (", kStreamNames[static_cast<int>(stream)], ") waits for event ",
        event.index,
        ", which was recorded before the capture: a replay could not wait for it again"));
  }
}

bool CudaBackend::Reached(Event event) {
  const EventPair& pair = events_.at(static_cast<size_t>(event.index));
  return !pair.recorded || cudaEventQuery(pair.outside) != cudaErrorNotReady;
}

double CudaBackend::ElapsedNs(Event from, Event to) const {
  float milliseconds = 0;
  const cudaError_t error =
      cudaEventElapsedTime(&milliseconds, events_.at(static_cast<size_t>(from.index)).outside,
                           events_.at(static_cast<size_t>(to.index)).outside);
  KVSWEEP_CHECK(error == cudaSuccess) << "ElapsedNs: " << cudaGetErrorString(error);
  return 1e6 * double{milliseconds};
}

absl::Status CudaBackend::TakeError(cudaError_t waiting) {
  absl::Status error = std::move(error_);
  error_ = absl::OkStatus();
  if (error.ok() && waiting != cudaSuccess) {
    error = ToStatus(
        waiting, absl::StrCat("while running, among the operations from ", first_operation_, " to ",
                              last_operation_, " (CUDA_LAUNCH_BLOCKING=1 names the one)"));
  }
  first_operation_.clear();
  last_operation_.clear();
  return error;
}

absl::Status CudaBackend::Wait(Event event) {
  KVSWEEP_CHECK(!capturing_) << "Wait inside a capture";
  const EventPair& pair = events_.at(static_cast<size_t>(event.index));
  return TakeError(pair.recorded ? cudaEventSynchronize(pair.outside) : cudaSuccess);
}

absl::Status CudaBackend::WaitAll() {
  KVSWEEP_CHECK(!capturing_) << "WaitAll inside a capture";
  cudaError_t error = cudaSuccess;
  for (int i = kStreams - 1; i >= 0 && error == cudaSuccess; --i) {
    if (i == kCompute && counts_pending_) {
      error = cudaMemcpyAsync(counted_, device_counts_, 2 * sizeof(*counted_),
                              cudaMemcpyDeviceToHost, stream_[kCompute]);
      busy_[kCompute] = true;
      counts_pending_ = false;
    }
    if (busy_[i] && error == cudaSuccess) error = cudaStreamSynchronize(stream_[i]);
    busy_[i] = false;
  }
  return TakeError(error);
}

// --------------------------------------------------------------------------------------------
// profiles

namespace {

const char* RangeName(StepPart part) {
  switch (part) {
    case StepPart::kNone:
    case StepPart::kOther:
      return "other";
    case StepPart::kProjections:
      return "projections";
    case StepPart::kSpeculation:
      return "speculation";
    case StepPart::kAttention:
      return "attention";
    case StepPart::kMlp:
      return "mlp";
    case StepPart::kSampling:
      return "sampling";
  }
  return "";
}

}  // namespace

void CudaBackend::Enter(StepPart part) {
  if (part == part_) return;
  if (part_ == StepPart::kNone) {
    nvtxRangePushA("step");
  } else {
    nvtxRangePop();
  }
  if (part == StepPart::kNone) {
    nvtxRangePop();
  } else {
    nvtxRangePushA(RangeName(part));
  }
  part_ = part;
}

cudaEvent_t CudaBackend::RecordMark(Stream stream) {
  if (marks_used_ == marks_.size()) {
    cudaEvent_t mark = nullptr;
    Note(cudaEventCreate(&mark), "BeginProfile");
    marks_.push_back(mark);
  }
  const cudaEvent_t mark = marks_[marks_used_++];
  // A captured mark is a node of the graph, and can be read outside of it.
  const unsigned flags = capturing_ ? cudaEventRecordExternal : cudaEventRecordDefault;
  Note(cudaEventRecordWithFlags(mark, Use(stream), flags), "TakeProfile");
  return mark;
}

void CudaBackend::BeginNote(absl::string_view name, Stream stream) {
  const cudaEvent_t begin = RecordMark(stream);
  (capturing_ ? open_graph_.noted : noted_)
      .push_back({.name = name, .part = part_, .stream = stream, .begin = begin});
}

void CudaBackend::EndNote(Stream stream) {
  (capturing_ ? open_graph_.noted : noted_).back().end = RecordMark(stream);
}

void CudaBackend::BeginProfile() {
  KVSWEEP_CHECK(!capturing_) << "BeginProfile inside a capture";
  profiling_ = true;
  marks_used_ = marks_captured_ = 0;
  noted_.clear();
  noted_graphs_.clear();
  Note(cudaEventRecord(origin_, Use(Stream::kCompute)), "BeginProfile");
}

void CudaBackend::EndProfile() {
  KVSWEEP_CHECK(!capturing_) << "EndProfile inside a capture";
  profiling_ = false;
}

absl::StatusOr<std::vector<OperationTime>> CudaBackend::TakeProfile() {
  RETURN_IF_ERROR(WaitAll());
  for (const int32_t graph : noted_graphs_) {
    const std::vector<Noted>& noted = graphs_.at(static_cast<size_t>(graph)).noted;
    noted_.insert(noted_.end(), noted.begin(), noted.end());
  }
  std::vector<OperationTime> times;
  for (const Noted& noted : noted_) {
    float begin_ms = 0;
    float end_ms = 0;
    RETURN_IF_ERROR(ToStatus(cudaEventElapsedTime(&begin_ms, origin_, noted.begin), noted.name));
    RETURN_IF_ERROR(ToStatus(cudaEventElapsedTime(&end_ms, origin_, noted.end), noted.name));
    times.push_back({.name = noted.name,
                     .part = noted.part,
                     .stream = noted.stream,
                     .begin_ns = 1e6 * double{begin_ms},
                     .end_ns = 1e6 * double{end_ms}});
  }
  noted_.clear();
  noted_graphs_.clear();
  marks_used_ = marks_captured_;
  Note(cudaEventRecord(origin_, Use(Stream::kCompute)), "TakeProfile");
  return times;
}

// --------------------------------------------------------------------------------------------
// graphs

void CudaBackend::BeginCapture() {
  KVSWEEP_CHECK(!capturing_) << "BeginCapture inside a capture";
  capturing_ = true;
  ++capture_;
  forked_ = {};
  forked_[kCompute] = true;
  for (cuda::LaunchContext& context : context_) context.follows_kernel = false;
  open_graph_ = {};
  capture_error_ = absl::OkStatus();
  // Other threads of the process may do as they like meanwhile.
  Note(cudaStreamBeginCapture(stream_[kCompute], cudaStreamCaptureModeThreadLocal), "BeginCapture");
  Note(cudaEventRecord(fork_, stream_[kCompute]), "BeginCapture");
}

absl::StatusOr<Graph> CudaBackend::EndCapture() {
  KVSWEEP_CHECK(capturing_) << "EndCapture without BeginCapture";
  capturing_ = false;
  marks_captured_ = marks_used_;
  for (cuda::LaunchContext& context : context_) context.follows_kernel = false;
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_[kCompute], &graph);
  absl::Status error = capture_error_;
  if (error.ok()) error = TakeError(cudaSuccess);
  if (error.ok() && ended == cudaErrorStreamCaptureUnjoined) {
    error = absl::FailedPreconditionError(
        "the captured work of a stream is not waited for by the compute stream at the end of the "
        "capture");
  }
  if (error.ok()) error = ToStatus(ended, "EndCapture");
  CapturedGraph captured = open_graph_;
  if (error.ok()) {
    error = ToStatus(
        cudaGraphInstantiate(&captured.executable, graph, cudaGraphInstantiateFlagUseNodePriority),
        "instantiating a graph");
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
  RETURN_IF_ERROR(error);
  Note(cudaGraphUpload(captured.executable, Use(Stream::kCompute)), "EndCapture");
  graphs_.push_back(captured);
  return Graph{static_cast<int32_t>(graphs_.size()) - 1};
}

void CudaBackend::Launch(Graph graph) {
  KVSWEEP_CHECK(!capturing_) << "Launch inside a capture";
  const CapturedGraph& captured = graphs_.at(static_cast<size_t>(graph.index));
  KVSWEEP_CHECK(captured.executable != nullptr) << "Launch of a destroyed graph";
  nvtxMarkA("graph");
  const bool noted = std::ranges::find(noted_graphs_, graph.index) != noted_graphs_.end();
  if (profiling_ && !noted) noted_graphs_.push_back(graph.index);
  for (int i = 0; i < 2; ++i) link_bytes_[i] += captured.link_bytes[i];
  counts_pending_ = counts_pending_ || captured.counts_on_device;
  Note(cudaGraphLaunch(captured.executable, Use(Stream::kCompute)), "Launch");
}

void CudaBackend::DestroyGraph(Graph graph) {
  CapturedGraph& captured = graphs_.at(static_cast<size_t>(graph.index));
  if (captured.executable != nullptr) cudaGraphExecDestroy(captured.executable);
  captured.executable = nullptr;
}

}  // namespace

absl::Status ProbeCuda(int device) {
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) {
    return absl::FailedPreconditionError(
        "no NVIDIA driver on this machine (libcuda.so.1 was not found)");
  }
  if (driver / 1000 < runtime / 1000) {
    return absl::FailedPreconditionError(
        absl::StrCat("the NVIDIA driver is too old: it supports CUDA ", VersionText(driver),
                     ", this program needs ", VersionText(runtime)));
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count <= device) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device ", device, ": ",
                     error != cudaSuccess ? cudaGetErrorString(error)
                                          : absl::StrCat("there are ", count).c_str()));
  }
  int major = 0;
  int minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (10 * major + minor < kLeastArchitecture) {
    return absl::FailedPreconditionError(absl::StrCat("CUDA device ", device,
                                                      " has compute capability ", major, ".", minor,
                                                      "; 8.0 or newer is needed"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> MeasureCudaReading(int device) {
  RETURN_IF_ERROR(ProbeCuda(device));
  std::vector<double> rates;
  RETURN_IF_ERROR(ToStatus(cuda::MeasureReading(device, &rates), "reading the device's memory"));
  return rates;
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options) {
  if (options.dtype != DType::kBf16 && options.dtype != DType::kF32) {
    return absl::InvalidArgumentError(
        absl::StrCat("the CUDA backend computes in bf16 or f32, not ", DTypeName(options.dtype)));
  }
  auto backend = std::make_unique<CudaBackend>(options);
  RETURN_IF_ERROR(backend->Open());
  return backend;
}

}  // namespace kvsweep
