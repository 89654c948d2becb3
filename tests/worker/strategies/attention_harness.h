// A strategy without a model: its hooks are called with invented queries, keys and values, for any
// shape, in steps of the test's choice, and what each row attended to comes back. A backend that
// looks on tells what lies in the cache.
#ifndef KVSWEEP_TESTS_WORKER_STRATEGIES_ATTENTION_HARNESS_H_
#define KVSWEEP_TESTS_WORKER_STRATEGIES_ATTENTION_HARNESS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/step_state.h"
#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {

// What one row of H2O's slots holds for one KV head.
struct HeldSlots {
  std::map<int32_t, float> score;  // by original position
  std::vector<int32_t> position;   // by slot
};

// Remembers the calls that evict, and shows what they left.
class WatchingBackend : public CpuBackend {
 public:
  using CpuBackend::CpuBackend;

  // Called with the arguments before the operation is enqueued, everything before it having run.
  std::function<void(const PruneHeavyArgs&)> before_prune;
  std::function<void(const EvictHeavyArgs&)> before_evict;

  void PruneHeavy(const PruneHeavyArgs& args, Stream stream) override {
    if (before_prune) {
      KVSWEEP_CHECK_OK(WaitAll());
      before_prune(args);
    }
    prune.push_back(args);
    CpuBackend::PruneHeavy(args, stream);
  }
  void EvictHeavy(const EvictHeavyArgs& args, Stream stream) override {
    if (before_evict) {
      KVSWEEP_CHECK_OK(WaitAll());
      before_evict(args);
    }
    evict.push_back(args);
    CpuBackend::EvictHeavy(args, stream);
  }

  // Of the last step, in order: one prune for each layer and prompt, one eviction for each layer.
  std::vector<PruneHeavyArgs> prune;
  std::vector<EvictHeavyArgs> evict;
};

inline HeldSlots ReadSlots(const SlotView& score, const SlotView& position, int64_t row,
                           int64_t head, int64_t slots) {
  HeldSlots held;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t at =
        static_cast<const int32_t*>(position.data)[cpu::SlotOffset(position, row, slot, head)];
    held.position.push_back(at);
    held.score[at] = static_cast<const float*>(score.data)[cpu::SlotOffset(score, row, slot, head)];
  }
  return held;
}

struct HarnessShape {
  int32_t layers = 2;
  int32_t query_heads = 4;
  int32_t kv_heads = 2;
  int32_t head_dim = 8;
  bool rotary = true;
};

struct HarnessSizes {
  int32_t max_sequences = 4;
  int32_t max_context = 512;
  int32_t max_rows = 512;
  DType kv_dtype = DType::kF32;
  uint64_t device_bytes = uint64_t{64} << 20;
  uint64_t host_bytes = uint64_t{64} << 20;
};

// One token's query, key and value of one layer, before any rotation, as a model would give them.
struct TokenVectors {
  std::vector<float> query;  // [Hq * d]
  std::vector<float> key;    // [Hk * d]
  std::vector<float> value;  // [Hk * d]
};

// The same numbers for the same (sequence, token, layer), whatever the batch and the chunks.
inline TokenVectors InventToken(const HarnessShape& shape, uint64_t sequence, int32_t token,
                                int32_t layer) {
  Random random(MixSeed(sequence, static_cast<uint64_t>(token), static_cast<uint64_t>(layer)));
  const auto draw = [&](int32_t heads, double scale) {
    std::vector<float> values(static_cast<size_t>(heads) * shape.head_dim);
    for (float& value : values) {
      // Nearly normal; some keys are much larger, so that softmax has peaks.
      double sum = -3;
      for (int i = 0; i < 6; ++i) sum += random.UniformDouble();
      value = static_cast<float>(scale * sum);
    }
    return values;
  };
  const double peak = random.Uniform(8) == 0 ? 3 : 1;
  TokenVectors token_vectors;
  token_vectors.query = draw(shape.query_heads, 1.5);
  token_vectors.key = draw(shape.kv_heads, peak);
  token_vectors.value = draw(shape.kv_heads, 1);
  return token_vectors;
}

