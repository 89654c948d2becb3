// The laws that every strategy of the catalogue obeys, run over all of them: ample budgets give the
// full cache's tokens, batch mates and stream orders change nothing, reserved bytes are those of
// the formula, and mistakes of the kinds that GPUs hide are seen.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "tests/worker/engine/engine_fixture.h"
#include "worker/engine/shape_catalogue.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {
namespace {

// Each strategy with budgets under which nothing is dropped.
std::vector<Arm> AmpleArms() {
  return {PagedArm(), H2oArm(0.5, 0.5), AmpleInfinigenArm(), StreamingLlmArm(1)};
}

// Each strategy with a budget that makes it do what it is named for.
std::vector<Arm> TightArms() {
  return {PagedArm(4), H2oArm(0.1, 0.1), InfinigenArm({.alpha = 2, .max_kv_ratio = 0.2}),
          StreamingLlmArm(0.2)};
}

std::vector<TestRequest> RandomRequests(Random& random, int count, int32_t vocabulary,
                                        int32_t longest_prompt, int32_t longest_output) {
  std::vector<TestRequest> requests;
  for (int i = 0; i < count; ++i) {
    requests.push_back(
        {.prompt = RandomIds(random, 1 + random.Uniform(static_cast<uint64_t>(longest_prompt)),
                             vocabulary),
         .output_tokens =
             1 + static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(longest_output))),
         .max_tokens = longest_output,
         .arrival_step = static_cast<int32_t>(random.Uniform(20))});
  }
  std::ranges::stable_sort(requests, {}, &TestRequest::arrival_step);
  return requests;
}

std::unique_ptr<LoadedModel> RandomModel(Backend* backend, const std::string& shape) {
  absl::StatusOr<ModelConfig> config = FindShape(shape);
  KVSWEEP_CHECK_OK(config);
  absl::StatusOr<std::unique_ptr<LoadedModel>> model = LoadedModel::Random(backend, *config, 11);
  KVSWEEP_CHECK_OK(model);
  return *std::move(model);
}

std::unique_ptr<LoadedModel> ModelOf(Backend* backend, const std::string& name) {
  return name.starts_with("tiny-") ? RandomModel(backend, name) : LoadModel(backend, name);
}

TEST(CatalogueTest, TheseTestsCoverEveryStrategy) {
  std::vector<std::string> tested;
  for (const Arm& arm : AmpleArms()) tested.push_back(arm.strategy());
  EXPECT_THAT(tested, testing::UnorderedElementsAreArray(StrategyNames()));
}

class AmpleBudgetTest : public testing::TestWithParam<std::string> {};

// Law: with an ample budget all give the tokens of the full cache.
TEST_P(AmpleBudgetTest, AllStrategiesGiveTheFullCachesTokens) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = ModelOf(backend.get(), GetParam());
  const int32_t vocabulary = model->config().vocabulary;
  Random random(20261);
  const std::vector<int32_t> calibration = RandomIds(random, 256, vocabulary);
  const std::vector<TestRequest> requests = RandomRequests(random, 6, vocabulary, 180, 24);
  std::vector<TestRun> runs;
  for (const Arm& arm : AmpleArms()) {
    EngineOptions options = SmallEngine(256);
    options.max_batched_tokens = 128;  // prompts of several chunks
    absl::StatusOr<TestRun> run =
        RunRequests(backend.get(), *model, arm, options, requests, calibration);
    ASSERT_TRUE(run.ok()) << arm.strategy() << ": " << run.status();
    runs.push_back(*std::move(run));
    EXPECT_EQ(runs.back().outputs, runs.front().outputs) << arm.strategy();
    EXPECT_EQ(runs.back().attended, runs.front().attended) << arm.strategy();
  }
}

INSTANTIATE_TEST_SUITE_P(Models, AmpleBudgetTest,
                         testing::Values("stories260K", "books-llama-14m", "books-opt-16m",
                                         "tiny-llama", "tiny-opt"));

// Law: a request's result does not depend on its batch mates (batch-invariant mode).
TEST(BatchMatesTest, DoNotChangeARequestsTokens) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(31);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  for (const Arm& arm : TightArms()) {
    const std::vector<TestRequest> requests = RandomRequests(random, 6, 512, 150, 40);
    absl::StatusOr<TestRun> together =
        RunRequests(backend.get(), *model, arm, SmallEngine(256), requests, calibration);
    ASSERT_TRUE(together.ok()) << together.status();
    for (size_t i = 0; i < requests.size(); ++i) {
      TestRequest alone = requests[i];
      alone.arrival_step = 0;
      absl::StatusOr<TestRun> single =
          RunRequests(backend.get(), *model, arm, SmallEngine(256), {alone}, calibration);
      ASSERT_TRUE(single.ok());
      EXPECT_EQ(single->outputs[0], together->outputs[i]) << arm.strategy() << " request " << i;
    }
  }
}

