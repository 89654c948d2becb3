#include "experiments/matrix.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "experiments/spec.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Two axes of two values, an arm with a grid of two, and two others.
constexpr char kSpec[] = R"(schema_version: 1
name: matrix
model: {path: m}
load:
  arrivals: {rate: 4/s, requests: 24}
  lengths: {input: 128, output: 16}
  text: t
kv: {device_bytes: 12MiB}
arms:
  - {name: paged, strategy: paged}
  - name: h2o
    strategy: h2o
    grid: {h2o.heavy_ratio: [10%, 20%]}
  - {name: infinigen, strategy: infinigen, kv: {host_bytes: 2GiB}}
sweep: {grid: {load.arrivals.rate: [4/s, 16/s], kv.device_bytes: [3MiB, 12MiB]}}
repeats: 2
slo: {ttft: 500ms}
)";

ExperimentInputs Inputs() {
  ExperimentInputs inputs;
  inputs.model.emplace();
  inputs.model->set_name("m");
  inputs.model->set_digest(std::string(32, 'm'));
  FileReference file;
  file.set_path("t");
  file.set_digest(std::string(32, 't'));
  inputs.files = {file};
  return inputs;
}

Experiment Parsed(const std::string& text) {
  const auto experiment = ParseExperiment(text, "spec", {});
  EXPECT_TRUE(experiment.ok()) << experiment.status();
  return experiment.value_or(Experiment());
}

Matrix MatrixOf(const std::string& text) {
  absl::StatusOr<Matrix> matrix = Matrix::Create(Parsed(text), Inputs());
  EXPECT_TRUE(matrix.ok()) << matrix.status();
  return *std::move(matrix);
}

std::string With(const std::string& line) { return absl::StrCat(kSpec, line, "\n"); }

TEST(MatrixOrder, CountsAndNamesAreTheContract) {
  const Matrix matrix = MatrixOf(kSpec);
  std::vector<std::string> arms;
  for (const Arm& arm : matrix.arms()) arms.push_back(arm.name());
  EXPECT_THAT(arms,
              ElementsAre("paged", "h2o/heavy_ratio=0.1", "h2o/heavy_ratio=0.2", "infinigen"));
  std::vector<std::string> cells;
  for (const Cell& cell : matrix.cells()) cells.push_back(cell.name);
  EXPECT_THAT(cells, ElementsAre("rate=4/s device_bytes=3MiB", "rate=4/s device_bytes=12MiB",
                                 "rate=16/s device_bytes=3MiB", "rate=16/s device_bytes=12MiB"));
  EXPECT_EQ(matrix.round_count(), 8u);
  EXPECT_EQ(matrix.trial_count(), 32u);
}

std::string WithSweep(absl::string_view sweep) {
  std::string text(kSpec);
  const size_t begin = text.find("sweep: ");
  return text.replace(begin, text.find('\n', begin) - begin, std::string(sweep));
}

// Grid, zip, list: the last fastest; the axes of zip, and those of list, advance together.
TEST(MatrixOrder, ZipAndListAreOneDigitEach) {
  const Matrix matrix = MatrixOf(WithSweep(
      "sweep:\n"
      "  list: [{load.lengths.input: 8, load.lengths.output: 4}, {load.lengths.input: 16, "
      "load.lengths.output: 4}]\n"
      "  zip: {load.arrivals.rate: [4/s, 8/s], kv.device_bytes: [3MiB, 3MiB]}\n"
      "  grid: {engine.batch_invariant: [off, on]}\n"));
  std::vector<std::string> cells;
  for (const Cell& cell : matrix.cells()) cells.push_back(cell.name);
  EXPECT_THAT(cells,
              ElementsAre("batch_invariant=false rate=4/s device_bytes=3MiB input=8 output=4",
                          "batch_invariant=false rate=4/s device_bytes=3MiB input=16 output=4",
                          "batch_invariant=false rate=8/s device_bytes=3MiB input=8 output=4",
                          "batch_invariant=false rate=8/s device_bytes=3MiB input=16 output=4",
                          "batch_invariant=true rate=4/s device_bytes=3MiB input=8 output=4",
                          "batch_invariant=true rate=4/s device_bytes=3MiB input=16 output=4",
                          "batch_invariant=true rate=8/s device_bytes=3MiB input=8 output=4",
                          "batch_invariant=true rate=8/s device_bytes=3MiB input=16 output=4"));
  EXPECT_EQ(matrix.cell_count(), 8u);
  const TrialSpec trial = matrix.LoadTrial(0, 3, 0);
  EXPECT_EQ(trial.load().arrivals().rate(), 8);
  EXPECT_EQ(trial.load().lengths().input(), 16u);
}

