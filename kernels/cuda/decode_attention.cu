// Decode attention: one query row a sequence against its whole view. Reading keys and values once,
// at the rate of the memory, is all that matters; so a warp keeps several tiles of 16 tokens under
// way into shared memory, and all query heads of a group work on a tile as one tensor-core product
// (with fewer than eight heads most of it is idle, and it costs nothing that anybody waits for).
//
// A (row, KV head) is cut into splits of plan.split_tokens tokens, one block each. A few are a
// cluster, whose blocks send each head's sums to the one that joins them; of more the block that
// arrives last joins the sums that the others have left in memory. Either joins in the order of the
// splits, so no result depends on who came when.
//
// Stored keys and values were written by earlier steps, or by what an ordinary launch waits for:
// the first tiles are asked for before the kernel ahead, which makes this step's keys, has ended.
// The row's own key and value come from the activations; they may be turned and stored on the way.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rotary.cuh"

namespace kvsweep::cuda {
namespace {

// ------------------------------------------------------------------------------------------
// kernels

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;  // tokens that a warp loads and multiplies at once
constexpr int kMostSplits = 512;
constexpr int kHeads = 8;  // query heads of a group that one block takes
constexpr int kMostClusterBlocks = 16;
// Workspace of an attention whose rows are split.
struct Splits {
  float* output;       // [pairs, splits, g, d]
  float* maximum;      // [pairs, splits, g], in units of log 2
  float* sum;          // [pairs, splits, g]
  uint32_t* arrivals;  // [pairs], zero between launches
};

// What a block works on: one split of one (row, head).
struct Part {
  int32_t pair;
  int64_t row;
  int32_t head;
  int32_t split;
  int32_t stored;
  int32_t attended;  // stored tokens and the current one
  int32_t whole;     // the row's stored tokens, whatever part of them this call attends to
  int32_t used;      // splits that hold tokens; 1 if there are none at all
  int32_t begin;
  int32_t end;
};

// Stored tokens of a row, whatever part of them a call attends to.
__device__ __forceinline__ int32_t WholeLength(const KvView& view, int64_t row, int32_t kv_head) {
  if (view.length == nullptr) return 0;
  return view.length[row * view.length_stride + kv_head * view.length_head_stride];
}

__device__ __forceinline__ Part FindPart(const DecodeAttentionArgs& args, int32_t heads,
                                         int32_t group) {
  Part part;
  part.split = blockIdx.x % args.plan.splits;
  part.pair = blockIdx.x / args.plan.splits;
  part.head = part.pair % heads;
  part.row = part.pair / heads;
  // All asked for before any is used: a block's start is trips to memory in turn.
  const bool active = IsActive(args.row_active, part.row);
  const int32_t stored = KvLength(args.view, part.row, part.head / group);
  const int32_t whole = WholeLength(args.view, part.row, part.head / group);
  part.stored = active ? stored : 0;
  part.whole = active ? whole : 0;
  part.attended = part.stored + (active && args.current_key.data != nullptr ? 1 : 0);
  if (args.plan.splits == 1) {
    part.used = 1;
    part.begin = 0;
    part.end = part.attended;
    return part;
  }
  const int32_t tokens = args.plan.split_tokens;
  part.used = max(1, min(args.plan.splits, (part.attended + tokens - 1) / tokens));
  part.begin = min(int64_t{part.split} * tokens, int64_t{part.attended});
  part.end =
      part.split == args.plan.splits - 1 ? part.attended : min(part.attended, part.begin + tokens);
  return part;
}

// Whether this block is the last of its pair; then all that the others have written is visible.
__device__ __forceinline__ bool ArrivesLast(const Splits& splits, const Part& part) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&splits.arrivals[part.pair], 1u) == static_cast<uint32_t>(part.used - 1);
    if (last) splits.arrivals[part.pair] = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Where the score of an entry is left until it becomes a probability: a tile's slots behind those
// of earlier tiles, the current token behind all of them.
__device__ __forceinline__ int32_t Entry(const DecodeAttentionArgs& args, const Part& part,
                                         int32_t token) {
  return token < part.stored ? args.view.first_token + token : part.whole;
}

// Turns the scores of a row, also those that earlier calls have left, into probabilities: entries
// `first` + threadIdx.x, ..., `stride` apart.
__device__ __forceinline__ void Normalise(float* line, int32_t first, int32_t stride,
                                          int32_t entries, Softmax softmax) {
  const float inverse = 1.0f / softmax.sum;
#pragma unroll 4
  for (int32_t t = first + threadIdx.x; t < entries; t += stride) {
    line[t] = exp2f(__ldcg(line + t) * kLog2E - softmax.maximum) * inverse;
  }
}

// What is to be done about the scores when a head's sums are there: nothing, or turn them into
// probabilities, or leave the sums to a kernel of more blocks.
struct Scores {
  float* probability;  // [rows, Hq, stride]; nullptr: nothing
  int64_t stride;
  Softmax* left_to;  // [rows, Hq]; nullptr: turned at once
  int32_t query_heads;

