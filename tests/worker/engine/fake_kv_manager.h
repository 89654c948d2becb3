// A KV manager whose memory is one byte a token, for tests of the batcher: small enough to follow
// by hand, with each of the three ways of preemption.
#ifndef KVSWEEP_TESTS_WORKER_ENGINE_FAKE_KV_MANAGER_H_
#define KVSWEEP_TESTS_WORKER_ENGINE_FAKE_KV_MANAGER_H_

#include <cstdint>
#include <map>

#include "base/check.h"
#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

// kRecompute: a byte of device memory for each token. kNone: the whole limit is reserved at
// admission. kOffload: a byte for each token on the device and another on the host, which a
// request that is preempted after its prompt keeps.
class FakeKvManager final : public KvManager {
 public:
  FakeKvManager(PreemptionMode mode, TierBytes budget) : mode_(mode), budget_(budget) {}

  TierBytes FixedBytes() const override { return {}; }
  TierBytes PeakBytes(const RequestShape& shape) const override {
    const uint64_t limit = static_cast<uint64_t>(shape.limit());
    return {limit, mode_ == PreemptionMode::kOffload ? limit : 0};
  }

  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override {
    KVSWEEP_CHECK(!held_.contains(request) && tokens >= 1 && tokens <= shape.prompt_tokens);
    const int32_t reserved = mode_ == PreemptionMode::kNone ? shape.limit() : tokens;
    const int32_t host = mode_ == PreemptionMode::kOffload ? tokens : 0;
    return Set(request,
               {.device = reserved, .host = host, .tokens = tokens, .limit = shape.limit()});
  }
  bool Grow(RequestId request, int32_t tokens) override {
    Held grown = held_.at(request);
    KVSWEEP_CHECK(tokens > grown.tokens && tokens <= grown.limit && !grown.away);
    grown.tokens = tokens;
    if (mode_ != PreemptionMode::kNone) grown.device = tokens;
    if (mode_ == PreemptionMode::kOffload) grown.host = tokens;
    return Set(request, grown);
  }
  void EndPrompt(RequestId request) override { held_.at(request).prompt_ended = true; }
  void Release(RequestId request) override { KVSWEEP_CHECK_EQ(held_.erase(request), 1u); }

  PreemptionMode preemption_mode() const override { return mode_; }
  bool host_is_short() const override { return host_is_short_; }
  void Preempt(RequestId request) override {
    Held& held = held_.at(request);
    if (mode_ != PreemptionMode::kOffload || !held.prompt_ended) {
      held_.erase(request);
    } else {
      held.device = 0;
      held.away = true;
    }
  }
  bool Resume(RequestId request, int32_t tokens) override {
    Held back = held_.at(request);
    KVSWEEP_CHECK(back.away && tokens >= back.tokens && tokens <= back.tokens + 1);
    back.device = back.host = back.tokens = tokens;
    back.away = false;
    return Set(request, back);
  }

  TierBytes ReservedBytes() const override {
    TierBytes sum;
    for (const auto& [request, held] : held_) sum += Bytes(held);
    return sum;
  }
  TierBytes LiveBytes() const override { return ReservedBytes(); }
  TierBytes RequestBytes(RequestId request) const override { return Bytes(held_.at(request)); }
  void CheckInvariants() const override {
    const TierBytes sum = ReservedBytes();
    KVSWEEP_CHECK(sum.device <= budget_.device && sum.host <= budget_.host);
  }

 private:
  struct Held {
    int32_t device = 0;
    int32_t host = 0;
    int32_t tokens = 0;
    int32_t limit = 0;
    bool prompt_ended = false;
    bool away = false;  // offloaded
  };

  static TierBytes Bytes(const Held& held) {
    return {static_cast<uint64_t>(held.device), static_cast<uint64_t>(held.host)};
  }

  bool Set(RequestId request, const Held& wanted) {
    TierBytes sum = ReservedBytes();
    sum += Bytes(wanted);
    if (const auto it = held_.find(request); it != held_.end()) {
      sum.device -= Bytes(it->second).device;
      sum.host -= Bytes(it->second).host;
    }
    host_is_short_ = sum.host > budget_.host;
    if (host_is_short_ || sum.device > budget_.device) return false;
    held_[request] = wanted;
    return true;
  }

  PreemptionMode mode_;
  TierBytes budget_;
  std::map<RequestId, Held> held_;
  bool host_is_short_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_ENGINE_FAKE_KV_MANAGER_H_
