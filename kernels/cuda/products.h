// The ways of a projection. The skinny one and the panel one add in an order that no row count
// changes, so batch-invariant mode has them, and on Hopper they are the fastest for up to 32 and 64
// rows. The library's is the fastest for more. The general one takes any shape, alignment and
// format, and adds in the order of the columns.
#ifndef KVSWEEP_KERNELS_CUDA_PRODUCTS_H_
#define KVSWEEP_KERNELS_CUDA_PRODUCTS_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

#include "kernels/arguments.h"
#include "kernels/cuda/launch.h"

namespace kvsweep::cuda {

cudaError_t LaunchGeneralProduct(const GemmArgs& args, const LaunchContext& context);

// Whether the skinny product takes these arguments: bf16, and 16-byte accesses everywhere.
bool IsSkinnyProduct(const GemmArgs& args, const LaunchContext& context);
// Whether it is faster than the library's. REQUIRES: IsSkinnyProduct.
bool IsSkinnyProductFaster(const GemmArgs& args);  // on Hopper, up to 32 rows
// REQUIRES: IsSkinnyProduct. More than 64 rows, on Hopper 32, take several passes over the weights.
// The order in which an output is summed depends on the weights' shape and on the device alone,
// never on the rows.
cudaError_t LaunchSkinnyProduct(const GemmArgs& args, const LaunchContext& context);

// Its kernel for Hopper (skinny_product_hopper.cu): whether it runs on the current device, and one
// pass of at most kHopperSkinnyRows rows.
inline constexpr int32_t kHopperSkinnyRows = 32;
bool HasHopperSkinnyProduct();
cudaError_t LaunchHopperSkinnyProduct(const GemmArgs& args, const LaunchContext& context);
// The same kernel with the gate in it. REQUIRES: CanGate.
cudaError_t LaunchHopperSkinnyProduct(const GatedGemmArgs& args, const LaunchContext& context);

// A kernel for Hopper and more rows (panel_product_hopper.cu): whether it takes these arguments,
// and whether it is the fastest for them; passes of at most kPanelRows rows. The order in which an
// output is summed depends on the weights' shape and on the device alone; whether it takes the
// arguments also on the alignment of `out` and on whether its stride is even, so batch-invariant
// callers keep those the same.
inline constexpr int32_t kPanelRows = 64;
bool IsPanelProduct(const GemmArgs& args, const LaunchContext& context);
bool IsPanelProductFaster(const GemmArgs& args, const LaunchContext& context);
cudaError_t LaunchPanelProduct(const GemmArgs& args, const LaunchContext& context);
// The same kernel with the gate in it, one pass. REQUIRES: CanGate.
cudaError_t LaunchPanelProduct(const GatedGemmArgs& args, const LaunchContext& context);

// Whether one of those two does a product and its gate at once, and that one.
bool CanGate(const GatedGemmArgs& args, const LaunchContext& context);
cudaError_t Launch(const GatedGemmArgs& args, const LaunchContext& context);

// `rows` rows of a product from `row` on.
GemmArgs RowsOf(GemmArgs args, int32_t row, int32_t rows);

// The end of a product whose `sums` [T, N] (rows sums_stride apart, 16-byte aligned) are there:
// out = activation(sums + bias), added to what out holds if accumulate.
cudaError_t LaunchFinish(const GemmArgs& args, const float* sums, int64_t sums_stride,
                         const LaunchContext& context);

// cuBLASLt, with the algorithm of each shape chosen once. Where a bias or an activation follows,
// sums stay f32 until then, in the workspace and some rows at a time, so that outputs are rounded
// once. One thread.
class ProductLibrary {
 public:
  ProductLibrary() = default;
  ~ProductLibrary();
  ProductLibrary(const ProductLibrary&) = delete;
  ProductLibrary& operator=(const ProductLibrary&) = delete;

  // Before the first Launch, outside of a capture.
  cudaError_t Open();
  // Whether the library takes these arguments: bf16, 16-byte alignment.
  static bool Takes(const GemmArgs& args, const LaunchContext& context);
  // REQUIRES: Takes. cudaErrorNotSupported, and nothing enqueued, where it has no algorithm.
  cudaError_t Launch(const GemmArgs& args, const LaunchContext& context);

 private:
  struct Choice;
  // rows, out columns, in columns, strides of in and out, accumulate, f32 out
  using Key = std::tuple<int32_t, int32_t, int32_t, int64_t, int64_t, bool, bool>;
  cublasStatus_t Choose(const GemmArgs& args, size_t workspace_bytes, Choice* choice);
  // The product alone, without bias and activation.
  cudaError_t Multiply(const GemmArgs& args, const LaunchContext& context);

  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, Choice> choices_;
};

// Descriptions and algorithm of one shape.
struct ProductLibrary::Choice {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t weight = nullptr;
  cublasLtMatrixLayout_t in = nullptr;
  cublasLtMatrixLayout_t out = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
  bool found = false;
};

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_PRODUCTS_H_