// An axis that matters for quality takes the points of its zip with it, once each.
TEST(MatrixQuality, ZippedAxesMakeEachQuestionOnce) {
  const Matrix matrix = MatrixOf(
      WithSweep("sweep: {zip: {kv.dtype: [f32, bf16, f32], load.arrivals.rate: [4/s, 8/s, 9/s]}}") +
      "quality: {text: t, text_tokens: 128, context: 64, prefill: 32}\n");
  uint64_t quality_rounds = 0;
  for (uint64_t i = 0; i < matrix.round_count(); ++i) {
    quality_rounds += matrix.RoundAt(i).kind == TrialSpec::KIND_QUALITY;
  }
  EXPECT_EQ(quality_rounds, 2 * matrix.arms().size());
}

TEST(MatrixRegime, IsNamedInTheTrialAndChangesNoKey) {
  const Matrix plain = MatrixOf(kSpec);
  const Matrix named = MatrixOf(With("regime: kv_fits"));
  EXPECT_EQ(named.LoadTrial(0, 0, 0).regime(), Experiment::REGIME_KV_FITS);
  EXPECT_EQ(ContentKey(named.LoadTrial(0, 0, 0)), ContentKey(plain.LoadTrial(0, 0, 0)));
}

TEST(MatrixRounds, WhoMovesKvOverTheHostLinkIsAloneUnlessColocated) {
  const auto uses = [](const std::string& arm, const char* more) {
    std::string text(kSpec);
    const size_t begin = text.find("  - {name: infinigen");
    text.replace(begin, text.find('\n', begin) - begin, "  - {name: x, " + arm + "}");
    return MatrixOf(text + more).RoundAt(0).spec.uses_host_tier();
  };
  EXPECT_FALSE(uses("strategy: paged", ""));
  EXPECT_TRUE(uses("strategy: paged, paged: {preemption: swap}", ""));
  EXPECT_TRUE(uses("strategy: h2o, h2o: {tier: host}", ""));
  EXPECT_TRUE(uses("strategy: h2o, h2o: {preemption: swap}", ""));
  EXPECT_TRUE(uses("strategy: infinigen", ""));
  EXPECT_FALSE(uses("strategy: infinigen", "colocate: true\n"));
}

// The order is documented: repeat, then cell, then group; trials in an order drawn from the seed.
TEST(MatrixOrder, RoundsFollowTheDocumentedOrder) {
  const Matrix matrix = MatrixOf(With("round_arms: 3"));
  ASSERT_EQ(matrix.round_count(), 16u) << "two groups: three others, two places";
  EXPECT_EQ(matrix.trial_count(), 8u * (4 + 1)) << "the reference runs in both groups";
  std::vector<std::string> order;
  for (uint64_t i = 0; i < 6; ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    EXPECT_EQ(round.index, i);
    order.push_back(
        absl::StrCat(round.repeat, "/", round.cell, "/", round.group, ":",
                     absl::StrJoin(std::set<size_t>(round.arms.begin(), round.arms.end()), ",")));
  }
  EXPECT_THAT(order, ElementsAre("0/0/0:0,1,2", "0/0/1:0,3", "0/1/0:0,1,2", "0/1/1:0,3",
                                 "0/2/0:0,1,2", "0/2/1:0,3"));
  EXPECT_EQ(matrix.RoundAt(8).repeat, 1u);
}

