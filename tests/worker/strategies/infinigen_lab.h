// InfiniGen under observation: a backend that looks at each operation of its decode steps as it
// runs, a few sequences carried by hand, and models of any shape.
#ifndef KVSWEEP_TESTS_WORKER_STRATEGIES_INFINIGEN_LAB_H_
#define KVSWEEP_TESTS_WORKER_STRATEGIES_INFINIGEN_LAB_H_

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "kernels/cpu/kv_rows.h"
#include "tests/worker/engine/engine_fixture.h"
#include "worker/engine/manual_steps.h"
#include "worker/strategies/infinigen.h"

namespace kvsweep {

// One decode row at one speculating layer, as the kernels saw it.
struct Observed {
  int32_t row = 0;
  int32_t layer = 0;                       // counted among the speculating ones
  std::vector<std::vector<float>> margin;  // by KV head: n
  std::vector<int32_t> count;              // by KV head
  int32_t limit = 0;
  std::vector<std::vector<int32_t>> selected;   // by KV head: slots
  std::vector<std::vector<int32_t>> positions;  // by KV head: of the slots, if they remember them
  std::vector<std::vector<float>> key;          // by KV head: [n, d], from the host pool
  std::vector<float> query;                     // [Hq, d], the true one
};

// Runs every operation at once (eager steps only) and keeps what a decode step selected from what.
class ObservingBackend : public CpuBackend {
 public:
  explicit ObservingBackend(const CpuBackendOptions& options) : CpuBackend(options) {}

  // Of all steps since the last Take, in order of layers.
  std::vector<Observed> Take() { return std::exchange(done_, {}); }

  void Speculate(const SpeculateArgs& args, Stream stream) override {
    CpuBackend::Speculate(args, stream);
    KVSWEEP_CHECK_OK(WaitAll());
    speculated_ = args;
  }
  void SelectTop(const SelectTopArgs& args, Stream stream) override {
    CpuBackend::SelectTop(args, stream);
    KVSWEEP_CHECK_OK(WaitAll());
    selected_ = args;
  }
  void GatherRows(const GatherRowsArgs& args, Stream stream) override {
    CpuBackend::GatherRows(args, stream);
    KVSWEEP_CHECK_OK(WaitAll());
    std::vector<Observed> layer;
    for (int32_t row = 0; row < args.rows; ++row) layer.push_back(Look(args, row));
    waiting_.push_back(std::move(layer));
    selected_of_.push_back(args.selected);
  }
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    if (!selected_of_.empty() && args.view.length == selected_of_.front()) {
      KVSWEEP_CHECK_OK(WaitAll());
      for (Observed& observed : waiting_.front()) {
        const auto* query =
            static_cast<const float*>(args.query.data) + observed.row * args.query.stride;
        observed.query.assign(query, query + args.query_heads * args.head_dim);
        observed.layer = layer_;
        if (!observed.selected.empty()) done_.push_back(std::move(observed));
      }
      ++layer_;
      waiting_.pop_front();
      selected_of_.pop_front();
    }
    CpuBackend::DecodeAttention(args, stream);
  }
  void BeginStep() { layer_ = 0; }

 private:
  Observed Look(const GatherRowsArgs& args, int32_t row) {
    Observed observed{.row = row};
    const int32_t n = selected_.length[row];
    if (n == 0 || (args.row_active != nullptr && args.row_active[row] == 0)) return observed;
    observed.limit = selected_.limit[row];
    for (int32_t head = 0; head < args.kv_heads; ++head) {
      const int64_t pair = int64_t{row} * args.kv_heads + head;
      const float* const margin = speculated_.margin + pair * speculated_.margin_stride;
      observed.margin.emplace_back(margin, margin + n);
      observed.count.push_back(speculated_.count[pair]);
      const int32_t* const index = args.index + pair * args.index_stride;
      observed.selected.emplace_back(index, index + args.selected[pair]);
      observed.key.emplace_back();
      observed.positions.emplace_back();
      for (int32_t slot = 0; slot < n; ++slot) {
        std::vector<float> key(static_cast<size_t>(args.head_dim));
        cpu::LoadElements(key.data(), args.source.key, args.source.dtype,
                          cpu::KvOffset(args.source, row, slot, head), args.head_dim);
        observed.key.back().insert(observed.key.back().end(), key.begin(), key.end());
        const SlotView& position = selected_.slot_position;
        if (position.data == nullptr) continue;
        observed.positions.back().push_back(
            static_cast<const int32_t*>(position.data)[cpu::SlotOffset(position, row, slot, head)]);
      }
    }
    return observed;
  }

