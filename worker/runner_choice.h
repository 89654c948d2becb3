// Which runner program a machine uses: the one for its device where there is one.
#ifndef KVSWEEP_WORKER_RUNNER_CHOICE_H_
#define KVSWEEP_WORKER_RUNNER_CHOICE_H_

#include <string>

#include "base/clock.h"

namespace kvsweep {

struct RunnerChoice {
  std::string path;
  std::string reason;  // for people: what was found, or why the other program was not taken
};

// The runner in `folder`: kvsweep-runner-cuda if it is there and its --probe succeeds within half a
// minute, else kvsweep-runner (whether it exists or not). The reason tells what the probe printed:
// the device, or what is missing (a driver, a library by name).
RunnerChoice ChooseRunner(const std::string& folder, Clock& clock);

// The folder of the program that calls this.
std::string ProgramFolder();

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_RUNNER_CHOICE_H_
