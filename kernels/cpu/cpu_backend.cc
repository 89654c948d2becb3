#include "kernels/cpu/cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr double kElementBytes = 4;  // of weights and activations here

int ThreadCount(int asked) {
  if (asked > 0) return asked;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return cores > 0 ? cores : 1;
}

// The processor's name, as the kernel tells it.
std::string ProcessorName() {
  constexpr int64_t kMaxBytes = 16 << 20;
  const absl::StatusOr<std::string> text = ReadFile("/proc/cpuinfo", kMaxBytes);
  if (text.ok()) {
    for (absl::string_view line : absl::StrSplit(*text, '\n')) {
      if (!absl::ConsumePrefix(&line, "model name")) continue;
      return std::string(absl::StripLeadingAsciiWhitespace(
          absl::StripPrefix(absl::StripLeadingAsciiWhitespace(line), ":")));
    }
  }
  return "unknown processor";
}

uint64_t PhysicalMemoryBytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

BackendInfo MakeInfo(const CpuBackendOptions& options, int threads) {
  BackendInfo info;
  info.backend = "cpu";
  info.device = ProcessorName();
  info.device_class = options.modelled.has_value()
                          ? absl::StrCat("modelled ", options.modelled->name)
                          : absl::StrCat(info.device, ", ", threads, " threads");
  info.driver = std::string(absl::StripAsciiWhitespace(cpu::BlasDescription()));
  info.device_memory_bytes =
      options.device_memory_bytes > 0 ? options.device_memory_bytes : PhysicalMemoryBytes();
  info.batch_invariant = options.batch_invariant;
  info.activation_dtype = DType::kF32;
  info.weight_dtype = DType::kF32;
  return info;
}

absl::Status CheckProcessor() {
#if defined(__x86_64__) && defined(KVSWEEP_KERNELS_NEED_V3)
  absl::string_view missing;
  if (!__builtin_cpu_supports("avx2")) missing = "AVX2";
  if (!__builtin_cpu_supports("fma")) missing = "FMA";
  if (!__builtin_cpu_supports("f16c")) missing = "F16C";
  if (!__builtin_cpu_supports("bmi2")) missing = "BMI2";
  if (!missing.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("this processor (", ProcessorName(), ") has no ", missing,
                     ", for which the CPU kernels were compiled; configure the build with an older "
                     "KVSWEEP_CPU_ARCH, for example -DKVSWEEP_CPU_ARCH=x86-64"));
  }
#endif
  return absl::OkStatus();
}

}  // namespace

CpuBackend::CpuBackend(const CpuBackendOptions& options)
    : options_(options),
      info_(MakeInfo(options, ThreadCount(options.threads))),
      context_(ThreadCount(options.threads), options.batch_invariant),
      scheduler_(this, options.shuffle_streams ? std::optional<uint64_t>(options.stream_seed)
                                               : std::nullopt) {
  cpu::UseOneBlasThread();
}

CpuBackend::~CpuBackend() {
  for (const auto& [aligned, allocation] : allocations_) GiveBack(allocation);
}

// ------------------------------------------------------------------------------------------ memory

absl::StatusOr<std::byte*> CpuBackend::Allocate(Tier tier, uint64_t bytes) {
  uint64_t& allocated = allocated_bytes_[static_cast<int>(tier)];
  const uint64_t limit =
      tier == Tier::kDevice ? options_.device_memory_bytes : options_.host_memory_bytes;
  const uint64_t whole =
      options_.costs_alone ? std::numeric_limits<int64_t>::max() : PhysicalMemoryBytes();
  const uint64_t bound = limit > 0 ? limit : whole;
  const uint64_t available = bound > allocated ? bound - allocated : 0;
  const absl::string_view name = tier == Tier::kDevice ? "device" : "host";
  std::byte* const memory =
      bytes <= available ? Take(std::max<uint64_t>(bytes, 1) + kAlignment) : nullptr;
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat(name, " memory: asked ", bytes, ", available ",
                                                     available, " of ", bound, " bytes"));
  }
  const uint64_t offset = kAlignment - reinterpret_cast<uintptr_t>(memory) % kAlignment;
  allocations_[memory + offset] = {.memory = memory, .bytes = bytes, .tier = tier};
  allocated += bytes;
  return memory + offset;
}