// Law: the order in which streams run, within what events allow, changes nothing.
TEST(StreamOrderTest, ChangesNothing) {
  std::map<std::string, TestRun> plain;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const auto backend = MakeBackend(
        {.threads = 1, .batch_invariant = true, .shuffle_streams = seed > 0, .stream_seed = seed});
    const auto model = LoadModel(backend.get(), "stories260K");
    Random random(41);
    const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
    const std::vector<TestRequest> requests = RandomRequests(random, 4, 512, 100, 24);
    for (const Arm& arm : TightArms()) {
      absl::StatusOr<TestRun> run =
          RunRequests(backend.get(), *model, arm, SmallEngine(128), requests, calibration);
      ASSERT_TRUE(run.ok()) << run.status();
      const auto [first, inserted] = plain.emplace(arm.strategy(), *run);
      if (!inserted) {
        EXPECT_EQ(run->outputs, first->second.outputs) << arm.strategy() << " seed " << seed;
      }
    }
  }
}

// Law: a step that begins before the one before is finished changes nothing, whatever order the
// streams run in. Budgets are scarce, so that requests lose their memory while their last token is
// still unknown; and slots are few, so that others take theirs over.
TEST(RunAheadTest, ChangesNothing) {
  Arm swapping = PagedArm(4);
  swapping.mutable_paged()->set_preemption(Paged::PREEMPTION_SWAP);
  Arm own_columns = InfinigenArm({.alpha = 2, .max_kv_ratio = 0.2});
  own_columns.mutable_infinigen()->set_columns(Infinigen::COLUMNS_REQUEST);
  own_columns.mutable_infinigen()->set_prefill_history(Infinigen::PREFILL_HISTORY_WHOLE);
  Arm staged = InfinigenArm({.alpha = 2, .max_kv_ratio = 0.2});
  staged.mutable_infinigen()->set_gather(Infinigen::GATHER_STAGED);
  const std::vector<Arm> arms = {
      PagedArm(4),          swapping,
      H2oArm(0.1, 0.1),     SwappingH2oArm(0.3, 0.3),
      StreamingLlmArm(0.2), InfinigenArm({.alpha = 2, .max_kv_ratio = 0.2}),
      own_columns,          staged};
  for (uint64_t seed = 0; seed < 4; ++seed) {
    const auto backend = MakeBackend(
        {.threads = 1, .batch_invariant = true, .shuffle_streams = seed > 0, .stream_seed = seed});
    const auto model = LoadModel(backend.get(), "stories260K");
    Random random(61 + seed);
    const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
    const std::vector<TestRequest> requests = RandomRequests(random, 9, 512, 60, 40);
    for (size_t i = 0; i < arms.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "arm " << i << " seed " << seed);
      EngineOptions options = SmallEngine(128);
      options.max_sequences = 4;
      options.graphs = seed % 2 == 0;
      absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
          InferenceEngine::Create(backend.get(), model.get(), arms[i], options, calibration);
      ASSERT_TRUE(engine.ok()) << engine.status();
      const KvManager& manager = (*engine)->manager();
      options.device_bytes =
          manager.FixedBytes().device + 5 * manager.PeakBytes({60, 40}).device / 2;
      engine->reset();
      const absl::StatusOr<TestRun> waiting =
          RunRequests(backend.get(), *model, arms[i], options, requests, calibration);
      const absl::StatusOr<TestRun> ahead = RunRequests(
          backend.get(), *model, arms[i], options, requests, calibration, {}, {.run_ahead = true});
      ASSERT_TRUE(waiting.ok() && ahead.ok()) << waiting.status() << ahead.status();
      EXPECT_EQ(ahead->outputs, waiting->outputs);
      EXPECT_EQ(ahead->attended, waiting->attended);
      EXPECT_EQ(ahead->traffic.to_host, waiting->traffic.to_host);
      EXPECT_EQ(waiting->steps_ahead, 0);
      const bool packs = &arms[i] == &arms.back();  // the host's work in every step
      EXPECT_GT(ahead->steps_ahead, packs ? -1 : ahead->steps / 3);
    }
  }
}

