#include "base/bounded_queue.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

namespace kvsweep {
namespace {

TEST(BoundedQueue, KeepsOrderAndRefusesWhenFull) {
  SimulatedClock clock;
  BoundedQueue<int> queue(2);
  EXPECT_TRUE(queue.TryPush(1));
  EXPECT_TRUE(queue.TryPush(2));
  EXPECT_FALSE(queue.TryPush(3));
  EXPECT_EQ(queue.size(), 2u);
  EXPECT_EQ(queue.Pop(clock, kNeverNs), 1);
  EXPECT_TRUE(queue.TryPush(4));
  EXPECT_EQ(queue.PopBatch(clock, kNeverNs, 10), (std::vector<int>{2, 4}));
}

TEST(BoundedQueue, LeavesARefusedItemUntouched) {
  BoundedQueue<std::unique_ptr<int>> queue(1);
  ASSERT_TRUE(queue.TryPush(std::make_unique<int>(1)));
  auto refused = std::make_unique<int>(2);
  EXPECT_FALSE(queue.TryPush(std::move(refused)));
  ASSERT_NE(refused, nullptr);
  EXPECT_EQ(*refused, 2);
}

TEST(BoundedQueue, PopGivesUpAtItsDeadline) {
  SimulatedClock clock(100);
  BoundedQueue<int> queue(1);
  EXPECT_EQ(queue.Pop(clock, 100), std::nullopt);
  std::thread consumer([&] { EXPECT_EQ(queue.Pop(clock, 500), std::nullopt); });
  clock.AdvanceToNs(500);
  consumer.join();
}

TEST(BoundedQueue, BatchTakesAtMostWhatIsAsked) {
  SimulatedClock clock;
  BoundedQueue<int> queue(8);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(queue.TryPush(i));
  EXPECT_EQ(queue.PopBatch(clock, kNeverNs, 3), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(queue.size(), 2u);
}

TEST(BoundedQueue, CloseRefusesNewItemsAndLetsOldOnesOut) {
  BoundedQueue<int> queue(2);
  ASSERT_TRUE(queue.TryPush(1));
  queue.Close();
  EXPECT_TRUE(queue.closed());
  EXPECT_FALSE(queue.TryPush(2));
  EXPECT_EQ(queue.Pop(RealClock::Get(), kNeverNs), 1);
  EXPECT_EQ(queue.Pop(RealClock::Get(), kNeverNs), std::nullopt);
}

TEST(BoundedQueue, CloseWakesAWaitingConsumer) {
  BoundedQueue<int> queue(1);
  std::thread consumer([&] { EXPECT_EQ(queue.Pop(RealClock::Get(), kNeverNs), std::nullopt); });
  queue.Close();
  consumer.join();
}

// Every item pushed by several producers reaches exactly one of several consumers.
TEST(BoundedQueue, LosesAndDoublesNothingBetweenThreads) {
  constexpr int kThreads = 3;
  constexpr int kItems = 2000;
  BoundedQueue<int> queue(7);
  std::vector<std::vector<int>> taken(kThreads);
  std::vector<std::thread> consumers, producers;
  for (int c = 0; c < kThreads; ++c) {
    consumers.emplace_back([&, c] {
      while (const auto item = queue.Pop(RealClock::Get(), kNeverNs)) taken[c].push_back(*item);
    });
  }
  for (int p = 0; p < kThreads; ++p) {
    producers.emplace_back([&, p] {
      for (int i = 0; i < kItems; ++i) {
        while (!queue.TryPush(p * kItems + i)) std::this_thread::yield();
      }
    });
  }
  for (std::thread& producer : producers) producer.join();
  queue.Close();
  for (std::thread& consumer : consumers) consumer.join();

  std::vector<int> seen(kThreads * kItems, 0);
  for (const auto& items : taken) {
    for (const int item : items) ++seen[item];
  }
  EXPECT_EQ(seen, std::vector<int>(kThreads * kItems, 1));
}

}  // namespace
}  // namespace kvsweep
