#ifndef KVSWEEP_KERNELS_CUDA_READ_BANDWIDTH_H_
#define KVSWEEP_KERNELS_CUDA_READ_BANDWIDTH_H_

#include <cuda_runtime_api.h>

#include <vector>

namespace kvsweep::cuda {

// Bytes a second at which the device adds up 8 GiB (less where less is free) that no cache holds,
// ten samples.
cudaError_t MeasureReading(int device, std::vector<double>* bytes_per_s);

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_READ_BANDWIDTH_H_
