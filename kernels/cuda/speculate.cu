// InfiniGen's speculation in two passes: scores of all stored tokens and the largest of each slice
// of a row, then margins and how many exceed -alpha. A row is cut into pieces, which few or many
// blocks (its slices) take in turn, so that also a single long row fills the device; counts are
// integers, so adding them needs no order.
//
// The first pass is a read of all partial keys, and all that matters is that memory is never idle:
// where a block of the cache is one run of bytes per head, the copy engine brings a piece into
// shared memory, and the several blocks of a multiprocessor load and compute in turn. Stored keys
// were written by earlier steps: the first piece is asked for before the kernel ahead has ended.
#include <algorithm>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostPiece = 512;              // tokens
constexpr int kStagedBytes = 40 * 1024;      // of a piece's keys in shared memory
constexpr size_t kScratchBytes = 24u << 20;  // of scores: the second-level cache keeps them
constexpr int kBlocksOfMultiprocessor = 16;  // over all: enough to even out, few enough to start

// Between the passes, for `rows` rows from first_row on: scores [rows, Hq, margin_stride] (with one
// query a group in the margins' place) and the largest of each slice [rows, Hq, slices].
struct Between {
  float* score;
  float* largest;
  int32_t first_row;
  int32_t rows;
  int32_t piece;          // tokens
  int32_t slices;         // of a row: slice s takes pieces s, s + slices, …
  int64_t longest;        // tokens of a row
  int32_t margin_blocks;  // of a row, in the second pass
};

// How keys come: element by element from any format; bf16 in vectors of eight; such ones through
// shared memory.
enum class KeyPath { kElements, kVectors, kStaged };

// What a block works on, one of `slices` of its row.
struct Slice {
  int64_t row;      // of the arguments
  int64_t of_tile;  // of the scratch
  int32_t head;
  int32_t index;
  int32_t stored;

  __device__ Slice(const SpeculateArgs& args, const Between& between, int32_t slices) {
    const auto pair = static_cast<int32_t>(blockIdx.x) / slices;
    index = static_cast<int32_t>(blockIdx.x) % slices;
    head = pair % args.kv_heads;
    of_tile = pair / args.kv_heads;
    row = between.first_row + of_tile;
    stored =
        IsActive(args.row_active, row)
            ? static_cast<int32_t>(min(static_cast<int64_t>(KvLength(args.partial_key, row, head)),
                                       args.margin_stride))
            : 0;
  }
  __device__ int64_t pair(const SpeculateArgs& args) const { return row * args.kv_heads + head; }
};

// Dot products of a bf16 key with kQueries queries [kQueries, d'] in shared memory.
// All kAhead vectors of a batch are under way before the first is used.
template <int kQueries>
__device__ __forceinline__ void VectorScore(float (&sum)[kQueries], const float* query,
                                            const uint4* key, int32_t d) {
  constexpr int kAhead = 5;
  uint4 vectors[kAhead];
  const int32_t count = d / 8;
  for (int32_t base = 0; base < count; base += kAhead) {
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
      if (base + p < count) vectors[p] = key[base + p];
    }
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
      const int32_t i = base + p;
      if (i >= count) continue;
      const uint32_t word[4] = {vectors[p].x, vectors[p].y, vectors[p].z, vectors[p].w};
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        const float element[4] = {
            __uint_as_float(word[w] << 16), __uint_as_float(word[w] & 0xffff0000u),
            __uint_as_float(word[w + 1] << 16), __uint_as_float(word[w + 1] & 0xffff0000u)};
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const float4 four = *reinterpret_cast<const float4*>(query + q * d + i * 8 + w * 2);
          sum[q] += element[0] * four.x + element[1] * four.y;
          sum[q] += element[2] * four.z + element[3] * four.w;
        }
      }
    }
  }
}

// The same of two keys at once, so that a query is read once for both.
template <int kQueries>
__device__ __forceinline__ void ScoreTwo(float (&sum)[2][kQueries], const float* query,
                                         const uint4* one, const uint4* other, int32_t d) {
  for (int32_t i = 0; i < d / 8; ++i) {
    const uint4 vectors[2] = {one[i], other[i]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float element[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t low = half == 0 ? vectors[k].x : vectors[k].z;
        const uint32_t high = half == 0 ? vectors[k].y : vectors[k].w;
        element[k][0] = __uint_as_float(low << 16);
        element[k][1] = __uint_as_float(low & 0xffff0000u);
        element[k][2] = __uint_as_float(high << 16);
        element[k][3] = __uint_as_float(high & 0xffff0000u);
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const float4 four = *reinterpret_cast<const float4*>(query + q * d + i * 8 + half * 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          sum[k][q] += element[k][0] * four.x + element[k][1] * four.y;
          sum[k][q] += element[k][2] * four.z + element[k][3] * four.w;
        }
      }
    }
  }
}

