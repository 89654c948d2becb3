#include "kernels/cpu/operation.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "kernels/cpu/kv_rows.h"

namespace kvsweep::cpu {
namespace {

constexpr std::array<absl::string_view, std::variant_size_v<Operation>> kNames = {
    "Copy",
    "Zero",
    "FillNormal",
    "Embed",
    "Norm",
    "Gemm",
    "SiluGate",
    "Rotary",
    "TakeRows",
    "Argmax",
    "Append",
    "DecodeAttention",
    "PrefillAttention",
    "ColumnSum",
    "PruneHeavy",
    "EvictHeavy",
    "RepeatHeads",
    "ProjectHeads", "RankColumns", "Speculate", "SelectTop", "PlaceTokens", "GatherRows",
    "CopyTile", "CopyBlocks",
    "AllReduce"};

// ------------------------------------------------------------------------------------- arguments

void CheckActivations(const Activations& activations, int64_t rows, int64_t columns) {
  KVSWEEP_CHECK_GE(rows, 0);
  KVSWEEP_CHECK_GT(columns, 0);
  KVSWEEP_CHECK(rows == 0 || activations.data != nullptr);
  KVSWEEP_CHECK(rows <= 1 || activations.stride >= columns)
      << "stride " << activations.stride << " of rows of " << columns;
}

void CheckView(const KvView& view) {
  KVSWEEP_CHECK(view.key != nullptr);
  KVSWEEP_CHECK_GT(view.block_size, 0);
}

void CheckSlotView(const SlotView& view) {
  KVSWEEP_CHECK(view.data != nullptr);
  KVSWEEP_CHECK_GT(view.block_size, 0);
}

void CheckRotation(const KeyRotation& rotation, int32_t head_dim) {
  if (rotation.inverse_frequency == nullptr) return;
  KVSWEEP_CHECK_EQ(head_dim % 2, 0);
  if (rotation.rank.data != nullptr) CheckSlotView(rotation.rank);
}

void CheckHeads(int32_t query_heads, int32_t kv_heads) {
  KVSWEEP_CHECK_GT(kv_heads, 0);
  KVSWEEP_CHECK_GT(query_heads, 0);
  KVSWEEP_CHECK_EQ(query_heads % kv_heads, 0);
}

void CheckPartial(const Activations& out, const PartialAttention& partial, bool accumulate) {
  const bool has_partial = partial.output != nullptr;
  KVSWEEP_CHECK(out.data != nullptr || has_partial) << "neither out nor partial";
  KVSWEEP_CHECK(!has_partial || accumulate || out.data == nullptr) << "both out and partial";
  KVSWEEP_CHECK(!accumulate || has_partial) << "nothing to start from";
  KVSWEEP_CHECK(!has_partial || (partial.maximum != nullptr && partial.sum != nullptr));
}

void Check(const CopyArgs& args) {
  KVSWEEP_CHECK(args.bytes == 0 || (args.target != nullptr && args.source != nullptr));
}
void Check(const ZeroArgs& args) { KVSWEEP_CHECK(args.bytes == 0 || args.target != nullptr); }
void Check(const FillNormalArgs& args) {
  KVSWEEP_CHECK_GE(args.count, 0);
  KVSWEEP_CHECK(args.count == 0 || args.out != nullptr);
}
void Check(const EmbedArgs& args) {
  CheckActivations(args.out, args.rows, args.columns);
  KVSWEEP_CHECK(args.table != nullptr);
  KVSWEEP_CHECK(args.rows == 0 || args.token_id != nullptr);
  KVSWEEP_CHECK(args.rows == 0 || args.position_table == nullptr || args.position != nullptr);
}
void Check(const NormArgs& args) {
  CheckActivations(args.out, args.rows, args.columns);
  CheckActivations(args.in, args.rows, args.columns);
  KVSWEEP_CHECK(args.weight != nullptr);
}
void Check(const GemmArgs& args) {
  CheckActivations(args.out, args.rows, args.out_columns);
  CheckActivations(args.in, args.rows, args.in_columns);
  KVSWEEP_CHECK(args.weight != nullptr);
}
void Check(const SiluGateArgs& args) {
  CheckActivations(args.out, args.rows, args.columns);
  CheckActivations(args.in, args.rows, int64_t{2} * args.columns);
}
void Check(const RotaryArgs& args) {
  CheckActivations(args.data, args.rows, int64_t{args.heads} * args.head_dim);
  KVSWEEP_CHECK_EQ(args.head_dim % 2, 0);
  KVSWEEP_CHECK(args.rows == 0 || (args.position != nullptr && args.inverse_frequency != nullptr));
}
void Check(const TakeRowsArgs& args) {
  CheckActivations(args.out, args.rows, args.columns);
  KVSWEEP_CHECK(args.rows == 0 || (args.in.data != nullptr && args.row != nullptr));
}
void Check(const ArgmaxArgs& args) {
  CheckActivations(args.logits, args.rows, args.columns);
  KVSWEEP_CHECK(args.rows == 0 || (args.token != nullptr && args.target != nullptr));
}
void Check(const AppendArgs& args) {
  CheckView(args.target);
  const int64_t columns = int64_t{args.kv_heads} * args.head_dim;
  CheckActivations(args.key, args.rows, columns);
  if (args.target.value != nullptr) CheckActivations(args.value, args.rows, columns);
  if (args.rotary.data.data != nullptr) Check(args.rotary);
  KVSWEEP_CHECK(args.rows == 0 || (args.table_row != nullptr && args.slot != nullptr));
}
void Check(const DecodeAttentionArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckPartial(args.out, args.partial, args.accumulate);
  CheckActivations(args.query, args.rows, int64_t{args.query_heads} * args.head_dim);
  CheckView(args.view);
  KVSWEEP_CHECK(args.view.value != nullptr);
  CheckRotation(args.rotation, args.head_dim);
  KVSWEEP_CHECK((args.current_key.data == nullptr) == (args.current_value.data == nullptr));
  KVSWEEP_CHECK(args.plan.splits <= 1 || args.plan.split_tokens > 0);
}
void Check(const PrefillAttentionArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckPartial(args.out, args.partial, args.accumulate);
  CheckActivations(args.query, args.rows, int64_t{args.query_heads} * args.head_dim);
  KVSWEEP_CHECK((args.chunk_key.data == nullptr) == (args.chunk_value.data == nullptr));
  KVSWEEP_CHECK_GE(args.history_tokens, 0);
  CheckRotation(args.rotation, args.head_dim);
  if (args.history_tokens > 0) CheckView(args.history);
  KVSWEEP_CHECK(args.history_tokens == 0 || args.history.value != nullptr);
  KVSWEEP_CHECK(args.log_sum_exp == nullptr || args.out.data != nullptr);
}
void Check(const ColumnSumArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckSlotView(args.score);
  CheckView(args.keys);
  CheckActivations(args.query, args.rows, int64_t{args.query_heads} * args.head_dim);
  KVSWEEP_CHECK(args.rows == 0 || args.log_sum_exp != nullptr);
  KVSWEEP_CHECK_GE(args.history_tokens, 0);
  CheckRotation(args.rotation, args.head_dim);
}
void Check(const PruneHeavyArgs& args) {
  CheckView(args.view);
  if (args.score.data != nullptr) CheckSlotView(args.score);
  if (args.position.data != nullptr) CheckSlotView(args.position);
  if (args.rank.data != nullptr) CheckSlotView(args.rank);
  KVSWEEP_CHECK(!args.scoring.mean || args.position.data != nullptr);
  KVSWEEP_CHECK(args.heavy >= 0 && args.recent >= 0 && args.sinks >= 0);
  KVSWEEP_CHECK(args.placed >= 0 && args.placed <= args.tokens);
}
void Check(const EvictHeavyArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckView(args.view);
  if (args.score.data != nullptr) {
    CheckSlotView(args.score);
    CheckSlotView(args.slot_position);
    KVSWEEP_CHECK(args.rows == 0 || args.probability != nullptr);
  }
  if (args.rank.data != nullptr) CheckSlotView(args.rank);
  KVSWEEP_CHECK_GE(args.sinks, 0);
  KVSWEEP_CHECK(args.rows == 0 ||
                (args.position != nullptr && args.heavy != nullptr && args.recent != nullptr));
  CheckActivations(args.key, args.rows, int64_t{args.kv_heads} * args.head_dim);
  CheckActivations(args.value, args.rows, int64_t{args.kv_heads} * args.head_dim);
}
void Check(const RepeatHeadsArgs& args) {
  KVSWEEP_CHECK_GT(args.repeat, 0);
  CheckActivations(args.out, args.rows, int64_t{args.heads} * args.repeat * args.head_dim);
  CheckActivations(args.in, args.rows, int64_t{args.heads} * args.head_dim);
}
void Check(const ProjectHeadsArgs& args) {
  CheckActivations(args.out, args.rows, int64_t{args.heads} * args.out_dim);
  CheckActivations(args.in, args.rows, int64_t{args.heads} * args.in_dim);
  KVSWEEP_CHECK(args.matrix != nullptr);
  KVSWEEP_CHECK_EQ(args.heads % args.group, 0);
  KVSWEEP_CHECK(args.column == nullptr || (args.column_set != nullptr && args.out_dim <= args.in_dim));
}
void Check(const RankColumnsArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckActivations(args.query, args.rows, int64_t{args.query_heads} * args.head_dim);
  CheckActivations(args.key, args.rows, int64_t{args.kv_heads} * args.head_dim);
  KVSWEEP_CHECK(args.column != nullptr && args.matrix != nullptr);
  KVSWEEP_CHECK_LE(args.partial_dim, args.head_dim);
}
void Check(const SpeculateArgs& args) {
  CheckHeads(args.query_heads, args.kv_heads);
  CheckView(args.partial_key);
  CheckActivations(args.query, args.rows, int64_t{args.query_heads} * args.partial_dim);
  KVSWEEP_CHECK(args.rows == 0 || (args.margin != nullptr && args.count != nullptr));
}
void Check(const SelectTopArgs& args) {
  KVSWEEP_CHECK_GT(args.kv_heads, 0);
  KVSWEEP_CHECK(args.rows == 0 ||
                (args.selected != nullptr && args.index != nullptr && args.margin != nullptr &&
                 args.count != nullptr && args.length != nullptr && args.limit != nullptr));
  KVSWEEP_CHECK_EQ(args.use.data != nullptr, args.use_rule != SlotUse::kNone);
  KVSWEEP_CHECK(args.use_rule != SlotUse::kStamp || args.stamp != nullptr);
}
void Check(const PlaceTokensArgs& args) {
  CheckSlotView(args.slot_position);
  KVSWEEP_CHECK(args.rows == 0 || (args.slot != nullptr && args.table_row != nullptr &&
                                   args.position != nullptr && args.planned != nullptr));
  KVSWEEP_CHECK_EQ(args.use.data != nullptr, args.use_rule != SlotUse::kNone);
  KVSWEEP_CHECK(args.decided_rows == 0 || args.capacity != nullptr);
  KVSWEEP_CHECK_LE(args.decided_rows, args.rows);
}
void CheckCopied(const KvView& target, const KvView& source) {
  CheckView(target);
  CheckView(source);
  KVSWEEP_CHECK(target.dtype == source.dtype) << "a copy between views does not convert";
  KVSWEEP_CHECK(target.value == nullptr || source.value != nullptr);
}
void Check(const GatherRowsArgs& args) {
  CheckCopied(args.target, args.source);
  KVSWEEP_CHECK(args.rows == 0 || (args.selected != nullptr && args.index != nullptr));
}
void Check(const CopyTileArgs& args) {
  CheckCopied(args.target, args.source);
  KVSWEEP_CHECK(args.first_token >= 0 && args.tokens >= 0);
}
void Check(const CopyBlocksArgs& args) {
  KVSWEEP_CHECK_GE(args.count, 0);
  KVSWEEP_CHECK(args.count == 0 ||
                (args.target != nullptr && args.source != nullptr && args.pair != nullptr));
  KVSWEEP_CHECK_GT(args.block_bytes, 0);
}
void Check(const AllReduceArgs& args) { CheckActivations(args.data, args.rows, args.columns); }

// ------------------------------------------------------------------------------------------ cost

// Slots that the view's active rows hold, summed over rows and KV heads.
int64_t Entries(const KvView& view, const int32_t* row_active, int32_t rows, int32_t kv_heads) {
  int64_t entries = 0;
  for (int32_t row = 0; row < rows; ++row) {
    if (!IsActive(row_active, row)) continue;
    for (int32_t head = 0; head < kv_heads; ++head) entries += KvLength(view, row, head);
  }
  return entries;
}

int64_t ActiveRows(const int32_t* row_active, int32_t rows) {
  if (row_active == nullptr) return rows;
  return std::count_if(row_active, row_active + rows, [](int32_t active) { return active != 0; });
}

struct CostReader {
  const MemoryMap& memory;
  const double element_bytes;

