// The numbers' machine: two tiers of memory, four streams, events, graphs, and the operations that
// an engine with several KV-cache strategies needs, at the granularity at which a GPU is fast.
//
// All operations enqueue and return. Nothing is computed before somebody waits (CPU backend) or
// whenever the device gets to it (CUDA); an operation's error surfaces at the next Wait with the
// name of the first operation that failed. Argument structs are copied at the call, so what they
// hold by value is fixed there, in a captured graph for ever: all that varies from step to step
// must be read through a device pointer (step_state.h). Host pointers inside arguments (Copy) are
// read when the copy runs, not when it is enqueued.
//
// Ordering: operations of one stream run in the order they were enqueued; between streams only
// events order. The CPU backend chooses among all orders that the events allow by a seed, so a
// missing wait shows as a wrong number that a seed repeats.
//
// Padded rows: a decode batch is padded to a captured size. A padded row has row_active 0 (or a
// length of 0, or a block table row of -1, as each operation says); it is inert: it writes nothing
// outside its own activations, and no NaN comes of it.
//
// Threads: one engine thread calls a backend; it is not safe to share.
#ifndef KVSWEEP_KERNELS_BACKEND_H_
#define KVSWEEP_KERNELS_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/shapes.h"

namespace kvsweep {

enum class Stream : uint8_t { kCompute, kSpeculation, kHostToDevice, kDeviceToHost };
inline constexpr int kStreams = 4;

// A point in a stream; reusable. Waiting for an event that was never recorded returns at once.
struct Event {
  int32_t index = -1;
};

// A captured sequence of operations over all streams.
struct Graph {
  int32_t index = -1;
};

// ------------------------------------------------------------------------------------------------------------------
// arguments Outputs first, then inputs, then sizes.

// out[t] = table[id] (+ position_table[position + position_offset]); id = token_id[t], or
// sampled[-1 - token_id[t]] where it is negative, so that a step can start before the host has seen
// the last one's tokens.
struct EmbedArgs {
  Activations out;                        // [T, D]
  const int32_t* token_id = nullptr;      // [T], device
  const int32_t* sampled = nullptr;       // [sequence slots], device
  const int32_t* position = nullptr;      // [T], device
  const float* table = nullptr;           // [V, D]
  const float* position_table = nullptr;  // [positions, D] or nullptr
  int32_t position_offset = 0;
  int32_t rows = 0;     // T
  int32_t columns = 0;  // D
};

// out = norm(in) * weight (+ bias).
struct NormArgs {
  Activations out;                // [T, D]
  Activations in;                 // [T, D]
  const float* weight = nullptr;  // [D]
  const float* bias = nullptr;    // [D]; nullptr: root-mean-square norm, otherwise layer norm
  float epsilon = 1e-5f;
  int32_t rows = 0;
  int32_t columns = 0;
};

// out = activation(in * weight^T + bias), added to what out holds if accumulate.
struct GemmArgs {
  Activations out;                // [T, N]
  Activations in;                 // [T, K]
  const float* weight = nullptr;  // [N, K]
  const float* bias = nullptr;    // [N] or nullptr
  bool relu = false;
  bool accumulate = false;
  int32_t rows = 0;         // T
  int32_t out_columns = 0;  // N
  int32_t in_columns = 0;   // K
};

// out = silu(in[:, :F]) * in[:, F:].
struct SiluGateArgs {
  Activations out;  // [T, F]
  Activations in;   // [T, 2F]
  int32_t rows = 0;
  int32_t columns = 0;  // F
};

// Rotary embedding in place, rotate-half order: columns (j, j + d/2) of a head turn by position *
// theta^(-2j/d).
struct RotaryArgs {
  Activations data;                   // [T, heads, d]
  const int32_t* position = nullptr;  // [T], device
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t head_dim = 0;
  float theta = 10000.0f;
};

// out[r] = in[row[r]]; row -1 gives zeros.
struct TakeRowsArgs {
  Activations out;               // [R, D]
  Activations in;                // [T, D]
  const int32_t* row = nullptr;  // [R], device
  int32_t rows = 0;              // R
  int32_t columns = 0;
};

// token[target[r]] = argmax(logits[r]), the lowest id on ties; target -1: nothing is written.
struct ArgmaxArgs {
  int32_t* token = nullptr;         // [sequence slots], device
  Activations logits;               // [R, V]
  const int32_t* target = nullptr;  // [R], device
  int32_t rows = 0;
  int32_t columns = 0;  // V
};

// Stores keys (and values) of T tokens into a view, converting to its dtype: token t goes to slot
// slot[t] of block table row table_row[t]; table_row -1: not stored. Also the way into the host
// tier (on Stream::kDeviceToHost).
struct AppendArgs {
  KvView target;
  Activations key;                     // [T, Hk, d]
  Activations value;                   // [T, Hk, d]; ignored when target.value is nullptr
  const int32_t* table_row = nullptr;  // [T], device
  const int32_t* slot = nullptr;       // [T], device
  int32_t rows = 0;                    // T
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// Keys and values that attention takes from the activations (the current token's, a chunk's own)
// are rounded to the view's dtype first, as if they had been stored and read back: whether a token
// comes from the cache or from the step makes no difference.

// How decode attention is split; made once a step for all layers.
struct AttentionPlan {
  int32_t splits = 1;
  int32_t split_tokens = 0;  // tokens of a split; fixed in batch-invariant mode
};

// One query row for each sequence against its view and, where given, the current token's own key
// and value from the activations. Row b uses row b of the view's block table. Exactly one of {out}
// and {partial} is written; partial is merged into what it holds if accumulate. Rows with nothing
// to attend to give 0.
struct DecodeAttentionArgs {
  Activations out;               // [B, Hq, d]; data nullptr: write partial
  PartialAttention partial;      // rows B; output nullptr: write out
  bool accumulate = false;       // start from partial's content; with out: merge it in
  float* probability = nullptr;  // [B, Hq, probability_stride] or nullptr; slot s, the current
                                 // token at index n; needs out
  int64_t probability_stride = 0;
  Activations query;          // [B, Hq, d]
  Activations current_key;    // [B, Hk, d]; data nullptr: none
  Activations current_value;  // [B, Hk, d]
  KvView view;
  const int32_t* row_active = nullptr;  // [B], device; nullptr: all
  AttentionPlan plan;
  int32_t rows = 0;  // B
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// The rows of one prompt's chunk against earlier tokens (all of them, from a view) and, causally,
// against the chunk itself. Eager only: the counts are host values. With neither history nor chunk
// keys the result is 0.
struct PrefillAttentionArgs {
  Activations out;               // [T, Hq, d]; data nullptr: write partial
  PartialAttention partial;      // rows T; output nullptr: none
  bool accumulate = false;       // start from partial's content
  float* log_sum_exp = nullptr;  // [T, Hq] or nullptr, of the scaled scores; needs out
  Activations query;             // [T, Hq, d]
  Activations chunk_key;         // [T, Hk, d]; data nullptr: history only
  Activations chunk_value;       // [T, Hk, d]
  KvView history;                // its length pointer is not read
  int32_t history_row = 0;       // row of the block table
  int32_t history_tokens = 0;    // slots [0, history_tokens) are attended
  int32_t rows = 0;              // T
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// Adds to score[h, c] the attention probability that column c received from the chunk's rows,
// summed over the g query heads of KV head h, for columns 0 .. history_tokens + rows - 1 (Zhang et
// al. 2023, section 4; two passes instead of the n x n matrix). Sums are formed over tiles of
// kColumnSumRows rows at absolute positions, in a fixed order, so chunk borders that are multiples
// of it change no bit. The columns of the chunk itself must already stand in the view; their scores
// are written, those of earlier columns added to.
inline constexpr int32_t kColumnSumRows = 128;
struct ColumnSumArgs {
  SlotView score;                      // float
  Activations query;                   // [T, Hq, d], rotated
  const float* log_sum_exp = nullptr;  // [T, Hq], of the finished attention
  KvView keys;                         // row table_row holds columns 0 .. history_tokens + rows - 1
  int32_t table_row = 0;
  int32_t history_tokens = 0;  // absolute position of row 0; a multiple of kColumnSumRows
  int32_t rows = 0;            // T
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// H2O's prune at the end of a prompt of n tokens whose slots are in order of position: for each KV
// head the last `recent` tokens stay, and of the rest the `heavy` with the largest score (ties: the
// lower position). Compacted in place: heavy ascending by position in slots 0 .. heavy-1, a recent
// position p in slot heavy + ((p - heavy) mod recent). With n <= heavy + recent only positions are
// written. Eager.
struct PruneHeavyArgs {
  KvView view;
  SlotView score;     // float, moves along
  SlotView position;  // int32_t; written for all kept slots: the slot in which the token was
  int32_t table_row = 0;
  int32_t tokens = 0;  // n
  int32_t heavy = 0;
  int32_t recent = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// H2O's step after decode attention, for each active row and KV head, with p = position[b] the new
// token's position, C_h = heavy[b], C_r = recent[b], n = stored tokens before it: score[slot] +=
// sum over the group of its probability; the new token's score starts at its own; then, rule
// window_compare (strategies' closed form): p < C_h + C_r: the new token takes slot p. Otherwise,
// C_r >= 1: r = C_h + ((p - C_h) mod C_r) holds the token that leaves the window; if C_h >= 1 and
// the least heavy score (ties: the highest position) is < score[r], row r is copied over that heavy
// slot; the new token takes r. C_r = 0: the new token replaces the least scored slot if its own
// score is larger (ties keep the lower position, so the new token leaves). Writes key, value, score
// and position of whatever moved.
struct EvictHeavyArgs {
  KvView view;
  SlotView score;
  SlotView slot_position;
  const float* probability =
      nullptr;  // [B, Hq, probability_stride], of DecodeAttention over this view
  int64_t probability_stride = 0;
  Activations key;                      // [B, Hk, d], rotated
  Activations value;                    // [B, Hk, d]
  const int32_t* position = nullptr;    // [B], device
  const int32_t* heavy = nullptr;       // [B], device
  const int32_t* recent = nullptr;      // [B], device
  const int32_t* row_active = nullptr;  // [B], device
  int32_t rows = 0;
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// out[t, h] = in[t, h] * matrix[h / group]: each head through a thin matrix of its KV head
// (InfiniGen's skewing restricted to the kept columns).
struct ProjectHeadsArgs {
  Activations out;                // [T, heads, d']
  Activations in;                 // [T, heads, d]
  const float* matrix = nullptr;  // [Hk, d, d']
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t group = 1;    // heads that share one matrix
  int32_t in_dim = 0;   // d
  int32_t out_dim = 0;  // d'
};

// InfiniGen's speculation (Lee et al. 2024, section 4.3), for each active row b and KV head h over
// its n stored tokens (the current one is not among them): score[q, t] = query[b, q] .
// partial_key[t, h]; margin[b, h, t] = max over the group of score[q, t] - max_t' score[q, t'];
// count[b, h] = number of t with margin > -alpha.
struct SpeculateArgs {
  float* margin = nullptr;  // [B, Hk, margin_stride], device
  int64_t margin_stride = 0;
  int32_t* count = nullptr;             // [B, Hk], device
  Activations query;                    // [B, Hq, d'], scaled
  KvView partial_key;                   // keys only, head dimension d'; lengths n
  const int32_t* row_active = nullptr;  // [B], device
  float alpha = 4.0f;                   // infinity: all
  int32_t rows = 0;
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t partial_dim = 0;  // d'
};

// selected[b] = max(1, min(floor(mean over heads of count[b]), limit[b])), 0 for inactive rows or n
// = 0; index[b, h] = the selected[b] tokens with the largest margin (ties: the lower position),
// ascending. Integer mean.
struct SelectTopArgs {
  int32_t* selected = nullptr;  // [B], device
  int32_t* index = nullptr;     // [B, Hk, index_stride], device
  int64_t index_stride = 0;
  const float* margin = nullptr;  // as in SpeculateArgs
  int64_t margin_stride = 0;
  const int32_t* count = nullptr;       // [B, Hk], device
  const int32_t* length = nullptr;      // [B], device: n
  const int32_t* limit = nullptr;       // [B], device: m_max
  const int32_t* row_active = nullptr;  // [B], device
  int32_t rows = 0;
  int32_t kv_heads = 0;
};

// Row b, head h: slot j of target = token index[b, h, j] of source, j < selected[b]. Source on the
// host tier: the prefetch.
struct GatherRowsArgs {
  KvView target;
  KvView source;
  const int32_t* selected = nullptr;  // [B], device
  const int32_t* index = nullptr;     // [B, Hk, index_stride], device
  int64_t index_stride = 0;
  const int32_t* row_active = nullptr;  // [B], device
  int32_t rows = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// Row b: slots [0, n) of target = tokens first_token .. first_token + n - 1 of source, n =
// clamp(source length - first_token, 0, tokens): a tile of the ring through which full layers and
// prefill history stream. row >= 0 copies that source row alone, into target row 0.
struct CopyTileArgs {
  KvView target;
  KvView source;
  int32_t first_token = 0;
  int32_t tokens = 0;
  int32_t row = -1;
  int32_t row_tokens = 0;               // source length when row >= 0 (host value, eager)
  const int32_t* row_active = nullptr;  // [B], device
  int32_t rows = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// Sums over the ranks of a tensor-parallel group; with one rank nothing happens.
struct AllReduceArgs {
  Activations data;  // [T, N]
  int32_t rows = 0;
  int32_t columns = 0;
};

// --------------------------------------------------------------------------------------------------------------------
// interface

// What a backend says of itself.
struct BackendInfo {
  std::string backend;       // "cpu", "cuda"
  std::string device;        // name of the device
  std::string device_class;  // what must be equal for two results to compare
  std::string driver;
  uint64_t device_memory_bytes = 0;
  DType activation_dtype = DType::kF32;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;

