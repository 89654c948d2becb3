// Operations that only move numbers, within a tier and between tiers: every byte must be the same.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {
namespace {

// More rows and heads than a kernel counts at a time, a few tokens each.
void MakeWide(Random& random, ViewShape& shape) {
  shape.kv_heads = 8;
  shape.head_dim = 8;
  shape.lengths.resize(300);
  for (int32_t& length : shape.lengths) length = Pick(random, {0, -1, 1, 9, 12});
}

Outcome GatherCase(Side& side, Random& random) {
  ViewShape source_shape;
  source_shape.kv_heads = Pick(random, {1, 2, 8});
  source_shape.head_dim = Pick(random, {5, 8, 40, 64, 128});
  source_shape.block_size = Pick(random, {4, 16, 64});
  source_shape.dtype = PickKvType(random);
  source_shape.layout = Between(random, 0, 3);
  source_shape.tier = random.Bernoulli(0.5) ? Tier::kHost : Tier::kDevice;
  source_shape.lengths = Pick<std::vector<int32_t>>(random, {{1}, {17, 40}, {300, -1, 64}, {900}});
  const bool is_wide = random.Bernoulli(0.03);
  if (is_wide) MakeWide(random, source_shape);
  const View source = MakeView(side, random, source_shape);
  ViewShape target_shape = source_shape;
  target_shape.tier = Tier::kDevice;
  target_shape.block_size = Pick(random, {16, 48});
  target_shape.layout = Pick(random, {0, 1, 3});
  target_shape.table = random.Bernoulli(0.5);
  const int32_t rows = static_cast<int32_t>(source_shape.lengths.size());
  const int32_t kv_heads = source_shape.kv_heads;
  target_shape.lengths.assign(rows, 0);
  target_shape.room = is_wide ? 16 : 256;
  const View target = MakeView(side, random, target_shape);

  GatherRowsArgs args;
  args.target = target.view;
  args.source = source.view;
  args.rows = rows;
  args.kv_heads = kv_heads;
  args.head_dim = source_shape.head_dim;
  args.index_stride = is_wide ? 12 : 200;
  std::vector<int32_t> selected(rows * kv_heads);
  std::vector<int32_t> index(selected.size() * args.index_stride, -1);
  for (int32_t pair = 0; pair < rows * kv_heads; ++pair) {
    const int32_t length = std::max(source_shape.lengths[pair / kv_heads], 0);
    selected[pair] =
        length == 0 ? 0
                    : Between(random, 0, std::min(length, static_cast<int32_t>(args.index_stride)));
    for (int32_t j = 0; j < selected[pair]; ++j) {
      index[pair * args.index_stride + j] = Between(random, 0, length - 1);
    }
    std::sort(index.begin() + pair * args.index_stride,
              index.begin() + pair * args.index_stride + selected[pair]);
  }
  args.selected = side.Put(selected);
  args.index = side.Put(index);
  std::vector<int32_t> active(rows, 1);
  if (random.Bernoulli(0.3)) {
    for (int32_t& flag : active) flag = random.Bernoulli(0.6) ? 1 : 0;
    args.row_active = side.Put(active);
  }
  side.Finish();
  side.backend().GatherRows(args, Stream::kHostToDevice);
  side.Finish();
  Outcome outcome;
  outcome.shape = absl::StrCat("lengths ", Join(source_shape.lengths), " d ", args.head_dim, " ",
                               DTypeName(source_shape.dtype), " active ", Join(active),
                               source_shape.tier == Tier::kHost ? " host" : "");
  outcome.Add("target", PoolBytes(side, target));
  return outcome;
}

Outcome CopyTileCase(Side& side, Random& random) {
  ViewShape source_shape;
  source_shape.kv_heads = Pick(random, {1, 2, 8});
  source_shape.head_dim = Pick(random, {5, 8, 64, 128});
  source_shape.block_size = Pick(random, {4, 16, 64});
  source_shape.dtype = PickKvType(random);
  source_shape.layout = Between(random, 0, 3);
  source_shape.tier = random.Bernoulli(0.5) ? Tier::kHost : Tier::kDevice;
  source_shape.lengths =
      Pick<std::vector<int32_t>>(random, {{1}, {0, 17, 40}, {300, -1, 64}, {500}});
  const bool is_wide = random.Bernoulli(0.03);
  if (is_wide) MakeWide(random, source_shape);
  const View source = MakeView(side, random, source_shape);
  CopyTileArgs args;
  args.first_token = Pick(random, {0, 0, 1, 32, 100});
  args.tokens = Pick(random, {0, 1, 31, 64, 200});
  if (is_wide) args.first_token = Between(random, 0, 3), args.tokens = 12;
  args.rows = static_cast<int32_t>(source_shape.lengths.size());
  args.kv_heads = source_shape.kv_heads;
  args.head_dim = source_shape.head_dim;
  if (random.Bernoulli(0.3)) {
    args.row = static_cast<int32_t>(random.Uniform(args.rows));
    args.row_tokens = std::max(source_shape.lengths[args.row], 0);
  }
  ViewShape target_shape = source_shape;
  target_shape.tier = Tier::kDevice;
  target_shape.block_size = Pick(random, {16, 48});
  target_shape.layout = Pick(random, {0, 1, 3});
  target_shape.table = random.Bernoulli(0.5);
  target_shape.lengths.assign(args.rows, 0);
  target_shape.room = is_wide ? 16 : 256;
  const View target = MakeView(side, random, target_shape);
  args.target = target.view;
  args.source = source.view;
  std::vector<int32_t> active(args.rows, 1);
  if (random.Bernoulli(0.3)) {
    for (int32_t& flag : active) flag = random.Bernoulli(0.6) ? 1 : 0;
    args.row_active = side.Put(active);
  }
  side.Finish();
  side.backend().CopyTile(args, Stream::kHostToDevice);
  side.Finish();
  Outcome outcome;
  outcome.shape = absl::StrCat("lengths ", Join(source_shape.lengths), " first ", args.first_token,
                               " tokens ", args.tokens, " row ", args.row, " d ", args.head_dim,
                               " ", DTypeName(source_shape.dtype), " active ", Join(active));
  outcome.Add("target", PoolBytes(side, target));
  return outcome;
}

Outcome AppendCase(Side& side, Random& random) {
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 8});
  shape.head_dim = Pick(random, {5, 8, 40, 64, 128});
  shape.block_size = Pick(random, {4, 16, 64});
  shape.dtype = PickKvType(random);
  shape.layout = Between(random, 0, 3);
  shape.with_values = shape.layout >= 2 || random.Bernoulli(0.8);
  shape.tier = random.Bernoulli(0.3) ? Tier::kHost : Tier::kDevice;
  shape.lengths = {0, 20, -1, 64};
  shape.room = 70;
  const View view = MakeView(side, random, shape);
  AppendArgs args;
  args.target = view.view;
  args.rows = Pick(random, {1, 2, 33, 64});
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  std::vector<int32_t> table_row(args.rows);
  std::vector<int32_t> slot(args.rows);
  for (int32_t t = 0; t < args.rows; ++t) {
    table_row[t] = Pick(random, {0, 1, 3, -1});
    slot[t] = t;  // no two tokens in one place
  }
  const int64_t width = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.key = side.PutRows(ExactFloats(random, args.rows * width), args.rows, width, padding);
  args.value = side.PutRows(ExactFloats(random, args.rows * width), args.rows, width, padding);
  args.slot_by_head = random.Bernoulli(0.2);
  if (args.slot_by_head) {
    std::vector<int32_t> by_head;
    for (const int32_t s : slot) {
      for (int32_t h = 0; h < shape.kv_heads; ++h) by_head.push_back((s + h) % 64);
    }
    slot = by_head;
  }
  args.table_row = side.Put(table_row);
  args.slot = side.Put(slot);
  side.Finish();
  side.backend().Append(args, Stream::kDeviceToHost);
  side.Finish();
  Outcome outcome;
  outcome.shape = absl::StrCat("rows ", args.rows, " Hk ", shape.kv_heads, " d ", shape.head_dim,
                               " ", DTypeName(shape.dtype), " layout ", shape.layout,
                               shape.tier == Tier::kHost ? " host" : "");
  outcome.Add("pool", PoolBytes(side, view));
  return outcome;
}

