#include "worker/strategies/skewing.h"

#include <Eigen/Dense>
#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>

#include "base/check.h"
#include "base/parallel_for.h"

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

// Appends what each column of the queries and keys of a head holds after `skew`.
void AddEnergy(const std::vector<Matrix>& queries, const Matrix& keys, const Matrix& skew,
               ColumnEnergy* energy) {
  Eigen::VectorXd query_energy = Eigen::VectorXd::Zero(skew.cols());
  for (const Matrix& query : queries) {
    query_energy += (query * skew).cwiseAbs().colwise().sum().transpose();
  }
  const Matrix skewed_keys = keys * skew;
  const Matrix centred = skewed_keys.rowwise() - skewed_keys.colwise().mean();
  const Eigen::VectorXd key_energy = centred.cwiseAbs().colwise().sum().transpose();
  energy->query.insert(energy->query.end(), query_energy.begin(), query_energy.end());
  energy->key.insert(energy->key.end(), key_energy.begin(), key_energy.end());
}

// The numbers of the `count` largest, the lower number first on ties; ascending.
std::vector<int32_t> Largest(std::span<const double> values, int32_t count) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int32_t a, int32_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(count));
  std::ranges::sort(order);
  return order;
}

// What a column is worth by itself: product or query.
std::vector<double> Worth(const ColumnEnergy& energy, Infinigen::ColumnScore score) {
  std::vector<double> worth = energy.query;
  if (score == Infinigen::COLUMN_SCORE_QUERY) return worth;
  for (size_t i = 0; i < worth.size(); ++i) worth[i] *= energy.key[i];
  return worth;
}

int32_t WholeColumns(double ratio, int32_t head_dim) {
  return static_cast<int32_t>(ratio * head_dim + 1e-9);
}

}  // namespace

LayerSkewing ComputeSkewing(std::span<const float> queries, std::span<const float> keys,
                            const SkewingSizes& sizes) {
  KVSWEEP_CHECK_GE(sizes.tokens, sizes.head_dim) << "fewer calibration rows than columns";
  const int32_t group = sizes.query_heads / sizes.kv_heads;
  const Matrix identity = Matrix::Identity(sizes.head_dim, sizes.head_dim);
  LayerSkewing skewing;
  for (int32_t head = 0; head < sizes.kv_heads; ++head) {
    std::vector<Matrix> head_queries;
    for (int32_t member = 0; member < group; ++member) {
      head_queries.push_back(Head(queries, head * group + member, sizes.query_heads, sizes));
    }
    const Matrix head_keys = Head(keys, head, sizes.kv_heads, sizes);
    const Matrix skew = RightSingularVectors(head_queries, sizes.head_dim);
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rounded =
        skew.cast<float>();
    skewing.matrix.insert(skewing.matrix.end(), rounded.data(), rounded.data() + rounded.size());
    AddEnergy(head_queries, head_keys, skew, &skewing.skewed);
    AddEnergy(head_queries, head_keys, identity, &skewing.plain);
  }
  return skewing;
}

int32_t PartialDim(double ratio, int32_t head_dim, bool combined) {
  const int32_t columns = (combined ? 2 : 1) * WholeColumns(ratio, head_dim);
  return std::min(head_dim, std::max(1, (columns + 7) / 8) * 8);
}

HeadColumns ChooseColumns(const ColumnEnergy& energy, Infinigen::ColumnScore score, double ratio,
                          int32_t kv_heads, int32_t head_dim) {
  const auto dim = static_cast<size_t>(head_dim);
  const std::vector<double> worth = Worth(energy, score);
  HeadColumns chosen;
  for (size_t first = 0; first < static_cast<size_t>(kv_heads) * dim; first += dim) {
    if (score != Infinigen::COLUMN_SCORE_UNION) {
      chosen.push_back(Largest(std::span(worth).subspan(first, dim), PartialDim(ratio, head_dim)));
      continue;
    }
    const int32_t each = std::max(1, WholeColumns(ratio, head_dim));
    const std::vector<int32_t> by_query =
        Largest(std::span(energy.query).subspan(first, dim), each);
    const std::vector<int32_t> by_key = Largest(std::span(energy.key).subspan(first, dim), each);
    chosen.emplace_back();
    std::ranges::set_union(by_query, by_key, std::back_inserter(chosen.back()));
  }
  return chosen;
}