TEST(MatrixOrder, EachRoundHoldsTheReferenceOnceAndEveryArmRunsInEveryCellAndRepeat) {
  const Matrix matrix = MatrixOf(With("round_arms: 2\nreference: infinigen"));
  EXPECT_EQ(matrix.arms()[matrix.reference()].name(), "infinigen");
  std::map<std::pair<uint64_t, uint32_t>, std::multiset<size_t>> seen;
  uint64_t trials = 0;
  for (uint64_t i = 0; i < matrix.round_count(); ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    EXPECT_EQ(std::count(round.arms.begin(), round.arms.end(), matrix.reference()), 1);
    EXPECT_LE(round.arms.size(), 2u);
    ASSERT_EQ(round.arms.size(), static_cast<size_t>(round.spec.trials_size()));
    for (size_t k = 0; k < round.arms.size(); ++k) {
      EXPECT_EQ(round.spec.trials(static_cast<int>(k)).spec().arm().name(),
                matrix.arms()[round.arms[k]].name());
    }
    trials += round.arms.size();
    seen[{round.cell, round.repeat}].insert(round.arms.begin(), round.arms.end());
  }
  EXPECT_EQ(trials, matrix.trial_count());
  EXPECT_EQ(seen.size(), 8u);
  for (const auto& [point, arms] : seen) {
    for (size_t arm = 0; arm < 3; ++arm) EXPECT_EQ(arms.count(arm), 1u);
    EXPECT_EQ(arms.count(3), 3u);
  }
}

TEST(MatrixOrder, ArmsTakeEachPlaceOfTheRoundAboutEquallyOften) {
  const Matrix matrix =
      MatrixOf(With("").replace(std::string(kSpec).find("repeats: 2"), 10, "repeats: 250"));
  std::map<size_t, int> first;
  for (uint64_t i = 0; i < matrix.round_count(); ++i) ++first[matrix.RoundAt(i).arms[0]];
  // 1000 rounds, four arms: 250 each, give or take five standard deviations.
  for (const auto& [arm, count] : first) EXPECT_NEAR(count, 250, 70) << arm;
  EXPECT_EQ(matrix.RoundAt(17).spec.SerializeAsString(),
            matrix.RoundAt(17).spec.SerializeAsString());
}