// Keys in shared memory, a piece after the other. On devices without a copy engine nothing uses it.
class StagedKeys {
 public:
  // `barrier` and `keys` [piece, d'] in shared memory. The block's threads meet before the first
  // Ask.
  __device__ StagedKeys(uint64_t* barrier, std::byte* keys)
      : barrier_(Address(barrier)), keys_(Address(keys)) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x != 0) return;
    InitialiseBarrier(barrier_, 1);
    PublishBarriers();
#endif
  }

  // Asks for tokens [begin, end) of the slice's row and head, run by run.
  __device__ __forceinline__ void Ask(const KvView& view, const Slice& slice, int32_t begin,
                                      int32_t end, int32_t piece, int32_t d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int32_t token_bytes = d * static_cast<int32_t>(sizeof(__nv_bfloat16));
    if (threadIdx.x == 0) {
      ArriveExpecting(barrier_, static_cast<uint32_t>((end - begin) * token_bytes));
    }
    FenceAsyncProxy();  // what this block has read there came before
    const uint64_t policy = ReadOncePolicy();
    const int32_t run = min(piece, view.block_size);
    for (int32_t first = begin + threadIdx.x * run; first < end; first += kThreads * run) {
      const int64_t offset = KvOffset(view, slice.row, first, slice.head);
      CopyBulk(keys_ + (first - begin) * token_bytes, ElementAt(view.key, DType::kBf16, offset),
               static_cast<uint32_t>(min(run, end - first) * token_bytes), barrier_, policy);
    }
#endif
  }
  // Until they are there.
  __device__ __forceinline__ void Await() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    WaitPhase(barrier_, phase_);
    phase_ ^= 1;
#endif
  }

 private:
  static __device__ uint32_t Address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  uint32_t barrier_;
  uint32_t keys_;
  uint32_t phase_ = 0;
};

template <int kQueries, KeyPath kPath>
__global__ void __launch_bounds__(kThreads)
    ScoreKernel(const __grid_constant__ SpeculateArgs args, const __grid_constant__ Between between,
                DType dtype) {
  // [piece, d'] of keys where they are staged, then [kQueries, d'] of queries.
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ float warp_largest[kWarps][kQueries];
  __shared__ uint64_t barrier;
  const int32_t d = args.partial_dim;
  const KvView& keys = args.partial_key;
  float* const query = reinterpret_cast<float*>(
      shared + (kPath == KeyPath::kStaged ? between.piece * d * sizeof(__nv_bfloat16) : 0));
  ReleaseLaterKernels();
  const Slice slice(args, between, between.slices);
  const int32_t group = args.query_heads / args.kv_heads;
  StagedKeys staged(&barrier, shared);
  const int32_t own_begin = slice.index * between.piece;
  if constexpr (kPath == KeyPath::kStaged) {
    __syncthreads();
    if (own_begin < slice.stored) {
      staged.Ask(keys, slice, own_begin, min(slice.stored, own_begin + between.piece),
                 between.piece, d);
    }
  }
  WaitForEarlierKernels();
  if (slice.index == 0 && threadIdx.x == 0) args.count[slice.pair(args)] = 0;
  if (own_begin >= slice.stored) return;

  // More queries than kQueries pass one handful after the other.
  for (int32_t first = 0; first < group; first += kQueries) {
    const int32_t queries = min(kQueries, group - first);
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kQueries * d; i += kThreads) {
      const int64_t column = (int64_t{slice.head} * group + first) * d + i;
      query[i] = i < queries * d
                     ? LoadElement(args.query.data, dtype, slice.row * args.query.stride + column)
                     : 0.0f;
    }
    const int64_t line = slice.of_tile * args.query_heads + int64_t{slice.head} * group + first;
    float* const out = between.score + line * args.margin_stride;
    float largest[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) largest[q] = -INFINITY;
    for (int32_t begin = own_begin; begin < slice.stored; begin += between.slices * between.piece) {
      const int32_t end = min(slice.stored, begin + between.piece);
      __syncthreads();  // queries are there, and the piece before is done with
      if constexpr (kPath == KeyPath::kStaged) {
        const bool asked = first == 0 && begin == own_begin;
        if (!asked) staged.Ask(keys, slice, begin, end, between.piece, d);
        staged.Await();
      }
      const auto keep = [&](int32_t t, const float(&score)[kQueries]) {
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          if (q < queries) out[q * args.margin_stride + t] = score[q];
          largest[q] = fmaxf(largest[q], score[q]);
        }
      };
      if constexpr (kPath == KeyPath::kStaged) {
        for (int32_t t = begin + threadIdx.x; t < end; t += 2 * kThreads) {
          const bool has_other = t + kThreads < end;
          const auto key = [&](int32_t token) {
            return reinterpret_cast<const uint4*>(shared +
                                                  (token - begin) * d * sizeof(__nv_bfloat16));
          };
          float score[2][kQueries] = {};
          ScoreTwo(score, query, key(t), key(has_other ? t + kThreads : t), d);
          keep(t, score[0]);
          if (has_other) keep(t + kThreads, score[1]);
        }
      } else {
        for (int32_t t = begin + threadIdx.x; t < end; t += kThreads) {
          float score[kQueries] = {};
          const int64_t offset = KvOffset(keys, slice.row, t, slice.head);
          if constexpr (kPath == KeyPath::kVectors) {
            VectorScore<kQueries>(
                score, query,
                reinterpret_cast<const uint4*>(ElementAt(keys.key, DType::kBf16, offset)), d);
          } else {
            for (int32_t i = 0; i < d; ++i) {
              const float element = LoadElement(keys.key, keys.dtype, offset + i);
#pragma unroll
              for (int q = 0; q < kQueries; ++q) score[q] += element * query[q * d + i];
            }
          }
          keep(t, score);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const float of_warp = WarpMax(largest[q]);
      if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32][q] = of_warp;
    }
    __syncthreads();
    if (threadIdx.x < queries) {
      float all = -INFINITY;
      for (int w = 0; w < kWarps; ++w) all = fmaxf(all, warp_largest[w][threadIdx.x]);
      between.largest[(line + threadIdx.x) * between.slices + slice.index] = all;
    }
  }
}

