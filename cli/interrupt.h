#ifndef KVSWEEP_CLI_INTERRUPT_H_
#define KVSWEEP_CLI_INTERRUPT_H_

#include <signal.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

namespace kvsweep {

// Ctrl-C, SIGTERM and the end of the terminal as a call instead of a death, for as long as this
// object lives. The signals are blocked in this thread and in those it starts from now on, and
// taken by a thread of their own, so that no code runs inside a signal handler. Make it before any
// other thread. The second signal ends the process at once.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool happened() const { return happened_; }

  // What to do at the first signal, on the other thread; at once if it has come already. An empty
  // function does nothing.
  void OnSignal(std::function<void()> action);

 private:
  sigset_t signals_;
  sigset_t before_;
  std::atomic<bool> happened_ = false;
  std::atomic<bool> done_ = false;
  std::mutex mutex_;
  std::function<void()> action_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_INTERRUPT_H_
