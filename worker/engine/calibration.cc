#include "worker/engine/calibration.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/parallel_for.h"
#include "base/status_macros.h"
#include "worker/engine/engine.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/paged.h"

namespace kvsweep {
namespace {

// Full attention inside one chunk that copies queries and keys out; it holds no cache.
class CaptureStrategy : public CacheStrategy {
 public:
  CaptureStrategy(const StrategyContext& context, std::byte* memory)
      : context_(context),
        memory_(memory),
        zeros_(context.step_state->Add(context.max_rows)),
        manager_(PagedLayout{}) {}
  ~CaptureStrategy() override { context_.backend->Free(memory_); }

  // Elements of one layer: queries [rows, Hq, d], then keys [rows, Hk, d].
  static int64_t LayerElements(const StrategyContext& context) {
    return int64_t{context.max_rows} * (context.shape.query_heads + context.shape.kv_heads) *
           context.shape.head_dim;
  }

  KvManager& manager() override { return manager_; }
  void BeginStep(const StepView& step) override {
    std::ranges::fill(context_.step_state->Host(zeros_), 0);
  }
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override {
    RotateQueriesAndKeys(context_, step, inputs);
    CopyOut(step, inputs.query, context_.shape.query_heads, QueriesOf(layer));
    CopyOut(step, inputs.key, context_.shape.kv_heads, KeysOf(layer));
    context_.backend->PrefillAttention(PrefillCall(context_, step.prefill[0], inputs, out, {}, 0),
                                       Stream::kCompute);
  }
  void EndStep(const StepView& step) override {}
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override {
    return {};
  }

  LayerSkewing Skew(int32_t layer, int32_t tokens) const {
    const SkewingSizes sizes{.tokens = tokens,
                             .query_heads = context_.shape.query_heads,
                             .kv_heads = context_.shape.kv_heads,
                             .head_dim = context_.shape.head_dim};
    const auto columns = static_cast<size_t>(tokens * context_.shape.head_dim);
    return ComputeSkewing({QueriesOf(layer), columns * static_cast<size_t>(sizes.query_heads)},
                          {KeysOf(layer), columns * static_cast<size_t>(sizes.kv_heads)}, sizes);
  }

 private:
  float* QueriesOf(int32_t layer) const {
    return reinterpret_cast<float*>(memory_) + layer * LayerElements(context_);
  }
  float* KeysOf(int32_t layer) const {
    return QueriesOf(layer) +
           int64_t{context_.max_rows} * context_.shape.query_heads * context_.shape.head_dim;
  }
  // Row t to slot t of one contiguous block in host memory, as f32 whatever the activations are.
  void CopyOut(const StepView& step, const Activations& source, int32_t heads, float* target) {
    const int64_t width = int64_t{heads} * context_.shape.head_dim;
    context_.backend->Append({.target = {.key = reinterpret_cast<std::byte*>(target),
                                         .dtype = DType::kF32,
                                         .block_size = context_.max_rows,
                                         .block_stride = width * context_.max_rows,
                                         .token_stride = width,
                                         .head_stride = context_.shape.head_dim},
                              .key = source,
                              .table_row = context_.step_state->Device(zeros_),
                              .slot = step.position,
                              .rows = step.rows,
                              .kv_heads = heads,
                              .head_dim = context_.shape.head_dim},
                             Stream::kCompute);
  }

  StrategyContext context_;
  std::byte* memory_;
  StepState::Field zeros_;
  PagedManager manager_;  // empty: nothing is ever admitted
};

absl::StatusOr<std::shared_ptr<const Skewing>> RunCalibration(Backend* backend,
                                                              const LoadedModel* model,
                                                              std::span<const int32_t> ids) {
  const auto tokens = static_cast<int32_t>(ids.size());
  const EngineOptions options{.max_sequences = 1,
                              .max_batched_tokens = tokens,
                              .max_context = tokens,
                              .graphs = false,
                              .device_bytes = std::numeric_limits<uint64_t>::max(),
                              .host_bytes = std::numeric_limits<uint64_t>::max()};
  CaptureStrategy* capture = nullptr;
  ASSIGN_OR_RETURN(
      std::unique_ptr<InferenceEngine> engine,
      InferenceEngine::CreateWith(
          backend, model, options,
          [&](const StrategyContext& context) -> absl::StatusOr<std::unique_ptr<CacheStrategy>> {
            const auto elements = static_cast<uint64_t>(CaptureStrategy::LayerElements(context) *
                                                        context.shape.layers);
            ASSIGN_OR_RETURN(std::byte * memory,
                             AllocateFor(context, Tier::kHost, elements * sizeof(float),
                                         "calibration queries and keys"));
            auto strategy = std::make_unique<CaptureStrategy>(context, memory);
            capture = strategy.get();
            return strategy;
          }));
  engine->AddSequence(0, ids, tokens);
  StepPlan plan;
  plan.prefill.push_back({.rows = tokens, .last_chunk = true});
  RETURN_IF_ERROR(engine->Execute(plan).status());
  auto skewing = std::make_shared<Skewing>();
  skewing->layers.resize(static_cast<size_t>(model->config().layers));
  ParallelFor(skewing->layers.size(), [&](size_t layer) {
    skewing->layers[layer] = capture->Skew(static_cast<int32_t>(layer), tokens);
  });
  return skewing;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Skewing>> CalibrateSkewing(Backend* backend,
                                                                const LoadedModel* model,
                                                                std::span<const int32_t> ids) {
  const ModelConfig& config = model->config();
  const auto tokens =
      static_cast<int32_t>(std::min(ids.size(), static_cast<size_t>(config.max_positions)));
  if (tokens < config.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("infinigen: calibration has ", tokens,
                                                   " tokens, needs at least ", config.head_dim,
                                                   " (a head's dimension); give a longer text"));
  }
  ids = ids.first(static_cast<size_t>(tokens));
  const Digest key =
      Sha256({reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(int32_t)});
  auto found = model->skewing_cache().find(key);
  if (found != model->skewing_cache().end()) return found->second;
  ASSIGN_OR_RETURN(std::shared_ptr<const Skewing> skewing, RunCalibration(backend, model, ids));
  model->skewing_cache().emplace(key, skewing);
  return skewing;
}

}  // namespace kvsweep