// All elements of the pools, slots that hold nothing too.
std::vector<float> PoolFloats(Side& side, const View& view) {
  std::vector<float> values;
  const int64_t bytes = view.elements * DTypeBytes(view.view.dtype);
  for (std::byte* pool : {view.view.key, view.joined ? nullptr : view.view.value}) {
    if (pool == nullptr) continue;
    const std::vector<std::byte> elements = side.Get(pool, bytes);
    std::vector<float> widened(static_cast<size_t>(view.elements));
    ToFloats(elements.data(), view.view.dtype, widened);
    values.insert(values.end(), widened.begin(), widened.end());
  }
  return values;
}

// The same for an outcome, where keys have been turned: one may fall on the other side of a
// rounding, and is a place away then.
void AddTurnedPool(Outcome& outcome, Side& side, const View& view) {
  const DType dtype = view.view.dtype;
  const double place = dtype == DType::kF32    ? 0x1p-23
                       : dtype == DType::kBf16 ? 0x1p-7
                       : dtype == DType::kF16  ? 0x1p-10
                                               : 0x1p-3;
  const double least = dtype == DType::kFp8E4m3 ? 0x1p-9 : 8e-6;
  outcome.Add("pool", PoolFloats(side, view), least, ActivationEpsilon() + place);
}

// Rows of queries, keys and values side by side.
struct HeadRows {
  Activations query;
  Activations key;
  Activations value;
};
HeadRows PutHeadRows(Side& side, Random& random, int32_t rows, int64_t query_width,
                     int64_t key_width) {
  const int64_t width = query_width + 2 * key_width;
  const Activations row =
      side.PutRows(ExactFloats(random, rows * width), rows, width, Pick<int64_t>(random, {3, 8}));
  const auto columns = [&](int64_t first) {
    const int64_t bytes = first * DTypeBytes(side.activation_dtype());
    return Activations{static_cast<std::byte*>(row.data) + bytes, row.stride};
  };
  return {row, columns(query_width), columns(query_width + key_width)};
}

// Queries and keys side by side, turned and then stored; or rows turned that have nothing to do
// with what is stored.
Outcome RotateAndAppendCase(Side& side, Random& random) {
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 8});
  shape.head_dim = Pick(random, {2, 8, 40, 64, 128});
  shape.block_size = Pick(random, {4, 16, 64});
  shape.dtype = PickKvType(random);
  shape.layout = Between(random, 0, 3);
  shape.tier = random.Bernoulli(0.1) ? Tier::kHost : Tier::kDevice;
  shape.lengths = {0, 20, -1, 64};
  shape.room = 70;
  const View view = MakeView(side, random, shape);
  const int32_t rows = Pick(random, {1, 2, 33, 64, 65});
  const int32_t query_heads = shape.kv_heads * Pick(random, {1, 2, 4, 7});
  const int64_t key_width = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t query_width = int64_t{query_heads} * shape.head_dim;
  const int64_t width = query_width + 2 * key_width;
  std::vector<int32_t> position(rows);
  std::vector<int32_t> table_row(rows);
  std::vector<int32_t> slot(rows);
  for (int32_t t = 0; t < rows; ++t) {
    position[t] = Between(random, 0, 4000);
    table_row[t] = Pick(random, {0, 1, 3, -1});
    slot[t] = t;
  }
  const HeadRows row = PutHeadRows(side, random, rows, query_width, key_width);
  AppendArgs args;
  args.target = view.view;
  args.key = row.key;
  args.value = row.value;
  args.table_row = side.Put(table_row);
  args.slot = side.Put(slot);
  args.rows = rows;
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  const bool queries_alone = random.Bernoulli(0.1);
  args.rotary = {.data = row.query,
                 .position = side.Put(position),
                 .inverse_frequency = PutFrequencies(side, shape.head_dim),
                 .rows = rows,
                 .heads = queries_alone ? query_heads : query_heads + shape.kv_heads,
                 .head_dim = shape.head_dim};
  side.Finish();
  side.backend().Append(args, Stream::kDeviceToHost);
  side.Finish();
  Outcome outcome;
  outcome.shape =
      absl::StrCat("rows ", rows, " heads ", query_heads, "/", shape.kv_heads, " d ",
                   shape.head_dim, " ", DTypeName(shape.dtype), " layout ", shape.layout,
                   shape.tier == Tier::kHost ? " host" : "", queries_alone ? " queries alone" : "");
  outcome.Add("row", side.GetRows(row.query, rows, width), 8e-6, ActivationEpsilon());
  AddTurnedPool(outcome, side, view);
  return outcome;
}

