#ifndef KVSWEEP_KERNELS_CPU_THREAD_POOL_H_
#define KVSWEEP_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

// Splits one operation over the cores. The caller is worker 0; the others wait for work, briefly
// spinning, then asleep. Tasks are claimed one by one, so which worker runs a task varies:
// operations make each task's result independent of that, which keeps results equal for any number
// of threads.

namespace kvsweep::cpu {

class ThreadPool {
 public:
  // `threads` >= 1 workers, the caller included.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, worker) for every task in [0, tasks), worker in [0, threads()); returns when
  // all are done. One caller at a time, and no nesting. Allocates nothing.
  template <typename Body>
  void For(int64_t tasks, const Body& body) {
    Run(
        tasks,
        [](const void* context, int64_t task, int worker) {
          (*static_cast<const Body*>(context))(task, worker);
        },
        &body);
  }

 private:
  using Call = void (*)(const void* context, int64_t task, int worker);

  void Run(int64_t tasks, Call call, const void* context);
  void Work(int worker);
  bool Join();
  void Claim(int worker);

  static constexpr uint32_t kOpen = uint32_t{1} << 31;

  // The work at hand. Written by the caller while state_ is 0, read by workers that have joined.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
  // kOpen while workers may join, plus how many are at work. The caller waits only for those: a
  // worker that the system has not woken in time is not missed.
  std::atomic<uint32_t> state_{0};
  std::atomic<uint32_t> generation_{0};  // changes when there is something to join
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_THREAD_POOL_H_
