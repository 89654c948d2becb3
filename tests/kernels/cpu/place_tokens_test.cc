// Where tokens of a bounded pool go, against a slow reading of the rule.
#include <algorithm>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kv_rows.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

struct Slot {
  int32_t position = 0;
  int32_t use = 0;
};

// The rule in words: of the older half (rounded up) the least used, of equals the newest.
int32_t Victim(const std::vector<Slot>& slots) {
  std::vector<int32_t> order(slots.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](int32_t slot) { return slots[slot].position; });
  order.resize(slots.size() - slots.size() / 2);
  return *std::ranges::min_element(
      order, {}, [&](int32_t slot) { return std::pair(slots[slot].use, -slots[slot].position); });
}

TEST(PlaceTokens, TakesTheLeastUsedOfTheOlderHalf) {
  Random random(11);
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const auto capacity = 1 + static_cast<int32_t>(random.Uniform(40));
    const auto heads = 1 + static_cast<int32_t>(random.Uniform(4));
    const SlotUse rule = round % 3 == 0   ? SlotUse::kNone
                         : round % 3 == 1 ? SlotUse::kCount
                                          : SlotUse::kStamp;
    Device device({.threads = 2});
    // Row 0 decodes in a full pool, row 1 in one with room, row 2 is not stored, row 3 a prompt's.
    const Cache cache = MakeCache(
        device, random,
        {.lengths = {capacity, capacity, capacity, capacity}, .kv_heads = heads, .block_size = 8});
    PlaceTokensArgs args{.slot = device.Put(std::vector<int32_t>(4 * heads, -7)),
                         .slot_position = MakeSlots(device, cache),
                         .use_rule = rule,
                         .table_row = device.Put(std::vector<int32_t>{0, 1, -1, 3}),
                         .position = device.Put(std::vector<int32_t>{500, 0, 500, 600}),
                         .planned = device.Put(std::vector<int32_t>{capacity - 1, 0, 0, 0}),
                         .capacity = device.Put(std::vector<int32_t>{capacity, capacity, capacity}),
                         .decided_rows = 3,
                         .rows = 4,
                         .kv_heads = heads};
    if (rule != SlotUse::kNone) args.use = MakeSlots(device, cache);
    const auto at = [&](const SlotView& view, int32_t row, int32_t slot, int32_t head) -> int32_t& {
      return static_cast<int32_t*>(view.data)[cpu::SlotOffset(view, row, slot, head)];
    };
    std::vector<int32_t> expected;
    for (int32_t head = 0; head < heads; ++head) {
      std::vector<int32_t> position(capacity);
      std::iota(position.begin(), position.end(), 500 - capacity);
      random.Shuffle(std::span(position));
      std::vector<Slot> slots;
      for (int32_t slot = 0; slot < capacity; ++slot) {
        slots.push_back({position[slot], static_cast<int32_t>(random.Uniform(4))});
        at(args.slot_position, 0, slot, head) = slots[slot].position;
        if (rule != SlotUse::kNone) at(args.use, 0, slot, head) = slots[slot].use;
      }
      expected.push_back(rule == SlotUse::kNone ? capacity - 1 : Victim(slots));
    }
    device.backend.PlaceTokens(args, Stream::kCompute);
    ASSERT_TRUE(device.backend.WaitAll().ok());
    for (int32_t head = 0; head < heads; ++head) {
      ASSERT_EQ(args.slot[head], expected[head]);
      EXPECT_EQ(args.slot[heads + head], 0);
      EXPECT_EQ(args.slot[2 * heads + head], -7) << "not stored";
      EXPECT_EQ(args.slot[3 * heads + head], 0) << "prompts go where they were planned";
      EXPECT_EQ(at(args.slot_position, 0, expected[head], head), 500);
      EXPECT_EQ(at(args.slot_position, 3, 0, head), 600);
      if (rule == SlotUse::kNone) continue;
      EXPECT_EQ(at(args.use, 0, expected[head], head), rule == SlotUse::kStamp ? 500 : 0);
      EXPECT_EQ(at(args.use, 1, 0, head), 0);
    }
  }
}

// Keys and values go to a slot of each head's own.
TEST(Append, PutsEachHeadIntoItsOwnSlot) {
  Random random(12);
  Device device;
  const Cache cache =
      MakeCache(device, random, {.lengths = {9, 9}, .kv_heads = 3, .block_size = 4});
  const std::vector<float> key = RandomFloats(random, 2 * 3 * 8);
  const std::vector<float> value = RandomFloats(random, 2 * 3 * 8);
  const std::vector<int32_t> slot = {0, 5, 8, 7, 7, 1};
  device.backend.Append({.target = cache.view,
                         .key = device.PutRows(key, 2, 24),
                         .value = device.PutRows(value, 2, 24),
                         .table_row = device.Put(std::vector<int32_t>{1, 0}),
                         .slot = device.Put(slot),
                         .slot_by_head = true,
                         .rows = 2,
                         .kv_heads = 3,
                         .head_dim = 8},
                        Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  for (int32_t token = 0; token < 2; ++token) {
    for (int32_t head = 0; head < 3; ++head) {
      std::vector<float> stored(8);
      const int64_t offset = cpu::KvOffset(cache.view, 1 - token, slot[token * 3 + head], head);
      cpu::LoadElements(stored.data(), cache.view.value, DType::kF32, offset, 8);
      const auto first = value.begin() + (token * 3 + head) * 8;
      EXPECT_EQ(stored, std::vector<float>(first, first + 8));
    }
  }
}

}  // namespace
}  // namespace kvsweep
