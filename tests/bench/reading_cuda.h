#ifndef KVSWEEP_TESTS_BENCH_READING_CUDA_H_
#define KVSWEEP_TESTS_BENCH_READING_CUDA_H_

#include <vector>

namespace kvsweep {

// Bytes a second at which the device adds up 8 GiB (less where less is free) that no cache holds,
// ten samples. Returns the CUDA error, 0 for none.
int ReadCudaBandwidth(std::vector<double>* bytes_per_s);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_READING_CUDA_H_
