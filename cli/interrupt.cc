#include "cli/interrupt.h"

#include <pthread.h>
#include <unistd.h>

#include <utility>

#include "cli/exit_code.h"

namespace kvsweep {

Interrupt::Interrupt() {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGINT);
  sigaddset(&signals_, SIGTERM);
  struct sigaction hang_up = {};
  // Under nohup it stays ignored.
  if (sigaction(SIGHUP, nullptr, &hang_up) == 0 && hang_up.sa_handler != SIG_IGN) {
    sigaddset(&signals_, SIGHUP);
  }
  pthread_sigmask(SIG_BLOCK, &signals_, &before_);
  thread_ = std::thread([this] {
    int signal = 0;
    while (sigwait(&signals_, &signal) == 0 && !done_) {
      if (happened_.exchange(true)) _exit(kExitInterrupted);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (action_) action_();
    }
  });
}

Interrupt::~Interrupt() {
  done_ = true;
  pthread_kill(thread_.native_handle(), SIGTERM);
  thread_.join();
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void Interrupt::OnSignal(std::function<void()> action) {
  const std::lock_guard<std::mutex> lock(mutex_);
  action_ = std::move(action);
  if (happened_ && action_) action_();
}

}  // namespace kvsweep
