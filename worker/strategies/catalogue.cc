#include "worker/strategies/catalogue.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "worker/strategies/h2o.h"
#include "worker/strategies/h2o_manager.h"
#include "worker/strategies/infinigen.h"
#include "worker/strategies/infinigen_layout.h"
#include "worker/strategies/infinigen_manager.h"
#include "worker/strategies/paged.h"
#include "worker/strategies/streaming_llm.h"

namespace kvsweep {
namespace {

struct Entry {
  const char* name;
  absl::StatusOr<std::unique_ptr<CacheStrategy>> (*make)(const Arm&, const StrategyContext&);
  // Its KV manager alone.
  absl::StatusOr<std::unique_ptr<KvManager>> (*make_manager)(const Arm&, const StrategySizes&);
};

// A manager of the layout that a strategy works out for itself.
template <typename Manager, typename Layout>
absl::StatusOr<std::unique_ptr<KvManager>> ManagerOf(const absl::StatusOr<Layout>& layout) {
  if (!layout.ok()) return layout.status();
  return std::make_unique<Manager>(*layout);
}

constexpr std::array kStrategies = {
    Entry{"paged",
          [](const Arm& arm, const StrategyContext& context) {
            return PagedStrategy::Create(arm.paged(), context);
          },
          [](const Arm& arm,
             const StrategySizes& sizes) -> absl::StatusOr<std::unique_ptr<KvManager>> {
            const absl::StatusOr<PagedLayout> layout = PagedLayoutOf(arm.paged(), sizes);
            if (!layout.ok()) return layout.status();
            return MakePagedManager(*layout);
          }},
    Entry{"h2o",
          [](const Arm& arm, const StrategyContext& context) {
            return H2oStrategy::Create(arm.h2o(), context);
          },
          [](const Arm& arm, const StrategySizes& sizes) {
            return ManagerOf<H2oManager>(H2oLayoutOf(arm.h2o(), sizes));
          }},
    Entry{"infinigen",
          [](const Arm& arm, const StrategyContext& context) {
            return InfinigenStrategy::Create(arm.infinigen(), context);
          },
          [](const Arm& arm, const StrategySizes& sizes) {
            return ManagerOf<InfinigenManager>(InfinigenLayoutOf(arm.infinigen(), sizes));
          }},
    Entry{"streaming_llm",
          [](const Arm& arm, const StrategyContext& context) {
            return StreamingLlmStrategy::Create(arm.streaming_llm(), context);
          },
          [](const Arm& arm, const StrategySizes& sizes) {
            return ManagerOf<H2oManager>(StreamingLlmLayoutOf(arm.streaming_llm(), sizes));
          }},
};

// The arm's entry. InvalidArgument for a name that there is not, or storage that it does not have.
absl::StatusOr<const Entry*> FindEntry(const Arm& arm, const StrategySizes& sizes) {
  if (sizes.kv_dtype == DType::kFp8E4m3 && arm.strategy() != "paged") {
    return absl::InvalidArgumentError(absl::StrCat("kv.dtype: fp8_e4m3 is stored by paged only; ",
                                                   arm.strategy(),
                                                   " needs model, f32, bf16 or f16"));
  }
  for (const Entry& entry : kStrategies) {
    if (arm.strategy() == entry.name) return &entry;
  }
  return absl::InvalidArgumentError(absl::StrCat("strategy: ", arm.strategy(), " is unknown; use ",
                                                 absl::StrJoin(StrategyNames(), ", ")));
}

}  // namespace

std::vector<std::string> StrategyNames() {
  std::vector<std::string> names;
  for (const Entry& entry : kStrategies) names.emplace_back(entry.name);
  return names;
}

absl::StatusOr<std::unique_ptr<CacheStrategy>> MakeStrategy(const Arm& arm,
                                                            const StrategyContext& context) {
  ASSIGN_OR_RETURN(const Entry* entry, FindEntry(arm, context));
  return entry->make(arm, context);
}

absl::StatusOr<std::unique_ptr<KvManager>> MakeManager(const Arm& arm, const StrategySizes& sizes) {
  ASSIGN_OR_RETURN(const Entry* entry, FindEntry(arm, sizes));
  return entry->make_manager(arm, sizes);
}

}  // namespace kvsweep