TEST(MatrixTrials, AreCompleteAndCarryWhatTheCellAndTheArmSay) {
  const Matrix matrix = MatrixOf(kSpec);
  const TrialSpec trial = matrix.LoadTrial(3, 2, 1);
  EXPECT_EQ(trial.load().arrivals().rate(), 16);
  EXPECT_EQ(trial.kv().device_bytes(), 3u << 20);
  EXPECT_EQ(trial.kv().host_bytes(), uint64_t{2} << 30) << "the arm's own";
  EXPECT_EQ(matrix.LoadTrial(0, 2, 1).kv().host_bytes(), uint64_t{1} << 30) << "the default";
  EXPECT_FALSE(trial.arm().has_kv());
  EXPECT_EQ(trial.arm().infinigen().alpha(), 4) << "defaults are filled in";
  EXPECT_EQ(trial.engine().max_num_seqs(), 64u);
  EXPECT_EQ(trial.limits().trial(), 600'000'000'000u);
  EXPECT_EQ(trial.slo().ttft(), 500'000'000u);
  EXPECT_EQ(trial.model_reference().digest(), std::string(32, 'm'));
  ASSERT_EQ(trial.files_size(), 1);
  EXPECT_EQ(trial.files(0).path(), "t");
  EXPECT_FALSE(trial.has_quality());
}

TEST(MatrixSeeds, DependOnTheRepeatAlone) {
  const Matrix matrix = MatrixOf(kSpec);
  const std::string first = matrix.LoadTrial(0, 0, 0).seeds().SerializeAsString();
  EXPECT_EQ(matrix.LoadTrial(3, 3, 0).seeds().SerializeAsString(), first);
  EXPECT_NE(matrix.LoadTrial(0, 0, 1).seeds().SerializeAsString(), first);
  const Seeds seeds = SeedsOfRepeat(7, 0);
  EXPECT_NE(seeds.content(), seeds.order());
  EXPECT_NE(seeds.order(), seeds.schedule());
}

TEST(MatrixHostTier, RoundsWithAnOffloadingArmSaySo) {
  const Matrix matrix = MatrixOf(With("round_arms: 3"));
  EXPECT_FALSE(matrix.RoundAt(0).spec.uses_host_tier());
  EXPECT_TRUE(matrix.RoundAt(1).spec.uses_host_tier());
}

// ------------------------------------------------------------------------------------ content keys

TEST(ContentKeyTest, NamesAndPathsDoNotMatter) {
  const Matrix matrix = MatrixOf(kSpec);
  const TrialSpec trial = matrix.LoadTrial(1, 1, 1);
  const std::string key = ContentKey(trial);
  EXPECT_EQ(key.size(), 32u);
  TrialSpec same = trial;
  same.mutable_arm()->set_name("other");
  same.mutable_model()->set_path("elsewhere/m");
  same.mutable_model_reference()->set_name("renamed");
  same.mutable_load()->set_text("moved");
  same.mutable_files(0)->set_path("moved");
  same.set_repeat(9);
  EXPECT_EQ(ContentKey(same), key);
}

TEST(ContentKeyTest, EverythingElseDoes) {
  const Matrix matrix = MatrixOf(kSpec);
  const TrialSpec trial = matrix.LoadTrial(1, 1, 1);
  std::set<std::string> keys = {ContentKey(trial)};
  const auto changed = [&](auto edit) {
    TrialSpec other = trial;
    edit(&other);
    EXPECT_TRUE(keys.insert(ContentKey(other)).second);
  };
  changed([](TrialSpec* t) { t->set_kind(TrialSpec::KIND_QUALITY); });
  changed([](TrialSpec* t) { t->mutable_kv()->set_device_bytes(1 << 20); });
  changed([](TrialSpec* t) { t->mutable_arm()->mutable_h2o()->set_recent_ratio(0.3); });
  changed([](TrialSpec* t) { t->mutable_arm()->set_strategy("paged"); });
  changed([](TrialSpec* t) { t->mutable_seeds()->set_order(1); });
  changed([](TrialSpec* t) { t->mutable_model_reference()->set_digest(std::string(32, 'x')); });
  changed([](TrialSpec* t) { t->mutable_files(0)->set_digest(std::string(32, 'x')); });
  changed([](TrialSpec* t) { t->mutable_engine()->set_graphs(false); });
  changed([](TrialSpec* t) { t->mutable_load()->mutable_arrivals()->set_requests(25); });
}

TEST(ContentKeyTest, DiffersBetweenAllTrialsOfAMatrix) {
  const Matrix matrix = MatrixOf(With("quality: {context: 128, prefill: 64}"));
  std::set<std::string> keys;
  for (uint64_t i = 0; i < matrix.round_count(); ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    for (const PlannedTrial& trial : round.spec.trials()) keys.insert(trial.content_key());
  }
  EXPECT_EQ(keys.size(), matrix.trial_count());
}

// Writing a default out, or an arm in another order of fields, asks the same question.
TEST(ContentKeyTest, DefaultsDoNotMatter) {
  const std::string key = ContentKey(MatrixOf(kSpec).LoadTrial(0, 0, 0));
  std::string text(kSpec);
  text.replace(text.find("strategy: paged}"), 16, "strategy: paged, paged: {block_size: 16}}");
  EXPECT_EQ(ContentKey(MatrixOf(absl::StrCat(text, "engine: {graphs: true}\n")).LoadTrial(0, 0, 0)),
            key);
}

// ------------------------------------------------------------------------------------------
// quality

TEST(MatrixQuality, OneTrialForEachDistinctQuestion) {
  const Matrix matrix = MatrixOf(With("quality: {context: 128, prefill: 64}"));
  ASSERT_EQ(matrix.round_count(), 8u + 4) << "one for each arm; cells differ in load only";
  std::map<std::string, std::string> arm_of_key;
  for (uint64_t i = 8; i < 12; ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    EXPECT_EQ(round.kind, TrialSpec::KIND_QUALITY);
    ASSERT_EQ(round.spec.trials_size(), 1);
    const TrialSpec& trial = round.spec.trials(0).spec();
    EXPECT_FALSE(trial.has_load());
    EXPECT_EQ(trial.quality().text(), "t") << "load.text by default";
    EXPECT_EQ(trial.files_size(), 1);
    EXPECT_EQ(trial.kv().device_bytes(), 128u << 20);
    arm_of_key[round.spec.trials(0).content_key()] = trial.arm().name();
  }
  for (uint64_t i = 0; i < 8; ++i) {
    const PlannedRound round = matrix.RoundAt(i);
    for (size_t k = 0; k < round.arms.size(); ++k) {
      EXPECT_EQ(arm_of_key[round.quality_keys[k]], matrix.arms()[round.arms[k]].name());
    }
  }
}

TEST(MatrixQuality, WhatChangesOutputsMakesAQuestionOfItsOwn) {
  std::string text = With("quality: {context: 128, prefill: 64}");
  text.replace(text.find("kv.device_bytes: [3MiB, 12MiB]"), 30, "kv.dtype: [f32, bf16]");
  EXPECT_EQ(MatrixOf(text).round_count(), 8u + 8);
  EXPECT_EQ(MatrixOf(kSpec).RoundAt(0).quality_keys[0], "") << "no quality block";
}

// -------------------------------------------------------------------------------------------
// limits

TEST(MatrixLimits, AreCheckedBeforeAnythingIsMade) {
  Experiment experiment = Parsed(kSpec);
  experiment.set_repeats(1000);
  for (const char* path : {"load.arrivals.requests", "load.lengths.output"}) {
    Axis* axis = experiment.mutable_sweep()->add_grid();
    axis->set_path(path);
    for (int i = 1; i <= 4000; ++i) axis->add_values(absl::StrCat(i));
  }
  const absl::Status status = Matrix::Create(experiment, Inputs()).status();
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("64000000 cells x 4 arms x 1000 repeats = 256000000000 trials"));
}

TEST(MatrixLimits, AMillionTrialsAreReadOneByOne) {
  Experiment experiment = Parsed(kSpec);
  experiment.set_repeats(1000);
  experiment.mutable_sweep()->clear_grid();
  Axis* axis = experiment.mutable_sweep()->add_grid();
  axis->set_path("load.arrivals.requests");
  for (int i = 1; i <= 250; ++i) axis->add_values(absl::StrCat(i));
  const auto matrix = Matrix::Create(experiment, Inputs());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->trial_count(), 1'000'000u);
  const PlannedRound last = matrix->RoundAt(matrix->round_count() - 1);
  EXPECT_EQ(last.repeat, 999u);
  EXPECT_EQ(last.spec.trials(0).spec().load().arrivals().requests(), 250u);
}

TEST(MatrixLimits, ReferenceMustNameAnExpandedArm) {
  const auto status = Matrix::Create(Parsed(With("reference: h2o")), Inputs()).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("they are paged, h2o/heavy_ratio=0.1"));
  EXPECT_EQ(MatrixOf(With("reference: h2o/heavy_ratio=0.2")).reference(), 2u);
}

}  // namespace
}  // namespace kvsweep
