#ifndef KVSWEEP_TESTS_GPU_FAULT_KERNELS_H_
#define KVSWEEP_TESTS_GPU_FAULT_KERNELS_H_

namespace kvsweep {

// Writes to an address that nobody has. The process has lost the device when it is reached.
void LaunchIllegalAccess();
// Takes every multiprocessor and never ends.
void LaunchEndlessLoop();

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_GPU_FAULT_KERNELS_H_
