#include "tests/kernels/conformance/conformance.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

constexpr size_t kMemoryBytes[] = {size_t{256} << 20, size_t{64} << 20};

// Both sides, for as long as the program runs, and what has been compared.
struct Sides {
  std::unique_ptr<Side> oracle;
  std::unique_ptr<Side> subject;
  std::string skipped;  // why there is no subject
};

Sides& TheSides() {
  static Sides* const sides = [] {
    auto* made = new Sides;
    absl::StatusOr<std::unique_ptr<Backend>> subject = CreateSubject();
    if (!subject.ok()) {
      made->skipped = std::string(subject.status().message());
      return made;
    }
    made->subject = std::make_unique<Side>(*std::move(subject));
    made->oracle =
        std::make_unique<Side>(CreateCpuBackend({.threads = 2, .batch_invariant = true}).value());
    return made;
  }();
  return *sides;
}

// KVSWEEP_CONFORMANCE_CASES: the first cases of each operation alone, for tools that slow them
// down.
int MostCases() {
  const char* const asked = std::getenv("KVSWEEP_CONFORMANCE_CASES");
  int most = 0;
  return asked != nullptr && absl::SimpleAtoi(asked, &most) ? most
                                                            : std::numeric_limits<int>::max();
}

// The total, printed when all is done.
class Total : public ::testing::Environment {
 public:
  void TearDown() override {
    if (TheSides().subject == nullptr) {
      std::printf("conformance: SKIPPED all %d cases: %s\n", skipped, TheSides().skipped.c_str());
    } else {
      std::printf("conformance: %d cases on %s, %d differ\n", cases,
                  TheSides().subject->backend().info().device.c_str(), differing);
    }
  }
  int cases = 0;
  int differing = 0;
  int skipped = 0;
};
Total* const total = static_cast<Total*>(::testing::AddGlobalTestEnvironment(new Total));

// The first value that is too far from what was expected; "" if none is.
std::string Difference(const Outcome::Floats& expected, const Outcome::Floats& got) {
  if (expected.values.size() != got.values.size()) return absl::StrCat(expected.name, ": sizes");
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double want = expected.values[i];
    const double have = got.values[i];
    if (want == have || (std::isnan(want) && std::isnan(have))) continue;
    const double bound = expected.absolute + expected.relative * std::abs(want);
    if (std::abs(want - have) <= bound) continue;
    return absl::StrCat(expected.name, "[", i, "] is ", have, ", expected ", want, " +- ", bound);
  }
  return "";
}

std::string Difference(const Outcome& expected, const Outcome& got) {
  for (size_t i = 0; i < expected.floats.size(); ++i) {
    const std::string difference = Difference(expected.floats[i], got.floats[i]);
    if (!difference.empty()) return difference;
  }
  for (size_t i = 0; i < expected.integers.size(); ++i) {
    const auto& [name, want] = expected.integers[i];
    const std::vector<int32_t>& have = got.integers[i].second;
    if (want.size() != have.size()) return absl::StrCat(name, ": sizes");
    const auto at = std::mismatch(want.begin(), want.end(), have.begin());
    if (at.first == want.end()) continue;
    return absl::StrCat(name, "[", at.first - want.begin(), "] is ", *at.second, ", expected ",
                        *at.first);
  }
  return "";
}

}  // namespace

// -------------------------------------------------------------------------------------------- side

