// What decode and prefill attention share: where keys and values come from, how partial results
// join, and a plain version for the shapes and types that the fast kernels do not take.
#ifndef KVSWEEP_KERNELS_CUDA_ATTENTION_CUH_
#define KVSWEEP_KERNELS_CUDA_ATTENTION_CUH_

#include <cuda_runtime.h>

#include <cmath>

#include "kernels/arguments.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/views.cuh"

namespace kvsweep::cuda {

// An unnormalised softmax: its largest exponent, in units of log 2, and its sum.
struct Softmax {
  float maximum = -INFINITY;
  float sum = 0.0f;

  // Takes `other` in; returns by how much what was summed so far shrinks and, through `others`,
  // what `other` summed.
  __device__ __forceinline__ float Join(float other_maximum, float other_sum, float& others) {
    if (other_sum == 0.0f) {
      others = 0.0f;
      return 1.0f;
    }
    const float common = fmaxf(maximum, other_maximum);
    const float mine = sum == 0.0f ? 0.0f : exp2f(maximum - common);
    others = exp2f(other_maximum - common);
    sum = sum * mine + other_sum * others;
    maximum = common;
    return mine;
  }
};

// Where the result of one query head goes: a row of `out`, or its place in `partial`, merged with
// what that holds if asked.
struct AttentionResult {
  Activations out;           // [rows, Hq, d]
  DType dtype;               // of out
  PartialAttention partial;  // [rows, Hq, d]
  bool accumulate;
  float* log_sum_exp;  // [rows, Hq] or nullptr
  int32_t query_heads;
  int32_t head_dim;

  // Element i of head `head`; `value` is not yet divided by the sum. All threads of the head call
  // it with the same softmax, which is returned as it stands after the merge.
  __device__ __forceinline__ Softmax Write(int64_t row, int32_t head, int32_t i, float value,
                                           Softmax softmax) const {
    const int64_t index = row * query_heads + head;
    if (accumulate) {
      float others;
      const float mine = softmax.Join(partial.maximum[index] * kLog2E, partial.sum[index], others);
      if (others != 0.0f) value = value * mine + partial.output[index * head_dim + i] * others;
    }
    if (out.data == nullptr) {
      partial.output[index * head_dim + i] = value;
      return softmax;
    }
    const float inverse = softmax.sum > 0.0f ? 1.0f / softmax.sum : 0.0f;
    StoreElement(out.data, dtype, row * out.stride + int64_t{head} * head_dim + i, value * inverse);
    return softmax;
  }

  // The same of elements i .. i + 3.
  __device__ __forceinline__ Softmax WriteFour(int64_t row, int32_t head, int32_t i,
                                               const float4& value, Softmax softmax) const {
    const float element[4] = {value.x, value.y, value.z, value.w};
    Softmax merged;
#pragma unroll
    for (int c = 0; c < 4; ++c) merged = Write(row, head, i + c, element[c], softmax);
    return merged;
  }

  // What one thread of the head writes, after all of its threads have passed Write.
  __device__ __forceinline__ void WriteSums(int64_t row, int32_t head, Softmax softmax) const {
    const int64_t index = row * query_heads + head;
    if (out.data == nullptr) {
      partial.maximum[index] = softmax.maximum * kLn2;
      partial.sum[index] = softmax.sum;
    } else if (log_sum_exp != nullptr) {
      log_sum_exp[index] = softmax.maximum * kLn2 + logf(softmax.sum);
    }
  }
};

// Keys and values of one (row, KV head): slots [0, stored) of a view, then rows that stand in the
// activations, rounded to the view's type.
struct KeySource {
  KvView view;
  int64_t row;
  int32_t head;
  int32_t stored;
  const void* own_key;  // the head's columns of the first own row
  const void* own_value;
  int64_t own_key_stride;
  int64_t own_value_stride;
  DType own_dtype;
  KeyRotation rotation;
  int32_t own_position;  // of the first own row, where keys are turned

  __device__ __forceinline__ int32_t Position(int32_t token) const {
    if (token >= stored) return own_position + token - stored;
    const int32_t place = view.first_token + token;
    if (rotation.rank.data == nullptr) return place;
    return static_cast<const int32_t*>(
        rotation.rank.data)[SlotOffset(rotation.rank, row, place, head)];
  }
};

// One key or value row of a KeySource.
struct ElementRow {
  const void* data;
  int64_t offset;  // elements
  DType dtype;     // as it lies there
  DType rounded;   // as it counts

