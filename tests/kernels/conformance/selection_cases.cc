// InfiniGen's operations: projections of heads, speculation, selection, places in bounded pools.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {
namespace {

Outcome ProjectCase(Side& side, Random& random) {
  ProjectHeadsArgs args;
  args.group = Pick(random, {1, 2, 4, 7});
  const int32_t kv_heads = Pick(random, {1, 2, 4});
  args.heads = args.group * kv_heads;
  args.in_dim = Pick(random, {8, 48, 64, 128});
  args.out_dim = Pick(random, {1, 8, 24, 40});
  args.out_dim = std::min(args.out_dim, args.in_dim);
  args.rows = Pick(random, {1, 2, 7, 8, 9, 33});
  args.scale = Pick(random, {1.0f, 0.125f});
  const bool picked = random.Bernoulli(0.4);
  const int32_t columns = picked ? args.in_dim : args.out_dim;
  args.matrix = side.Put(ExactFloats(random, int64_t{kv_heads} * args.in_dim * columns));
  if (picked) {
    constexpr int32_t kSets = 3;
    args.column_stride = int64_t{kv_heads} * args.out_dim + 5;
    std::vector<int32_t> column(kSets * args.column_stride);
    for (int32_t& c : column) c = Between(random, 0, args.in_dim - 1);
    std::vector<int32_t> set(args.rows);
    for (int32_t& s : set) s = Between(random, -1, kSets - 1);
    args.column = side.Put(column);
    args.column_set = side.Put(set);
  }
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  const int64_t in_width = int64_t{args.heads} * args.in_dim;
  const int64_t out_width = int64_t{args.heads} * args.out_dim;
  args.in = side.PutRows(ExactFloats(random, args.rows * in_width), args.rows, in_width, padding);
  args.out = side.RoomRows(args.rows, out_width, padding);
  side.backend().ProjectHeads(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("heads ", args.heads, " group ", args.group, " ", args.in_dim,
                               " to ", args.out_dim, " rows ", args.rows, picked ? " picked" : "");
  // Products of exact numbers: the sums are exact or nearly so.
  outcome.Add("out", side.GetRows(args.out, args.rows, out_width), args.in_dim * 16 * 0x1p-23,
              ActivationEpsilon());
  return outcome;
}

Outcome RankCase(Side& side, Random& random) {
  RankColumnsArgs args;
  args.kv_heads = Pick(random, {1, 3});
  args.query_heads = args.kv_heads * Pick(random, {1, 2, 4});
  args.head_dim = Pick(random, {8, 48, 64, 128});
  args.partial_dim = Pick(random, {1, 8, 24});
  args.partial_dim = std::min(args.partial_dim, args.head_dim);
  args.rows = Pick(random, {1, 2, 17, 60});
  args.query_alone = random.Bernoulli(0.4) || args.rows == 1;
  const int64_t d = args.head_dim;
  args.matrix = side.Put(ExactFloats(random, args.kv_heads * d * d));
  args.query = side.PutRows(ExactFloats(random, args.rows * args.query_heads * d), args.rows,
                            args.query_heads * d, 3);
  args.key = side.PutRows(ExactFloats(random, args.rows * args.kv_heads * d), args.rows,
                          args.kv_heads * d, 8);
  args.column = side.Room<int32_t>(int64_t{args.kv_heads} * args.partial_dim);
  side.backend().RankColumns(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape =
      absl::StrCat("heads ", args.query_heads, "/", args.kv_heads, " d ", d, " keeps ",
                   args.partial_dim, " rows ", args.rows, args.query_alone ? " query alone" : "");
  outcome.Add("column", side.Get(args.column, int64_t{args.kv_heads} * args.partial_dim));
  return outcome;
}

Outcome SpeculateCase(Side& side, Random& random) {
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 4});
  shape.head_dim = Pick(random, {8, 8, 24, 40, 5});
  shape.block_size = Pick(random, {1, 5, 16, 64});
  shape.dtype = Pick(random, {DType::kBf16, DType::kBf16, DType::kF32, DType::kF16});
  shape.with_values = false;
  shape.layout = Between(random, 0, 1);
  shape.lengths = Pick<std::vector<int32_t>>(
      random, {{0}, {1}, {5, -1, 33, 0}, {64, 65}, {1024, 1025, 3}, {2500}});
  const View view = MakeView(side, random, shape);
  const int32_t group = Pick(random, {1, 2, 3, 4, 7, 8, 9});
  SpeculateArgs args;
  args.partial_key = view.view;
  args.rows = static_cast<int32_t>(shape.lengths.size());
  args.kv_heads = shape.kv_heads;
  args.query_heads = shape.kv_heads * group;
  args.partial_dim = shape.head_dim;
  args.alpha = Pick(random, {4.0f, 1.0f, 0.25f, std::numeric_limits<float>::infinity()});
  args.margin_stride = 2500 + Pick<int64_t>(random, {0, 3, 12});
  // Room for long rows: their scores do not fit in a scratch together.
  if (random.Bernoulli(0.04)) args.margin_stride = 150000;
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  args.margin = side.Room<float>(pairs * args.margin_stride);
  args.count = side.Room<int32_t>(pairs);
  const int64_t width = int64_t{args.query_heads} * shape.head_dim;
  args.query = side.PutRows(ExactFloats(random, args.rows * width), args.rows, width, 3);
  std::vector<int32_t> active(args.rows, 1);
  if (random.Bernoulli(0.4)) {
    for (int32_t& flag : active) flag = random.Bernoulli(0.6) ? 1 : 0;
    args.row_active = side.Put(active);
  }
  side.backend().Speculate(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("group ", group, " Hk ", shape.kv_heads, " d' ", shape.head_dim, " ",
                               DTypeName(shape.dtype), " lengths ", Join(shape.lengths), " active ",
                               Join(active), " alpha ", args.alpha);
  // Products of numbers of eight bits, fewer than 256 of them: exact in f32.
  outcome.Add("margin", side.Get(args.margin, pairs * args.margin_stride), 0, 0);
  outcome.Add("count", side.Get(args.count, pairs));
  return outcome;
}

// Slots of a pool that remember positions and use.
struct Pool {
  ViewShape shape;
  View view;
  std::vector<int32_t> position;
  std::vector<int32_t> use;
};
Pool MakePool(Side& side, Random& random, const std::vector<int32_t>& lengths, int32_t kv_heads) {
  Pool pool;
  pool.shape.lengths = lengths;
  pool.shape.kv_heads = kv_heads;
  pool.shape.head_dim = 8;
  pool.shape.block_size = Pick(random, {5, 16, 64});
  pool.shape.with_values = false;
  pool.shape.room = 1;
  pool.view = MakeView(side, random, pool.shape);
  pool.position.assign(SlotCount(pool.view, pool.shape), -1);
  pool.use.assign(pool.position.size(), -1);
  for (size_t b = 0; b < lengths.size(); ++b) {
    for (int32_t h = 0; h < kv_heads; ++h) {
      std::vector<int32_t> order(std::max(lengths[b], 0));
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
      random.Shuffle(std::span<int32_t>(order));
      for (size_t slot = 0; slot < order.size(); ++slot) {
        const int64_t at = SlotIndex(pool.view, pool.shape, b, slot, h);
        pool.position[at] = order[slot];
        pool.use[at] = Between(random, 0, 5);
      }
    }
  }
  return pool;
}

Outcome SelectCase(Side& side, Random& random) {
  SelectTopArgs args;
  args.kv_heads = Pick(random, {1, 2, 8});
  std::vector<int32_t> lengths = Pick<std::vector<int32_t>>(
      random, {{0}, {1}, {5, 0, 33}, {64, 65, 31, 32}, {1024, 1025, 3}, {5000}, {1023, 2048}});
  int64_t room = Pick(random, {1, 5000});
  // Rows that several blocks share, and room for such rows where there are none.
  if (random.Bernoulli(0.08)) room = Pick(random, {20000, 40000, 140000});
  if (room > 5000 && random.Bernoulli(0.7)) {
    lengths = {static_cast<int32_t>(room - 4096 * Between(random, 0, 4)), 4000};
    args.kv_heads = std::min(args.kv_heads, 2);
  }
  room = std::max<int64_t>(room, *std::max_element(lengths.begin(), lengths.end()));
  args.rows = static_cast<int32_t>(lengths.size());
  const int64_t pairs = int64_t{args.rows} * args.kv_heads;
  args.margin_stride = room + Pick<int64_t>(random, {0, 3});
  args.index_stride = room;
  // Margins with many ties, at most 0; sometimes all different.
  std::vector<float> margin(pairs * args.margin_stride, std::numeric_limits<float>::quiet_NaN());
  std::vector<int32_t> count(pairs);
  std::vector<int32_t> limit(args.rows);
  const bool tied = random.Bernoulli(0.6);
  for (int32_t b = 0; b < args.rows; ++b) {
    limit[b] = Pick(random, {1, 2, 40, std::max(1, lengths[b] / 5), 5000});
    for (int32_t h = 0; h < args.kv_heads; ++h) {
      const int64_t pair = int64_t{b} * args.kv_heads + h;
      count[pair] = lengths[b] == 0 ? 0 : Between(random, 0, lengths[b]);
      for (int32_t t = 0; t < lengths[b]; ++t) {
        margin[pair * args.margin_stride + t] =
            tied ? -static_cast<float>(random.Uniform(30)) / 4.0f
                 : -static_cast<float>(random.UniformDouble() * 10.0);
      }
    }
  }
  args.margin = side.Put(margin);
  args.count = side.Put(count);
  args.length = side.Put(lengths);
  args.limit = side.Put(limit);
  args.selected = side.Room<int32_t>(pairs);
  args.index = side.Room<int32_t>(pairs * args.index_stride);
  args.scope = Pick(random, {SelectionScope::kRequest, SelectionScope::kRequest,
                             SelectionScope::kHead, SelectionScope::kBatch});
  std::vector<int32_t> active(args.rows, 1);
  if (random.Bernoulli(0.4)) {
    for (int32_t& flag : active) flag = random.Bernoulli(0.6) ? 1 : 0;
    args.row_active = side.Put(active);
  }
  if (random.Bernoulli(0.2)) {
    std::vector<int32_t> wanted(args.rows);
    for (int32_t& m : wanted) m = Between(random, 1, 60);
    args.wanted = side.Put(wanted);
  }
  const Pool pool = MakePool(side, random, lengths, args.kv_heads);
  const bool placed = random.Bernoulli(0.4);
  if (placed) {
    args.slot_position = MakeSlots(side, pool.view, pool.shape, pool.position);
    args.use_rule = Pick(random, {SlotUse::kNone, SlotUse::kCount, SlotUse::kStamp});
    if (args.use_rule != SlotUse::kNone) {
      args.use = MakeSlots(side, pool.view, pool.shape, pool.use);
    }
    args.use_limit = 6;
    args.stamp = side.Put(std::vector<int32_t>(args.rows, 777));
  }
  side.backend().SelectTop(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("lengths ", Join(lengths), " Hk ", args.kv_heads, " limit ",
                               Join(limit), " scope ", static_cast<int>(args.scope), " active ",
                               Join(active), args.wanted != nullptr ? " wanted" : "",
                               placed ? " placed" : "", " use ", static_cast<int>(args.use_rule));
  outcome.Add("selected", side.Get(args.selected, pairs));
  outcome.Add("index", side.Get(args.index, pairs * args.index_stride));
  if (args.use.data != nullptr) {
    outcome.Add("use", side.Get(static_cast<const int32_t*>(args.use.data),
                                static_cast<int64_t>(pool.use.size())));
  }
  return outcome;
}

Outcome PlaceCase(Side& side, Random& random) {
  PlaceTokensArgs args;
  args.kv_heads = Pick(random, {1, 2, 5});
  args.decided_rows = Between(random, 1, 4);
  std::vector<int32_t> lengths;
  std::vector<int32_t> capacity;
  for (int32_t b = 0; b < args.decided_rows; ++b) {
    capacity.push_back(Pick(random, {1, 2, 7, 64, 100, 1500}));
    lengths.push_back(capacity.back());
  }
  lengths.push_back(40);  // the row of a prompt's tokens
  const Pool pool = MakePool(side, random, lengths, args.kv_heads);
  std::vector<int32_t> table_row;
  std::vector<int32_t> position;
  std::vector<int32_t> planned;
  for (int32_t b = 0; b < args.decided_rows; ++b) {
    table_row.push_back(random.Bernoulli(0.8) ? b : -1);
    const bool full = random.Bernoulli(0.7);
    position.push_back(full ? capacity[b] + Between(random, 0, 9) : capacity[b] - 1);
    planned.push_back(Between(random, 0, capacity[b] - 1));
  }
  const int32_t prompt = Between(random, 0, 9);
  for (int32_t t = 0; t < prompt; ++t) {
    table_row.push_back(args.decided_rows);
    position.push_back(t);
    planned.push_back(t);
  }
  args.rows = static_cast<int32_t>(table_row.size());
  args.use_rule = Pick(random, {SlotUse::kNone, SlotUse::kCount, SlotUse::kStamp});
  args.slot_position = MakeSlots(side, pool.view, pool.shape, pool.position);
  if (args.use_rule != SlotUse::kNone) {
    args.use = MakeSlots(side, pool.view, pool.shape, pool.use);
  }
  args.table_row = side.Put(table_row);
  args.position = side.Put(position);
  args.planned = side.Put(planned);
  args.capacity = side.Put(capacity);
  args.slot = side.Room<int32_t>(int64_t{args.rows} * args.kv_heads);
  side.backend().PlaceTokens(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("capacity ", Join(capacity), " position ", Join(position), " rows ",
                               Join(table_row), " Hk ", args.kv_heads, " use ",
                               static_cast<int>(args.use_rule));
  outcome.Add("slot", side.Get(args.slot, int64_t{args.rows} * args.kv_heads));
  const int64_t slots = static_cast<int64_t>(pool.position.size());
  outcome.Add("position", side.Get(static_cast<const int32_t*>(args.slot_position.data), slots));
  if (args.use.data != nullptr) {
    outcome.Add("use", side.Get(static_cast<const int32_t*>(args.use.data), slots));
  }
  return outcome;
}

TEST(Conformance, ProjectHeads) { Conform("ProjectHeads", 250, ProjectCase); }
TEST(Conformance, RankColumns) { Conform("RankColumns", 60, RankCase); }
TEST(Conformance, Speculate) { Conform("Speculate", 300, SpeculateCase); }
TEST(Conformance, SelectTop) { Conform("SelectTop", 400, SelectCase); }
TEST(Conformance, PlaceTokens) { Conform("PlaceTokens", 250, PlaceCase); }

}  // namespace
}  // namespace kvsweep