// A decode step's own tokens: turned, stored and attended to behind what is stored.
Outcome AppendAndAttendCase(Side& side, Random& random) {
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 8});
  shape.head_dim = Pick(random, {8, 64, 64, 80, 128, 128, 128});
  shape.block_size = Pick(random, {4, 16, 16, 64});
  shape.dtype = Pick(random, {DType::kBf16, DType::kBf16, DType::kBf16, PickKvType(random)});
  shape.layout = Between(random, 0, 3);
  shape.tier = random.Bernoulli(0.05) ? Tier::kHost : Tier::kDevice;
  shape.lengths = Pick<std::vector<int32_t>>(
      random, {{0}, {1}, {15, 16, 17}, {63, 64, 65}, {5, -1, 33, 0}, {200, 3}, {700, 129, 256}});
  shape.room = 2;
  const View view = MakeView(side, random, shape);
  const auto rows = static_cast<int32_t>(shape.lengths.size());
  const int32_t query_heads = shape.kv_heads * Pick(random, {1, 2, 4, 7, 8, 16});
  const int64_t key_width = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t query_width = int64_t{query_heads} * shape.head_dim;
  std::vector<int32_t> position(rows);
  std::vector<int32_t> table_row(rows);
  std::vector<int32_t> slot(rows);
  std::vector<int32_t> active(rows);
  for (int32_t t = 0; t < rows; ++t) {
    position[t] = Between(random, 0, 4000);
    slot[t] = std::max(shape.lengths[t], 0);
    active[t] = shape.lengths[t] >= 0 && random.Bernoulli(0.9) ? 1 : 0;
    table_row[t] = active[t] != 0 ? t : -1;
  }
  const HeadRows row = PutHeadRows(side, random, rows, query_width, key_width);
  AppendAndAttendArgs args;
  args.append = {.target = view.view,
                 .key = row.key,
                 .value = row.value,
                 .table_row = side.Put(table_row),
                 .slot = side.Put(slot),
                 .rows = rows,
                 .kv_heads = shape.kv_heads,
                 .head_dim = shape.head_dim};
  const bool turns = random.Bernoulli(0.8);
  const RotaryArgs rotary = {.data = row.query,
                             .position = side.Put(position),
                             .inverse_frequency = PutFrequencies(side, shape.head_dim),
                             .rows = rows,
                             .heads = query_heads + shape.kv_heads,
                             .head_dim = shape.head_dim};
  if (turns) args.append.rotary = rotary;
  const Activations out = side.RoomRows(rows, query_width, Pick<int64_t>(random, {3, 8}));
  args.attention = {.out = out,
                    .query = row.query,
                    .current_key = args.append.key,
                    .current_value = args.append.value,
                    .view = view.view,
                    .row_active = side.Put(active),
                    .rows = rows,
                    .query_heads = query_heads,
                    .kv_heads = shape.kv_heads,
                    .head_dim = shape.head_dim,
                    .scale = 0.125f / std::sqrt(static_cast<float>(shape.head_dim))};
  args.attention.plan = Pick<AttentionPlan>(random, {{1, 0}, {1, 0}, {2, 64}, {3, 128}, {7, 16}});
  side.Finish();
  side.backend().AppendAndAttend(args, Stream::kCompute);
  side.Finish();
  Outcome outcome;
  outcome.shape =
      absl::StrCat("Hq ", query_heads, " Hk ", shape.kv_heads, " d ", shape.head_dim, " ",
                   DTypeName(shape.dtype), " block ", shape.block_size, " layout ", shape.layout,
                   " lengths ", Join(shape.lengths), " active ", Join(active), " splits ",
                   args.attention.plan.splits, "x", args.attention.plan.split_tokens,
                   turns ? "" : " not turned", shape.tier == Tier::kHost ? " host" : "");
  // Values are 4 at most; a turned key's and query's rounding moves a score by some 0.001.
  outcome.Add("out", side.GetRows(out, rows, query_width), 4 * (4 * ActivationEpsilon() + 2e-3),
              ActivationEpsilon());
  AddTurnedPool(outcome, side, view);
  return outcome;
}

