#ifndef KVSWEEP_BASE_IDS_H_
#define KVSWEEP_BASE_IDS_H_

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <utility>

namespace kvsweep {

// A number or name that cannot be mistaken for another kind of number or name. It is made
// explicitly, read with value(), compared and ordered with its own kind, hashed (absl and std), and
// printed as its value.
template <typename Tag, typename T>
class StrongId {
 public:
  using ValueType = T;

  StrongId() = default;
  explicit StrongId(T value) : value_(std::move(value)) {}

  const T& value() const { return value_; }

  friend bool operator==(const StrongId&, const StrongId&) = default;
  friend auto operator<=>(const StrongId&, const StrongId&) = default;

  template <typename H>
  friend H AbslHashValue(H hash, const StrongId& id) {
    return H::combine(std::move(hash), id.value_);
  }
  friend std::ostream& operator<<(std::ostream& out, const StrongId& id) {
    return out << id.value_;
  }

 private:
  T value_{};
};

using ExperimentId = StrongId<struct ExperimentIdTag, uint64_t>;
using RoundId = StrongId<struct RoundIdTag, uint64_t>;
using TrialId = StrongId<struct TrialIdTag, uint64_t>;

// One lease of a round to one slot. Only grows; the fencing token of the store.
using Attempt = StrongId<struct AttemptTag, uint64_t>;

// Position of a measurement among those of its attempt, from 1 without gaps.
using Sequence = StrongId<struct SequenceTag, uint64_t>;

using WorkerId = StrongId<struct WorkerIdTag, std::string>;

// Index of a slot within its worker, from 0.
using SlotIndex = StrongId<struct SlotIndexTag, uint64_t>;

}  // namespace kvsweep

template <typename Tag, typename T>
struct std::hash<kvsweep::StrongId<Tag, T>> {
  size_t operator()(const kvsweep::StrongId<Tag, T>& id) const {
    return std::hash<T>()(id.value());
  }
};

#endif  // KVSWEEP_BASE_IDS_H_
