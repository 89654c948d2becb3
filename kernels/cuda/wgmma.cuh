// What Hopper (sm_90a) adds for matrix kernels: products that a warpgroup of 128 threads starts and
// waits for, and boxes of tensors that one thread has copied into shared memory (bulk_copy.cuh has
// the barriers that such copies complete on). Compiled for another architecture the kernels that
// use this have no body; IsBuilt (tensor_map.h) tells.
//
// A tile [R, D] of 16-bit elements lies in shared memory as D / 64 panels [R, 64], one behind the
// other. A panel's rows are 128 bytes long, and chunk c of 16 bytes of row r stands at c ^ (r % 8):
// so copies and products write and read all banks. Panels start at multiples of 1,024 bytes.
#ifndef KVSWEEP_KERNELS_CUDA_WGMMA_CUH_
#define KVSWEEP_KERNELS_CUDA_WGMMA_CUH_

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/mma.cuh"

namespace kvsweep::cuda {

inline constexpr int kWarpgroup = 128;    // threads
inline constexpr int kPanelColumns = 64;  // elements
inline constexpr int kPanelRowBytes = 128;

// A ring of stages that producers fill and consumers empty: which stage comes next, and the parity
// of the phase that fills it.
struct RingPlace {
  const int stages;  // of the ring
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit RingPlace(int stages_of_ring) : stages(stages_of_ring) {}
  __device__ __forceinline__ void Advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ------------------------------------------------------------------------------------------
// copies

// The box of `map` at element (column, row, head, block) (tensor_map.h) to shared memory; elements
// outside the tensor are zeros. Its bytes count at `barrier`.
__device__ __forceinline__ void CopyBox(uint32_t target, const CUtensorMap& map, uint32_t barrier,
                                        int column, int row, int head, int block) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(block)
      : "memory");
}
__device__ __forceinline__ void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ------------------------------------------------------------------------------------------
// products