Side::Side(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {
  for (const Tier tier : {Tier::kDevice, Tier::kHost}) {
    const int index = static_cast<int>(tier);
    memory_[index] = backend_->Allocate(tier, kMemoryBytes[index]).value();
  }
}

void Side::Reset() {
  Finish();
  used_[0] = used_[1] = 0;
}

void Side::Finish() {
  KVSWEEP_CHECK_OK(backend_->WaitAll());
  staged_.clear();
}

std::byte* Side::PutBytes(const void* from, size_t bytes, Tier tier) {
  const int index = static_cast<int>(tier);
  std::byte* const to = memory_[index] + used_[index];
  used_[index] += (bytes + 511) / 256 * 256;
  KVSWEEP_CHECK(used_[index] <= kMemoryBytes[index]) << "a case needs more memory than there is";
  if (bytes == 0) return to;
  const std::byte* const begin = static_cast<const std::byte*>(from);
  staged_.emplace_back(begin, begin + bytes);
  backend_->Copy(to, staged_.back().data(), bytes, Stream::kCompute);
  return to;
}

void Side::GetBytes(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  backend_->Copy(to, from, bytes, Stream::kCompute);
  Finish();
}

std::byte* Side::PutElements(const std::vector<float>& values, DType dtype, Tier tier) {
  std::vector<std::byte> bytes(values.size() * DTypeBytes(dtype));
  FromFloats(values, dtype, bytes.data());
  return PutBytes(bytes.data(), bytes.size(), tier);
}

Activations Side::PutRows(const std::vector<float>& values, int64_t rows, int64_t columns,
                          int64_t padding) {
  const int64_t stride = columns + padding;
  const int64_t size = DTypeBytes(activation_dtype());
  std::vector<std::byte> bytes(static_cast<size_t>((rows * stride + padding) * size),
                               std::byte{0xff});
  if (!values.empty()) {
    for (int64_t r = 0; r < rows; ++r) {
      FromFloats(std::span(values).subspan(r * columns, columns), activation_dtype(),
                 bytes.data() + r * stride * size);
    }
  }
  return {.data = PutBytes(bytes.data(), bytes.size(), Tier::kDevice), .stride = stride};
}

Activations Side::RoomRows(int64_t rows, int64_t columns, int64_t padding) {
  return PutRows({}, rows, columns, padding);
}

std::vector<float> Side::GetRows(const Activations& from, int64_t rows, int64_t columns) {
  const int64_t size = DTypeBytes(activation_dtype());
  const std::vector<std::byte> bytes =
      Get(static_cast<const std::byte*>(from.data), rows * from.stride * size);
  std::vector<float> values(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* const row = bytes.data() + r * from.stride * size;
    ToFloats(row, activation_dtype(), std::span(values).subspan(r * columns, columns));
    EXPECT_TRUE(std::all_of(row + columns * size, row + from.stride * size,
                            [](std::byte byte) { return byte == std::byte{0xff}; }))
        << "something was written behind row " << r;
  }
  return values;
}

// ----------------------------------------------------------------------------------------- running

void Conform(const std::string& operation, int count, const Case& run) {
  constexpr int kReported = 5;
  Sides& sides = TheSides();
  if (sides.subject == nullptr) {
    total->skipped += count;
    std::printf("%s: SKIPPED %d cases: %s\n", operation.c_str(), count, sides.skipped.c_str());
    return;
  }
  count = std::min(count, MostCases());
  int differing = 0;
  for (int seed = 0; seed < count; ++seed) {
    Outcome outcome[2];
    for (int i = 0; i < 2; ++i) {
      Side& side = i == 0 ? *sides.oracle : *sides.subject;
      Random random(MixSeed(static_cast<uint64_t>(seed), operation.size()));
      side.Reset();
      outcome[i] = run(side, random);
    }
    ++total->cases;
    const std::string difference = Difference(outcome[0], outcome[1]);
    if (difference.empty()) continue;
    ++total->differing;
    if (++differing <= kReported) {
      ADD_FAILURE() << operation << " seed " << seed << ": " << outcome[0].shape << ": "
                    << difference;
    }
  }
  std::printf("conformance: %s: %d cases, %d differ\n", operation.c_str(), count, differing);
  EXPECT_EQ(differing, 0);
}

double ActivationEpsilon() { return SubjectHasNarrowActivations() ? 0x1p-8 : 0x1p-24; }

bool SubjectHasNarrowActivations() {
  return TheSides().subject != nullptr && TheSides().subject->activation_dtype() != DType::kF32;
}

// -------------------------------------------------------------------------------------------- data

std::vector<float> ExactFloats(Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = (static_cast<float>(random.Uniform(511)) - 255.0f) / 64.0f;
  }
  return values;
}

const float* PutFrequencies(Side& side, int32_t head_dim) {
  std::vector<float> frequency(static_cast<size_t>(head_dim) / 2);
  for (size_t j = 0; j < frequency.size(); ++j) {
    frequency[j] = std::pow(10000.0f, -2.0f * static_cast<float>(j) / static_cast<float>(head_dim));
  }
  return side.Put(frequency);
}

std::string Join(const std::vector<int32_t>& values) { return absl::StrJoin(values, ","); }

DType PickKvType(Random& random) {
  return Pick(random, {DType::kBf16, DType::kBf16, DType::kBf16, DType::kF16, DType::kF32,
                       DType::kFp8E4m3});
}

