// Selection against a stable sort, in every scope, over pools whose slots are in no order and
// remember their use.
#include <algorithm>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kv_rows.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

// A selection drawn at random: few different margins, so that ties abound.
struct Drawn {
  int32_t rows = 0;
  int32_t kv_heads = 0;
  int32_t stride = 0;
  std::vector<int32_t> length, limit, active, count, wanted;
  std::vector<float> margin;

  int64_t Pair(int32_t row, int32_t head) const { return int64_t{row} * kv_heads + head; }
  bool Selects(int32_t row) const { return active[row] != 0 && length[row] > 0; }
};

Drawn Draw(Random& random) {
  Drawn drawn{.rows = 1 + static_cast<int32_t>(random.Uniform(5)),
              .kv_heads = 1 + static_cast<int32_t>(random.Uniform(4)),
              .stride = 60};
  for (int32_t row = 0; row < drawn.rows; ++row) {
    drawn.length.push_back(static_cast<int32_t>(random.Uniform(60)));
    drawn.limit.push_back(static_cast<int32_t>(random.Uniform(40)));
    drawn.active.push_back(random.Uniform(5) > 0);
    drawn.wanted.push_back(static_cast<int32_t>(random.Uniform(60)));
    for (int32_t head = 0; head < drawn.kv_heads; ++head) {
      drawn.count.push_back(static_cast<int32_t>(random.Uniform(drawn.length[row] + 1)));
    }
  }
  drawn.margin.resize(drawn.rows * drawn.kv_heads * drawn.stride);
  for (float& margin : drawn.margin) margin = -static_cast<float>(random.Uniform(7));
  return drawn;
}

SelectTopArgs Arguments(Device& device, const Drawn& drawn) {
  const int64_t pairs = drawn.Pair(drawn.rows, 0);
  return {.selected = device.Put(std::vector<int32_t>(pairs, -1)),
          .index = device.Put(std::vector<int32_t>(pairs * drawn.stride, -1)),
          .index_stride = drawn.stride,
          .margin = device.Put(drawn.margin),
          .margin_stride = drawn.stride,
          .count = device.Put(drawn.count),
          .length = device.Put(drawn.length),
          .limit = device.Put(drawn.limit),
          .row_active = device.Put(drawn.active),
          .rows = drawn.rows,
          .kv_heads = drawn.kv_heads};
}

// The number that each head of a row selects, by the words of the contract.
int32_t Expected(const Drawn& drawn, SelectionScope scope, bool forced, int32_t row, int32_t head) {
  if (!drawn.Selects(row)) return 0;
  int64_t sum = 0;
  int64_t pairs = 0;
  for (int32_t r = 0; r < drawn.rows; ++r) {
    for (int32_t h = 0; h < drawn.kv_heads; ++h) {
      const bool counts = scope == SelectionScope::kBatch
                              ? drawn.Selects(r)
                              : r == row && (scope == SelectionScope::kRequest || h == head);
      if (!counts) continue;
      sum += drawn.count[drawn.Pair(r, h)];
      ++pairs;
    }
  }
  const int64_t wanted = forced ? drawn.wanted[row] : sum / pairs;
  return static_cast<int32_t>(
      std::max<int64_t>(1, std::min<int64_t>({wanted, drawn.limit[row], drawn.length[row]})));
}

std::vector<int32_t> Selection(const SelectTopArgs& args, int64_t pair) {
  const int32_t* const index = args.index + pair * args.index_stride;
  EXPECT_EQ(index[args.selected[pair]], -1) << "written past the selection";
  return {index, index + args.selected[pair]};
}