Outcome CopyBlocksCase(Side& side, Random& random) {
  CopyBlocksArgs args;
  args.block_bytes = Pick<int64_t>(random, {16, 48, 4096, 100000});
  args.block_bytes = args.block_bytes / 16 * 16;
  const int32_t blocks = 12;
  const Tier source_tier = random.Bernoulli(0.4) ? Tier::kHost : Tier::kDevice;
  const Tier target_tier = random.Bernoulli(0.4) ? Tier::kHost : Tier::kDevice;
  std::vector<int32_t> bytes(blocks * args.block_bytes / 4);
  for (int32_t& word : bytes) word = static_cast<int32_t>(random.Next64());
  args.source = reinterpret_cast<std::byte*>(side.Put(bytes, source_tier));
  int32_t* const target = side.Room<int32_t>(static_cast<int64_t>(bytes.size()), target_tier);
  args.target = reinterpret_cast<std::byte*>(target);
  args.count = Between(random, 0, blocks);
  std::vector<int32_t> order(blocks);
  for (int32_t i = 0; i < blocks; ++i) order[i] = i;
  random.Shuffle(std::span<int32_t>(order));
  std::vector<int32_t> pair;
  for (int32_t i = 0; i < args.count; ++i) {
    pair.push_back(Between(random, 0, blocks - 1));
    pair.push_back(order[i]);
  }
  args.pair = side.Put(pair);
  side.backend().CopyBlocks(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("bytes ", args.block_bytes, " count ", args.count);
  outcome.Add("target", side.Get(target, static_cast<int64_t>(bytes.size())));
  return outcome;
}

Outcome RepeatCase(Side& side, Random& random) {
  RepeatHeadsArgs args;
  args.repeat = Pick(random, {1, 2, 3, 4, 8});
  args.heads = Pick(random, {1, 2, 5});
  args.head_dim = Pick(random, {5, 8, 64, 128});
  args.rows = Pick(random, {1, 2, 33});
  const int64_t width = int64_t{args.heads} * args.head_dim;
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.in = side.PutRows(ExactFloats(random, args.rows * width), args.rows, width, padding);
  args.out = side.RoomRows(args.rows, width * args.repeat, padding);
  side.backend().RepeatHeads(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("repeat ", args.repeat, " heads ", args.heads, " d ", args.head_dim);
  outcome.Add("out", side.GetRows(args.out, args.rows, width * args.repeat), 0, 0);
  return outcome;
}

TEST(Conformance, GatherRows) { Conform("GatherRows", 300, GatherCase); }
TEST(Conformance, CopyTile) { Conform("CopyTile", 250, CopyTileCase); }
TEST(Conformance, Append) { Conform("Append", 250, AppendCase); }
TEST(Conformance, RotateAndAppend) { Conform("RotateAndAppend", 200, RotateAndAppendCase); }
TEST(Conformance, AppendAndAttend) { Conform("AppendAndAttend", 500, AppendAndAttendCase); }
TEST(Conformance, CopyBlocks) { Conform("CopyBlocks", 100, CopyBlocksCase); }
TEST(Conformance, RepeatHeads) { Conform("RepeatHeads", 100, RepeatCase); }

}  // namespace
}  // namespace kvsweep
