// The least that an operation must do: bytes it has to read and write on the device, bytes it has
// to move over the host link, and floating-point operations. Every measurement has its distance
// from this floor, and modelled time is made of it.
#ifndef KVSWEEP_KERNELS_COST_H_
#define KVSWEEP_KERNELS_COST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace kvsweep {

struct Cost {
  double device_bytes = 0;  // read plus written
  double link_bytes = 0;    // over the host link, one direction
  double operations = 0;    // floating-point

  Cost& operator+=(const Cost& other);
};

// What a machine can carry, as measured on it.
struct DeviceProfile {
  std::string name;
  double device_bytes_per_s = 0;
  double link_bytes_per_s = 0;
  double operations_per_s = 0;
  double operation_ns = 0;   // fixed cost of one operation inside a graph
  double element_bytes = 2;  // bytes of a weight or activation on that machine
};

// The profile of that name ("h100", "h200", "laptop"); InvalidArgument naming the known ones.
absl::StatusOr<DeviceProfile> FindDeviceProfile(absl::string_view name);
std::vector<std::string> DeviceProfileNames();

// Nanoseconds that an operation of this cost takes: the slowest of its three parts plus the fixed
// cost.
double DurationNs(const Cost& cost, const DeviceProfile& profile);

// The cost of each operation of the backend: every input read once, every output written once.
// `element_bytes` is the size of a weight or an activation; keys and values have their view's. What
// only the device knows is passed in: `entries` are stored tokens summed over active rows and KV
// heads. An array on the host tier costs link bytes instead of device bytes.
Cost CopyCost(uint64_t bytes, bool from_host, bool to_host);
Cost ZeroCost(uint64_t bytes);
Cost EmbedCost(const EmbedArgs& args, double element_bytes);
Cost NormCost(const NormArgs& args, double element_bytes);
Cost GemmCost(const GemmArgs& args, double element_bytes);
Cost SiluGateCost(const SiluGateArgs& args, double element_bytes);
Cost RotaryCost(const RotaryArgs& args, double element_bytes);
Cost TakeRowsCost(const TakeRowsArgs& args, double element_bytes);
Cost ArgmaxCost(const ArgmaxArgs& args, double element_bytes);
// `stored`: tokens whose table row is not -1.
Cost AppendCost(const AppendArgs& args, int64_t stored, double element_bytes, bool host_target);
Cost DecodeAttentionCost(const DecodeAttentionArgs& args, int64_t entries, double element_bytes,
                         bool host_view);
Cost PrefillAttentionCost(const PrefillAttentionArgs& args, double element_bytes,
                          bool host_history);
Cost ColumnSumCost(const ColumnSumArgs& args, double element_bytes);
// What is written to a view on the host counts as link bytes, not what is moved inside it.
Cost PruneHeavyCost(const PruneHeavyArgs& args, bool host_view);
// `full_rows`: active rows at or over their budget, whose heads each copy at most one row; on the
// host it counts as copied.
Cost EvictHeavyCost(const EvictHeavyArgs& args, int64_t entries, int64_t active_rows,
                    int64_t full_rows, double element_bytes, bool host_view);
Cost RepeatHeadsCost(const RepeatHeadsArgs& args, double element_bytes);
Cost ProjectHeadsCost(const ProjectHeadsArgs& args, double element_bytes);
Cost RankColumnsCost(const RankColumnsArgs& args, double element_bytes);
Cost SpeculateCost(const SpeculateArgs& args, int64_t entries, double element_bytes);
Cost SelectTopCost(const SelectTopArgs& args, int64_t entries);
// `entries`: slots among which a victim was looked for.
Cost PlaceTokensCost(const PlaceTokensArgs& args, int64_t entries);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_COST_H_
