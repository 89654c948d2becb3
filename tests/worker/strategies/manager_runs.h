// A seeded run of a batcher over a strategy's KV manager, without a tensor: requests of random
// lengths come, are planned, preempted, forked and finished, and every promise is checked on the
// way. What a paged manager says about pages is carried out on a shadow of the two pools, in which
// each slot holds a digest of the tokens up to it, so that a wrong page shows as a wrong digest.
#ifndef KVSWEEP_TESTS_WORKER_STRATEGIES_MANAGER_RUNS_H_
#define KVSWEEP_TESTS_WORKER_STRATEGIES_MANAGER_RUNS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "base/random.h"
#include "worker/engine/batcher.h"
#include "worker/strategies/paged.h"

namespace kvsweep {

// The two pools of a paged cache, with a digest in each slot.
class ShadowPools {
 public:
  ShadowPools(PageManager* manager, const PagedLayout& layout)
      : manager_(*manager),
        block_size_(layout.block_size),
        device_(static_cast<size_t>(layout.pages * layout.block_size)),
        host_(static_cast<size_t>(layout.host_pages * layout.block_size)) {}

  // What precedes a step. `waits`: the step decodes what copies under way bring.
  void Copy(bool waits) {
    PageSwaps* const swaps = manager_.swaps();
    if (swaps != nullptr) {
      if (swaps->TakeGivenUp()) Land(begun());
      for (const PagePair& pair : swaps->TakeOuts()) Move(device_, pair.source, &host_, pair);
    }
    const std::vector<PagePair> forks = manager_.TakeForks();
    forks_ += static_cast<int64_t>(forks.size());
    size_t first = 0;
    for (const size_t end : IndependentGroups(forks)) {
      // Within a group any order will do: the last first.
      for (size_t i = end; i-- > first;) Move(device_, forks[i].source, &device_, forks[i]);
      first = end;
    }
    if (swaps != nullptr) {
      std::vector<PagePair> ins = swaps->TakeIns();
      if (!ins.empty()) under_way_.push_back(std::move(ins));
      EXPECT_LE(begun() - reported_, PageSwaps::kMostBatches);
      most_batches_ = std::max(most_batches_, begun() - reported_);
    }
    if (waits) Land(begun());
  }

  // Of the copies under way the first have landed, `batches` at most; what they bring may be used
  // from the next step on.
  void Finish(int64_t batches) {
    Land(std::min(reported_ + batches, begun()));
    for (; reported_ < landed_; ++reported_) manager_.SwapInsLanded();
  }

  // Most batches of swaps under way at a time.
  int64_t most_batches() const { return most_batches_; }

  // The slot of token `position` of a request.
  uint64_t& At(RequestId request, int32_t position) {
    const PageIndex page = manager_.Pages(request)[static_cast<size_t>(position / block_size_)];
    return device_[static_cast<size_t>(page * block_size_ + position % block_size_)];
  }

  int64_t forks() const { return forks_; }

 private:
  int64_t begun() const { return static_cast<int64_t>(under_way_.size()); }
  void Land(int64_t batches) {
    for (; landed_ < batches; ++landed_) {
      for (const PagePair& pair : under_way_[static_cast<size_t>(landed_)])
        Move(host_, pair.source, &device_, pair);
    }
  }
  void Move(const std::vector<uint64_t>& from, PageIndex source, std::vector<uint64_t>* to,
            const PagePair& pair) {
    std::copy_n(from.begin() + source * block_size_, block_size_,
                to->begin() + pair.target * block_size_);
  }

