#include "tests/bench/limits.h"

#include <cblas.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status_macros.h"
#ifdef KVSWEEP_BENCH_CUDA
#include "tests/bench/reading_cuda.h"
#endif

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

// Threads of this process read 1 GiB once each time; the sums are kept so that nothing is left out.
std::vector<double> ReadCpuBandwidth() {
  constexpr size_t kWords = size_t{1} << 27;
  const auto data = std::make_unique<uint64_t[]>(kWords);
  for (size_t i = 0; i < kWords; i += 512) data[i] = i;
  const int threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<double> samples;
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  for (int sample = 0; sample < 5; ++sample) {
    const int64_t begin = RealClock::Get().NowNs();
    std::vector<std::thread> readers;
    for (int t = 0; t < threads; ++t) {
      readers.emplace_back([&, t] {
        uint64_t sum[4] = {};
        const size_t first = kWords / threads * t / 4 * 4;
        for (size_t i = first; i + 4 <= first + kWords / threads; i += 4) {
          for (int lane = 0; lane < 4; ++lane) sum[lane] += data[i + lane];
        }
        sums[t] += sum[0] + sum[1] + sum[2] + sum[3];
      });
    }
    for (std::thread& reader : readers) reader.join();
    const double seconds = static_cast<double>(RealClock::Get().NowNs() - begin) / 1e9;
    if (sums[0] != 1) samples.push_back(kWords * 8 / seconds);
  }
  return samples;
}

void AddRate(Limits& limits, const std::string& name, const std::string& unit, double amount,
             const Timing& timing) {
  limits.rows.push_back({name, amount / timing.median_ns * 1e9, unit, timing.spread});
}

absl::Status MeasureReading(Backend& backend, Limits& limits) {
  std::vector<double> samples;
  if (backend.info().backend == "cpu") {
    samples = ReadCpuBandwidth();
  } else {
#ifdef KVSWEEP_BENCH_CUDA
    const int error = ReadCudaBandwidth(&samples);
    if (error != 0) return absl::InternalError(absl::StrCat("read bandwidth: CUDA error ", error));
#endif
  }
  const Timing summary = Summarise(samples);
  limits.profile.device_bytes_per_s = summary.median_ns;
  limits.rows.push_back({"read", summary.median_ns, "B/s", summary.spread});
  return absl::OkStatus();
}

absl::Status MeasureCopies(Backend& backend, bool all, Limits& limits) {
  const uint64_t bytes = backend.info().backend == "cpu" ? 256 * kMebi : 1024 * kMebi;
  ASSIGN_OR_RETURN(const Held device, Held::Take(backend, Tier::kDevice, 2 * bytes));
  ASSIGN_OR_RETURN(const Held host, Held::Take(backend, Tier::kHost, 2 * bytes));
  const auto copy = [&](std::byte* to, const std::byte* from) {
    return Measure(backend, 1,
                   [&, to, from](int) { backend.Copy(to, from, bytes, Stream::kCompute); }, {});
  };
  ASSIGN_OR_RETURN(const Timing inside, copy(device.get(), device.get() + bytes));
  AddRate(limits, "copy (read + write)", "B/s", 2.0 * static_cast<double>(bytes), inside);
  ASSIGN_OR_RETURN(const Timing to_device, copy(device.get(), host.get()));
  AddRate(limits, "link to device", "B/s", static_cast<double>(bytes), to_device);
  limits.profile.link_bytes_per_s = limits.rows.back().value;
  if (!all) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Timing to_host, copy(host.get() + bytes, device.get() + bytes));
  AddRate(limits, "link to host", "B/s", static_cast<double>(bytes), to_host);
  const Event begin = backend.CreateEvent();
  const Event end = backend.CreateEvent();
  ASSIGN_OR_RETURN(const Timing both,
                   Measure(backend, 1,
                           [&](int) {
                             backend.RecordEvent(begin, Stream::kCompute);
                             backend.WaitEvent(begin, Stream::kDeviceToHost);
                             backend.Copy(host.get() + bytes, device.get() + bytes, bytes,
                                          Stream::kDeviceToHost);
                             backend.RecordEvent(end, Stream::kDeviceToHost);
                             backend.Copy(device.get(), host.get(), bytes, Stream::kCompute);
                             backend.WaitEvent(end, Stream::kCompute);
                           },
                           {}));
  AddRate(limits, "link both ways together", "B/s", 2.0 * static_cast<double>(bytes), both);
  return absl::OkStatus();
}

// Rows of a host pool, read in place by a kernel that finds their numbers on the device.
absl::Status MeasureGathers(Backend& backend, Limits& limits) {
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
        Measure(backend, 1, [&](int) { backend.GatherRows(args, Stream::kCompute); }, {}));
    AddRate(limits, absl::StrCat("gather of ", row_bytes, " B rows from the host"), "B/s",
            static_cast<double>(kRows) * row_bytes, timing);
  }
  return absl::OkStatus();
}

absl::Status MeasureMatrix(Backend& backend, Limits& limits) {
  if (backend.info().backend == "cpu") {
    // The BLAS alone, on all cores.
    constexpr int kSize = 1536;
    const std::vector<float> in(kSize * kSize, 0.5f);
    std::vector<float> out(kSize * kSize);
    openblas_set_num_threads(static_cast<int>(std::thread::hardware_concurrency()));
    std::vector<double> samples;
    for (int sample = 0; sample < 6; ++sample) {
      const int64_t begin = RealClock::Get().NowNs();
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, kSize, kSize, kSize, 1, in.data(), kSize,
                  in.data(), kSize, 0, out.data(), kSize);
      samples.push_back(static_cast<double>(RealClock::Get().NowNs() - begin));
    }
    openblas_set_num_threads(1);
    const Timing timing = Summarise(samples);
    AddRate(limits, "f32 products of 1536^3 by the BLAS", "op/s", 2.0 * kSize * kSize * kSize,
            timing);
    limits.profile.operations_per_s = limits.rows.back().value;
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
  ASSIGN_OR_RETURN(const Timing timing,
                   Measure(backend, 1, [&](int) { backend.Gemm(args, Stream::kCompute); }, {}));
  AddRate(limits, absl::StrCat(DTypeName(dtype), " product of 8192^3"), "op/s",
          2.0 * kSize * kSize * kSize, timing);
  limits.profile.operations_per_s = limits.rows.back().value;
  return absl::OkStatus();
}

// What one more tiny operation costs inside a graph and on a stream.
absl::Status MeasureLaunches(Backend& backend, Limits& limits) {
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
      Measure(backend, kNodes, [&](int) { backend.Argmax(args, Stream::kCompute); }, {}));
  limits.rows.push_back({"graph node", node.median_ns, "ns", node.spread});
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

absl::StatusOr<Limits> MeasureLimits(Backend& backend, bool all) {
  Limits limits;
  limits.profile.name = backend.info().device;
  limits.profile.element_bytes = static_cast<double>(DTypeBytes(backend.info().weight_dtype));
  RETURN_IF_ERROR(MeasureReading(backend, limits));
  RETURN_IF_ERROR(MeasureCopies(backend, all, limits));
  RETURN_IF_ERROR(MeasureMatrix(backend, limits));
  if (!all) return limits;
  RETURN_IF_ERROR(MeasureGathers(backend, limits));
  RETURN_IF_ERROR(MeasureLaunches(backend, limits));
  return limits;
}

}  // namespace kvsweep
