// H2O's two operations. Scores are multiples of 1/64 and probabilities of 1/1024, so that sums are
// exact and every decision must be the same.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "tests/kernels/conformance/conformance.h"

namespace kvsweep {
namespace {

struct Budget {
  int32_t heavy;
  int32_t recent;
};

// Values for every slot; few different ones, so that ties are common.
std::vector<int32_t> ScoreBits(Random& random, int64_t count) {
  std::vector<float> scores(static_cast<size_t>(count));
  for (float& score : scores) score = static_cast<float>(random.Uniform(90)) / 64.0f;
  std::vector<int32_t> bits(scores.size());
  std::memcpy(bits.data(), scores.data(), scores.size() * sizeof(float));
  return bits;
}

void AddSlots(Outcome& outcome, Side& side, const std::string& name, const SlotView& slots,
              int64_t count) {
  if (slots.data == nullptr) return;
  outcome.Add(name, side.Get(static_cast<const int32_t*>(slots.data), count));
}

Outcome PruneCase(Side& side, Random& random) {
  const Budget budget = Pick<Budget>(
      random, {{3, 4}, {7, 9}, {0, 9}, {9, 0}, {16, 16}, {1, 1}, {40, 100}, {0, 1}, {100, 30}});
  const int32_t budget_tokens = budget.heavy + budget.recent;
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 8});
  shape.head_dim = Pick(random, {5, 8, 48, 80, 64, 128});
  shape.block_size = Pick(random, {5, 16, 64});
  shape.dtype = PickKvType(random);
  shape.layout = Pick(random, {0, 1, 3});
  const int32_t tokens = Pick(random, {1, budget_tokens, budget_tokens + 1, budget_tokens + 7,
                                       2 * budget_tokens + 3, 33, 300, 1500});
  shape.lengths = {3, tokens};
  const View view = MakeView(side, random, shape);
  const int64_t count = SlotCount(view, shape);

  PruneHeavyArgs args;
  args.view = view.view;
  args.table_row = 1;
  args.tokens = tokens;
  args.heavy = budget.heavy;
  args.recent = budget.recent;
  args.sinks = Pick(random, {0, 0, 2, 4});
  args.ring = random.Bernoulli(0.7);
  args.scoring.mean = random.Bernoulli(0.3);
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  // Sometimes the first slots come from an earlier prune.
  args.placed = random.Bernoulli(0.3) ? static_cast<int32_t>(random.Uniform(tokens + 1)) : 0;
  args.first_position = args.placed == 0 ? 0 : args.placed + Between(random, 0, 50);
  std::vector<int32_t> position(static_cast<size_t>(count), -1);
  for (int32_t h = 0; h < shape.kv_heads; ++h) {
    for (int32_t slot = 0; slot < args.placed; ++slot) {
      position[SlotIndex(view, shape, 1, slot, h)] = slot;
    }
  }
  const bool scored = random.Bernoulli(0.85) || budget.recent == 0;
  if (scored) args.score = MakeSlots(side, view, shape, ScoreBits(random, count));
  args.scoring.mean = args.scoring.mean && scored;
  if (scored || random.Bernoulli(0.5)) args.position = MakeSlots(side, view, shape, position);
  if (random.Bernoulli(0.4)) {
    args.rank = MakeSlots(side, view, shape, std::vector<int32_t>(count, -1));
  }
  side.backend().PruneHeavy(args, Stream::kCompute);

  Outcome outcome;
  outcome.shape =
      absl::StrCat("tokens ", tokens, " heavy ", budget.heavy, " recent ", budget.recent, " sinks ",
                   args.sinks, " placed ", args.placed, args.ring ? " ring" : "",
                   args.scoring.mean ? " mean" : "", scored ? "" : " unscored", " d ",
                   shape.head_dim, " ", DTypeName(shape.dtype), " block ", shape.block_size);
  // What is left behind the budget is nobody's business.
  std::vector<int32_t> kept;
  const int32_t stays = std::min(tokens, budget_tokens);
  const int64_t row_bytes = shape.head_dim * DTypeBytes(shape.dtype);
  const int64_t pool_bytes = view.elements * DTypeBytes(shape.dtype);
  for (const std::byte* pool : {view.view.key, view.view.value}) {
    const std::vector<std::byte> bytes = side.Get(pool, pool_bytes);
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      for (int32_t slot = 0; slot < stays; ++slot) {
        const int64_t block = view.table[view.view.block_table_stride + slot / shape.block_size];
        const int64_t at =
            (block * view.view.block_stride + slot % shape.block_size * view.view.token_stride +
             h * view.view.head_stride) *
            DTypeBytes(shape.dtype);
        for (int64_t i = 0; i < row_bytes; ++i) kept.push_back(static_cast<int32_t>(bytes[at + i]));
      }
    }
  }
  outcome.Add("rows", std::move(kept));
  for (const auto& [name, slots] :
       {std::pair{"score", &args.score}, {"position", &args.position}, {"rank", &args.rank}}) {
    if (slots->data == nullptr) continue;
    const std::vector<int32_t> all = side.Get(static_cast<const int32_t*>(slots->data), count);
    std::vector<int32_t> stay;
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      for (int32_t slot = 0; slot < stays; ++slot) {
        stay.push_back(all[SlotIndex(view, shape, 1, slot, h)]);
      }
    }
    outcome.Add(name, std::move(stay));
  }
  return outcome;
}