  // Memory of a tier, aligned to 256 bytes, zeroed; freed by Free or with the backend.
  // ResourceExhausted with asked and available bytes.
  virtual absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes) = 0;
  virtual void Free(std::byte* memory) = 0;
  // Bytes allocated now, as the backend itself counts them.
  virtual uint64_t allocated_bytes(Tier tier) const = 0;

  virtual Event CreateEvent() = 0;
  virtual void RecordEvent(Event event, Stream stream) = 0;
  // Later work of `stream` runs after what was enqueued before the event's latest record.
  virtual void WaitEvent(Event event, Stream stream) = 0;

  // Blocks the host until the event's latest record has been reached, or until all streams are
  // empty. Returns the first error of an operation that ran since the last Wait, with its name.
  virtual absl::Status Wait(Event event) = 0;
  virtual absl::Status WaitAll() = 0;

  // Between the two, operations of all streams are recorded and not run. Capture begins and must
  // end on Stream::kCompute: streams that joined through events must be waited for before
  // EndCapture.
  virtual void BeginCapture() = 0;
  virtual absl::StatusOr<Graph> EndCapture() = 0;
  virtual void Launch(Graph graph) = 0;  // on Stream::kCompute
  virtual void DestroyGraph(Graph graph) = 0;

  // In modelled time: nanoseconds that all work waited for so far takes on the device profile,
  // streams overlapping as the events allow. 0 in real time.
  virtual int64_t modelled_ns() const = 0;

