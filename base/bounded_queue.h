#ifndef KVSWEEP_BASE_BOUNDED_QUEUE_H_
#define KVSWEEP_BASE_BOUNDED_QUEUE_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"

namespace kvsweep {

// A first-in first-out queue between threads that never holds more than its capacity. A full queue
// refuses; it does not wait, since its producers are callbacks that must not block. Closing it
// refuses what comes later and lets the consumers take what is there. All functions may be called
// from many threads.
template <typename T>
class BoundedQueue {
 public:
  // REQUIRES: capacity > 0.
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) { KVSWEEP_CHECK_GT(capacity, 0u); }
  BoundedQueue(const BoundedQueue&) = delete;
  BoundedQueue& operator=(const BoundedQueue&) = delete;

  // Appends `item`. False if the queue is full or closed; `item` is then untouched.
  [[nodiscard]] bool TryPush(T&& item) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    not_empty_.notify_one();
    return true;
  }
  [[nodiscard]] bool TryPush(const T& item) { return TryPush(T(item)); }

  // Takes the oldest item. Waits until there is one, the queue is closed and empty, or
  // clock.NowNs() >= deadline_ns (kNeverNs: no deadline); nullopt in the last two cases.
  std::optional<T> Pop(Clock& clock, int64_t deadline_ns) {
    std::unique_lock<std::mutex> lock(mutex_);
    Wait(clock, deadline_ns, lock);
    if (items_.empty()) return std::nullopt;
    std::optional<T> item(std::move(items_.front()));
    items_.pop_front();
    return item;
  }

  // As Pop, but takes all that is there, at most `max_items`, oldest first; empty in the last two
  // cases.
  std::vector<T> PopBatch(Clock& clock, int64_t deadline_ns, size_t max_items) {
    std::unique_lock<std::mutex> lock(mutex_);
    Wait(clock, deadline_ns, lock);
    std::vector<T> batch;
    while (!items_.empty() && batch.size() < max_items) {
      batch.push_back(std::move(items_.front()));
      items_.pop_front();
    }
    return batch;
  }

  void Close() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    not_empty_.notify_all();
  }

  bool closed() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
  }

  size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return items_.size();
  }

  size_t capacity() const { return capacity_; }

 private:
  void Wait(Clock& clock, int64_t deadline_ns, std::unique_lock<std::mutex>& lock) {
    while (items_.empty() && !closed_ && clock.NowNs() < deadline_ns) {
      clock.WaitUntilNs(not_empty_, lock, deadline_ns);
    }
  }

  const size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable not_empty_;
  std::deque<T> items_;  // size() <= capacity_
  bool closed_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_BOUNDED_QUEUE_H_
