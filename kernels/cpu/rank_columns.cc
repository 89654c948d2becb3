#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {
namespace {

// product [T, d] = the head's vectors through A [d, d].
std::vector<double> Skew(const Activations& in, int64_t head, int64_t rows, int64_t d,
                         const float* matrix) {
  std::vector<double> product(static_cast<size_t>(rows * d));
  for (int64_t t = 0; t < rows; ++t) {
    const float* const vector = Row(in, t) + head * d;
    double* const out = product.data() + t * d;
    for (int64_t j = 0; j < d; ++j) {
      const double factor = vector[j];
      for (int64_t c = 0; c < d; ++c) out[c] += factor * matrix[j * d + c];
    }
  }
  return product;
}

void AddMagnitudes(const std::vector<double>& product, int64_t d, std::vector<double>* energy) {
  for (size_t i = 0; i < product.size(); ++i) {
    (*energy)[i % static_cast<size_t>(d)] += std::fabs(product[i]);
  }
}

void RankHead(const RankColumnsArgs& args, int64_t head) {
  const int64_t d = args.head_dim;
  const int64_t group = args.query_heads / args.kv_heads;
  const float* const matrix = args.matrix + head * d * d;
  std::vector<double> energy(static_cast<size_t>(d));
  for (int64_t q = head * group; q < (head + 1) * group; ++q) {
    AddMagnitudes(Skew(args.query, q, args.rows, d, matrix), d, &energy);
  }
  if (!args.query_alone) {
    // What all keys share cancels in the softmax and must not win columns.
    std::vector<double> keys = Skew(args.key, head, args.rows, d, matrix);
    std::vector<double> mean(static_cast<size_t>(d));
    for (size_t i = 0; i < keys.size(); ++i) mean[i % d] += keys[i] / args.rows;
    for (size_t i = 0; i < keys.size(); ++i) keys[i] -= mean[i % d];
    std::vector<double> key_energy(static_cast<size_t>(d));
    AddMagnitudes(keys, d, &key_energy);
    for (int64_t c = 0; c < d; ++c) energy[c] *= key_energy[c];
  }
  std::vector<int32_t> order(static_cast<size_t>(d));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return energy[a] > energy[b]; });
  std::sort(order.begin(), order.begin() + args.partial_dim);
  std::copy_n(order.begin(), args.partial_dim, args.column + head * args.partial_dim);
}

}  // namespace

absl::Status Run(const RankColumnsArgs& args, Context& context) {
  context.pool.For(args.kv_heads, [&](int64_t head, int) { RankHead(args, head); });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
