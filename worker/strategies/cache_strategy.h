// What a KV-cache strategy is: a pure KV manager that decides over memory, and hooks that enqueue a
// step's attention.
//
// The engine runs every strategy with the same weights, the same batcher and the same kernels; only
// these two halves differ.
//
// A sequence has a *sequence slot* (0 .. max_sequences - 1) while it is in the engine: the row of
// its per-sequence tables. In a step, decode rows come first, each one token of one sequence; then
// the rows of prefill chunks. A decode batch may be padded to a captured size: padded rows stand
// behind the real decode rows and are inert.
#ifndef KVSWEEP_WORKER_STRATEGIES_CACHE_STRATEGY_H_
#define KVSWEEP_WORKER_STRATEGIES_CACHE_STRATEGY_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/step_state.h"
#include "worker/strategies/model_shape.h"

namespace kvsweep {

// Identifies a request inside a trial.
using RequestId = int32_t;

// --------------------------------------------------------------------------------------------------------------------
// KV manager

// What an arm may know of a request at admission: never the replayed output length.
struct RequestShape {
  int32_t prompt_tokens = 0;
  int32_t max_tokens = 0;  // output tokens at most
  // Prompt and true output, which no server knows: for controls and fidelity runs alone (paged's
  // reservations oracle and pow2, budget_base: final). 0: not known.
  int32_t oracle_tokens = 0;
  // Of the prompt, what the request had put out before it was preempted and began anew: no part of
  // what a budget is a ratio of.
  int32_t restarted_tokens = 0;
  int32_t limit() const { return prompt_tokens + max_tokens; }
};

struct TierBytes {
  uint64_t device = 0;
  uint64_t host = 0;
  TierBytes& operator+=(const TierBytes& other) {
    device += other.device;
    host += other.host;
    return *this;
  }
  bool operator==(const TierBytes&) const = default;
};

// How a request loses its memory when another needs it.
enum class PreemptionMode {
  kNone,       // what was admitted always fits: never preempted after its prompt
  kRecompute,  // everything is dropped, prompt and output so far are computed again
  kOffload,    // the device part is dropped and brought back from the host: the state is preserved
};

// Which running request loses its memory first. Ties, and kLastIn itself: the last admitted.
enum class VictimRule { kLastIn, kLeastComputed, kMostBlocks };

// Token ids of a request, prompt and output so far.
using TokenReader = std::function<std::span<const int32_t>(RequestId)>;

// Decides over memory: may a request enter, may it grow, what frees how much. Plain values, no
// tensors, no clock; not thread-safe. Reserved bytes never exceed the budgets of the arm, in-use
// plus free is constant, and every byte stands in the strategy's formula.
//
// Life of a request: Admit, Grow before each step that adds tokens, EndPrompt after the step with
// the last chunk of its prompt, then Grow for each decode step, Release. Preempt takes the memory
// away: after kRecompute (and for every arm before the end of a prompt) the request is as if never
// admitted; after kOffload it waits for Resume.
//
// Optional parts, for managers that have them: cached prefixes (ReadTokensFrom, FindCached), copies
// that take their time (Arrived), forks (can_fork, Fork).
class KvManager {
 public:
  virtual ~KvManager() = default;

  // Bytes taken whatever runs: partial weights, rings, tables.
  virtual TierBytes FixedBytes() const = 0;
  // Bytes that the request takes alone at its worst moment, fixed bytes not included. Past the
  // budgets it can never run: infeasible.
  virtual TierBytes PeakBytes(const RequestShape& shape) const = 0;

  // Takes the request in if there is memory for its first chunk of `tokens` tokens (and for
  // whatever the strategy reserves at admission); false: later, nothing changed. `computed_tokens`
  // of the prompt are the prompt itself or, after kRecompute, prompt and output so far. REQUIRES:
  // the request is not held, tokens <= prompt.
  virtual bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) = 0;
  // Makes room for the request to hold `tokens` tokens in all. False: no memory, nothing changed.
  virtual bool Grow(RequestId request, int32_t tokens) = 0;
  // The prompt is in the cache: what the strategy prunes is freed.
  virtual void EndPrompt(RequestId request) = 0;
  virtual void Release(RequestId request) = 0;

  virtual PreemptionMode preemption_mode() const = 0;
  // kOffload: the latest Admit, Grow or Resume that failed lacked host memory, so that offloading
  // others would not help.
  virtual bool host_is_short() const { return false; }
  // Frees the device memory of a request whose prompt has ended (kOffload) or all of its memory.
  virtual void Preempt(RequestId request) = 0;
  // kOffload: whether there is room on the host for what Preempt would keep of the request; if not,
  // it is released and computed again.
  virtual bool CanOffload(RequestId /*request*/) const { return true; }
  // kOffload: takes device memory again for a preempted request that will hold `tokens` tokens.
  // False: later.
  virtual bool Resume(RequestId request, int32_t tokens) = 0;
  // After Resume: the request's state is on the device, so that a step which decodes it waits for
  // no copy. A step may decode it before; the strategy then makes the step wait.
  virtual bool Arrived(RequestId /*request*/) const { return true; }
  // Rule by which the batcher chooses whom to preempt.
  virtual VictimRule victim_rule() const { return VictimRule::kLastIn; }

