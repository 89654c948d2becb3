#ifndef KVSWEEP_TESTS_BENCH_CASES_H_
#define KVSWEEP_TESTS_BENCH_CASES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "kernels/cost.h"

// The kernels that are timed: each a function of named axes that puts its data on a backend, in as
// many sets as exceed the caches, and says what one call must move and compute at least.

namespace kvsweep {

// Named values in the order in which they are shown.
class Point {
 public:
  void Set(const std::string& name, int64_t value);
  // REQUIRES: the axis is there.
  int64_t at(absl::string_view name) const;
  const std::vector<std::pair<std::string, int64_t>>& values() const { return values_; }

 private:
  std::vector<std::pair<std::string, int64_t>> values_;
};

struct BenchAxis {
  std::string name;
  std::vector<int64_t> values;
};

// All combinations, the last axis fastest.
std::vector<Point> Expand(const std::vector<BenchAxis>& axes);
// Reads "B=[1,8,32]" or "B=8". InvalidArgument with what was expected.
absl::StatusOr<BenchAxis> ParseAxis(absl::string_view text);
// "B=[1,8] context=[4096]", as ParseAxis reads each.
std::string FormatAxes(const std::vector<BenchAxis>& axes);
// InvalidArgument, with the names there are, unless each of `given` is the name of one of `axes`.
absl::Status CheckAxes(const std::vector<BenchAxis>& given, const std::vector<BenchAxis>& axes);

// Memory that lives as long as the case, filled with normal numbers or with values.
class CaseMemory {
 public:
  explicit CaseMemory(Backend& backend) : backend_(backend) {}
  ~CaseMemory();
  CaseMemory(const CaseMemory&) = delete;
  CaseMemory& operator=(const CaseMemory&) = delete;

  absl::StatusOr<std::byte*> Room(uint64_t bytes, Tier tier = Tier::kDevice);
  absl::StatusOr<std::byte*> Normal(int64_t count, DType dtype, Tier tier = Tier::kDevice,
                                    float deviation = 1.0f);
  template <typename T>
  absl::StatusOr<T*> Values(const std::vector<T>& values) {
    absl::StatusOr<std::byte*> memory = Room(values.size() * sizeof(T));
    if (!memory.ok()) return memory.status();
    backend_.Copy(*memory, values.data(), values.size() * sizeof(T), Stream::kCompute);
    const absl::Status status = backend_.WaitAll();
    if (!status.ok()) return status;
    return reinterpret_cast<T*>(*memory);
  }
  Backend& backend() { return backend_; }

 private:
  Backend& backend_;
  std::vector<std::byte*> held_;
};

struct PreparedCase {
  int sets = 1;                        // of data; call i uses set i % sets
  std::function<void(int i)> enqueue;  // on Stream::kCompute
  Cost cost;                           // of one call
};

struct KernelCase {
  std::string name;
  std::string meaning;
  std::vector<BenchAxis> axes;  // with their defaults
  std::function<absl::StatusOr<PreparedCase>(CaseMemory& memory, const Point& point)> prepare;
};

const std::vector<KernelCase>& KernelCases();

// Sets of data of `bytes` each that together are several times any cache.
int ColdSets(double bytes);

// The type of keys and values that the backend is timed with.
DType BenchKvType(Backend& backend);

// A paged cache of rows of `tokens` tokens in scattered blocks.
struct BenchView {
  KvView view;
  double entry_bytes = 0;  // of a token of one head
};
absl::StatusOr<BenchView> MakeBenchView(CaseMemory& memory, int64_t rows, int64_t tokens,
                                        int64_t room, int64_t kv_heads, int64_t head_dim,
                                        int64_t page, Tier tier, bool with_values, uint64_t seed);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_CASES_H_