// Where numbers mean nothing, what a step costs is all that is wanted of it: the same time, the
// same bytes and the same entries as when every number is computed.
TEST(CostsAloneTest, ModelledTimeIsThatOfComputedNumbers) {
  Random random(8);
  const std::vector<TestRequest> requests = RandomRequests(random, 6, 64, 120, 30);
  for (Arm arm : TightArms()) {
    if (arm.has_infinigen()) arm.mutable_infinigen()->set_force_fetch_ratio(0.2);
    SCOPED_TRACE(arm.strategy());
    TestRun computed;
    int64_t computed_ns = 0;
    for (const bool costs_alone : {false, true}) {
      const auto backend = MakeBackend({.threads = 2,
                                        .modelled = FindDeviceProfile("laptop").value(),
                                        .costs_alone = costs_alone});
      const auto model = RandomModel(backend.get(), "tiny-llama");
      const absl::StatusOr<TestRun> run = RunRequests(backend.get(), *model, arm, SmallEngine(160),
                                                      requests, RandomIds(random, 64, 64));
      ASSERT_TRUE(run.ok()) << run.status();
      if (!costs_alone) {
        computed = *run;
        computed_ns = backend->modelled_ns();
        continue;
      }
      EXPECT_EQ(backend->modelled_ns(), computed_ns);
      EXPECT_EQ(run->steps, computed.steps);
      EXPECT_EQ(run->attended, computed.attended);
      EXPECT_EQ(run->traffic.to_device, computed.traffic.to_device);
      EXPECT_EQ(run->traffic.to_host, computed.traffic.to_host);
    }
  }
}

// Law: graphs that were captured before anything ran are the graphs that are needed, and all of
// them.
TEST(CaptureTest, GraphsCapturedBeforehandServeEveryStep) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  Arm on_host = H2oArm(0.2, 0.2);
  on_host.mutable_h2o()->set_tier(H2o::TIER_HOST);
  std::vector<Arm> arms = TightArms();
  arms.push_back(on_host);
  Random random(71);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  const std::vector<TestRequest> requests = RandomRequests(random, 9, 512, 150, 60);
  for (size_t i = 0; i < arms.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "arm " << i);
    const absl::StatusOr<TestRun> late =
        RunRequests(backend.get(), *model, arms[i], SmallEngine(256), requests, calibration);
    const absl::StatusOr<TestRun> early =
        RunRequests(backend.get(), *model, arms[i], SmallEngine(256), requests, calibration, {},
                    {.run_ahead = true, .capture_first = true});
    ASSERT_TRUE(late.ok() && early.ok()) << late.status() << early.status();
    EXPECT_EQ(early->outputs, late->outputs);
    EXPECT_EQ(early->traffic.to_device, late->traffic.to_device);
  }
}

// Law: reserved bytes never exceed the budget, and every request completes under pressure. Swept
// over random budgets.
TEST(PressureTest, EveryRequestCompletesWithinItsBudget) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
    const std::vector<TestRequest> requests = RandomRequests(random, 10, 512, 100, 28);
    for (const Arm& arm : TightArms()) {
      EngineOptions options = SmallEngine(128);
      // From just above what one request needs to what several do.
      options.device_bytes = 400'000 + random.Uniform(600'000);
      absl::StatusOr<TestRun> run =
          RunRequests(backend.get(), *model, arm, options, requests, calibration);
      ASSERT_TRUE(run.ok()) << arm.strategy() << ": " << run.status();
      for (size_t i = 0; i < requests.size(); ++i) {
        EXPECT_EQ(run->outputs[i].size(), static_cast<size_t>(requests[i].output_tokens));
      }
    }
  }
}

// Preemption by recompute (paged) and by offload (infinigen) gives the tokens of an unpreempted
// run.
TEST(PressureTest, PreemptedRequestsGiveTheSameTokens) {
  const auto backend = MakeBackend({.threads = 2, .batch_invariant = true});
  const auto model = LoadModel(backend.get(), "stories260K");
  Random random(77);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  std::vector<TestRequest> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back({.prompt = RandomIds(random, 40, 512), .output_tokens = 80});
  }
  for (const Arm& arm :
       {PagedArm(4), InfinigenArm({.alpha = 2, .max_kv_ratio = 0.2}), SwappingH2oArm(0.3, 0.3)}) {
    const EngineOptions ample = SmallEngine(128);
    absl::StatusOr<TestRun> unpreempted =
        RunRequests(backend.get(), *model, arm, ample, requests, calibration);
    ASSERT_TRUE(unpreempted.ok());
    // Room for the fixed structures and for about half of what the requests grow to.
    EngineOptions tight = ample;
    absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
        InferenceEngine::Create(backend.get(), model.get(), arm, ample, calibration);
    ASSERT_TRUE(engine.ok());
    const KvManager& manager = (*engine)->manager();
    tight.device_bytes = manager.FixedBytes().device + 3 * manager.PeakBytes({40, 80}).device;
    engine->reset();
    absl::StatusOr<TestRun> preempted =
        RunRequests(backend.get(), *model, arm, tight, requests, calibration);
    ASSERT_TRUE(preempted.ok()) << preempted.status();
    EXPECT_GT(std::ranges::max(preempted->preemptions), 0) << arm.strategy();
    EXPECT_EQ(std::ranges::max(unpreempted->preemptions), 0) << arm.strategy();
    EXPECT_EQ(preempted->outputs, unpreempted->outputs) << arm.strategy();
  }
}

