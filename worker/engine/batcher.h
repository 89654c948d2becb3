// Continuous batching with chunked prefill: decides what the next step computes. Pure: plain values
// in, a plan out; no clock, no tensor.
//
// Running requests come first, in order of admission: each decode takes one token of the budget, a
// prompt that is under way takes a chunk. When a running request's memory does not suffice, another
// is preempted until it does: of those that have no place in the step yet, itself among them but
// never the first of all, the one that the manager's rule names (vLLM v1's: the last admitted; with
// the other rules those that they name are planned last). It
// goes back to the waiting queue, to its place by arrival: without its tokens, or, after an
// offload, keeping its state. Waiting requests are considered only in a step without a preemption,
// in order, and the first that does not fit stops the search. At most one prompt is partly
// prefilled at a time, and no other prompt enters behind it. A request that can never fit
// (KvManager::PeakBytes) is refused when it is added.
//
// So the first running request always makes progress: what runs behind it can be preempted, and
// what was offloaded is dropped from the host, the last first, once nothing else is left to free.
// With the rule last in, running requests followed by waiting ones stand in the order of arrival.
//
// An offloaded request that comes back holds a slot while its copy is under way and has no place in
// the steps that overlap it; only when nothing else has one, the step waits for the copy.
//
// Samples are continuations of one prompt: the prompt is computed once, for the first of them, and
// the others begin with what it holds when it ends. It enters when there are slots for all of them.
//
// Without chunked prefill (vLLM before it): a step computes whole prompts, as many as fit the
// budget, or, if none can enter, decodes. A prompt longer than the budget has a step for itself.
//
// Use: Add requests as they arrive; Plan; execute the plan; Complete; repeat until idle().
#ifndef KVSWEEP_WORKER_ENGINE_BATCHER_H_
#define KVSWEEP_WORKER_ENGINE_BATCHER_H_

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

struct BatcherOptions {
  int32_t max_sequences = 64;        // running at most (max_num_seqs)
  int32_t max_batched_tokens = 512;  // token budget of a step; >= chunk_alignment
  int32_t chunk_alignment = 1;       // chunk borders inside a prompt
  bool chunked_prefill = true;       // false: whole prompts, in steps without decodes
  TierBytes budget;                  // of the arm
};

// One step. `decode` and `prefill` are in the order of their rows; first_row is set, padding not
// yet.
struct StepPlan {
  std::vector<Segment> decode;
  std::vector<Segment> prefill;
  std::vector<SampleStart> samples;  // of prompts that end in this step
  std::vector<RequestId> admitted;   // entered the batch in this step, for the first time or again
  std::vector<RequestId> preempted;  // left it; their sequence slots are free again
  bool short_of_memory = false;      // a request left, or could not enter, for lack of memory
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
  // `samples` are further continuations of its prompt, equal in shape and output. REQUIRES: they
  // are none, or manager.can_fork() and there are slots for all.
  [[nodiscard]] bool Add(RequestId request, const RequestShape& shape, int32_t output_tokens,
                         std::span<const RequestId> samples = {});

  // The next step. REQUIRES: no plan is outstanding. Empty only when idle. Valid until the next
  // call. A decode segment feeds the latest token at start_position; the step with the last chunk
  // of a prompt also yields an output token. After a recompute the prompt is the prompt and the
  // output so far.
  const StepPlan& Plan();
  // The outstanding plan has been executed. REQUIRES: a plan is outstanding, also when it was
  // empty.
  const StepEffects& Complete();

  // Gives up a request, wherever it is (trial cancelled or timed out), and with it samples that
  // wait for the end of its prompt. REQUIRES: no plan is outstanding, knows(request).
  void Drop(RequestId request);
  // Added, not finished, not dropped.
  bool knows(RequestId request) const;

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
    bool offloaded = false;          // preempted with its state on the host
    bool arriving = false;           // running, but the copy that brings its state is under way
    bool forking = false;            // a sample that waits for the end of its prompt
    int32_t lost = 0;                // tokens in the cache before the last recompute
    std::vector<RequestId> samples;  // of its prompt, until that ends
    Tally tally;
  };

  Request& Get(RequestId request);
  const Request& Get(RequestId request) const;
  void PlanRunning();
  void PlanWaiting();
  void PlanUnchunked();
  void PlanArriving();
  bool PlanOne(size_t index);
  void StartSamples(Request& parent);
  void ForkSamples(RequestId parent);
  bool Enter(RequestId request, Request& state);
  bool EnterPrompt(RequestId request, Request& state);
  bool MakeRoom(size_t index, int32_t tokens);
  int64_t Worth(RequestId request) const;
  void OrderByVictimRule();
  size_t ChooseVictim(size_t index) const;
  bool DropOffloaded(RequestId keep);
  bool LacksMemory();
  void PreemptAt(size_t index);
  void Wait(RequestId request);
  void ForgetTokens(Request& state);
  void AddSegment(RequestId request, Request& state, int32_t tokens, bool resumed);
  void TakeSlot(Request& state);
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
  int32_t kept_slots_ = 0;  // for samples of prompts that are under way
  int32_t budget_left_ = 0;
  bool prompt_under_way_ = false;  // after this step a prompt is partly prefilled
  bool short_of_memory_ = false;   // something lost its memory in this step
  bool outstanding_ = false;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_BATCHER_H_
