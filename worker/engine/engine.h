// Executes steps: the model's forward pass over the rows of a step, with attention handed to a
// strategy. Same weights, same operations, same order for every strategy.
//
// The engine owns activations, the step state, captured graphs and the tokens of the sequences in
// it. It does not decide: what a step computes comes from a StepPlan (batcher.h). A step that only
// decodes is padded to a captured size and replayed as a graph.
//
// One step can begin while another is under way: a token that the host has not seen yet is taken
// from where the device put it. So the device need not wait for the host between two steps.
#ifndef KVSWEEP_WORKER_ENGINE_ENGINE_H_
#define KVSWEEP_WORKER_ENGINE_ENGINE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/digest.h"
#include "kernels/backend.h"
#include "kernels/step_state.h"
#include "proto/experiment.pb.h"
#include "worker/engine/batcher.h"
#include "worker/engine/model_config.h"
#include "worker/engine/weights.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/prepared_weights.h"

namespace kvsweep {

// A model whose weights lie on a backend's device; shared by all trials that use it.
class LoadedModel {
 public:
  // Reads a folder (config.json, safetensors). Errors as of LoadModelConfig and LoadWeights;
  // ResourceExhausted when they do not fit.
  static absl::StatusOr<std::unique_ptr<LoadedModel>> Load(Backend* backend,
                                                           const std::string& folder);
  // Random weights for a shape of the catalogue.
  static absl::StatusOr<std::unique_ptr<LoadedModel>> Random(Backend* backend,
                                                             const ModelConfig& config,
                                                             uint64_t seed);
  ~LoadedModel();
  LoadedModel(const LoadedModel&) = delete;
  LoadedModel& operator=(const LoadedModel&) = delete;

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  ModelShape shape() const;

  // Skewing computed for this model so far, by the digest of the calibration ids; arms choose their
  // columns from it. Grows only while trials are prepared.
  using SkewingCache = std::map<Digest, std::shared_ptr<const Skewing>>;
  SkewingCache& skewing_cache() const { return *skewing_cache_; }
  // What arms have computed from the weights so far. Likewise.
  PreparedWeights& prepared_weights() const { return *prepared_weights_; }

 private:
  LoadedModel(Backend* backend, const ModelConfig& config);
  // Puts what is computed from the config alone onto the device.
  absl::Status MakeTables();

  Backend* backend_;
  ModelConfig config_;
  ModelWeights weights_;
  BackendMemory inverse_frequency_;  // [d/2] floats; empty where positions are not rotary
  std::unique_ptr<SkewingCache> skewing_cache_;
  std::unique_ptr<PreparedWeights> prepared_weights_;
};

enum class LogitsMode {
  kNone,  // sampled tokens only
  kLast,  // logits of each decode row and of the last row of each prefill chunk
  kAll,   // logits of every row
};

struct EngineOptions {
  int32_t max_sequences = 64;
  int32_t max_batched_tokens = 512;
  int32_t max_context = 2048;   // tokens of the longest request
  bool chunked_prefill = true;  // false: a step must hold the longest prompt
  bool graphs = true;
  LogitsMode logits = LogitsMode::kNone;
  DType kv_dtype = DType::kF32;
  uint64_t device_bytes = 0;  // the arm's budgets
  uint64_t host_bytes = 0;
};

// What the host learns from a step; valid until the engine's next Begin or Finish.
struct StepResult {
  const StepPlan* plan = nullptr;    // of this step
  std::span<const int32_t> sampled;  // one token for each decode segment, then for each prefill
                                     // segment (meaningful on its last chunk)
  std::span<const float>
      logits;               // [logit rows, V] by LogitsMode: decode rows, then the prefill rows
  int64_t modelled_ns = 0;  // of this step, in modelled time
  // On the device's clock, from the end of the step before to the beginning of this one, and from
  // there to its end; the first step of an engine has no gap.
  double gap_ns = 0;
  double step_ns = 0;
  bool captured = false;  // a graph was captured or replayed
};

// Bytes over the host link.
struct LinkBytes {
  uint64_t to_device = 0;
  uint64_t to_host = 0;
};

class InferenceEngine {
 public:
  using StrategyFactory =
      std::function<absl::StatusOr<std::unique_ptr<CacheStrategy>>(const StrategyContext&)>;