  // Bytes that copies between the tiers have moved so far, counted where they are moved.
  virtual uint64_t link_bytes_to_device() const = 0;
  virtual uint64_t link_bytes_to_host() const = 0;

  // max_tokens: the longest view of the step; plain host value.
  virtual AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const = 0;

  // Any tier to any tier. Host pointers may be ordinary memory; they must stay valid until the copy
  // has run.
  virtual void Copy(void* target, const void* source, uint64_t bytes, Stream stream) = 0;
  virtual void Zero(void* target, uint64_t bytes, Stream stream) = 0;

  virtual void Embed(const EmbedArgs& args, Stream stream) = 0;
  virtual void Norm(const NormArgs& args, Stream stream) = 0;
  virtual void Gemm(const GemmArgs& args, Stream stream) = 0;
  virtual void SiluGate(const SiluGateArgs& args, Stream stream) = 0;
  virtual void Rotary(const RotaryArgs& args, Stream stream) = 0;
  virtual void TakeRows(const TakeRowsArgs& args, Stream stream) = 0;
  virtual void Argmax(const ArgmaxArgs& args, Stream stream) = 0;
  virtual void Append(const AppendArgs& args, Stream stream) = 0;
  virtual void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) = 0;
  virtual void PrefillAttention(const PrefillAttentionArgs& args, Stream stream) = 0;
  virtual void ColumnSum(const ColumnSumArgs& args, Stream stream) = 0;
  virtual void PruneHeavy(const PruneHeavyArgs& args, Stream stream) = 0;
  virtual void EvictHeavy(const EvictHeavyArgs& args, Stream stream) = 0;
  virtual void ProjectHeads(const ProjectHeadsArgs& args, Stream stream) = 0;
  virtual void Speculate(const SpeculateArgs& args, Stream stream) = 0;
  virtual void SelectTop(const SelectTopArgs& args, Stream stream) = 0;
  virtual void GatherRows(const GatherRowsArgs& args, Stream stream) = 0;
  virtual void CopyTile(const CopyTileArgs& args, Stream stream) = 0;
  virtual void AllReduce(const AllReduceArgs& args, Stream stream) = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_BACKEND_H_