  SpeculateArgs speculated_;
  SelectTopArgs selected_;
  std::deque<std::vector<Observed>> waiting_;  // gathered, not attended to yet
  std::deque<const int32_t*> selected_of_;
  int32_t layer_ = 0;
  std::vector<Observed> done_;
};

struct LabShape {
  bool rotary = true;
  int32_t layers = 4;
  int32_t group = 1;
  int32_t kv_heads = 2;
  int32_t head_dim = 8;
};

inline ModelConfig ConfigOf(const LabShape& shape) {
  ModelConfig config =
      ArchitectureFeatures(shape.rotary ? Architecture::kLlama : Architecture::kOpt);
  config.hidden_size = 48;
  config.embedding_size = 48;
  config.layers = shape.layers;
  config.kv_heads = shape.kv_heads;
  config.query_heads = shape.group * shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.ffn_size = 64;
  config.vocabulary = 97;
  config.max_positions = 512;
  config.position_offset = shape.rotary ? 0 : 2;
  config.dtype = DType::kF32;
  return config;
}

// Groups of 1, 2, 3, 4 and 7, head dimensions of 8, 64 and 128, both kinds of positions.
inline std::vector<LabShape> LabShapes() {
  return {{.rotary = true, .group = 1, .kv_heads = 3, .head_dim = 8},
          {.rotary = false, .group = 1, .kv_heads = 2, .head_dim = 64},
          {.rotary = true, .group = 2, .kv_heads = 2, .head_dim = 64},
          {.rotary = false, .group = 3, .kv_heads = 1, .head_dim = 8},
          {.rotary = true, .group = 4, .kv_heads = 1, .head_dim = 128},
          {.rotary = true, .group = 7, .kv_heads = 1, .head_dim = 64}};
}

// Queries and keys of random weights are so small that all tokens weigh the same; weights of this
// seed are as drawn, and the tests that need peaks use trained models.
inline std::unique_ptr<LoadedModel> MakeModel(Backend* backend, const LabShape& shape) {
  absl::StatusOr<std::unique_ptr<LoadedModel>> model =
      LoadedModel::Random(backend, ConfigOf(shape), 17);
  KVSWEEP_CHECK_OK(model);
  return *std::move(model);
}

// A few sequences with tokens of their own, all prefilled, then decoded side by side.
class Lab {
 public:
  // `text`: what calibration and sequences are cut from; empty: random ids.
  Lab(Backend* backend, const LoadedModel* model, const Arm& arm, EngineOptions options,
      std::vector<int32_t> text = {})
      : backend_(*backend), text_(std::move(text)) {
    options.logits = LogitsMode::kLast;
    Random random(5);
    const std::vector<int32_t> calibration =
        text_.empty() ? RandomIds(random, 256, model->config().vocabulary)
                      : std::vector<int32_t>(text_.end() - 1024, text_.end());
    absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
        InferenceEngine::Create(backend, model, arm, options, calibration);
    KVSWEEP_CHECK_OK(engine);
    engine_ = *std::move(engine);
  }

  InferenceEngine& engine() { return *engine_; }
  // REQUIRES: the arm is infinigen.
  InfinigenStrategy& strategy() { return dynamic_cast<InfinigenStrategy&>(engine_->strategy()); }