  // Where to read the tokens of the requests; set by the engine before the first Admit. Without it
  // nothing is found in a cache.
  virtual void ReadTokensFrom(TokenReader /*tokens*/) {}
  // Tokens at the beginning of the request's prompt that are in the cache already, at most
  // prompt_tokens - 1. If the manager's next call is Admit of the same request, that takes them
  // over (its `tokens` include them) and they need not be computed.
  virtual int32_t FindCached(RequestId /*request*/, const RequestShape& /*shape*/) { return 0; }

  // Whether continuations of one prompt can share its memory.
  virtual bool can_fork() const { return false; }
  // `child` begins with what `parent` holds, sharing it; nothing is taken. REQUIRES: can_fork(),
  // the parent's prompt has just ended, the child is not held.
  virtual void Fork(RequestId /*parent*/, RequestId /*child*/) {}

  // A measurement begins and no request is held: forgets cached content, counts from zero.
  virtual void BeginMeasurement() {}

  // Reserved now, fixed bytes included.
  virtual TierBytes ReservedBytes() const = 0;
  // Of these, bytes that hold live tokens (or fixed structures); reserved - live is fragmentation.
  virtual TierBytes LiveBytes() const = 0;
  // Reserved for one request.
  virtual TierBytes RequestBytes(RequestId request) const = 0;

  // Asserts the invariants above; called after every step in tests.
  virtual void CheckInvariants() const = 0;
};

// ----------------------------------------------------------------------------------------------------------------------
// hooks

// Read-only access to a layer's query projection, for speculation.
struct QueryWeights {
  const void* weight = nullptr;  // [Hq * d, D], device, of the backend's weight type; the key
                                 // projection, [Hk * d, D], lies right behind it
  const float* bias = nullptr;   // [Hq * d] or nullptr, device; the keys' likewise
};

// One sequence's share of a step.
struct Segment {
  RequestId request = 0;
  int32_t slot = 0;            // sequence slot
  int32_t first_row = 0;       // row of its first token in the step's activations
  int32_t rows = 0;            // tokens: 1 in decode
  int32_t start_position = 0;  // tokens stored before this step
  bool last_chunk = false;     // prefill: the prompt ends here
  bool resumed = false;        // decode: first step after a kOffload preemption
};

// Another continuation of a prompt that ends in this step: its first token is sampled from the
// prompt's last row too.
struct SampleStart {
  RequestId request = 0;
  int32_t slot = 0;
  int32_t prefill = 0;  // index of the prompt's segment
};

// What a step computes. Valid from BeginStep to CollectDecode.
struct StepView {
  std::span<const Segment> decode;  // rows 0 .. decode.size() - 1
  std::span<const Segment> prefill;
  std::span<const SampleStart> samples;
  int32_t decode_rows = 0;  // decode.size() padded to the captured size
  int32_t rows = 0;         // all rows: decode_rows plus the prefill rows
  bool captured = false;    // only decode rows, replayed from a graph: once it is captured, only
                            // BeginStep, MoveMemory and ReadBack are called
  int32_t graph_key = 0;    // CacheStrategy::GraphKey of this step
  // Of steps begun one behind the other, 0 and 1 in turn: the next step may begin before this one
  // is finished, so what BeginStep leaves for CollectDecode is kept twice.
  int32_t parity = 0;
  const int32_t* position = nullptr;    // [rows], device
  const int32_t* row_active = nullptr;  // [decode_rows], device: 0 for padding
};

// q, k and v of a layer before rotary embedding; the strategy enqueues the rotation, since it may
// re-position. The three lie side by side in one matrix [rows, (Hq + 2 Hk) d], so one operation can
// rotate q and k. The engine keeps two such matrices (and two of x) and uses them in turn: what a
// hook enqueues on other streams may read them until the hooks of the layer after next.
struct AttentionInputs {
  Activations query;  // [rows, Hq, d]
  Activations key;    // [rows, Hk, d]
  Activations value;  // [rows, Hk, d]
};

// Counts that a step produced, read by the host after it. Entries are means over KV heads.
struct DecodeCounts {
  double attended = 0;  // entries read by attention, the current token included, summed over layers
  double fetched = 0;   // of these, fetched from the host tier
  int32_t evicted = 0;  // tokens that left the cache
  bool engaged = false;  // the strategy did what it is named for in this step; a request is engaged
                         // if any of its steps was
};

// How engagement is judged, as words for people.
struct EngagementRule {
  std::string text;  // empty: the strategy has no rule
};

class CacheStrategy {
 public:
  virtual ~CacheStrategy() = default;

  virtual KvManager& manager() = 0;

  // Chunk borders of a prompt fall on multiples of this.
  virtual int32_t chunk_alignment() const { return 1; }

  // Whether decode steps may be captured; false: every step is enqueued anew.
  virtual bool capturable() const { return true; }
  // A number that a captured step depends on beside its padded size, e.g. a count of tiles that
  // depends on the longest sequence.
  virtual int32_t GraphKey(const StepView& /*step*/) const { return 0; }
  // Every number that it can be in a captured step of so many decode rows.
  virtual std::vector<int32_t> GraphKeys(int32_t /*decode_rows*/) const { return {0}; }

