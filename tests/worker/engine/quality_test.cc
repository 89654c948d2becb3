#include "worker/engine/quality.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/worker/engine/stories_model.h"

namespace kvsweep {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

TEST(QualityTest, ScoresAPositionInNats) {
  // Distributions {1/2, 1/4, 1/4} and {1/4, 1/2, 1/4}, shifted: a shift of all logits changes
  // nothing.
  const float ln2 = std::log(2.0f);
  const std::vector<float> reference = {ln2 + 5, 5, 5};
  const std::vector<float> arm = {-3, ln2 - 3, -3};
  const absl::StatusOr<PositionScore> score = ScorePosition(reference, arm, 0);
  ASSERT_TRUE(score.ok());
  EXPECT_NEAR(score->reference_nll, std::log(2.0), 1e-6);
  EXPECT_NEAR(score->nll, std::log(4.0), 1e-6);
  EXPECT_NEAR(score->kl, 0.5 * std::log(2.0) + 0.25 * std::log(0.5), 1e-6);
  EXPECT_FALSE(score->top1_match);
  const absl::StatusOr<PositionScore> same = ScorePosition(arm, arm, 2);
  ASSERT_TRUE(same.ok());
  EXPECT_EQ(same->kl, 0);
  EXPECT_TRUE(same->top1_match);
  const std::vector<float> broken = {0, std::numeric_limits<float>::quiet_NaN(), 0};
  EXPECT_EQ(ScorePosition(reference, broken, 0).status().code(), absl::StatusCode::kInternal);
}

TEST(QualityTest, WindowsCoverTheTokensAskedFor) {
  EXPECT_EQ(QualityWindows(768, 1024, 256), 1);
  EXPECT_EQ(QualityWindows(769, 1024, 256), 2);
  EXPECT_EQ(QualityWindows(4096, 1024, 256), 6);
}

struct Scored {
  QualityResult result;
  std::vector<QualityRow> rows;
};

class ScoreTextTest : public testing::Test {
 protected:
  // With the full cache's logits in `kept`, or computed where it has none.
  Scored Score(const Arm& arm, QualityTask task, int32_t sequences, QualityOptions options = {},
               ReferenceLogits* kept = nullptr) {
    const std::unique_ptr<InferenceEngine> engine =
        stories_.MakeEngine(arm, {.max_sequences = sequences,
                                  .max_batched_tokens = 128,
                                  .max_context = task.context,
                                  .graphs = true,
                                  .logits = LogitsMode::kLast,
                                  .kv_dtype = DType::kF32,
                                  .device_bytes = 64 * kMiB});
    const int32_t side_by_side = WindowsSideBySide(engine.get(), task);
    EXPECT_EQ(side_by_side, std::min(sequences, task.windows));
    std::unique_ptr<InferenceEngine> reference;
    if (kept == nullptr || !kept->complete) {
      reference = stories_.MakeEngine(
          PagedArm(), ReferenceOptions(engine->config(), task, side_by_side, DType::kF32, kMiB));
    }
    ReferenceLogits own;
    SimulatedClock clock;
    options.clock = options.modelled = &clock;
    Scored scored;
    absl::StatusOr<QualityResult> result =
        ScoreText(reference.get(), engine.get(), task, side_by_side, options,
                  kept == nullptr ? &own : kept, [&](QualityRow row) {
                    scored.rows.push_back(std::move(row));
                    return true;
                  });
    EXPECT_TRUE(result.ok()) << result.status();
    scored.result = *std::move(result);
    return scored;
  }

  // The samples' first `windows` rows, whole; each begins with its own BOS.
  QualityTask Samples(int32_t windows, int32_t prefill) const {
    return {.text_ids = samples_, .windows = windows, .context = 512, .prefill = prefill};
  }

  static QualityRow Sum(const std::vector<QualityRow>& rows) {
    QualityRow sum;
    for (const QualityRow& row : rows) {
      sum.set_scored_tokens(sum.scored_tokens() + row.scored_tokens());
      sum.set_nll_sum(sum.nll_sum() + row.nll_sum());
      sum.set_reference_nll_sum(sum.reference_nll_sum() + row.reference_nll_sum());
      sum.set_kl_sum(sum.kl_sum() + row.kl_sum());
      sum.set_top1_matches(sum.top1_matches() + row.top1_matches());
      sum.set_dropped_tokens(sum.dropped_tokens() + row.dropped_tokens());
      sum.set_dropped_kl_sum(sum.dropped_kl_sum() + row.dropped_kl_sum());
    }
    return sum;
  }

