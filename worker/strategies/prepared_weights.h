// Weights that strategies compute from a model's own when they are made, kept with the model: the
// next trial of a warm runner does not compute them again.
#ifndef KVSWEEP_WORKER_STRATEGIES_PREPARED_WEIGHTS_H_
#define KVSWEEP_WORKER_STRATEGIES_PREPARED_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "base/digest.h"

namespace kvsweep {

// One thread.
class PreparedWeights {
 public:
  struct Matrix {
    std::vector<std::byte> weight;  // in the backend's weight type
    std::vector<float> bias;
  };

  // Holds at most so many bytes of host memory: those of one arm of a model of 30 billion weights.
  static constexpr uint64_t kMostBytes = uint64_t{2} << 30;
  explicit PreparedWeights(uint64_t most_bytes = kMostBytes) : most_bytes_(most_bytes) {}

  // What `make` returns, or returned when it was asked for this key before. The key names all that
  // it is computed from, but for the model. Forgets those that were not asked for the longest when
  // there is no room, and keeps nothing that is larger than all room.
  absl::StatusOr<std::shared_ptr<const Matrix>> Get(
      const Digest& key, absl::FunctionRef<absl::StatusOr<Matrix>()> make);

  uint64_t bytes() const { return bytes_; }

 private:
  struct Kept {
    std::shared_ptr<const Matrix> matrix;
    std::list<Digest>::iterator place;  // in uses_
  };

  uint64_t most_bytes_;
  uint64_t bytes_ = 0;
  std::map<Digest, Kept> kept_;
  std::list<Digest> uses_;  // the latest last
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PREPARED_WEIGHTS_H_