// Tokens of a block in the second pass, which has kQueries scores of each under way.
template <int kQueries>
constexpr int kMarginTokens = (kQueries == 1   ? 8
                               : kQueries == 8 ? 2
                                               : 4) *
                              kThreads;

// One block for some tokens of a row and KV head. All scores are asked for before any is used, and
// before the largest are known.
template <int kQueries>
__global__ void __launch_bounds__(kThreads) MarginKernel(const __grid_constant__ SpeculateArgs args,
                                                         const __grid_constant__ Between between) {
  constexpr int kTokens = kMarginTokens<kQueries> / kThreads;  // of a thread
  extern __shared__ float largest[];                           // [g]
  __shared__ int32_t warp_count[kWarps];
  ReleaseLaterKernels();
  const Slice slice(args, between, between.margin_blocks);
  const int32_t group = args.query_heads / args.kv_heads;
  const int32_t begin = slice.index * kMarginTokens<kQueries> + static_cast<int32_t>(threadIdx.x);
  WaitForEarlierKernels();
  if (slice.index * kMarginTokens<kQueries> >= slice.stored) return;
  const int64_t first = slice.of_tile * args.query_heads + int64_t{slice.head} * group;
  float score[kQueries][kTokens];
  const auto load = [&](int32_t head) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const int32_t t = begin + j * kThreads;
        score[q][j] = head + q < group && t < slice.stored
                          ? between.score[(first + head + q) * args.margin_stride + t]
                          : -INFINITY;
      }
    }
  };
  load(0);
  const int32_t used = min(between.slices, (slice.stored + between.piece - 1) / between.piece);
  for (int32_t q = threadIdx.x / 32; q < group; q += kWarps) {
    float all = -INFINITY;
    for (int32_t s = threadIdx.x % 32; s < used; s += 32) {
      all = fmaxf(all, between.largest[(first + q) * between.slices + s]);
    }
    all = WarpMax(all);
    if (threadIdx.x % 32 == 0) largest[q] = all;
  }
  __syncthreads();
  float best[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) best[j] = -INFINITY;
  for (int32_t head = 0; head < group; head += kQueries) {
    if (head > 0) load(head);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      if (head + q >= group) break;
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        best[j] = fmaxf(best[j], score[q][j] - largest[head + q]);
      }
    }
  }
  float* const margin = args.margin + slice.pair(args) * args.margin_stride;
  int32_t count = 0;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const int32_t t = begin + j * kThreads;
    if (t >= slice.stored) continue;
    margin[t] = best[j];
    count += best[j] > -args.alpha ? 1 : 0;
  }
  count = __reduce_add_sync(~0u, count);
  if (threadIdx.x % 32 == 0) warp_count[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += warp_count[w];
    atomicAdd(&args.count[slice.pair(args)], total);
  }
}

// ----------------------------------------------------------------------------------------
// launchers

unsigned Blocks(const SpeculateArgs& args, const Between& between, int32_t slices) {
  return static_cast<unsigned>(between.rows * args.kv_heads * slices);
}