  // Builds the arm's strategy and all buffers for one trial. `calibration` is what a strategy that
  // prepares itself (InfiniGen's skewing) may read: token ids, may be empty for the others.
  // InvalidArgument for parameters that this model cannot have; ResourceExhausted with asked and
  // available bytes when fixed structures exceed the budget or the machine. Backend and model must
  // outlive the engine.
  static absl::StatusOr<std::unique_ptr<InferenceEngine>> Create(
      Backend* backend, const LoadedModel* model, const Arm& arm, const EngineOptions& options,
      std::span<const int32_t> calibration);
  // The same with any strategy; its context has no calibration.
  static absl::StatusOr<std::unique_ptr<InferenceEngine>> CreateWith(
      Backend* backend, const LoadedModel* model, const EngineOptions& options,
      const StrategyFactory& factory);
  ~InferenceEngine();

  CacheStrategy& strategy() { return *strategy_; }
  KvManager& manager() { return strategy_->manager(); }
  const ModelConfig& config() const { return model_->config(); }
  const EngineOptions& options() const { return options_; }
  int32_t chunk_alignment() const { return strategy_->chunk_alignment(); }
  // What a batcher of this engine's steps needs to know.
  BatcherOptions batcher_options() const;

  // Gives a request its tokens: the prompt, and, for teacher forcing, the tokens to feed after it
  // whatever is sampled. The engine appends sampled tokens behind the known ones. The first token
  // after the prompt is the (rank + 1)-th most probable one, so that samples of one prompt differ;
  // all others are the most probable. REQUIRES: id not in use.
  void AddSequence(RequestId request, std::span<const int32_t> tokens, int32_t prompt_tokens,
                   int32_t rank = 0);
  // Tokens of a request: prompt and output so far (or forced).
  std::span<const int32_t> Tokens(RequestId request) const;
  void RemoveSequence(RequestId request);

  // Steps that may be begun and not finished. While strategy().NeedsHost() it is one.
  static constexpr int kMostStepsUnderWay = 2;

  // Enqueues a step. REQUIRES: fewer than kMostStepsUnderWay steps are under way; results of the
  // last finished step are no longer needed.
  absl::Status Begin(const StepPlan& plan);
  // Waits for the step that was begun first and reads what it brought. REQUIRES: a step is under
  // way.
  absl::StatusOr<StepResult> Finish();
  int steps_under_way() const { return static_cast<int>(begun_ - finished_); }
  // Begins a step and finishes it. REQUIRES: none is under way.
  absl::StatusOr<StepResult> Execute(const StepPlan& plan);

  // Counts of decode segment `index` of the step that was finished last, until Begin or Finish is
  // called.
  DecodeCounts CollectDecode(size_t index, std::span<double> attended_by_layer) {
    return strategy_->CollectDecode(FlightAt(finished_ - 1).view, index, attended_by_layer);
  }

  // Captures every step that can be replayed and has not been met yet, so that none is captured
  // while somebody measures. Replays nothing. REQUIRES: no step is under way.
  absl::Status CaptureSteps();
  size_t captured_graphs() const { return graphs_.size(); }
  // Steps are captured anew, for when the backend would capture something else than before.
  // REQUIRES: no step is under way.
  void DropGraphs();

  // What the cache has moved over the host link so far; the step state's arrays, sampled tokens and
  // logits are not counted. Waits for what it still moves. REQUIRES: no step is under way.
  absl::StatusOr<LinkBytes> CacheTraffic();