  // Leaves the sums to that kernel, if there is one.
  __device__ __forceinline__ void LeaveSums(const Part& part, int32_t head, Softmax softmax) const {
    if (left_to != nullptr) left_to[part.row * query_heads + head] = softmax;
  }
  // By all threads of the block.
  __device__ __forceinline__ void Finish(const Part& part, int32_t head, Softmax softmax) const {
    if (probability == nullptr) return;
    const int64_t index = part.row * query_heads + head;
    if (left_to != nullptr) {
      if (threadIdx.x == 0) LeaveSums(part, head, softmax);
      return;
    }
    Normalise(probability + index * stride, 0, kThreads, part.whole + part.attended - part.stored,
              softmax);
  }
};

constexpr int kNormalisedAtOnce = 8 * kThreads;  // entries of a block

// Block (row and query head, piece of the entries).
__global__ void __launch_bounds__(kThreads)
    NormaliseKernel(const __grid_constant__ DecodeAttentionArgs args,
                    const __grid_constant__ Scores scores) {
  const int64_t index = blockIdx.x;
  const int64_t row = index / args.query_heads;
  const int32_t head = static_cast<int32_t>(index % args.query_heads);
  int32_t entries = 0;
  if (IsActive(args.row_active, row)) {
    entries = WholeLength(args.view, row, head / (args.query_heads / args.kv_heads));
    if (args.current_key.data != nullptr) ++entries;
  }
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kNormalisedAtOnce;
  WaitForEarlierKernels();
  if (first >= entries) return;
  Normalise(scores.probability + index * scores.stride, first, kThreads,
            min(entries, first + kNormalisedAtOnce), scores.left_to[index]);
}

// Adds `piece` times `factor`.
__device__ __forceinline__ void AddScaled(float4& value, const float4& piece, float factor) {
  value.x += piece.x * factor;
  value.y += piece.y * factor;
  value.z += piece.z * factor;
  value.w += piece.w * factor;
}

// Joins the splits of `group` heads, in order: join(q, i, values, width) is called for every
// `width` elements i .. of every head q (four, or one where four does not divide the head
// dimension), not divided by the sum in softmax[q]. `share` [g, splits] is scratch. Memory is far
// away: of few splits everything is asked for before anything is used.
template <typename Join>
__device__ __forceinline__ void JoinSplits(const Splits& splits, const Part& part,
                                           int32_t all_splits, int32_t group, int32_t head_dim,
                                           float* share, Softmax* softmax, const Join& join) {
  constexpr int kAhead = 8;  // splits
  const int64_t first = int64_t{part.pair} * all_splits * group;
  const int lane = threadIdx.x % 32;
  // A head dimension that four does not divide goes element by element.
  const int width = head_dim % 4 == 0 ? 4 : 1;
  const int pieces = head_dim / width;
  const int64_t stride = int64_t{group} * head_dim;
  const auto from = [&](int e) {
    return splits.output + (first + e / pieces) * head_dim + e % pieces * width;
  };
  const auto piece_of = [&](int e, int s) {
    return __ldcg(reinterpret_cast<const float4*>(from(e) + s * stride));
  };
  float4 ahead[kAhead];  // of the thread's first piece
  if (width == 4 && threadIdx.x < group * pieces) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < part.used) ahead[s] = piece_of(threadIdx.x, s);
    }
  }
  for (int q = threadIdx.x / 32; q < group; q += kWarps) {
    const auto maximum_of = [&](int s) { return __ldcg(splits.maximum + first + s * group + q); };
    const auto sum_of = [&](int s) { return __ldcg(splits.sum + first + s * group + q); };
    const float own_maximum = lane < part.used ? maximum_of(lane) : -INFINITY;
    const float own_sum = lane < part.used ? sum_of(lane) : 0.0f;
    float highest = own_maximum;
    for (int s = lane + 32; s < part.used; s += 32) highest = fmaxf(highest, maximum_of(s));
    highest = WarpMax(highest);
    float sum = 0.0f;
    for (int s = lane; s < part.used; s += 32) {
      const float part_sum = s == lane ? own_sum : sum_of(s);
      const float part_maximum = s == lane ? own_maximum : maximum_of(s);
      const float factor = part_sum == 0.0f ? 0.0f : exp2f(part_maximum - highest);
      share[q * all_splits + s] = factor;
      sum += part_sum * factor;
    }
    sum = WarpSum(sum);
    if (lane == 0) softmax[q] = {highest, sum};
  }
  __syncthreads();
  for (int e = threadIdx.x; e < group * pieces; e += kThreads) {
    const int q = e / pieces;
    float4 value = {};
    if (width == 4) {
      const auto add = [&](const float4& piece, int s) {
        AddScaled(value, piece, share[q * all_splits + s]);
      };
      const bool has_ahead = e == static_cast<int>(threadIdx.x);
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (s < part.used) add(has_ahead ? ahead[s] : piece_of(e, s), s);
      }
#pragma unroll 8
      for (int s = kAhead; s < part.used; ++s) add(piece_of(e, s), s);
    } else {
      for (int s = 0; s < part.used; ++s) {
        value.x += __ldcg(from(e) + s * stride) * share[q * all_splits + s];
      }
    }
    join(q, e % pieces * width, value, width);
  }
}

// What the blocks of a cluster send each other: head q is joined by block q % used, which takes
// the sums of all blocks for its first head, then those for its second, ....
template <int D>
struct ClusterInbox {
  float output[kMostClusterBlocks][D];
  Softmax softmax[kMostClusterBlocks];
  uint64_t arrived;  // a barrier that counts the bytes

