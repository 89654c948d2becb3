#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <vector>

#include "gtest/gtest.h"

namespace kvsweep::cpu {
namespace {

TEST(ThreadPool, RunsEveryTaskOnceForAnyNumberOfThreads) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.threads(), threads);
    for (int64_t tasks : {0, 1, 2, 7, 100}) {
      for (int round = 0; round < 50; ++round) {
        std::vector<std::atomic<int>> ran(tasks);
        std::atomic<bool> worker_in_range{true};
        pool.For(tasks, [&](int64_t task, int worker) {
          ran[task].fetch_add(1);
          if (worker < 0 || worker >= threads) worker_in_range = false;
        });
        for (const std::atomic<int>& count : ran) ASSERT_EQ(count.load(), 1);
        ASSERT_TRUE(worker_in_range);
      }
    }
  }
}

// Workers that have gone to sleep wake up for the next work: many starts and stops of the pool
// itself.
TEST(ThreadPool, StartsAndStopsManyTimes) {
  int64_t total = 0;
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(3);
    std::atomic<int64_t> sum{0};
    pool.For(10, [&](int64_t task, int) { sum.fetch_add(task); });
    total += sum.load();
  }
  EXPECT_EQ(total, 50 * 45);
}

}  // namespace
}  // namespace kvsweep::cpu
