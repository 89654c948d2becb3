// H2O by its definition, slowly: sets of tokens by position, every softmax in full, in double. One
// sequence, one layer; it knows nothing of slots, tiles, chunks or tiers.
#ifndef KVSWEEP_TESTS_WORKER_STRATEGIES_H2O_ORACLE_H_
#define KVSWEEP_TESTS_WORKER_STRATEGIES_H2O_ORACLE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "tests/worker/strategies/attention_harness.h"
#include "worker/strategies/h2o_manager.h"

namespace kvsweep {

class H2oOracle {
 public:
  struct Entry {
    int32_t position = 0;
    std::vector<double> key;  // before rotation
    std::vector<double> value;
    double score = 0;
  };

  // `full`: the layer keeps everything.
  H2oOracle(const H2o& parameters, const HarnessShape& shape, const std::vector<float>& frequency,
            const H2oBudget& budget, bool full)
      : parameters_(parameters),
        shape_(shape),
        frequency_(frequency),
        budget_(budget),
        full_(full) {
    const bool alone = !full && parameters.group_aggregation() == H2o::GROUP_AGGREGATION_QUERY_HEAD;
    heads_.resize(static_cast<size_t>(alone ? shape.query_heads : shape.kv_heads));
  }

  const std::vector<std::vector<Entry>>& heads() const { return heads_; }
  std::set<int32_t> Positions(size_t head) const {
    std::set<int32_t> positions;
    for (const Entry& entry : heads_[head]) positions.insert(entry.position);
    return positions;
  }

  // Attends with one token to what is kept and itself, adds to the scores, and keeps the token.
  // Returns [Hq * d].
  std::vector<double> Attend(const TokenVectors& token, int32_t position) {
    const auto d = static_cast<size_t>(shape_.head_dim);
    const auto query_heads = static_cast<size_t>(shape_.query_heads);
    const size_t group = query_heads / heads_.size();
    std::vector<double> out(query_heads * d);
    for (size_t h = 0; h < heads_.size(); ++h) {
      std::vector<Entry>& entries = heads_[h];
      const size_t kv_head = h * static_cast<size_t>(shape_.kv_heads) / heads_.size();
      entries.push_back({.position = position,
                         .key = Slice(token.key, kv_head),
                         .value = Slice(token.value, kv_head)});
      std::vector<double> received(entries.size());
      for (size_t q = h * group; q < (h + 1) * group; ++q) {
        const std::vector<double> p = Softmax(entries, Slice(token.query, q));
        for (size_t t = 0; t < entries.size(); ++t) {
          received[t] = parameters_.group_aggregation() == H2o::GROUP_AGGREGATION_MAX
                            ? std::max(received[t], p[t])
                            : received[t] + p[t];
          for (size_t i = 0; i < d; ++i) out[q * d + i] += p[t] * entries[t].value[i];
        }
      }
      for (size_t t = 0; t < entries.size(); ++t) {
        entries[t].score = Decay() * entries[t].score + received[t];
      }
    }
    return out;
  }

  // The end of a prompt, or of a chunk with prefill_evict: chunk.
  void Prune() {
    if (full_) return;
    for (std::vector<Entry>& entries : heads_) {
      while (entries.size() > static_cast<size_t>(budget_.total())) {
        Drop(&entries, entries.size() - static_cast<size_t>(budget_.recent));
      }
    }
  }

  // The end of a decode step.
  void Evict() {
    if (full_) return;
    const auto heavy = static_cast<size_t>(budget_.heavy);
    const auto recent = static_cast<size_t>(budget_.recent);
    for (std::vector<Entry>& entries : heads_) {
      if (entries.size() <= heavy + recent) continue;
      if (parameters_.evict_rule() != H2o::EVICT_RULE_SLOT_PROMOTE) {
        Drop(&entries, entries.size() - recent);
      } else if (Sinks() < heavy) {
        Drop(&entries, heavy);
      } else {
        entries.erase(entries.begin() + static_cast<std::ptrdiff_t>(heavy));
      }
    }
  }

 private:
  double Decay() const {
    if (parameters_.evict_rule() == H2o::EVICT_RULE_CURRENT_ONLY) return 0;
    return parameters_.score_norm() == H2o::SCORE_NORM_DECAYED ? parameters_.score_decay() : 1;
  }
  size_t Sinks() const {
    return std::min<size_t>(parameters_.sink_tokens(), static_cast<size_t>(budget_.heavy));
  }

  std::vector<double> Slice(const std::vector<float>& values, size_t head) const {
    const auto d = static_cast<std::ptrdiff_t>(shape_.head_dim);
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(head) * d;
    return {first, first + d};
  }

  std::vector<double> Turn(std::vector<double> x, int32_t position) const {
    if (!shape_.rotary) return x;
    const size_t half = x.size() / 2;
    for (size_t j = 0; j < half; ++j) {
      // The angle as a model computes it, in f32.
      const double angle = static_cast<float>(position) * frequency_[j];
      const double low = x[j];
      const double high = x[j + half];
      x[j] = low * std::cos(angle) - high * std::sin(angle);
      x[j + half] = high * std::cos(angle) + low * std::sin(angle);
    }
    return x;
  }

  std::vector<double> Softmax(const std::vector<Entry>& entries,
                              const std::vector<double>& query) const {
    const bool rolling = !full_ && parameters_.positions() == H2o::POSITIONS_ROLLING;
    const auto place = [&](size_t t) {
      return rolling ? static_cast<int32_t>(t) : entries[t].position;
    };
    const std::vector<double> turned = Turn(query, place(entries.size() - 1));
    std::vector<double> weights;
    double maximum = -std::numeric_limits<double>::infinity();
    for (size_t t = 0; t < entries.size(); ++t) {
      const std::vector<double> key = Turn(entries[t].key, place(t));
      double dot = 0;
      for (size_t i = 0; i < key.size(); ++i) dot += turned[i] * key[i];
      weights.push_back(dot / std::sqrt(static_cast<double>(shape_.head_dim)));
      maximum = std::max(maximum, weights.back());
    }
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - maximum);
    for (double& weight : weights) weight /= sum;
    return weights;
  }

  // Drops the least of the entries [sinks, end); ties: the later one. With none of them, the first
  // behind.
  void Drop(std::vector<Entry>* entries, size_t end) {
    size_t least = end;
    double least_worth = 0;
    for (size_t t = Sinks(); t < end; ++t) {
      const Entry& entry = (*entries)[t];
      const double seen = entries->back().position + 1 - entry.position;
      const double worth =
          parameters_.score_norm() == H2o::SCORE_NORM_MEAN ? entry.score / seen : entry.score;
      if (least == end || worth <= least_worth) {
        least = t;
        least_worth = worth;
      }
    }
    entries->erase(entries->begin() +
                   static_cast<std::ptrdiff_t>(std::min(least, entries->size() - 1)));
  }

  H2o parameters_;
  HarnessShape shape_;
  std::vector<float> frequency_;
  H2oBudget budget_;
  bool full_;
  std::vector<std::vector<Entry>> heads_;  // by position
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_STRATEGIES_H2O_ORACLE_H_
