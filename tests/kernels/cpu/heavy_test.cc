// H2O's two operations, prune_heavy and evict_heavy, against the definition: keep the last `recent`
// tokens and of the rest the `heavy` that have received the most attention.
#include <algorithm>
#include <iterator>
#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/cpu/kv_rows.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

constexpr int32_t kHeads = 2;
constexpr int32_t kDim = 8;

float& ScoreAt(const SlotView& view, int64_t row, int64_t slot, int64_t head) {
  return static_cast<float*>(view.data)[cpu::SlotOffset(view, row, slot, head)];
}
int32_t& PositionAt(const SlotView& view, int64_t row, int64_t slot, int64_t head) {
  return static_cast<int32_t*>(view.data)[cpu::SlotOffset(view, row, slot, head)];
}
std::vector<float> KeyAt(const KvView& view, int64_t row, int64_t slot, int64_t head) {
  std::vector<float> key(kDim);
  cpu::LoadElements(key.data(), view.key, view.dtype, cpu::KvOffset(view, row, slot, head), kDim);
  return key;
}

// The tokens of one head that the definition keeps, by position.
struct Kept {
  std::map<int32_t, float> score;

  // window_compare: of all but the last `recent`, drop the least scored (ties: the later one) while
  // there are more than `heavy`.
  void Drop(int32_t heavy, int32_t recent, int32_t last) {
    for (;;) {
      int32_t victim = -1;
      int32_t candidates = 0;
      for (const auto& [position, value] : score) {
        if (position > last - recent) continue;
        ++candidates;
        if (victim < 0 || value <= score[victim]) victim = position;
      }
      if (candidates <= heavy) return;
      score.erase(victim);
    }
  }
};

