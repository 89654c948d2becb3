// What InfiniGen's decode steps select, against a slow reading of the rules: scores, margins,
// counts, the best m, ties; over trained models and over random ones of many shapes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "tests/worker/strategies/infinigen_lab.h"

namespace kvsweep {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Margins of a KV head by the true query and keys, in double.
std::vector<double> TrueMargins(const Observed& observed, int32_t head, int32_t group, int32_t dim,
                                double* bound) {
  const size_t n = observed.margin[head].size();
  std::vector<double> margins(n, -kInfinity);
  for (int32_t q = head * group; q < (head + 1) * group; ++q) {
    std::vector<double> scores(n);
    for (size_t t = 0; t < n; ++t) {
      double size = 0;
      for (int32_t i = 0; i < dim; ++i) {
        const double term = double{observed.query[q * dim + i]} * observed.key[head][t * dim + i];
        scores[t] += term / std::sqrt(dim);
        size += std::abs(term) / std::sqrt(dim);
      }
      *bound = std::max(*bound, size);
    }
    const double highest = *std::ranges::max_element(scores);
    for (size_t t = 0; t < n; ++t) margins[t] = std::max(margins[t], scores[t] - highest);
  }
  return margins;
}

// The rule, from the speculated margins: counts, m, the best m with ties to the lower slot,
// ascending.
void ExpectRule(const Observed& observed, double alpha, bool by_head) {
  const auto heads = static_cast<int64_t>(observed.margin.size());
  const auto n = static_cast<int64_t>(observed.margin[0].size());
  int64_t all = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t above = std::ranges::count_if(
        observed.margin[head], [&](float margin) { return margin > -static_cast<float>(alpha); });
    EXPECT_EQ(observed.count[head], above);
    all += above;
  }
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t wanted = by_head ? observed.count[head] : all / heads;
    const int64_t m = std::max<int64_t>(1, std::min({wanted, int64_t{observed.limit}, n}));
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, std::greater(),
                             [&](int32_t slot) { return observed.margin[head][slot]; });
    order.resize(m);
    std::ranges::sort(order);
    EXPECT_EQ(observed.selected[head], order);
  }
}

// Two invariants, on one model: with ratio 1 and the true input speculated scores are the true
// ones, and what is selected follows the rule.
void CheckModel(const LoadedModel& model, ObservingBackend* backend, const Arm& arm,
                int32_t prompt) {
  Lab lab(backend, &model, arm, LabOptions());
  lab.strategy().UseOracleInput();
  const ModelConfig& config = model.config();
  const int32_t group = config.group_size();
  for (RequestId id = 0; id < 3; ++id) lab.Start(id, prompt + 7 * id, prompt + 40);
  for (int step = 0; step < 4; ++step) lab.Decode({0, 1, 2});
  const std::vector<Observed> seen = backend->Take();
  const auto layers = config.layers - static_cast<int32_t>(arm.infinigen().n_full_layers());
  ASSERT_EQ(seen.size(), static_cast<size_t>(4 * 3 * layers));
  for (const Observed& observed : seen) {
    ExpectRule(observed, arm.infinigen().alpha(), false);
    if (arm.infinigen().partial_weight_ratio() < 1) continue;
    for (int32_t head = 0; head < config.kv_heads; ++head) {
      double bound = 0;
      const std::vector<double> margins =
          TrueMargins(observed, head, group, config.head_dim, &bound);
      // Rounding: of the projection, of A, of the partial keys, and of sums of d products.
      const double tolerance = 1e-5 * (1 + bound) * std::sqrt(config.head_dim);
      for (size_t t = 0; t < margins.size(); ++t) {
        ASSERT_NEAR(observed.margin[head][t], margins[t], tolerance)
            << "layer " << observed.layer << " head " << head << " token " << t;
      }
    }
  }
}

