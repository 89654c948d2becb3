#include "worker/strategies/skewing.h"

#include <Eigen/Dense>
#include <algorithm>
#include <numeric>

#include "base/check.h"

namespace kvsweep {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Rows = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>,
                        0, Eigen::OuterStride<>>;

// Head `head` of [n, heads, d] as a matrix [n, d].
Matrix Head(std::span<const float> data, int32_t head, int32_t heads, const SkewingSizes& sizes) {
  return Rows(data.data() + int64_t{head} * sizes.head_dim, sizes.tokens, sizes.head_dim,
              Eigen::OuterStride<>(int64_t{heads} * sizes.head_dim))
      .cast<double>();
}

// Right singular vectors of the stacked queries, as the eigenvectors of their Gram matrix, by
// falling singular value.
Matrix RightSingularVectors(const std::vector<Matrix>& queries, int32_t head_dim) {
  Matrix gram = Matrix::Zero(head_dim, head_dim);
  for (const Matrix& query : queries) gram += query.transpose() * query;
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(gram);
  KVSWEEP_CHECK(solver.info() == Eigen::Success);
  Matrix vectors = solver.eigenvectors().rowwise().reverse();
  for (int32_t column = 0; column < head_dim; ++column) {
    Eigen::Index largest = 0;
    vectors.col(column).cwiseAbs().maxCoeff(&largest);
    if (vectors(largest, column) < 0) vectors.col(column) *= -1;
  }
  return vectors;
}

std::vector<int32_t> RankColumns(const std::vector<Matrix>& queries, const Matrix& keys,
                                 const Matrix& skew) {
  Eigen::VectorXd query_energy = Eigen::VectorXd::Zero(skew.cols());
  for (const Matrix& query : queries) {
    query_energy += (query * skew).cwiseAbs().colwise().sum().transpose();
  }
  const Matrix skewed_keys = keys * skew;
  const Matrix centred = skewed_keys.rowwise() - skewed_keys.colwise().mean();
  const Eigen::VectorXd energy =
      query_energy.cwiseProduct(centred.cwiseAbs().colwise().sum().transpose());
  std::vector<int32_t> order(static_cast<size_t>(skew.cols()));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int32_t a, int32_t b) { return energy(a) > energy(b); });
  return order;
}

}  // namespace

LayerSkewing ComputeSkewing(std::span<const float> queries, std::span<const float> keys,
                            const SkewingSizes& sizes) {
  KVSWEEP_CHECK_GE(sizes.tokens, sizes.head_dim) << "fewer calibration rows than columns";
  const int32_t group = sizes.query_heads / sizes.kv_heads;
  LayerSkewing skewing;
  for (int32_t head = 0; head < sizes.kv_heads; ++head) {
    std::vector<Matrix> head_queries;
    for (int32_t member = 0; member < group; ++member) {
      head_queries.push_back(Head(queries, head * group + member, sizes.query_heads, sizes));
    }
    const Matrix skew = RightSingularVectors(head_queries, sizes.head_dim);
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rounded =
        skew.cast<float>();
    skewing.matrix.insert(skewing.matrix.end(), rounded.data(), rounded.data() + rounded.size());
    const std::vector<int32_t> order =
        RankColumns(head_queries, Head(keys, head, sizes.kv_heads, sizes), skew);
    skewing.column_order.insert(skewing.column_order.end(), order.begin(), order.end());
  }
  return skewing;
}

int32_t PartialDim(double ratio, int32_t head_dim) {
  const auto columns = static_cast<int32_t>(ratio * head_dim + 1e-9);
  return std::min(head_dim, std::max(1, (columns + 7) / 8) * 8);
}

std::vector<float> KeptColumns(const LayerSkewing& skewing, int32_t kv_heads, int32_t head_dim,
                               int32_t partial_dim, float scale) {
  std::vector<float> kept;
  kept.reserve(static_cast<size_t>(int64_t{kv_heads} * head_dim * partial_dim));
  for (int32_t head = 0; head < kv_heads; ++head) {
    const auto first = skewing.column_order.begin() + int64_t{head} * head_dim;
    std::vector<int32_t> columns(first, first + partial_dim);
    std::ranges::sort(columns);
    for (int32_t row = 0; row < head_dim; ++row) {
      const int64_t start = (int64_t{head} * head_dim + row) * head_dim;
      for (int32_t column : columns) {
        kept.push_back(scale * skewing.matrix[static_cast<size_t>(start + column)]);
      }
    }
  }
  return kept;
}

}  // namespace kvsweep
