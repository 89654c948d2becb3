// H2O against its definition (h2o_oracle.h), for every rule, norm, position policy and tier, over
// shapes of all head groups; and its invariants, each by name.
#include "worker/strategies/h2o.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/worker/engine/engine_fixture.h"
#include "tests/worker/strategies/attention_harness.h"
#include "tests/worker/strategies/h2o_oracle.h"
#include "worker/strategies/paged.h"

namespace kvsweep {
namespace {

using testing::Each;
using testing::HasSubstr;

struct Variant {
  std::string name;
  std::function<void(H2o*)> set;
};

Arm ArmOf(uint32_t heavy, uint32_t recent, const std::function<void(H2o*)>& set = {}) {
  Arm arm;
  arm.set_strategy("h2o");
  H2o* h2o = arm.mutable_h2o();
  h2o->set_heavy_size(heavy);
  h2o->set_recent_size(recent);
  h2o->set_preemption(H2o::PREEMPTION_NONE);
  if (set) set(h2o);
  return arm;
}

// Every value of every parameter, and the pairs that touch each other.
std::vector<Variant> Variants() {
  const auto promote = [](H2o* h) { h->set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE); };
  const auto rolling = [](H2o* h) { h->set_positions(H2o::POSITIONS_ROLLING); };
  const auto host = [](H2o* h) { h->set_tier(H2o::TIER_HOST); };
  const auto chunk = [](H2o* h) { h->set_prefill_evict(H2o::PREFILL_EVICT_CHUNK); };
  const auto query_head = [](H2o* h) {
    h->set_group_aggregation(H2o::GROUP_AGGREGATION_QUERY_HEAD);
  };
  return {
      {"window_compare", [](H2o*) {}},
      {"slot_promote", promote},
      {"current_only", [](H2o* h) { h->set_evict_rule(H2o::EVICT_RULE_CURRENT_ONLY); }},
      {"tova",
       [](H2o* h) {
         h->set_evict_rule(H2o::EVICT_RULE_CURRENT_ONLY);
         h->set_heavy_size(14);
         h->set_recent_size(0);
       }},
      {"window",
       [](H2o* h) {
         h->set_heavy_size(0);
         h->set_recent_size(14);
       }},
      {"heavy_alone",
       [](H2o* h) {
         h->set_heavy_size(14);
         h->set_recent_size(0);
       }},
      {"sinks", [](H2o* h) { h->set_sink_tokens(4); }},
      {"sinks_alone_and_a_window",
       [](H2o* h) {
         h->set_heavy_size(0);
         h->set_recent_size(14);
         h->set_sink_tokens(4);
       }},
      {"slot_promote_sinks",
       [&](H2o* h) {
         promote(h);
         h->set_sink_tokens(3);
       }},
      {"mean", [](H2o* h) { h->set_score_norm(H2o::SCORE_NORM_MEAN); }},
      {"decayed",
       [](H2o* h) {
         h->set_score_norm(H2o::SCORE_NORM_DECAYED);
         h->set_score_decay(0.9);
       }},
      {"max", [](H2o* h) { h->set_group_aggregation(H2o::GROUP_AGGREGATION_MAX); }},
      {"query_head", query_head},
      {"rolling", rolling},
      {"rolling_promote_query_head",
       [&](H2o* h) {
         rolling(h);
         promote(h);
         query_head(h);
       }},
      {"host", host},
      {"host_promote",
       [&](H2o* h) {
         host(h);
         promote(h);
       }},
      {"host_rolling_query_head",
       [&](H2o* h) {
         host(h);
         rolling(h);
         query_head(h);
       }},
      {"chunk", chunk},
      {"chunk_mean_rolling",
       [&](H2o* h) {
         chunk(h);
         rolling(h);
         h->set_score_norm(H2o::SCORE_NORM_MEAN);
       }},
      {"chunk_host_decayed",
       [&](H2o* h) {
         chunk(h);
         host(h);
         h->set_score_norm(H2o::SCORE_NORM_DECAYED);
         h->set_score_decay(0.95);
       }},
      {"full_layers", [](H2o* h) { h->set_full_layers(1); }},
      {"full_layers_rolling",
       [&](H2o* h) {
         h->set_full_layers(1);
         rolling(h);
       }},
      {"grows", [](H2o* h) { h->set_preemption(H2o::PREEMPTION_RECOMPUTE); }},
  };
}

// Largest difference of two rows, in proportion to the size of values.
double Difference(const std::vector<float>& row, const std::vector<double>& expected) {
  double largest = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    largest = std::max(largest, std::abs(row[i] - expected[i]));
  }
  return largest;
}

// f32 attention over some hundred keys of these sizes.
constexpr double kTolerance = 1e-4;

struct Sequence {
  RequestId id = 0;
  RequestShape shape;
  int32_t tokens = 0;              // so far
  std::vector<H2oOracle> oracles;  // by layer
  // By layer and head: what was kept after the last step.
  std::vector<std::vector<std::set<int32_t>>> kept;
};

class OracleRun {
 public:
  OracleRun(const HarnessShape& shape, const Arm& arm, const HarnessSizes& sizes = {})
      : shape_(shape), arm_(arm), harness_(shape, arm, sizes) {
    KVSWEEP_CHECK_OK(harness_.status());
    for (int32_t l = 0; l < shape.layers; ++l)
      is_full_.push_back(l < static_cast<int32_t>(arm.h2o().full_layers()));
  }
  AttentionHarness& harness() { return harness_; }

