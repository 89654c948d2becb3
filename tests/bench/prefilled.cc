#include "tests/bench/prefilled.h"

#include <utility>
#include <vector>

namespace kvsweep {
namespace {

// Finds the whole prompt in its cache but for what a last chunk must have; all else is the inner
// manager's.
class PrefilledManager : public KvManager {
 public:
  PrefilledManager(KvManager* inner, int32_t alignment) : inner_(*inner), alignment_(alignment) {}

  int32_t FindCached(RequestId request, const RequestShape& shape) override {
    inner_.FindCached(request, shape);  // Admit expects to have been asked
    return (shape.prompt_tokens - 1) / alignment_ * alignment_;
  }

  TierBytes FixedBytes() const override { return inner_.FixedBytes(); }
  TierBytes PeakBytes(const RequestShape& shape) const override { return inner_.PeakBytes(shape); }
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override {
    return inner_.Admit(request, shape, tokens);
  }
  bool Grow(RequestId request, int32_t tokens) override { return inner_.Grow(request, tokens); }
  void EndPrompt(RequestId request) override { inner_.EndPrompt(request); }
  void Release(RequestId request) override { inner_.Release(request); }
  PreemptionMode preemption_mode() const override { return inner_.preemption_mode(); }
  bool host_is_short() const override { return inner_.host_is_short(); }
  void Preempt(RequestId request) override { inner_.Preempt(request); }
  bool CanOffload(RequestId request) const override { return inner_.CanOffload(request); }
  bool Resume(RequestId request, int32_t tokens) override { return inner_.Resume(request, tokens); }
  bool Arrived(RequestId request) const override { return inner_.Arrived(request); }
  VictimRule victim_rule() const override { return inner_.victim_rule(); }
  void ReadTokensFrom(TokenReader tokens) override { inner_.ReadTokensFrom(std::move(tokens)); }
  void BeginMeasurement() override { inner_.BeginMeasurement(); }
  TierBytes ReservedBytes() const override { return inner_.ReservedBytes(); }
  TierBytes LiveBytes() const override { return inner_.LiveBytes(); }
  TierBytes RequestBytes(RequestId request) const override { return inner_.RequestBytes(request); }
  void CheckInvariants() const override { inner_.CheckInvariants(); }

 private:
  KvManager& inner_;
  int32_t alignment_;
};

class PrefilledStrategy : public CacheStrategy {
 public:
  explicit PrefilledStrategy(std::unique_ptr<CacheStrategy> inner)
      : inner_(std::move(inner)), manager_(&inner_->manager(), inner_->chunk_alignment()) {}

  KvManager& manager() override { return manager_; }
  int32_t chunk_alignment() const override { return inner_->chunk_alignment(); }
  bool capturable() const override { return inner_->capturable(); }
  int32_t GraphKey(const StepView& step) const override { return inner_->GraphKey(step); }
  std::vector<int32_t> GraphKeys(int32_t decode_rows) const override {
    return inner_->GraphKeys(decode_rows);
  }
  bool NeedsHost() const override { return inner_->NeedsHost(); }
  void BeginStep(const StepView& step) override { inner_->BeginStep(step); }
  void MoveMemory(const StepView& step) override { inner_->MoveMemory(step); }
  void BeforeLayer(const StepView& step, int32_t layer, const Activations& x) override {
    inner_->BeforeLayer(step, layer, x);
  }
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override {
    inner_->Attend(step, layer, inputs, out);
  }
  void EndStep(const StepView& step) override { inner_->EndStep(step); }
  void ReadBack(const StepView& step) override { inner_->ReadBack(step); }
  void StepDone() override { inner_->StepDone(); }
  void BeginMeasurement() override { inner_->BeginMeasurement(); }
  uint64_t ReadbackBytes(const StepView& step) const override {
    return inner_->ReadbackBytes(step);
  }
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override {
    return inner_->CollectDecode(step, index, attended_by_layer);
  }
  int32_t PromptEvictions(const RequestShape& shape, int32_t tokens) const override {
    return inner_->PromptEvictions(shape, tokens);
  }
  int32_t declared_full_layers() const override { return inner_->declared_full_layers(); }
  int32_t TokenBudget(const RequestShape& shape) const override {
    return inner_->TokenBudget(shape);
  }
  std::vector<Figure> Figures() const override { return inner_->Figures(); }

 private:
  std::unique_ptr<CacheStrategy> inner_;
  PrefilledManager manager_;
};

}  // namespace

std::unique_ptr<CacheStrategy> AsIfPrefilled(std::unique_ptr<CacheStrategy> strategy) {
  return std::make_unique<PrefilledStrategy>(std::move(strategy));
}

}  // namespace kvsweep
