#ifndef KVSWEEP_KERNELS_CPU_WORKSPACE_H_
#define KVSWEEP_KERNELS_CPU_WORKSPACE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/cpu/thread_pool.h"

// Scratch memory of the operations: it grows to what the largest call so far has asked for and
// stays, so that nothing is allocated after warm-up. No operation keeps anything in it from one
// call to the next.

namespace kvsweep::cpu {

class Workspace {
 public:
  static constexpr int64_t kAlignment = 64;

  // Forgets all that was taken and makes room for `bytes`, rounded up for each array by Padded.
  void Reset(int64_t bytes);

  // The next `count` elements, aligned to kAlignment bytes, content undefined; valid until Reset.
  // REQUIRES: room for them.
  template <typename T>
  T* Take(int64_t count) {
    static_assert(std::is_trivial_v<T>);
    return static_cast<T*>(TakeBytes(Padded<T>(count)));
  }

  // Bytes that Take<T>(count) uses.
  template <typename T>
  static constexpr int64_t Padded(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

  // How often Reset has had to allocate.
  int64_t growths() const { return growths_; }

 private:
  void* TakeBytes(int64_t bytes);

  std::unique_ptr<std::byte[]> memory_;
  std::byte* begin_ = nullptr;  // memory_ rounded up to kAlignment
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t growths_ = 0;
};

// What operations run with.
struct Context {
  Context(int threads, bool invariant)
      : pool(threads), worker(pool.threads()), batch_invariant(invariant) {}

  // Makes room for `bytes` in every worker's workspace before any of them has work: which of them
  // gets some is chance, and what has been allocated must not be.
  void ReserveWorkers(int64_t bytes) {
    for (Workspace& workspace : worker) workspace.Reset(bytes);
  }

  ThreadPool pool;
  Workspace shared;               // for what all workers of an operation read or write
  std::vector<Workspace> worker;  // [pool.threads()], each used by its worker alone
  bool batch_invariant = false;   // a row's result does not depend on the other rows
};

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_WORKSPACE_H_