  Sequence& Add(RequestId id, const RequestShape& request, int32_t chunk) {
    Sequence& sequence = sequences_.emplace_back();
    sequence.id = id;
    sequence.shape = request;
    sequence.tokens = request.prompt_tokens;
    const H2oBudget budget = H2oBudgetOf(arm_.h2o(), request);
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      sequence.oracles.emplace_back(arm_.h2o(), shape_, harness_.frequency(), budget,
                                    is_full_[static_cast<size_t>(layer)]);
    }
    sequence.kept.resize(static_cast<size_t>(shape_.layers));
    harness_.prompt_outputs.clear();
    harness_.Prefill(id, request, chunk);
    CheckPrompt(sequence, chunk);
    size_t pruned = 0;
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      if (is_full_[static_cast<size_t>(layer)]) continue;
      const PruneHeavyArgs& args = harness_.backend().prune.at(pruned++);
      CheckKept(&sequence, layer, args.score, args.position, args.table_row, args.kv_heads);
    }
    return sequence;
  }

  // One decode step of all sequences, with a padded row behind them.
  void Decode() {
    std::vector<Segment> segments;
    for (Sequence& sequence : sequences_) {
      segments.push_back(harness_.DecodeToken(sequence.id, sequence.tokens));
      ASSERT_TRUE(harness_.manager().Grow(sequence.id, sequence.tokens + 1));
    }
    harness_.manager().CheckInvariants();
    const auto outputs = harness_.Step(segments, {}, 1);
    for (size_t row = 0; row < sequences_.size(); ++row) {
      Sequence& sequence = sequences_[row];
      size_t evictions = 0;
      for (int32_t layer = 0; layer < shape_.layers; ++layer) {
        H2oOracle& oracle = sequence.oracles[static_cast<size_t>(layer)];
        const std::vector<double> expected = oracle.Attend(
            InventToken(shape_, static_cast<uint64_t>(sequence.id), sequence.tokens, layer),
            sequence.tokens);
        oracle.Evict();
        ASSERT_LT(Difference(outputs[static_cast<size_t>(layer)][row], expected), kTolerance)
            << "token " << sequence.tokens << " layer " << layer << " row " << row;
        if (is_full_[static_cast<size_t>(layer)]) continue;
        const EvictHeavyArgs& args = harness_.backend().evict.at(evictions++);
        CheckKept(&sequence, layer, args.score, args.slot_position, static_cast<int64_t>(row),
                  args.kv_heads);
      }
      ++sequence.tokens;
    }
  }

  std::vector<Sequence>& sequences() { return sequences_; }

 private:
  void CheckPrompt(Sequence& sequence, int32_t chunk) {
    for (int32_t position = 0; position < sequence.shape.prompt_tokens; ++position) {
      const bool ends = position + 1 == sequence.shape.prompt_tokens;
      for (int32_t layer = 0; layer < shape_.layers; ++layer) {
        H2oOracle& oracle = sequence.oracles[static_cast<size_t>(layer)];
        const std::vector<double> expected = oracle.Attend(
            InventToken(shape_, static_cast<uint64_t>(sequence.id), position, layer), position);
        const auto& outputs = harness_.prompt_outputs.at(static_cast<size_t>(position / chunk));
        ASSERT_LT(
            Difference(outputs[static_cast<size_t>(layer)][static_cast<size_t>(position % chunk)],
                       expected),
            kTolerance)
            << "prompt token " << position << " layer " << layer;
        const bool chunk_ends = (position + 1) % chunk == 0;
        if (ends || (chunk_ends && arm_.h2o().prefill_evict() == H2o::PREFILL_EVICT_CHUNK)) {
          oracle.Prune();
        }
      }
    }
  }

  // The cache holds the oracle's tokens with its scores, C at most, and nothing comes back.
  void CheckKept(Sequence* sequence, int32_t layer, const SlotView& score, const SlotView& position,
                 int64_t row, int32_t heads) {
    const H2oOracle& oracle = sequence->oracles[static_cast<size_t>(layer)];
    auto& kept = sequence->kept[static_cast<size_t>(layer)];
    const bool first = kept.empty();
    kept.resize(static_cast<size_t>(heads));
    ASSERT_EQ(static_cast<size_t>(heads), oracle.heads().size());
    for (int32_t head = 0; head < heads; ++head) {
      const auto& entries = oracle.heads()[static_cast<size_t>(head)];
      const HeldSlots held =
          ReadSlots(score, position, row, head, static_cast<int64_t>(entries.size()));
      std::set<int32_t> positions;
      for (const auto& [at, value] : held.score) positions.insert(at);
      ASSERT_EQ(positions, oracle.Positions(static_cast<size_t>(head)))
          << "layer " << layer << " head " << head << " after " << entries.back().position;
      for (const H2oOracle::Entry& entry : entries) {
        ASSERT_NEAR(held.score.at(entry.position), entry.score, kTolerance * (1 + entry.score));
      }
      std::set<int32_t>& before = kept[static_cast<size_t>(head)];
      if (!first) CheckChange(before, positions);
      before = positions;
    }
  }

  // Invariant 6 of H2O: at most one token leaves in a step, only the new one comes.
  static void CheckChange(const std::set<int32_t>& before, const std::set<int32_t>& after) {
    std::vector<int32_t> left;
    std::vector<int32_t> came;
    std::ranges::set_difference(before, after, std::back_inserter(left));
    std::ranges::set_difference(after, before, std::back_inserter(came));
    ASSERT_LE(left.size(), 1u);
    ASSERT_LE(came.size(), 1u);
    if (!came.empty()) {
      ASSERT_GT(came[0], *before.rbegin());
    }
  }

  HarnessShape shape_;
  Arm arm_;
  AttentionHarness harness_;
  std::vector<bool> is_full_;
  std::vector<Sequence> sequences_;
};

