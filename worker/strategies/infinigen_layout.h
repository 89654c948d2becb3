// Where InfiniGen's bytes lie, as plain numbers: pages, fixed structures, budgets in tokens, and
// the slot that a token takes. Pure; what an arm takes can be had without a backend.
//
// Device page: kPageTokens slots of
//   [L - n][Hk][slots][d']             partial keys of the speculating layers,
//   [L - n][Hk][slots], twice          positions, then uses (int32), if the pool is bounded,
//   [n][Hk][slots][key, value][d]      full layers, if they are resident.
// The same pages hold rows of one layer, as many as fit, [Hk][rows][key, value][d]: rows fetched
// for a step, and a prompt's earlier chunks (prefill_history: device).
//
// Host page: as many slots of all layers, [L][Hk][slots][key, value][d], then the partial keys,
// positions and uses in the device's layout, so that a preempted request comes back by plain
// copies.
#ifndef KVSWEEP_WORKER_STRATEGIES_INFINIGEN_LAYOUT_H_
#define KVSWEEP_WORKER_STRATEGIES_INFINIGEN_LAYOUT_H_

#include <cstdint>
#include <limits>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

inline constexpr int32_t kUnbounded = std::numeric_limits<int32_t>::max();

// Entries fetched at most for a request, layer and KV head (m_max): of max_kv_ratio or, if given,
// force_fetch_ratio.
int32_t InfinigenFetchLimit(const Infinigen& parameters, const RequestShape& shape);
// Slots of the host pool for a request, layer and KV head; capacity 1 is kUnbounded.
int32_t InfinigenCapacity(const Infinigen& parameters, const RequestShape& shape);

// How speculation's partial query comes about.
enum class QueryPath {
  kProjectThenSkew,  // x W_q, rotated, through thin matrices (rotary models, rope_speculation
                     // exact)
  kThinProjection,   // x times a thin, skewed copy of W_q (learned positions; pairs: rotated after)
  kRequestColumns,   // x W_q, rotated, skewed whole, the request's own columns picked
};

// Device bytes = fixed + pages * page_bytes; host bytes likewise.
struct InfinigenLayout {
  Infinigen parameters;
  int32_t layers = 0;
  int32_t full_layers = 0;  // n: layers that attend to everything; all of them with fetch: all
  int32_t partial_dim = 0;  // d'
  QueryPath query_path = QueryPath::kThinProjection;

  int32_t page_tokens = 16;
  int32_t fetch_page_rows = 1;         // rows of one layer that fit a device page
  uint64_t partial_token_bytes = 0;    // of one token, all speculating layers
  uint64_t state_token_bytes = 0;      // positions and uses, likewise
  uint64_t resident_token_bytes = 0;   // keys and values of resident full layers
  uint64_t key_value_token_bytes = 0;  // of all layers, on the host
  uint64_t page_bytes = 0;
  uint64_t fixed_device_bytes = 0;
  uint64_t fixed_host_bytes = 0;
  int32_t pages = 0;
  int32_t host_pages = 0;

  // Sizes of the largest step and the longest request.
  int32_t fetch_limit = 0;    // largest m_max
  int32_t fetch_pages = 0;    // of one of the two fetch buffers
  int32_t history_pages = 0;  // of one layer of a prompt; 0: history is not kept on the device
  int32_t table_pages = 0;    // of a request's slots
  int32_t ring_tokens = 0;    // tokens of one ring tile, all rows together

  int32_t speculating_layers() const { return layers - full_layers; }
  bool fetches_all() const { return parameters.fetch() == Infinigen::FETCH_ALL; }
  bool bounded() const { return parameters.capacity() < 1; }
  // Slots remember the positions (and uses) of what they hold.
  bool remembers() const { return state_token_bytes > 0; }
  bool resident() const { return resident_token_bytes > 0; }
  bool folded() const { return parameters.skew() == Infinigen::SKEW_FOLDED; }
  bool staged() const { return parameters.gather() == Infinigen::GATHER_STAGED && !fetches_all(); }
  // Layers whose earlier chunks are kept on the device until the prompt ends.
  int32_t history_layers() const {
    return history_pages == 0 ? 0 : layers - (resident() ? full_layers : 0);
  }

  uint64_t slot_bytes() const {  // of a token on the device
    return partial_token_bytes + state_token_bytes + resident_token_bytes;
  }
  uint64_t host_token_bytes() const {
    return key_value_token_bytes + partial_token_bytes + state_token_bytes;
  }
  uint64_t host_page_bytes() const {
    return host_token_bytes() * static_cast<uint64_t>(page_tokens);
  }

