#include "kernels/cost.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace kvsweep {
namespace {

constexpr double kIndexBytes = 4;  // token ids, positions, block numbers
constexpr double kScoreBytes = 4;  // scores, margins, probabilities: f32 everywhere

// The GPUs as measured (best of several runs): reads of cold data, one direction of a pinned link,
// bf16 products of 8192^3, one node of a graph. The laptop is two cores of a server, so that
// modelled and real runs of the CPU backend have the same order of magnitude.
const std::vector<DeviceProfile>& Profiles() {
  static const std::vector<DeviceProfile>* const profiles = new std::vector<DeviceProfile>{
      {.name = "h100",
       .device_bytes_per_s = 3.18e12,
       .link_bytes_per_s = 55e9,
       .operations_per_s = 824e12,
       .operation_ns = 800,
       .element_bytes = 2},
      {.name = "h200",
       .device_bytes_per_s = 4.6e12,
       .link_bytes_per_s = 55e9,
       .operations_per_s = 770e12,
       .operation_ns = 500,
       .element_bytes = 2},
      {.name = "laptop",
       .device_bytes_per_s = 20e9,
       .link_bytes_per_s = 8e9,
       .operations_per_s = 100e9,
       .operation_ns = 2000,
       .element_bytes = 4},
  };
  return *profiles;
}

double Product(double a, double b) { return a * b; }
double Product(double a, double b, double c) { return a * b * c; }

// Elements of one stored token of one KV head.
double RowElements(const KvView& view, int32_t head_dim) {
  return view.value == nullptr ? head_dim : 2.0 * head_dim;
}

double RowBytes(const KvView& view, int32_t head_dim) {
  return RowElements(view, head_dim) * static_cast<double>(DTypeBytes(view.dtype));
}

}  // namespace

Cost& Cost::operator+=(const Cost& other) {
  device_bytes += other.device_bytes;
  link_bytes += other.link_bytes;
  operations += other.operations;
  return *this;
}

absl::StatusOr<DeviceProfile> FindDeviceProfile(absl::string_view name) {
  for (const DeviceProfile& profile : Profiles()) {
    if (profile.name == name) return profile;
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown device profile \"", name,
                                                 "\"; known are ",
                                                 absl::StrJoin(DeviceProfileNames(), ", ")));
}

std::vector<std::string> DeviceProfileNames() {
  std::vector<std::string> names;
  for (const DeviceProfile& profile : Profiles()) names.push_back(profile.name);
  return names;
}

double DurationNs(const Cost& cost, const DeviceProfile& profile) {
  const double seconds = std::max({cost.device_bytes / profile.device_bytes_per_s,
                                   cost.link_bytes / profile.link_bytes_per_s,
                                   cost.operations / profile.operations_per_s});
  return seconds * 1e9 + profile.operation_ns;
}

Cost CopyCost(uint64_t bytes, bool from_host, bool to_host) {
  const double moved = static_cast<double>(bytes);
  const int device_ends = (from_host ? 0 : 1) + (to_host ? 0 : 1);
  return {.device_bytes = device_ends * moved, .link_bytes = from_host != to_host ? moved : 0};
}

Cost ZeroCost(uint64_t bytes) { return {.device_bytes = static_cast<double>(bytes)}; }

Cost EmbedCost(const EmbedArgs& args, double element_bytes) {
  const double tables = args.position_table == nullptr ? 1 : 2;
  return {.device_bytes = Product(args.rows, args.columns) * (1 + tables) * element_bytes +
                          args.rows * kIndexBytes};
}

Cost NormCost(const NormArgs& args, double element_bytes) {
  const double elements = Product(args.rows, args.columns);
  return {.device_bytes = (2 * elements + args.columns) * element_bytes,
          .operations = 4 * elements};
}

Cost GemmCost(const GemmArgs& args, double element_bytes) {
  const double weights = Product(args.out_columns, args.in_columns);
  const double out = Product(args.rows, args.out_columns) * (args.accumulate ? 2 : 1);
  const double in = Product(args.rows, args.in_columns);
  return {.device_bytes = (weights + out + in) * element_bytes,
          .operations = 2 * weights * args.rows};
}