  StoriesModel stories_{"laptop"};
  const std::vector<int32_t> samples_ = StoriesSamples();
};

// golden.json: first16_rows_mean_nll of an independent program in double.
TEST_F(ScoreTextTest, TheFullCacheHasTheGoldenLossAndNoDivergence) {
  const Scored scored = Score(PagedArm(), Samples(16, 1), 8);
  ASSERT_EQ(scored.rows.size(), 16u);
  const QualityRow sum = Sum(scored.rows);
  EXPECT_EQ(sum.scored_tokens(), 16u * 511);
  EXPECT_NEAR(sum.reference_nll_sum() / sum.scored_tokens(), 1.3069, 1e-4);
  EXPECT_NEAR(sum.nll_sum() / sum.scored_tokens(), 1.3069, 1e-4);
  EXPECT_LT(sum.kl_sum() / sum.scored_tokens(), 1e-7);
  EXPECT_EQ(sum.top1_matches(), sum.scored_tokens());
  EXPECT_EQ(sum.dropped_tokens(), 0u);
  for (const QualityRow& row : scored.rows) EXPECT_EQ(row.attended_fraction(), 1.0);
}

TEST_F(ScoreTextTest, AnEvictingArmIsJudgedWhereItDropped) {
  const Scored scored = Score(H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 64), Samples(4, 128), 3);
  ASSERT_EQ(scored.rows.size(), 4u);
  for (const QualityRow& row : scored.rows) {
    SCOPED_TRACE(row.DebugString());
    EXPECT_EQ(row.scored_tokens(), 384u);
    // All but the first scored position, whose row is the prompt's last: 128 tokens, the prefill.
    EXPECT_EQ(row.dropped_tokens(), 383u);
    EXPECT_GT(row.dropped_kl_sum(), 0);
    EXPECT_LE(row.dropped_kl_sum(), row.kl_sum() + 1e-12);
    // 65 of 129 to 512 tokens are read.
    double ratios = 0;
    for (int tokens = 129; tokens <= 511; ++tokens) ratios += 65.0 / tokens;
    EXPECT_NEAR(row.attended_fraction(), ratios / 383, 1e-9);
  }
  EXPECT_EQ(scored.rows[3].window(), 3u);
}

// golden.json also has the loss under a window of 128 tokens; here it is 128 and the current one.
TEST_F(ScoreTextTest, APlainWindowHasTheGoldenLoss) {
  const Scored scored = Score(H2oArm(0.0, 1.0, BUDGET_BASE_FIXED, 128), Samples(16, 1), 16);
  const QualityRow sum = Sum(scored.rows);
  EXPECT_NEAR(sum.nll_sum() / sum.scored_tokens(), 1.3129, 1e-3);
}

TEST_F(ScoreTextTest, ResultsDoNotDependOnTheWindowsBeside) {
  const Arm arm = H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 64);
  const Scored alone = Score(arm, Samples(3, 64), 1);
  const Scored together = Score(arm, Samples(3, 64), 3);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(alone.rows[i].SerializeAsString(), together.rows[i].SerializeAsString()) << i;
  }
}

TEST_F(ScoreTextTest, PositionsAddUpToTheWindow) {
  const Scored scored = Score(H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 64), Samples(3, 100), 3);
  for (const QualityRow& row : scored.rows) {
    SCOPED_TRACE(row.DebugString());
    QualityRow sum;
    uint32_t next = 100;  // the first token that is scored
    for (const QualityPositions& part : row.positions()) {
      EXPECT_EQ(part.first_position(), next);
      // Eighths of 512 positions; the first is cut by the prompt.
      EXPECT_EQ(part.scored_tokens(), next == 100 ? 28u : 64u);
      next += part.scored_tokens();
      sum.set_nll_sum(sum.nll_sum() + part.nll_sum());
      sum.set_kl_sum(sum.kl_sum() + part.kl_sum());
      sum.set_top1_matches(sum.top1_matches() + part.top1_matches());
    }
    EXPECT_EQ(next, 512u);
    EXPECT_NEAR(sum.nll_sum(), row.nll_sum(), 1e-9);
    EXPECT_NEAR(sum.kl_sum(), row.kl_sum(), 1e-9);
    EXPECT_EQ(sum.top1_matches(), row.top1_matches());
  }
}

// Another arm's trial computed the full cache's logits; this one has no reference engine at all.
TEST_F(ScoreTextTest, KeptLogitsGiveTheSameScores) {
  const Arm arm = H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 64);
  const Scored computed = Score(arm, Samples(3, 64), 2);
  ReferenceLogits kept;
  Score(PagedArm(), Samples(3, 64), 2, {}, &kept);
  ASSERT_TRUE(kept.complete);
  const Scored served = Score(arm, Samples(3, 64), 2, {}, &kept);
  ASSERT_EQ(served.rows.size(), computed.rows.size());
  for (size_t i = 0; i < computed.rows.size(); ++i) {
    EXPECT_EQ(computed.rows[i].SerializeAsString(), served.rows[i].SerializeAsString()) << i;
  }
}

TEST_F(ScoreTextTest, AnUnfinishedReferenceIsNotKept) {
  std::atomic<bool> cancel = true;
  ReferenceLogits kept;
  Score(PagedArm(), Samples(2, 64), 2, {.cancel = &cancel}, &kept);
  EXPECT_FALSE(kept.complete);
}

TEST_F(ScoreTextTest, EndsEarlyWithoutHalfWindows) {
  std::atomic<bool> cancel = false;
  const Scored scored =
      Score(PagedArm(), Samples(6, 64), 2,
            {.cancel = &cancel, .progress = [&](size_t done) { cancel = done >= 2; }});
  EXPECT_EQ(scored.result.end, QualityResult::End::kCancelled);
  EXPECT_EQ(scored.rows.size(), 2u);
  const Scored late = Score(PagedArm(), Samples(2, 64), 2, {.time_limit_ns = 1000});
  EXPECT_EQ(late.result.end, QualityResult::End::kTimeLimit);
}

}  // namespace
}  // namespace kvsweep
