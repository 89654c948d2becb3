// What the backend's operations take (backend.h says how they run). Outputs first, then inputs,
// then sizes. Plain values, so that device compilers read this header too. "Weight type" and
// activations are what the backend's info says.
#ifndef KVSWEEP_KERNELS_ARGUMENTS_H_
#define KVSWEEP_KERNELS_ARGUMENTS_H_

#include <cstdint>

#include "kernels/shapes.h"

namespace kvsweep {

// out[i] = deviation * NormalValue(seed, i) (normal_value.h), rounded to dtype: the same numbers on
// every backend.
struct FillNormalArgs {
  void* out = nullptr;  // [count]
  DType dtype = DType::kF32;
  int64_t count = 0;
  uint64_t seed = 0;
  float deviation = 1.0f;
};

// out[t] = table[id] (+ position_table[position + position_offset]); id = token_id[t], or
// sampled[-1 - token_id[t]] where it is negative, so that a step can start before the host has seen
// the last one's tokens.
struct EmbedArgs {
  Activations out;                       // [T, D]
  const int32_t* token_id = nullptr;     // [T], device
  const int32_t* sampled = nullptr;      // [sequence slots], device
  const int32_t* position = nullptr;     // [T], device
  const void* table = nullptr;           // [V, D], weight type
  const void* position_table = nullptr;  // [positions, D], weight type, or nullptr
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
  Activations out;               // [T, N]
  Activations in;                // [T, K]
  const void* weight = nullptr;  // [N, K], weight type
  const float* bias = nullptr;   // [N] or nullptr
  bool relu = false;
  bool accumulate = false;
  bool f32_out = false;     // out holds f32 whatever the activations are (logits)
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

// A product and the gate of its outputs; product.out is room between the two that need not be
// written.
struct GatedGemmArgs {
  GemmArgs product;   // neither accumulated nor f32_out
  Activations gated;  // [T, N/2] = silu(outputs[:, :N/2]) * outputs[:, N/2:]
};

// Rotary embedding in place, rotate-half order: columns (j, j + d/2) of a head turn by position *
// inverse_frequency[j]. The table carries whatever scaling the model asks for.
struct RotaryArgs {
  Activations data;                          // [T, heads, d]
  const int32_t* position = nullptr;         // [T], device
  const float* inverse_frequency = nullptr;  // [d/2], device
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t head_dim = 0;
};

// out[r] = in[row[r]]; row -1 gives zeros.
struct TakeRowsArgs {
  Activations out;               // [R, D]
  Activations in;                // [T, D]
  const int32_t* row = nullptr;  // [R], device
  int32_t rows = 0;              // R
  int32_t columns = 0;
};

// token[target[r]] = the id with the (rank[r] + 1)-th largest logit of row r, the lower id first on
// ties: rank 0 (or nullptr) is argmax. target -1: nothing is written. Ranks other than 0 come in
// eager steps only: continuations of one prompt begin with different tokens. rank[r] < V, small.
struct ArgmaxArgs {
  int32_t* token = nullptr;         // [sequence slots], device
  Activations logits;               // [R, V], f32
  const int32_t* target = nullptr;  // [R], device
  const int32_t* rank = nullptr;    // [R], device; nullptr: 0 for all
  int32_t rows = 0;
  int32_t columns = 0;  // V
};

// Whole blocks: for i < count, the block_bytes bytes of block pair[i, 1] of `target` = those of block
// pair[i, 0] of `source`, block b beginning at b * block_bytes. Either side may lie on either tier:
// copy-on-write inside the device pool, swap to the host pool and back. No block is named as a
// target twice, and none is both a source and a target, unless the pools differ: the copies may run
// in any order. A block holds all layers, so it is one contiguous piece of tens of KiB to a few MiB:
// a kernel that reads or writes pinned memory, or batched asynchronous copies, reach the link's rate
// without staging. Eager: count is a host value; the pairs are read when the operation runs, so
// they must stay until then.
struct CopyBlocksArgs {
  std::byte* target = nullptr;        // pool
  const std::byte* source = nullptr;  // pool
  const int32_t* pair = nullptr;      // [count, 2], device: source block, target block
  int64_t block_bytes = 0;            // a multiple of 16 on backends with wide copies, else of any size
  int32_t count = 0;
};

// Stores keys (and values) of T tokens into a view, converting to its dtype: token t goes to slot
// slot[t] of block table row table_row[t], or, slot_by_head, head h to slot[t, h]; table_row -1: not
// stored. Also the way into the host tier (on Stream::kDeviceToHost).
//
// With `rotary` its rows are turned first, as by Rotary, in the same launch where the keys are its
// last heads and the target is on the device.
struct AppendArgs {
  KvView target;
  Activations key;                     // [T, Hk, d]
  Activations value;                   // [T, Hk, d]; ignored when target.value is nullptr
  const int32_t* table_row = nullptr;  // [T], device
  const int32_t* slot = nullptr;       // [T] or [T, Hk], device
  bool slot_by_head = false;
  RotaryArgs rotary;  // data nullptr: nothing is turned
  int32_t rows = 0;   // T
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// Keys and values that attention takes from the activations (the current token's, a chunk's own)
// are rounded to the view's dtype first, as if they had been stored and read back: whether a token
// comes from the cache or from the step makes no difference.

// Keys that are stored before rotary embedding and turned as they are read, after their conversion
// to f32, as Rotary turns them: positions inside the cache, which move. With it no key comes
// rotated, neither a view's nor an own one from the activations. Slot s of a row, counted over the
// whole sequence (slot 0 of a tile is its first_token), stands at position rank[s]; own key i stands
// behind the n stored tokens, at n + i, where n is the row's length before first_token and
// max_tokens are applied (decode), or first_token + history_tokens (prefill).
struct KeyRotation {
  const float* inverse_frequency = nullptr;  // [d/2], device; nullptr: keys are as they are
  SlotView rank;  // int32_t, by the view's row number; data nullptr: the slot's number
};

// How decode attention is split; made once a step for all layers.
struct AttentionPlan {
  int32_t splits = 1;
  int32_t split_tokens = 0;  // tokens of a split; fixed in batch-invariant mode
};

// One query row for each sequence against its view and, where given, the current token's own key
// and value from the activations. Row b uses row b of the view's block table. Exactly one of {out}
// and {partial} is written; partial is merged into what it holds if accumulate. Rows with nothing
// to attend to give 0.
//
// Probabilities of a sequence that is attended to tile by tile: a call that writes partial leaves
// its tile's scaled scores in `probability`, at index first_token + s; the last call, which writes
// out, turns all n + 1 entries of a row (n: its length before first_token and max_tokens are
// applied) into probabilities.
struct DecodeAttentionArgs {
  Activations out;               // [B, Hq, d]; data nullptr: write partial
  PartialAttention partial;      // rows B; output nullptr: write out
  bool accumulate = false;       // start from partial's content; with out: merge it in
  float* probability = nullptr;  // [B, Hq, probability_stride] or nullptr; slot s, the current
                                 // token at index n
  int64_t probability_stride = 0;
  Activations query;          // [B, Hq, d]
  Activations current_key;    // [B, Hk, d]; data nullptr: none
  Activations current_value;  // [B, Hk, d]
  KvView view;
  KeyRotation rotation;
  const int32_t* row_active = nullptr;  // [B], device; nullptr: all
  AttentionPlan plan;
  int32_t rows = 0;  // B
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// Append of the rows' own keys and values, turned with the queries first where append.rotary says so,
// and decode attention over what was stored before and those: the same rows, keys and values in
// both, stored in the view's pool. A row that is not active stores nothing (its table_row is -1).
// Whether append.rotary.data holds turned rows afterwards is left open.
struct AppendAndAttendArgs {
  AppendArgs append;
  DecodeAttentionArgs attention;
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
  KeyRotation rotation;
  int32_t history_row = 0;       // row of the block table
  int32_t history_tokens = 0;    // slots [0, history_tokens) are attended
  int32_t rows = 0;              // T
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// How H2O's scores are formed, kept and compared; the same for a whole trial.
struct HeavyScoring {
  bool group_maximum = false;  // a slot receives the largest of the group's probabilities, not their sum
  float decay = 1.0f;  // every query position first multiplies what is there: 1 accumulates (H2O), 0
                       // leaves the last query's row alone (TOVA)
  bool mean = false;   // compared are means over the queries that could see the key: score / (p + 1 -
                       // the slot's position), p being the newest token's position
  bool half = false;   // scores are rounded to f16 whenever they are written (FlexGen's accumulators)
};

// Adds to score[h, c] the attention probability that column c received from the chunk's rows, of
// the g query heads of KV head h together (scoring.group_maximum: the largest of them), for columns
// c = first_token .. min(first_token + max_tokens, history_tokens + rows) - 1 of the view `keys`,
// whose slot s is column first_token + s (Zhang et al. 2023, section 4; two passes instead of the n
// x n matrix). Row i sees columns 0 .. history_tokens + i. Sums are formed over tiles of
// kColumnSumRows rows, cut where history_tokens + i is a multiple of it, in a fixed order, so chunk
// borders at such multiples change no bit. The columns of the chunk itself must already stand in
// the view; their scores are written, those of earlier columns added to.
//
// With scoring.decay = f each row multiplies the scores by f before it adds: inside a tile sum = f *
// sum + the row's, and a tile of r rows makes score = f^r * score + sum. scoring.half rounds where
// a tile's sum has been added.
inline constexpr int32_t kColumnSumRows = 128;
struct ColumnSumArgs {
  SlotView score;                      // float, slot c of row table_row is column c
  Activations query;                   // [T, Hq, d], rotated
  const float* log_sum_exp = nullptr;  // [T, Hq], of the finished attention
  KvView keys;                         // row table_row
  KeyRotation rotation;
  HeavyScoring scoring;
  int32_t table_row = 0;
  int32_t history_tokens = 0;  // columns before the chunk's own
  int32_t rows = 0;            // T
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
};

// H2O's prune of a prompt of which n tokens are stored, their slots ascending by position: for each
// KV head the last `recent` tokens stay, the first `sinks`, and of the others those with the largest
// score (scoring.mean: mean; ties: the lower position) until `heavy` tokens, sinks included, stand
// beside the recent ones. Compacted in place, no token to a later slot than its own before the ring
// is formed: heavy ascending by position in slots 0 .. heavy-1, then the recent ones: with `ring` (the
// prompt has ended) position p in slot heavy + ((p - heavy) mod recent), otherwise ascending. With n
// <= heavy + recent nothing moves. Eager.
//
// The first `placed` slots carry positions of an earlier prune, slot s >= placed is position
// first_position + s - placed and has it written. Ranks (KeyRotation) of all kept slots are written:
// 0, 1, … by position.
struct PruneHeavyArgs {
  KvView view;
  SlotView score;     // float, moves along; data nullptr: none, the heavy tokens are the first ones
  SlotView position;  // int32_t, moves along; data nullptr: not kept (scoring.mean needs it)
  SlotView rank;      // int32_t; data nullptr: not kept
  HeavyScoring scoring;
  int32_t table_row = 0;
  int32_t tokens = 0;  // n
  int32_t placed = 0;
  int32_t first_position = 0;
  int32_t heavy = 0;
  int32_t recent = 0;
  int32_t sinks = 0;  // at most `heavy` count
  bool ring = true;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

// H2O's step after decode attention, for each active row and KV head, with p = position[b] the new
// token's position, C_h = heavy[b], C_r = recent[b], S = min(sinks, C_h), n = stored tokens before
// it: score[slot] = decay * score[slot] + what the slot received: the sum over the group of its
// probabilities (scoring.group_maximum: the largest); the new token's score is what it received
// itself. Then the new token is placed (strategies' closed form):
//
// p < C_h + C_r: in slot p. Otherwise, C_r >= 1: r = C_h + ((p - C_h) mod C_r) holds the token that
// leaves the window. It is copied over the least of the heavy slots [S, C_h) (by score, scoring.mean:
// by mean; ties: the highest position) if there are any and that one is less than it, or, with
// `promote` (FlexGen's program), whatever it is; the new token takes r. C_r = 0: the new token takes
// the least of the slots [S, C_h) if that is less than its own score (ties: the new token leaves),
// with `promote` whatever it is.
//
// Writes key, value, score, position and rank of whatever moved. Ranks (KeyRotation): those above
// the one that left sink by one, and the new token has C_h + C_r - 1 (p in slot p).
struct EvictHeavyArgs {
  KvView view;
  SlotView score;          // float; data nullptr: none (then C_h = S and nothing is compared)
  SlotView slot_position;  // int32_t; data nullptr: not kept (only without scores)
  SlotView rank;           // int32_t; data nullptr: not kept
  HeavyScoring scoring;
  bool promote = false;
  int32_t sinks = 0;
  const float* probability = nullptr;  // [B, Hq, probability_stride], of DecodeAttention over this
                                       // view; not read without scores
  int64_t probability_stride = 0;
  Activations key;                      // [B, Hk, d], as keys stand in the view
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

// out[t, h] = in[t, h / repeat]: keys and values of a group once for each of its query heads.
struct RepeatHeadsArgs {
  Activations out;  // [T, heads * repeat, d]
  Activations in;   // [T, heads, d]
  int32_t repeat = 1;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t head_dim = 0;
};

// out[t, h] = scale * in[t, h] * matrix[h / group]: each head through a matrix of its KV head
// (InfiniGen's skewing). The matrices are thin, [d, d'], or, with `column`, square, [d, d], and each
// token picks d' of the product's columns: out[t, h, c] = scale * (in[t, h] *
// matrix[h / group])[column[column_set[t], h / group, c]]; column_set -1: zeros.
struct ProjectHeadsArgs {
  Activations out;                 // [T, heads, d']
  Activations in;                  // [T, heads, d]
  const float* matrix = nullptr;   // [Hk, d, d'], or [Hk, d, d] with column; device
  const int32_t* column = nullptr;      // [sets, Hk, d'], device; nullptr: the matrix is thin
  const int32_t* column_set = nullptr;  // [T], device
  int64_t column_stride = 0;            // elements from set to set
  float scale = 1.0f;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t group = 1;    // heads that share one matrix
  int32_t in_dim = 0;   // d
  int32_t out_dim = 0;  // d'
};

// The columns that speculation keeps for one prompt (Lee et al. 2024, section 4.3): for each KV head
// the d' columns c with the largest (sum over t and the group of |q A|_c) * (sum over t of
// |k A - mean_t k A|_c), or, query_alone, the first factor alone; ties: the lower number. Written
// ascending. Computed in double. Eager.
struct RankColumnsArgs {
  int32_t* column = nullptr;      // [Hk, d'], device
  Activations query;              // [T, Hq, d], rotated
  Activations key;                // [T, Hk, d], rotated
  const float* matrix = nullptr;  // [Hk, d, d], A; device
  bool query_alone = false;
  int32_t rows = 0;  // T, all of one prompt
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;     // d
  int32_t partial_dim = 0;  // d'
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

// Over what the counts of wanted entries are averaged (integer division).
enum class SelectionScope : uint8_t {
  kRequest,  // a row's KV heads
  kHead,     // nothing: each KV head has its own number
  kBatch,    // all KV heads of all active rows with n > 0 (the authors' program)
};

// What a slot of a bounded pool remembers of its use, as int32_t.
enum class SlotUse : uint8_t {
  kNone,
  kCount,  // how often it was selected; when a slot reaches use_limit, all of the (row, head) halve
  kStamp,  // the position of the token for which it was selected last
};

// For each active row b with n = length[b] > 0 stored tokens and each KV head h: m = the mean of
// count over the scope (or wanted[b]), held to [1, min(limit[b], n)]; index[b, h] = the m slots with
// the largest margin (ties: the lower position), ascending; selected[b, h] = m, 0 for other rows.
// Where slots remember their use, those selected are marked.
struct SelectTopArgs {
  int32_t* selected = nullptr;  // [B, Hk], device
  int32_t* index = nullptr;     // [B, Hk, index_stride], device
  int64_t index_stride = 0;
  const float* margin = nullptr;  // as in SpeculateArgs
  int64_t margin_stride = 0;
  const int32_t* count = nullptr;       // [B, Hk], device
  const int32_t* wanted = nullptr;      // [B], device: instead of the counts; nullptr: the counts
  const int32_t* length = nullptr;      // [B], device: n
  const int32_t* limit = nullptr;       // [B], device: m_max
  const int32_t* row_active = nullptr;  // [B], device
  SelectionScope scope = SelectionScope::kRequest;
  SlotView slot_position;  // int32_t, row b; data nullptr: slot s holds position s
  SlotView use;            // int32_t, row b; data nullptr: none
  SlotUse use_rule = SlotUse::kNone;
  const int32_t* stamp = nullptr;  // [B], device; kStamp
  int32_t use_limit = 65535;       // kCount
  int32_t rows = 0;
  int32_t kv_heads = 0;
};

// Where tokens go in a pool of bounded slots, by KV head, and what their slots then remember: for
// each token t with table_row[t] >= 0, slot[t, h] = planned[t], or, for t < decided_rows with
// position[t] >= capacity[t] and a use rule, the least used of the capacity[t] slots (all taken)
// without the capacity[t] / 2 newest (ties: the highest position). Then slot_position[slot] =
// position[t] and use[slot] = 0 (kCount) or position[t] (kStamp). A row has at most one decided
// token; planned slots of one call are distinct.
struct PlaceTokensArgs {
  int32_t* slot = nullptr;             // [T, Hk], device
  SlotView slot_position;              // int32_t
  SlotView use;                        // int32_t; data nullptr: none
  SlotUse use_rule = SlotUse::kNone;
  const int32_t* table_row = nullptr;  // [T], device; of both slot views
  const int32_t* position = nullptr;   // [T], device
  const int32_t* planned = nullptr;    // [T], device
  const int32_t* capacity = nullptr;   // [decided_rows], device
  int32_t decided_rows = 0;
  int32_t rows = 0;  // T
  int32_t kv_heads = 0;
};

// Row b, head h: slot j of target = token index[b, h, j] of source, j < selected[b, h]. Source on
// the host tier: the prefetch.
struct GatherRowsArgs {
  KvView target;
  KvView source;
  const int32_t* selected = nullptr;  // [B, Hk], device
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

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_ARGUMENTS_H_