  bool OnHost(const void* pointer) const { return memory.TierOf(pointer) == Tier::kHost; }

  OperationCost operator()(const CopyArgs& args) const {
    if (args.bytes == 0) return {};
    const bool from_host = OnHost(args.source);
    const bool to_host = OnHost(args.target);
    return {CopyCost(args.bytes, from_host, to_host), to_host};
  }
  OperationCost operator()(const ZeroArgs& args) const { return {ZeroCost(args.bytes)}; }
  OperationCost operator()(const FillNormalArgs& args) const {
    return {ZeroCost(static_cast<uint64_t>(args.count * DTypeBytes(args.dtype)))};
  }
  OperationCost operator()(const EmbedArgs& args) const { return {EmbedCost(args, element_bytes)}; }
  OperationCost operator()(const NormArgs& args) const { return {NormCost(args, element_bytes)}; }
  OperationCost operator()(const GemmArgs& args) const { return {GemmCost(args, element_bytes)}; }
  OperationCost operator()(const SiluGateArgs& args) const {
    return {SiluGateCost(args, element_bytes)};
  }
  OperationCost operator()(const RotaryArgs& args) const {
    return {RotaryCost(args, element_bytes)};
  }
  OperationCost operator()(const TakeRowsArgs& args) const {
    return {TakeRowsCost(args, element_bytes)};
  }
  OperationCost operator()(const ArgmaxArgs& args) const {
    return {ArgmaxCost(args, element_bytes)};
  }
  OperationCost operator()(const AppendArgs& args) const {
    const int64_t stored = std::count_if(args.table_row, args.table_row + args.rows,
                                         [](int32_t row) { return row >= 0; });
    return {AppendCost(args, stored, element_bytes, OnHost(args.target.key)), true};
  }
  OperationCost operator()(const DecodeAttentionArgs& args) const {
    return {DecodeAttentionCost(args, Entries(args.view, args.row_active, args.rows, args.kv_heads),
                                element_bytes, OnHost(args.view.key))};
  }
  OperationCost operator()(const PrefillAttentionArgs& args) const {
    return {PrefillAttentionCost(args, element_bytes,
                                 args.history_tokens > 0 && OnHost(args.history.key))};
  }
  OperationCost operator()(const ColumnSumArgs& args) const {
    return {ColumnSumCost(args, element_bytes)};
  }
  OperationCost operator()(const PruneHeavyArgs& args) const {
    const bool on_host = OnHost(args.view.key);
    return {PruneHeavyCost(args, on_host), on_host};
  }
  OperationCost operator()(const EvictHeavyArgs& args) const {
    const bool on_host = OnHost(args.view.key);
    int64_t full_rows = 0;
    for (int32_t row = 0; row < args.rows; ++row) {
      full_rows += IsActive(args.row_active, row) &&
                   args.position[row] >= args.heavy[row] + args.recent[row];
    }
    return {EvictHeavyCost(args, Entries(args.view, args.row_active, args.rows, args.kv_heads),
                           ActiveRows(args.row_active, args.rows), full_rows, element_bytes,
                           on_host),
            on_host};
  }
  OperationCost operator()(const RepeatHeadsArgs& args) const {
    return {RepeatHeadsCost(args, element_bytes)};
  }
  OperationCost operator()(const ProjectHeadsArgs& args) const {
    return {ProjectHeadsCost(args, element_bytes)};
  }
  OperationCost operator()(const RankColumnsArgs& args) const {
    return {RankColumnsCost(args, element_bytes)};
  }
  OperationCost operator()(const PlaceTokensArgs& args) const {
    int64_t entries = 0;
    for (int32_t row = 0; row < args.decided_rows; ++row) {
      if (args.table_row[row] >= 0 && args.position[row] >= args.capacity[row]) {
        entries += int64_t{args.capacity[row]} * args.kv_heads;
      }
    }
    return {PlaceTokensCost(args, entries)};
  }
  OperationCost operator()(const SpeculateArgs& args) const {
    return {SpeculateCost(
        args, Entries(args.partial_key, args.row_active, args.rows, args.kv_heads), element_bytes)};
  }
  OperationCost operator()(const SelectTopArgs& args) const {
    int64_t entries = 0;
    for (int32_t row = 0; row < args.rows; ++row) {
      if (IsActive(args.row_active, row)) entries += int64_t{args.length[row]} * args.kv_heads;
    }
    return {SelectTopCost(args, entries)};
  }
  OperationCost operator()(const GatherRowsArgs& args) const {
    int64_t entries = 0;
    for (int32_t row = 0; row < args.rows; ++row) {
      if (!IsActive(args.row_active, row)) continue;
      for (int32_t head = 0; head < args.kv_heads; ++head) {
        entries += args.selected[row * args.kv_heads + head];
      }
    }
    return MoveRows(args.target, args.source, entries, args.head_dim);
  }
  OperationCost operator()(const CopyTileArgs& args) const {
    int64_t entries = 0;
    if (args.row >= 0) {
      entries =
          args.kv_heads * std::clamp<int64_t>(args.row_tokens - args.first_token, 0, args.tokens);
    } else {
      KvView tile = args.source;
      tile.first_token += args.first_token;
      tile.max_tokens = std::min(tile.max_tokens, args.tokens);
      entries = Entries(tile, args.row_active, args.rows, args.kv_heads);
    }
    return MoveRows(args.target, args.source, entries, args.head_dim);
  }
  OperationCost operator()(const CopyBlocksArgs& args) const {
    const bool to_host = OnHost(args.target);
    return {CopyCost(static_cast<uint64_t>(args.count * args.block_bytes), OnHost(args.source), to_host),
            to_host};
  }
  OperationCost operator()(const AllReduceArgs&) const { return {}; }

  OperationCost MoveRows(const KvView& target, const KvView& source, int64_t entries,
                         int32_t head_dim) const {
    const int64_t parts = target.value == nullptr ? 1 : 2;
    const uint64_t bytes =
        static_cast<uint64_t>(entries * parts * head_dim * DTypeBytes(source.dtype));
    const bool to_host = OnHost(target.key);
    return {CopyCost(bytes, OnHost(source.key), to_host), to_host};
  }
};

}  // namespace

absl::string_view OperationName(const Operation& operation) { return kNames[operation.index()]; }

void CheckArguments(const Operation& operation) {
  std::visit([](const auto& args) { Check(args); }, operation);
}

OperationCost CostOf(const Operation& operation, const MemoryMap& memory, double element_bytes) {
  return std::visit(CostReader{memory, element_bytes}, operation);
}

}  // namespace kvsweep::cpu
