// The strategies that there are. Adding one: its file pair, its message in experiment.proto, its
// line in catalogue.cc.
#ifndef KVSWEEP_WORKER_STRATEGIES_CATALOGUE_H_
#define KVSWEEP_WORKER_STRATEGIES_CATALOGUE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

// Names as in the `strategy` field of an arm.
std::vector<std::string> StrategyNames();

// Builds the arm's strategy; its parameters have their defaults filled in. InvalidArgument for an
// unknown name or parameters that the model cannot have; ResourceExhausted when fixed structures
// exceed the arm's budget or the machine.
absl::StatusOr<std::unique_ptr<CacheStrategy>> MakeStrategy(const Arm& arm,
                                                            const StrategyContext& context);

// The arm's KV manager alone, without a backend: every byte that the strategy will take. Errors of
// the arm as of MakeStrategy.
absl::StatusOr<std::unique_ptr<KvManager>> MakeManager(const Arm& arm, const StrategySizes& sizes);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_CATALOGUE_H_
