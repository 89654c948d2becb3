#include "worker/strategies/catalogue.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/strategies/h2o.h"
#include "worker/strategies/infinigen.h"
#include "worker/strategies/paged.h"

namespace kvsweep {
namespace {

struct Entry {
  const char* name;
  absl::StatusOr<std::unique_ptr<CacheStrategy>> (*make)(const Arm&, const StrategyContext&);
};

constexpr std::array kStrategies = {
    Entry{"paged",
          [](const Arm& arm, const StrategyContext& context) {
            return PagedStrategy::Create(arm.paged(), context);
          }},
    Entry{"h2o",
          [](const Arm& arm, const StrategyContext& context) {
            return H2oStrategy::Create(arm.h2o(), context);
          }},
    Entry{"infinigen",
          [](const Arm& arm, const StrategyContext& context) {
            return InfinigenStrategy::Create(arm.infinigen(), context);
          }},
};

}  // namespace

std::vector<std::string> StrategyNames() {
  std::vector<std::string> names;
  for (const Entry& entry : kStrategies) names.emplace_back(entry.name);
  return names;
}

absl::StatusOr<std::unique_ptr<CacheStrategy>> MakeStrategy(const Arm& arm,
                                                            const StrategyContext& context) {
  for (const Entry& entry : kStrategies) {
    if (arm.strategy() == entry.name) return entry.make(arm, context);
  }
  return absl::InvalidArgumentError(absl::StrCat("strategy: ", arm.strategy(), " is unknown; use ",
                                                 absl::StrJoin(StrategyNames(), ", ")));
}

}  // namespace kvsweep