  // Heads of the group that block `split` joins.
  static __device__ __forceinline__ int Heads(int split, int used, int group) {
    return split < group ? (group - 1 - split) / used + 1 : 0;
  }
  // By one thread, before it arrives at the cluster's first meeting.
  __device__ __forceinline__ void Expect(int heads, int used) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const uint32_t barrier = SharedAddress(&arrived);
    InitialiseBarrier(barrier, 1);
    PublishBarriers();
    ArriveExpecting(barrier, heads * used * (D * sizeof(float) + sizeof(Softmax)));
#endif
  }
};
// Every block and head has a place, whatever is used of them.
static_assert([] {
  for (int used = 2; used <= kMostClusterBlocks; ++used) {
    if ((kHeads + used - 1) / used * used > kMostClusterBlocks) return false;
  }
  return true;
}());

// Joins the splits of a cluster's blocks, in order, for the heads whose sums were sent to this one;
// each warp takes one at a time.
template <int D>
__device__ __forceinline__ void JoinCluster(const ClusterInbox<D>& inbox, const Part& part,
                                            int32_t group, const AttentionResult& result,
                                            const Scores& scores) {
  const int lane = threadIdx.x % 32;
  const int i = lane * 4;
  const int warp = threadIdx.x / 32;
  const int heads = ClusterInbox<D>::Heads(part.split, part.used, group);
  if (warp < heads) AwaitSent(SharedAddress(&inbox.arrived), 0);
  for (int h = warp; h < heads; h += kWarps) {
    const int32_t head = part.head * group + part.split + h * part.used;
    const int first = h * part.used;
    const Softmax mine = lane < part.used ? inbox.softmax[first + lane] : Softmax{};
    const float highest = WarpMax(mine.maximum);
    const float factor = mine.sum == 0.0f ? 0.0f : exp2f(mine.maximum - highest);
    const Softmax softmax{highest, WarpSum(mine.sum * factor)};
    float4 value = {};
    for (int s = 0; s < part.used; ++s) {
      const float share = __shfl_sync(~0u, factor, s);
      if (i >= D) continue;
      AddScaled(value, *reinterpret_cast<const float4*>(&inbox.output[first + s][i]), share);
    }
    Softmax merged = softmax;
    if (i < D) merged = result.WriteFour(part.row, head, i, value, softmax);
    __syncwarp();  // all lanes have read what is merged
    if (lane == 0) {
      result.WriteSums(part.row, head, merged);
      scores.LeaveSums(part, head, merged);
    }
  }
}

// In shared memory the 16-byte chunks of a row stand exchanged, so that eight rows of a column lie
// in different banks: where chunk `chunk` of row `row` is in its row, bytes. Padded rows would do
// that too, but a line of 128 bytes would land across two of them, and L1 asks the L2 cache for
// such a line in two requests: half as many sectors again, and a tenth of the rate (H200).
__device__ __forceinline__ int Exchanged(int chunk, int row) { return (chunk ^ row % 8) * 16; }

// Where the 16 tokens of a tile lie: found one tile ahead, since the table is in memory too.
template <typename T, int D>
struct TileLoader {
  static constexpr int kChunks = D / 8;       // of 16 bytes in a row
  static constexpr int kRows = 32 / kChunks;  // tokens that a warp copies at once
  static constexpr int kSteps = kTile / kRows;

  const DecodeAttentionArgs& args;
  const Part& part;
  const T* key;  // this lane's column of the pool, the head's
  const T* value;
  int row_of_lane;
  uint32_t target;    // of this lane's first row in stage 0
  int column_bytes;   // of this lane in that row, exchanged
  bool whole_blocks;  // a tile never straddles blocks

  __device__ __forceinline__ TileLoader(const DecodeAttentionArgs& args, const Part& part,
                                        const T* stage)
      : args(args), part(part) {
    const int lane = threadIdx.x % 32;
    const int column = lane % kChunks * 8;
    row_of_lane = lane / kChunks;
    key = reinterpret_cast<const T*>(args.view.key) + part.head * args.view.head_stride + column;
    value =
        reinterpret_cast<const T*>(args.view.value) + part.head * args.view.head_stride + column;
    target = SharedAddress(stage + row_of_lane * D);
    column_bytes = Exchanged(lane % kChunks, row_of_lane);
    const bool tiled = args.view.block_table == nullptr || args.view.block_size % kTile == 0;
    whole_blocks = tiled && args.plan.split_tokens % kTile == 0;
  }

  __device__ __forceinline__ int64_t BlockOffset(int32_t token) const {
    const int32_t block = token / args.view.block_size;
    const int64_t id = args.view.block_table == nullptr
                           ? part.row
                           : args.view.block_table[part.row * args.view.block_table_stride + block];
    return id * args.view.block_stride;
  }
  // Of the tile at `first`: the offset of its block, or anything where that is no stored token. It
  // is asked for before it is known how many there are.
  __device__ __forceinline__ int64_t LookUp(int32_t first) const {
    const bool has_entry = args.view.block_table == nullptr ||
                           first / args.view.block_size < args.view.block_table_stride;
    return whole_blocks && has_entry ? BlockOffset(first) : 0;
  }

  // Starts the copies of the stored ones of tokens first .. first + 15, which LookUp found at
  // `block`, into the stage that begins `offset` bytes behind stage 0; all else becomes zero.
  __device__ __forceinline__ void Issue(int32_t first, int64_t block, uint32_t offset) const {
    const uint32_t key_target = target + offset;
    constexpr uint32_t kValues = kTile * D * sizeof(T);
    constexpr uint32_t kStep = kRows * D * sizeof(T);
    // Where this lane's key of step s goes.
    const auto place = [&](int s) {
      return key_target + s * kStep + (column_bytes ^ Exchanged(0, s * kRows));
    };
    const int64_t stride = args.view.token_stride;
    if (whole_blocks && first + kTile <= part.stored) {
      const int64_t at = block + (first % args.view.block_size + row_of_lane) * stride;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        CopyAsync(place(s), key + at + s * kRows * stride);
        CopyAsync(place(s) + kValues, value + at + s * kRows * stride);
      }
      return;
    }
    const int32_t end = min(part.end, part.stored);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int32_t token = first + row_of_lane + s * kRows;
      int64_t at = 0;
      if (token < end) at = BlockOffset(token) + token % args.view.block_size * stride;
      CopyAsync(place(s), key + at, token < end);
      CopyAsync(place(s) + kValues, value + at, token < end);
    }
  }
};