const std::vector<HarnessShape> kShapes = {
    {.layers = 2, .query_heads = 2, .kv_heads = 2, .head_dim = 8},
    {.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64},
    {.layers = 2, .query_heads = 3, .kv_heads = 1, .head_dim = 8},
    {.layers = 3, .query_heads = 8, .kv_heads = 2, .head_dim = 8},
    {.layers = 2, .query_heads = 7, .kv_heads = 1, .head_dim = 128},
};

class H2oVariantTest : public testing::TestWithParam<Variant> {};

// Every variant is its definition: what each row attends to, which tokens stay, with which scores.
TEST_P(H2oVariantTest, IsItsDefinition) {
  for (const HarnessShape& shape : kShapes) {
    SCOPED_TRACE(
        absl::StrCat("heads ", shape.query_heads, "/", shape.kv_heads, " of ", shape.head_dim));
    OracleRun run(shape, ArmOf(7, 7, GetParam().set), {.max_context = 128, .max_rows = 128});
    const bool chunked = run.harness().strategy().chunk_alignment() == 1;
    run.Add(0, {61, 40}, chunked ? 17 : 128);
    run.Add(1, {9, 40}, 128);  // shorter than the budget: grows until it is full
    run.Add(2, {1, 40}, 128);
    for (int step = 0; step < 23; ++step) {
      SCOPED_TRACE(absl::StrCat("step ", step));
      run.Decode();
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, H2oVariantTest, testing::ValuesIn(Variants()),
                         [](const auto& info) { return info.param.name; });

// Without rotary positions too, and over prompts of several tiles of the column sums.
TEST(H2oOracleTest, LongPromptsInChunksOfLearnedPositions) {
  const HarnessShape shape{
      .layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8, .rotary = false};
  OracleRun run(shape, ArmOf(20, 13), {.max_context = 512});
  run.Add(0, {301, 20}, 128);
  for (int step = 0; step < 10; ++step) run.Decode();
}

// ------------------------------------------------------------------------------------------------
// invariants

TEST(H2oInvariantTest, AnAmpleBudgetIsTheFullCacheAndEvictsNothing) {
  for (const char* name : {"books-llama-14m", "books-opt-16m"}) {
    const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
    const auto model = LoadModel(backend.get(), name);
    Random random(3);
    const std::vector<TestRequest> requests = {
        {.prompt = RandomIds(random, 60, 4096), .output_tokens = 6},
        {.prompt = RandomIds(random, 23, 4096), .output_tokens = 9}};
    const absl::StatusOr<TestRun> full =
        RunRequests(backend.get(), *model, PagedArm(), SmallEngine(128), requests, {});
    ASSERT_TRUE(full.ok()) << full.status();
    for (const Variant& variant : Variants()) {
      Arm arm = ArmOf(64, 64, variant.set);
      if (arm.h2o().heavy_size() != 64) continue;  // variants of the split
      if (arm.h2o().positions() == H2o::POSITIONS_ROLLING && model->shape().rotary == false)
        continue;
      const absl::StatusOr<TestRun> run =
          RunRequests(backend.get(), *model, arm, SmallEngine(128), requests, {});
      ASSERT_TRUE(run.ok()) << run.status();
      EXPECT_EQ(run->outputs, full->outputs) << name << " " << variant.name;
      EXPECT_EQ(run->attended, full->attended) << name << " " << variant.name;
    }
  }
}

// window_compare keeps the last C_r positions; slot_promote's last hh, the current one included,
// and as long a suffix as the authors say: hh + 1 attended.
TEST(H2oInvariantTest, TheRecentSuffixIsAlwaysThere) {
  for (const bool promote : {false, true}) {
    const Arm arm = ArmOf(6, 6, [&](H2o* h) {
      if (promote) h->set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
    });
    OracleRun run({.layers = 1}, arm, {.max_context = 128, .max_rows = 128});
    Sequence& sequence = run.Add(0, {50, 60}, 128);
    EXPECT_EQ(H2oBudgetOf(arm.h2o(), sequence.shape).total(), promote ? 11 : 12);
    for (int step = 0; step < 40; ++step) {
      // hh + 1 attended: the token that the last step promoted is still there.
      const int32_t suffix = promote && step > 0 ? 6 : promote ? 5 : 6;
      for (const std::set<int32_t>& kept : sequence.kept[0]) {
        for (int32_t back = 1; back <= suffix; ++back) {
          ASSERT_TRUE(kept.contains(sequence.tokens - back)) << "step " << step << " back " << back;
        }
      }
      run.Decode();
    }
  }
}

TEST(H2oInvariantTest, WithoutHeavyHittersItIsASlidingWindow) {
  OracleRun run({.layers = 2}, ArmOf(0, 9), {.max_context = 128, .max_rows = 128});
  Sequence& sequence = run.Add(0, {40, 60}, 128);
  for (int step = 0; step < 30; ++step) {
    for (const auto& layer : sequence.kept) {
      for (const std::set<int32_t>& kept : layer) {
        EXPECT_EQ(kept.size(), 9u);
        EXPECT_EQ(*kept.begin(), sequence.tokens - 9);
      }
    }
    run.Decode();
  }
}

// TOVA (Oren et al. 2024): of all tokens, the new one included, the one to which the last query
// attends least leaves.
TEST(H2oInvariantTest, CurrentScoresWithoutAWindowAreTova) {
  const Arm arm = ArmOf(10, 0, [](H2o* h) { h->set_evict_rule(H2o::EVICT_RULE_CURRENT_ONLY); });
  AttentionHarness harness({.layers = 1, .query_heads = 2, .kv_heads = 2}, arm,
                           {.max_context = 128, .max_rows = 128});
  harness.Prefill(0, {30, 60}, 128);
  std::vector<std::vector<std::pair<float, int32_t>>> before(2);  // (probability, position) by head
  harness.backend().before_evict = [&](const EvictHeavyArgs& args) {
    const HeldSlots unused = ReadSlots(args.score, args.slot_position, 0, 0, 10);
    for (int32_t head = 0; head < 2; ++head) {
      before[static_cast<size_t>(head)].clear();
      const HeldSlots held = ReadSlots(args.score, args.slot_position, 0, head, 10);
      for (int32_t slot = 0; slot <= 10; ++slot) {
        before[static_cast<size_t>(head)].emplace_back(
            args.probability[head * args.probability_stride + slot],
            slot < 10 ? held.position[static_cast<size_t>(slot)] : args.position[0]);
      }
    }
  };
  for (int32_t token = 30; token < 60; ++token) {
    ASSERT_TRUE(harness.manager().Grow(0, token + 1));
    harness.Step({harness.DecodeToken(0, token)}, {});
    const EvictHeavyArgs& args = harness.backend().evict.at(0);
    for (int32_t head = 0; head < 2; ++head) {
      auto& entries = before[static_cast<size_t>(head)];
      const int32_t gone = std::ranges::min(entries).second;
      const HeldSlots held = ReadSlots(args.score, args.slot_position, 0, head, 10);
      std::set<int32_t> expected;
      for (const auto& [probability, position] : entries) {
        if (position != gone) expected.insert(position);
      }
      EXPECT_EQ(std::set<int32_t>(held.position.begin(), held.position.end()), expected);
    }
  }
}

// The p added in a step sum to 1 for each query head; a prompt of P rows gives away P.
TEST(H2oInvariantTest, EveryRowGivesAwayOne) {
  for (const bool host : {false, true}) {
    const HarnessShape shape{.layers = 2, .query_heads = 6, .kv_heads = 2};
    const Arm arm =
        ArmOf(8, 8, [&](H2o* h) { h->set_tier(host ? H2o::TIER_HOST : H2o::TIER_DEVICE); });
    AttentionHarness harness(shape, arm, {.max_context = 512});
    int prunes = 0;
    harness.backend().before_prune = [&](const PruneHeavyArgs& args) {
      ++prunes;
      for (int32_t head = 0; head < 2; ++head) {
        double sum = 0;
        for (int32_t t = 0; t < args.tokens; ++t) {
          sum += static_cast<const float*>(
              args.score.data)[cpu::SlotOffset(args.score, args.table_row, t, head)];
        }
        EXPECT_NEAR(sum, 3.0 * 201, 1e-3) << "three query heads of 201 rows";
      }
    };
    int evictions = 0;
    harness.backend().before_evict = [&](const EvictHeavyArgs& args) {
      ++evictions;
      const int32_t stored = args.view.length[0];
      for (int32_t head = 0; head < 6; ++head) {
        double sum = 0;
        for (int32_t slot = 0; slot <= stored; ++slot) {
          sum += args.probability[head * args.probability_stride + slot];
        }
        EXPECT_NEAR(sum, 1, 1e-5);
      }
    };
    harness.Prefill(0, {201, 30}, 128);
    for (int32_t token = 201; token < 215; ++token) {
      ASSERT_TRUE(harness.manager().Grow(0, token + 1));
      harness.Step({harness.DecodeToken(0, token)}, {}, 1);
    }
    EXPECT_EQ(prunes, 2);
    EXPECT_EQ(evictions, 28);
  }
}

// A request's kept sets do not depend on its batch mates, nor on who holds which pages.
TEST(H2oInvariantTest, BatchMatesDoNotChangeKeptSets) {
  const HarnessShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2};
  const Arm arm = ArmOf(6, 7);
  const auto kept = [&](std::vector<RequestId> ids) {
    OracleRun run(shape, arm, {.max_context = 128, .max_rows = 128});
    for (const RequestId id : ids) run.Add(id, {40 + 3 * id, 40}, 128);
    for (int step = 0; step < 20; ++step) run.Decode();
    std::map<RequestId, std::vector<std::vector<std::set<int32_t>>>> result;
    for (const Sequence& sequence : run.sequences()) result[sequence.id] = sequence.kept;
    return result;
  };
  auto together = kept({2, 0, 1});
  for (const RequestId id : {0, 1, 2}) EXPECT_EQ(kept({id})[id], together[id]);
}

// prefill_evict: end: borders of chunks change no kept set, and on the device no bit of the scores.
TEST(H2oInvariantTest, ChunksChangeNoBit) {
  for (const bool host : {false, true}) {
    for (const double decay : {1.0, 0.97}) {
      const HarnessShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2};
      const Arm arm = ArmOf(16, 16, [&](H2o* h) {
        h->set_tier(host ? H2o::TIER_HOST : H2o::TIER_DEVICE);
        if (decay == 1.0) return;
        h->set_score_norm(H2o::SCORE_NORM_DECAYED);
        h->set_score_decay(decay);
      });
      std::vector<std::vector<HeldSlots>> runs;
      for (const int32_t chunk : {128, 256, 384, 512}) {
        AttentionHarness harness(shape, arm, {.max_context = 512});
        harness.Prefill(0, {499, 10}, chunk);
        std::vector<HeldSlots> held;
        for (const PruneHeavyArgs& args : harness.backend().prune) {
          for (int32_t head = 0; head < args.kv_heads; ++head) {
            held.push_back(ReadSlots(args.score, args.position, args.table_row, head, 32));
          }
        }
        ASSERT_EQ(held.size(), 4u);
        runs.push_back(std::move(held));
      }
      for (const auto& run : runs) {
        for (size_t i = 0; i < run.size(); ++i) {
          EXPECT_EQ(run[i].position, runs[0][i].position);
          if (!host) {
            EXPECT_EQ(run[i].score, runs[0][i].score);
            continue;
          }
          // What comes from the host is another part of the softmax than the chunk itself: where
          // they are joined shows in the last bits, not in what is kept.
          for (const auto& [position, score] : run[i].score) {
            EXPECT_NEAR(score, runs[0][i].score.at(position), 1e-4 * score);
          }
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------
// memory

// Device and host bytes of every variant are the layout's, to the byte.
TEST(H2oMemoryTest, TheArenasAreTheLayouts) {
  for (Variant variant : Variants()) {
    for (const bool swap : {false, true}) {
      const Arm arm = ArmOf(7, 7, [&](H2o* h) {
        variant.set(h);
        if (swap) h->set_preemption(H2o::PREEMPTION_SWAP);
      });
      if (swap && arm.h2o().tier() == H2o::TIER_HOST) continue;
      for (const HarnessShape& shape : kShapes) {
        AttentionHarness harness(shape, arm,
                                 {.max_context = 200,
                                  .max_rows = 130,
                                  .device_bytes = 20'000'000,
                                  .host_bytes = 1'500'000});
        ASSERT_TRUE(harness.status().ok()) << variant.name << ": " << harness.status();
        const absl::StatusOr<H2oLayout> layout = H2oLayoutOf(arm.h2o(), harness.sizes());
        ASSERT_TRUE(layout.ok());
        const auto pages = static_cast<uint64_t>(layout->pages);
        EXPECT_EQ(harness.allocated().device, layout->fixed_bytes + pages * layout->page_bytes())
            << variant.name;
        EXPECT_EQ(harness.allocated().host,
                  pages * layout->host_page_bytes() +
                      static_cast<uint64_t>(layout->swap_pages) * layout->page_bytes())
            << variant.name;
        EXPECT_LE(harness.allocated().device, harness.sizes().device_bytes);
        EXPECT_LE(harness.allocated().host, harness.sizes().host_bytes);
        // A slot is its keys, values, score and position (and rank), nothing else.
        const bool rolling = arm.h2o().positions() == H2o::POSITIONS_ROLLING;
        const auto entries = static_cast<uint64_t>(
            layout->heads * (shape.layers - static_cast<int32_t>(arm.h2o().full_layers())));
        EXPECT_EQ(layout->slot_bytes + layout->host_slot_bytes,
                  entries * static_cast<uint64_t>(2 * shape.head_dim * 4 + (rolling ? 12 : 8)));
      }
    }
  }
}

// Constant in the output once full, and what the formula says; the prompt's peak is reserved at
// admission: of a chunked prompt the slab and a chunk.
TEST(H2oMemoryTest, BytesAreConstantInTheOutputAndThePeakIsReserved) {
  for (const bool chunked : {false, true}) {
    const Arm arm = ArmOf(16, 16, [&](H2o* h) {
      if (chunked) h->set_prefill_evict(H2o::PREFILL_EVICT_CHUNK);
    });
    AttentionHarness harness({.layers = 2}, arm, {.max_context = 512, .max_rows = 64});
    const uint64_t page = 16 * 2 * 2 * (2 * 8 * 4 + 8);
    const RequestShape shape{300, 200};
    KvManager& manager = harness.manager();
    ASSERT_TRUE(manager.Admit(0, shape, 64));
    EXPECT_EQ(manager.RequestBytes(0).device, (chunked ? 6 : 19) * page);
    EXPECT_EQ(manager.RequestBytes(0), manager.PeakBytes(shape));
    for (int32_t tokens = 128; tokens < 300; tokens += 64) ASSERT_TRUE(manager.Grow(0, tokens));
    ASSERT_TRUE(manager.Grow(0, 300));
    manager.EndPrompt(0);
    for (int32_t tokens = 301; tokens < 500; ++tokens) {
      ASSERT_TRUE(manager.Grow(0, tokens));
      EXPECT_EQ(manager.RequestBytes(0).device, 2 * page);
      EXPECT_EQ(manager.LiveBytes().device, manager.FixedBytes().device + 2 * page);
    }
  }
}

// The authors' logs on an A100: memory of the full cache less that with H2O at 20 % (--hh-ratio 0.2
// of the prompt). Their slots are C + 1; ours are pages of 16 with scores and positions beside.
TEST(H2oMemoryTest, SavesWhatTheAuthorsLogsShow) {
  struct Log {
    int32_t layers, heads, batch, prompt, output;
    double saved_gib;
  };
  for (const Log& log : {Log{32, 32, 24, 2048, 2048, 74.764 - 36.392},
                         Log{40, 40, 4, 5000, 5000, 70.919 - 46.511}}) {
    Arm arm;
    H2o& h2o = *arm.mutable_h2o();
    h2o.set_heavy_ratio(0.2);
    h2o.set_recent_ratio(0.2);
    h2o.set_budget_base(BUDGET_BASE_PROMPT);
    h2o.set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
    h2o.set_preemption(H2o::PREEMPTION_NONE);
    StrategySizes sizes;
    sizes.shape = {.layers = log.layers,
                   .hidden_size = log.heads * 128,
                   .query_heads = log.heads,
                   .kv_heads = log.heads,
                   .head_dim = 128,
                   .max_positions = 10000};
    sizes.kv_dtype = DType::kF16;
    sizes.device_bytes = uint64_t{200} << 30;
    sizes.max_sequences = log.batch;
    sizes.max_context = log.prompt + log.output;
    sizes.max_rows = 512;
    sizes.max_decode_rows = log.batch;
    const absl::StatusOr<H2oLayout> layout = H2oLayoutOf(h2o, sizes);
    ASSERT_TRUE(layout.ok()) << layout.status();
    const RequestShape shape{log.prompt, log.output};
    const int32_t kept = H2oBudgetOf(h2o, shape).total();
    EXPECT_EQ(kept, 2 * (log.prompt / 5) - 1);
    const double gib = 1024.0 * 1024 * 1024;
    const double token_bytes = 2.0 * log.layers * log.heads * 128 * 2;
    const double full = log.batch * token_bytes * (log.prompt + log.output) / gib;
    EXPECT_NEAR(full - log.batch * token_bytes * (kept + 1) / gib, log.saved_gib,
                0.002 * log.saved_gib);
    H2oManager manager(*layout);
    ASSERT_TRUE(manager.Admit(0, shape, log.prompt));
    manager.EndPrompt(0);
    const double ours = log.batch * static_cast<double>(manager.RequestBytes(0).device) / gib;
    EXPECT_NEAR(full - ours, log.saved_gib, 0.02 * log.saved_gib) << "pages, scores and positions";
  }
}

// ------------------------------------------------------------------------------------------
// preemption

std::vector<TestRequest> GrowingRequests(Random& random, int32_t vocabulary) {
  std::vector<TestRequest> requests;
  // Some end early, so that others come back, and then long ones push them out again.
  for (int i = 0; i < 9; ++i) {
    requests.push_back(
        {.prompt = RandomIds(random, static_cast<size_t>(20 + 5 * (i % 6)), vocabulary),
         .output_tokens = 40 + 20 * (i % 3)});
  }
  return requests;
}

// Memory for the fixed structures and about half of what the requests grow to.
EngineOptions TightEngine(Backend* backend, const LoadedModel& model, const Arm& arm) {
  EngineOptions options = SmallEngine(128);
  absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
      InferenceEngine::Create(backend, &model, arm, options, {});
  KVSWEEP_CHECK_OK(engine);
  const KvManager& manager = (*engine)->manager();
  options.device_bytes = manager.FixedBytes().device + 2 * manager.PeakBytes({45, 80}).device;
  return options;
}

// In every order of the streams: a missing wait would show as another token.
TEST(H2oPreemptionTest, ASwappedRequestGoesOnAsIfNothingHadHappened) {
  for (const uint32_t full_layers : {0u, 2u}) {
    const Arm arm = ArmOf(40, 40, [&](H2o* h) {
      h->set_preemption(H2o::PREEMPTION_SWAP);
      h->set_full_layers(full_layers);
      h->set_positions(full_layers > 0 ? H2o::POSITIONS_ROLLING : H2o::POSITIONS_ORIGINAL);
    });
    std::vector<std::vector<int32_t>> expected;
    for (uint64_t seed = 0; seed <= 8; ++seed) {
      const auto backend = MakeBackend({.threads = 2,
                                        .batch_invariant = true,
                                        .shuffle_streams = seed > 0,
                                        .stream_seed = seed});
      const auto model = LoadModel(backend.get(), "stories260K");
      Random random(5);
      const std::vector<TestRequest> requests = GrowingRequests(random, 512);
      if (expected.empty()) {
        const absl::StatusOr<TestRun> ample =
            RunRequests(backend.get(), *model, arm, SmallEngine(128), requests, {});
        ASSERT_TRUE(ample.ok()) << ample.status();
        EXPECT_THAT(ample->preemptions, Each(0));
        expected = ample->outputs;
      }
      const absl::StatusOr<TestRun> tight = RunRequests(
          backend.get(), *model, arm, TightEngine(backend.get(), *model, arm), requests, {});
      ASSERT_TRUE(tight.ok()) << tight.status();
      EXPECT_GT(std::ranges::max(tight->preemptions), 0);
      EXPECT_EQ(tight->outputs, expected) << "seed " << seed;
      EXPECT_GT(tight->traffic.to_host, 0u);
      // What goes out comes back; the lists of pages are a few bytes more.
      EXPECT_GE(tight->traffic.to_device, tight->traffic.to_host);
      if (seed > 0) continue;
      EXPECT_LT(static_cast<double>(tight->traffic.to_device),
                1.01 * static_cast<double>(tight->traffic.to_host));
    }
  }
}

// Others decode while a request comes back, and it joins them when its copy has landed.
TEST(H2oPreemptionTest, SwapInOverlapsDecodes) {
  DeviceProfile profile = *FindDeviceProfile("laptop");
  profile.link_bytes_per_s = 2e8;
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true, .modelled = profile});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(5);
  const Arm arm = ArmOf(40, 40, [&](H2o* h) { h->set_preemption(H2o::PREEMPTION_SWAP); });
  int overlapped = 0;
  const absl::StatusOr<TestRun> run = RunRequests(
      backend.get(), *model, arm, TightEngine(backend.get(), *model, arm),
      GrowingRequests(random, 512), {}, [&](const StepPlan& plan, const StepResult&) {
        const auto in_step = [&](RequestId id) {
          const auto is = [&](const Segment& segment) { return segment.request == id; };
          return std::ranges::any_of(plan.decode, is) || std::ranges::any_of(plan.prefill, is);
        };
        overlapped += !plan.decode.empty() && !std::ranges::all_of(plan.admitted, in_step);
      });
  ASSERT_TRUE(run.ok()) << run.status();
  EXPECT_GT(overlapped, 0);
}

// Without room on the host a victim starts anew; so it does with preemption: recompute. Everybody
// still comes to an end, and computes tokens twice.
TEST(H2oPreemptionTest, AVictimWithoutAPlaceStartsAnew) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  for (const auto preemption : {H2o::PREEMPTION_SWAP, H2o::PREEMPTION_RECOMPUTE}) {
    Random random(6);
    const std::vector<TestRequest> requests = GrowingRequests(random, 512);
    const Arm arm = ArmOf(40, 40, [&](H2o* h) { h->set_preemption(preemption); });
    EngineOptions options = TightEngine(backend.get(), *model, arm);
    options.host_bytes = 0;
    const absl::StatusOr<TestRun> run =
        RunRequests(backend.get(), *model, arm, options, requests, {});
    ASSERT_TRUE(run.ok()) << run.status();
    EXPECT_GT(std::ranges::max(run->preemptions), 0);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(static_cast<int32_t>(run->outputs[i].size()), requests[i].output_tokens);
    }
  }
}

// A victim that starts anew accumulates other rows: its kept sets, and with them its tokens, may
// change. This is what marks such rows.
TEST(H2oPreemptionTest, RecomputingDoesNotRestoreTheState) {
  const HarnessShape shape{.layers = 1};
  const Arm arm = ArmOf(8, 8);
  OracleRun straight(shape, arm, {.max_context = 128, .max_rows = 128});
  Sequence& sequence = straight.Add(0, {30, 60}, 128);
  for (int step = 0; step < 40; ++step) straight.Decode();
  OracleRun anew(shape, arm, {.max_context = 128, .max_rows = 128});
  EXPECT_NE(anew.Add(0, {70, 20}, 128).kept, sequence.kept);
}

// ----------------------------------------------------------------------------------------- tier
// and link

// Each decode step brings every kept entry of every layer over the link once.
TEST(H2oHostTierTest, EveryKeptEntryCrossesTheLinkOnceAStep) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  const Arm arm = ArmOf(12, 12, [](H2o* h) {
    h->set_tier(H2o::TIER_HOST);
    h->set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
  });
  absl::StatusOr<std::unique_ptr<InferenceEngine>> created =
      InferenceEngine::Create(backend.get(), model.get(), arm, SmallEngine(128), {});
  ASSERT_TRUE(created.ok()) << created.status();
  InferenceEngine& engine = **created;
  Batcher batcher({.max_sequences = 8,
                   .max_batched_tokens = 256,
                   .chunk_alignment = engine.chunk_alignment(),
                   .budget = {256 << 20, 256 << 20}},
                  &engine.manager());
  Random random(8);
  for (RequestId id = 0; id < 3; ++id) {
    engine.AddSequence(id, RandomIds(random, 10 + 20 * static_cast<size_t>(id), 512), 10 + 20 * id);
    ASSERT_TRUE(batcher.Add(id, {10 + 20 * id, 40}, 40));
  }
  const uint64_t entry_bytes = 2 * 8 * sizeof(float) * 4 * 5;  // K and V, 4 heads of 8, 5 layers
  LinkBytes before;
  while (!batcher.idle()) {
    const StepPlan& plan = batcher.Plan();
    const absl::StatusOr<StepResult> result = engine.Execute(plan);
    ASSERT_TRUE(result.ok()) << result.status();
    uint64_t stored = 0;
    uint64_t written = 0;
    for (size_t i = 0; i < plan.decode.size(); ++i) {
      const auto slots = static_cast<uint64_t>(std::min(plan.decode[i].start_position, 23));
      stored += slots;
      written += slots == 23 ? 2 : 1;  // the new row, and the promoted one
      EXPECT_EQ(engine.CollectDecode(i, {}).fetched, static_cast<double>(5 * slots));
    }
    const LinkBytes traffic = engine.CacheTraffic().value();
    if (plan.prefill.empty()) {
      EXPECT_EQ(traffic.to_device - before.to_device, stored * entry_bytes);
      EXPECT_EQ(traffic.to_host - before.to_host, written * entry_bytes);
    }
    before = traffic;
    batcher.Complete();
  }
}