  PageManager& manager_;
  const int32_t block_size_;
  std::vector<uint64_t> device_;
  std::vector<uint64_t> host_;
  std::vector<std::vector<PagePair>> under_way_;  // batches of swap-ins, all so far
  int64_t landed_ = 0;                            // of these, carried out
  int64_t reported_ = 0;                          // of these, as landed
  int64_t most_batches_ = 0;
  int64_t forks_ = 0;
};

struct RunOptions {
  uint64_t seed = 1;
  BatcherOptions batcher;
  int32_t requests = 20;
  int32_t longest_prompt = 40;
  int32_t longest_output = 40;
  int32_t most_samples = 1;
  bool drops = true;
};

// What a run went through.
struct RunCounts {
  int64_t steps = 0;
  int64_t preemptions = 0;
  int64_t cached_tokens = 0;
  int64_t forks = 0;
  int64_t resumed = 0;
  int64_t refused = 0;
  int64_t most_batches = 0;  // of swaps, under way at a time
  RunCounts& operator+=(const RunCounts& other) {
    steps += other.steps;
    preemptions += other.preemptions;
    cached_tokens += other.cached_tokens;
    forks += other.forks;
    resumed += other.resumed;
    refused += other.refused;
    most_batches = std::max(most_batches, other.most_batches);
    return *this;
  }
};

class ManagerRun {
 public:
  // `layout` of a paged manager, else nullptr.
  ManagerRun(const RunOptions& options, KvManager* manager, const PagedLayout* layout)
      : options_(options),
        random_(options.seed),
        manager_(*manager),
        batcher_(options.batcher, manager) {
    manager_.ReadTokensFrom(
        [this](RequestId id) { return std::span<const int32_t>(lives_.at(id).tokens); });
    if (auto* pages = dynamic_cast<PageManager*>(manager); pages != nullptr && layout != nullptr) {
      pools_ = std::make_unique<ShadowPools>(pages, *layout);
    }
  }

  RunCounts Run() {
    int32_t added = 0;
    while (added < options_.requests || !batcher_.idle()) {
      while (added < options_.requests && (batcher_.idle() || random_.Bernoulli(0.3))) {
        AddOne();
        ++added;
      }
      Step();
      if (testing::Test::HasFailure()) return counts_;
      if (++counts_.steps > 100'000) {
        ADD_FAILURE() << "no progress";
        return counts_;
      }
      if (options_.drops && random_.Bernoulli(0.01)) DropOne();
    }
    if (pools_ != nullptr) pools_->Finish(PageSwaps::kMostBatches);
    for (const auto& [id, life] : lives_) EXPECT_EQ(life.produced, life.output) << "request " << id;
    EXPECT_EQ(manager_.ReservedBytes(), manager_.FixedBytes()) << "not all was given back";
    manager_.CheckInvariants();
    if (pools_ != nullptr) {
      counts_.forks = pools_->forks();
      counts_.most_batches = pools_->most_batches();
    }
    return counts_;
  }

 private:
  struct Life {
    std::vector<int32_t> tokens;    // prompt and output so far
    std::vector<uint64_t> digests;  // of tokens[0 .. i]
    int32_t prompt = 0;
    int32_t output = 0;
    int32_t produced = 0;
    int32_t stored = 0;
    RequestId parent = -1;
  };

  int32_t Draw(int32_t least, int32_t most) {
    return least + static_cast<int32_t>(random_.Uniform(static_cast<uint64_t>(most - least + 1)));
  }

  static void Append(Life& life, int32_t token) {
    const uint64_t before = life.digests.empty() ? 0 : life.digests.back();
    life.tokens.push_back(token);
    life.digests.push_back(MixSeed(before, static_cast<uint64_t>(token) + 1));
  }

  void AddOne() {
    Life life{.prompt = Draw(1, options_.longest_prompt),
              .output = Draw(1, options_.longest_output)};
    const int32_t most = std::max(life.output, Draw(1, options_.longest_output));
    // Prompts begin in few ways, so that prefixes are shared.
    const int32_t beginning = Draw(0, 2);
    const int32_t common = Draw(0, life.prompt);
    for (int32_t i = 0; i < life.prompt; ++i) Append(life, i < common ? beginning : Draw(3, 99));
    const RequestShape shape{life.prompt, most, life.prompt + life.output};
    std::vector<RequestId> samples;
    const RequestId id = next_++;
    const int32_t count = manager_.can_fork() ? Draw(1, options_.most_samples) : 1;
    for (int32_t i = 1; i < count; ++i) samples.push_back(next_++);
    TierBytes peak = manager_.FixedBytes();
    peak += manager_.PeakBytes(shape);
    const TierBytes& budget = options_.batcher.budget;
    const bool fits = peak.device <= budget.device && peak.host <= budget.host;
    EXPECT_EQ(batcher_.Add(id, shape, life.output, samples), fits);
    if (!fits) {
      ++counts_.refused;
      return;
    }
    for (const RequestId sample : samples) {
      lives_[sample] = life;
      lives_[sample].parent = id;
    }
    lives_[id] = std::move(life);
  }

  void DropOne() {
    for (auto it = lives_.begin(); it != lives_.end(); ++it) {
      if (!batcher_.knows(it->first) || it->second.parent >= 0) continue;
      const RequestId id = it->first;
      batcher_.Drop(id);
      // Samples that waited for its prompt go with it.
      std::erase_if(lives_, [&](const auto& entry) {
        return entry.first == id || (entry.second.parent == id && !batcher_.knows(entry.first) &&
                                     entry.second.produced == 0);
      });
      return;
    }
  }