// The current token's key and value of a row and KV head, as one warp holds them: lane l has
// columns 2 l and 2 l + 1 of either half.
template <typename T, int D>
struct OwnToken {
  static constexpr int kHalf = D / 2;
  uint32_t key[2];  // of the lower half, of the upper half
  uint32_t value[2];

  static __device__ __forceinline__ bool HasColumns() { return threadIdx.x % 32 * 2 < kHalf; }

  __device__ __forceinline__ void Load(const DecodeAttentionArgs& args, const Part& part) {
    if (!HasColumns()) return;
    const int64_t column = int64_t{part.head} * D + threadIdx.x % 32 * 2;
    const T* const from_key =
        static_cast<const T*>(args.current_key.data) + part.row * args.current_key.stride + column;
    const T* const from_value = static_cast<const T*>(args.current_value.data) +
                                part.row * args.current_value.stride + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      key[half] = *reinterpret_cast<const uint32_t*>(from_key + half * kHalf);
      value[half] = *reinterpret_cast<const uint32_t*>(from_value + half * kHalf);
    }
  }
  // Into a pool, `offset` elements behind its key and its value.
  __device__ __forceinline__ void Store(const KvView& target, int64_t offset) const {
    if (!HasColumns()) return;
    offset += threadIdx.x % 32 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = offset + half * kHalf;
      *reinterpret_cast<uint32_t*>(reinterpret_cast<T*>(target.key) + at) = key[half];
      *reinterpret_cast<uint32_t*>(reinterpret_cast<T*>(target.value) + at) = value[half];
    }
  }
  // As row `row` of a tile in shared memory.
  __device__ __forceinline__ void Place(unsigned char* tile, int row) const {
    if (!HasColumns()) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = half * kHalf + threadIdx.x % 32 * 2;
      unsigned char* const at =
          tile + row * D * sizeof(T) + Exchanged(column / 8, row) + column % 8 * sizeof(T);
      *reinterpret_cast<uint32_t*>(at) = key[half];
      *reinterpret_cast<uint32_t*>(at + kTile * D * sizeof(T)) = value[half];
    }
  }
};

// Turns columns c, c + 1 (low) and those half a head further (high) of a row of T.
template <typename T>
__device__ __forceinline__ void TurnWords(uint32_t& low, uint32_t& high, const float* cosine,
                                          const float* sine) {
  using Two = Vector<T, 2>;
  Two& first = reinterpret_cast<Two&>(low);
  Two& second = reinterpret_cast<Two&>(high);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float x = ToFloat(first.element[e]);
    float y = ToFloat(second.element[e]);
    TurnPair(x, y, cosine[e], sine[e]);
    first.element[e] = FromFloat<T>(x);
    second.element[e] = FromFloat<T>(y);
  }
}

// [rows, Hq, d] x [n, Hk, d] -> scores [g, 16] a tile -> output [g, d] a warp -> a block -> a row.
//
// Two stages of 8 KB a warp: with three, steps of many rows took up to 3 % longer (H200), and with
// one and a half, keys and values apart, up to 5 %.
template <typename T, int D>
constexpr int kStages = D <= 64 ? 4 : 2;
template <typename T, int D>
constexpr int kSharedBytes = kWarps* kStages<T, D> * 2 * kTile* D* static_cast<int>(sizeof(T));