// ---------------------------------------------------------------------------------------------
// budgets

TEST(H2oBudgetTest, SizesRatiosAndBases) {
  const RequestShape shape{.prompt_tokens = 100, .max_tokens = 900, .oracle_tokens = 450};
  H2o h2o;
  h2o.set_heavy_ratio(0.1);
  h2o.set_recent_ratio(0.3);
  const auto budget = [&](BudgetBase base) {
    h2o.set_budget_base(base);
    h2o.set_budget_tokens(256);
    return H2oBudgetOf(h2o, shape);
  };
  EXPECT_EQ(budget(BUDGET_BASE_LIMIT).total(), 400);
  EXPECT_EQ(budget(BUDGET_BASE_LIMIT).heavy, 100);
  EXPECT_EQ(budget(BUDGET_BASE_PROMPT).total(), 40);
  EXPECT_EQ(budget(BUDGET_BASE_FIXED).total(), 102);  // 2 * floor(51.2)
  EXPECT_EQ(budget(BUDGET_BASE_FINAL).total(), 180);
  h2o.set_sink_tokens(50);
  EXPECT_EQ(budget(BUDGET_BASE_FINAL).heavy, 50) << "sinks beyond the heavy ones";
  EXPECT_EQ(budget(BUDGET_BASE_FINAL).total(), 180);
  h2o.set_heavy_size(48);
  h2o.set_recent_size(2000);
  EXPECT_EQ(budget(BUDGET_BASE_LIMIT).heavy, 50);
  EXPECT_EQ(budget(BUDGET_BASE_LIMIT).total(), 2048);
}

