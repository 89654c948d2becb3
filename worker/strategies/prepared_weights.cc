#include "worker/strategies/prepared_weights.h"

#include <utility>

#include "base/status_macros.h"

namespace kvsweep {
namespace {

uint64_t BytesOf(const PreparedWeights::Matrix& matrix) {
  return matrix.weight.size() + matrix.bias.size() * sizeof(float);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const PreparedWeights::Matrix>> PreparedWeights::Get(
    const Digest& key, absl::FunctionRef<absl::StatusOr<Matrix>()> make) {
  if (const auto found = kept_.find(key); found != kept_.end()) {
    uses_.splice(uses_.end(), uses_, found->second.place);
    return found->second.matrix;
  }
  ASSIGN_OR_RETURN(Matrix made, make());
  auto matrix = std::make_shared<const Matrix>(std::move(made));
  const uint64_t bytes = BytesOf(*matrix);
  if (bytes > most_bytes_) return matrix;
  while (bytes_ + bytes > most_bytes_) {
    const auto oldest = kept_.find(uses_.front());
    bytes_ -= BytesOf(*oldest->second.matrix);
    kept_.erase(oldest);
    uses_.pop_front();
  }
  bytes_ += bytes;
  kept_.emplace(key, Kept{matrix, uses_.insert(uses_.end(), key)});
  return matrix;
}

}  // namespace kvsweep
