#ifndef KVSWEEP_TESTS_KERNELS_CPU_KERNEL_FIXTURE_H_
#define KVSWEEP_TESTS_KERNELS_CPU_KERNEL_FIXTURE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

// What tests of the operations share: a backend with memory that is easily filled and read, random
// data, and paged caches whose unused slots are NaN, so that a kernel that reads one cannot pass.

namespace kvsweep {

class Device {
 public:
  explicit Device(const CpuBackendOptions& options = {.threads = 2}) : backend(options) {}

  // Device memory with these values.
  template <typename T>
  T* Put(const std::vector<T>& values, Tier tier = Tier::kDevice) {
    T* const memory = Room<T>(static_cast<int64_t>(values.size()), tier);
    std::copy(values.begin(), values.end(), memory);
    return memory;
  }
  // Zeroed device memory for `count` elements.
  template <typename T>
  T* Room(int64_t count, Tier tier = Tier::kDevice) {
    return reinterpret_cast<T*>(backend.Allocate(tier, count * sizeof(T)).value());
  }
  // [rows, columns] with a stride that is larger than it need be.
  Activations PutRows(const std::vector<float>& values, int64_t rows, int64_t columns);
  Activations RoomRows(int64_t rows, int64_t columns);
  static std::vector<float> GetRows(const Activations& from, int64_t rows, int64_t columns);

  CpuBackend backend;
};

// Normal values; with `outliers` one in 16 is ten times larger, so that a softmax over them has
// peaks.
std::vector<float> RandomFloats(Random& random, int64_t count, bool outliers = false);
// Values that bf16 and f16 hold exactly.
std::vector<float> RandomExactFloats(Random& random, int64_t count);

// The form of a paged cache.
struct CacheShape {
  std::vector<int32_t> lengths;  // tokens stored for each row
  int32_t kv_heads = 1;
  int32_t head_dim = 8;
  int32_t block_size = 4;
  DType dtype = DType::kF32;
  bool with_values = true;
  int32_t spare_blocks = 1;  // blocks for each row beyond its length
  Tier tier = Tier::kDevice;
};

// A cache with random content in scattered blocks: what the view says, and the same numbers in
// plain arrays.
struct Cache {
  CacheShape shape;
  KvView view;
  // [row][token][Hk * d]
  std::vector<std::vector<std::vector<float>>> key;
  std::vector<std::vector<std::vector<float>>> value;

  const float* Key(int64_t row, int64_t token, int64_t head) const {
    return key[row][token].data() + head * shape.head_dim;
  }
  const float* Value(int64_t row, int64_t token, int64_t head) const {
    return value[row][token].data() + head * shape.head_dim;
  }
};
Cache MakeCache(Device& device, Random& random, const CacheShape& shape);

// One number a slot, in the same blocks as `cache`; unused slots hold garbage.
SlotView MakeSlots(Device& device, const Cache& cache);

// Attention of one query over rows of keys and values, in double.
struct ReferenceAttention {
  std::vector<double> output;       // [d], normalised; 0 without keys
  std::vector<double> probability;  // [n]
  double maximum = 0;               // of the scaled scores
  double sum = 0;                   // of exp(score - maximum)
  double score_bound =
      0;  // largest sum of |query * key| * scale: rounding errors are in proportion to it
};
ReferenceAttention Attend(const float* query, const std::vector<const float*>& keys,
                          const std::vector<const float*>& values, int head_dim, double scale);

// How far an f32 attention over n keys may be from the reference: rounding of the scores moves
// every weight by as much in proportion, and the sums over keys round once each.
double AttentionTolerance(const ReferenceAttention& reference, int head_dim);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_KERNELS_CPU_KERNEL_FIXTURE_H_
