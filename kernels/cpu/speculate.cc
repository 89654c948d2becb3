#include <algorithm>
#include <limits>

#include "base/planted_bug.h"
#include "base/status_macros.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

int64_t WorkspaceBytes(const SpeculateArgs& args) {
  const int group = args.query_heads / args.kv_heads;
  return Workspace::Padded<float>(group * args.margin_stride) +
         Workspace::Padded<float>(int64_t{kTileTokens} * args.partial_dim) +
         Workspace::Padded<float>(kTileTokens);
}

// One row and KV head with `stored` > 0 tokens: margins of all of them; returns how many exceed
// -alpha.
int32_t Margins(const SpeculateArgs& args, int64_t row, int64_t kv_head, int64_t stored,
                Workspace& workspace) {
  const int group = args.query_heads / args.kv_heads;
  const int d = args.partial_dim;
  float* const scores = workspace.Take<float>(group * args.margin_stride);  // [g, margin_stride]
  float* const key = workspace.Take<float>(int64_t{kTileTokens} * d);
  float* const tile = workspace.Take<float>(kTileTokens);
  const KeyRange keys{.view = &args.partial_key, .row = row, .head = kv_head, .stored = stored};
  for (int64_t first = 0; first < stored; first += kTileTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTileTokens, stored - first));
    keys.Load(key, nullptr, first, tokens, d);
    for (int q = 0; q < group; ++q) {
      const float* const query = Row(args.query, row) + (kv_head * group + q) * d;
      DotRow(tile, query, key, d, d, (tokens + 7) / 8 * 8);
      std::copy_n(tile, tokens, scores + q * args.margin_stride + first);
    }
  }

  float* const margin = args.margin + (row * args.kv_heads + kv_head) * args.margin_stride;
  std::fill_n(margin, stored, -std::numeric_limits<float>::infinity());
  for (int q = 0; q < group; ++q) {
    const float* const score = scores + q * args.margin_stride;
    const float* const row_of = BugPlanted("threshold_of_another_head") ? scores : score;
    const float highest = *std::max_element(row_of, row_of + stored);
    for (int64_t t = 0; t < stored; ++t) margin[t] = std::max(margin[t], score[t] - highest);
  }
  int32_t count = 0;
  for (int64_t t = 0; t < stored; ++t) count += margin[t] > -args.alpha ? 1 : 0;
  return count;
}

}  // namespace

absl::Status Run(const SpeculateArgs& args, Context& context) {
  RETURN_IF_ERROR(
      CheckLengths("partial_key", args.partial_key, args.row_active, args.rows, args.kv_heads));
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = pair / args.kv_heads;
    if (IsActive(args.row_active, row) &&
        KvLength(args.partial_key, row, pair % args.kv_heads) > args.margin_stride) {
      return absl::InvalidArgumentError("more tokens than margin_stride");
    }
  }
  context.ReserveWorkers(WorkspaceBytes(args));
  context.pool.For(pairs, [&](int64_t pair, int worker) {
    const int64_t row = pair / args.kv_heads;
    const int64_t kv_head = pair % args.kv_heads;
    const int64_t stored =
        IsActive(args.row_active, row) ? KvLength(args.partial_key, row, kv_head) : 0;
    context.worker[worker].Reset(WorkspaceBytes(args));
    args.count[pair] =
        stored == 0 ? 0 : Margins(args, row, kv_head, stored, context.worker[worker]);
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
