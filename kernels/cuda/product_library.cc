#include <algorithm>

#include "kernels/cuda/products.h"

namespace kvsweep::cuda {
namespace {

constexpr int64_t kAlignment = 16;

bool IsAligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 && stride_bytes % kAlignment == 0;
}

cudaError_t ToCuda(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return cudaSuccess;
    case CUBLAS_STATUS_NOT_SUPPORTED:
    case CUBLAS_STATUS_INVALID_VALUE:
      return cudaErrorNotSupported;
    case CUBLAS_STATUS_ALLOC_FAILED:
      return cudaErrorMemoryAllocation;
    default:
      return cudaErrorUnknown;
  }
}

}  // namespace

ProductLibrary::~ProductLibrary() {
  for (const auto& [key, choice] : choices_) {
    cublasLtMatmulDescDestroy(choice.product);
    cublasLtMatrixLayoutDestroy(choice.weight);
    cublasLtMatrixLayoutDestroy(choice.in);
    cublasLtMatrixLayoutDestroy(choice.out);
  }
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

cudaError_t ProductLibrary::Open() { return ToCuda(cublasLtCreate(&handle_)); }

bool ProductLibrary::Takes(const GemmArgs& args, const LaunchContext& context) {
  const int64_t out_bytes = args.f32_out ? 4 : 2;
  return context.weight_dtype == DType::kBf16 &&
         IsAligned(args.weight, int64_t{2} * args.in_columns) &&
         IsAligned(args.in.data, 2 * args.in.stride) &&
         IsAligned(args.out.data, out_bytes * args.out.stride);
}

// The library counts columns first: out^T [N, T] = weight [N, K] * in^T [K, T], where the row-major
// weight is its own transpose.
cublasStatus_t ProductLibrary::Choose(const GemmArgs& args, size_t workspace_bytes,
                                      Choice* choice) {
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const cudaDataType_t out_type = args.f32_out ? CUDA_R_32F : CUDA_R_16BF;
  cublasStatus_t status =
      cublasLtMatmulDescCreate(&choice->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  status = cublasLtMatmulDescSetAttribute(choice->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                          sizeof(transposed));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  status = cublasLtMatrixLayoutCreate(&choice->weight, CUDA_R_16BF,
                                      static_cast<uint64_t>(args.in_columns),
                                      static_cast<uint64_t>(args.out_columns), args.in_columns);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  status =
      cublasLtMatrixLayoutCreate(&choice->in, CUDA_R_16BF, static_cast<uint64_t>(args.in_columns),
                                 static_cast<uint64_t>(args.rows), args.in.stride);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  status =
      cublasLtMatrixLayoutCreate(&choice->out, out_type, static_cast<uint64_t>(args.out_columns),
                                 static_cast<uint64_t>(args.rows), args.out.stride);
  if (status != CUBLAS_STATUS_SUCCESS) return status;

  cublasLtMatmulPreference_t preference = nullptr;
  status = cublasLtMatmulPreferenceCreate(&preference);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace_bytes, sizeof(workspace_bytes));
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  status = cublasLtMatmulAlgoGetHeuristic(handle_, choice->product, choice->weight, choice->in,
                                          choice->out, choice->out, preference, 1, &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  choice->algorithm = result.algo;
  choice->found = true;
  return CUBLAS_STATUS_SUCCESS;
}

// Half of the workspace is the library's, half holds sums.
cudaError_t ProductLibrary::Multiply(const GemmArgs& args, const LaunchContext& context) {
  const size_t workspace_bytes = context.workspace_bytes / 2;
  const Key key{args.rows,       args.out_columns, args.in_columns, args.in.stride,
                args.out.stride, args.accumulate,  args.f32_out};
  auto found = choices_.find(key);
  if (found == choices_.end()) {
    found = choices_.emplace(key, Choice()).first;
    const cublasStatus_t status = Choose(args, workspace_bytes, &found->second);
    if (status != CUBLAS_STATUS_SUCCESS) return ToCuda(status);
  }
  const Choice& choice = found->second;
  if (!choice.found) return cudaErrorNotSupported;
  const float one = 1.0f;
  const float kept = args.accumulate ? 1.0f : 0.0f;
  return ToCuda(cublasLtMatmul(handle_, choice.product, &one, args.weight, choice.weight,
                               args.in.data, choice.in, &kept, args.out.data, choice.out,
                               args.out.data, choice.out, &choice.algorithm, context.workspace,
                               workspace_bytes, context.stream));
}

cudaError_t ProductLibrary::Launch(const GemmArgs& args, const LaunchContext& context) {
  if (args.bias == nullptr && !args.relu) return Multiply(args, context);
  std::byte* const sums = context.workspace + context.workspace_bytes / 2;
  const int64_t stride = (args.out_columns + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t fitting = static_cast<int64_t>(context.workspace_bytes / 2) / (4 * stride);
  if (fitting == 0) return cudaErrorNotSupported;
  for (int64_t row = 0; row < args.rows; row += fitting) {
    const GemmArgs part = RowsOf(args, static_cast<int32_t>(row),
                                 static_cast<int32_t>(std::min(fitting, args.rows - row)));
    GemmArgs product = part;
    product.out = {.data = sums, .stride = stride};
    product.f32_out = true;
    product.accumulate = false;
    cudaError_t error = Multiply(product, context);
    if (error != cudaSuccess) return error;
    error = LaunchFinish(part, reinterpret_cast<const float*>(sums), stride, AfterKernel(context));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvsweep::cuda
