#include "worker/strategies/infinigen.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/planted_bug.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"

namespace kvsweep {
// ---------------------------------------------------------------------------------------- building

absl::StatusOr<std::unique_ptr<CacheStrategy>> InfinigenStrategy::Create(
    const Infinigen& parameters, const StrategyContext& context) {
  ASSIGN_OR_RETURN(const InfinigenLayout layout, InfinigenLayoutOf(parameters, context));
  std::unique_ptr<InfinigenStrategy> strategy(new InfinigenStrategy(layout, context));
  RETURN_IF_ERROR(strategy->AllocateMemory());
  if (layout.fetches_all()) return strategy;
  ASSIGN_OR_RETURN(std::shared_ptr<const Skewing> skewing,
                   context.calibrate(static_cast<int32_t>(parameters.calibration_tokens())));
  RETURN_IF_ERROR(strategy->Skew(*skewing));
  return strategy;
}

InfinigenStrategy::InfinigenStrategy(const InfinigenLayout& layout, const StrategyContext& context)
    : context_(context),
      manager_(layout),
      tables_(context, layout.table_pages),
      arrays_(RegisterInfinigen(layout, context, context.step_state)),
      fetched_(layout.layers),
      recall_(layout.layers),
      covered_(layout.layers),
      cosine_(layout.layers) {
  for (StepEvent& event : events_) event.event = context_.backend->CreateEvent();
}

InfinigenStrategy::~InfinigenStrategy() {
  for (std::byte* memory : {pages_, host_pages_, scratch_memory_, host_scratch_memory_}) {
    context_.backend->Free(memory);
  }
}

absl::Status InfinigenStrategy::AllocateMemory() {
  InfinigenScratch unused;
  InfinigenHostScratch host_unused;
  const auto allocate = [this](Tier tier, uint64_t bytes, absl::string_view what,
                               std::byte** memory) -> absl::Status {
    if (bytes == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(*memory, AllocateFor(context_, tier, bytes, what));
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(allocate(Tier::kDevice, LayOutInfinigen(layout(), context_, nullptr, &unused),
                           "infinigen buffers", &scratch_memory_));
  RETURN_IF_ERROR(allocate(Tier::kDevice,
                           static_cast<uint64_t>(layout().pages) * layout().page_bytes,
                           "infinigen partial keys and fetched rows", &pages_));
  RETURN_IF_ERROR(allocate(Tier::kHost,
                           static_cast<uint64_t>(layout().host_pages) * layout().host_page_bytes(),
                           "infinigen host pool", &host_pages_));
  RETURN_IF_ERROR(allocate(Tier::kHost,
                           LayOutInfinigenHost(layout(), context_, nullptr, &host_unused),
                           "infinigen counts and staging", &host_scratch_memory_));
  LayOutInfinigen(layout(), context_, scratch_memory_, &scratch_);
  LayOutInfinigenHost(layout(), context_, host_scratch_memory_, &host_scratch_);
  ring_.emplace(context_.backend, scratch_.ring, context_.kv_dtype, layout().ring_tokens,
                context_.max_decode_rows, context_.shape.kv_heads, context_.shape.head_dim);
  return absl::OkStatus();
}

int32_t InfinigenStrategy::chunk_alignment() const {
  const bool whole = layout().parameters.prefill_history() == Infinigen::PREFILL_HISTORY_WHOLE;
  return whole ? context_.max_context : 1;  // no border inside any prompt
}

// -------------------------------------------------------------------------------------- begin step

void InfinigenStrategy::Record(EventName name, Stream stream) {
  context_.backend->RecordEvent(events_[name].event, stream);
  events_[name].recorded = true;
}

void InfinigenStrategy::Wait(EventName name, Stream stream) {
  if (events_[name].recorded) context_.backend->WaitEvent(events_[name].event, stream);
}

void InfinigenStrategy::BeginStep(const StepView& step) {
  StepState& state = *context_.step_state;
  tables_.Clear(step);
  for (const StepState::Field& field : {arrays_.slot_pages, arrays_.fetch_pages, arrays_.limit,
                                        arrays_.wanted, arrays_.capacity, arrays_.history_pages}) {
    std::ranges::fill(state.Host(field), 0);
  }
  std::ranges::fill(state.Host(arrays_.history_row), -1);
  std::ranges::fill(state.Host(arrays_.column_set), -1);
  std::vector<Decoded>& decoded = decoded_[static_cast<size_t>(step.parity)];
  decoded.clear();
  for (const Segment& segment : step.decode) {
    PlaceSegment(segment, segment.first_row);
    FillDecodeRow(segment);
    const RequestShape& shape = manager_.Shape(segment.request);
    decoded.push_back(
        {.held = layout().SlotsOf(segment.start_position, shape),
         .evicts = segment.start_position >= InfinigenCapacity(layout().parameters, shape)});
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    PlaceSegment(step.prefill[i], tables_.PrefillRow(i));
  }
  if (layout().history_pages > 0) FillHistory(step);
  moves_columns_ = layout().query_path == QueryPath::kRequestColumns && !step.prefill.empty();
  plan_ = PlanDecode(context_, step);
}

void InfinigenStrategy::MoveMemory(const StepView& step) {
  SaveOffloaded();
  std::erase_if(columns_, [this](const auto& kept) { return !manager_.Holds(kept.first); });
  for (const Segment& segment : step.decode) {
    if (segment.resumed) BringBack(segment);
  }
}

// The request's pages and where the segment's tokens go. A token whose slot a later token of the
// same chunk takes is not stored at all.
void InfinigenStrategy::PlaceSegment(const Segment& segment, int32_t row) {
  StepState& state = *context_.step_state;
  const RequestShape& shape = manager_.Shape(segment.request);
  tables_.SetRow(row, manager_.HostPages(segment.request),
                 layout().SlotsOf(segment.start_position, shape));
  if (layout().slot_bytes() > 0) {
    std::ranges::copy(manager_.SlotPages(segment.request),
                      state.Host(arrays_.slot_pages).begin() + int64_t{row} * layout().table_pages);
  }
  if (layout().query_path == QueryPath::kRequestColumns) {
    std::ranges::fill(
        state.Host(arrays_.column_set)
            .subspan(static_cast<size_t>(segment.first_row), static_cast<size_t>(segment.rows)),
        segment.slot);
  }
  tables_.SetTokens(segment, row, segment.start_position);
  if (!layout().bounded()) return;
  const int32_t end = segment.start_position + segment.rows;
  std::vector<bool> taken(static_cast<size_t>(layout().SlotsOf(end, shape)));
  for (int32_t i = segment.rows - 1; i >= 0; --i) {
    const int32_t slot = layout().PlannedSlot(segment.start_position + i, shape);
    const auto place = taken[static_cast<size_t>(slot)];
    tables_.SetToken(segment.first_row + i, place ? -1 : row, slot);
    taken[static_cast<size_t>(slot)] = true;
  }
}

void InfinigenStrategy::FillDecodeRow(const Segment& segment) {
  StepState& state = *context_.step_state;
  const Infinigen& parameters = layout().parameters;
  const RequestShape& shape = manager_.Shape(segment.request);
  const auto row = static_cast<size_t>(segment.first_row);
  if (layout().remembers()) {
    state.Host(arrays_.capacity)[row] = InfinigenCapacity(parameters, shape);
  }
  if (layout().fetches_all()) return;
  const std::span<const PageIndex> fetch = manager_.FetchPages(segment.request);
  const auto half = static_cast<std::ptrdiff_t>(fetch.size() / 2);
  auto target = state.Host(arrays_.fetch_pages).begin() +
                int64_t{segment.first_row} * 2 * layout().fetch_pages;
  std::copy(fetch.begin(), fetch.begin() + half, target);
  std::copy(fetch.begin() + half, fetch.end(), target + layout().fetch_pages);
  state.Host(arrays_.limit)[row] = InfinigenFetchLimit(parameters, shape);
  if (parameters.has_force_fetch_ratio()) {
    const int32_t stored = layout().SlotsOf(segment.start_position, shape);
    state.Host(arrays_.wanted)[row] =
        static_cast<int32_t>(parameters.force_fetch_ratio() * stored + 1e-9);
  }
}

// Prompts of several chunks: at most one is under way, and one more may end in the same step.
void InfinigenStrategy::FillHistory(const StepView& step) {
  StepState& state = *context_.step_state;
  history_row_.assign(step.prefill.size(), -1);
  int32_t used = 0;
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    const Segment& segment = step.prefill[i];
    const std::span<const PageIndex> pages = manager_.HistoryPages(segment.request);
    if (pages.empty()) continue;
    KVSWEEP_CHECK_LT(used, 2);
    history_row_[i] = used++;
    const int32_t layers = layout().history_layers();
    const auto of_layer = static_cast<int64_t>(pages.size()) / layers;
    for (int64_t layer = 0; layer < layers; ++layer) {
      std::copy_n(pages.begin() + layer * of_layer, of_layer,
                  state.Host(arrays_.history_pages).begin() +
                      (history_row_[i] * int64_t{layers} + layer) * layout().history_pages);
    }
    if (segment.last_chunk) continue;
    std::ranges::fill(
        state.Host(arrays_.history_row)
            .subspan(static_cast<size_t>(segment.first_row), static_cast<size_t>(segment.rows)),
        history_row_[i]);
  }
}

// What the slots of preempted requests remember goes to their host pages before anybody writes to
// the device pages that they gave up.
void InfinigenStrategy::SaveOffloaded() {
  const auto tokens = static_cast<uint64_t>(layout().page_tokens);
  const uint64_t partial = layout().partial_token_bytes * tokens;
  for (const InfinigenManager::Offload& page : manager_.TakeOffloads()) {
    context_.backend->Copy(
        host_pages_ + static_cast<uint64_t>(page.host) * layout().host_page_bytes() +
            layout().key_value_token_bytes * tokens + partial,
        pages_ + static_cast<uint64_t>(page.device) * layout().page_bytes + partial,
        layout().state_token_bytes * tokens, Stream::kCompute);
  }
}

// A resumed request's partial keys, resident layers and what its slots remember come back page by
// page, as they were.
void InfinigenStrategy::BringBack(const Segment& segment) {
  Backend& backend = *context_.backend;
  const auto tokens = static_cast<uint64_t>(layout().page_tokens);
  const uint64_t kept = (layout().partial_token_bytes + layout().state_token_bytes) * tokens;
  const std::span<const PageIndex> slot = manager_.SlotPages(segment.request);
  const std::span<const PageIndex> host = manager_.HostPages(segment.request);
  const auto pages = static_cast<size_t>(
      layout().SlotPages(segment.start_position, manager_.Shape(segment.request)));
  for (size_t i = 0; i < pages; ++i) {
    std::byte* const target = pages_ + static_cast<uint64_t>(slot[i]) * layout().page_bytes;
    const std::byte* const source =
        host_pages_ + static_cast<uint64_t>(host[i]) * layout().host_page_bytes();
    backend.Copy(target, source + layout().key_value_token_bytes * tokens, kept, Stream::kCompute);
    if (layout().resident()) {
      backend.Copy(target + kept, source, layout().resident_token_bytes * tokens, Stream::kCompute);
    }
  }
  const auto columns = columns_.find(segment.request);
  if (columns == columns_.end()) return;
  moves_columns_ = true;
  backend.Copy(scratch_.column + segment.slot * static_cast<int64_t>(columns->second.size()),
               columns->second.data(), columns->second.size() * sizeof(int32_t), Stream::kCompute);
}

// -------------------------------------------------------------------------------------------
// layers

void InfinigenStrategy::BeforeLayer(const StepView& step, int32_t layer, const Activations& x) {
  if (layer == 0) {
    for (StepEvent& event : events_) event.recorded = false;
    Record(kFork, Stream::kCompute);
    for (Stream stream : {Stream::kHostToDevice, Stream::kDeviceToHost}) Wait(kFork, stream);
    if (!layout().fetches_all()) Wait(kFork, Stream::kSpeculation);
    ring_->Fork();
  }
  // This layer's projection will overwrite the keys and values of the layer before the last.
  Wait(OfParity(kAppended0, layer), Stream::kCompute);
  input_[layer % 2] = x;
  const int32_t next = layer + 1;
  if (layout().parameters.prefetch() && !oracle_input_ && next >= full_layers() &&
      next < layout().layers) {
    SpeculateLayer(step, next, x);
  }
}

void InfinigenStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                               const Activations& out) {
  if (layout().folded()) FoldQueriesAndKeys(step, layer, inputs);
  RotateQueriesAndKeys(context_, step, inputs);
  if (step.decode_rows > 0) {
    if (layer < full_layers()) {
      AttendFull(step, layer, inputs, out);
    } else {
      AttendFetched(step, layer, inputs, out);
    }
    if (diagnosing_) DiagnoseLayer(step, layer, inputs);
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    AttendPrefill(step.prefill[i], i, layer, inputs, out);
  }
  AppendLayer(step, layer, inputs);
}

// Keys and values go to the host pool (and to the device, where full layers or a prompt's history
// stay there), partial keys to the device and, for a later resume, to the host. Nothing of this step
// reads what goes to the host or the partial keys: the next layer does not wait for them.
void InfinigenStrategy::AppendLayer(const StepView& step, int32_t layer,
                                    const AttentionInputs& inputs) {
  Backend& backend = *context_.backend;
  const bool speculates = layer >= full_layers();
  AppendArgs whole{.key = inputs.key,
                   .value = inputs.value,
                   .table_row = tables_.token_row(),
                   .slot = tables_.token_slot(),
                   .rows = step.rows,
                   .kv_heads = context_.shape.kv_heads,
                   .head_dim = context_.shape.head_dim};
  if (IsResident(layer)) {
    whole.target = ResidentView(layer);
    backend.Append(whole, Stream::kCompute);
  } else if (layout().history_pages > 0 && !step.prefill.empty()) {
    AppendArgs history = whole;
    history.target = HistoryView(layer);
    history.table_row = context_.step_state->Device(arrays_.history_row);
    backend.Append(history, Stream::kCompute);
  }
  Record(kKvReady, Stream::kCompute);
  Wait(kKvReady, Stream::kDeviceToHost);
  AppendArgs partial;
  if (speculates) {
    partial = PartialAppend(step, layer, inputs);
    whole.slot = partial.slot;
    whole.slot_by_head = partial.slot_by_head;
  }
  whole.target = HostView(layer);
  backend.Append(whole, Stream::kDeviceToHost);
  if (speculates) {
    partial.target = HostPartialView(layer);
    backend.Append(partial, Stream::kDeviceToHost);
  }
  Record(OfParity(kAppended0, layer), Stream::kDeviceToHost);
}

void InfinigenStrategy::AttendFull(const StepView& step, int32_t layer,
                                   const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  if (IsResident(layer)) {
    backend.DecodeAttention(DecodeCall(context_, step, inputs, out, ResidentView(layer), plan_),
                            Stream::kCompute);
    return;
  }
  const int32_t tiles = step.graph_key;
  const int32_t tile_tokens = ring_->TileTokens(step.decode_rows);
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const KvView view = ring_->Load({.source = HostView(layer),
                                     .first_token = tile * tile_tokens,
                                     .tokens = tile_tokens,
                                     .row_active = step.row_active,
                                     .rows = step.decode_rows,
                                     .kv_heads = context_.shape.kv_heads,
                                     .head_dim = context_.shape.head_dim});
    DecodeAttentionArgs part = DecodeCall(context_, step, inputs, {}, view, plan_);
    part.partial = PartialFrom(0);
    part.accumulate = tile > 0;
    part.current_key = {};
    part.current_value = {};
    backend.DecodeAttention(part, Stream::kCompute);
    ring_->Free();
  }
  const KvView nothing = ring_->Nothing(HostView(layer));
  DecodeAttentionArgs last = DecodeCall(context_, step, inputs, out, nothing, plan_);
  last.partial = PartialFrom(0);
  last.accumulate = tiles > 0;
  backend.DecodeAttention(last, Stream::kCompute);
}