void CpuBackend::Free(std::byte* memory) {
  if (memory == nullptr) return;
  const auto found = allocations_.find(memory);
  KVSWEEP_CHECK(found != allocations_.end()) << "Free of memory that Allocate did not return";
  allocated_bytes_[static_cast<int>(found->second.tier)] -= found->second.bytes;
  GiveBack(found->second);
  allocations_.erase(found);
}

// Zeroes. calloc leaves large memory to the system, which zeroes a page when it is first touched;
// where most of it never is, there may be more of it than the machine has.
std::byte* CpuBackend::Take(uint64_t bytes) const {
  if (!options_.costs_alone) return static_cast<std::byte*>(std::calloc(1, bytes));
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<std::byte*>(memory);
}

void CpuBackend::GiveBack(const Allocation& allocation) const {
  if (!options_.costs_alone) return std::free(allocation.memory);
  munmap(allocation.memory, std::max<uint64_t>(allocation.bytes, 1) + kAlignment);
}

uint64_t CpuBackend::allocated_bytes(Tier tier) const {
  return allocated_bytes_[static_cast<int>(tier)];
}

const CpuBackend::Allocation* CpuBackend::Find(const void* pointer) const {
  const std::byte* const address = static_cast<const std::byte*>(pointer);
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  const auto& [aligned, allocation] = *std::prev(after);
  const uint64_t offset = static_cast<uint64_t>(address - aligned);
  return offset < allocation.bytes ? &allocation : nullptr;
}

Tier CpuBackend::TierOf(const void* pointer) const {
  const Allocation* const allocation = Find(pointer);
  return allocation == nullptr ? Tier::kHost : allocation->tier;
}

// ------------------------------------------------------------------------------------------
// running

void CpuBackend::Copy(void* target, const void* source, uint64_t bytes, Stream stream) {
  if (scheduler_.capturing() && bytes > 0) {
    KVSWEEP_CHECK(Find(target) != nullptr && Find(source) != nullptr)
        << "a captured copy must lie in memory of the backend";
  }
  Enqueue(cpu::CopyArgs{target, source, bytes}, stream);
}

void CpuBackend::Zero(void* target, uint64_t bytes, Stream stream) {
  Enqueue(cpu::ZeroArgs{target, bytes}, stream);
}

void CpuBackend::BeginProfile() {
  times_.clear();
  scheduler_.NoteTimes(&times_, options_.modelled.has_value());
}

void CpuBackend::EndProfile() { scheduler_.NoteTimes(nullptr, false); }

absl::StatusOr<std::vector<OperationTime>> CpuBackend::TakeProfile() {
  RETURN_IF_ERROR(WaitAll());
  return std::exchange(times_, {});
}

// Whether it brings cached rows from the host to the device.
bool CpuBackend::IsFetch(const cpu::Operation& operation) const {
  const auto fetches = [&](const void* target, const void* source) {
    return TierOf(source) == Tier::kHost && TierOf(target) == Tier::kDevice;
  };
  if (const auto* gather = std::get_if<GatherRowsArgs>(&operation)) {
    return fetches(gather->target.key, gather->source.key);
  }
  if (const auto* tile = std::get_if<CopyTileArgs>(&operation)) {
    return fetches(tile->target.key, tile->source.key);
  }
  const auto* blocks = std::get_if<CopyBlocksArgs>(&operation);
  return blocks != nullptr && fetches(blocks->target, blocks->source);
}

void CpuBackend::Enqueue(const cpu::Operation& operation, Stream stream) {
  cpu::CheckArguments(operation);
  if (skip_fetches_ && IsFetch(operation)) return;
  scheduler_.Enqueue(operation, stream);
}