  // Whether no step may begin before all earlier ones are finished (StepDone and CollectDecode were
  // called). Else the engine may begin one step while another is under way. Asked before each step
  // is planned, and again before it begins.
  virtual bool NeedsHost() const { return false; }

  // Fills the strategy's arrays of the open step state.
  virtual void BeginStep(const StepView& step) = 0;
  // After BeginStep: enqueues what must precede the step (a resumed request's copies).
  virtual void MoveMemory(const StepView& /*step*/) {}
  // Before a layer's projections: x = the layer's normed input [rows, D]. Look-ahead for the next
  // layer starts here.
  virtual void BeforeLayer(const StepView& /*step*/, int32_t /*layer*/, const Activations& /*x*/) {}
  // Position, append, select, fetch, attend, score, evict: out [rows, Hq, d]. May overwrite its
  // inputs.
  virtual void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                      const Activations& out) = 0;
  // After the last layer; enqueues prunes of finished prompts, and joins its streams.
  virtual void EndStep(const StepView& step) = 0;
  // Behind the step, never captured: enqueues on Stream::kCompute what the host must read of it.
  // What the step before left on the host has been collected.
  virtual void ReadBack(const StepView& /*step*/) {}
  // After the step has been waited for. Copies on other streams may still be under way; their
  // events can be asked for here.
  virtual void StepDone() {}
  // A measurement begins and no request is held: counts from zero.
  virtual void BeginMeasurement() { manager().BeginMeasurement(); }

  // Bytes that ReadBack has the host read for its counts: control, not the cache's traffic.
  virtual uint64_t ReadbackBytes(const StepView& /*step*/) const { return 0; }

  // After the step has been waited for: counts of decode segment `index`, and the same by layer
  // ([L], attended entries). Its request may have been released, and the next step begun.
  virtual DecodeCounts CollectDecode(const StepView& step, size_t index,
                                     std::span<double> attended_by_layer) = 0;
  // Tokens that a request of this shape has dropped once its first `tokens` tokens were computed as
  // a prompt: those of its own prompt, or more where it began anew after a preemption.
  virtual int32_t PromptEvictions(const RequestShape& /*shape*/, int32_t /*tokens*/) const {
    return 0;
  }

  // Bytes that a decode step of the mean batch reads and writes on the device, at least, to decide
  // which entries stay or are read: beyond weights and attended entries.
  struct MeanBatch {
    double rows = 0;      // requests
    double tokens = 0;    // stored by all of them
    double attended = 0;  // entries, as in DecodeCounts
  };
  virtual double SelectionBytes(const MeanBatch& /*batch*/) const { return 0; }

  // First layers that attend to everything because the arm's parameters say so.
  virtual int32_t declared_full_layers() const { return 0; }

  // Tokens of a request that the arm keeps or reads at most (its budget C); -1: all.
  virtual int32_t TokenBudget(const RequestShape& /*shape*/) const { return -1; }

  virtual EngagementRule engagement_rule() const { return {}; }
  // Whether the rule applies to a finished request of `tokens` tokens in all.
  virtual bool EngagementExpected(const RequestShape& /*shape*/, int32_t /*tokens*/) const {
    return false;
  }

  // Figures about the whole trial that belong to this strategy alone: name, unit, value.
  struct Figure {
    std::string name;
    int32_t layer = -1;
    double value = 0;
  };
  virtual std::vector<Figure> Figures() const { return {}; }
  // Quality trials call it before the first step: from then on the strategy may spend time on
  // figures about the quality of its choices.
  virtual void Diagnose() {}
};

class PreparedWeights;
struct Skewing;

// What an arm's memory depends on, beside its parameters: plain numbers, so that a strategy's
// manager (and with it every byte that it will take) can be had without a backend.
struct StrategySizes {
  ModelShape shape;
  DType kv_dtype = DType::kF32;
  DType activation_dtype = DType::kF32;  // of the backend
  DType weight_dtype = DType::kF32;      // likewise
  uint64_t device_bytes = 0;             // budgets of the arm
  uint64_t host_bytes = 0;
  int32_t max_sequences = 0;    // sequence slots
  int32_t max_context = 0;      // tokens of the longest request of the trial
  int32_t max_rows = 0;         // rows of the largest step
  int32_t max_decode_rows = 0;  // padded
};

// Everything a strategy is built from. Pointers outlive it.
struct StrategyContext : StrategySizes {
  Backend* backend = nullptr;
  StepState* step_state = nullptr;              // before Build: the strategy adds its arrays
  std::vector<QueryWeights> query_weights;      // [L]
  PreparedWeights* prepared_weights = nullptr;  // kept with the model
  // Runs a calibration forward over the first `tokens` calibration ids and computes the skewing
  // from its queries and keys; results are kept with the model. Only for strategies that prepare
  // themselves.
  std::function<absl::StatusOr<std::shared_ptr<const Skewing>>(int32_t tokens)> calibrate;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_CACHE_STRATEGY_H_
