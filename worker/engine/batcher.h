// Continuous batching with chunked prefill: decides what the next step computes. Pure: plain values
// in, a plan out; no clock, no tensor.
//
// Running requests come first, in order of admission: each decode takes one token of the budget, a
// prompt that is under way takes a chunk. When a running request's memory does not suffice, the
// last admitted is preempted until it does (vLLM v1's rule) and goes back to the front of the
// waiting queue: without its tokens, or, after an offload, keeping its state. Waiting requests are
// considered only in a step without a preemption, in order, and the first that does not fit stops
// the search. At most one prompt is partly prefilled at a time, and no other prompt enters behind
// it. A request that can never fit (KvManager::PeakBytes) is refused when it is added.
//
// So running requests followed by waiting ones always stand in the order of arrival, and the first
// of them always makes progress: what runs behind it can be preempted, and what was offloaded is
// dropped from the host, the last first, once nothing else is left to free.
//
// Use: Add requests as they arrive; Plan; execute the plan; Complete; repeat until idle().
#ifndef KVSWEEP_WORKER_ENGINE_BATCHER_H_
#define KVSWEEP_WORKER_ENGINE_BATCHER_H_

#include <cstdint>
#include <deque>
#include <vector>

#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

struct BatcherOptions {
  int32_t max_sequences = 64;        // running at most (max_num_seqs)
  int32_t max_batched_tokens = 512;  // token budget of a step; >= chunk_alignment
  int32_t chunk_alignment = 1;       // chunk borders inside a prompt
  TierBytes budget;                  // of the arm
};

// One step. `decode` and `prefill` are in the order of their rows; first_row is set, padding not
// yet.
struct StepPlan {
  std::vector<Segment> decode;
  std::vector<Segment> prefill;
  std::vector<RequestId> admitted;   // entered the batch in this step, for the first time or again
  std::vector<RequestId> preempted;  // left it; their sequence slots are free again
  bool empty() const { return decode.empty() && prefill.empty(); }
};

// What a completed step brought.
struct StepEffects {
  std::vector<RequestId>
      produced;  // one new output token each: decode segments, then prompts that ended
  std::vector<RequestId> finished;  // of these, requests that have all their output; released
};

class Batcher {
 public:
  // Borrows `manager`. REQUIRES: max_batched_tokens >= chunk_alignment >= 1, max_sequences >= 1.
  Batcher(const BatcherOptions& options, KvManager* manager);

  // Queues a request that will produce `output_tokens` tokens (known only to the schedule; the
  // manager sees shape.max_tokens). False: it can never fit, and is not queued. REQUIRES: 1 <=
  // output_tokens <= shape.max_tokens, id not in use; ids are small numbers.
  [[nodiscard]] bool Add(RequestId request, const RequestShape& shape, int32_t output_tokens);

  // The next step. REQUIRES: no plan is outstanding. Empty only when idle. Valid until the next
  // call. A decode segment feeds the latest token at start_position; the step with the last chunk
  // of a prompt also yields an output token. After a recompute the prompt is the prompt and the
  // output so far.
  const StepPlan& Plan();
  // The outstanding plan has been executed. REQUIRES: a plan is outstanding, also when it was
  // empty.
  const StepEffects& Complete();

  // Gives up a request, wherever it is (trial cancelled or timed out). REQUIRES: no plan is
  // outstanding.
  void Drop(RequestId request);

  bool idle() const { return running_.empty() && waiting_.empty(); }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  int32_t waiting() const { return static_cast<int32_t>(waiting_.size()); }

  // Figures of one request, also after it finished: times preempted, tokens computed more than once
  // because of it.
  struct Tally {
    int32_t preemptions = 0;
    int32_t recomputed_tokens = 0;
  };
  Tally tally(RequestId request) const;

  // Asserts: tokens scheduled <= budget, running <= max_sequences, slots unique, order of arrival,
  // reserved bytes within the budget, and the manager's own invariants.
  void CheckInvariants() const;

 private:
  struct Request {
    RequestShape shape;
    int64_t arrival = 0;  // counts Adds
    int32_t output_tokens = 0;
    int32_t produced = 0;    // output tokens so far
    int32_t computed = 0;    // tokens in the cache
    int32_t to_compute = 0;  // prompt, or prompt and output so far after a recompute
    int32_t slot = -1;       // -1: not running
    bool known = false;      // running or waiting
    bool prompt_done = false;
    bool offloaded = false;  // preempted with its state on the host
    Tally tally;
  };

  Request& Get(RequestId request);
  const Request& Get(RequestId request) const;
  void PlanRunning();
  void PlanWaiting();
  bool PlanOne(size_t index);
  bool Enter(RequestId request, Request& state);
  bool MakeRoom(RequestId request, int32_t tokens);
  bool DropOffloaded(RequestId keep);
  void PreemptLast();
  void ForgetTokens(Request& state);
  void AddSegment(RequestId request, const Request& state, int32_t tokens, bool resumed);
  int32_t ChunkTokens(const Request& state) const;
  void Produce(RequestId request);
  void FreeSlot(Request& state);

  BatcherOptions options_;
  KvManager* manager_;
  std::vector<Request> requests_;   // by id
  std::vector<RequestId> running_;  // in order of admission
  std::deque<RequestId> waiting_;
  std::vector<int32_t> free_slots_;  // a heap: the lowest is taken first
  StepPlan plan_;
  StepEffects effects_;
  int64_t arrivals_ = 0;
  int32_t budget_left_ = 0;
  bool prompt_under_way_ = false;  // after this step a prompt is partly prefilled
  bool short_of_memory_ = false;   // something lost its memory in this step
  bool outstanding_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_BATCHER_H_
