// Decode and prefill attention and column sums.
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {
namespace {

constexpr double kLargest = 4;  // of ExactFloats

// Scores of exact numbers are exact in f32 until they are scaled; after that a weight is off by a
// few units in the last place of scores below some 100. With narrow activations weights are rounded
// to their format before they meet the values, and the result once more.
double WeightTolerance(bool turned) { return turned ? 2e-3 : 4e-5; }
double OutputTolerance(bool turned) {
  return kLargest * (2 * ActivationEpsilon() + WeightTolerance(turned));
}

struct Heads {
  int32_t query;
  int32_t kv;
};
Heads PickHeads(Random& random) {
  return Pick<Heads>(random, {{1, 1}, {4, 4}, {4, 2}, {6, 2}, {8, 2}, {7, 1}, {8, 1}, {16, 1}});
}

// Turned keys: the table of frequencies; half of the time ranks that are not the slots' numbers.
KeyRotation MakeRotation(Side& side, Random& random, const View& view, const ViewShape& shape) {
  KeyRotation rotation{.inverse_frequency = PutFrequencies(side, shape.head_dim), .rank = {}};
  if (random.Bernoulli(0.5)) {
    std::vector<int32_t> rank(SlotCount(view, shape));
    for (int32_t& value : rank) value = Between(random, 0, 99);
    rotation.rank = MakeSlots(side, view, shape, rank);
  }
  return rotation;
}

// Some parts are empty.
PartialAttention PutPartial(Side& side, Random& random, int64_t heads, int32_t d) {
  std::vector<float> output = ExactFloats(random, heads * d);
  std::vector<float> maximum(heads);
  std::vector<float> sum(heads);
  for (int64_t h = 0; h < heads; ++h) {
    const bool empty = random.Bernoulli(0.2);
    maximum[h] =
        empty ? -std::numeric_limits<float>::infinity() : static_cast<float>(2.0 * random.Normal());
    sum[h] = empty ? 0.0f : static_cast<float>(1.0 + random.UniformDouble());
    if (empty) std::fill_n(output.begin() + h * d, d, 0.0f);
  }
  return {.output = side.Put(output), .maximum = side.Put(maximum), .sum = side.Put(sum)};
}

// Numerators are compared after division: that is what their error is in proportion to.
void AddPartial(Outcome& outcome, Side& side, const PartialAttention& partial, int64_t heads,
                int32_t d, bool turned) {
  std::vector<float> output = side.Get(partial.output, heads * d);
  const std::vector<float> sum = side.Get(partial.sum, heads);
  for (int64_t h = 0; h < heads; ++h) {
    for (int32_t i = 0; i < d && sum[h] > 0; ++i) output[h * d + i] /= sum[h];
  }
  outcome.Add("partial output", output, OutputTolerance(turned), 0);
  outcome.Add("partial maximum", side.Get(partial.maximum, heads), WeightTolerance(turned), 1e-6);
  outcome.Add("partial sum", sum, 1e-6, WeightTolerance(turned));
}

Outcome DecodeCase(Side& side, Random& random) {
  const Heads heads = PickHeads(random);
  ViewShape shape;
  shape.kv_heads = heads.kv;
  shape.head_dim = Pick(random, {8, 48, 64, 64, 80, 128, 128, 128});
  shape.dtype = PickKvType(random);
  shape.block_size = Pick(random, {1, 4, 16, 16, 48, 64});
  shape.layout = Between(random, 0, 3);
  shape.table = random.Bernoulli(0.9);
  shape.lengths = Pick<std::vector<int32_t>>(
      random, {{0}, {1}, {15, 16, 17}, {63, 64, 65}, {5, -1, 33, 0}, {200, 3}, {700, 129, 256}});
  const bool is_long = random.Bernoulli(0.03);
  if (is_long) shape.lengths = {2300, 40};
  if (!shape.table) {
    for (int32_t& length : shape.lengths) length = std::max(length, 0);
  }
  const View view = MakeView(side, random, shape);
  const int32_t rows = static_cast<int32_t>(shape.lengths.size());
  const int64_t all = int64_t{rows} * heads.query;
  const int32_t d = shape.head_dim;
  const int64_t padding = Pick<int64_t>(random, {8, 8, 64, 3});
  const bool turned = random.Bernoulli(0.15);
  const bool current = random.Bernoulli(0.8);

  DecodeAttentionArgs args;
  args.view = view.view;
  args.rows = rows;
  args.query_heads = heads.query;
  args.kv_heads = heads.kv;
  args.head_dim = d;
  args.scale = 1.0f / std::sqrt(static_cast<float>(d)) / 2;
  args.query = side.PutRows(ExactFloats(random, all * d), rows, heads.query * d, padding);
  const int64_t kv_width = int64_t{heads.kv} * d;
  const std::vector<float> key = ExactFloats(random, rows * kv_width);
  const std::vector<float> value = ExactFloats(random, rows * kv_width);
  if (current) {
    args.current_key = side.PutRows(key, rows, kv_width, padding);
    args.current_value = side.PutRows(value, rows, kv_width, padding);
  }
  if (turned) args.rotation = MakeRotation(side, random, view, shape);
  std::vector<int32_t> active(rows, 1);
  if (random.Bernoulli(0.4)) {
    for (int32_t& flag : active) flag = random.Bernoulli(0.7) ? 1 : 0;
    args.row_active = side.Put(active);
  }
  if (random.Bernoulli(0.25)) {
    std::vector<int32_t> lengths;
    for (const int32_t length : shape.lengths) {
      for (int32_t h = 0; h < heads.kv; ++h)
        lengths.push_back(Between(random, 0, std::max(length, 0)));
    }
    args.view.length = side.Put(lengths);
    args.view.length_stride = heads.kv;
    args.view.length_head_stride = 1;
  }
  // A tile of a longer sequence: slots are counted from its first token.
  const bool tiled = random.Bernoulli(0.2);
  if (tiled) {
    const int32_t ahead = Between(random, 1, 20);
    args.view.first_token = ahead;
    args.view.max_tokens = Between(random, 1, 150);
    args.rotation.rank = {};
  }
  args.plan = Pick<AttentionPlan>(random, {{1, 0}, {1, 0}, {2, 64}, {3, 128}, {7, 16}, {5, 17}});
  args.accumulate = random.Bernoulli(0.25);
  const bool partial = random.Bernoulli(0.25);
  if (partial || args.accumulate) args.partial = PutPartial(side, random, all, d);
  if (!partial) args.out = side.RoomRows(rows, heads.query * d, padding);
  int64_t stride = 0;
  if (!partial && !args.accumulate && random.Bernoulli(0.4)) {
    stride = is_long ? 2360 : 760;
    // Entries of earlier tiles hold their scores already.
    std::vector<float> left(all * stride, std::numeric_limits<float>::quiet_NaN());
    if (tiled) std::fill(left.begin(), left.end(), -1.0f);
    args.probability = side.Put(left);
    args.probability_stride = stride;
  }
  side.backend().DecodeAttention(args, Stream::kCompute);

  Outcome outcome;
  outcome.shape = absl::StrCat(
      "Hq ", heads.query, " Hk ", heads.kv, " d ", d, " ", DTypeName(shape.dtype), " block ",
      shape.block_size, shape.table ? "" : " contiguous", " layout ", shape.layout, " lengths ",
      Join(shape.lengths), " splits ", args.plan.splits, "x", args.plan.split_tokens, " padding ",
      padding, current ? " current" : "", turned ? " turned" : "", tiled ? " tiled" : "",
      args.row_active != nullptr ? " inactive" : "", args.accumulate ? " accumulate" : "",
      partial ? " partial" : "", stride > 0 ? " probability" : "");
  if (partial) {
    AddPartial(outcome, side, args.partial, all, d, turned);
  } else {
    outcome.Add("out", side.GetRows(args.out, rows, heads.query * d), OutputTolerance(turned),
                ActivationEpsilon());
  }
  if (stride > 0) {
    outcome.Add("probability", side.Get(args.probability, all * stride), 1e-6,
                WeightTolerance(turned) * (tiled ? 4 : 1));
  }
  return outcome;
}

Outcome PrefillCase(Side& side, Random& random) {
  const Heads heads = PickHeads(random);
  ViewShape shape;
  shape.kv_heads = heads.kv;
  shape.head_dim = Pick(random, {8, 48, 64, 64, 80, 128, 128, 128});
  shape.dtype = PickKvType(random);
  shape.block_size = Pick(random, {1, 4, 16, 16, 48});
  shape.layout = Between(random, 0, 3);
  const int32_t history = Pick(random, {0, 0, 1, 17, 64, 100, 256});
  shape.lengths = {3, history};
  const View view = MakeView(side, random, shape);
  const int32_t rows = Pick(random, {1, 2, 31, 64, 65, 128, 150});
  const int32_t d = shape.head_dim;
  const int64_t padding = Pick<int64_t>(random, {8, 8, 64, 3});
  const int64_t all = int64_t{rows} * heads.query;
  const int64_t kv_width = int64_t{heads.kv} * d;
  const bool chunk = random.Bernoulli(0.85);
  const bool turned = random.Bernoulli(0.1);

  PrefillAttentionArgs args;
  args.query = side.PutRows(ExactFloats(random, all * d), rows, heads.query * d, padding);
  if (chunk) {
    args.chunk_key = side.PutRows(ExactFloats(random, rows * kv_width), rows, kv_width, padding);
    args.chunk_value = side.PutRows(ExactFloats(random, rows * kv_width), rows, kv_width, padding);
  }
  if (history > 0 || random.Bernoulli(0.5)) args.history = view.view;
  if (turned && args.history.key != nullptr) {
    args.rotation = MakeRotation(side, random, view, shape);
  }
  args.history_row = 1;
  args.history_tokens = history;
  args.rows = rows;
  args.query_heads = heads.query;
  args.kv_heads = heads.kv;
  args.head_dim = d;
  args.scale = 1.0f / std::sqrt(static_cast<float>(d)) / 2;
  args.accumulate = random.Bernoulli(0.25);
  const bool partial = random.Bernoulli(0.25);
  if (partial || args.accumulate) args.partial = PutPartial(side, random, all, d);
  if (!partial) {
    args.out = side.RoomRows(rows, heads.query * d, padding);
    if (random.Bernoulli(0.5)) args.log_sum_exp = side.Room<float>(all);
  }
  side.backend().PrefillAttention(args, Stream::kCompute);

  Outcome outcome;
  outcome.shape = absl::StrCat("Hq ", heads.query, " Hk ", heads.kv, " d ", d, " ",
                               DTypeName(shape.dtype), " block ", shape.block_size, " layout ",
                               shape.layout, " history ", history, " rows ", rows, " padding ",
                               padding, chunk ? "" : " no chunk", turned ? " turned" : "",
                               args.accumulate ? " accumulate" : "", partial ? " partial" : "");
  if (partial) {
    AddPartial(outcome, side, args.partial, all, d, turned);
  } else {
    outcome.Add("out", side.GetRows(args.out, rows, heads.query * d), OutputTolerance(turned),
                ActivationEpsilon());
    if (args.log_sum_exp != nullptr) {
      outcome.Add("log_sum_exp", side.Get(args.log_sum_exp, all), WeightTolerance(turned), 1e-6);
    }
  }
  return outcome;
}

Outcome ColumnSumCase(Side& side, Random& random) {
  const Heads heads = PickHeads(random);
  ViewShape shape;
  shape.kv_heads = heads.kv;
  shape.head_dim = Pick(random, {8, 48, 64, 128, 128});
  shape.dtype = Pick(random, {DType::kBf16, DType::kBf16, DType::kF32, DType::kF16});
  shape.block_size = Pick(random, {4, 16, 48});
  const int32_t history = Pick(random, {0, 0, 128, 256, 77});
  const int32_t rows = Pick(random, {1, 2, 63, 128, 129, 200});
  shape.lengths = {5, history + rows};
  const View view = MakeView(side, random, shape);
  const int32_t d = shape.head_dim;
  const int64_t padding = Pick<int64_t>(random, {8, 8, 3});
  const int64_t all = int64_t{rows} * heads.query;
  const bool turned = random.Bernoulli(0.1);

  ColumnSumArgs args;
  args.query = side.PutRows(ExactFloats(random, all * d), rows, heads.query * d, padding);
  std::vector<float> log_sum_exp(all);
  for (float& value : log_sum_exp) value = static_cast<float>(8.0 + random.Normal());
  args.log_sum_exp = side.Put(log_sum_exp);
  args.keys = view.view;
  if (turned) args.rotation = MakeRotation(side, random, view, shape);
  args.scoring.group_maximum = random.Bernoulli(0.2);
  args.scoring.decay = Pick(random, {1.0f, 1.0f, 1.0f, 0.5f, 0.98f, 0.0f});
  args.scoring.half = random.Bernoulli(0.1);
  args.table_row = 1;
  args.history_tokens = history;
  args.rows = rows;
  args.query_heads = heads.query;
  args.kv_heads = heads.kv;
  args.head_dim = d;
  args.scale = 1.0f / std::sqrt(static_cast<float>(d)) / 2;
  std::vector<float> start(SlotCount(view, shape), std::numeric_limits<float>::quiet_NaN());
  for (int32_t h = 0; h < heads.kv; ++h) {
    for (int32_t c = 0; c < history; ++c) {
      start[SlotIndex(view, shape, 1, c, h)] = static_cast<float>(random.UniformDouble());
    }
  }
  std::vector<int32_t> bits(start.size());
  std::memcpy(bits.data(), start.data(), start.size() * sizeof(float));
  args.score = MakeSlots(side, view, shape, bits);
  side.backend().ColumnSum(args, Stream::kCompute);

  Outcome outcome;
  outcome.shape =
      absl::StrCat("Hq ", heads.query, " Hk ", heads.kv, " d ", d, " ", DTypeName(shape.dtype),
                   " block ", shape.block_size, " history ", history, " rows ", rows, " decay ",
                   args.scoring.decay, args.scoring.group_maximum ? " maximum" : "",
                   args.scoring.half ? " half" : "", turned ? " turned" : "");
  const double relative = (args.scoring.half ? 2e-3 : 0) + WeightTolerance(turned) * 2;
  outcome.Add("score", side.Get(static_cast<const float*>(args.score.data), SlotCount(view, shape)),
              1e-5, relative);
  return outcome;
}

TEST(Conformance, DecodeAttention) { Conform("DecodeAttention", 1400, DecodeCase); }
TEST(Conformance, PrefillAttention) { Conform("PrefillAttention", 500, PrefillCase); }
TEST(Conformance, ColumnSum) { Conform("ColumnSum", 400, ColumnSumCase); }

}  // namespace
}  // namespace kvsweep