void InfinigenStrategy::AttendFetched(const StepView& step, int32_t layer,
                                      const AttentionInputs& inputs, const Activations& out) {
  if (oracle_input_) {
    SpeculateLayer(step, layer, input_[layer % 2]);
  } else if (!layout().parameters.prefetch()) {
    SpeculateLayer(step, layer, input_[(layer + 1) % 2]);
  }
  if (!BugPlanted("gather_not_awaited")) Wait(OfParity(kGathered0, layer), Stream::kCompute);
  context_.backend->DecodeAttention(
      DecodeCall(context_, step, inputs, out, FetchView(layer), plan_), Stream::kCompute);
}

// Earlier chunks of the prompt stand on the device or come back from the host through the ring; the
// chunk's own keys join last.
void InfinigenStrategy::AttendPrefill(const Segment& segment, size_t index, int32_t layer,
                                      const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  const int32_t row = tables_.PrefillRow(index);
  const int32_t stored = layout().SlotsOf(segment.start_position, manager_.Shape(segment.request));
  if (IsResident(layer) || layout().history_pages > 0) {
    const bool resident = IsResident(layer);
    PrefillAttentionArgs whole = PrefillCall(context_, segment, inputs, out,
                                             resident ? ResidentView(layer) : HistoryView(layer),
                                             resident ? row : std::max(history_row_[index], 0));
    whole.history_tokens = stored;
    backend.PrefillAttention(whole, Stream::kCompute);
    return;
  }
  const int32_t tile_tokens = ring_->WholeTokens();
  int32_t first = 0;
  for (; first < stored; first += tile_tokens) {
    const KvView view = ring_->Load({.source = HostView(layer),
                                     .first_token = first,
                                     .tokens = tile_tokens,
                                     .row = row,
                                     .row_tokens = stored,
                                     .rows = 1,
                                     .kv_heads = context_.shape.kv_heads,
                                     .head_dim = context_.shape.head_dim});
    PrefillAttentionArgs part = PrefillCall(context_, segment, inputs, {}, view, 0);
    part.out = {};
    part.partial = PartialFrom(segment.first_row);
    part.accumulate = first > 0;
    part.chunk_key = {};
    part.chunk_value = {};
    part.history_tokens = std::min(tile_tokens, stored - first);
    backend.PrefillAttention(part, Stream::kCompute);
    ring_->Free();
  }
  PrefillAttentionArgs last =
      PrefillCall(context_, segment, inputs, out, ring_->Nothing(HostView(layer)), 0);
  last.history_tokens = 0;
  if (first > 0) {
    last.partial = PartialFrom(segment.first_row);
    last.accumulate = true;
  }
  backend.PrefillAttention(last, Stream::kCompute);
}

void InfinigenStrategy::EndStep(const StepView& /*step*/) {
  Wait(kAppended0, Stream::kCompute);
  Wait(kAppended1, Stream::kCompute);
}

void InfinigenStrategy::ReadBack(const StepView& step) {
  Backend& backend = *context_.backend;
  if (layout().query_path == QueryPath::kRequestColumns) {
    for (const Segment& segment : step.prefill) {
      std::vector<int32_t>& kept = columns_[segment.request];
      kept.resize(ColumnsOfRequest());
      backend.Copy(kept.data(), scratch_.column + segment.slot * static_cast<int64_t>(kept.size()),
                   kept.size() * sizeof(int32_t), Stream::kCompute);
    }
  }
  if (step.decode_rows == 0 || layout().fetches_all()) return;
  backend.Copy(host_scratch_.selected, scratch_.selected, SelectedBytes(layout().layers),
               Stream::kCompute);
}

}  // namespace kvsweep