TEST(PruneHeavy, KeepsTheHeavyAndTheRecentInTheirSlots) {
  Random random(1);
  for (DType dtype : {DType::kF32, DType::kF16}) {
    for (const auto& [tokens, heavy, recent] : {std::tuple{10, 3, 4},
                                                {50, 7, 9},
                                                {50, 0, 9},
                                                {50, 9, 0},
                                                {33, 16, 16},
                                                {8, 4, 4},
                                                {7, 4, 4},
                                                {100, 1, 1}}) {
      SCOPED_TRACE(
          absl::StrCat(DTypeName(dtype), " n ", tokens, " heavy ", heavy, " recent ", recent));
      Device device;
      const Cache cache = MakeCache(device, random,
                                    {.lengths = {3, tokens},
                                     .kv_heads = kHeads,
                                     .head_dim = kDim,
                                     .block_size = 5,
                                     .dtype = dtype});
      const SlotView score = MakeSlots(device, cache);
      const SlotView position = MakeSlots(device, cache);
      std::vector<Kept> kept(kHeads);
      for (int32_t head = 0; head < kHeads; ++head) {
        for (int32_t t = 0; t < tokens; ++t) {
          // Few different values, so that ties are common.
          ScoreAt(score, 1, t, head) = static_cast<float>(random.Uniform(6));
          kept[head].score[t] = ScoreAt(score, 1, t, head);
        }
        kept[head].Drop(heavy, recent, tokens - 1);
      }
      device.backend.PruneHeavy({.view = cache.view,
                                 .score = score,
                                 .position = position,
                                 .table_row = 1,
                                 .tokens = tokens,
                                 .heavy = heavy,
                                 .recent = recent,
                                 .kv_heads = kHeads,
                                 .head_dim = kDim},
                                Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      for (int32_t head = 0; head < kHeads; ++head) {
        ASSERT_EQ(kept[head].score.size(), static_cast<size_t>(std::min(tokens, heavy + recent)));
        int32_t rank = 0;
        for (const auto& [p, value] : kept[head].score) {
          const bool pruned = tokens > heavy + recent;
          const int32_t slot =
              !pruned || p < tokens - recent ? rank++ : heavy + (p - heavy) % recent;
          EXPECT_EQ(PositionAt(position, 1, slot, head), p) << "slot " << slot;
          EXPECT_EQ(ScoreAt(score, 1, slot, head), value);
          const float* const key = cache.Key(1, p, head);
          EXPECT_EQ(KeyAt(cache.view, 1, slot, head), std::vector<float>(key, key + kDim));
        }
      }
    }
  }
}

// Decodes from an empty cache for many steps with made-up probabilities; after each the kept sets
// are those of the definition.
TEST(EvictHeavy, KeepsTheSetsOfTheDefinitionStepByStep) {
  Random random(2);
  constexpr int32_t kGroup = 3;
  for (const auto& [heavy, recent] : {std::pair{3, 4}, {5, 1}, {0, 6}, {6, 0}, {1, 1}, {0, 0}}) {
    SCOPED_TRACE(absl::StrCat("heavy ", heavy, " recent ", recent));
    const int32_t capacity = heavy + recent;
    Device device;
    const Cache cache = MakeCache(device, random,
                                  {.lengths = {0, 0, 0},
                                   .kv_heads = kHeads,
                                   .head_dim = kDim,
                                   .block_size = 4,
                                   .spare_blocks = capacity / 4 + 1});
    const SlotView score = MakeSlots(device, cache);
    const SlotView position = MakeSlots(device, cache);
    int32_t* const length = const_cast<int32_t*>(cache.view.length);
    int32_t* const now = device.Room<int32_t>(3);
    const int64_t stride = capacity + 1;
    float* const probability = device.Room<float>(3 * kHeads * kGroup * stride);
    const EvictHeavyArgs args{.view = cache.view,
                              .score = score,
                              .slot_position = position,
                              .probability = probability,
                              .probability_stride = stride,
                              .key = device.RoomRows(3, kHeads * kDim),
                              .value = device.RoomRows(3, kHeads * kDim),
                              .position = now,
                              .heavy = device.Put(std::vector<int32_t>(3, heavy)),
                              .recent = device.Put(std::vector<int32_t>(3, recent)),
                              .row_active = device.Put(std::vector<int32_t>{1, 0, 1}),
                              .rows = 3,
                              .query_heads = kHeads * kGroup,
                              .kv_heads = kHeads,
                              .head_dim = kDim};
    std::vector<Kept> kept(3 * kHeads);
    for (int32_t step = 0; step < 40; ++step) {
      for (int32_t row = 0; row < 3; ++row) {
        now[row] = step;
        length[row] = row == 1 ? 0 : std::min(step, capacity);
        // Small integers, few of them not zero: sums are exact, and ties of the least are common.
        for (int64_t i = 0; i < kHeads * kGroup * stride; ++i) {
          probability[row * kHeads * kGroup * stride + i] = random.Uniform(16) == 0 ? 1.0f : 0.0f;
        }
        for (int32_t i = 0; i < kHeads * kDim; ++i) {
          static_cast<float*>(args.key.data)[row * args.key.stride + i] =
              static_cast<float>(step * 100 + i);
          static_cast<float*>(args.value.data)[row * args.value.stride + i] = 0;
        }
        for (int32_t head = 0; head < kHeads; ++head) {
          Kept& expected = kept[row * kHeads + head];
          const auto received = [&](int32_t slot) {
            float sum = 0;
            for (int32_t q = 0; q < kGroup; ++q) {
              sum += probability[((row * kHeads + head) * kGroup + q) * stride + slot];
            }
            return sum;
          };
          for (int32_t slot = 0; slot < length[row]; ++slot) {
            expected.score.at(PositionAt(position, row, slot, head)) += received(slot);
          }
          if (row == 1) continue;
          expected.score[step] = received(length[row]);
          expected.Drop(heavy, recent, step);
        }
      }
      device.backend.EvictHeavy(args, Stream::kCompute);
      const absl::Status status = device.backend.WaitAll();
      ASSERT_TRUE(status.ok()) << status;
      for (int32_t row : {0, 2}) {
        for (int32_t head = 0; head < kHeads; ++head) {
          std::map<int32_t, float> stored;
          for (int32_t slot = 0; slot < std::min(step + 1, capacity); ++slot) {
            const int32_t p = PositionAt(position, row, slot, head);
            stored[p] = ScoreAt(score, row, slot, head);
            EXPECT_EQ(KeyAt(cache.view, row, slot, head)[1],
                      static_cast<float>(p * 100 + head * kDim + 1));
          }
          ASSERT_EQ(stored, kept[row * kHeads + head].score) << "step " << step << " row " << row;
        }
      }
      for (int32_t slot = 0; slot < capacity; ++slot) {
        EXPECT_EQ(PositionAt(position, 1, slot, 0), -1) << "an inactive row was written";
      }
    }
  }
}

// From the same state the two rules keep sets that differ in one heavy slot at most: slot_promote
// keeps the token that left the window whatever its score, window_compare the better of it and the
// least.
TEST(EvictHeavy, RulesDifferInOneHeavySlotAtASharedHistory) {
  Random random(4);
  int differed = 0;
  for (int run = 0; run < 60; ++run) {
    constexpr int32_t kHeavy = 5;
    constexpr int32_t kRecent = 3;
    std::vector<std::vector<int32_t>> kept;
    const uint64_t seed = random.Next64();
    for (const bool promote : {false, true}) {
      Random same(seed);
      Device device;
      const Cache cache = MakeCache(
          device, same,
          {.lengths = {kHeavy + kRecent}, .kv_heads = 1, .head_dim = kDim, .block_size = 4});
      const SlotView score = MakeSlots(device, cache);
      const SlotView position = MakeSlots(device, cache);
      // Token 20 comes; 17 .. 19 are the window, in the ring's slots.
      for (int32_t slot = 0; slot < kHeavy + kRecent; ++slot) {
        ScoreAt(score, 0, slot, 0) = static_cast<float>(same.UniformDouble());
        PositionAt(position, 0, slot, 0) = slot;
      }
      for (int32_t p = 17; p < 20; ++p) {
        PositionAt(position, 0, kHeavy + (p - kHeavy) % kRecent, 0) = p;
      }
      std::vector<float> probability(kHeavy + kRecent + 1);
      for (float& p : probability) p = static_cast<float>(0.1 * same.UniformDouble());
      device.backend.EvictHeavy({.view = cache.view,
                                 .score = score,
                                 .slot_position = position,
                                 .promote = promote,
                                 .probability = device.Put(probability),
                                 .probability_stride = kHeavy + kRecent + 1,
                                 .key = device.RoomRows(1, kDim),
                                 .value = device.RoomRows(1, kDim),
                                 .position = device.Put(std::vector<int32_t>{20}),
                                 .heavy = device.Put(std::vector<int32_t>{kHeavy}),
                                 .recent = device.Put(std::vector<int32_t>{kRecent}),
                                 .rows = 1,
                                 .query_heads = 1,
                                 .kv_heads = 1,
                                 .head_dim = kDim},
                                Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      kept.emplace_back();
      for (int32_t slot = 0; slot < kHeavy + kRecent; ++slot) {
        kept.back().push_back(PositionAt(position, 0, slot, 0));
      }
      std::ranges::sort(kept.back());
      if (promote) {
        EXPECT_EQ(std::ranges::count(kept.back(), 17), 1);
      }
    }
    std::vector<int32_t> only_compared;
    std::ranges::set_difference(kept[0], kept[1], std::back_inserter(only_compared));
    EXPECT_LE(only_compared.size(), 1u);
    differed += !only_compared.empty();
  }
  EXPECT_GT(differed, 0);
  EXPECT_LT(differed, 60);
}

}  // namespace
}  // namespace kvsweep