namespace {

// Whether an operation writes what later operations' costs, or their memory, depend on.
bool DecidesCosts(const cpu::Operation& operation) {
  return std::holds_alternative<cpu::CopyArgs>(operation) ||
         std::holds_alternative<cpu::ZeroArgs>(operation) ||
         std::holds_alternative<ArgmaxArgs>(operation) ||
         std::holds_alternative<SelectTopArgs>(operation) ||
         std::holds_alternative<PlaceTokensArgs>(operation);
}

}  // namespace

double CpuBackend::Execute(const cpu::Operation& operation) {
  if (!error_.ok()) return 0;
  const double element_bytes =
      options_.modelled.has_value() ? options_.modelled->element_bytes : kElementBytes;
  const cpu::OperationCost cost = cpu::CostOf(operation, *this, element_bytes);
  absl::Status status;
  if (!options_.costs_alone || DecidesCosts(operation)) {
    status = std::visit([this](const auto& args) { return cpu::Run(args, context_); }, operation);
  }
  if (!status.ok()) {
    error_ = Annotate(status, cpu::OperationName(operation));
    return 0;
  }
  total_cost_ += cost.cost;
  (cost.link_to_host ? link_bytes_to_host_ : link_bytes_to_device_) +=
      static_cast<uint64_t>(cost.cost.link_bytes);
  // Whole nanoseconds: then sums are exact, and a step lasts as long whatever ran before it.
  return options_.modelled.has_value() ? std::round(DurationNs(cost.cost, *options_.modelled)) : 0;
}

absl::Status CpuBackend::TakeError() {
  absl::Status error = std::move(error_);
  error_ = absl::OkStatus();
  return error;
}

absl::Status CpuBackend::Wait(Event event) {
  scheduler_.RunUntil(event);
  return TakeError();
}

absl::Status CpuBackend::WaitAll() {
  scheduler_.RunAll();
  return TakeError();
}

// Modelled time alone decides when there is one; otherwise chance may, where it orders the streams.
bool CpuBackend::Reached(Event event) {
  if (!options_.modelled.has_value() && scheduler_.Lags(event)) return false;
  return scheduler_.Reached(event);
}

double CpuBackend::ElapsedNs(Event from, Event to) const {
  return options_.modelled.has_value() ? scheduler_.ModelledNs(to) - scheduler_.ModelledNs(from)
                                       : scheduler_.WallNs(to) - scheduler_.WallNs(from);
}

int64_t CpuBackend::modelled_ns() const {
  return static_cast<int64_t>(std::llround(scheduler_.host_ns()));
}

AttentionPlan CpuBackend::PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const {
  // Rows and heads are enough work for the pool, except in small batches; a split of fewer tokens
  // would cost more than it saves.
  constexpr int32_t kLeastSplitTokens = 512;
  const int64_t pairs = std::max<int64_t>(1, int64_t{rows} * kv_heads);
  const int64_t wanted = (context_.pool.threads() + pairs - 1) / pairs;
  const int64_t splits = std::min<int64_t>(wanted, max_tokens / kLeastSplitTokens);
  if (options_.batch_invariant || splits <= 1) return {.splits = 1, .split_tokens = 0};
  const int64_t share = (max_tokens + splits - 1) / splits;
  return {.splits = static_cast<int32_t>(splits),
          .split_tokens = static_cast<int32_t>((share + 63) / 64 * 64)};
}

int64_t CpuBackend::growths() const {
  int64_t growths = scheduler_.growths() + context_.shared.growths();
  for (const cpu::Workspace& workspace : context_.worker) growths += workspace.growths();
  return growths;
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options) {
  if (options.threads < 0) {
    return absl::InvalidArgumentError(absl::StrCat("threads: ", options.threads, " is below 0"));
  }
  RETURN_IF_ERROR(CheckProcessor());
  return std::make_unique<CpuBackend>(options);
}

}  // namespace kvsweep