template <int kQueries>
cudaError_t LaunchPasses(const SpeculateArgs& args, Between between, KeyPath path,
                         const LaunchContext& context) {
  const auto scores = path == KeyPath::kStaged    ? ScoreKernel<kQueries, KeyPath::kStaged>
                      : path == KeyPath::kVectors ? ScoreKernel<kQueries, KeyPath::kVectors>
                                                  : ScoreKernel<kQueries, KeyPath::kElements>;
  const size_t staged =
      path == KeyPath::kStaged ? between.piece * args.partial_dim * sizeof(__nv_bfloat16) : 0;
  // Whole vectors: the compiler reads the remainder of a row by one.
  const size_t queries = (kQueries * args.partial_dim * sizeof(float) + 15) / 16 * 16;
  const cudaError_t error =
      LaunchDependent(context, scores, Blocks(args, between, between.slices), kThreads,
                      staged + queries, args, between, context.activation_dtype);
  if (error != cudaSuccess) return error;
  constexpr int64_t kTokens = kMarginTokens<kQueries>;
  between.margin_blocks = static_cast<int32_t>((between.longest + kTokens - 1) / kTokens);
  // Whole 16 bytes: the compiler may load four at a time, ahead of knowing that they are wanted.
  const size_t largest = (args.query_heads / args.kv_heads + 3) / 4 * 4 * sizeof(float);
  return LaunchDependent(AfterKernel(context), MarginKernel<kQueries>,
                         Blocks(args, between, between.margin_blocks), kThreads, largest, args,
                         between);
}

cudaError_t LaunchTile(const SpeculateArgs& args, const Between& between, KeyPath path,
                       const LaunchContext& context) {
  const int32_t group = args.query_heads / args.kv_heads;
  return group == 1   ? LaunchPasses<1>(args, between, path, context)
         : group == 2 ? LaunchPasses<2>(args, between, path, context)
         : group <= 4 ? LaunchPasses<4>(args, between, path, context)
                      : LaunchPasses<8>(args, between, path, context);
}

KeyPath PathOf(const SpeculateArgs& args, int32_t piece, const LaunchContext& context) {
  const KvView& view = args.partial_key;
  if (view.dtype != DType::kBf16 || args.partial_dim % 8 != 0 || !IsAligned(view)) {
    return KeyPath::kElements;
  }
  const bool runs = view.token_stride == args.partial_dim &&
                    (piece % view.block_size == 0 || view.block_size % piece == 0);
  const bool fits = piece * args.partial_dim * 2 <= kStagedBytes;
  return runs && fits && context.architecture >= 90 ? KeyPath::kStaged : KeyPath::kVectors;
}

}  // namespace

// Rows are taken as many at a time as leave their scores in the scratch.
cudaError_t Launch(const SpeculateArgs& args, const LaunchContext& context) {
  const bool in_place = args.query_heads == args.kv_heads;
  const int64_t longest =
      std::max<int64_t>(1, std::min<int64_t>(args.margin_stride, args.partial_key.max_tokens));
  Between between;
  between.longest = longest;
  between.piece = kMostPiece;
  while (between.piece > 64 && between.piece * args.partial_dim * 2 > kStagedBytes) {
    between.piece /= 2;
  }
  const KeyPath path = PathOf(args, between.piece, context);
  const int64_t pieces = (longest + between.piece - 1) / between.piece;
  const auto slices_for = [&](int64_t rows) {
    const int64_t even = kBlocksOfMultiprocessor * int64_t{context.multiprocessors};
    return std::clamp<int64_t>(even / (rows * args.kv_heads), 1, pieces);
  };
  const auto floats_for = [&](int64_t rows) {
    return rows * args.query_heads * (slices_for(rows) + (in_place ? 0 : args.margin_stride));
  };
  const size_t room = std::min(context.workspace_bytes, kScratchBytes) / sizeof(float);
  int64_t rows = args.rows;
  while (rows > 1 && static_cast<size_t>(floats_for(rows)) > room) rows = (rows + 1) / 2;
  if (floats_for(rows) * sizeof(float) > context.workspace_bytes) {
    return cudaErrorMemoryAllocation;
  }
  LaunchContext next = context;
  for (int64_t first = 0; first < args.rows; first += rows) {
    between.first_row = static_cast<int32_t>(first);
    between.rows = static_cast<int32_t>(std::min(rows, args.rows - first));
    between.slices = static_cast<int32_t>(slices_for(between.rows));
    between.largest = reinterpret_cast<float*>(context.workspace);
    between.score = in_place ? args.margin + first * args.kv_heads * args.margin_stride
                             : between.largest + between.rows * args.query_heads * between.slices;
    const cudaError_t error = LaunchTile(args, between, path, next);
    if (error != cudaSuccess) return error;
    next = AfterKernel(context);
  }
  return cudaSuccess;
}

}  // namespace kvsweep::cuda
