// Independent pieces of work on all cores: for preparation, where nobody's time is measured.
#ifndef KVSWEEP_BASE_PARALLEL_FOR_H_
#define KVSWEEP_BASE_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace kvsweep {

// Calls work(i) once for every i < count, several at a time, this thread among those that do; all
// are done when it returns.
template <typename Work>
void ParallelFor(size_t count, const Work& work) {
  std::atomic<size_t> next = 0;
  const auto take = [&] {
    for (size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::jthread> others;
  const size_t threads = std::min<size_t>(count, std::thread::hardware_concurrency());
  try {
    for (size_t i = 1; i < threads; ++i) others.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads may be made: those that there are do all of it.
  }
  take();
}

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_PARALLEL_FOR_H_
