// Tensor-core products of 16-bit tiles in shared memory, and the asynchronous copies that fill
// them. Rows of a tile are padded by 16 bytes, so that eight of them start in different banks.
#ifndef KVSWEEP_KERNELS_CUDA_MMA_CUH_
#define KVSWEEP_KERNELS_CUDA_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace kvsweep::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr int kRowPadding = 8;  // elements

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros if not `valid`, when `source` is not read. Without a
// hint that more of the surroundings are wanted: one of 256 bytes makes the L2 cache look up every
// sector twice, which costs a stream of cold data 6 % of its rate (H200).
__device__ __forceinline__ void CopyAsync(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsync(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most `kPending` groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8], in the fragment layouts of mma.m16n8k16.
template <typename T>
__device__ __forceinline__ void Multiply(float& c0, float& c1, float& c2, float& c3, uint32_t a0,
                                         uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

template <typename T>
__device__ __forceinline__ void Multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  Multiply<T>(c[0], c[1], c[2], c[3], a0, a1, a2, a3, b0, b1);
}

// The same with rows 8 .. 15 of `a` zero: eight rows of results.
template <typename T>
__device__ __forceinline__ void MultiplyEight(float& c0, float& c1, uint32_t a0, uint32_t a2,
                                              uint32_t b0, uint32_t b1) {
  float unused0 = 0.0f;
  float unused1 = 0.0f;
  Multiply<T>(c0, c1, unused0, unused1, a0, 0u, a2, 0u, b0, b1);
}

// c [32, N] += a [32, D] * b [N, D]^T by one warp, rows padded: c[m][n] is the fragment of rows 16
// * m and columns 8 * n on. A lane gives the address of its row of both: row lane % 16, column lane
// / 16
// * 8 of a; row lane / 16 * 8 + lane % 8, column lane / 8 % 2 * 8 of b.
template <typename T, int D, int N>
__device__ __forceinline__ void MultiplyRows(float (&c)[2][N / 8][4], uint32_t a_address,
                                             uint32_t b_address) {
  constexpr int kRow = D + kRowPadding;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[2][4];
    LoadMatrices(a[0], a_address + k * 16 * sizeof(T));
    LoadMatrices(a[1], a_address + (16 * kRow + k * 16) * sizeof(T));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      LoadMatrices(b, b_address + (n * 16 * kRow + k * 16) * sizeof(T));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float(&low)[4] = c[m][2 * n];
        float(&high)[4] = c[m][2 * n + 1];
        Multiply<T>(low[0], low[1], low[2], low[3], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        Multiply<T>(high[0], high[1], high[2], high[3], a[m][0], a[m][1], a[m][2], a[m][3], b[2],
                    b[3]);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_MMA_CUH_