Outcome EvictCase(Side& side, Random& random) {
  const int32_t group = Pick(random, {1, 2, 3, 4, 7, 8});
  ViewShape shape;
  shape.kv_heads = Pick(random, {1, 2, 4});
  shape.head_dim = Pick(random, {5, 8, 48, 64, 128});
  shape.block_size = Pick(random, {5, 16, 64});
  shape.dtype = PickKvType(random);
  const int32_t rows = Between(random, 1, 5);
  std::vector<int32_t> heavy(rows);
  std::vector<int32_t> recent(rows);
  std::vector<int32_t> position(rows);
  std::vector<int32_t> active(rows);
  for (int32_t b = 0; b < rows; ++b) {
    Budget budget =
        Pick<Budget>(random, {{3, 4}, {5, 1}, {0, 6}, {6, 0}, {1, 1}, {100, 300}, {400, 100}});
    // More slots than are under way at once; more than one block takes.
    if (random.Bernoulli(0.02)) budget = Pick<Budget>(random, {{1300, 900}, {3500, 900}});
    heavy[b] = budget.heavy;
    recent[b] = budget.recent;
    const int32_t total = budget.heavy + budget.recent;
    // Filling, just full, long full.
    position[b] = Pick(random, {0, total - 1, total, total + 1, 2 * total + 3, 1000});
    active[b] = random.Bernoulli(0.8) ? 1 : 0;
    shape.lengths.push_back(std::min(position[b], total));
  }
  shape.room = 2;
  const View view = MakeView(side, random, shape);
  const int64_t count = SlotCount(view, shape);
  const bool scored = random.Bernoulli(0.85);

  EvictHeavyArgs args;
  args.view = view.view;
  args.scoring.mean = random.Bernoulli(0.25);
  args.scoring.decay = Pick(random, {1.0f, 1.0f, 0.5f, 0.0f});
  args.scoring.group_maximum = random.Bernoulli(0.25);
  args.scoring.half = random.Bernoulli(0.15);
  args.promote = random.Bernoulli(0.25);
  args.sinks = Pick(random, {0, 0, 1, 4});
  args.rows = rows;
  args.query_heads = shape.kv_heads * group;
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  std::vector<int32_t> slot_position(static_cast<size_t>(count), -1);
  std::vector<int32_t> rank(static_cast<size_t>(count), -1);
  for (int32_t b = 0; b < rows; ++b) {
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      std::vector<int32_t> order(shape.lengths[b]);
      for (int32_t slot = 0; slot < shape.lengths[b]; ++slot) order[slot] = slot;
      random.Shuffle(std::span<int32_t>(order));
      for (int32_t slot = 0; slot < shape.lengths[b]; ++slot) {
        slot_position[SlotIndex(view, shape, b, slot, h)] = order[slot];
        rank[SlotIndex(view, shape, b, slot, h)] = order[slot];
      }
    }
    if (!scored) {
      // Without scores the heavy tokens are sinks.
      args.sinks = 1000;
      if (recent[b] == 0) recent[b] = heavy[b], heavy[b] = 0;
    }
  }
  args.scoring.mean = args.scoring.mean && scored;
  if (scored) args.score = MakeSlots(side, view, shape, ScoreBits(random, count));
  if (scored || random.Bernoulli(0.5)) {
    args.slot_position = MakeSlots(side, view, shape, slot_position);
  }
  const bool ranked = random.Bernoulli(0.3);
  if (ranked) args.rank = MakeSlots(side, view, shape, rank);
  args.probability_stride = *std::max_element(shape.lengths.begin(), shape.lengths.end()) + 20;
  std::vector<float> probability(rows * args.query_heads * args.probability_stride);
  for (float& p : probability) p = static_cast<float>(random.Uniform(64)) / 1024.0f;
  args.probability = side.Put(probability);
  const int64_t width = int64_t{shape.kv_heads} * shape.head_dim;
  args.key = side.PutRows(ExactFloats(random, rows * width), rows, width, 3);
  args.value = side.PutRows(ExactFloats(random, rows * width), rows, width, 8);
  args.position = side.Put(position);
  args.heavy = side.Put(heavy);
  args.recent = side.Put(recent);
  args.row_active = side.Put(active);
  side.backend().EvictHeavy(args, Stream::kCompute);

  Outcome outcome;
  outcome.shape = absl::StrCat(
      "heavy ", Join(heavy), " recent ", Join(recent), " position ", Join(position), " active ",
      Join(active), " sinks ", args.sinks, " group ", group, " d ", shape.head_dim, " ",
      DTypeName(shape.dtype), args.promote ? " promote" : "", args.scoring.mean ? " mean" : "",
      args.scoring.group_maximum ? " maximum" : "", args.scoring.half ? " half" : "",
      scored ? "" : " unscored", ranked ? " ranked" : "");
  outcome.Add("rows", PoolBytes(side, view));
  AddSlots(outcome, side, "score", args.score, count);
  AddSlots(outcome, side, "position", args.slot_position, count);
  AddSlots(outcome, side, "rank", args.rank, count);
  return outcome;
}

TEST(Conformance, PruneHeavy) { Conform("PruneHeavy", 400, PruneCase); }
TEST(Conformance, EvictHeavy) { Conform("EvictHeavy", 500, EvictCase); }

}  // namespace
}  // namespace kvsweep
