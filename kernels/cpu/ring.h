#ifndef KVSWEEP_KERNELS_CPU_RING_H_
#define KVSWEEP_KERNELS_CPU_RING_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/check.h"

namespace kvsweep::cpu {

// A first-in, first-out queue in one array that doubles when full and never shrinks.
template <typename T>
class Ring {
 public:
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  // How often the array has grown.
  int64_t growths() const { return growths_; }

  const T& front() const {
    KVSWEEP_CHECK(size_ > 0);
    return items_[first_];
  }

  void Push(const T& item) {
    if (size_ == items_.size()) Grow();
    items_[(first_ + size_) % items_.size()] = item;
    ++size_;
  }

  void Pop() {
    KVSWEEP_CHECK(size_ > 0);
    first_ = (first_ + 1) % items_.size();
    --size_;
  }

 private:
  void Grow() {
    std::vector<T> larger(std::max<size_t>(64, 2 * items_.size()));
    for (size_t i = 0; i < size_; ++i) larger[i] = items_[(first_ + i) % items_.size()];
    items_ = std::move(larger);
    first_ = 0;
    ++growths_;
  }

  std::vector<T> items_;
  size_t first_ = 0;
  size_t size_ = 0;
  int64_t growths_ = 0;
};

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_RING_H_