TEST(H2oBudgetTest, SlotPromoteStoresOneFewer) {
  H2o h2o = H2oArm(0.1, 0.1).h2o();
  h2o.set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
  const H2oBudget budget = H2oBudgetOf(h2o, {1920, 128});
  EXPECT_EQ(budget.heavy, 204);  // hh of C = 2 * 204
  EXPECT_EQ(budget.recent, 203);
}

TEST(H2oRefusalTest, NamesWhatTheModelCannotHave) {
  const HarnessShape learned{.rotary = false};
  AttentionHarness rolling(learned,
                           ArmOf(4, 4, [](H2o* h) { h->set_positions(H2o::POSITIONS_ROLLING); }));
  EXPECT_EQ(rolling.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(rolling.status().message()), HasSubstr("use original"));
  AttentionHarness full({.layers = 2}, ArmOf(4, 4, [](H2o* h) { h->set_full_layers(2); }));
  EXPECT_EQ(full.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(full.status().message()), HasSubstr("use at most 1"));
  const Arm host = ArmOf(4, 4, [](H2o* h) { h->set_tier(H2o::TIER_HOST); });
  AttentionHarness poor({}, host, {.host_bytes = 100});
  EXPECT_EQ(poor.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(poor.status().message()), HasSubstr("raise kv.host_bytes"));
}

