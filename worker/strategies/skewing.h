// InfiniGen's offline skewing (Lee et al. 2024, section 4.2): for each layer and KV head an
// orthogonal matrix that gathers the energy of q . k in few columns, and the order in which columns
// are worth keeping. A pure function of a calibration text's queries and keys.
//
// The model's own weights stay as they are; only the speculative copies are skewed, so that every
// arm runs the same weights.
#ifndef KVSWEEP_WORKER_STRATEGIES_SKEWING_H_
#define KVSWEEP_WORKER_STRATEGIES_SKEWING_H_

#include <cstdint>
#include <span>
#include <vector>

namespace kvsweep {

struct LayerSkewing {
  std::vector<float> matrix;          // [Hk, d, d], A: skewed q = q A; orthogonal
  std::vector<int32_t> column_order;  // [Hk, d], best first
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
// with its largest component positive. Columns are ranked by (sum over t and group |q A|_c) * (sum
// over t |k A - mean_t k A|_c): what all keys share cancels in the softmax and must not win
// columns.
LayerSkewing ComputeSkewing(std::span<const float> queries, std::span<const float> keys,
                            const SkewingSizes& sizes);

// Columns kept for a share of the head dimension: min(d, int(ratio * d) rounded up to a multiple of
// 8), at least 8 or d.
int32_t PartialDim(double ratio, int32_t head_dim);

// The first `partial_dim` columns of the order, ascending, of each head's matrix: [Hk, d, d'],
// times `scale`.
std::vector<float> KeptColumns(const LayerSkewing& skewing, int32_t kv_heads, int32_t head_dim,
                               int32_t partial_dim, float scale);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_SKEWING_H_
