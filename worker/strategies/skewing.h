// InfiniGen's offline skewing (Lee et al. 2024, section 4.2): for each layer and KV head an
// orthogonal matrix that gathers the energy of q . k in few columns, and how much energy each
// column holds. A pure function of a calibration text's queries and keys; which columns are kept
// for speculation is decided from it for each arm.
//
// The model's own weights stay as they are; only the speculative copies are skewed, so that every
// arm runs the same weights.
#ifndef KVSWEEP_WORKER_STRATEGIES_SKEWING_H_
#define KVSWEEP_WORKER_STRATEGIES_SKEWING_H_

#include <cstdint>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"

namespace kvsweep {

// How much each column holds, [Hk, d].
struct ColumnEnergy {
  std::vector<double> query;  // sum over t and the group of |q|
  std::vector<double> key;    // sum over t of |k - mean_t k|: what all keys share cancels in the
                              // softmax and must not win columns
};

struct LayerSkewing {
  std::vector<float> matrix;  // [Hk, d, d], A: skewed q = q A; orthogonal
  ColumnEnergy skewed;        // of q A and k A
  ColumnEnergy plain;         // of q and k as they are
};

struct Skewing {
  std::vector<LayerSkewing> layers;  // [L]
};

struct SkewingSizes {
  int32_t tokens = 0;       // n >= d
  int32_t query_heads = 0;  // Hq
  int32_t kv_heads = 0;     // Hk
  int32_t head_dim = 0;     // d
};

// From one layer's queries [n, Hq, d] and keys [n, Hk, d], both after rotary embedding. A_h: right
// singular vectors of the queries of the group stacked [n g, d], by falling singular value, each
// with its largest component positive.
LayerSkewing ComputeSkewing(std::span<const float> queries, std::span<const float> keys,
                            const SkewingSizes& sizes);

// Columns that there is room for (d'): int(ratio * d) rounded up to a multiple of 8, at least 8, at
// most d. `combined` (column_score: union) takes twice int(ratio * d) before rounding.
int32_t PartialDim(double ratio, int32_t head_dim, bool combined = false);

// Columns kept for each KV head, ascending; ties in energy go to the lower column.
using HeadColumns = std::vector<std::vector<int32_t>>;

// The d' columns that `score` ranks highest. Union: the best int(ratio * d) by query and the best
// as many by key energy, so between that number and twice as many.
HeadColumns ChooseColumns(const ColumnEnergy& energy, Infinigen::ColumnScore score, double ratio,
                          int32_t kv_heads, int32_t head_dim);

// The d' / 2 rotary pairs (j, j + d / 2) with the most energy over all heads of the layer,
// ascending: the j. Shared by the heads, so that one rotation serves them all.
std::vector<int32_t> ChooseRotaryPairs(const ColumnEnergy& energy, Infinigen::ColumnScore score,
                                       int32_t partial_dim, int32_t kv_heads, int32_t head_dim);
// The pairs as columns of each head: all first halves, then all second halves.
HeadColumns PairColumns(const std::vector<int32_t>& pairs, int32_t kv_heads, int32_t head_dim);

// Thin matrices [Hk, d, d'] times `scale`: the kept columns of A, or (empty matrix) of the
// identity; columns beyond the kept ones are zero.
std::vector<float> ThinMatrices(std::span<const float> matrix, const HeadColumns& columns,
                                int32_t head_dim, int32_t partial_dim, float scale);

// A linear map [heads * d, D] and its bias seen through a matrix of each KV head [Hk, d, c]: rows
// (h, i) are sum over j of matrix[h / g, j, i] * weight[h, j]. Bias empty: none; then zeros come
// back. Summed in double.
struct ProjectedWeights {
  std::vector<float> weight;  // [heads * c, D]
  std::vector<float> bias;    // [heads * c]
};
ProjectedWeights ThroughMatrices(std::span<const float> weight, std::span<const float> bias,
                                 std::span<const float> matrix, int32_t heads, int32_t group,
                                 int32_t head_dim, int32_t columns);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_SKEWING_H_