  // The tokens depend on the id alone.
  void Start(RequestId id, int32_t prompt, int32_t limit) {
    Random random(MixSeed(99, static_cast<uint64_t>(id)));
    std::vector<int32_t> tokens =
        RandomIds(random, static_cast<size_t>(limit), engine_->config().vocabulary);
    if (!text_.empty()) std::copy_n(text_.begin() + 500 * id, limit - 1, tokens.begin() + 1);
    shapes_[id] = {prompt, limit - prompt};
    held_[id] = prompt;
    engine_->AddSequence(id, tokens, prompt);
    KVSWEEP_CHECK_OK(PrefillPrompt(engine_.get(), id, shapes_[id], {}));
  }

  // Decodes one token of each of these; returns their logits, [ids][V].
  std::vector<std::vector<float>> Decode(const std::vector<RequestId>& ids) {
    StepPlan plan;
    for (const RequestId id : ids) {
      KVSWEEP_CHECK_OK(HoldTokens(engine_.get(), id, shapes_[id], held_[id], 1));
      plan.decode.push_back({.request = id,
                             .slot = id,
                             .first_row = static_cast<int32_t>(plan.decode.size()),
                             .rows = 1,
                             .start_position = held_[id]++});
    }
    if (auto* observing = dynamic_cast<ObservingBackend*>(&backend_)) observing->BeginStep();
    const LinkBytes before = engine_->CacheTraffic().value();
    absl::StatusOr<StepResult> result = engine_->Execute(plan);
    KVSWEEP_CHECK_OK(result);
    counts.clear();
    for (size_t i = 0; i < ids.size(); ++i) counts.push_back(engine_->CollectDecode(i, {}));
    const auto vocabulary = static_cast<size_t>(engine_->config().vocabulary);
    std::vector<std::vector<float>> logits;
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto row = result->logits.subspan(i * vocabulary, vocabulary);
      logits.emplace_back(row.begin(), row.end());
    }
    const LinkBytes after = engine_->CacheTraffic().value();
    traffic_ = {after.to_device - before.to_device, after.to_host - before.to_host};
    return logits;
  }

  const LinkBytes& traffic() const { return traffic_; }  // of the last step of decodes
  int32_t held(RequestId id) const { return held_.at(id); }
  std::vector<DecodeCounts> counts;  // of the last step, by row

 private:
  Backend& backend_;
  std::vector<int32_t> text_;
  std::unique_ptr<InferenceEngine> engine_;
  std::map<RequestId, RequestShape> shapes_;
  std::map<RequestId, int32_t> held_;
  LinkBytes traffic_;
};

// Held-out text of a books model, as ids.
inline std::vector<int32_t> HeldOutIds(const std::string& model) {
  const std::string bytes =
      *ReadFile("experiments/models/" + model + "/val_ids_u16.npy", int64_t{1} << 20);
  std::vector<int32_t> ids;
  for (size_t i = 128; i + 1 < bytes.size() && ids.size() < 8192; i += 2) {
    ids.push_back(static_cast<uint8_t>(bytes[i]) | static_cast<uint8_t>(bytes[i + 1]) << 8);
  }
  return ids;
}

inline EngineOptions LabOptions() {
  return {.max_sequences = 4,
          .max_batched_tokens = 128,
          .max_context = 200,
          .graphs = false,
          .device_bytes = uint64_t{256} << 20,
          .host_bytes = uint64_t{256} << 20};
}

// An arm with some of its parameters set otherwise.
template <typename Change>
Arm InfinigenWith(const InfinigenSettings& settings, const Change& change) {
  Arm arm = InfinigenArm(settings);
  change(arm.mutable_infinigen());
  return arm;
}

// A named change of the parameters, and the engine it runs on.
struct Variant {
  const char* name;
  std::function<void(Infinigen*)> change;
  int32_t max_batched_tokens = 64;
  bool graphs = true;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_STRATEGIES_INFINIGEN_LAB_H_
