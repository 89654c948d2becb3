#include "worker/strategies/page_pool.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/random.h"

namespace kvsweep {
namespace {

TEST(PagePoolTest, TakesAllOrNothing) {
  PagePool pool(3);
  std::vector<PageIndex> held;
  EXPECT_FALSE(pool.Take(4, &held));
  EXPECT_TRUE(held.empty());
  EXPECT_TRUE(pool.Take(3, &held));
  EXPECT_EQ(pool.free_pages(), 0);
  pool.GiveBack(1, &held);
  EXPECT_EQ(held.size(), 2u);
  EXPECT_EQ(pool.free_pages(), 1);
}

TEST(PagePoolTest, GivingBackTwiceIsCaught) {
  PagePool pool(2);
  std::vector<PageIndex> held;
  ASSERT_TRUE(pool.Take(1, &held));
  std::vector<PageIndex> again = held;
  pool.GiveBack(1, &held);
  EXPECT_DEATH(pool.GiveBack(1, &again), "given back twice");
}

TEST(PagePoolTest, RandomUseConservesPages) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    PagePool pool(40);
    std::vector<std::vector<PageIndex>> owners(6);
    for (int step = 0; step < 2000; ++step) {
      std::vector<PageIndex>& owner = owners[random.Uniform(owners.size())];
      if (random.Uniform(2) == 0) {
        (void)pool.Take(static_cast<int32_t>(random.Uniform(8)), &owner);
      } else {
        pool.GiveBack(static_cast<int32_t>(random.Uniform(owner.size() + 1)), &owner);
      }
      pool.CheckInvariants();
      std::vector<int> owned(40);
      size_t held = 0;
      for (const auto& pages : owners) {
        held += pages.size();
        for (PageIndex page : pages) EXPECT_EQ(++owned[static_cast<size_t>(page)], 1);
      }
      ASSERT_EQ(static_cast<int32_t>(held), pool.used_pages());
    }
  }
}

TEST(PagesForTest, RoundsUp) {
  EXPECT_EQ(PagesFor(0, 16), 0);
  EXPECT_EQ(PagesFor(1, 16), 1);
  EXPECT_EQ(PagesFor(16, 16), 1);
  EXPECT_EQ(PagesFor(17, 16), 2);
}

}  // namespace
}  // namespace kvsweep
