// Paged with real tensors: whatever the pages, the sharing, the preemption, the numbers are those
// of one contiguous cache. In batch-invariant mode to the bit.
#include "worker/strategies/memory_model.h"
#include "worker/strategies/paged.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/worker/engine/engine_fixture.h"

namespace kvsweep {
namespace {

constexpr int32_t kVocabulary = 512;

// Requests as the tests need them: with further samples, all there from the beginning.
struct Prompt {
  std::vector<int32_t> tokens;
  int32_t output_tokens = 1;
  int32_t samples = 1;
};

struct Observed {
  // By request, samples counted on their own.
  std::map<RequestId, std::vector<int32_t>> outputs;
  std::map<RequestId, int32_t> preemptions;
  // Digest of the logits behind each stored token, by request and position.
  std::map<std::pair<RequestId, int32_t>, Digest> logits;
  std::map<std::string, double> figures;
  std::map<RequestId, int32_t> computed;  // rows of its prompt
  int32_t mixed_steps = 0;                // with prompts and decodes
  int32_t most_rows = 0;
  int32_t overlapped_steps = 0;  // in which somebody's swap-in was under way
};

class PagedTest : public testing::Test {
 protected:
  Observed Run(const Paged& parameters, const std::vector<Prompt>& prompts,
               const EngineOptions& options) {
    Arm arm;
    arm.set_strategy("paged");
    *arm.mutable_paged() = parameters;
    absl::StatusOr<std::unique_ptr<InferenceEngine>> created =
        InferenceEngine::Create(backend_.get(), model_.get(), arm, options, {});
    KVSWEEP_CHECK_OK(created);
    InferenceEngine& engine = **created;
    Batcher batcher(engine.batcher_options(), &engine.manager());
    Observed seen;
    std::map<RequestId, size_t> prompt_tokens;
    RequestId next = 0;
    for (const Prompt& prompt : prompts) {
      const auto length = static_cast<int32_t>(prompt.tokens.size());
      const RequestId first = next;
      std::vector<RequestId> samples;
      for (int32_t rank = 0; rank < prompt.samples; ++rank, ++next) {
        engine.AddSequence(next, prompt.tokens, length, rank);
        prompt_tokens[next] = prompt.tokens.size();
        if (rank > 0) samples.push_back(next);
      }
      const RequestShape shape{length, prompt.output_tokens, length + prompt.output_tokens};
      const bool forks = engine.manager().can_fork();
      EXPECT_TRUE(batcher.Add(first, shape, prompt.output_tokens,
                              forks ? samples : std::vector<RequestId>()));
      for (const RequestId sample : forks ? std::vector<RequestId>() : samples) {
        EXPECT_TRUE(batcher.Add(sample, shape, prompt.output_tokens));
      }
    }
    while (!batcher.idle()) {
      const StepPlan& plan = batcher.Plan();
      absl::StatusOr<StepResult> step = engine.Execute(plan);
      KVSWEEP_CHECK_OK(step);
      Book(plan, *step, &seen);
      seen.overlapped_steps += plan.decode.size() + plan.prefill.size() <
                               static_cast<size_t>(batcher.running()) - plan.samples.size();
      for (const RequestId id : batcher.Complete().finished) {
        const std::span<const int32_t> tokens = engine.Tokens(id);
        seen.outputs[id].assign(tokens.begin() + static_cast<std::ptrdiff_t>(prompt_tokens.at(id)),
                                tokens.end());
        seen.preemptions[id] = batcher.tally(id).preemptions;
      }
      batcher.CheckInvariants();
    }
    for (const CacheStrategy::Figure& figure : engine.strategy().Figures()) {
      seen.figures[figure.name] = figure.value;
    }
    EXPECT_EQ(engine.manager().ReservedBytes().device, engine.manager().FixedBytes().device);
    return seen;
  }

