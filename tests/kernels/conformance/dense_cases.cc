// Embedding, norms, products, gates, rotation and the choice of a token.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {
namespace {

// A matrix in the backend's weight type.
const void* PutWeight(Side& side, const std::vector<float>& values) {
  return side.PutElements(values, side.backend().info().weight_dtype);
}

Outcome EmbedCase(Side& side, Random& random) {
  EmbedArgs args;
  args.columns = Pick(random, {5, 8, 64, 768, 1000});
  args.rows = Pick(random, {1, 2, 33, 64});
  constexpr int32_t kVocabulary = 50;
  constexpr int32_t kPositions = 80;
  args.position_offset = Pick(random, {0, 2});
  std::vector<int32_t> id(args.rows);
  std::vector<int32_t> position(args.rows);
  std::vector<int32_t> sampled(8);
  for (int32_t& token : sampled) token = Between(random, 0, kVocabulary - 1);
  for (int32_t t = 0; t < args.rows; ++t) {
    id[t] = Between(random, -8, kVocabulary - 1);
    position[t] = Between(random, 0, kPositions - 3);
  }
  args.token_id = side.Put(id);
  args.sampled = side.Put(sampled);
  args.position = side.Put(position);
  args.table = PutWeight(side, ExactFloats(random, int64_t{kVocabulary} * args.columns));
  const bool learned = random.Bernoulli(0.5);
  const std::vector<float> places = ExactFloats(random, int64_t{kPositions} * args.columns);
  if (learned) args.position_table = PutWeight(side, places);
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.out = side.RoomRows(args.rows, args.columns, padding);
  side.backend().Embed(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape =
      absl::StrCat("rows ", args.rows, " columns ", args.columns, learned ? " positions" : "");
  outcome.Add("out", side.GetRows(args.out, args.rows, args.columns), 0, ActivationEpsilon());
  return outcome;
}

Outcome NormCase(Side& side, Random& random) {
  NormArgs args;
  args.columns = Pick(random, {1, 5, 8, 64, 320, 1000, 4096});
  args.rows = Pick(random, {1, 2, 33});
  args.weight = side.Put(ExactFloats(random, args.columns));
  const bool layer = random.Bernoulli(0.5);
  const std::vector<float> bias = ExactFloats(random, args.columns);
  if (layer) args.bias = side.Put(bias);
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.in = side.PutRows(ExactFloats(random, int64_t{args.rows} * args.columns), args.rows,
                         args.columns, padding);
  args.out = side.RoomRows(args.rows, args.columns, padding);
  side.backend().Norm(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape =
      absl::StrCat("rows ", args.rows, " columns ", args.columns, layer ? " layer" : " rms");
  // A row of one column has no variance: what is left of it is divided by sqrt(epsilon).
  const double amplified = args.columns == 1 && layer ? 400 : 4;
  outcome.Add("out", side.GetRows(args.out, args.rows, args.columns),
              amplified * (args.columns + 16) * 0x1p-24, ActivationEpsilon());
  return outcome;
}

Outcome GemmCase(Side& side, Random& random) {
  GemmArgs args;
  args.rows = Pick(random, {1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 48, 64, 65, 130});
  // Wide ones give a block of a GPU several tiles of outputs, and several passes over the columns.
  const bool wide = random.Bernoulli(0.06);
  args.out_columns =
      wide ? Pick(random, {2130, 4320, 10'600, 17'040}) : Pick(random, {1, 7, 8, 64, 96, 200, 513});
  args.in_columns = wide ? Pick(random, {64, 136}) : Pick(random, {1, 8, 24, 64, 100, 256, 1000});
  args.relu = random.Bernoulli(0.3);
  args.accumulate = random.Bernoulli(0.3);
  args.f32_out = random.Bernoulli(0.2);
  const bool biased = random.Bernoulli(0.5);
  args.weight = PutWeight(side, ExactFloats(random, int64_t{args.out_columns} * args.in_columns));
  const std::vector<float> bias = ExactFloats(random, args.out_columns);
  if (biased) args.bias = side.Put(bias);
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.in = side.PutRows(ExactFloats(random, int64_t{args.rows} * args.in_columns), args.rows,
                         args.in_columns, padding);
  const std::vector<float> before = ExactFloats(random, int64_t{args.rows} * args.out_columns);
  const std::vector<float> nothing(before.size(), std::numeric_limits<float>::quiet_NaN());
  const std::vector<float>& start = args.accumulate ? before : nothing;
  Outcome outcome;
  outcome.shape = absl::StrCat(args.rows, " x ", args.in_columns, " x ", args.out_columns,
                               biased ? " bias" : "", args.relu ? " relu" : "",
                               args.accumulate ? " accumulate" : "", args.f32_out ? " f32" : "");
  // Sums of products of at most 16; with accumulate what is added to may be rounded once more.
  const double absolute = args.in_columns * 16.0 * 0x1p-22;
  if (args.f32_out) {
    float* const out = side.Put(start);
    args.out = {.data = out, .stride = args.out_columns};
    side.backend().Gemm(args, Stream::kCompute);
    outcome.Add("out", side.Get(out, static_cast<int64_t>(start.size())), absolute, 1e-6);
    return outcome;
  }
  args.out = args.accumulate ? side.PutRows(start, args.rows, args.out_columns, padding)
                             : side.RoomRows(args.rows, args.out_columns, padding);
  side.backend().Gemm(args, Stream::kCompute);
  const double sum = 16.0 * std::sqrt(static_cast<double>(args.in_columns));
  outcome.Add("out", side.GetRows(args.out, args.rows, args.out_columns),
              absolute + (args.accumulate ? sum * ActivationEpsilon() : 0),
              2 * ActivationEpsilon());
  return outcome;
}

Outcome GatedGemmCase(Side& side, Random& random) {
  const int32_t rows = Pick(random, {1, 2, 3, 8, 9, 16, 17, 31, 32, 33, 57, 64});
  const bool wide = random.Bernoulli(0.06);
  const int32_t columns =
      wide ? Pick(random, {64, 136}) : Pick(random, {8, 24, 64, 100, 256, 512, 1000});
  const int32_t out_columns =
      wide ? Pick(random, {2144, 4320, 10'592, 17'056}) : Pick(random, {2, 32, 64, 96, 200, 1024});
  const bool biased = random.Bernoulli(0.2);
  const int64_t padding = Pick<int64_t>(random, {3, 8, 8});
  GatedGemmArgs args;
  GemmArgs& product = args.product;
  product.rows = rows;
  product.in_columns = columns;
  product.out_columns = out_columns;
  // Small, so that a gate sees values on both of its sides.
  std::vector<float> in = ExactFloats(random, int64_t{rows} * columns);
  for (float& value : in) value /= 32;
  product.in = side.PutRows(in, rows, columns, padding);
  product.weight = PutWeight(side, ExactFloats(random, int64_t{out_columns} * columns));
  const std::vector<float> bias = ExactFloats(random, out_columns);
  if (biased) product.bias = side.Put(bias);
  product.out = side.RoomRows(rows, out_columns, padding);
  args.gated = side.RoomRows(rows, out_columns / 2, padding);
  side.backend().GatedGemm(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat(rows, " x ", columns, " x ", out_columns, biased ? " bias" : "");
  // Both sums may be rounded before the gate, and either is some sqrt(columns) / 2 at most.
  const double root = std::sqrt(static_cast<double>(columns)) / 2 + (biased ? 4 : 0);
  const double error = columns * 0x1p-22 + root * ActivationEpsilon();
  outcome.Add("gated", side.GetRows(args.gated, rows, out_columns / 2), error * (1 + root),
              3 * ActivationEpsilon());
  return outcome;
}

Outcome SiluCase(Side& side, Random& random) {
  SiluGateArgs args;
  args.rows = Pick(random, {1, 2, 33});
  args.columns = Pick(random, {1, 8, 100, 512, 1000});
  const int64_t padding = Pick<int64_t>(random, {3, 8});
  args.in = side.PutRows(ExactFloats(random, int64_t{args.rows} * 2 * args.columns), args.rows,
                         2 * args.columns, padding);
  args.out = side.RoomRows(args.rows, args.columns, padding);
  side.backend().SiluGate(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("rows ", args.rows, " columns ", args.columns);
  outcome.Add("out", side.GetRows(args.out, args.rows, args.columns), 1e-6,
              ActivationEpsilon() + 1e-6);
  return outcome;
}

Outcome RotaryCase(Side& side, Random& random) {
  RotaryArgs args;
  args.rows = Pick(random, {1, 2, 33});
  args.heads = Pick(random, {1, 3, 8});
  args.head_dim = Pick(random, {2, 8, 48, 64, 80, 128});
  args.inverse_frequency = PutFrequencies(side, args.head_dim);
  std::vector<int32_t> position(args.rows);
  for (int32_t& p : position) p = Between(random, 0, 4000);
  args.position = side.Put(position);
  const int64_t width = int64_t{args.heads} * args.head_dim;
  args.data = side.PutRows(ExactFloats(random, args.rows * width), args.rows, width,
                           Pick<int64_t>(random, {3, 8}));
  side.backend().Rotary(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("rows ", args.rows, " heads ", args.heads, " d ", args.head_dim);
  outcome.Add("data", side.GetRows(args.data, args.rows, width), 8e-6, ActivationEpsilon());
  return outcome;
}

Outcome TakeRowsCase(Side& side, Random& random) {
  TakeRowsArgs args;
  const int32_t from = Pick(random, {1, 5, 40});
  args.rows = Pick(random, {1, 3, 64});
  args.columns = Pick(random, {1, 8, 100, 768});
  std::vector<int32_t> row(args.rows);
  for (int32_t& r : row) r = Between(random, -1, from - 1);
  args.row = side.Put(row);
  args.in = side.PutRows(ExactFloats(random, int64_t{from} * args.columns), from, args.columns,
                         Pick<int64_t>(random, {3, 8}));
  args.out = side.RoomRows(args.rows, args.columns, Pick<int64_t>(random, {3, 8}));
  side.backend().TakeRows(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape = absl::StrCat("rows ", Join(row), " columns ", args.columns);
  outcome.Add("out", side.GetRows(args.out, args.rows, args.columns), 0, 0);
  return outcome;
}

Outcome ArgmaxCase(Side& side, Random& random) {
  ArgmaxArgs args;
  args.rows = Pick(random, {1, 2, 9, 64});
  args.columns = Pick(random, {1, 2, 31, 1000, 4096, 32000});
  const int32_t vary = Pick(random, {3, 1000, 1000000});  // few values make ties
  std::vector<float> logits(int64_t{args.rows} * (args.columns + 5),
                            std::numeric_limits<float>::infinity());
  for (int32_t r = 0; r < args.rows; ++r) {
    for (int32_t c = 0; c < args.columns; ++c) {
      logits[r * (args.columns + 5) + c] = static_cast<float>(Between(random, -vary, vary)) / 64.0f;
    }
  }
  args.logits = {.data = side.Put(logits), .stride = args.columns + 5};
  std::vector<int32_t> target(args.rows);
  for (int32_t r = 0; r < args.rows; ++r)
    target[r] = random.Bernoulli(0.8) ? args.rows - 1 - r : -1;
  args.target = side.Put(target);
  const bool ranked = random.Bernoulli(0.3);
  std::vector<int32_t> rank(args.rows);
  for (int32_t& value : rank) value = Between(random, 0, std::min(args.columns - 1, 3));
  if (ranked) args.rank = side.Put(rank);
  args.token = side.Room<int32_t>(args.rows);
  side.backend().Argmax(args, Stream::kCompute);
  Outcome outcome;
  outcome.shape =
      absl::StrCat("rows ", args.rows, " columns ", args.columns, ranked ? " ranked" : "");
  outcome.Add("token", side.Get(args.token, args.rows));
  return outcome;
}

Outcome FillNormalCase(Side& side, Random& random) {
  FillNormalArgs args;
  args.dtype = Pick(random, {DType::kF32, DType::kBf16, DType::kF16});
  args.count = Pick<int64_t>(random, {1, 7, 1000, 5000, 70001});
  args.seed = random.Next64();
  args.deviation = 0.02f;
  std::byte* const out = side.Room<std::byte>(args.count * DTypeBytes(args.dtype) + 16);
  args.out = out;
  side.backend().FillNormal(args, Stream::kCompute);
  std::vector<int32_t> bytes;
  for (const std::byte byte : side.Get(out, args.count * DTypeBytes(args.dtype) + 16)) {
    bytes.push_back(static_cast<int32_t>(byte));
  }
  Outcome outcome;
  outcome.shape = absl::StrCat(args.count, " of ", DTypeName(args.dtype));
  outcome.Add("bytes", std::move(bytes));
  return outcome;
}

TEST(Conformance, Embed) { Conform("Embed", 150, EmbedCase); }
TEST(Conformance, Norm) { Conform("Norm", 200, NormCase); }
TEST(Conformance, Gemm) { Conform("Gemm", 700, GemmCase); }
TEST(Conformance, GatedGemm) { Conform("GatedGemm", 300, GatedGemmCase); }
TEST(Conformance, SiluGate) { Conform("SiluGate", 100, SiluCase); }
TEST(Conformance, Rotary) { Conform("Rotary", 150, RotaryCase); }
TEST(Conformance, TakeRows) { Conform("TakeRows", 100, TakeRowsCase); }
TEST(Conformance, Argmax) { Conform("Argmax", 200, ArgmaxCase); }
TEST(Conformance, FillNormal) { Conform("FillNormal", 50, FillNormalCase); }

}  // namespace
}  // namespace kvsweep