// `append`: rows 0: nothing is turned or stored.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    DecodeAttentionKernel(const __grid_constant__ DecodeAttentionArgs args,
                          const __grid_constant__ AppendArgs append,
                          const __grid_constant__ Splits splits,
                          const __grid_constant__ AttentionResult result,
                          const __grid_constant__ Scores scores, bool clustered) {
  constexpr int kStageElements = 2 * kTile * D;  // keys, then values
  constexpr int kPipeline = kStages<T, D>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float cosine[D / 2];
  __shared__ float sine[D / 2];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = args.query_heads / args.kv_heads;
  ReleaseLaterKernels();
  const Part part = FindPart(args, args.kv_heads, 1);
  const Team team = clustered ? ClusterTeam() : Team{1, 0};
  const bool exchanges = clustered && part.used > 1;
  ClusterInbox<D>& inbox = *reinterpret_cast<ClusterInbox<D>*>(shared + kSharedBytes<T, D>);
  if (exchanges) {
    const int heads = ClusterInbox<D>::Heads(part.split, part.used, group);
    if (threadIdx.x == 0 && part.split < part.used) inbox.Expect(heads, part.used);
    team.Arrive();
  }
  T* const stages = reinterpret_cast<T*>(shared) + warp * kPipeline * kStageElements;
  const TileLoader<T, D> loader(args, part, stages);
  const bool needed = part.split < part.used;
  // Of a split that is needed, part.begin is this too.
  const int32_t first_tile = part.split * args.plan.split_tokens + warp * kTile;
  const auto tile = [&](int s) { return first_tile + s * kWarps * kTile; };
  int64_t blocks[kPipeline + 1];  // of the first tiles
#pragma unroll
  for (int s = 0; s <= kPipeline; ++s) blocks[s] = loader.LookUp(tile(s));
#pragma unroll
  for (int s = 0; s < kPipeline; ++s) {
    if (needed && tile(s) < part.end) {
      loader.Issue(tile(s), blocks[s], s * kStageElements * sizeof(T));
    }
    CommitCopies();
  }
  int64_t next = blocks[kPipeline];
  // The own token, which stands behind the stored ones, is one warp's of one split.
  const bool has_own = part.attended > part.stored && part.begin <= part.stored &&
                       part.stored < part.end &&
                       (part.stored - part.begin) / kTile % kWarps == warp;
  const bool turns = append.rows > 0 && append.rotary.data.data != nullptr;
  if (turns && threadIdx.x < D / 2) {
    FindAngle(append.rotary, part.row, threadIdx.x, &sine[threadIdx.x], &cosine[threadIdx.x]);
  }
  int64_t own_offset = -1;  // in the pool; -1: it is not stored
  if (has_own && append.rows > 0) {
    const int64_t table_row = append.table_row[part.row];
    const int32_t slot = append.slot[part.row];
    if (table_row >= 0 && HasSlot(append.target, table_row, slot)) {
      own_offset = KvOffset(append.target, table_row, slot, part.head);
    }
  }
  if (turns) __syncthreads();
  // What is read of the arguments only at the end: a first reading of constants takes its time.
  asm volatile("" ::"l"(result.out.data), "l"(result.out.stride), "l"(result.partial.sum),
               "r"(result.head_dim), "r"(static_cast<int>(result.accumulate)),
               "l"(result.log_sum_exp), "l"(scores.probability), "l"(scores.left_to),
               "l"(splits.output), "l"(splits.arrivals), "l"(args.current_value.data),
               "l"(args.query.data), "f"(args.scale), "l"(args.probability));
  WaitForEarlierKernels();
  if (!needed) return;

  // Rows of the product are the group's heads: this lane holds row lane / 4.
  uint32_t query[D / 16][2];
  OwnToken<T, D> own;
  {
    const int q = lane / 4;
    const T* const from = static_cast<const T*>(args.query.data) + part.row * args.query.stride +
                          (int64_t{part.head} * group + q) * D + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      query[k][0] = q < group ? *reinterpret_cast<const uint32_t*>(from + k * 16) : 0;
      query[k][1] = q < group ? *reinterpret_cast<const uint32_t*>(from + k * 16 + 8) : 0;
    }
    if (has_own) own.Load(args, part);
    if (turns) {
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const int column = k * 16 + eight * 8 + lane % 4 * 2;
          TurnWords<T>(query[k][eight], query[k + D / 32][eight], cosine + column, sine + column);
        }
      }
      if (has_own) {
        const int column = lane * 2 % (D / 2);
        TurnWords<T>(own.key[0], own.key[1], cosine + column, sine + column);
      }
    }
  }
  const float scale = args.scale * kLog2E;
  float output[D / 8][2] = {};
  float maximum = -INFINITY;
  float sum = 0.0f;  // of this lane's columns
  // Matrices of a tile of keys: (tokens 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15); of
  // values the same with the middle two exchanged.
  const uint32_t key_address = SharedAddress(stages + (lane / 16 * 8 + lane % 8) * D);
  const uint32_t value_address = SharedAddress(stages + (kTile + lane / 8 % 2 * 8 + lane % 8) * D);
  const int key_column = Exchanged(lane / 8 % 2, lane);
  const int value_column = Exchanged(lane / 16, lane);
  float* probability = nullptr;
  if (args.probability != nullptr && lane / 4 < group) {
    probability =
        args.probability + (part.row * args.query_heads + int64_t{part.head} * group + lane / 4) *
                               args.probability_stride;
  }

  int stage = 0;
  for (int32_t first = first_tile; first < part.end; first += kWarps * kTile) {
    const uint32_t offset = stage * kStageElements * sizeof(T);
    WaitCopies<kPipeline - 1>();
    __syncwarp();
    if (has_own && part.stored - first < kTile && part.stored >= first) {
      own.Place(reinterpret_cast<unsigned char*>(stages) + offset, part.stored - first);
      __syncwarp();
    }
    float score[2][2] = {};
    float other[2][2] = {};  // of every second product: each waits for the one before it
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      LoadMatrices(b, key_address + offset + (key_column ^ k * 32));
      float(&to)[2][2] = k % 2 == 0 ? score : other;
      MultiplyEight<T>(to[0][0], to[0][1], query[k][0], query[k][1], b[0], b[1]);
      MultiplyEight<T>(to[1][0], to[1][1], query[k][0], query[k][1], b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t token = first + n * 8 + lane % 4 * 2 + c;
        score[n][c] += other[n][c];
        if (probability != nullptr && token < part.end) {
          probability[Entry(args, part, token)] = score[n][c] * args.scale;
        }
        score[n][c] = token < part.end ? score[n][c] * scale : -INFINITY;
      }
    }
    float highest = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    if (__any_sync(~0u, highest > maximum)) {
      const float raised = fmaxf(maximum, highest);
      const float shrink = Exp2(maximum - raised);
      maximum = raised;
      sum *= shrink;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        output[n][0] *= shrink;
        output[n][1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) score[n][c] = Exp2(score[n][c] - maximum);
    }
    sum += (score[0][0] + score[0][1]) + (score[1][0] + score[1][1]);
    const uint32_t weight0 = Pack<T>(score[0][0], score[0][1]);
    const uint32_t weight1 = Pack<T>(score[1][0], score[1][1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      LoadMatricesTransposed(b, value_address + offset + (value_column ^ n * 32));
      MultiplyEight<T>(output[2 * n][0], output[2 * n][1], weight0, weight1, b[0], b[1]);
      MultiplyEight<T>(output[2 * n + 1][0], output[2 * n + 1][1], weight0, weight1, b[2], b[3]);
    }
    __syncwarp();  // the stage has been read
    const int32_t ahead = first + kPipeline * kWarps * kTile;
    if (ahead < part.end) {
      loader.Issue(ahead, next, offset);
      next = loader.LookUp(ahead + kWarps * kTile);
    }
    CommitCopies();
    stage = stage == kPipeline - 1 ? 0 : stage + 1;
  }
  WaitCopies<0>();
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);

  // The warps' results meet in shared memory, each where the warp's stages were.
  __shared__ Softmax warp_softmax[kWarps][kHeads];
  __shared__ Softmax joined[kHeads];
  constexpr int kWarpFloats = kPipeline * kStageElements * static_cast<int>(sizeof(T)) / 4;
  static_assert(kHeads * D <= kWarpFloats);
  float* const warp_output = reinterpret_cast<float*>(shared);  // [kWarps, kWarpFloats]
  __syncwarp();
  if (lane / 4 < group) {
    float* const line = warp_output + warp * kWarpFloats + lane / 4 * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(line + n * 8) = make_float2(output[n][0], output[n][1]);
    }
    if (lane % 4 == 0) warp_softmax[warp][lane / 4] = {maximum, sum};
  }
  __syncthreads();
  if (exchanges) team.AwaitArrivals();  // all blocks run, and expect what is sent to them
  const int64_t first_part = (int64_t{part.pair} * args.plan.splits + part.split) * group;
  for (int e = threadIdx.x; e < group * (D / 4); e += kThreads) {
    const int q = e / (D / 4);
    const int i = e % (D / 4) * 4;
    float highest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_softmax[w][q].maximum);
    float4 value = {};
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Softmax of_warp = warp_softmax[w][q];
      const float share = of_warp.sum == 0.0f ? 0.0f : exp2f(of_warp.maximum - highest);
      const float* const piece = warp_output + w * kWarpFloats + q * D + i;
      AddScaled(value, *reinterpret_cast<const float4*>(piece), share);
      total += of_warp.sum * share;
    }
    if (part.used == 1) {
      const int32_t head = part.head * group + q;
      const Softmax softmax = result.WriteFour(part.row, head, i, value, {highest, total});
      if (i == 0) joined[q] = softmax;
      continue;
    }
    if (exchanges) {
      const int owner = q % part.used;
      const int place = q / part.used * part.used + part.split;
      team.Send(inbox.output[place][i], value, owner, inbox.arrived);
      if (i == 0) team.Send(inbox.softmax[place], Softmax{highest, total}, owner, inbox.arrived);
      continue;
    }
    *reinterpret_cast<float4*>(splits.output + (first_part + q) * D + i) = value;
    if (i > 0) continue;
    joined[q] = {highest, total};
    splits.maximum[first_part + q] = highest;
    splits.sum[first_part + q] = total;
  }
  if (own_offset >= 0) own.Store(append.target, own_offset);
  if (exchanges) return JoinCluster<D>(inbox, part, group, result, scores);
  if (part.used > 1) {
    if (!ArrivesLast(splits, part)) return;
    float* const share = reinterpret_cast<float*>(shared);
    __shared__ Softmax parts[kHeads];
    JoinSplits(splits, part, args.plan.splits, group, D, share, parts,
               [&](int q, int i, const float4& value, int) {
                 const Softmax merged =
                     result.WriteFour(part.row, part.head * group + q, i, value, parts[q]);
                 if (i == 0) joined[q] = merged;
               });
  }
  __syncthreads();
  for (int q = 0; q < group; ++q) {
    const Softmax softmax = joined[q];
    const int32_t head = part.head * group + q;
    if (threadIdx.x == 0) result.WriteSums(part.row, head, softmax);
    scores.Finish(part, head, softmax);
  }
}