TEST(InfinigenSelectionTest, OracleInputAndAllColumnsGiveTheTrueScores) {
  int32_t prompt = 61;  // odd lengths
  for (const LabShape& shape : LabShapes()) {
    SCOPED_TRACE(testing::Message() << "group " << shape.group << " d " << shape.head_dim);
    ObservingBackend backend({.threads = 2, .batch_invariant = true});
    const auto model = MakeModel(&backend, shape);
    CheckModel(*model, &backend, InfinigenArm({.partial_weight_ratio = 1, .n_full_layers = 1}),
               prompt);
    CheckModel(*model, &backend, InfinigenArm({.partial_weight_ratio = 0.3}), prompt);
    prompt += 14;
  }
}

TEST(InfinigenSelectionTest, SoDoTheBooksModels) {
  for (const char* name : {"books-llama-14m", "books-opt-16m"}) {
    SCOPED_TRACE(name);
    ObservingBackend backend({.threads = 2, .batch_invariant = true});
    const auto model = LoadModel(&backend, name);
    CheckModel(*model, &backend, InfinigenArm({.partial_weight_ratio = 1}), 93);
    CheckModel(*model, &backend, InfinigenArm({.partial_weight_ratio = 0.3}), 93);
  }
}

// Folded weights give the same scores up to their rounding, and their own selection follows the
// rule.
TEST(InfinigenSelectionTest, FoldedWeightsGiveTheTrueScoresToo) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(&backend, "books-opt-16m");
  CheckModel(*model, &backend,
             InfinigenWith({.partial_weight_ratio = 1},
                           [](Infinigen* p) { p->set_skew(Infinigen::SKEW_FOLDED); }),
             93);
}

TEST(InfinigenSelectionTest, AllRotaryPairsGiveTheTrueScores) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(&backend, "books-llama-14m");
  const auto paired = [](Infinigen* p) {
    p->set_rope_speculation(Infinigen::ROPE_SPECULATION_PAIRED);
  };
  CheckModel(*model, &backend, InfinigenWith({.partial_weight_ratio = 1}, paired), 93);
  CheckModel(*model, &backend, InfinigenWith({.partial_weight_ratio = 0.3}, paired), 93);
}

TEST(InfinigenSelectionTest, AllRequestColumnsGiveTheTrueScores) {
  for (const char* name : {"books-llama-14m", "books-opt-16m"}) {
    ObservingBackend backend({.threads = 2, .batch_invariant = true});
    const auto model = LoadModel(&backend, name);
    Arm arm = InfinigenWith({.partial_weight_ratio = 1}, [](Infinigen* p) {
      p->set_columns(Infinigen::COLUMNS_REQUEST);
      p->set_prefill_history(Infinigen::PREFILL_HISTORY_WHOLE);
    });
    EngineOptions options = LabOptions();
    options.max_batched_tokens = options.max_context;
    Lab lab(&backend, model.get(), arm, options);
    lab.strategy().UseOracleInput();
    lab.Start(0, 93, 120);
    for (int step = 0; step < 3; ++step) lab.Decode({0});
    for (const Observed& observed : backend.Take()) {
      ExpectRule(observed, 4, false);
      for (int32_t head = 0; head < model->config().kv_heads; ++head) {
        double bound = 0;
        const std::vector<double> margins = TrueMargins(
            observed, head, model->config().group_size(), model->config().head_dim, &bound);
        for (size_t t = 0; t < margins.size(); ++t) {
          ASSERT_NEAR(observed.margin[head][t], margins[t], 1e-4 * (1 + bound));
        }
      }
    }
  }
}

// Invariant: alpha just above 0 leaves each query its own best, so one entry for each head without
// groups, at most g with them; and exactly 0 leaves one.
TEST(InfinigenSelectionTest, AlphaNearZeroLeavesEachQueryItsBest) {
  for (const LabShape& shape : LabShapes()) {
    ObservingBackend backend({.threads = 2, .batch_invariant = true});
    const auto model = MakeModel(&backend, shape);
    for (const double alpha : {1e-7, 0.0}) {
      Lab lab(&backend, model.get(), InfinigenArm({.alpha = alpha, .max_kv_ratio = 1}),
              LabOptions());
      lab.Start(0, 77, 100);
      for (int step = 0; step < 3; ++step) lab.Decode({0});
      for (const Observed& observed : backend.Take()) {
        ExpectRule(observed, alpha, false);
        for (const std::vector<int32_t>& selected : observed.selected) {
          EXPECT_GE(selected.size(), 1u);
          EXPECT_LE(selected.size(), alpha > 0 ? static_cast<size_t>(shape.group) : 1u);
        }
      }
    }
  }
}