 private:
  // Activations and what is read back; all rows as wide as the largest step.
  struct Buffers {
    Activations embedded;             // [rows, E]; only where embeddings are projected
    Activations hidden;               // [rows, D], the residual stream
    Activations normed[2];            // [rows, D], inputs of attention, by parity of the layer
    Activations qkv[2];               // [rows, (Hq + 2 Hk) d], by parity of the layer
    Activations attended;             // [rows, Hq d]
    Activations ffn_normed;           // [rows, D]
    Activations ffn_in;               // [rows, 2F] or [rows, F]
    Activations ffn_gated;            // [rows, F]; the same as ffn_in where there is no gate
    Activations last;                 // [logit rows, D]
    Activations last_normed;          // [logit rows, D]
    Activations projected;            // [logit rows, E]; only where embeddings are projected
    Activations logits;               // [logit rows, V], f32
    int32_t* sampled = nullptr;       // [sequence slots]
    int32_t* sampled_host = nullptr;  // [sequence slots], pinned
    float* logits_host = nullptr;     // [logit rows, V], pinned; only when logits are wanted
  };
  // Arrays of the step state.
  struct Arrays {
    StepState::Field token_id;       // [rows]
    StepState::Field position;       // [rows]
    StepState::Field position_row;   // [rows], in the position table; only with projections
    StepState::Field row_active;     // [decode rows]
    StepState::Field logit_row;      // [logit rows], row of the step; -1: none
    StepState::Field sample_target;  // [logit rows], sequence slot; -1: none
    StepState::Field sample_rank;    // [logit rows], 0 but for first tokens of samples
  };
  // A step that has begun, until the one after the next begins.
  struct Flight {
    StepPlan plan;  // its view points into it
    StepView view;
    Event begun;             // on the compute stream, before the step's first operation
    Event done;              // behind what the host reads of the step
    bool read_back = false;  // the reading is enqueued
  };
  struct Sequence {
    std::vector<int32_t> tokens;
    int32_t prompt_tokens = 0;
    int32_t rank = 0;
  };

  InferenceEngine(Backend* backend, const LoadedModel* model, const EngineOptions& options);
  absl::Status Build(const StrategyFactory& factory);
  absl::Status AllocateBuffers();
  absl::StatusOr<Activations> AllocateRows(int64_t rows, int64_t columns, DType dtype);
  Flight& FlightAt(int64_t step) {
    return flights_[static_cast<size_t>(step % kMostStepsUnderWay)];
  }
  StepView MakeView(const StepPlan& plan) const;
  int32_t LogitRows(const StepView& view) const;
  void FillStepState(const StepView& view);
  int32_t TokenToFeed(const Segment& decode) const;
  void FillLogitRows(const StepView& view);
  void FillSamples(const StepView& view);
  void EnqueueForward(const StepView& view);
  void EnqueueEmbedding(const StepView& view);
  void EnqueueLayer(const StepView& view, int32_t layer);
  void EnqueueFfn(const LayerWeights& weights, const Activations& in, const Activations& residual,
                  int32_t rows);
  void EnqueueLogits(const StepView& view);
  absl::Status LaunchCaptured(const StepView& view);
  absl::StatusOr<Graph> CapturedGraph(const StepView& view);
  void EnqueueReadback();
  void ReadSampled(const StepPlan& plan);
  uint64_t ReadbackBytes(const StepView& view) const;

  Backend* backend_;
  const LoadedModel* model_;
  EngineOptions options_;
  int32_t max_decode_rows_;
  int32_t max_rows_;
  int32_t max_logit_rows_;
  std::vector<std::byte*> memory_;
  Buffers buffers_;
  Arrays arrays_;
  std::unique_ptr<StepState> step_state_;
  std::unique_ptr<CacheStrategy> strategy_;
  std::map<RequestId, Sequence> sequences_;
  std::map<std::pair<int32_t, int32_t>, Graph> graphs_;  // by (padded rows, strategy's key)
  std::array<Flight, kMostStepsUnderWay> flights_;       // by parity of the step
  int64_t begun_ = 0;                                    // steps
  int64_t finished_ = 0;                                 // of these
  std::vector<int32_t> sampled_;                         // of the last finished step, by segment
  int64_t modelled_ns_ = 0;                              // of all steps so far
  LinkBytes link_before_;                                // the engine's first step
  LinkBytes control_;                                    // since then, but not the cache's
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_ENGINE_H_