// One block for each split of each (row, query head).
__global__ void __launch_bounds__(kThreads)
    PlainDecodeAttentionKernel(const __grid_constant__ DecodeAttentionArgs args,
                               const __grid_constant__ Splits splits,
                               const __grid_constant__ AttentionResult result,
                               const __grid_constant__ Scores scores) {
  __shared__ PlainScratch scratch;
  const int d = args.head_dim;
  const int group = args.query_heads / args.kv_heads;
  const Part part = FindPart(args, args.query_heads, group);
  if (part.split >= part.used) return;
  const int32_t kv_head = part.head / group;
  KeySource keys{.view = args.view, .row = part.row, .head = kv_head, .stored = part.stored};
  keys.own_dtype = result.dtype;
  keys.rotation = args.rotation;
  keys.own_position = part.whole;
  if (args.current_key.data != nullptr) {
    const int64_t column = int64_t{kv_head} * d;
    keys.own_key =
        ElementAt(args.current_key.data, result.dtype, part.row * args.current_key.stride + column);
    keys.own_value = ElementAt(args.current_value.data, result.dtype,
                               part.row * args.current_value.stride + column);
  }
  const int64_t index = part.row * args.query_heads + part.head;
  float* const probability =
      args.probability == nullptr ? nullptr : args.probability + index * args.probability_stride;
  Softmax softmax = PlainAttend(
      scratch, args.query.data, result.dtype, part.row * args.query.stride + int64_t{part.head} * d,
      keys, part.begin, part.end, d, args.scale, [&](int32_t token, float score) {
        if (probability != nullptr) {
          probability[Entry(args, part, token)] = score;
        }
      });
  if (part.used > 1) {
    const int64_t at = int64_t{part.pair} * args.plan.splits + part.split;
    for (int i = threadIdx.x; i < d; i += kThreads) {
      splits.output[at * d + i] = scratch.output[0][i];
    }
    if (threadIdx.x == 0) {
      splits.maximum[at] = softmax.maximum;
      splits.sum[at] = softmax.sum;
    }
    if (!ArrivesLast(splits, part)) return;
    __shared__ Softmax all;
    __shared__ float share[kMostSplits];
    JoinSplits(splits, part, args.plan.splits, 1, d, share, &all,
               [&](int, int i, const float4& value, int width) {
                 const float element[4] = {value.x, value.y, value.z, value.w};
                 for (int c = 0; c < width; ++c) scratch.output[0][i + c] = element[c];
               });
    __syncthreads();
    softmax = all;
  }
  Softmax merged = softmax;
  for (int i = threadIdx.x; i < max(d, kThreads); i += kThreads) {
    // A thread without an element passes the last one's place, which holds the same sums.
    if (i < d) merged = result.Write(part.row, part.head, i, scratch.output[0][i], softmax);
  }
  __syncthreads();
  if (threadIdx.x == 0) result.WriteSums(part.row, part.head, merged);
  // With an element or without, all threads divide by the same sum.
  if (threadIdx.x == 0) {
    scratch.maximum[0] = merged.maximum;
    scratch.sum[0] = merged.sum;
  }
  __syncthreads();
  scores.Finish(part, part.head, {scratch.maximum[0], scratch.sum[0]});
}

