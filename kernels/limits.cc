#include "kernels/limits.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "kernels/cpu/machine_rates.h"

namespace kvsweep {
namespace {

constexpr uint64_t kMebi = uint64_t{1} << 20;

// Memory of a backend for as long as this lives.
class Held {
 public:
  static absl::StatusOr<Held> Take(Backend& backend, Tier tier, uint64_t bytes) {
    ASSIGN_OR_RETURN(std::byte* const memory, backend.Allocate(tier, bytes));
    return Held(backend, memory);
  }
  Held(Held&& other) : backend_(other.backend_), memory_(std::exchange(other.memory_, nullptr)) {}
  ~Held() { backend_->Free(memory_); }
  std::byte* get() const { return memory_; }

 private:
  Held(Backend& backend, std::byte* memory) : backend_(&backend), memory_(memory) {}
  Backend* backend_;
  std::byte* memory_;
};

constexpr char kRead[] = "read";
constexpr char kLinkToDevice[] = "link to device";
constexpr char kProductPart[] = "product";  // part of the name: the format stands in it too
constexpr char kGraphNode[] = "graph node";

// A limit's samples go on until so long has passed.
StopRule RuleOf(const LimitsOptions& options) {
  return options.brief ? StopRule{.relative_error = 0.01, .least_samples = 5, .seconds = 0.1}
                       : StopRule{};
}

void AddRate(MachineLimits& limits, const std::string& name, const std::string& unit, double amount,
             const Timing& timing) {
  limits.rows.push_back({name, amount / timing.median_ns * 1e9, unit, timing.spread});
}

absl::Status MeasureReading(Backend& backend, const LimitsOptions& options, MachineLimits& limits) {
  std::vector<double> samples;
  if (backend.info().backend == "cpu") {
    samples = cpu::ReadRates();
  } else {
    KVSWEEP_CHECK(options.read_device != nullptr);
    ASSIGN_OR_RETURN(samples, options.read_device());
  }
  const Timing summary = Summarise(samples);
  limits.rows.push_back({kRead, summary.median_ns, "B/s", summary.spread});
  return absl::OkStatus();
}

absl::Status MeasureCopies(Backend& backend, const LimitsOptions& options, MachineLimits& limits) {
  const bool small = options.brief || backend.info().backend == "cpu";
  const uint64_t bytes = small ? 256 * kMebi : 1024 * kMebi;
  ASSIGN_OR_RETURN(const Held device, Held::Take(backend, Tier::kDevice, 2 * bytes));
  ASSIGN_OR_RETURN(const Held host, Held::Take(backend, Tier::kHost, 2 * bytes));
  const auto copy = [&](std::byte* to, const std::byte* from) {
    return Measure(
        backend, 1, [&, to, from](int) { backend.Copy(to, from, bytes, Stream::kCompute); },
        RuleOf(options));
  };
  ASSIGN_OR_RETURN(const Timing inside, copy(device.get(), device.get() + bytes));
  AddRate(limits, "copy (read + write)", "B/s", 2.0 * static_cast<double>(bytes), inside);
  ASSIGN_OR_RETURN(const Timing to_device, copy(device.get(), host.get()));
  AddRate(limits, kLinkToDevice, "B/s", static_cast<double>(bytes), to_device);
  if (!options.all) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Timing to_host, copy(host.get() + bytes, device.get() + bytes));
  AddRate(limits, "link to host", "B/s", static_cast<double>(bytes), to_host);
  const Event begin = backend.CreateEvent();
  const Event end = backend.CreateEvent();
  ASSIGN_OR_RETURN(const Timing both, Measure(
                                          backend, 1,
                                          [&](int) {
                                            backend.RecordEvent(begin, Stream::kCompute);
                                            backend.WaitEvent(begin, Stream::kDeviceToHost);
                                            backend.Copy(host.get() + bytes, device.get() + bytes,
                                                         bytes, Stream::kDeviceToHost);
                                            backend.RecordEvent(end, Stream::kDeviceToHost);
                                            backend.Copy(device.get(), host.get(), bytes,
                                                         Stream::kCompute);
                                            backend.WaitEvent(end, Stream::kCompute);
                                          },
                                          RuleOf(options)));
  AddRate(limits, "link both ways together", "B/s", 2.0 * static_cast<double>(bytes), both);
  return absl::OkStatus();
}

// Rows of a host pool, read in place by a kernel that finds their numbers on the device.
absl::Status MeasureGathers(Backend& backend, const LimitsOptions& options, MachineLimits& limits) {
  constexpr int32_t kRows = 32768;
  for (const int32_t row_bytes : {128, 256, 512, 1024}) {
    const DType dtype = DType::kBf16;
    const int32_t head_dim = row_bytes / 4;  // a key and its value behind it
    ASSIGN_OR_RETURN(const Held source,
                     Held::Take(backend, Tier::kHost, uint64_t{4} * kRows * row_bytes));
    ASSIGN_OR_RETURN(const Held target,
                     Held::Take(backend, Tier::kDevice, uint64_t{kRows} * row_bytes));
    std::vector<int32_t> numbers(kRows + 1);
    for (int32_t i = 0; i < kRows; ++i) numbers[i] = 4 * i + i % 4;
    numbers[kRows] = kRows;
    ASSIGN_OR_RETURN(const Held index,
                     Held::Take(backend, Tier::kDevice, numbers.size() * sizeof(int32_t)));
    backend.Copy(index.get(), numbers.data(), numbers.size() * sizeof(int32_t), Stream::kCompute);
    RETURN_IF_ERROR(backend.WaitAll());
    KvView view{.dtype = dtype, .block_size = 4 * kRows, .token_stride = 2 * head_dim};
    view.block_stride = int64_t{4} * kRows * 2 * head_dim;
    GatherRowsArgs args;
    args.source = view;
    args.source.key = source.get();
    args.source.value = source.get() + head_dim * 2;
    args.target = view;
    args.target.key = target.get();
    args.target.value = target.get() + head_dim * 2;
    args.index = reinterpret_cast<const int32_t*>(index.get());
    args.selected = args.index + kRows;
    args.index_stride = kRows;
    args.rows = 1;
    args.kv_heads = 1;
    args.head_dim = head_dim;
    ASSIGN_OR_RETURN(
        const Timing timing,
        Measure(
            backend, 1, [&](int) { backend.GatherRows(args, Stream::kCompute); }, RuleOf(options)));
    AddRate(limits, absl::StrCat("gather of ", row_bytes, " B rows from the host"), "B/s",
            static_cast<double>(kRows) * row_bytes, timing);
  }
  return absl::OkStatus();
}

absl::Status MeasureMatrix(Backend& backend, const LimitsOptions& options, MachineLimits& limits) {
  if (backend.info().backend == "cpu") {
    const Timing timing = Summarise(cpu::ProductTimesNs());
    AddRate(limits, absl::StrCat("f32 product of ", cpu::kProductSize, "^3 by the BLAS"), "op/s",
            cpu::kProductOperations, timing);
    return absl::OkStatus();
  }
  constexpr int32_t kSize = 8192;
  const DType dtype = backend.info().weight_dtype;
  const uint64_t bytes = uint64_t{kSize} * kSize * DTypeBytes(dtype);
  ASSIGN_OR_RETURN(const Held memory, Held::Take(backend, Tier::kDevice, 3 * bytes));
  for (int part = 0; part < 2; ++part) {
    backend.FillNormal({.out = memory.get() + part * bytes,
                        .dtype = dtype,
                        .count = int64_t{kSize} * kSize,
                        .seed = static_cast<uint64_t>(part)},
                       Stream::kCompute);
  }
  GemmArgs args;
  args.in = {.data = memory.get(), .stride = kSize};
  args.weight = memory.get() + bytes;
  args.out = {.data = memory.get() + 2 * bytes, .stride = kSize};
  args.rows = args.out_columns = args.in_columns = kSize;
  ASSIGN_OR_RETURN(
      const Timing timing,
      Measure(
          backend, 1, [&](int) { backend.Gemm(args, Stream::kCompute); }, RuleOf(options)));
  AddRate(limits, absl::StrCat(DTypeName(dtype), " ", kProductPart, " of 8192^3"), "op/s",
          2.0 * kSize * kSize * kSize, timing);
  return absl::OkStatus();
}

// What one more tiny operation costs inside a graph and on a stream.
absl::Status MeasureLaunches(Backend& backend, const LimitsOptions& options,
                             MachineLimits& limits) {
  constexpr int kNodes = 500;
  ASSIGN_OR_RETURN(const Held memory, Held::Take(backend, Tier::kDevice, 4096));
  ArgmaxArgs args;
  args.token = reinterpret_cast<int32_t*>(memory.get());
  args.target = reinterpret_cast<const int32_t*>(memory.get() + 1024);
  args.logits = {.data = memory.get() + 2048, .stride = 8};
  args.rows = 1;
  args.columns = 8;
  ASSIGN_OR_RETURN(
      const Timing node,
      Measure(
          backend, kNodes, [&](int) { backend.Argmax(args, Stream::kCompute); }, RuleOf(options)));
  limits.rows.push_back({kGraphNode, node.median_ns, "ns", node.spread});
  std::vector<double> samples;
  for (int sample = 0; sample < 20; ++sample) {
    const int64_t begin = RealClock::Get().NowNs();
    for (int i = 0; i < kNodes; ++i) backend.Argmax(args, Stream::kCompute);
    RETURN_IF_ERROR(backend.WaitAll());
    samples.push_back(static_cast<double>(RealClock::Get().NowNs() - begin) / kNodes);
  }
  const Timing launch = Summarise(samples);
  limits.rows.push_back({"stream launch", launch.median_ns, "ns", launch.spread});
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<MachineLimits> MeasureLimits(Backend& backend, const LimitsOptions& options) {
  MachineLimits limits;
  RETURN_IF_ERROR(MeasureReading(backend, options, limits));
  RETURN_IF_ERROR(MeasureCopies(backend, options, limits));
  RETURN_IF_ERROR(MeasureMatrix(backend, options, limits));
  if (options.all) {
    RETURN_IF_ERROR(MeasureGathers(backend, options, limits));
    RETURN_IF_ERROR(MeasureLaunches(backend, options, limits));
  }
  limits.profile =
      ProfileOf(backend.info().device, static_cast<double>(DTypeBytes(backend.info().weight_dtype)),
                limits.rows);
  return limits;
}

DeviceProfile ProfileOf(const std::string& name, double element_bytes,
                        const std::vector<Limit>& rows) {
  DeviceProfile profile{.name = name, .element_bytes = element_bytes};
  for (const Limit& limit : rows) {
    if (limit.name == kRead) profile.device_bytes_per_s = limit.value;
    if (limit.name == kLinkToDevice) profile.link_bytes_per_s = limit.value;
    if (absl::StrContains(limit.name, kProductPart)) profile.operations_per_s = limit.value;
    if (limit.name == kGraphNode) profile.operation_ns = limit.value;
  }
  return profile;
}

}  // namespace kvsweep
