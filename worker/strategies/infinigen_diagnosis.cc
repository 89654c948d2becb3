#include "worker/strategies/infinigen_diagnosis.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace kvsweep {
namespace {

double Dot(const float* a, const float* b, int32_t count) {
  double sum = 0;
  for (int32_t i = 0; i < count; ++i) sum += double{a[i]} * b[i];
  return sum;
}

// Scaled scores of one query head over the n stored tokens, then the current one.
std::vector<double> Scores(const SelectionSample& sample, int32_t query_head, int32_t tokens) {
  const int32_t dim = sample.head_dim;
  const int32_t kv_head = query_head / (sample.query_heads / sample.kv_heads);
  const float* const query = sample.query.data() + int64_t{query_head} * dim;
  std::vector<double> scores;
  for (int32_t t = 0; t < tokens; ++t) {
    const float* const key = sample.keys.data() + (int64_t{kv_head} * tokens + t) * dim;
    scores.push_back(sample.scale * Dot(query, key, dim));
  }
  scores.push_back(sample.scale *
                   Dot(query, sample.current_key.data() + int64_t{kv_head} * dim, dim));
  return scores;
}

double Covered(const std::vector<double>& scores, const std::vector<int32_t>& selected) {
  const double highest = *std::ranges::max_element(scores);
  double all = 0;
  for (const double score : scores) all += std::exp(score - highest);
  double covered = std::exp(scores.back() - highest);
  for (const int32_t slot : selected) {
    covered += std::exp(scores[static_cast<size_t>(slot)] - highest);
  }
  return covered / all;
}

// Share of the slots with the largest margins that was selected; ties go to the lower slot.
double Recall(const std::vector<double>& margins, std::vector<int32_t> selected) {
  std::vector<int32_t> best(margins.size());
  std::iota(best.begin(), best.end(), 0);
  std::ranges::stable_sort(best, [&](int32_t a, int32_t b) {
    return margins[static_cast<size_t>(a)] > margins[static_cast<size_t>(b)];
  });
  best.resize(selected.size());
  std::ranges::sort(best);
  std::ranges::sort(selected);
  std::vector<int32_t> found;
  std::ranges::set_intersection(best, selected, std::back_inserter(found));
  return static_cast<double>(found.size()) / static_cast<double>(selected.size());
}

}  // namespace

SelectionMatch MatchSelection(const SelectionSample& sample) {
  const int32_t group = sample.query_heads / sample.kv_heads;
  const auto tokens = static_cast<int32_t>(sample.keys.size() /
                                           static_cast<size_t>(sample.kv_heads * sample.head_dim));
  KVSWEEP_CHECK_GE(tokens, 1);
  SelectionMatch match;
  for (int32_t kv_head = 0; kv_head < sample.kv_heads; ++kv_head) {
    const std::vector<int32_t>& selected = sample.selected[static_cast<size_t>(kv_head)];
    std::vector<double> margins(static_cast<size_t>(tokens),
                                -std::numeric_limits<double>::infinity());
    for (int32_t member = 0; member < group; ++member) {
      const std::vector<double> scores = Scores(sample, kv_head * group + member, tokens);
      match.covered_mass += Covered(scores, selected) / sample.query_heads;
      // The current token is not among those that are chosen from.
      const double highest = *std::max_element(scores.begin(), scores.end() - 1);
      for (size_t t = 0; t < margins.size(); ++t) {
        margins[t] = std::max(margins[t], scores[t] - highest);
      }
    }
    match.recall += Recall(margins, selected) / sample.kv_heads;
  }
  return match;
}

double Cosine(std::span<const float> a, std::span<const float> b) {
  const auto count = static_cast<int32_t>(a.size());
  const double lengths = Dot(a.data(), a.data(), count) * Dot(b.data(), b.data(), count);
  return lengths > 0 ? Dot(a.data(), b.data(), count) / std::sqrt(lengths) : 0;
}

void LayerMeans::Add(int32_t layer, double value, int64_t count) {
  sum_[static_cast<size_t>(layer)] += value;
  count_[static_cast<size_t>(layer)] += count;
}

void LayerMeans::Clear() {
  std::ranges::fill(sum_, 0.0);
  std::ranges::fill(count_, 0);
}

void LayerMeans::AppendTo(const char* name, std::vector<CacheStrategy::Figure>* figures) const {
  for (size_t layer = 0; layer < sum_.size(); ++layer) {
    if (count_[layer] == 0) continue;
    figures->push_back({.name = name,
                        .layer = static_cast<int32_t>(layer),
                        .value = sum_[layer] / static_cast<double>(count_[layer])});
  }
}

}  // namespace kvsweep