class AttentionHarness {
 public:
  AttentionHarness(const HarnessShape& shape, const Arm& arm, const HarnessSizes& sizes = {},
                   const CpuBackendOptions& options = {.threads = 1, .batch_invariant = true})
      : shape_(shape), sizes_(sizes), backend_(options), state_(&backend_) {
    position_ = state_.Add(sizes.max_rows);
    row_active_ = state_.Add(sizes.max_sequences);
    std::vector<float> frequency;
    for (int32_t j = 0; j < shape.head_dim / 2; ++j) {
      frequency.push_back(1.0f / std::pow(10000.0f, 2.0f * static_cast<float>(j) /
                                                        static_cast<float>(shape.head_dim)));
    }
    float* const table = Floats(static_cast<int64_t>(frequency.size()));
    std::copy(frequency.begin(), frequency.end(), table);
    frequency_ = frequency;
    static_cast<StrategySizes&>(context_) = {
        .shape = {.layers = shape.layers,
                  .hidden_size = shape.query_heads * shape.head_dim,
                  .query_heads = shape.query_heads,
                  .kv_heads = shape.kv_heads,
                  .head_dim = shape.head_dim,
                  .max_positions = sizes.max_context,
                  .rotary = shape.rotary,
                  .inverse_frequency = table},
        .kv_dtype = sizes.kv_dtype,
        .device_bytes = sizes.device_bytes,
        .host_bytes = sizes.host_bytes,
        .max_sequences = sizes.max_sequences,
        .max_context = sizes.max_context,
        .max_rows = sizes.max_rows,
        .max_decode_rows = sizes.max_sequences};
    context_.backend = &backend_;
    context_.step_state = &state_;
    const int64_t columns = Columns();
    for (int layer = 0; layer < shape.layers; ++layer)
      qkv_.push_back(Floats(sizes.max_rows * columns));
    out_ = Floats(int64_t{sizes.max_rows} * shape.query_heads * shape.head_dim);
    allocated_before_ = {backend_.allocated_bytes(Tier::kDevice),
                         backend_.allocated_bytes(Tier::kHost)};
    const uint64_t state_before = state_.device_bytes();
    absl::StatusOr<std::unique_ptr<CacheStrategy>> made = MakeStrategy(arm, context_);
    status_ = made.status();
    if (!made.ok()) return;
    strategy_ = *std::move(made);
    allocated_ = {backend_.allocated_bytes(Tier::kDevice) - allocated_before_.device +
                      state_.device_bytes() - state_before,
                  backend_.allocated_bytes(Tier::kHost) - allocated_before_.host};
    KVSWEEP_CHECK_OK(state_.Build());
  }

  const absl::Status& status() const { return status_; }
  CacheStrategy& strategy() { return *strategy_; }
  KvManager& manager() { return strategy_->manager(); }
  WatchingBackend& backend() { return backend_; }
  const StrategySizes& sizes() const { return context_; }
  const std::vector<float>& frequency() const { return frequency_; }
  // What the strategy took of the machine, its part of the step state included.
  TierBytes allocated() const { return allocated_; }