// count_scope: head gives each head its own number, batch one number to all.
TEST(InfinigenSelectionTest, CountScopesAreWhatTheirNamesSay) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(&backend, "books-opt-16m");
  for (const auto scope : {Infinigen::COUNT_SCOPE_HEAD, Infinigen::COUNT_SCOPE_BATCH}) {
    const Arm arm =
        InfinigenWith({.max_kv_ratio = 0.5}, [&](Infinigen* p) { p->set_count_scope(scope); });
    Lab lab(&backend, model.get(), arm, LabOptions());
    for (RequestId id = 0; id < 3; ++id) lab.Start(id, 60 + 30 * id, 160);
    lab.Decode({0, 1, 2});
    bool heads_differ = false;
    std::map<int32_t, std::vector<Observed>> layers;
    for (Observed& observed : backend.Take()) layers[observed.layer].push_back(observed);
    for (const auto& [layer, rows] : layers) {
      int64_t all = 0;
      for (const Observed& row : rows) {
        if (scope == Infinigen::COUNT_SCOPE_HEAD) ExpectRule(row, 4, true);
        all += std::accumulate(row.count.begin(), row.count.end(), int64_t{0});
        for (const auto& selected : row.selected) {
          heads_differ |= selected.size() != row.selected[0].size();
        }
      }
      if (scope == Infinigen::COUNT_SCOPE_HEAD) continue;
      const int64_t mean = all / static_cast<int64_t>(rows.size() * rows[0].count.size());
      for (const Observed& row : rows) {
        const auto n = static_cast<int64_t>(row.margin[0].size());
        for (const auto& selected : row.selected) {
          EXPECT_EQ(selected.size(), std::max<int64_t>(1, std::min({mean, int64_t{row.limit}, n})));
        }
      }
    }
    EXPECT_EQ(heads_differ, scope == Infinigen::COUNT_SCOPE_HEAD);
  }
}

TEST(InfinigenSelectionTest, AForcedRatioOverrulesTheCounts) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = MakeModel(&backend, {.group = 2});
  const Arm arm = InfinigenWith({.alpha = kInfinity, .max_kv_ratio = 0.01},
                                [](Infinigen* p) { p->set_force_fetch_ratio(0.25); });
  Lab lab(&backend, model.get(), arm, LabOptions());
  lab.Start(0, 101, 130);
  for (int32_t step = 0; step < 5; ++step) {
    lab.Decode({0});
    for (const Observed& observed : backend.Take()) {
      for (const auto& selected : observed.selected) {
        EXPECT_EQ(static_cast<int32_t>(selected.size()), (101 + step) / 4);
      }
    }
  }
}

// ------------------------------------------------------------------------------- bounded pools

// A slow pool without counts: full, the highest position of the older half leaves (fifo: the
// oldest). The closed form must name the same slots.
TEST(InfinigenPoolTest, PlannedSlotsAreTheRulesWithoutCounts) {
  for (const auto policy : {Infinigen::EVICTION_POLICY_COUNTER, Infinigen::EVICTION_POLICY_FIFO}) {
    for (int32_t limit = 4; limit < 90; limit += 5) {
      InfinigenLayout layout;
      layout.parameters = InfinigenArm({}).infinigen();
      layout.parameters.set_capacity(0.6);
      layout.parameters.set_eviction_policy(policy);
      const RequestShape shape{limit / 2, limit - limit / 2};
      const int32_t capacity = InfinigenCapacity(layout.parameters, shape);
      EXPECT_LE(capacity, std::ceil(0.6 * limit));
      std::vector<int32_t> pool;  // position by slot
      for (int32_t position = 0; position < 3 * limit; ++position) {
        int32_t slot = position;
        if (position >= capacity) {
          std::vector<int32_t> order(pool);
          std::ranges::sort(order);
          const bool fifo = policy == Infinigen::EVICTION_POLICY_FIFO;
          const int32_t victim = fifo ? order[0] : order[capacity - capacity / 2 - 1];
          slot = static_cast<int32_t>(std::ranges::find(pool, victim) - pool.begin());
        } else {
          pool.push_back(-1);
        }
        ASSERT_EQ(layout.PlannedSlot(position, shape), slot) << "position " << position;
        pool[slot] = position;
      }
    }
  }
}