  // Slots that a request of `tokens` tokens has taken.
  int32_t SlotsOf(int32_t tokens, const RequestShape& shape) const;
  // Device pages of its slots, host pages of its slots, device pages of its two fetch buffers, and
  // of its prompt's history.
  int32_t SlotPages(int32_t tokens, const RequestShape& shape) const;
  int32_t HostPages(int32_t tokens, const RequestShape& shape) const;
  int32_t FetchPages(const RequestShape& shape) const;
  int32_t HistoryPages(const RequestShape& shape) const;

  // The slot of a token whose place depends on no count: before anything was fetched (a prompt),
  // where everything always is (full layers), and with fifo. Below the capacity slot = position.
  // Then fifo overwrites the oldest; the others the highest position outside the newer half, which
  // keeps the first positions and turns the rest into a ring.
  int32_t PlannedSlot(int32_t position, const RequestShape& shape) const;
};

// Bytes of the fixed device structures besides the step state's arrays: matrices, buffers, ring.
struct InfinigenScratch {
  float* query_matrix = nullptr;       // [L - n][Hk, d, d'], scaled; kProjectThenSkew
  float* key_matrix = nullptr;         // [L - n][Hk, d, d']; [L - n][Hk, d, d] with kRequestColumns
  std::byte* query_weight = nullptr;   // [L - n][Hq d', D], weight type, scaled; kThinProjection
  float* query_bias = nullptr;         // [L - n][Hq d']
  float* pair_frequency = nullptr;     // [L - n][d' / 2], of rotary pairs
  std::byte* folded_weight = nullptr;  // [L][(Hq + Hk) d, D], weight type; skew: folded
  float* folded_bias = nullptr;        // [L][(Hq + Hk) d]
  int32_t* column = nullptr;           // [sequence slots][L - n][Hk, d']; kRequestColumns
  std::byte* query = nullptr;          // [decode rows, Hq d], activations
  std::byte* partial_query = nullptr;  // [decode rows, Hq d'], activations
  std::byte* partial_key = nullptr;    // 2 x [rows, Hk d'], activations
  float* margin = nullptr;             // [decode rows, Hk, longest request]
  int32_t* count = nullptr;            // [decode rows, Hk]
  int32_t* index = nullptr;            // 2 x [decode rows, Hk, fetch_limit]
  int32_t* selected = nullptr;         // [L, decode rows, Hk]
  int32_t* slot = nullptr;    // 2 x [rows, Hk]: where tokens went, if that depends on counts
  PartialAttention partial;   // [rows]
  std::byte* ring = nullptr;  // 2 x [ring_tokens][Hk][key, value][d], KV dtype
};
// Lays the scratch out from `base` (nullptr: only measures) and returns its bytes.
uint64_t LayOutInfinigen(const InfinigenLayout& layout, const StrategySizes& sizes, std::byte* base,
                         InfinigenScratch* scratch);

// Pinned host memory beside the pool: what the host reads after a step, and the staged gather's
// buffers.
struct InfinigenHostScratch {
  int32_t* selected = nullptr;       // [L, decode rows, Hk]
  int32_t* staged_index = nullptr;   // [decode rows, Hk, fetch_limit]
  std::byte* staged_rows = nullptr;  // 2 x [decode rows, Hk, fetch_limit][key, value][d]
};
uint64_t LayOutInfinigenHost(const InfinigenLayout& layout, const StrategySizes& sizes,
                             std::byte* base, InfinigenHostScratch* scratch);

// What an arm of these sizes takes. InvalidArgument for parameters that the model cannot have or
// that contradict each other, naming the field; ResourceExhausted when fixed structures and one
// page exceed a budget.
absl::StatusOr<InfinigenLayout> InfinigenLayoutOf(const Infinigen& parameters,
                                                  const StrategySizes& sizes);

// The step state's arrays; Bytes counts what Register adds.
struct InfinigenArrays {
  StepState::Field slot_pages;     // [decode rows + sequences, table_pages]
  StepState::Field fetch_pages;    // [decode rows, 2, fetch_pages]
  StepState::Field limit;          // [decode rows]
  StepState::Field wanted;         // [decode rows]; force_fetch_ratio
  StepState::Field capacity;       // [decode rows]; bounded
  StepState::Field history_pages;  // [2, history layers, history_pages]
  StepState::Field history_row;    // [rows]; -1: not kept
  StepState::Field column_set;     // [rows], sequence slot; -1: none
};
InfinigenArrays RegisterInfinigen(const InfinigenLayout& layout, const StrategySizes& sizes,
                                  StepState* state);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_INFINIGEN_LAYOUT_H_