  static void Book(const StepPlan& plan, const StepResult& step, Observed* seen) {
    seen->mixed_steps += !plan.decode.empty() && !plan.prefill.empty();
    int32_t rows = 0;
    for (const Segment& segment : plan.prefill) {
      rows += segment.rows;
      seen->computed[segment.request] += segment.rows;
    }
    seen->most_rows = std::max(seen->most_rows, rows);
    for (size_t i = 0; i < plan.decode.size() && !step.logits.empty(); ++i) {
      const std::span<const float> row = step.logits.subspan(i * kVocabulary, kVocabulary);
      const Digest digest = Sha256({reinterpret_cast<const char*>(row.data()), row.size_bytes()});
      seen->logits[{plan.decode[i].request, plan.decode[i].start_position}] = digest;
    }
  }

  // Of all decoded tokens; those that a recompute made part of a prompt are not among them.
  static void ExpectSameLogits(const Observed& seen, const Observed& expected) {
    EXPECT_GT(seen.logits.size(), 50u);
    for (const auto& [token, digest] : seen.logits) {
      ASSERT_EQ(digest, expected.logits.at(token))
          << "request " << token.first << " position " << token.second;
    }
  }

  void UseBackend(const CpuBackendOptions& options) {
    model_.reset();  // lies on the backend
    backend_ = MakeBackend(options);
    model_ = LoadModel(backend_.get(), "stories260K");
  }

  static EngineOptions Options() {
    return {.max_sequences = 8,
            .max_batched_tokens = 64,
            .max_context = 160,
            .logits = LogitsMode::kLast,
            .device_bytes = uint64_t{16} << 20,
            .host_bytes = uint64_t{16} << 20};
  }

  // Device bytes for so many pages.
  static uint64_t BytesFor(const Paged& parameters, int32_t pages, const EngineOptions& options,
                           const LoadedModel& model, const Backend& backend) {
    StrategySizes sizes{.shape = model.shape(),
                        .kv_dtype = options.kv_dtype,
                        .activation_dtype = backend.info().activation_dtype,
                        .device_bytes = options.device_bytes,
                        .host_bytes = options.host_bytes,
                        .max_sequences = options.max_sequences,
                        .max_context = options.max_context,
                        .max_rows = options.max_batched_tokens,
                        .max_decode_rows = PaddedDecodeRows(options.max_sequences)};
    const PagedLayout layout = *PagedLayoutOf(parameters, sizes);
    return layout.fixed_bytes + static_cast<uint64_t>(pages) * layout.page_bytes();
  }

  std::vector<Prompt> Prompts(int count, int32_t prompt_tokens, int32_t output_tokens) {
    std::vector<Prompt> prompts;
    for (int i = 0; i < count; ++i) {
      prompts.push_back(
          {RandomIds(random_, static_cast<size_t>(prompt_tokens + 3 * i), kVocabulary),
           output_tokens});
    }
    return prompts;
  }

  static Paged Parameters(uint32_t block_size) {
    Paged paged;
    paged.set_block_size(block_size);
    return paged;
  }