// Moves registers between the warpgroups of a block, by all warps of one.
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product of a batch: registers written so far count for it.
__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` committed batches are under way.
template <int kPending>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Results are not touched by the compiler before this point.
template <int N>
__device__ __forceinline__ void Settle(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Where an operand lies, as products take it. Rows along the sum's dimension (keys and queries: a
// row is what is multiplied): 16 elements of a panel further is + 32 bytes.
__device__ __forceinline__ uint64_t RowOperand(uint32_t address) {
  return (address & 0x3ffffu) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
// Columns along the sum's dimension (values: tokens are rows): 16 tokens further is + 2,048 bytes.
__device__ __forceinline__ uint64_t ColumnOperand(uint32_t address, uint32_t panel_bytes) {
  return (address & 0x3ffffu) >> 4 | uint64_t{panel_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
__device__ __forceinline__ uint64_t Further(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

#define KVSWEEP_8(c, i)                                                                 \
  "+f"((c)[i]), "+f"((c)[i + 1]), "+f"((c)[i + 2]), "+f"((c)[i + 3]), "+f"((c)[i + 4]), \
      "+f"((c)[i + 5]), "+f"((c)[i + 6]), "+f"((c)[i + 7])
#define KVSWEEP_16(c, i) KVSWEEP_8(c, i), KVSWEEP_8(c, i + 8)
#define KVSWEEP_32(c, i) KVSWEEP_16(c, i), KVSWEEP_16(c, i + 16)
#define KVSWEEP_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KVSWEEP_NAMES_16 KVSWEEP_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KVSWEEP_NAMES_24 KVSWEEP_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define KVSWEEP_NAMES_32 KVSWEEP_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define KVSWEEP_NAMES_40 KVSWEEP_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KVSWEEP_NAMES_48 KVSWEEP_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KVSWEEP_NAMES_56 KVSWEEP_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define KVSWEEP_NAMES_64 KVSWEEP_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
// `columns` of the result, the names of its registers, of a, of b and of kAdd; the registers.
#define KVSWEEP_START_PRODUCT(columns, names, a_name, b_name, add_name, ...)               \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred add;\n"                                                                  \
      "setp.ne.b32 add, " add_name                                                         \
      ", 0;\n"                                                                             \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" names "}, " a_name \
      ", " b_name                                                                          \
      ", add, 1, 1, 0, 0;\n"                                                               \
      "}\n"                                                                                \
      : __VA_ARGS__                                                                        \
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))

// c [64, N] (+)= a [64, 16] * b [N, 16]^T, both RowOperands, N = 2 * kRegisters, a multiple of 16.
// Thread t of the warpgroup holds rows t / 32 * 16 + t % 32 / 4 + {0, 8}: c[4 * n + 2 * {0, 1} +
// {0, 1}] is column n * 8 + t % 4 * 2 + {0, 1}.
template <bool kAdd, int kRegisters>
__device__ __forceinline__ void StartProduct(float (&c)[kRegisters], uint64_t a, uint64_t b) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 8 && kRegisters <= 64);
  if constexpr (kRegisters == 8) {
    KVSWEEP_START_PRODUCT("16", KVSWEEP_NAMES_8, "%8", "%9", "%10", KVSWEEP_8(c, 0));
  } else if constexpr (kRegisters == 16) {
    KVSWEEP_START_PRODUCT("32", KVSWEEP_NAMES_16, "%16", "%17", "%18", KVSWEEP_16(c, 0));
  } else if constexpr (kRegisters == 24) {
    KVSWEEP_START_PRODUCT("48", KVSWEEP_NAMES_24, "%24", "%25", "%26", KVSWEEP_16(c, 0),
                          KVSWEEP_8(c, 16));
  } else if constexpr (kRegisters == 32) {
    KVSWEEP_START_PRODUCT("64", KVSWEEP_NAMES_32, "%32", "%33", "%34", KVSWEEP_32(c, 0));
  } else if constexpr (kRegisters == 40) {
    KVSWEEP_START_PRODUCT("80", KVSWEEP_NAMES_40, "%40", "%41", "%42", KVSWEEP_32(c, 0),
                          KVSWEEP_8(c, 32));
  } else if constexpr (kRegisters == 48) {
    KVSWEEP_START_PRODUCT("96", KVSWEEP_NAMES_48, "%48", "%49", "%50", KVSWEEP_32(c, 0),
                          KVSWEEP_16(c, 32));
  } else if constexpr (kRegisters == 56) {
    KVSWEEP_START_PRODUCT("112", KVSWEEP_NAMES_56, "%56", "%57", "%58", KVSWEEP_32(c, 0),
                          KVSWEEP_16(c, 32), KVSWEEP_8(c, 48));
  } else {
    KVSWEEP_START_PRODUCT("128", KVSWEEP_NAMES_64, "%64", "%65", "%66", KVSWEEP_32(c, 0),
                          KVSWEEP_32(c, 32));
  }
}

// c [64, N] += a [64, 16] * b [16, N]: a in registers, laid out as 16 columns of a result above
// are, rounded; b a ColumnOperand.
template <int kRegisters>
__device__ __forceinline__ void StartProduct(float (&c)[kRegisters], const uint32_t* a,
                                             uint64_t b) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" KVSWEEP_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : KVSWEEP_32(c, 0), KVSWEEP_32(c, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" KVSWEEP_NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : KVSWEEP_32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef KVSWEEP_8
#undef KVSWEEP_16
#undef KVSWEEP_32
#undef KVSWEEP_NAMES_8
#undef KVSWEEP_NAMES_16
#undef KVSWEEP_NAMES_24
#undef KVSWEEP_NAMES_32
#undef KVSWEEP_NAMES_40
#undef KVSWEEP_NAMES_48
#undef KVSWEEP_NAMES_56
#undef KVSWEEP_NAMES_64
#undef KVSWEEP_START_PRODUCT

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_WGMMA_CUH_
