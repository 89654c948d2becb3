// What a trial's numbers depend on beside the device: the host's clocks and memory nodes.
#ifndef KVSWEEP_WORKER_TELEMETRY_MACHINE_FACTS_H_
#define KVSWEEP_WORKER_TELEMETRY_MACHINE_FACTS_H_

#include <string>

namespace kvsweep {

// "2.10 GHz (0.80 to 3.90), governor performance": the mean over cores now, and where the kernel
// tells them the bounds and who sets it. `root` stands before /sys and /proc.
std::string HostClockText(const std::string& root = "");

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_MACHINE_FACTS_H_