  __device__ __forceinline__ float operator()(int32_t i) const {
    return RoundTo(rounded, LoadElement(data, dtype, offset + i));
  }
};
__device__ __forceinline__ ElementRow KeyRow(const KeySource& keys, int32_t token) {
  if (token >= keys.stored) {
    return {keys.own_key, (token - keys.stored) * keys.own_key_stride, keys.own_dtype,
            keys.view.dtype};
  }
  return {keys.view.key, KvOffset(keys.view, keys.row, token, keys.head), keys.view.dtype,
          keys.view.dtype};
}
__device__ __forceinline__ ElementRow ValueRow(const KeySource& keys, int32_t token) {
  if (token >= keys.stored) {
    return {keys.own_value, (token - keys.stored) * keys.own_value_stride, keys.own_dtype,
            keys.view.dtype};
  }
  return {keys.view.value, KvOffset(keys.view, keys.row, token, keys.head), keys.view.dtype,
          keys.view.dtype};
}
// Element i of a key that counts at `position`.
__device__ __forceinline__ float Turned(const ElementRow& key, const float* inverse_frequency,
                                        int32_t position, int32_t i, int32_t head_dim) {
  const int32_t half = head_dim / 2;
  const int32_t j = i < half ? i : i - half;
  float sine;
  float cosine;
  sincosf(static_cast<float>(position) * inverse_frequency[j], &sine, &cosine);
  return i < half ? key(i) * cosine - key(i + half) * sine : key(i) * cosine + key(j) * sine;
}

// Scores and sums of one query head over tokens [begin, end), by the 4 warps of a block of 128
// threads; any head dimension up to 256, any type. On return `softmax` is the same in all threads
// and scratch.output[0] [head_dim] is not yet divided. leave(token, score) is called once for each
// scaled score.
struct PlainScratch {
  float output[4][256];
  float maximum[4];
  float sum[4];
};
template <typename Leave>
__device__ Softmax PlainAttend(PlainScratch& scratch, const void* query, DType query_dtype,
                               int64_t query_offset, const KeySource& keys, int32_t begin,
                               int32_t end, int32_t head_dim, float scale, const Leave& leave) {
  constexpr int kWarps = 4;
  constexpr int kElements = 8;  // of a lane
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float q[kElements];
  float output[kElements] = {};
  for (int e = 0; e < kElements; ++e) {
    const int i = lane + 32 * e;
    q[e] = i < head_dim ? LoadElement(query, query_dtype, query_offset + i) * scale : 0.0f;
  }
  Softmax softmax;
  for (int32_t token = begin + warp; token < end; token += kWarps) {
    const ElementRow key = KeyRow(keys, token);
    float dot = 0.0f;
    if (keys.rotation.inverse_frequency == nullptr) {
      for (int e = 0; e < kElements; ++e) {
        const int i = lane + 32 * e;
        if (i < head_dim) dot += q[e] * key(i);
      }
    } else {
      const int32_t position = keys.Position(token);
      for (int e = 0; e < kElements; ++e) {
        const int i = lane + 32 * e;
        if (i >= head_dim) continue;
        dot += q[e] * Turned(key, keys.rotation.inverse_frequency, position, i, head_dim);
      }
    }
    dot = WarpSum(dot);
    if (lane == 0) leave(token, dot);
    const ElementRow value = ValueRow(keys, token);
    float weight;
    const float shrink = softmax.Join(dot * kLog2E, 1.0f, weight);
    for (int e = 0; e < kElements; ++e) {
      const int i = lane + 32 * e;
      if (i < head_dim) output[e] = output[e] * shrink + weight * value(i);
    }
  }
  __syncthreads();  // the scratch may still be read from an earlier call
  for (int e = 0; e < kElements; ++e) scratch.output[warp][lane + 32 * e] = output[e];
  scratch.maximum[warp] = softmax.maximum;
  scratch.sum[warp] = softmax.sum;
  __syncthreads();
  Softmax joined;
  float share[kWarps];
  for (int w = 0; w < kWarps; ++w) {
    const float mine = joined.Join(scratch.maximum[w], scratch.sum[w], share[w]);
    for (int earlier = 0; earlier < w; ++earlier) share[earlier] *= mine;
  }
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += scratch.output[w][i] * share[w];
    scratch.output[0][i] = total;
  }
  __syncthreads();
  return joined;
}

}  // namespace kvsweep::cuda

#endif  // KVSWEEP_KERNELS_CUDA_ATTENTION_CUH_