  void Step() {
    const StepPlan& plan = batcher_.Plan();
    batcher_.CheckInvariants();
    counts_.preemptions += static_cast<int64_t>(plan.preempted.size());
    EXPECT_TRUE(plan.preempted.empty() || plan.admitted.empty())
        << "somebody entered in a step with a preemption";
    EXPECT_FALSE(plan.empty() && !batcher_.idle());
    int32_t rows = 0;
    bool waits = false;
    for (const auto* segments : {&plan.decode, &plan.prefill}) {
      for (const Segment& segment : *segments) rows += segment.rows;
    }
    const bool alone =
        !options_.batcher.chunked_prefill && plan.prefill.size() == 1 && plan.decode.empty();
    EXPECT_TRUE(rows <= options_.batcher.max_batched_tokens || alone) << rows;
    EXPECT_LE(batcher_.running(), options_.batcher.max_sequences);
    EXPECT_TRUE(options_.batcher.chunked_prefill || plan.decode.empty() || plan.prefill.empty());
    for (const Segment& segment : plan.decode) waits |= !manager_.Arrived(segment.request);
    if (pools_ != nullptr) pools_->Copy(waits);
    for (const auto* segments : {&plan.decode, &plan.prefill}) {
      for (const Segment& segment : *segments) Store(segment, segments == &plan.decode);
    }
    // A step with a prompt stores all its tokens before it attends.
    if (pools_ != nullptr) {
      for (const auto* segments : {&plan.decode, &plan.prefill}) {
        for (const Segment& segment : *segments) Attend(segment);
      }
    }
    CheckBytes();
    if (pools_ != nullptr) {
      const bool one = random_.Bernoulli(0.4);
      pools_->Finish(waits ? PageSwaps::kMostBatches : one);
    }
    const StepEffects& effects = batcher_.Complete();
    for (const RequestId id : effects.produced) {
      Life& life = lives_.at(id);
      if (life.produced == 0 && life.parent >= 0) life.stored = life.prompt;
      ++life.produced;
      Append(life, Draw(3, 99));
    }
    for (const RequestId id : effects.finished) {
      EXPECT_EQ(lives_.at(id).produced, lives_.at(id).output);
    }
    batcher_.CheckInvariants();
  }

  void Store(const Segment& segment, bool decode) {
    Life& life = lives_.at(segment.request);
    if (segment.start_position != life.stored) {
      // A prompt that begins anew, behind what the cache has of it.
      EXPECT_FALSE(decode);
      counts_.cached_tokens += segment.start_position;
    }
    EXPECT_LT(segment.start_position, static_cast<int32_t>(life.tokens.size()));
    counts_.resumed += segment.resumed;
    life.stored = segment.start_position + segment.rows;
    EXPECT_TRUE(!decode || life.stored == static_cast<int32_t>(life.tokens.size()));
    EXPECT_LE(life.stored, static_cast<int32_t>(life.tokens.size()));
    if (pools_ == nullptr) return;
    for (int32_t i = segment.start_position; i < life.stored; ++i) {
      pools_->At(segment.request, i) = life.digests[static_cast<size_t>(i)];
    }
  }

  void Attend(const Segment& segment) {
    const Life& life = lives_.at(segment.request);
    for (int32_t i = 0; i < life.stored; ++i) {
      if (pools_->At(segment.request, i) == life.digests[static_cast<size_t>(i)]) continue;
      ADD_FAILURE() << "request " << segment.request << " reads a wrong token at " << i << " of "
                    << life.stored;
      return;
    }
  }

  void CheckBytes() {
    const TierBytes reserved = manager_.ReservedBytes();
    EXPECT_LE(reserved.device, options_.batcher.budget.device);
    EXPECT_LE(reserved.host, options_.batcher.budget.host);
    const TierBytes live = manager_.LiveBytes();
    EXPECT_TRUE(live.device <= reserved.device && live.host <= reserved.host);
  }

  const RunOptions options_;
  Random random_;
  KvManager& manager_;
  Batcher batcher_;
  std::unique_ptr<ShadowPools> pools_;
  std::map<RequestId, Life> lives_;
  RequestId next_ = 0;
  RunCounts counts_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_WORKER_STRATEGIES_MANAGER_RUNS_H_