Cost SiluGateCost(const SiluGateArgs& args, double element_bytes) {
  const double elements = Product(args.rows, args.columns);
  return {.device_bytes = 3 * elements * element_bytes, .operations = 4 * elements};
}

Cost RotaryCost(const RotaryArgs& args, double element_bytes) {
  const double elements = Product(args.rows, args.heads, args.head_dim);
  return {.device_bytes = 2 * elements * element_bytes + args.rows * kIndexBytes,
          .operations = 3 * elements};
}

Cost TakeRowsCost(const TakeRowsArgs& args, double element_bytes) {
  return {.device_bytes = 2 * Product(args.rows, args.columns) * element_bytes};
}

Cost ArgmaxCost(const ArgmaxArgs& args, double element_bytes) {
  const double elements = Product(args.rows, args.columns);
  return {.device_bytes = elements * element_bytes, .operations = elements};
}

Cost AppendCost(const AppendArgs& args, int64_t stored, double element_bytes, bool host_target) {
  const double rows = Product(static_cast<double>(stored), args.kv_heads);
  const double read = rows * RowElements(args.target, args.head_dim) * element_bytes;
  const double written = rows * RowBytes(args.target, args.head_dim);
  Cost cost = host_target ? Cost{.device_bytes = read, .link_bytes = written}
                          : Cost{.device_bytes = read + written};
  if (args.rotary.data.data != nullptr) cost += RotaryCost(args.rotary, element_bytes);
  return cost;
}

Cost DecodeAttentionCost(const DecodeAttentionArgs& args, int64_t entries, double element_bytes,
                         bool host_view) {
  const double group = static_cast<double>(args.query_heads) / args.kv_heads;
  const double stored = static_cast<double>(entries) * RowBytes(args.view, args.head_dim);
  double moved = 2 * Product(args.rows, args.query_heads, args.head_dim) * element_bytes;
  if (args.current_key.data != nullptr) {
    moved += 2 * Product(args.rows, args.kv_heads, args.head_dim) * element_bytes;
  }
  if (args.probability != nullptr) moved += static_cast<double>(entries) * group * kScoreBytes;
  return {.device_bytes = moved + (host_view ? 0 : stored),
          .link_bytes = host_view ? stored : 0,
          .operations = 4 * static_cast<double>(entries) * group * args.head_dim};
}

Cost PrefillAttentionCost(const PrefillAttentionArgs& args, double element_bytes,
                          bool host_history) {
  const double rows = args.rows;
  const double own = args.chunk_key.data == nullptr ? 0 : rows;
  const double pairs = rows * args.history_tokens + own * (own + 1) / 2;  // per query head
  const double stored =
      Product(args.history_tokens, args.kv_heads) * RowBytes(args.history, args.head_dim);
  const double moved = 2 * Product(rows, args.query_heads, args.head_dim) * element_bytes +
                       2 * Product(own, args.kv_heads, args.head_dim) * element_bytes;
  return {.device_bytes = moved + (host_history ? 0 : stored),
          .link_bytes = host_history ? stored : 0,
          .operations = 4 * pairs * args.query_heads * args.head_dim};
}

Cost ColumnSumCost(const ColumnSumArgs& args, double element_bytes) {
  const double rows = args.rows;
  const double total = rows + args.history_tokens;
  const double end =
      std::min<double>(total, static_cast<double>(args.keys.first_token) + args.keys.max_tokens);
  const double columns = std::max(0.0, end - args.keys.first_token);
  // Columns of the history are seen by every row, the chunk's own by half of them.
  const double own =
      std::clamp(end - std::max<double>(args.history_tokens, args.keys.first_token), 0.0, columns);
  const double pairs = rows * (columns - own) + own * (rows + 1) / 2;
  const double keys =
      columns * args.kv_heads * args.head_dim * static_cast<double>(DTypeBytes(args.keys.dtype));
  return {.device_bytes = keys + Product(rows, args.query_heads, args.head_dim) * element_bytes +
                          2 * columns * args.kv_heads * kScoreBytes,
          .operations = 2 * pairs * args.query_heads * args.head_dim};
}