// f16 accumulators: on a prompt of some hundred rows early tokens' sums are so large that a decode
// step's increments round away.
TEST(H2oScoreDtypeTest, HalfPrecisionLosesSmallIncrements) {
  std::vector<int> unchanged;
  for (const auto dtype : {H2o::SCORE_DTYPE_F32, H2o::SCORE_DTYPE_F16}) {
    const Arm arm = ArmOf(200, 56, [&](H2o* h) { h->set_score_dtype(dtype); });
    AttentionHarness harness({.layers = 1, .query_heads = 7, .kv_heads = 1}, arm,
                             {.max_context = 512});
    harness.Prefill(0, {499, 12}, 512);
    const PruneHeavyArgs prune = harness.backend().prune.at(0);
    const HeldSlots before = ReadSlots(prune.score, prune.position, prune.table_row, 0, 256);
    ASSERT_TRUE(harness.manager().Grow(0, 500));
    harness.Step({harness.DecodeToken(0, 499)}, {});
    const EvictHeavyArgs& args = harness.backend().evict.at(0);
    const HeldSlots after = ReadSlots(args.score, args.slot_position, 0, 0, 256);
    int same = 0;
    for (const auto& [position, score] : before.score) {
      const auto found = after.score.find(position);
      same += found != after.score.end() && found->second == score;
    }
    unchanged.push_back(same);
  }
  EXPECT_LT(unchanged[0], 5) << "f32 takes nearly every increment in";
  EXPECT_GT(unchanged[1], unchanged[0] + 10);
}

}  // namespace
}  // namespace kvsweep