// ------------------------------------------------------------------------------------- planted
// mistakes

// Forgets one of the waits that order its streams.
class MissingWaitBackend : public CpuBackend {
 public:
  MissingWaitBackend(const CpuBackendOptions& options, Stream stream)
      : CpuBackend(options), stream_(stream) {}
  void WaitEvent(Event event, Stream stream) override {
    if (stream != stream_) CpuBackend::WaitEvent(event, stream);
  }

 private:
  Stream stream_;
};

// Passes lengths and positions as they were when the call was made: right in an eager step, baked
// into a graph.
class BakedScalarBackend : public CpuBackend {
 public:
  using CpuBackend::CpuBackend;
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    DecodeAttentionArgs baked = args;
    baked.view.length = Bake(args.view.length, args.rows * args.view.length_stride);
    CpuBackend::DecodeAttention(baked, stream);
  }
  void EvictHeavy(const EvictHeavyArgs& args, Stream stream) override {
    EvictHeavyArgs baked = args;
    baked.position = Bake(args.position, args.rows);
    CpuBackend::EvictHeavy(baked, stream);
  }
  void BeginCapture() override {
    // The step state's copy is enqueued; now it has arrived, and its values are there to be baked.
    KVSWEEP_CHECK_OK(WaitAll());
    capturing_ = true;
    CpuBackend::BeginCapture();
  }
  absl::StatusOr<Graph> EndCapture() override {
    capturing_ = false;
    return CpuBackend::EndCapture();
  }

 private:
  const int32_t* Bake(const int32_t* values, int32_t count) {
    if (!capturing_) KVSWEEP_CHECK_OK(WaitAll());
    absl::StatusOr<std::byte*> copy =
        Allocate(Tier::kDevice, sizeof(int32_t) * static_cast<uint64_t>(count));
    KVSWEEP_CHECK_OK(copy);
    auto* baked = reinterpret_cast<int32_t*>(*copy);
    std::copy_n(values, count, baked);
    return baked;
  }
  bool capturing_ = false;
};

struct Tokens {
  std::vector<std::vector<int32_t>> outputs;
  bool failed = false;
  bool operator==(const Tokens&) const = default;
};

Tokens RunOn(Backend* backend, const Arm& arm) {
  const auto model = LoadModel(backend, "stories260K");
  Random random(51);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  const std::vector<TestRequest> requests = RandomRequests(random, 3, 512, 60, 60);
  absl::StatusOr<TestRun> run =
      RunRequests(backend, *model, arm, SmallEngine(128), requests, calibration);
  if (!run.ok()) return {.failed = true};
  return {.outputs = run->outputs};
}

TEST(PlantedMistakeTest, AMissingWaitIsSeenWithinAHundredSeeds) {
  const Arm arm = InfinigenArm({.alpha = 2, .max_kv_ratio = 0.3});
  const auto sound = MakeBackend({.threads = 1, .batch_invariant = true});
  const Tokens expected = RunOn(sound.get(), arm);
  for (const Stream forgetful :
       {Stream::kCompute, Stream::kSpeculation, Stream::kHostToDevice, Stream::kDeviceToHost}) {
    bool seen = false;
    uint64_t seed = 1;
    for (; seed <= 100 && !seen; ++seed) {
      MissingWaitBackend backend(
          {.threads = 1, .batch_invariant = true, .shuffle_streams = true, .stream_seed = seed},
          forgetful);
      seen = RunOn(&backend, arm) != expected;
    }
    EXPECT_TRUE(seen) << "stream " << static_cast<int>(forgetful);
    std::printf("a missing wait on stream %d was seen with seed %d\n", static_cast<int>(forgetful),
                static_cast<int>(seed - 1));
  }
}

TEST(PlantedMistakeTest, ABakedInScalarIsSeen) {
  for (const Arm& arm : TightArms()) {
    const auto sound = MakeBackend({.threads = 1, .batch_invariant = true});
    const Tokens expected = RunOn(sound.get(), arm);
    BakedScalarBackend backend({.threads = 1, .batch_invariant = true});
    EXPECT_NE(RunOn(&backend, arm), expected) << arm.strategy();
  }
}

}  // namespace
}  // namespace kvsweep