Cost PruneHeavyCost(const PruneHeavyArgs& args, bool host_view) {
  const int64_t kept = int64_t{args.heavy} + args.recent;
  if (args.tokens <= kept) return {};
  const double scan =
      args.score.data == nullptr ? 0 : Product(args.tokens, args.kv_heads) * kScoreBytes;
  const double entries = static_cast<double>(kept) * args.kv_heads;
  const double rows = entries * RowBytes(args.view, args.head_dim);
  const double numbers = entries * (kScoreBytes + kIndexBytes);
  return {.device_bytes = scan + 2 * (numbers + (host_view ? 0 : rows)),
          .link_bytes = host_view ? rows : 0};
}

Cost EvictHeavyCost(const EvictHeavyArgs& args, int64_t entries, int64_t active_rows,
                    int64_t full_rows, double element_bytes, bool host_view) {
  const double group = static_cast<double>(args.query_heads) / args.kv_heads;
  const double scores =
      args.score.data == nullptr ? 0 : static_cast<double>(entries) * kScoreBytes * (2 + group);
  // One row is written for each head, and at most one copied where the budget is full.
  const double written = static_cast<double>(active_rows) * args.kv_heads;
  const double copied =
      args.score.data == nullptr ? 0 : static_cast<double>(full_rows) * args.kv_heads;
  const double row_bytes = RowBytes(args.view, args.head_dim);
  const double read = written * RowElements(args.view, args.head_dim) * element_bytes;
  const double moved = host_view ? 0 : (written + 2 * copied) * row_bytes;
  return {.device_bytes = scores + read + moved,
          .link_bytes = host_view ? (written + copied) * row_bytes : 0,
          .operations = static_cast<double>(entries) * (group + 1)};
}

Cost RepeatHeadsCost(const RepeatHeadsArgs& args, double element_bytes) {
  return {.device_bytes =
              Product(args.rows, args.heads, args.head_dim) * (1 + args.repeat) * element_bytes};
}

Cost ProjectHeadsCost(const ProjectHeadsArgs& args, double element_bytes) {
  const double vectors = Product(args.rows, args.heads);
  const double matrices =
      static_cast<double>(args.heads / args.group) * Product(args.in_dim, args.out_dim);
  return {.device_bytes = (vectors * (args.in_dim + args.out_dim) + matrices) * element_bytes,
          .operations = 2 * vectors * Product(args.in_dim, args.out_dim)};
}

Cost RankColumnsCost(const RankColumnsArgs& args, double element_bytes) {
  const double vectors = Product(args.rows, args.query_heads + args.kv_heads);
  const double matrices = Product(args.kv_heads, args.head_dim, args.head_dim) * sizeof(float);
  return {.device_bytes = vectors * args.head_dim * element_bytes + matrices,
          .operations = 2 * vectors * Product(args.head_dim, args.head_dim)};
}

Cost SpeculateCost(const SpeculateArgs& args, int64_t entries, double element_bytes) {
  const double group = static_cast<double>(args.query_heads) / args.kv_heads;
  const double keys = static_cast<double>(entries) * RowBytes(args.partial_key, args.partial_dim);
  // Scores are written once and read twice: for their maximum and for the margins.
  const double scores = static_cast<double>(entries) * kScoreBytes * (3 * group + 1);
  return {.device_bytes = keys + scores +
                          Product(args.rows, args.query_heads, args.partial_dim) * element_bytes,
          .operations = 2 * static_cast<double>(entries) * group * args.partial_dim};
}

Cost SelectTopCost(const SelectTopArgs&, int64_t entries) {
  return {.device_bytes = static_cast<double>(entries) * kScoreBytes,
          .operations = static_cast<double>(entries)};
}

Cost PlaceTokensCost(const PlaceTokensArgs& args, int64_t entries) {
  // Position and use of each slot looked at; both of each slot taken, and its number.
  const double read = static_cast<double>(entries) * 2 * sizeof(int32_t);
  return {.device_bytes = read + Product(args.rows, args.kv_heads) * 3 * sizeof(int32_t),
          .operations = static_cast<double>(entries)};
}

}  // namespace kvsweep