// ----------------------------------------------------------------------------------------
// launchers

// Whether the blocks of a pair are a cluster: where each has a multiprocessor to itself, or where
// they are two. Larger clusters of which two share a multiprocessor start so much later that they
// lose more than joining gains. For Hopper: other devices may not have room for as many blocks.
bool IsClustered(int64_t pairs, int64_t splits, const LaunchContext& context) {
  const int64_t room = (splits == 2 ? 2 : 1) * int64_t{context.multiprocessors};
  return context.architecture == 90 && splits > 1 && splits <= kMostClusterBlocks &&
         pairs * splits <= room;
}

template <typename T, int D>
cudaError_t LaunchFast(const DecodeAttentionArgs& args, const AppendArgs& append,
                       const Splits& splits, const AttentionResult& result, const Scores& scores,
                       const LaunchContext& context) {
  constexpr int kInboxBytes = sizeof(ClusterInbox<D>);
  static const cudaError_t configured =
      cudaFuncSetAttribute(DecodeAttentionKernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           kSharedBytes<T, D> + kInboxBytes);
  if (configured != cudaSuccess) return configured;
  const bool clustered = IsClustered(int64_t{args.rows} * args.kv_heads, args.plan.splits, context);
  if (clustered) {
    static const cudaError_t allowed = cudaFuncSetAttribute(
        DecodeAttentionKernel<T, D>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (allowed != cudaSuccess) return allowed;
  }
  const auto blocks = static_cast<unsigned>(args.rows * args.kv_heads * args.plan.splits);
  const int bytes = kSharedBytes<T, D> + (clustered ? kInboxBytes : 0);
  return LaunchDependentClusters(context, DecodeAttentionKernel<T, D>, blocks, kThreads, bytes,
                                 clustered ? static_cast<unsigned>(args.plan.splits) : 1, args,
                                 append, splits, result, scores, clustered);
}

// Whether the fast kernel takes this shape and these types.
bool IsFast(const DecodeAttentionArgs& args, DType dtype) {
  const bool current = args.current_key.data == nullptr ||
                       (IsAligned(args.current_key, dtype) && IsAligned(args.current_value, dtype));
  return dtype == DType::kBf16 && args.view.dtype == dtype &&
         (args.head_dim == 64 || args.head_dim == 128) &&
         args.rotation.inverse_frequency == nullptr && args.query_heads / args.kv_heads <= kHeads &&
         IsAligned(args.view) && IsAligned(args.query, dtype) && current;
}

}  // namespace

AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads,
                            const LaunchContext& context) {
  constexpr int32_t kInvariantTokens = 1024;
  constexpr int32_t kLeastTokens = kWarps * kTile;
  // What a block's start and end cost, joining blocks of a cluster, and joining through memory: in
  // tokens of a block's time where two share a multiprocessor.
  constexpr int64_t kStartTokens = 48;
  constexpr int64_t kClusterTokens = 24;
  constexpr int64_t kMemoryTokens = 200;
  if (context.batch_invariant) {
    const int32_t splits = (max_tokens + kInvariantTokens - 1) / kInvariantTokens;
    return {.splits = std::max(splits, 1), .split_tokens = kInvariantTokens};
  }
  const int multiprocessors = context.multiprocessors;
  // The split for which all waves of blocks together take least.
  const int64_t pairs = std::max<int64_t>(1, int64_t{rows} * kv_heads);
  const int64_t resident = 2 * static_cast<int64_t>(multiprocessors);
  // The last split takes up to a tile and a token more than its share: the current token behind a
  // round number of stored ones must not make all of them longer.
  const auto share = [&](int64_t splits) {
    const int64_t tokens = (std::max(max_tokens - kTile, 1) + splits - 1) / splits;
    return (tokens + kWarps * kTile - 1) / (kWarps * kTile) * (kWarps * kTile);
  };
  int64_t best = 1;
  int64_t best_cost = INT64_MAX;
  const int64_t most = std::clamp<int64_t>(max_tokens / kLeastTokens, 1, 256);
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t waves = (pairs * splits + resident - 1) / resident;
    const int64_t joining = splits == 1                           ? 0
                            : IsClustered(pairs, splits, context) ? kClusterTokens
                                                                  : kMemoryTokens;
    // A block alone on a multiprocessor reads 1.6 times as fast as each of two.
    const int64_t reading =
        pairs * splits <= multiprocessors ? share(splits) * 5 / 8 : share(splits);
    const int64_t cost = waves * (reading + kStartTokens) + joining;
    if (cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
    if (pairs * splits > 16 * resident) break;
  }
  if (best == 1) return {.splits = 1, .split_tokens = 0};
  return {.splits = static_cast<int32_t>(best), .split_tokens = static_cast<int32_t>(share(best))};
}

namespace {

// `append`: as the fast kernel takes it.
cudaError_t LaunchAppending(const DecodeAttentionArgs& given, const AppendArgs& append,
                            const LaunchContext& context) {
  DecodeAttentionArgs args = given;
  if (args.plan.splits <= 1) args.plan = {.splits = 1, .split_tokens = 0};
  if (args.plan.splits > kMostSplits) return cudaErrorInvalidValue;
  const int64_t parts = int64_t{args.rows} * args.query_heads * args.plan.splits;
  const int64_t heads = int64_t{args.rows} * args.query_heads;
  Splits splits;
  splits.output = reinterpret_cast<float*>(context.workspace);
  splits.maximum = splits.output + parts * args.head_dim;
  splits.sum = splits.maximum + parts;
  splits.arrivals = context.tickets;
  Scores scores{.probability = args.out.data == nullptr ? nullptr : args.probability,
                .stride = args.probability_stride,
                .left_to = nullptr,
                .query_heads = args.query_heads};
  if (args.plan.splits > 1) {
    auto* const sums = reinterpret_cast<Softmax*>(splits.sum + parts);
    const size_t bytes = parts * (args.head_dim + 2) * sizeof(float) + heads * sizeof(Softmax);
    if (bytes > context.workspace_bytes) return cudaErrorMemoryAllocation;
    if (heads > context.ticket_count) return cudaErrorMemoryAllocation;
    // One block would take longer over a row that was worth splitting than another launch does.
    if (scores.probability != nullptr) scores.left_to = sums;
  }
  const AttentionResult result{.out = args.out,
                               .dtype = context.activation_dtype,
                               .partial = args.partial,
                               .accumulate = args.accumulate,
                               .log_sum_exp = nullptr,
                               .query_heads = args.query_heads,
                               .head_dim = args.head_dim};
  cudaError_t error = cudaSuccess;
  if (IsFast(args, context.activation_dtype)) {
    error = args.head_dim == 64
                ? LaunchFast<__nv_bfloat16, 64>(args, append, splits, result, scores, context)
                : LaunchFast<__nv_bfloat16, 128>(args, append, splits, result, scores, context);
  } else {
    if (args.head_dim > 256) return cudaErrorInvalidValue;
    const int64_t blocks = heads * args.plan.splits;
    PlainDecodeAttentionKernel<<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(
        args, splits, result, scores);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess || scores.left_to == nullptr) return error;
  const int64_t pieces = (args.probability_stride + kNormalisedAtOnce - 1) / kNormalisedAtOnce;
  return LaunchDependent(AfterKernel(context), NormaliseKernel,
                         dim3(static_cast<unsigned>(heads), static_cast<unsigned>(pieces)),
                         kThreads, 0, args, scores);
}

}  // namespace

cudaError_t Launch(const DecodeAttentionArgs& args, const LaunchContext& context) {
  return LaunchAppending(args, {}, context);
}

bool CanAppendAndAttend(const AppendAndAttendArgs& args, const LaunchContext& context) {
  const AppendArgs& append = args.append;
  const DecodeAttentionArgs& attention = args.attention;
  const RotaryArgs& rotary = append.rotary;
  const int64_t query_bytes = int64_t{2} * attention.query_heads * attention.head_dim;
  // Turned are the queries and, behind them, the keys.
  const bool turns_both = rotary.data.data == attention.query.data &&
                          rotary.data.stride == attention.query.stride &&
                          rotary.heads == attention.query_heads + attention.kv_heads &&
                          rotary.head_dim == attention.head_dim && rotary.rows == append.rows &&
                          static_cast<std::byte*>(rotary.data.data) + query_bytes ==
                              static_cast<std::byte*>(append.key.data);
  const auto is_same = [](const Activations& one, const Activations& other) {
    return one.data == other.data && one.stride == other.stride;
  };
  return IsFast(attention, context.activation_dtype) && append.rows == attention.rows &&
         is_same(append.key, attention.current_key) &&
         is_same(append.value, attention.current_value) && !append.slot_by_head &&
         append.target.dtype == attention.view.dtype && IsAligned(append.target) &&
         append.target.value != nullptr && (rotary.data.data == nullptr || turns_both);
}

cudaError_t Launch(const AppendAndAttendArgs& args, const LaunchContext& context) {
  return LaunchAppending(args.attention, args.append, context);
}

}  // namespace kvsweep::cuda
