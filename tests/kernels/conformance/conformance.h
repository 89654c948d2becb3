#ifndef KVSWEEP_TESTS_KERNELS_CONFORMANCE_CONFORMANCE_H_
#define KVSWEEP_TESTS_KERNELS_CONFORMANCE_CONFORMANCE_H_

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/random.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"

// One suite of cases for every backend. A case is a function that draws its shape and its data from
// a seed, runs one operation on a backend and returns what it wrote; it is run on the CPU backend
// in batch-invariant mode, which other tests hold against plain double arithmetic, and on the
// backend under test, and the two must agree within a tolerance that follows from the formats.
// Inputs are numbers that every format holds exactly, so that nothing but the operation itself may
// round.
//
// What a kernel must not read is NaN, and what it must not write is compared too.

namespace kvsweep {

// The backend under test; one of the programs' sources defines it. An error skips the suite,
// loudly.
absl::StatusOr<std::unique_ptr<Backend>> CreateSubject();

// A backend with memory that is easily filled and read.
class Side {
 public:
  explicit Side(std::unique_ptr<Backend> backend);

  Backend& backend() { return *backend_; }
  DType activation_dtype() const { return backend_->info().activation_dtype; }

  // Forgets all arrays.
  void Reset();

  template <typename T>
  T* Put(const std::vector<T>& values, Tier tier = Tier::kDevice) {
    return reinterpret_cast<T*>(PutBytes(values.data(), values.size() * sizeof(T), tier));
  }
  // Room for `count` elements whose bytes are all ones: a NaN in every format, -1 as a number.
  template <typename T>
  T* Room(int64_t count, Tier tier = Tier::kDevice) {
    return Put(std::vector<T>(static_cast<size_t>(count), Ones<T>()), tier);
  }
  template <typename T>
  std::vector<T> Get(const T* from, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    GetBytes(values.data(), from, values.size() * sizeof(T));
    return values;
  }

  // [rows, columns] of activations, `padding` elements of NaN behind each row.
  Activations PutRows(const std::vector<float>& values, int64_t rows, int64_t columns,
                      int64_t padding);
  Activations RoomRows(int64_t rows, int64_t columns, int64_t padding);
  // The rows; the padding must still be what it was.
  std::vector<float> GetRows(const Activations& from, int64_t rows, int64_t columns);

  // Elements of a format, rounded on the host.
  std::byte* PutElements(const std::vector<float>& values, DType dtype, Tier tier = Tier::kDevice);

  // Runs what has been enqueued.
  void Finish();

 private:
  template <typename T>
  static T Ones() {
    T value;
    std::memset(&value, 0xff, sizeof(value));
    return value;
  }
  std::byte* PutBytes(const void* from, size_t bytes, Tier tier);
  void GetBytes(void* to, const void* from, size_t bytes);

  std::unique_ptr<Backend> backend_;
  std::byte* memory_[2] = {};  // by tier
  size_t used_[2] = {};
  std::list<std::vector<std::byte>> staged_;  // what enqueued copies still read
};

// What an operation wrote. Integers are compared exactly.
struct Outcome {
  struct Floats {
    std::string name;
    std::vector<float> values;
    double absolute = 0;  // tolerance: absolute + relative * |expected|
    double relative = 0;
  };
  std::vector<Floats> floats;
  std::vector<std::pair<std::string, std::vector<int32_t>>> integers;
  std::string shape;  // of the case, for messages

  void Add(const std::string& name, std::vector<float> values, double absolute, double relative) {
    floats.push_back({name, std::move(values), absolute, relative});
  }
  void Add(const std::string& name, std::vector<int32_t> values) {
    integers.emplace_back(name, std::move(values));
  }
};

// Runs `count` cases with seeds 0, 1, … on both backends and compares. Reports the first few that
// differ by seed and shape, and how many there were.
using Case = std::function<Outcome(Side& side, Random& random)>;
void Conform(const std::string& operation, int count, const Case& run);

// Half a unit in the last place of the subject's activations, in proportion: what storing a result
// in them may cost. The larger of both sides, so that the tolerance is the same for both.
double ActivationEpsilon();
bool SubjectHasNarrowActivations();

// ------------------------------------------------------------------------------------------- data

// Multiples of 1/64 below 4, which bf16 and f16 hold exactly.
std::vector<float> ExactFloats(Random& random, int64_t count);
// Rotary frequencies of a head [d/2].
const float* PutFrequencies(Side& side, int32_t head_dim);
// One of the list.
template <typename T>
T Pick(Random& random, std::initializer_list<T> from) {
  return *(from.begin() + random.Uniform(from.size()));
}
inline int32_t Between(Random& random, int32_t low, int32_t high) {
  return low + static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(high - low + 1)));
}
std::string Join(const std::vector<int32_t>& values);

// The form of a cache.
struct ViewShape {
  std::vector<int32_t> lengths;  // tokens stored for each row; -1: no block at all
  int32_t kv_heads = 1;
  int32_t head_dim = 8;
  int32_t block_size = 16;
  DType dtype = DType::kBf16;
  bool with_values = true;
  int32_t room = 0;    // token slots of a row beyond its length
  // 0: head by head, 1: token by token, 2: as 1, a value behind its key,
  // 3: as 0, a head's values in a block behind its keys
  int32_t layout = 0;
  bool table = true;   // false: contiguous rows without a block table
  Tier tier = Tier::kDevice;
};
// A cache with random content in scattered blocks; slots beyond the lengths are NaN.
struct View {
  KvView view;
  std::vector<int32_t> table;
  int64_t elements = 0;  // of the pool(s)
  bool joined = false;   // keys and values in one pool
};
View MakeView(Side& side, Random& random, const ViewShape& shape);
// All bytes of the pools, as integers.
std::vector<int32_t> PoolBytes(Side& side, const View& view);

// A number a slot in the same blocks, with these values (the size says how many there may be).
SlotView MakeSlots(Side& side, const View& view, const ViewShape& shape,
                   const std::vector<int32_t>& values);
int64_t SlotCount(const View& view, const ViewShape& shape);
int64_t SlotIndex(const View& view, const ViewShape& shape, int64_t row, int64_t slot,
                  int64_t head);
DType PickKvType(Random& random);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_KERNELS_CONFORMANCE_CONFORMANCE_H_
