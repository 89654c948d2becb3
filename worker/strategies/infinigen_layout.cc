#include "worker/strategies/infinigen_layout.h"

#include <algorithm>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/sequence_tables.h"
#include "worker/strategies/skewing.h"
#include "worker/strategies/tile_ring.h"
#include "worker/strategies/token_budget.h"

namespace kvsweep {
namespace {

int32_t Ratio(double ratio, const Infinigen& parameters, const RequestShape& shape) {
  return BudgetTokens(ratio,
                      BudgetBaseTokens(parameters.budget_base(),
                                       static_cast<int32_t>(parameters.budget_tokens()), shape),
                      1);
}

// The request that takes most: of any split of the longest context into prompt and output, the one
// that a ratio of either gives most.
RequestShape LongestRequest(const StrategySizes& sizes) {
  return {.prompt_tokens = sizes.max_context - 1, .max_tokens = 1};
}

}  // namespace

int32_t InfinigenFetchLimit(const Infinigen& parameters, const RequestShape& shape) {
  if (!parameters.has_force_fetch_ratio()) {
    return Ratio(parameters.max_kv_ratio(), parameters, shape);
  }
  return std::max(1, static_cast<int32_t>(parameters.force_fetch_ratio() * shape.limit() + 1e-9));
}

int32_t InfinigenCapacity(const Infinigen& parameters, const RequestShape& shape) {
  if (parameters.capacity() >= 1) return kUnbounded;
  return Ratio(parameters.capacity(), parameters, shape);
}

// ---------------------------------------------------------------------------------------- requests

int32_t InfinigenLayout::SlotsOf(int32_t tokens, const RequestShape& shape) const {
  return std::min(tokens, InfinigenCapacity(parameters, shape));
}

int32_t InfinigenLayout::SlotPages(int32_t tokens, const RequestShape& shape) const {
  return slot_bytes() == 0 ? 0 : HostPages(tokens, shape);
}

int32_t InfinigenLayout::HostPages(int32_t tokens, const RequestShape& shape) const {
  return PagesFor(SlotsOf(tokens, shape), page_tokens);
}

int32_t InfinigenLayout::FetchPages(const RequestShape& shape) const {
  if (speculating_layers() == 0) return 0;
  const int32_t rows =
      std::min(InfinigenFetchLimit(parameters, shape), SlotsOf(shape.limit(), shape));
  return 2 * PagesFor(rows, fetch_page_rows);
}

int32_t InfinigenLayout::HistoryPages(const RequestShape& shape) const {
  return history_layers() * PagesFor(SlotsOf(shape.prompt_tokens, shape), fetch_page_rows);
}

int32_t InfinigenLayout::PlannedSlot(int32_t position, const RequestShape& shape) const {
  const int32_t capacity = InfinigenCapacity(parameters, shape);
  if (position < capacity) return position;
  const int32_t kept = parameters.eviction_policy() == Infinigen::EVICTION_POLICY_FIFO
                           ? 0
                           : capacity - capacity / 2 - 1;
  return kept + (position - kept) % (capacity - kept);
}

// ------------------------------------------------------------------------------------------ memory

namespace {

// Hands out pieces of one allocation, each on a boundary of 256 bytes; without a base it only
// counts.
class Pieces {
 public:
  explicit Pieces(std::byte* base) : base_(base) {}
  template <typename Pointer>
  void Place(Pointer* pointer, int64_t count, int64_t element_bytes) {
    if (base_ != nullptr) *pointer = reinterpret_cast<Pointer>(base_ + bytes_);
    bytes_ += (static_cast<uint64_t>(count * element_bytes) + 255) / 256 * 256;
  }
  uint64_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  uint64_t bytes_ = 0;
};

}  // namespace

uint64_t LayOutInfinigen(const InfinigenLayout& layout, const StrategySizes& sizes, std::byte* base,
                         InfinigenScratch* scratch) {
  const ModelShape& shape = sizes.shape;
  const int64_t speculating = layout.speculating_layers();
  const int64_t dim = shape.head_dim;
  const int64_t matrix = int64_t{shape.kv_heads} * dim * layout.partial_dim;
  const int64_t query_columns = int64_t{shape.query_heads} * layout.partial_dim;
  const int64_t activation = DTypeBytes(sizes.activation_dtype);
  const int64_t weight = DTypeBytes(sizes.weight_dtype);
  const int64_t decode_rows = sizes.max_decode_rows;
  const int64_t rows = sizes.max_rows;
  Pieces pieces(base);

  if (speculating > 0) {
    const bool request_columns = layout.query_path == QueryPath::kRequestColumns;
    pieces.Place(&scratch->key_matrix,
                 speculating * (request_columns ? shape.kv_heads * dim * dim : matrix),
                 sizeof(float));
    if (layout.query_path == QueryPath::kProjectThenSkew) {
      pieces.Place(&scratch->query_matrix, speculating * matrix, sizeof(float));
    }
    if (layout.query_path == QueryPath::kThinProjection) {
      pieces.Place(&scratch->query_weight, speculating * query_columns * shape.hidden_size, weight);
      pieces.Place(&scratch->query_bias, speculating * query_columns, sizeof(float));
      if (shape.rotary) {
        pieces.Place(&scratch->pair_frequency, speculating * layout.partial_dim / 2, sizeof(float));
      }
    } else {
      pieces.Place(&scratch->query, decode_rows * shape.query_heads * dim, activation);
    }
    if (request_columns) {
      pieces.Place(&scratch->column,
                   sizes.max_sequences * speculating * shape.kv_heads * layout.partial_dim,
                   sizeof(int32_t));
    }
    pieces.Place(&scratch->partial_query, decode_rows * query_columns, activation);
    pieces.Place(&scratch->partial_key, 2 * rows * shape.kv_heads * layout.partial_dim, activation);
    pieces.Place(&scratch->margin, decode_rows * shape.kv_heads * sizes.max_context, sizeof(float));
    pieces.Place(&scratch->count, decode_rows * shape.kv_heads, sizeof(int32_t));
    pieces.Place(&scratch->index, 2 * decode_rows * shape.kv_heads * layout.fetch_limit,
                 sizeof(int32_t));
    pieces.Place(&scratch->selected, shape.layers * decode_rows * shape.kv_heads, sizeof(int32_t));
    if (layout.remembers()) {
      pieces.Place(&scratch->slot, 2 * rows * shape.kv_heads, sizeof(int32_t));
    }
  }
  if (layout.folded()) {
    const int64_t folded = shape.layers * (shape.query_heads + int64_t{shape.kv_heads}) * dim;
    pieces.Place(&scratch->folded_weight, folded * shape.hidden_size, weight);
    pieces.Place(&scratch->folded_bias, folded, sizeof(float));
  }
  const int64_t head_rows = rows * shape.query_heads;
  pieces.Place(&scratch->partial.output, head_rows * dim, sizeof(float));
  pieces.Place(&scratch->partial.maximum, head_rows, sizeof(float));
  pieces.Place(&scratch->partial.sum, head_rows, sizeof(float));
  pieces.Place(&scratch->ring, 2 * int64_t{layout.ring_tokens} * shape.kv_heads * 2 * dim,
               DTypeBytes(sizes.kv_dtype));
  return pieces.bytes();
}

uint64_t LayOutInfinigenHost(const InfinigenLayout& layout, const StrategySizes& sizes,
                             std::byte* base, InfinigenHostScratch* scratch) {
  const int64_t pairs = int64_t{sizes.max_decode_rows} * sizes.shape.kv_heads;
  Pieces pieces(base);
  if (layout.speculating_layers() == 0) return 0;
  pieces.Place(&scratch->selected, layout.layers * pairs, sizeof(int32_t));
  if (layout.staged()) {
    pieces.Place(&scratch->staged_index, pairs * layout.fetch_limit, sizeof(int32_t));
    pieces.Place(&scratch->staged_rows, 2 * pairs * layout.fetch_limit * 2 * sizes.shape.head_dim,
                 DTypeBytes(sizes.kv_dtype));
  }
  return pieces.bytes();
}

namespace {

// How many int32 each array of the step state has.
struct ArrayCounts {
  int64_t slot_pages, fetch_pages, limit, wanted, capacity, history_pages, history_row, column_set;
};

ArrayCounts CountArrays(const InfinigenLayout& layout, const StrategySizes& sizes) {
  const int64_t decode_rows = sizes.max_decode_rows;
  const bool speculates = layout.speculating_layers() > 0;
  return {.slot_pages = layout.slot_bytes() == 0
                            ? 0
                            : (decode_rows + sizes.max_sequences) * layout.table_pages,
          // Odd layers' tables begin in the middle of a row: one half more than rows have.
          .fetch_pages = (decode_rows * 2 + 1) * layout.fetch_pages,
          .limit = speculates ? decode_rows : 0,
          .wanted = speculates && layout.parameters.has_force_fetch_ratio() ? decode_rows : 0,
          .capacity = layout.remembers() ? decode_rows : 0,
          .history_pages = int64_t{2} * layout.history_layers() * layout.history_pages,
          .history_row = layout.history_pages > 0 ? sizes.max_rows : 0,
          .column_set = layout.query_path == QueryPath::kRequestColumns ? sizes.max_rows : 0};
}

uint64_t ArrayBytes(const ArrayCounts& counts) {
  uint64_t bytes = 0;
  for (const int64_t count :
       {counts.slot_pages, counts.fetch_pages, counts.limit, counts.wanted, counts.capacity,
        counts.history_pages, counts.history_row, counts.column_set}) {
    bytes += StepState::FieldBytes(count);
  }
  return bytes;
}

}  // namespace

InfinigenArrays RegisterInfinigen(const InfinigenLayout& layout, const StrategySizes& sizes,
                                  StepState* state) {
  const ArrayCounts counts = CountArrays(layout, sizes);
  InfinigenArrays arrays;
  arrays.slot_pages = state->Add(counts.slot_pages);
  arrays.fetch_pages = state->Add(counts.fetch_pages);
  arrays.limit = state->Add(counts.limit);
  arrays.wanted = state->Add(counts.wanted);
  arrays.capacity = state->Add(counts.capacity);
  arrays.history_pages = state->Add(counts.history_pages);
  arrays.history_row = state->Add(counts.history_row);
  arrays.column_set = state->Add(counts.column_set);
  return arrays;
}

// ---------------------------------------------------------------------------------------- checking

namespace {

absl::Status Contradiction(absl::string_view field, absl::string_view why,
                           absl::string_view remedy) {
  return absl::InvalidArgumentError(absl::StrCat("infinigen.", field, ": ", why, "; ", remedy));
}

absl::Status CheckParameters(const Infinigen& parameters, const ModelShape& shape) {
  const bool all = parameters.fetch() == Infinigen::FETCH_ALL;
  const bool request_columns = parameters.columns() == Infinigen::COLUMNS_REQUEST;
  const bool paired =
      shape.rotary && parameters.rope_speculation() == Infinigen::ROPE_SPECULATION_PAIRED;
  const bool folded = parameters.skew() == Infinigen::SKEW_FOLDED;
  const bool combined = parameters.column_score() == Infinigen::COLUMN_SCORE_UNION;
  const auto full_layers = static_cast<int32_t>(parameters.n_full_layers());
  if (!all && full_layers >= shape.layers) {
    return Contradiction("n_full_layers",
                         absl::StrCat(full_layers, " leaves no layer of the model's ", shape.layers,
                                      " to speculate for"),
                         absl::StrCat("use at most ", shape.layers - 1));
  }
  if (parameters.budget_base() == BUDGET_BASE_FINAL) {
    return Contradiction("budget_base", "final is for h2o's fidelity runs", "use limit or prompt");
  }
  if (folded && shape.rotary) {
    return Contradiction("skew",
                         "folded needs learned positions: the rotation stands between the "
                         "weights and the score",
                         "use speculative");
  }
  if (folded && all) {
    return Contradiction("skew", "folded has nothing to skew with fetch: all", "use speculative");
  }
  if (request_columns && (paired || folded || combined)) {
    return Contradiction("columns", "request ranks the columns of the whole skewed keys",
                         "use rope_speculation exact, skew speculative and column_score product or "
                         "query with it");
  }
  if (request_columns && parameters.prefill_history() != Infinigen::PREFILL_HISTORY_WHOLE) {
    return Contradiction("columns", "request needs a prompt in one piece",
                         "set prefill_history: whole");
  }
  if (paired && combined) {
    return Contradiction("column_score", "union has no rotary pairs", "use product or query");
  }
  if (all && parameters.full_layers_on_device()) {
    return Contradiction("full_layers_on_device", "with fetch: all every layer is a full layer",
                         "use strategy paged for a cache on the device");
  }
  if (all && parameters.capacity() < 1 &&
      parameters.eviction_policy() != Infinigen::EVICTION_POLICY_FIFO) {
    return Contradiction("eviction_policy", "with fetch: all every entry is used in every step",
                         "use fifo");
  }
  return absl::OkStatus();
}

QueryPath QueryPathOf(const Infinigen& parameters, const ModelShape& shape) {
  if (parameters.columns() == Infinigen::COLUMNS_REQUEST) return QueryPath::kRequestColumns;
  const bool paired = parameters.rope_speculation() == Infinigen::ROPE_SPECULATION_PAIRED;
  return shape.rotary && !paired ? QueryPath::kProjectThenSkew : QueryPath::kThinProjection;
}

// Tokens of a page: enough that at least one row of a layer fits.
int32_t PageTokens(uint64_t slot_bytes, uint64_t row_bytes) {
  int32_t tokens = 16;
  while (slot_bytes > 0 && slot_bytes * static_cast<uint64_t>(tokens) < row_bytes) tokens *= 2;
  return tokens;
}

int32_t PagesOfAllSequences(const StrategySizes& sizes, int64_t pages) {
  return static_cast<int32_t>(
      std::min<int64_t>(sizes.max_sequences * pages, std::numeric_limits<int32_t>::max() / 2));
}

// Bytes of tokens, pages and rows, and the sizes of the longest request.
void SetSizes(const StrategySizes& sizes, InfinigenLayout* layout) {
  const ModelShape& shape = sizes.shape;
  const Infinigen& parameters = layout->parameters;
  const auto bytes = static_cast<uint64_t>(DTypeBytes(sizes.kv_dtype));
  const auto heads = static_cast<uint64_t>(shape.kv_heads);
  const uint64_t row_bytes = 2 * bytes * heads * static_cast<uint64_t>(shape.head_dim);
  const auto speculating = static_cast<uint64_t>(layout->speculating_layers());
  layout->partial_token_bytes =
      bytes * speculating * heads * static_cast<uint64_t>(layout->partial_dim);
  if (layout->bounded()) {
    const bool fifo = parameters.eviction_policy() == Infinigen::EVICTION_POLICY_FIFO;
    layout->state_token_bytes = (fifo ? 1 : 2) * sizeof(int32_t) * speculating * heads;
  }
  if (parameters.full_layers_on_device()) {
    layout->resident_token_bytes = row_bytes * static_cast<uint64_t>(layout->full_layers);
  }
  layout->key_value_token_bytes = row_bytes * static_cast<uint64_t>(shape.layers);
  const uint64_t slot_bytes = layout->slot_bytes();
  layout->page_tokens = PageTokens(slot_bytes, row_bytes);
  layout->page_bytes =
      (slot_bytes > 0 ? slot_bytes : row_bytes) * static_cast<uint64_t>(layout->page_tokens);
  layout->fetch_page_rows = static_cast<int32_t>(layout->page_bytes / row_bytes);

  const RequestShape longest = LongestRequest(sizes);
  layout->table_pages = layout->HostPages(sizes.max_context, longest);
  if (speculating > 0) {
    layout->fetch_limit = std::min(InfinigenFetchLimit(parameters, longest), sizes.max_context);
    layout->fetch_pages = PagesFor(layout->fetch_limit, layout->fetch_page_rows);
  }
  if (parameters.prefill_history() == Infinigen::PREFILL_HISTORY_DEVICE) {
    layout->history_pages =
        PagesFor(layout->SlotsOf(sizes.max_context, longest), layout->fetch_page_rows);
  }
  layout->ring_tokens =
      RingTokens(std::max(sizes.max_decode_rows, std::min(sizes.max_context, 256)),
                 int64_t{sizes.max_decode_rows} * sizes.max_context, row_bytes, sizes.device_bytes);
}

absl::Status SetPages(const StrategySizes& sizes, InfinigenLayout* layout) {
  InfinigenScratch unused;
  InfinigenHostScratch host_unused;
  layout->fixed_device_bytes = SequenceTables::Bytes(sizes, layout->table_pages) +
                               ArrayBytes(CountArrays(*layout, sizes)) +
                               LayOutInfinigen(*layout, sizes, nullptr, &unused);
  layout->fixed_host_bytes = LayOutInfinigenHost(*layout, sizes, nullptr, &host_unused);
  const int64_t most = int64_t{layout->slot_bytes() > 0 ? layout->table_pages : 0} +
                       2 * int64_t{layout->fetch_pages} +
                       int64_t{layout->history_layers()} * layout->history_pages;
  ASSIGN_OR_RETURN(layout->pages, PagesInBudget(sizes.device_bytes, layout->fixed_device_bytes,
                                                most > 0 ? layout->page_bytes : 1, "infinigen"));
  layout->pages = most > 0 ? std::min(layout->pages, PagesOfAllSequences(sizes, most)) : 0;
  ASSIGN_OR_RETURN(layout->host_pages,
                   PagesInBudget(sizes.host_bytes, layout->fixed_host_bytes,
                                 layout->host_page_bytes(), "infinigen on the host"));
  // Preempted requests keep their host pages, so twice as many sequences may hold some.
  layout->host_pages =
      std::min(layout->host_pages, PagesOfAllSequences(sizes, 2 * int64_t{layout->table_pages}));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<InfinigenLayout> InfinigenLayoutOf(const Infinigen& parameters,
                                                  const StrategySizes& sizes) {
  const ModelShape& shape = sizes.shape;
  RETURN_IF_ERROR(CheckParameters(parameters, shape));
  InfinigenLayout layout;
  layout.parameters = parameters;
  layout.layers = shape.layers;
  layout.full_layers =
      layout.fetches_all() ? shape.layers : static_cast<int32_t>(parameters.n_full_layers());
  if (!layout.fetches_all()) {
    layout.partial_dim = PartialDim(parameters.partial_weight_ratio(), shape.head_dim,
                                    parameters.column_score() == Infinigen::COLUMN_SCORE_UNION);
    layout.query_path = QueryPathOf(parameters, shape);
  }
  SetSizes(sizes, &layout);
  RETURN_IF_ERROR(SetPages(sizes, &layout));
  return layout;
}

}  // namespace kvsweep