// The `count` slots with the largest margins, ties to the lower `position`, ascending.
std::vector<int32_t> Largest(const float* margin, const std::vector<int32_t>& position,
                             int32_t count) {
  std::vector<int32_t> order(position.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return margin[a] != margin[b] ? margin[a] > margin[b] : position[a] < position[b];
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

TEST(SelectTop, EqualsAStableSortInEveryScope) {
  Random random(3);
  for (int round = 0; round < 150; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Drawn drawn = Draw(random);
    for (const SelectionScope scope :
         {SelectionScope::kRequest, SelectionScope::kHead, SelectionScope::kBatch}) {
      const bool forced = random.Uniform(4) == 0;
      Device device({.threads = 1});
      SelectTopArgs args = Arguments(device, drawn);
      args.scope = scope;
      if (forced) args.wanted = device.Put(drawn.wanted);
      device.backend.SelectTop(args, Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      for (int32_t row = 0; row < drawn.rows; ++row) {
        for (int32_t head = 0; head < drawn.kv_heads; ++head) {
          const int64_t pair = drawn.Pair(row, head);
          ASSERT_EQ(args.selected[pair], Expected(drawn, scope, forced, row, head));
          std::vector<int32_t> position(drawn.length[row]);
          std::iota(position.begin(), position.end(), 0);
          if (args.selected[pair] == 0) continue;
          ASSERT_EQ(Selection(args, pair), Largest(drawn.margin.data() + pair * drawn.stride,
                                                   position, args.selected[pair]));
        }
      }
    }
  }
}

// Slots in no order of position, in scattered blocks, with counts or stamps.
TEST(SelectTop, OfABoundedPoolPrefersLowerPositionsAndMarksUse) {
  Random random(4);
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Drawn drawn = Draw(random);
    for (const SlotUse rule : {SlotUse::kNone, SlotUse::kCount, SlotUse::kStamp}) {
      Device device({.threads = 2});
      const Cache cache = MakeCache(
          device, random, {.lengths = drawn.length, .kv_heads = drawn.kv_heads, .block_size = 8});
      SelectTopArgs args = Arguments(device, drawn);
      args.slot_position = MakeSlots(device, cache);
      args.use_rule = rule;
      if (rule != SlotUse::kNone) args.use = MakeSlots(device, cache);
      args.use_limit = 6;
      std::vector<int32_t> stamp(drawn.rows);
      for (int32_t row = 0; row < drawn.rows; ++row) stamp[row] = 1000 + row;
      args.stamp = device.Put(stamp);
      const auto at = [&](const SlotView& view, int32_t row, int32_t slot,
                          int32_t head) -> int32_t& {
        return static_cast<int32_t*>(view.data)[cpu::SlotOffset(view, row, slot, head)];
      };
      std::vector<std::vector<int32_t>> positions;
      std::vector<std::vector<int32_t>> uses;
      for (int32_t row = 0; row < drawn.rows; ++row) {
        for (int32_t head = 0; head < drawn.kv_heads; ++head) {
          std::vector<int32_t> position(drawn.length[row]);
          std::iota(position.begin(), position.end(), 100);
          random.Shuffle(std::span(position));
          std::vector<int32_t> use(drawn.length[row]);
          for (int32_t slot = 0; slot < drawn.length[row]; ++slot) {
            use[slot] = static_cast<int32_t>(random.Uniform(6));
            at(args.slot_position, row, slot, head) = position[slot];
            if (rule != SlotUse::kNone) at(args.use, row, slot, head) = use[slot];
          }
          positions.push_back(position);
          uses.push_back(use);
        }
      }
      device.backend.SelectTop(args, Stream::kCompute);
      ASSERT_TRUE(device.backend.WaitAll().ok());
      for (int32_t row = 0; row < drawn.rows; ++row) {
        for (int32_t head = 0; head < drawn.kv_heads; ++head) {
          const int64_t pair = drawn.Pair(row, head);
          if (args.selected[pair] == 0) continue;
          const std::vector<int32_t> selected = Selection(args, pair);
          ASSERT_EQ(selected, Largest(drawn.margin.data() + pair * drawn.stride, positions[pair],
                                      args.selected[pair]));
          if (rule == SlotUse::kNone) continue;
          std::vector<int32_t> use = uses[pair];
          for (const int32_t slot : selected) {
            use[slot] = rule == SlotUse::kCount ? use[slot] + 1 : stamp[row];
          }
          // A count that saturates halves all of them.
          if (rule == SlotUse::kCount && std::ranges::max(use) >= 6) {
            for (int32_t& value : use) value /= 2;
          }
          for (int32_t slot = 0; slot < drawn.length[row]; ++slot) {
            ASSERT_EQ(at(args.use, row, slot, head), use[slot]) << "slot " << slot;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvsweep
