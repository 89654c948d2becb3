#include "storage/store.h"

#include <array>

namespace kvsweep {
namespace {

constexpr std::array<absl::string_view, 7> kRoundStates = {
    "queued", "running", "done", "served", "failed", "cancelled", "poisoned"};
constexpr std::array<absl::string_view, 3> kAttemptStates = {"open", "accepted", "void"};

}  // namespace

absl::string_view RoundStateName(RoundState state) {
  return kRoundStates[static_cast<size_t>(state)];
}

absl::string_view AttemptStateName(AttemptState state) {
  return kAttemptStates[static_cast<size_t>(state)];
}

}  // namespace kvsweep