  std::unique_ptr<Backend> backend_ = MakeBackend({.threads = 2, .batch_invariant = true});
  std::unique_ptr<LoadedModel> model_ = LoadModel(backend_.get(), "stories260K");
  Random random_{17};
};

// Invariant 1. The reference holds each request in one block.
TEST_F(PagedTest, AnyBlockSizeAndAnyOrderOfPagesGiveTheLogitsOfAContiguousCache) {
  const std::vector<Prompt> prompts = Prompts(5, 40, 30);
  Paged contiguous = Parameters(160);
  contiguous.set_reservation(Paged::RESERVATION_MAX);
  const Observed expected = Run(contiguous, prompts, Options());
  ASSERT_GT(expected.logits.size(), 100u);
  for (const uint32_t block_size : {1u, 3u, 8u, 16u, 64u, 128u}) {
    // Requests grow side by side, so their pages lie between one another's.
    const Observed paged = Run(Parameters(block_size), prompts, Options());
    EXPECT_EQ(paged.outputs, expected.outputs) << block_size;
    ExpectSameLogits(paged, expected);
  }
}

// Invariant 4. Logits behind every token are compared to the bit, so the keys and values that came
// back are those that left; whatever the order of the streams, so that a missing wait shows.
TEST_F(PagedTest, SwappedAndRecomputedRequestsGoOnAsIfNothingHadHappened) {
  // Some end early, so that others come back, and then long ones push them out again.
  std::vector<Prompt> prompts = Prompts(12, 20, 40);
  for (size_t i = 0; i < prompts.size(); ++i) prompts[i].output_tokens += 20 * (i % 3);
  const Observed expected = Run(Parameters(8), prompts, Options());
  int given_up = 0;
  for (const bool swap : {true, false}) {
    for (uint64_t stream_seed = 0; stream_seed <= (swap ? 12 : 3); ++stream_seed) {
      UseBackend({.threads = 1,
                  .batch_invariant = true,
                  .shuffle_streams = stream_seed > 0,
                  .stream_seed = stream_seed});
      Paged parameters = Parameters(8);
      if (swap) parameters.set_preemption(Paged::PREEMPTION_SWAP);
      EngineOptions options = Options();
      options.device_bytes = BytesFor(parameters, 34, options, *model_, *backend_);
      const Observed scarce = Run(parameters, prompts, options);
      int32_t preemptions = 0;
      for (const auto& [id, count] : scarce.preemptions) preemptions += count;
      EXPECT_GT(preemptions, 0);
      EXPECT_EQ(scarce.outputs, expected.outputs) << "swap " << swap << " seed " << stream_seed;
      ExpectSameLogits(scarce, expected);
      EXPECT_TRUE(!swap || scarce.logits.size() == expected.logits.size());
      if (!swap) continue;
      // A request that is preempted while it arrives comes back by a second copy.
      const double in = scarce.figures.at("swapped_in_bytes");
      const double out = scarce.figures.at("swapped_out_bytes");
      EXPECT_GT(out, 0);
      EXPECT_TRUE(stream_seed > 0 ? in >= out : in == out) << in << " and " << out;
      given_up += in > out;
    }
  }
  EXPECT_GT(given_up, 0) << "nobody was preempted while it arrived";
}

// The step that begins a swap-in does not wait for it: in modelled time it lasts as long as a step
// without, and the request rejoins when its copy has landed.
TEST_F(PagedTest, SwapInOverlapsDecodes) {
  DeviceProfile profile = *FindDeviceProfile("laptop");
  profile.link_bytes_per_s = 2e8;  // a page of 20 KiB takes 0.1 ms, a step a few
  UseBackend({.threads = 2, .batch_invariant = true, .modelled = profile});
  Paged parameters = Parameters(8);
  parameters.set_preemption(Paged::PREEMPTION_SWAP);
  EngineOptions options = Options();
  options.device_bytes = BytesFor(parameters, 34, options, *model_, *backend_);
  const Observed scarce = Run(parameters, Prompts(6, 30, 60), options);
  EXPECT_GT(scarce.overlapped_steps, 0);
  // What was moved, over the time it took: the link's own rate less the fixed costs.
  for (const char* rate : {"swap_in_gb_per_s", "swap_out_gb_per_s"}) {
    EXPECT_GT(scarce.figures.at(rate), 0.1) << rate;
    EXPECT_LE(scarce.figures.at(rate), 0.2) << rate;
  }
}

// Invariant 6.
TEST_F(PagedTest, CachedPrefixesChangeNoToken) {
  std::vector<Prompt> prompts;
  const std::vector<int32_t> common = RandomIds(random_, 50, kVocabulary);
  for (int i = 0; i < 6; ++i) {
    Prompt prompt{.tokens = common, .output_tokens = 20};
    // Some are equal, some go on differently, some differ inside.
    for (int extra = 0; extra < 7 * (i / 2); ++extra) {
      prompt.tokens.push_back(static_cast<int32_t>(3 + random_.Uniform(kVocabulary - 3)));
    }
    if (i == 5) prompt.tokens[20] ^= 1;
    prompts.push_back(std::move(prompt));
  }
  Paged off = Parameters(8);
  off.set_prefix_caching(Paged::PREFIX_CACHING_OFF);
  Paged shared = Parameters(8);
  shared.set_prefix_caching(Paged::PREFIX_CACHING_SHARED);
  const Observed expected = Run(off, prompts, Options());
  const Observed cached = Run(shared, prompts, Options());
  EXPECT_EQ(cached.outputs, expected.outputs);
  ExpectSameLogits(cached, expected);
  // The second prompt is the first: all full pages before its last token are found.
  EXPECT_EQ(cached.computed.at(0), 50);
  EXPECT_EQ(cached.computed.at(1), 2);
  EXPECT_EQ(cached.computed.at(5), static_cast<int32_t>(prompts[5].tokens.size()) - 16);
  EXPECT_EQ(cached.figures.at("prefix_hit_tokens"), 4 * 48 + 16);
  EXPECT_EQ(expected.figures.at("prefix_hit_tokens"), 0);
  EXPECT_GT(cached.figures.at("shared_fraction"), 0.2);
}

// A preempted request finds its own pages again and computes the rest.
TEST_F(PagedTest, OwnPagesMakeRecomputingCheap) {
  const std::vector<Prompt> prompts = Prompts(6, 30, 60);
  std::map<bool, int32_t> computed;
  for (const bool own : {true, false}) {
    Paged parameters = Parameters(8);
    if (!own) parameters.set_prefix_caching(Paged::PREFIX_CACHING_OFF);
    EngineOptions options = Options();
    options.device_bytes = BytesFor(parameters, 34, options, *model_, *backend_);
    for (const auto& [id, rows] : Run(parameters, prompts, options).computed) {
      computed[own] += rows;
    }
  }
  EXPECT_LT(computed[true], computed[false]);
}

// Samples of one prompt begin with different tokens and are then what they would be as requests of
// their own, whether the prompt is computed once and forked or once for each.
TEST_F(PagedTest, ForkedSamplesAreTheContinuationsOfRequestsOfTheirOwn) {
  std::vector<Prompt> prompts = Prompts(3, 21, 20);
  prompts[0].samples = 4;
  prompts[1].samples = 3;
  Paged contiguous = Parameters(8);
  contiguous.set_reservation(Paged::RESERVATION_ORACLE);
  const Observed expected = Run(contiguous, prompts, Options());
  const Observed forked = Run(Parameters(8), prompts, Options());
  EXPECT_EQ(forked.outputs, expected.outputs);
  ExpectSameLogits(forked, expected);
  std::set<int32_t> first;
  for (RequestId id = 0; id < 4; ++id) first.insert(forked.outputs.at(id)[0]);
  EXPECT_EQ(first.size(), 4u);
  // 21 tokens end in the middle of a page: all but the last to append copy it. 24 fill theirs.
  EXPECT_EQ(forked.figures.at("forked_pages"), 3);
  EXPECT_GT(forked.figures.at("shared_fraction"), 0.1);
  int32_t once = 0;
  for (const auto& [id, rows] : forked.computed) once += rows;
  EXPECT_EQ(once, 21 + 24 + 27);
}

// Whole prompts, in steps of their own, the long one too; the same tokens.
TEST_F(PagedTest, WithoutChunksPromptsStallDecodesAndGiveTheSameTokens) {
  std::vector<Prompt> prompts = Prompts(4, 30, 20);
  prompts.push_back({RandomIds(random_, 120, kVocabulary), 10});
  const Observed chunked = Run(Parameters(16), prompts, Options());
  EngineOptions options = Options();
  options.chunked_prefill = false;
  const Observed whole = Run(Parameters(16), prompts, options);
  EXPECT_EQ(whole.outputs, chunked.outputs);
  EXPECT_GT(chunked.mixed_steps, 0);
  EXPECT_EQ(whole.mixed_steps, 0);
  EXPECT_LE(chunked.most_rows, 64);
  EXPECT_EQ(whole.most_rows, 120) << "longer than the budget, in a step of its own";
}

// Half of 16 bit, and a token weighs the same before and after it is stored: chunks change nothing.
TEST_F(PagedTest, Fp8TakesHalfAndDoesNotDependOnChunks) {
  EngineOptions options = Options();
  options.kv_dtype = DType::kF16;
  const uint64_t half = BytesFor(Parameters(16), 1, options, *model_, *backend_) -
                        BytesFor(Parameters(16), 0, options, *model_, *backend_);
  options.kv_dtype = DType::kFp8E4m3;
  EXPECT_EQ(2 * (BytesFor(Parameters(16), 1, options, *model_, *backend_) -
                 BytesFor(Parameters(16), 0, options, *model_, *backend_)),
            half);
  const std::vector<Prompt> prompts = Prompts(3, 50, 20);
  const Observed large = Run(Parameters(16), prompts, options);
  options.max_batched_tokens = 8;
  const Observed small = Run(Parameters(5), prompts, options);
  EXPECT_EQ(small.outputs, large.outputs);
  options.kv_dtype = DType::kF32;
  EXPECT_TRUE(Run(Parameters(16), prompts, options).logits != small.logits) << "eight bits show";
  const absl::Status refused =
      InferenceEngine::Create(
          backend_.get(), model_.get(), H2oArm(0.1, 0.1),
          {.max_context = 100, .kv_dtype = DType::kFp8E4m3, .device_bytes = 1 << 24}, {})
          .status();
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("stored by paged only"));
}

// Pages that no running request can fill are worth something only where others find what finished
// requests left in them: there the whole budget is used.
TEST_F(PagedTest, TheWholeBudgetRemembersSharedPrefixes) {
  std::vector<Prompt> prompts = Prompts(12, 64, 2);
  for (int i = 0; i < 12; ++i) prompts.push_back(prompts[static_cast<size_t>(i)]);
  EngineOptions options = Options();
  options.max_sequences = 1;
  for (const bool shared : {true, false}) {
    Paged parameters = Parameters(8);
    if (shared) parameters.set_prefix_caching(Paged::PREFIX_CACHING_SHARED);
    // One request takes 20 pages at most, twelve prompts about 120.
    options.device_bytes = BytesFor(parameters, 200, options, *model_, *backend_);
    const Observed seen = Run(parameters, prompts, options);
    // All full pages before each prompt's last token, the second time.
    double hits = 0;
    for (int i = 0; i < 12; ++i) hits += (64 + 3 * i - 1) / 8 * 8;
    EXPECT_EQ(seen.figures.at("prefix_hit_tokens"), shared ? hits : 0);
  }
}

// The formula of the memory model is what lies in the arena, to the byte.
TEST_F(PagedTest, TakesTheBytesOfItsLayout) {
  for (const bool swap : {false, true}) {
    Paged parameters = Parameters(16);
    if (swap) parameters.set_preemption(Paged::PREEMPTION_SWAP);
    parameters.set_watermark(0.25);
    const ModelShape shape = model_->shape();
    StepState state(backend_.get());
    StrategyContext context;
    static_cast<StrategySizes&>(context) = {.shape = shape,
                                            .kv_dtype = DType::kBf16,
                                            .device_bytes = 1'000'000,
                                            .host_bytes = 300'000,
                                            .max_sequences = 5,
                                            .max_context = 200,
                                            .max_rows = 70,
                                            .max_decode_rows = 8};
    context.backend = backend_.get();
    context.step_state = &state;
    const PagedLayout layout = *PagedLayoutOf(parameters, context);
    // 5 layers x 4 heads x (8 + 8) numbers of 2 bytes, 16 tokens.
    EXPECT_EQ(layout.page_bytes(), 16u * 5 * 4 * 16 * 2);
    EXPECT_EQ(layout.watermark_pages, layout.pages / 4);
    const uint64_t device = backend_->allocated_bytes(Tier::kDevice);
    const uint64_t host = backend_->allocated_bytes(Tier::kHost);
    const std::unique_ptr<CacheStrategy> strategy = *PagedStrategy::Create(parameters, context);
    const uint64_t taken = backend_->allocated_bytes(Tier::kDevice) - device + state.device_bytes();
    EXPECT_EQ(taken,
              layout.fixed_bytes + static_cast<uint64_t>(layout.pages) * layout.page_bytes());
    EXPECT_LE(taken, context.device_bytes);
    EXPECT_EQ(backend_->allocated_bytes(Tier::kHost) - host,
              static_cast<uint64_t>(layout.host_pages) * layout.page_bytes());
    EXPECT_EQ(layout.host_pages > 0, swap);
  }
}

}  // namespace
}  // namespace kvsweep
