// The operations that have a kernel of their own for Hopper (sm_90a) beside the one for every
// architecture: which calls it takes, and its launcher. Their results agree up to rounding.
#ifndef KVSWEEP_KERNELS_CUDA_HOPPER_H_
#define KVSWEEP_KERNELS_CUDA_HOPPER_H_

#include <cuda_runtime_api.h>

#include "kernels/arguments.h"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {

bool IsForHopper(const PrefillAttentionArgs& args, const LaunchContext& context);
cudaError_t LaunchOnHopper(const PrefillAttentionArgs& args, const LaunchContext& context);

bool IsForHopper(const ColumnSumArgs& args, const LaunchContext& context);
cudaError_t LaunchOnHopper(const ColumnSumArgs& args, const LaunchContext& context);

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_HOPPER_H_