  // Runs a step over these segments, whose first_row is set here. Returns what each layer gave each
  // row: [layer][row][Hq * d].
  std::vector<std::vector<std::vector<float>>> Step(std::vector<Segment> decode,
                                                    std::vector<Segment> prefill,
                                                    int32_t padding = 0) {
    decode_ = std::move(decode);
    prefill_ = std::move(prefill);
    int32_t row = 0;
    for (Segment& segment : decode_) segment.first_row = row++;
    row += padding;
    view_ = {.decode_rows = row};
    for (Segment& segment : prefill_) {
      segment.first_row = row;
      row += segment.rows;
    }
    view_.decode = decode_;
    view_.prefill = prefill_;
    view_.rows = row;
    view_.position = state_.Device(position_);
    view_.row_active = state_.Device(row_active_);
    view_.graph_key = strategy_->GraphKey(view_);
    backend_.prune.clear();
    backend_.evict.clear();
    KVSWEEP_CHECK_OK(state_.Begin());
    FillState();
    strategy_->BeginStep(view_);
    strategy_->MoveMemory(view_);
    state_.Commit();
    std::vector<std::vector<std::vector<float>>> outputs;
    const int64_t width = int64_t{shape_.query_heads} * shape_.head_dim;
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      strategy_->BeforeLayer(view_, layer, {out_, width});
      strategy_->Attend(view_, layer, Inputs(layer), {out_, width});
      KVSWEEP_CHECK_OK(backend_.WaitAll());
      outputs.emplace_back();
      for (int32_t r = 0; r < row; ++r) {
        outputs.back().emplace_back(out_ + r * width, out_ + (r + 1) * width);
      }
    }
    strategy_->EndStep(view_);
    strategy_->ReadBack(view_);
    KVSWEEP_CHECK_OK(backend_.WaitAll());
    strategy_->StepDone();
    return outputs;
  }
  const StepView& view() const { return view_; }

  // The life of a sequence, as the batcher would lead it: sequences are named by request id, which
  // is also the seed of their numbers.
  Segment PromptChunk(RequestId request, int32_t start, int32_t rows, bool last) {
    return {.request = request,
            .slot = request,
            .rows = rows,
            .start_position = start,
            .last_chunk = last};
  }
  Segment DecodeToken(RequestId request, int32_t position) {
    return {.request = request, .slot = request, .rows = 1, .start_position = position};
  }
  // Admits a request and computes its prompt in chunks of at most `chunk` tokens.
  void Prefill(RequestId request, const RequestShape& shape, int32_t chunk) {
    for (int32_t start = 0; start < shape.prompt_tokens; start += chunk) {
      const int32_t rows = std::min(chunk, shape.prompt_tokens - start);
      if (start == 0) {
        KVSWEEP_CHECK(manager().Admit(request, shape, rows));
      } else {
        KVSWEEP_CHECK(manager().Grow(request, start + rows));
      }
      manager().CheckInvariants();
      prompt_outputs.push_back(
          Step({}, {PromptChunk(request, start, rows, start + rows == shape.prompt_tokens)}));
    }
    manager().EndPrompt(request);
  }
  std::vector<std::vector<std::vector<std::vector<float>>>> prompt_outputs;  // of Prefill, by chunk

 private:
  int64_t Columns() const {
    return int64_t{shape_.query_heads + 2 * shape_.kv_heads} * shape_.head_dim;
  }
  float* Floats(int64_t count) {
    absl::StatusOr<std::byte*> memory =
        backend_.Allocate(Tier::kDevice, static_cast<uint64_t>(count) * sizeof(float));
    KVSWEEP_CHECK_OK(memory);
    return reinterpret_cast<float*>(*memory);
  }
  AttentionInputs Inputs(int32_t layer) {
    float* const base = qkv_[static_cast<size_t>(layer)];
    const int64_t keys = int64_t{shape_.query_heads} * shape_.head_dim;
    const int64_t values = keys + int64_t{shape_.kv_heads} * shape_.head_dim;
    return {.query = {base, Columns()},
            .key = {base + keys, Columns()},
            .value = {base + values, Columns()}};
  }
  void FillState() {
    std::ranges::fill(state_.Host(position_), 0);
    std::ranges::fill(state_.Host(row_active_), 0);
    for (const std::vector<Segment>* segments : {&decode_, &prefill_}) {
      for (const Segment& segment : *segments) {
        if (segments == &decode_) state_.Host(row_active_)[segment.first_row] = 1;
        for (int32_t i = 0; i < segment.rows; ++i) {
          state_.Host(position_)[segment.first_row + i] = segment.start_position + i;
          for (int32_t layer = 0; layer < shape_.layers; ++layer) {
            const TokenVectors token = InventToken(shape_, static_cast<uint64_t>(segment.request),
                                                   segment.start_position + i, layer);
            float* row = qkv_[static_cast<size_t>(layer)] + (segment.first_row + i) * Columns();
            for (const std::vector<float>* part : {&token.query, &token.key, &token.value}) {
              row = std::copy(part->begin(), part->end(), row);
            }
          }
        }
      }
    }
  }

  HarnessShape shape_;
  HarnessSizes sizes_;
  WatchingBackend backend_;
  StepState state_;
  StepState::Field position_;
  StepState::Field row_active_;
  StrategyContext context_;
  std::vector<float> frequency_;
  std::vector<float*> qkv_;
  float* out_ = nullptr;
  TierBytes allocated_before_;
  TierBytes allocated_;
  absl::Status status_;
  std::unique_ptr<CacheStrategy> strategy_;  // before the state and the backend end
  std::vector<Segment> decode_;
  std::vector<Segment> prefill_;
  StepView view_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_STRATEGIES_ATTENTION_HARNESS_H_