// Invariant: a capacity of 1 evicts nothing; a smaller one bounds the slots of each head at all
// times; fifo keeps nothing older than the capacity; what is in the slots is what was put there.
TEST(InfinigenPoolTest, NeverHoldsMoreThanItsCapacity) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(&backend, "books-opt-16m");
  for (const auto policy : {Infinigen::EVICTION_POLICY_COUNTER, Infinigen::EVICTION_POLICY_FIFO,
                            Infinigen::EVICTION_POLICY_LRU}) {
    for (const double ratio : {0.4, 0.9, 1.0}) {
      SCOPED_TRACE(testing::Message() << "policy " << policy << " capacity " << ratio);
      const Arm arm = InfinigenWith({.max_kv_ratio = 0.3}, [&](Infinigen* p) {
        p->set_capacity(ratio);
        p->set_eviction_policy(policy);
      });
      Lab lab(&backend, model.get(), arm, LabOptions());
      const int32_t limit = 150;
      const int32_t capacity = InfinigenCapacity(arm.infinigen(), {75, 75});
      lab.Start(0, 75, limit);  // longer than the smaller capacity
      std::vector<std::vector<int32_t>> before;
      int32_t evicted = 0;
      for (int32_t position = 75; position < limit - 1; ++position) {
        lab.Decode({0});
        evicted += lab.counts[0].evicted;
        for (const Observed& observed : backend.Take()) {
          const auto n = static_cast<int32_t>(observed.margin[0].size());
          ASSERT_EQ(n, std::min(position, capacity));
          ASSERT_TRUE(ratio >= 1 || n <= std::ceil(ratio * limit));
          for (const std::vector<int32_t>& slots : observed.positions) {
            if (ratio >= 1) continue;
            std::vector<int32_t> sorted(slots);
            std::ranges::sort(sorted);
            ASSERT_EQ(std::ranges::adjacent_find(sorted), sorted.end()) << "held twice";
            ASSERT_EQ(sorted.back(), position - 1);
            if (policy == Infinigen::EVICTION_POLICY_FIFO) {
              ASSERT_GE(sorted.front(), position - capacity);
            } else {
              // The newer half of what was held is never the victim.
              for (int32_t p = position - capacity / 2; p < position; ++p) {
                ASSERT_TRUE(std::ranges::binary_search(sorted, p)) << p;
              }
            }
          }
        }
      }
      EXPECT_EQ(evicted, ratio < 1 ? limit - 1 - std::max(75, capacity) : 0);
      EXPECT_EQ(lab.strategy().PromptEvictions({75, 75}, 75), std::max(0, 75 - capacity));
    }
  }
}

// With counts, heads disagree about who leaves, and what is fetched often stays.
TEST(InfinigenPoolTest, CountsDecideByHead) {
  ObservingBackend backend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(&backend, "books-opt-16m");
  const Arm arm = InfinigenWith({.max_kv_ratio = 0.3}, [&](Infinigen* p) { p->set_capacity(0.5); });
  Lab lab(&backend, model.get(), arm, LabOptions());
  lab.Start(0, 60, 160);
  bool differ = false;
  for (int step = 0; step < 90; ++step) {
    lab.Decode({0});
    for (const Observed& observed : backend.Take()) {
      for (const auto& positions : observed.positions) differ |= positions != observed.positions[0];
    }
  }
  EXPECT_TRUE(differ);
}

}  // namespace
}  // namespace kvsweep
