#include "worker/strategies/h2o.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"

namespace kvsweep {

// -----------------------------------------------------------------------------------------------
// building

namespace {

HeavyScoring ScoringOf(const H2o& parameters) {
  HeavyScoring scoring;
  scoring.group_maximum = parameters.group_aggregation() == H2o::GROUP_AGGREGATION_MAX;
  scoring.mean = parameters.score_norm() == H2o::SCORE_NORM_MEAN;
  scoring.half = parameters.score_dtype() == H2o::SCORE_DTYPE_F16;
  if (parameters.score_norm() == H2o::SCORE_NORM_DECAYED) {
    scoring.decay = static_cast<float>(parameters.score_decay());
  }
  if (parameters.evict_rule() == H2o::EVICT_RULE_CURRENT_ONLY) scoring.decay = 0.0f;
  return scoring;
}

// `view` with `row` as its row 0.
SlotView AtRow(SlotView view, int32_t row) {
  view.block_table += int64_t{row} * view.block_table_stride;
  return view;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CacheStrategy>> H2oStrategy::Create(const H2o& parameters,
                                                                   const StrategyContext& context) {
  ASSIGN_OR_RETURN(const H2oLayout layout, H2oLayoutOf(parameters, context));
  StepState& state = *context.step_state;
  const uint64_t before = state.device_bytes();
  SequenceTables tables(context, layout.table_pages);
  std::optional<SequenceTables> full_tables;
  if (layout.full_page_tokens > 0) full_tables.emplace(context, layout.full_table_pages);
  Arrays arrays;
  for (StepState::Field* field : {&arrays.position, &arrays.heavy, &arrays.recent}) {
    *field = state.Add(context.max_decode_rows);
  }
  if (parameters.positions() == H2o::POSITIONS_ROLLING) {
    arrays.cache_position = state.Add(context.max_rows);
  }
  KVSWEEP_CHECK_EQ(state.device_bytes() - before + layout.scratch.bytes, layout.fixed_bytes);
  std::unique_ptr<H2oStrategy> strategy(
      new H2oStrategy(layout, context, std::move(tables), std::move(full_tables), arrays));
  RETURN_IF_ERROR(strategy->AllocateMemory());
  return strategy;
}

H2oStrategy::H2oStrategy(const H2oLayout& layout, const StrategyContext& context,
                         SequenceTables tables, std::optional<SequenceTables> full_tables,
                         const Arrays& arrays)
    : context_(context),
      manager_(layout),
      tables_(std::move(tables)),
      full_tables_(std::move(full_tables)),
      arrays_(arrays),
      scoring_(ScoringOf(layout.parameters)) {}

absl::Status H2oStrategy::AllocateMemory() {
  const H2oLayout& layout = manager_.layout();
  const auto pages = static_cast<uint64_t>(layout.pages);
  ASSIGN_OR_RETURN(memory_.scratch,
                   AllocateFor(context_, Tier::kDevice, layout.scratch.bytes, "h2o buffers"));
  ASSIGN_OR_RETURN(memory_.pages,
                   AllocateFor(context_, Tier::kDevice, pages * layout.page_bytes(), "h2o pages"));
  const uint64_t host_bytes = pages * layout.host_page_bytes() +
                              static_cast<uint64_t>(layout.swap_pages) * layout.page_bytes();
  if (host_bytes > 0) {
    ASSIGN_OR_RETURN(memory_.host,
                     AllocateFor(context_, Tier::kHost, host_bytes, "h2o pages on the host"));
  }
  if (layout.swap_pages > 0) {
    transfers_.emplace(
        context_.backend,
        PageTransfers::Memory{.device = memory_.pages,
                              .host = memory_.host,
                              .lists = memory_.scratch + layout.scratch.swap_lists,
                              .page_bytes = static_cast<int64_t>(layout.page_bytes()),
                              .most_pages = layout.swapped_pages});
  }
  if (on_host()) {
    ring_.emplace(context_.backend, memory_.scratch + layout.scratch.ring, context_.kv_dtype,
                  layout.ring_tokens, context_.max_decode_rows, layout.heads,
                  context_.shape.head_dim);
  }
  return absl::OkStatus();
}

H2oStrategy::~H2oStrategy() {
  transfers_.reset();  // before the memory that its copies use
  for (std::byte* memory : {memory_.scratch, memory_.pages, memory_.host}) {
    context_.backend->Free(memory);
  }
}

int32_t H2oStrategy::chunk_alignment() const {
  return parameters().prefill_evict() == H2o::PREFILL_EVICT_CHUNK ? 1 : kColumnSumRows;
}

// -------------------------------------------------------------------------------------------------
// views

KvView H2oStrategy::View(int32_t layer) const {
  const H2oLayout& layout = manager_.layout();
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const auto page_bytes =
      static_cast<int64_t>(on_host() ? layout.host_page_bytes() : layout.page_bytes());
  const int32_t evicting = context_.shape.layers - full_layers();
  const int64_t head = int64_t{layout.page_tokens} * context_.shape.head_dim;
  std::byte* key =
      (on_host() ? memory_.host : memory_.pages) + page_bytes / evicting * (layer - full_layers());
  return {.key = key,
          .value = key + head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = layout.page_tokens,
          .block_stride = page_bytes / bytes,
          .token_stride = context_.shape.head_dim,
          .head_stride = 2 * head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

KvView H2oStrategy::FullView(int32_t layer) const {
  const H2oLayout& layout = manager_.layout();
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int64_t head = int64_t{layout.full_page_tokens} * context_.shape.head_dim;
  const int64_t side = head * context_.shape.kv_heads;
  std::byte* key = memory_.pages + 2 * side * layer * bytes;
  return {.key = key,
          .value = key + head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = layout.full_page_tokens,
          .block_stride = static_cast<int64_t>(layout.page_bytes()) / bytes,
          .token_stride = context_.shape.head_dim,
          .head_stride = 2 * head,
          .block_table = full_tables_->pages(),
          .block_table_stride = full_tables_->max_pages(),
          .length = full_tables_->length()};
}

SlotView H2oStrategy::Numbers(int32_t layer, int64_t which) const {
  const H2oLayout& layout = manager_.layout();
  const auto page_bytes = static_cast<int64_t>(layout.page_bytes());
  const int32_t evicting = context_.shape.layers - full_layers();
  const int64_t numbers = int64_t{layout.page_tokens} * layout.heads;
  const int64_t keys_and_values =
      on_host() ? 0 : 2 * numbers * context_.shape.head_dim * DTypeBytes(context_.kv_dtype);
  return {.data = memory_.pages + page_bytes / evicting * (layer - full_layers()) +
                  keys_and_values + which * numbers * static_cast<int64_t>(sizeof(float)),
          .block_size = layout.page_tokens,
          .block_stride = page_bytes / static_cast<int64_t>(sizeof(float)),
          .head_stride = layout.page_tokens,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages()};
}

SlotView H2oStrategy::Ranks(int32_t layer) const {
  return rolling() ? Numbers(layer, 2) : SlotView{};
}

float* H2oStrategy::Floats(uint64_t offset) const {
  return reinterpret_cast<float*>(memory_.scratch + offset);
}

PartialAttention H2oStrategy::PartialFrom(int32_t row) const {
  const H2oScratch& scratch = manager_.layout().scratch;
  const int64_t head_rows = int64_t{row} * context_.shape.query_heads;
  return {.output = Floats(scratch.partial_output) + head_rows * context_.shape.head_dim,
          .maximum = Floats(scratch.partial_maximum) + head_rows,
          .sum = Floats(scratch.partial_sum) + head_rows};
}

int32_t H2oStrategy::HistorySlots(const Segment& segment) const {
  return manager_.HistorySlots(manager_.Budget(segment.request), segment.start_position);
}

int32_t H2oStrategy::LongestSlab(const StepView& step) const {
  int32_t longest = 0;
  for (const Segment& segment : step.decode) {
    longest = std::max(longest,
                       std::min(segment.start_position, manager_.Budget(segment.request).total()));
  }
  return longest;
}

// Tiles that the longest decode row needs; 0 without tiles.
int32_t H2oStrategy::GraphKey(const StepView& step) const {
  if (!on_host() || step.decode_rows == 0) return 0;
  return ring_->PaddedTiles(step.decode_rows, LongestSlab(step));
}

std::vector<int32_t> H2oStrategy::GraphKeys(int32_t decode_rows) const {
  if (!on_host()) return {0};
  return ring_->TileLadder(decode_rows,
                           static_cast<int32_t>(manager_.layout().probability_stride) - 1);
}

// -------------------------------------------------------------------------------------------------
// step

void H2oStrategy::MoveMemory(const StepView& step) {
  if (!transfers_) return;
  transfers_->EnqueueOuts(&manager_.swaps());
  transfers_->EnqueueIns(&manager_.swaps());
  // Decodes overlap the copies, but those of what they bring.
  const auto arrived = [&](const Segment& segment) { return manager_.Arrived(segment.request); };
  if (!std::ranges::all_of(step.decode, arrived)) transfers_->AwaitArrivals();
}

bool H2oStrategy::NeedsHost() const {
  return transfers_ && (transfers_->under_way() || manager_.swaps().pending());
}

void H2oStrategy::StepDone() {
  const int32_t landed = transfers_ ? transfers_->StepDone() : 0;
  for (int32_t batch = 0; batch < landed; ++batch) manager_.SwapInsLanded();
}

void H2oStrategy::BeginStep(const StepView& step) {
  std::vector<int32_t>& budgets = decode_budget_[static_cast<size_t>(step.parity)];
  budgets.clear();
  StepState& state = *context_.step_state;
  tables_.Clear(step);
  if (full_tables_) full_tables_->Clear(step);
  std::ranges::fill(state.Host(arrays_.position), 0);
  std::ranges::fill(state.Host(arrays_.heavy), 1);
  std::ranges::fill(state.Host(arrays_.recent), 1);
  std::ranges::fill(state.Host(arrays_.cache_position), 0);
  const auto set = [&](const Segment& segment, int32_t row, int32_t slots) {
    tables_.SetRow(row, manager_.Pages(segment.request), slots);
    if (full_tables_) {
      full_tables_->SetRow(row, manager_.FullPages(segment.request), segment.start_position);
      full_tables_->SetTokens(segment, row, segment.start_position);
    }
    for (int32_t i = 0; rolling() && i < segment.rows; ++i) {
      state.Host(arrays_.cache_position)[static_cast<size_t>(segment.first_row + i)] = slots + i;
    }
  };
  for (const Segment& segment : step.decode) {
    const auto row = static_cast<size_t>(segment.first_row);
    const H2oBudget budget = manager_.Budget(segment.request);
    budgets.push_back(budget.total());
    state.Host(arrays_.position)[row] = segment.start_position;
    state.Host(arrays_.heavy)[row] = budget.heavy;
    state.Host(arrays_.recent)[row] = budget.recent;
    // Decode tokens are placed by EvictHeavy, not by Append.
    set(segment, segment.first_row, std::min(segment.start_position, budget.total()));
    scores_updated_ += std::min(segment.start_position, budget.total()) + 1;
    evicted_ += segment.start_position >= budget.total();
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    const Segment& segment = step.prefill[i];
    const int32_t slots = HistorySlots(segment);
    set(segment, tables_.PrefillRow(i), slots);
    tables_.SetTokens(segment, tables_.PrefillRow(i), slots);
    const int32_t tokens = segment.start_position + segment.rows;
    if (segment.last_chunk) {
      evicted_ += std::max(0, tokens - manager_.Budget(segment.request).total());
    }
  }
  // A captured step's plan is fixed: it is made for the longest slab there can be.
  const int32_t longest = step.captured
                              ? static_cast<int32_t>(manager_.layout().probability_stride) - 1
                              : LongestSlab(step);
  plan_ = context_.backend->PlanAttention(step.decode_rows, longest, heads());
  if (full_tables_) full_plan_ = PlanDecode(context_, step);
}

AttentionInputs H2oStrategy::Prepare(const StepView& step, const AttentionInputs& inputs) {
  const ModelShape& shape = context_.shape;
  if (!rolling()) {
    RotateQueriesAndKeys(context_, step, inputs);
  } else {
    context_.backend->Rotary({.data = inputs.query,
                              .position = context_.step_state->Device(arrays_.cache_position),
                              .inverse_frequency = shape.inverse_frequency,
                              .rows = step.rows,
                              .heads = shape.query_heads,
                              .head_dim = shape.head_dim},
                             Stream::kCompute);
  }
  if (heads() == shape.kv_heads) return inputs;
  // Keys and values lie side by side, so one operation repeats both.
  const int64_t columns = int64_t{shape.query_heads} * shape.head_dim;
  std::byte* const key = memory_.scratch + manager_.layout().scratch.repeated;
  std::byte* const value = key + columns * DTypeBytes(context_.activation_dtype);
  context_.backend->RepeatHeads({.out = {key, 2 * columns},
                                 .in = inputs.key,
                                 .repeat = shape.query_heads / shape.kv_heads,
                                 .rows = step.rows,
                                 .heads = 2 * shape.kv_heads,
                                 .head_dim = shape.head_dim},
                                Stream::kCompute);
  return {.query = inputs.query, .key = {key, 2 * columns}, .value = {value, 2 * columns}};
}

void H2oStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                         const Activations& out) {
  if (layer == 0 && ring_) ring_->Fork();
  if (layer < full_layers()) return AttendFullLayer(step, layer, inputs, out);
  const AttentionInputs own = Prepare(step, inputs);
  if (step.decode_rows > 0) AttendDecode(step, layer, own, out);
  if (step.prefill.empty()) return;
  context_.backend->Append({.target = View(layer),
                            .key = own.key,
                            .value = own.value,
                            .table_row = tables_.token_row(),
                            .slot = tables_.token_slot(),
                            .rows = step.rows,
                            .kv_heads = heads(),
                            .head_dim = context_.shape.head_dim},
                           Stream::kCompute);
  // The column sums read the chunk's own keys back from the host.
  if (ring_) ring_->Fork();
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    AttendPrefill(step.prefill[i], tables_.PrefillRow(i), layer, own, out);
  }
}

void H2oStrategy::AttendFullLayer(const StepView& step, int32_t layer,
                                  const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  const KvView view = FullView(layer);
  backend.Append(AppendCall(context_, step, inputs, view, *full_tables_), Stream::kCompute);
  if (step.decode_rows > 0) {
    backend.DecodeAttention(DecodeCall(context_, step, inputs, out, view, full_plan_),
                            Stream::kCompute);
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    backend.PrefillAttention(
        PrefillCall(context_, step.prefill[i], inputs, out, view, full_tables_->PrefillRow(i)),
        Stream::kCompute);
  }
}

void H2oStrategy::AttendDecode(const StepView& step, int32_t layer, const AttentionInputs& own,
                               const Activations& out) {
  const H2oLayout& layout = manager_.layout();
  const KvView view = View(layer);
  DecodeAttentionArgs attention = DecodeCall(context_, step, own, out, view, plan_);
  attention.kv_heads = heads();
  if (rolling()) attention.rotation = {context_.shape.inverse_frequency, Ranks(layer)};
  attention.probability = Floats(layout.scratch.probability);
  attention.probability_stride = layout.probability_stride;
  if (on_host()) {
    AttendTiles(attention, step, layer);
  } else {
    context_.backend->DecodeAttention(attention, Stream::kCompute);
  }
  context_.backend->EvictHeavy(
      {.view = view,
       .score = Numbers(layer, 0),
       .slot_position = Numbers(layer, 1),
       .rank = Ranks(layer),
       .scoring = scoring_,
       .promote = parameters().evict_rule() == H2o::EVICT_RULE_SLOT_PROMOTE,
       .sinks = static_cast<int32_t>(parameters().sink_tokens()),
       .probability = attention.probability,
       .probability_stride = attention.probability_stride,
       .key = own.key,
       .value = own.value,
       .position = context_.step_state->Device(arrays_.position),
       .heavy = context_.step_state->Device(arrays_.heavy),
       .recent = context_.step_state->Device(arrays_.recent),
       .row_active = step.row_active,
       .rows = step.decode_rows,
       .query_heads = context_.shape.query_heads,
       .kv_heads = heads(),
       .head_dim = context_.shape.head_dim},
      Stream::kCompute);
}

// The kept entries come from the host tile by tile; the last part is the current token, and with it
// the scores become probabilities.
void H2oStrategy::AttendTiles(DecodeAttentionArgs call, const StepView& step, int32_t layer) {
  const KvView source = View(layer);
  const Activations out = std::exchange(call.out, {});
  const Activations key = std::exchange(call.current_key, {});
  const Activations value = std::exchange(call.current_value, {});
  call.partial = PartialFrom(0);
  const int32_t tile_tokens = ring_->TileTokens(step.decode_rows);
  const int32_t tiles = step.graph_key;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    call.view = ring_->Load({.source = source,
                             .first_token = tile * tile_tokens,
                             .tokens = tile_tokens,
                             .row_active = step.row_active,
                             .rows = step.decode_rows,
                             .kv_heads = heads(),
                             .head_dim = call.head_dim});
    call.accumulate = tile > 0;
    context_.backend->DecodeAttention(call, Stream::kCompute);
    ring_->Free();
  }
  call.view = ring_->Nothing(source);
  call.accumulate = true;
  call.out = out;
  call.current_key = key;
  call.current_value = value;
  context_.backend->DecodeAttention(call, Stream::kCompute);
}

void H2oStrategy::AttendPrefill(const Segment& segment, int32_t row, int32_t layer,
                                const AttentionInputs& own, const Activations& out) {
  const H2oLayout& layout = manager_.layout();
  PrefillAttentionArgs attention = PrefillCall(context_, segment, own, out, View(layer), row);
  attention.kv_heads = heads();
  attention.history_tokens = HistorySlots(segment);
  // A prompt's slots are in order of position, so their ranks are their numbers.
  if (rolling()) attention.rotation.inverse_frequency = context_.shape.inverse_frequency;
  attention.log_sum_exp = Floats(layout.scratch.log_sum_exp);
  if (on_host()) {
    AttendPrefillTiles(attention, segment, row, layer);
  } else {
    context_.backend->PrefillAttention(attention, Stream::kCompute);
  }
  AddColumnSums(attention, row, layer);
  if (segment.last_chunk || parameters().prefill_evict() == H2o::PREFILL_EVICT_CHUNK) {
    PruneChunk(segment, row, layer);
  }
}

void H2oStrategy::PruneChunk(const Segment& segment, int32_t row, int32_t layer) {
  const H2oBudget budget = manager_.Budget(segment.request);
  const int32_t history = HistorySlots(segment);
  const bool placed = parameters().prefill_evict() == H2o::PREFILL_EVICT_CHUNK;
  context_.backend->PruneHeavy({.view = View(layer),
                                .score = Numbers(layer, 0),
                                .position = Numbers(layer, 1),
                                .rank = Ranks(layer),
                                .scoring = scoring_,
                                .table_row = row,
                                .tokens = history + segment.rows,
                                .placed = placed ? history : 0,
                                .first_position = placed ? segment.start_position : 0,
                                .heavy = budget.heavy,
                                .recent = budget.recent,
                                .sinks = static_cast<int32_t>(parameters().sink_tokens()),
                                .ring = segment.last_chunk,
                                .kv_heads = heads(),
                                .head_dim = context_.shape.head_dim},
                               Stream::kCompute);
}

// Earlier chunks come back from the host through the ring; the chunk's own keys join last.
void H2oStrategy::AttendPrefillTiles(PrefillAttentionArgs call, const Segment& segment, int32_t row,
                                     int32_t layer) {
  const int32_t history = call.history_tokens;
  const int32_t tile_tokens = ring_->WholeTokens();
  PrefillAttentionArgs part = call;
  part.out = {};
  part.chunk_key = {};
  part.chunk_value = {};
  part.log_sum_exp = nullptr;
  part.partial = PartialFrom(segment.first_row);
  part.history_row = 0;
  for (int32_t first = 0; first < history; first += tile_tokens) {
    part.history = ring_->Load({.source = View(layer),
                                .first_token = first,
                                .tokens = tile_tokens,
                                .row = row,
                                .row_tokens = history,
                                .rows = 1,
                                .kv_heads = heads(),
                                .head_dim = call.head_dim});
    part.history_tokens = std::min(tile_tokens, history - first);
    part.accumulate = first > 0;
    context_.backend->PrefillAttention(part, Stream::kCompute);
    ring_->Free();
  }
  call.history = ring_->Nothing(View(layer));
  call.history.first_token = history;
  call.history_row = 0;
  call.history_tokens = 0;
  if (history > 0) {
    call.partial = part.partial;
    call.accumulate = true;
  }
  context_.backend->PrefillAttention(call, Stream::kCompute);
}

// The second pass over the chunk's rows: what each stored key received from them.
void H2oStrategy::AddColumnSums(const PrefillAttentionArgs& attention, int32_t row, int32_t layer) {
  ColumnSumArgs sums{.score = Numbers(layer, 0),
                     .query = attention.query,
                     .log_sum_exp = attention.log_sum_exp,
                     .keys = View(layer),
                     .rotation = attention.rotation,
                     .scoring = scoring_,
                     .table_row = row,
                     .history_tokens = attention.history_tokens,
                     .rows = attention.rows,
                     .query_heads = attention.query_heads,
                     .kv_heads = heads(),
                     .head_dim = attention.head_dim,
                     .scale = attention.scale};
  if (!on_host()) return context_.backend->ColumnSum(sums, Stream::kCompute);
  const int32_t columns = sums.history_tokens + sums.rows;
  const int32_t tile_tokens = ring_->WholeTokens();
  sums.score = AtRow(sums.score, row);
  sums.table_row = 0;
  for (int32_t first = 0; first < columns; first += tile_tokens) {
    sums.keys = ring_->Load({.source = View(layer),
                             .first_token = first,
                             .tokens = tile_tokens,
                             .row = row,
                             .row_tokens = columns,
                             .rows = 1,
                             .kv_heads = heads(),
                             .head_dim = attention.head_dim});
    context_.backend->ColumnSum(sums, Stream::kCompute);
    ring_->Free();
  }
}

// -------------------------------------------------------------------------------------------------
// reading

DecodeCounts H2oStrategy::CollectDecode(const StepView& step, size_t index,
                                        std::span<double> attended_by_layer) {
  const Segment& segment = step.decode[index];
  const int32_t capacity = decode_budget_[static_cast<size_t>(step.parity)][index];
  const double stored = std::min(segment.start_position, capacity);
  DecodeCounts counts{.evicted = segment.start_position >= capacity};
  counts.engaged = counts.evicted > 0;
  for (int32_t layer = 0; layer < context_.shape.layers; ++layer) {
    const double attended = (layer < full_layers() ? segment.start_position : stored) + 1;
    if (!attended_by_layer.empty()) attended_by_layer[static_cast<size_t>(layer)] = attended;
    counts.attended += attended;
    if (on_host()) counts.fetched += stored;
  }
  return counts;
}

int32_t H2oStrategy::PromptEvictions(const RequestShape& shape, int32_t tokens) const {
  return std::max(0, tokens - TokenBudget(shape));
}

int32_t H2oStrategy::TokenBudget(const RequestShape& shape) const {
  return H2oBudgetOf(parameters(), shape).total();
}

double H2oStrategy::SelectionBytes(const MeanBatch& batch) const {
  const ModelShape& shape = context_.shape;
  const double scored = 1.0 - static_cast<double>(full_layers()) / shape.layers;
  return 2.0 * sizeof(float) * (shape.query_heads + shape.kv_heads) * scored * batch.attended;
}

EngagementRule H2oStrategy::engagement_rule() const {
  return {"tokens were evicted in at least half of the requests longer than their budget"};
}

bool H2oStrategy::EngagementExpected(const RequestShape& shape, int32_t tokens) const {
  // The last token is never stored: of one more than the budget nothing can be evicted.
  return tokens > TokenBudget(shape) + 1;
}

void H2oStrategy::BeginMeasurement() {
  CacheStrategy::BeginMeasurement();
  if (transfers_) transfers_->BeginMeasurement();
  evicted_ = 0;
  scores_updated_ = 0;
}

std::vector<CacheStrategy::Figure> H2oStrategy::Figures() const {
  std::vector<Figure> figures;
  for (int32_t layer = 0; layer < context_.shape.layers; ++layer) {
    const bool evicts = layer >= full_layers();
    figures.push_back({"h2o_evicted_tokens", layer, evicts ? static_cast<double>(evicted_) : 0});
  }
  const double updates =
      static_cast<double>(scores_updated_) * heads() * (context_.shape.layers - full_layers());
  figures.push_back({"h2o_score_updates", -1, updates});
  if (transfers_) transfers_->AddFigures(&figures);
  return figures;
}

}  // namespace kvsweep