View MakeView(Side& side, Random& random, const ViewShape& shape) {
  View made;
  const int64_t rows = static_cast<int64_t>(shape.lengths.size());
  const int64_t width = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t longest =
      std::max<int64_t>(1, *std::max_element(shape.lengths.begin(), shape.lengths.end()));
  const int64_t room = longest + shape.room;
  KvView& view = made.view;
  view.dtype = shape.dtype;
  view.block_size = shape.table ? shape.block_size : static_cast<int32_t>(room);
  const int64_t table_stride = shape.table ? (room + view.block_size - 1) / view.block_size : 1;
  const int64_t blocks = rows * table_stride;
  const int64_t parts = shape.layout >= 2 ? 2 : 1;
  const bool by_head = shape.layout == 0 || shape.layout == 3;
  // From a key to its value, where both are in one pool.
  const int64_t value_distance = (by_head ? view.block_size : int64_t{1}) * shape.head_dim;
  if (by_head) {
    view.token_stride = shape.head_dim;
    view.head_stride = parts * view.block_size * shape.head_dim;
  } else {
    view.head_stride = parts * shape.head_dim;
    view.token_stride = parts * width;
  }
  view.block_stride = parts * view.block_size * width;
  made.elements = blocks * view.block_stride;
  made.joined = parts == 2;

  made.table.resize(static_cast<size_t>(blocks));
  std::iota(made.table.begin(), made.table.end(), 0);
  if (shape.table) {
    random.Shuffle(std::span<int32_t>(made.table));
    for (int64_t row = 0; row < rows; ++row) {
      if (shape.lengths[row] >= 0) continue;
      std::fill_n(made.table.begin() + row * table_stride, table_stride, -1);
    }
    view.block_table = side.Put(made.table);
  }
  view.block_table_stride = static_cast<int32_t>(table_stride);
  std::vector<int32_t> lengths = shape.lengths;
  for (int32_t& length : lengths) length = std::max(length, 0);
  view.length = side.Put(lengths);

  const int64_t size = DTypeBytes(shape.dtype);
  for (int part = 0; part < (shape.with_values ? 2 : 1); ++part) {
    std::vector<std::byte> pool(static_cast<size_t>(made.elements * size), std::byte{0xff});
    const int64_t behind = made.joined && part == 1 ? value_distance : 0;
    if (made.joined && part == 1) {
      // Values are written into the keys' pool.
      pool = side.Get(view.key, made.elements * size);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t t = 0; t < shape.lengths[row]; ++t) {
        const int64_t block = made.table[row * table_stride + t / view.block_size];
        const std::vector<float> values = ExactFloats(random, width);
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
          const int64_t at = block * view.block_stride + t % view.block_size * view.token_stride +
                             h * view.head_stride + behind;
          FromFloats(std::span(values).subspan(h * shape.head_dim, shape.head_dim), shape.dtype,
                     pool.data() + at * size);
        }
      }
    }
    std::byte* const placed = side.Put(pool, shape.tier);
    if (made.joined) {
      view.key = placed;
      view.value = shape.with_values ? placed + value_distance * size : nullptr;
    } else {
      (part == 0 ? view.key : view.value) = placed;
    }
  }
  return made;
}

std::vector<int32_t> PoolBytes(Side& side, const View& view) {
  std::vector<int32_t> bytes;
  const int64_t size = view.elements * DTypeBytes(view.view.dtype);
  for (std::byte* pool : {view.view.key, view.joined ? nullptr : view.view.value}) {
    if (pool == nullptr) continue;
    for (const std::byte byte : side.Get(pool, size)) bytes.push_back(static_cast<int32_t>(byte));
  }
  return bytes;
}

int64_t SlotCount(const View& view, const ViewShape& shape) {
  return static_cast<int64_t>(view.table.size()) * view.view.block_size * shape.kv_heads;
}

int64_t SlotIndex(const View& view, const ViewShape& shape, int64_t row, int64_t slot,
                  int64_t head) {
  const int64_t block =
      view.table[row * view.view.block_table_stride + slot / view.view.block_size];
  return (block * shape.kv_heads + head) * view.view.block_size + slot % view.view.block_size;
}

SlotView MakeSlots(Side& side, const View& view, const ViewShape& shape,
                   const std::vector<int32_t>& values) {
  return {.data = side.Put(values),
          .block_size = view.view.block_size,
          .block_stride = int64_t{view.view.block_size} * shape.kv_heads,
          .head_stride = view.view.block_size,
          .block_table = view.view.block_table,
          .block_table_stride = view.view.block_table_stride};
}

}  // namespace kvsweep