std::vector<int32_t> ChooseRotaryPairs(const ColumnEnergy& energy, Infinigen::ColumnScore score,
                                       int32_t partial_dim, int32_t kv_heads, int32_t head_dim) {
  const int32_t half = head_dim / 2;
  const std::vector<double> worth = Worth(energy, score);
  std::vector<double> pair_worth(static_cast<size_t>(half));
  for (int32_t i = 0; i < kv_heads * head_dim; ++i) {
    pair_worth[static_cast<size_t>(i % head_dim % half)] += worth[static_cast<size_t>(i)];
  }
  return Largest(pair_worth, partial_dim / 2);
}

HeadColumns PairColumns(const std::vector<int32_t>& pairs, int32_t kv_heads, int32_t head_dim) {
  std::vector<int32_t> columns = pairs;
  for (const int32_t pair : pairs) columns.push_back(pair + head_dim / 2);
  return HeadColumns(static_cast<size_t>(kv_heads), columns);
}

std::vector<float> ThinMatrices(std::span<const float> matrix, const HeadColumns& columns,
                                int32_t head_dim, int32_t partial_dim, float scale) {
  std::vector<float> thin(columns.size() * static_cast<size_t>(head_dim * partial_dim));
  size_t row = 0;
  for (const std::vector<int32_t>& kept : columns) {
    for (int32_t j = 0; j < head_dim; ++j, ++row) {
      for (size_t i = 0; i < kept.size(); ++i) {
        const auto column = static_cast<size_t>(kept[i]);
        thin[row * static_cast<size_t>(partial_dim) + i] =
            scale * (matrix.empty() ? static_cast<float>(kept[i] == j)
                                    : matrix[row * static_cast<size_t>(head_dim) + column]);
      }
    }
  }
  return thin;
}

ProjectedWeights ThroughMatrices(std::span<const float> weight, std::span<const float> bias,
                                 std::span<const float> matrix, int32_t heads, int32_t group,
                                 int32_t head_dim, int32_t columns) {
  constexpr size_t kBlock = 512;  // columns of a head's weights that stay in cache for all sums
  const auto dim = static_cast<size_t>(head_dim);
  const auto width = static_cast<size_t>(columns);
  const size_t inner = weight.size() / (static_cast<size_t>(heads) * dim);  // D
  ProjectedWeights projected{
      .weight = std::vector<float>(static_cast<size_t>(heads) * width * inner),
      .bias = std::vector<float>(static_cast<size_t>(heads) * width)};
  ParallelFor(static_cast<size_t>(heads), [&](size_t head) {
    const float* const through = matrix.data() + head / static_cast<size_t>(group) * dim * width;
    for (size_t i = 0; i < width && !bias.empty(); ++i) {
      double shift = 0;
      for (size_t j = 0; j < dim; ++j) {
        shift += double{through[j * width + i]} * bias[head * dim + j];
      }
      projected.bias[head * width + i] = static_cast<float>(shift);
    }
    std::array<double, kBlock> sums;
    for (size_t first = 0; first < inner; first += kBlock) {
      const size_t count = std::min(kBlock, inner - first);
      for (size_t i = 0; i < width; ++i) {
        sums.fill(0.0);
        for (size_t j = 0; j < dim; ++j) {
          const double factor = through[j * width + i];
          if (factor == 0) continue;  // most are, where columns are picked
          const float* const source = weight.data() + (head * dim + j) * inner + first;
          for (size_t k = 0; k < count; ++k) sums[k] += factor * source[k];
        }
        float* const target = projected.weight.data() + (head * width + i) * inner + first;
        for (size_t k = 0; k < count; ++k) target[k] = static_cast<float>(sums[k]);
      }
    }
  });
  return projected;
}

}  // namespace kvsweep
