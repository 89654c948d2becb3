#include "worker/strategies/infinigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/token_budget.h"

namespace kvsweep {

int32_t InfinigenFetchLimit(const Infinigen& parameters, const RequestShape& shape) {
  return BudgetTokens(parameters.max_kv_ratio(),
                      BudgetBaseTokens(parameters.budget_base(),
                                       static_cast<int32_t>(parameters.budget_tokens()), shape),
                      1);
}

// ------------------------------------------------------------------------------------------------
// manager

InfinigenManager::InfinigenManager(const InfinigenLayout& layout)
    : layout_(layout), device_(layout.pages), host_(layout.host_pages) {}

int32_t InfinigenManager::FetchPageCount(const RequestShape& shape) const {
  const int32_t rows = std::min(InfinigenFetchLimit(layout_.parameters, shape), shape.limit());
  return 2 * PagesFor(rows, layout_.fetch_page_rows);
}

int32_t InfinigenManager::PeakHostPages(const RequestShape& shape) const {
  return PagesFor(shape.limit() - 1, layout_.page_tokens);
}

TierBytes InfinigenManager::FixedBytes() const {
  return {layout_.fixed_device_bytes, layout_.fixed_host_bytes};
}

TierBytes InfinigenManager::PeakBytes(const RequestShape& shape) const {
  const auto device = static_cast<uint64_t>(PagesFor(shape.limit() - 1, layout_.page_tokens) +
                                            FetchPageCount(shape));
  return {device * layout_.page_bytes(),
          static_cast<uint64_t>(PeakHostPages(shape)) * layout_.host_page_bytes()};
}

bool InfinigenManager::Admit(RequestId request, const RequestShape& shape, int32_t tokens) {
  KVSWEEP_CHECK(!held_.contains(request)) << "request " << request;
  const int32_t pages = PagesFor(tokens, layout_.page_tokens);
  const int32_t fetch_pages = FetchPageCount(shape);
  if (device_.free_pages() < pages + fetch_pages) return false;
  if (host_.pages() - committed_host_pages_ < PeakHostPages(shape)) return false;
  Held held{.shape = shape, .tokens = tokens};
  KVSWEEP_CHECK(device_.Take(pages, &held.partial));
  KVSWEEP_CHECK(device_.Take(fetch_pages, &held.fetch));
  KVSWEEP_CHECK(host_.Take(pages, &held.host));
  committed_host_pages_ += PeakHostPages(shape);
  held_.emplace(request, std::move(held));
  return true;
}

bool InfinigenManager::Grow(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded);
  KVSWEEP_CHECK_GE(tokens, held.tokens);
  KVSWEEP_CHECK_LT(tokens, held.shape.limit() + 1);
  const int32_t more =
      PagesFor(tokens, layout_.page_tokens) - static_cast<int32_t>(held.partial.size());
  if (!device_.Take(std::max(more, 0), &held.partial)) return false;
  KVSWEEP_CHECK(host_.Take(std::max(more, 0), &held.host)) << "committed at admission";
  held.tokens = tokens;
  return true;
}

void InfinigenManager::EndPrompt(RequestId request) { held_.at(request).prompt_ended = true; }

void InfinigenManager::Release(RequestId request) {
  auto found = held_.find(request);
  KVSWEEP_CHECK(found != held_.end()) << "request " << request;
  Held& held = found->second;
  device_.GiveBack(static_cast<int32_t>(held.partial.size()), &held.partial);
  device_.GiveBack(static_cast<int32_t>(held.fetch.size()), &held.fetch);
  host_.GiveBack(static_cast<int32_t>(held.host.size()), &held.host);
  committed_host_pages_ -= PeakHostPages(held.shape);
  held_.erase(found);
}

void InfinigenManager::Preempt(RequestId request) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(!held.offloaded) << "request " << request;
  if (!held.prompt_ended) return Release(request);
  device_.GiveBack(static_cast<int32_t>(held.partial.size()), &held.partial);
  device_.GiveBack(static_cast<int32_t>(held.fetch.size()), &held.fetch);
  held.offloaded = true;
}

bool InfinigenManager::Resume(RequestId request, int32_t tokens) {
  Held& held = held_.at(request);
  KVSWEEP_CHECK(held.offloaded) << "request " << request;
  const int32_t pages = PagesFor(tokens, layout_.page_tokens);
  const int32_t fetch_pages = FetchPageCount(held.shape);
  if (device_.free_pages() < pages + fetch_pages) return false;
  KVSWEEP_CHECK(device_.Take(pages, &held.partial));
  KVSWEEP_CHECK(device_.Take(fetch_pages, &held.fetch));
  const int32_t more = pages - static_cast<int32_t>(held.host.size());
  KVSWEEP_CHECK(host_.Take(std::max(more, 0), &held.host)) << "committed at admission";
  held.tokens = tokens;
  held.offloaded = false;
  return true;
}

TierBytes InfinigenManager::ReservedBytes() const {
  return {layout_.fixed_device_bytes +
              static_cast<uint64_t>(device_.used_pages()) * layout_.page_bytes(),
          layout_.fixed_host_bytes +
              static_cast<uint64_t>(host_.used_pages()) * layout_.host_page_bytes()};
}

TierBytes InfinigenManager::LiveBytes() const {
  TierBytes live = FixedBytes();
  for (const auto& [request, held] : held_) {
    const auto tokens = static_cast<uint64_t>(held.tokens);
    live.host += tokens * layout_.host_token_bytes;
    if (held.offloaded) continue;
    live.device += tokens * layout_.partial_token_bytes + held.fetch.size() * layout_.page_bytes();
  }
  return live;
}

TierBytes InfinigenManager::RequestBytes(RequestId request) const {
  const Held& held = held_.at(request);
  return {(held.partial.size() + held.fetch.size()) * layout_.page_bytes(),
          held.host.size() * layout_.host_page_bytes()};
}

void InfinigenManager::CheckInvariants() const {
  device_.CheckInvariants();
  host_.CheckInvariants();
  size_t device_pages = 0;
  size_t host_pages = 0;
  int32_t committed = 0;
  for (const auto& [request, held] : held_) {
    device_pages += held.partial.size() + held.fetch.size();
    host_pages += held.host.size();
    committed += PeakHostPages(held.shape);
    KVSWEEP_CHECK(held.offloaded || held.partial.size() == held.host.size());
    KVSWEEP_CHECK_EQ(static_cast<int32_t>(held.host.size()),
                     PagesFor(held.tokens, layout_.page_tokens));
  }
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(device_pages), device_.used_pages());
  KVSWEEP_CHECK_EQ(static_cast<int32_t>(host_pages), host_.used_pages());
  KVSWEEP_CHECK_EQ(committed, committed_host_pages_);
}

// ----------------------------------------------------------------------------------------------
// building

namespace {

// Sizes of a page: enough tokens that at least one fetched row fits.
int32_t PageTokens(uint64_t partial_token_bytes, uint64_t row_bytes) {
  int32_t tokens = 16;
  while (partial_token_bytes * static_cast<uint64_t>(tokens) < row_bytes) tokens *= 2;
  return tokens;
}

int32_t PagesOfAllSequences(const StrategyContext& context, int32_t pages) {
  return static_cast<int32_t>(std::min<int64_t>(int64_t{context.max_sequences} * pages,
                                                std::numeric_limits<int32_t>::max() / 2));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CacheStrategy>> InfinigenStrategy::Create(
    const Infinigen& parameters, const StrategyContext& context) {
  const ModelShape& shape = context.shape;
  Sizes sizes;
  sizes.full_layers = static_cast<int32_t>(parameters.n_full_layers());
  if (sizes.full_layers >= shape.layers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "infinigen.n_full_layers: ", sizes.full_layers, " leaves no layer of the model's ",
        shape.layers, " to speculate for; use at most ", shape.layers - 1));
  }
  const int32_t speculating = shape.layers - sizes.full_layers;
  sizes.partial_dim = PartialDim(parameters.partial_weight_ratio(), shape.head_dim);
  const auto bytes = static_cast<uint64_t>(DTypeBytes(context.kv_dtype));
  const uint64_t row_bytes = 2 * bytes * static_cast<uint64_t>(shape.kv_heads * shape.head_dim);

  InfinigenLayout layout;
  layout.parameters = parameters;
  layout.partial_token_bytes =
      bytes * static_cast<uint64_t>(speculating * shape.kv_heads * sizes.partial_dim);
  layout.page_tokens = PageTokens(layout.partial_token_bytes, row_bytes);
  layout.fetch_page_rows = static_cast<int32_t>(layout.page_bytes() / row_bytes);
  layout.host_token_bytes =
      row_bytes * static_cast<uint64_t>(shape.layers) + layout.partial_token_bytes;

  // A ratio of a request's tokens is at most that of the longest request.
  const RequestShape longest{.prompt_tokens = context.max_context - 1, .max_tokens = 1};
  sizes.fetch_limit = std::min(InfinigenFetchLimit(parameters, longest), context.max_context);
  sizes.fetch_pages = PagesFor(sizes.fetch_limit, layout.fetch_page_rows);
  sizes.table_pages = PagesFor(context.max_context, layout.page_tokens);
  // One tile is at least a row for each decode row, and no longer than what there can be to read.
  sizes.ring_tokens = std::max(context.max_decode_rows, std::min(context.max_context, 256));

  const uint64_t before = context.step_state->device_bytes();
  SequenceTables tables(context, sizes.table_pages);
  Arrays arrays;
  arrays.partial_pages = context.step_state->Add(
      int64_t{context.max_decode_rows + context.max_sequences} * sizes.table_pages);
  arrays.fetch_pages =
      context.step_state->Add(int64_t{context.max_decode_rows} * 2 * sizes.fetch_pages);
  arrays.limit = context.step_state->Add(context.max_decode_rows);
  Scratch measured;
  layout.fixed_device_bytes =
      context.step_state->device_bytes() - before + LayOut(context, sizes, nullptr, &measured);
  layout.fixed_host_bytes =
      sizeof(int32_t) * static_cast<uint64_t>(shape.layers * context.max_decode_rows);

  ASSIGN_OR_RETURN(layout.pages, PagesInBudget(context.device_bytes, layout.fixed_device_bytes,
                                               layout.page_bytes(), "infinigen"));
  layout.pages = std::min(layout.pages,
                          PagesOfAllSequences(context, sizes.table_pages + 2 * sizes.fetch_pages));
  ASSIGN_OR_RETURN(layout.host_pages,
                   PagesInBudget(context.host_bytes, layout.fixed_host_bytes,
                                 layout.host_page_bytes(), "infinigen on the host"));
  // Preempted requests keep their host pages, so twice as many sequences may hold some.
  layout.host_pages =
      std::min(layout.host_pages, PagesOfAllSequences(context, 2 * sizes.table_pages));

  std::unique_ptr<InfinigenStrategy> strategy(
      new InfinigenStrategy(layout, context, sizes, std::move(tables), arrays));
  RETURN_IF_ERROR(strategy->AllocateMemory());
  ASSIGN_OR_RETURN(std::shared_ptr<const Skewing> skewing,
                   context.calibrate(static_cast<int32_t>(parameters.calibration_tokens())));
  RETURN_IF_ERROR(strategy->Skew(*skewing));
  return strategy;
}

InfinigenStrategy::InfinigenStrategy(const InfinigenLayout& layout, const StrategyContext& context,
                                     const Sizes& sizes, SequenceTables tables,
                                     const Arrays& arrays)
    : context_(context),
      manager_(layout),
      sizes_(sizes),
      tables_(std::move(tables)),
      arrays_(arrays) {
  for (StepEvent& event : events_) event.event = context_.backend->CreateEvent();
}

InfinigenStrategy::~InfinigenStrategy() {
  for (std::byte* memory :
       {pages_, host_pages_, scratch_memory_, reinterpret_cast<std::byte*>(selected_host_)}) {
    context_.backend->Free(memory);
  }
}

uint64_t InfinigenStrategy::LayOut(const StrategyContext& context, const Sizes& sizes,
                                   std::byte* base, Scratch* scratch) {
  const ModelShape& shape = context.shape;
  uint64_t offset = 0;
  auto place = [&](auto** pointer, int64_t count, int64_t element_bytes) {
    using Pointer = std::remove_reference_t<decltype(*pointer)>;
    if (base != nullptr) *pointer = reinterpret_cast<Pointer>(base + offset);
    offset += (static_cast<uint64_t>(count * element_bytes) + 255) / 256 * 256;
  };
  const int64_t speculating = shape.layers - sizes.full_layers;
  const int64_t matrix = int64_t{shape.kv_heads} * shape.head_dim * sizes.partial_dim;
  const int64_t query_columns = int64_t{shape.query_heads} * sizes.partial_dim;
  const int64_t activation = DTypeBytes(context.backend->info().activation_dtype);
  const int64_t decode_rows = context.max_decode_rows;
  const int64_t head_rows = int64_t{context.max_rows} * shape.query_heads;

  place(&scratch->key_matrix, speculating * matrix, sizeof(float));
  if (shape.rotary) {
    place(&scratch->query_matrix, speculating * matrix, sizeof(float));
    place(&scratch->query, decode_rows * shape.query_heads * shape.head_dim, activation);
  } else {
    place(&scratch->query_weight, speculating * query_columns * shape.hidden_size, sizeof(float));
    place(&scratch->query_bias, speculating * query_columns, sizeof(float));
  }
  place(&scratch->partial_query, decode_rows * query_columns, activation);
  place(&scratch->partial_key, 2 * int64_t{context.max_rows} * shape.kv_heads * sizes.partial_dim,
        activation);
  place(&scratch->margin, decode_rows * shape.kv_heads * context.max_context, sizeof(float));
  place(&scratch->count, decode_rows * shape.kv_heads, sizeof(int32_t));
  place(&scratch->index, 2 * decode_rows * shape.kv_heads * sizes.fetch_limit, sizeof(int32_t));
  place(&scratch->selected, shape.layers * decode_rows, sizeof(int32_t));
  place(&scratch->partial.output, head_rows * shape.head_dim, sizeof(float));
  place(&scratch->partial.maximum, head_rows, sizeof(float));
  place(&scratch->partial.sum, head_rows, sizeof(float));
  place(&scratch->ring, 2 * int64_t{sizes.ring_tokens} * shape.kv_heads * 2 * shape.head_dim,
        DTypeBytes(context.kv_dtype));
  return offset;
}

absl::Status InfinigenStrategy::AllocateMemory() {
  const InfinigenLayout& layout = manager_.layout();
  Scratch unused;
  const uint64_t scratch_bytes = LayOut(context_, sizes_, nullptr, &unused);
  ASSIGN_OR_RETURN(scratch_memory_,
                   AllocateFor(context_, Tier::kDevice, scratch_bytes, "infinigen buffers"));
  LayOut(context_, sizes_, scratch_memory_, &scratch_);
  ASSIGN_OR_RETURN(pages_, AllocateFor(context_, Tier::kDevice,
                                       static_cast<uint64_t>(layout.pages) * layout.page_bytes(),
                                       "infinigen partial keys and fetched rows"));
  ASSIGN_OR_RETURN(host_pages_,
                   AllocateFor(context_, Tier::kHost,
                               static_cast<uint64_t>(layout.host_pages) * layout.host_page_bytes(),
                               "infinigen host pool"));
  ASSIGN_OR_RETURN(std::byte * selected, AllocateFor(context_, Tier::kHost, layout.fixed_host_bytes,
                                                     "infinigen selection counts"));
  selected_host_ = reinterpret_cast<int32_t*>(selected);
  return absl::OkStatus();
}

namespace {

// One layer's query projection seen through the kept columns: rows c of head h are sum over j of
// matrix[h / g, j, c] * weight[h, j].
void SkewQueryWeights(const QueryWeights& source, const std::vector<float>& kept,
                      const ModelShape& shape, int32_t partial_dim, float* weight, float* bias) {
  const int64_t width = shape.hidden_size;
  const int32_t group = shape.query_heads / shape.kv_heads;
  std::vector<double> row(static_cast<size_t>(width));
  for (int32_t head = 0; head < shape.query_heads; ++head) {
    const float* matrix = kept.data() + int64_t{head / group} * shape.head_dim * partial_dim;
    for (int32_t column = 0; column < partial_dim; ++column) {
      std::ranges::fill(row, 0.0);
      double shift = 0;
      for (int32_t j = 0; j < shape.head_dim; ++j) {
        const double factor = matrix[j * partial_dim + column];
        const int64_t source_row = int64_t{head} * shape.head_dim + j;
        const float* values = source.weight + source_row * width;
        for (int64_t k = 0; k < width; ++k) row[static_cast<size_t>(k)] += factor * values[k];
        if (source.bias != nullptr) shift += factor * source.bias[source_row];
      }
      const int64_t target_row = int64_t{head} * partial_dim + column;
      std::ranges::transform(row, weight + target_row * width,
                             [](double value) { return static_cast<float>(value); });
      bias[target_row] = static_cast<float>(shift);
    }
  }
}

}  // namespace

absl::Status InfinigenStrategy::Skew(const Skewing& skewing) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int64_t query_columns = int64_t{shape.query_heads} * sizes_.partial_dim;
  for (int32_t layer = sizes_.full_layers; layer < shape.layers; ++layer) {
    const int64_t index = layer - sizes_.full_layers;
    const LayerSkewing& source = skewing.layers[static_cast<size_t>(layer)];
    const std::vector<float> keys =
        KeptColumns(source, shape.kv_heads, shape.head_dim, sizes_.partial_dim, 1.0f);
    const std::vector<float> queries = KeptColumns(source, shape.kv_heads, shape.head_dim,
                                                   sizes_.partial_dim, shape.attention_scale());
    const auto elements = static_cast<int64_t>(keys.size());
    backend.Copy(scratch_.key_matrix + index * elements, keys.data(), keys.size() * sizeof(float),
                 Stream::kCompute);
    std::vector<float> weight;
    std::vector<float> bias;
    if (shape.rotary) {
      backend.Copy(scratch_.query_matrix + index * elements, queries.data(),
                   queries.size() * sizeof(float), Stream::kCompute);
    } else {
      weight.resize(static_cast<size_t>(query_columns * shape.hidden_size));
      bias.resize(static_cast<size_t>(query_columns));
      SkewQueryWeights(context_.query_weights[static_cast<size_t>(layer)], queries, shape,
                       sizes_.partial_dim, weight.data(), bias.data());
      backend.Copy(scratch_.query_weight + index * query_columns * shape.hidden_size, weight.data(),
                   weight.size() * sizeof(float), Stream::kCompute);
      backend.Copy(scratch_.query_bias + index * query_columns, bias.data(),
                   bias.size() * sizeof(float), Stream::kCompute);
    }
    RETURN_IF_ERROR(backend.WaitAll());  // the vectors end here
  }
  return absl::OkStatus();
}

// -------------------------------------------------------------------------------------------------
// views

KvView InfinigenStrategy::HostView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t tokens = manager_.layout().page_tokens;
  const int64_t head = int64_t{tokens} * 2 * context_.shape.head_dim;
  std::byte* key = host_pages_ + int64_t{layer} * context_.shape.kv_heads * head * bytes;
  return {.key = key,
          .value = key + context_.shape.head_dim * bytes,
          .dtype = context_.kv_dtype,
          .block_size = tokens,
          .block_stride = static_cast<int64_t>(manager_.layout().host_page_bytes()) / bytes,
          .token_stride = 2 * context_.shape.head_dim,
          .head_stride = head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

KvView InfinigenStrategy::PartialView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t tokens = manager_.layout().page_tokens;
  const int64_t head = int64_t{tokens} * sizes_.partial_dim;
  return {.key = pages_ + (layer - sizes_.full_layers) * context_.shape.kv_heads * head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = tokens,
          .block_stride = static_cast<int64_t>(manager_.layout().page_bytes()) / bytes,
          .token_stride = sizes_.partial_dim,
          .head_stride = head,
          .block_table = context_.step_state->Device(arrays_.partial_pages),
          .block_table_stride = sizes_.table_pages,
          .length = tables_.length()};
}

KvView InfinigenStrategy::HostPartialView(int32_t layer) const {
  const InfinigenLayout& layout = manager_.layout();
  const uint64_t keys_and_values = layout.host_page_bytes() - layout.page_bytes();
  KvView view = PartialView(layer);
  view.key = host_pages_ + keys_and_values + (view.key - pages_);
  view.block_stride =
      static_cast<int64_t>(layout.host_page_bytes()) / DTypeBytes(context_.kv_dtype);
  view.block_table = tables_.pages();
  view.block_table_stride = tables_.max_pages();
  return view;
}

KvView InfinigenStrategy::FetchView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t rows = manager_.layout().fetch_page_rows;
  return {.key = pages_,
          .value = pages_ + context_.shape.head_dim * bytes,
          .dtype = context_.kv_dtype,
          .block_size = rows,
          .block_stride = static_cast<int64_t>(manager_.layout().page_bytes()) / bytes,
          .token_stride = 2 * context_.shape.head_dim,
          .head_stride = int64_t{rows} * 2 * context_.shape.head_dim,
          .block_table =
              context_.step_state->Device(arrays_.fetch_pages) + (layer % 2) * sizes_.fetch_pages,
          .block_table_stride = 2 * sizes_.fetch_pages,
          .length = scratch_.selected + int64_t{layer} * context_.max_decode_rows};
}

KvView InfinigenStrategy::RingView(int32_t ring_slot, int32_t rows) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t tokens = TileTokens(rows);
  const int64_t head = int64_t{tokens} * 2 * context_.shape.head_dim;
  const int64_t slot_elements =
      int64_t{sizes_.ring_tokens} * context_.shape.kv_heads * 2 * context_.shape.head_dim;
  std::byte* key = scratch_.ring + ring_slot * slot_elements * bytes;
  return {.key = key,
          .value = key + context_.shape.head_dim * bytes,
          .dtype = context_.kv_dtype,
          .block_size = tokens,
          .block_stride = head * context_.shape.kv_heads,
          .token_stride = 2 * context_.shape.head_dim,
          .head_stride = head,
          .length = tables_.length(),
          .max_tokens = tokens};
}

int32_t InfinigenStrategy::TileTokens(int32_t rows) const { return sizes_.ring_tokens / rows; }

// Tiles that the longest decode row needs, rounded up to a ladder so that few graphs serve all
// lengths.
int32_t InfinigenStrategy::TileCount(const StepView& step) const {
  if (step.decode_rows == 0) return 0;
  int32_t longest = 0;
  for (const Segment& segment : step.decode) longest = std::max(longest, segment.start_position);
  const int32_t tiles = PagesFor(longest, TileTokens(step.decode_rows));
  int32_t rung = 1;
  while (rung < tiles) rung += std::max(1, rung / 2);
  return rung;
}

PartialAttention InfinigenStrategy::PartialFrom(int32_t row) const {
  const int64_t head_rows = int64_t{row} * context_.shape.query_heads;
  return {.output = scratch_.partial.output + head_rows * context_.shape.head_dim,
          .maximum = scratch_.partial.maximum + head_rows,
          .sum = scratch_.partial.sum + head_rows};
}

// --------------------------------------------------------------------------------------------------
// step

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
  std::ranges::fill(state.Host(arrays_.partial_pages)
                        .first(static_cast<size_t>(step.decode_rows) * sizes_.table_pages),
                    0);
  std::ranges::fill(state.Host(arrays_.fetch_pages), 0);
  std::ranges::fill(state.Host(arrays_.limit), 0);
  auto set = [&](const Segment& segment, int32_t row) {
    tables_.SetRow(row, manager_.HostPages(segment.request), segment.start_position);
    tables_.SetTokens(segment, row, segment.start_position);
    std::ranges::copy(
        manager_.PartialPages(segment.request),
        state.Host(arrays_.partial_pages).begin() + int64_t{row} * sizes_.table_pages);
  };
  for (const Segment& segment : step.decode) {
    set(segment, segment.first_row);
    const std::span<const PageIndex> fetch = manager_.FetchPages(segment.request);
    const auto half = static_cast<int64_t>(fetch.size() / 2);
    auto target = state.Host(arrays_.fetch_pages).begin() +
                  int64_t{segment.first_row} * 2 * sizes_.fetch_pages;
    std::copy(fetch.begin(), fetch.begin() + half, target);
    std::copy(fetch.begin() + half, fetch.end(), target + sizes_.fetch_pages);
    state.Host(arrays_.limit)[static_cast<size_t>(segment.first_row)] =
        InfinigenFetchLimit(manager_.layout().parameters, manager_.Shape(segment.request));
    if (segment.resumed) ResumePartialKeys(segment);
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) set(step.prefill[i], tables_.PrefillRow(i));
  plan_ = PlanDecode(context_, step);
}

// The partial keys of the stored tokens come back page by page, as they were.
void InfinigenStrategy::ResumePartialKeys(const Segment& segment) {
  const InfinigenLayout& layout = manager_.layout();
  const uint64_t keys_and_values = layout.host_page_bytes() - layout.page_bytes();
  const std::span<const PageIndex> partial = manager_.PartialPages(segment.request);
  const std::span<const PageIndex> host = manager_.HostPages(segment.request);
  const auto pages = static_cast<size_t>(PagesFor(segment.start_position, layout.page_tokens));
  for (size_t i = 0; i < pages; ++i) {
    context_.backend->Copy(
        pages_ + static_cast<uint64_t>(partial[i]) * layout.page_bytes(),
        host_pages_ + static_cast<uint64_t>(host[i]) * layout.host_page_bytes() + keys_and_values,
        layout.page_bytes(), Stream::kCompute);
  }
}

void InfinigenStrategy::BeforeLayer(const StepView& step, int32_t layer, const Activations& x) {
  if (layer == 0) {
    for (StepEvent& event : events_) event.recorded = false;
    Record(kFork, Stream::kCompute);
    for (Stream stream : {Stream::kSpeculation, Stream::kHostToDevice, Stream::kDeviceToHost}) {
      Wait(kFork, stream);
    }
  }
  // This layer's projection will overwrite the keys and values of the layer before the last.
  Wait(OfParity(kAppended0, layer), Stream::kCompute);
  input_[layer % 2] = x;
  const int32_t next = layer + 1;
  if (manager_.layout().parameters.prefetch() && next >= sizes_.full_layers &&
      next < context_.shape.layers) {
    SpeculateLayer(step, next, x);
  }
}

// Predicts layer `layer`'s scores from the input `x` of the layer before, selects, and gathers.
void InfinigenStrategy::SpeculateLayer(const StepView& step, int32_t layer, const Activations& x) {
  if (step.decode_rows == 0) return;
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int64_t index = layer - sizes_.full_layers;
  const int32_t query_columns = shape.query_heads * sizes_.partial_dim;
  const Activations partial_query{scratch_.partial_query, query_columns};
  Record(kInputReady, Stream::kCompute);
  Wait(kInputReady, Stream::kSpeculation);
  if (shape.rotary) {
    const Activations query{scratch_.query, int64_t{shape.query_heads} * shape.head_dim};
    const QueryWeights& weights = context_.query_weights[static_cast<size_t>(layer)];
    backend.Gemm({.out = query,
                  .in = x,
                  .weight = weights.weight,
                  .bias = weights.bias,
                  .rows = step.decode_rows,
                  .out_columns = shape.query_heads * shape.head_dim,
                  .in_columns = shape.hidden_size},
                 Stream::kSpeculation);
    backend.Rotary({.data = query,
                    .position = step.position,
                    .rows = step.decode_rows,
                    .heads = shape.query_heads,
                    .head_dim = shape.head_dim,
                    .theta = shape.rope_theta},
                   Stream::kSpeculation);
    const int64_t matrix = int64_t{shape.kv_heads} * shape.head_dim * sizes_.partial_dim;
    backend.ProjectHeads({.out = partial_query,
                          .in = query,
                          .matrix = scratch_.query_matrix + index * matrix,
                          .rows = step.decode_rows,
                          .heads = shape.query_heads,
                          .group = shape.query_heads / shape.kv_heads,
                          .in_dim = shape.head_dim,
                          .out_dim = sizes_.partial_dim},
                         Stream::kSpeculation);
  } else {
    backend.Gemm({.out = partial_query,
                  .in = x,
                  .weight = scratch_.query_weight + index * query_columns * shape.hidden_size,
                  .bias = scratch_.query_bias + index * query_columns,
                  .rows = step.decode_rows,
                  .out_columns = query_columns,
                  .in_columns = shape.hidden_size},
                 Stream::kSpeculation);
  }
  backend.Speculate({.margin = scratch_.margin,
                     .margin_stride = context_.max_context,
                     .count = scratch_.count,
                     .query = partial_query,
                     .partial_key = PartialView(layer),
                     .row_active = step.row_active,
                     .alpha = static_cast<float>(manager_.layout().parameters.alpha()),
                     .rows = step.decode_rows,
                     .query_heads = shape.query_heads,
                     .kv_heads = shape.kv_heads,
                     .partial_dim = sizes_.partial_dim},
                    Stream::kSpeculation);
  int32_t* selected = scratch_.selected + int64_t{layer} * context_.max_decode_rows;
  int32_t* chosen = scratch_.index + int64_t{layer % 2} * context_.max_decode_rows *
                                         shape.kv_heads * sizes_.fetch_limit;
  backend.SelectTop({.selected = selected,
                     .index = chosen,
                     .index_stride = sizes_.fetch_limit,
                     .margin = scratch_.margin,
                     .margin_stride = context_.max_context,
                     .count = scratch_.count,
                     .length = tables_.length(),
                     .limit = context_.step_state->Device(arrays_.limit),
                     .row_active = step.row_active,
                     .rows = step.decode_rows,
                     .kv_heads = shape.kv_heads},
                    Stream::kSpeculation);
  Record(OfParity(kSelected0, layer), Stream::kSpeculation);
  // The buffer's last reader, the layer before the last, was enqueued before the input that the
  // speculation waited for.
  Wait(OfParity(kSelected0, layer), Stream::kHostToDevice);
  backend.GatherRows({.target = FetchView(layer),
                      .source = HostView(layer),
                      .selected = selected,
                      .index = chosen,
                      .index_stride = sizes_.fetch_limit,
                      .row_active = step.row_active,
                      .rows = step.decode_rows,
                      .kv_heads = shape.kv_heads,
                      .head_dim = shape.head_dim},
                     Stream::kHostToDevice);
  Record(OfParity(kGathered0, layer), Stream::kHostToDevice);
}

void InfinigenStrategy::Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                               const Activations& out) {
  RotateQueriesAndKeys(context_, step, inputs);
  AppendLayer(step, layer, inputs);
  if (step.decode_rows > 0) {
    if (layer < sizes_.full_layers) {
      AttendFull(step, layer, inputs, out);
    } else {
      AttendFetched(step, layer, inputs, out);
    }
  }
  for (size_t i = 0; i < step.prefill.size(); ++i) {
    AttendPrefill(step.prefill[i], tables_.PrefillRow(i), layer, inputs, out);
  }
}

// Keys and values go to the host pool, partial keys to the device and, for a later resume, to the
// host.
void InfinigenStrategy::AppendLayer(const StepView& step, int32_t layer,
                                    const AttentionInputs& inputs) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int32_t columns = shape.kv_heads * sizes_.partial_dim;
  const Activations partial_key{
      scratch_.partial_key + int64_t{layer % 2} * context_.max_rows * columns *
                                 DTypeBytes(backend.info().activation_dtype),
      columns};
  AppendArgs partial{.target = {},
                     .key = partial_key,
                     .table_row = tables_.token_row(),
                     .slot = tables_.token_slot(),
                     .rows = step.rows,
                     .kv_heads = shape.kv_heads,
                     .head_dim = sizes_.partial_dim};
  const bool speculates = layer >= sizes_.full_layers;
  if (speculates) {
    const int64_t matrix = int64_t{shape.kv_heads} * shape.head_dim * sizes_.partial_dim;
    backend.ProjectHeads({.out = partial_key,
                          .in = inputs.key,
                          .matrix = scratch_.key_matrix + (layer - sizes_.full_layers) * matrix,
                          .rows = step.rows,
                          .heads = shape.kv_heads,
                          .group = 1,
                          .in_dim = shape.head_dim,
                          .out_dim = sizes_.partial_dim},
                         Stream::kCompute);
    partial.target = PartialView(layer);
    backend.Append(partial, Stream::kCompute);
  }
  Record(kKvReady, Stream::kCompute);
  Wait(kKvReady, Stream::kDeviceToHost);
  backend.Append({.target = HostView(layer),
                  .key = inputs.key,
                  .value = inputs.value,
                  .table_row = tables_.token_row(),
                  .slot = tables_.token_slot(),
                  .rows = step.rows,
                  .kv_heads = shape.kv_heads,
                  .head_dim = shape.head_dim},
                 Stream::kDeviceToHost);
  if (speculates) {
    partial.target = HostPartialView(layer);
    backend.Append(partial, Stream::kDeviceToHost);
  }
  Record(OfParity(kAppended0, layer), Stream::kDeviceToHost);
}

void InfinigenStrategy::AttendFull(const StepView& step, int32_t layer,
                                   const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int32_t tiles = TileCount(step);
  const int32_t tile_tokens = TileTokens(step.decode_rows);
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t slot = next_ring_slot_;
    next_ring_slot_ = 1 - next_ring_slot_;
    KvView view = RingView(slot, step.decode_rows);
    view.first_token = tile * tile_tokens;
    Wait(OfParity(kTileFree0, slot), Stream::kHostToDevice);
    backend.CopyTile({.target = view,
                      .source = HostView(layer),
                      .first_token = view.first_token,
                      .tokens = tile_tokens,
                      .row_active = step.row_active,
                      .rows = step.decode_rows,
                      .kv_heads = shape.kv_heads,
                      .head_dim = shape.head_dim},
                     Stream::kHostToDevice);
    Record(OfParity(kTileReady0, slot), Stream::kHostToDevice);
    Wait(OfParity(kTileReady0, slot), Stream::kCompute);
    DecodeAttentionArgs part = DecodeCall(context_, step, inputs, {}, view, plan_);
    part.partial = PartialFrom(0);
    part.accumulate = tile > 0;
    part.current_key = {};
    part.current_value = {};
    backend.DecodeAttention(part, Stream::kCompute);
    Record(OfParity(kTileFree0, slot), Stream::kCompute);
  }
  KvView nothing = RingView(0, step.decode_rows);
  nothing.max_tokens = 0;
  DecodeAttentionArgs last = DecodeCall(context_, step, inputs, out, nothing, plan_);
  last.partial = PartialFrom(0);
  last.accumulate = tiles > 0;
  backend.DecodeAttention(last, Stream::kCompute);
}

void InfinigenStrategy::AttendFetched(const StepView& step, int32_t layer,
                                      const AttentionInputs& inputs, const Activations& out) {
  if (!manager_.layout().parameters.prefetch()) {
    SpeculateLayer(step, layer, input_[(layer + 1) % 2]);
  }
  Wait(OfParity(kGathered0, layer), Stream::kCompute);
  context_.backend->DecodeAttention(
      DecodeCall(context_, step, inputs, out, FetchView(layer), plan_), Stream::kCompute);
}

// Earlier chunks of the prompt come back from the host through the ring; the chunk's own keys join
// last.
void InfinigenStrategy::AttendPrefill(const Segment& segment, int32_t row, int32_t layer,
                                      const AttentionInputs& inputs, const Activations& out) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int32_t tile_tokens = TileTokens(1);
  int32_t first = 0;
  for (; first < segment.start_position; first += tile_tokens) {
    const int32_t slot = next_ring_slot_;
    next_ring_slot_ = 1 - next_ring_slot_;
    const KvView view = RingView(slot, 1);
    Wait(OfParity(kTileFree0, slot), Stream::kHostToDevice);
    backend.CopyTile({.target = view,
                      .source = HostView(layer),
                      .first_token = first,
                      .tokens = tile_tokens,
                      .row = row,
                      .row_tokens = segment.start_position,
                      .rows = 1,
                      .kv_heads = shape.kv_heads,
                      .head_dim = shape.head_dim},
                     Stream::kHostToDevice);
    Record(OfParity(kTileReady0, slot), Stream::kHostToDevice);
    Wait(OfParity(kTileReady0, slot), Stream::kCompute);
    PrefillAttentionArgs part = PrefillCall(context_, segment, inputs, {}, view, 0);
    part.out = {};
    part.partial = PartialFrom(segment.first_row);
    part.accumulate = first > 0;
    part.chunk_key = {};
    part.chunk_value = {};
    part.history_tokens = std::min(tile_tokens, segment.start_position - first);
    backend.PrefillAttention(part, Stream::kCompute);
    Record(OfParity(kTileFree0, slot), Stream::kCompute);
  }
  PrefillAttentionArgs last = PrefillCall(context_, segment, inputs, out, RingView(0, 1), 0);
  last.history_tokens = 0;
  if (first > 0) {
    last.partial = PartialFrom(segment.first_row);
    last.accumulate = true;
  }
  backend.PrefillAttention(last, Stream::kCompute);
}

void InfinigenStrategy::EndStep(const StepView& step) {
  Wait(kAppended0, Stream::kCompute);
  Wait(kAppended1, Stream::kCompute);
  if (ReadbackBytes(step) == 0) return;
  context_.backend->Copy(selected_host_, scratch_.selected, manager_.layout().fixed_host_bytes,
                         Stream::kCompute);
}

// -----------------------------------------------------------------------------------------------
// reading

DecodeCounts InfinigenStrategy::CollectDecode(const StepView& step, size_t index,
                                              std::span<double> attended_by_layer) {
  const Segment& segment = step.decode[index];
  DecodeCounts counts;
  double held = 0;
  double selected = 0;
  for (int32_t layer = 0; layer < context_.shape.layers; ++layer) {
    double entries = segment.start_position;
    if (layer >= sizes_.full_layers) {
      held += entries;
      entries = selected_host_[int64_t{layer} * context_.max_decode_rows + segment.first_row];
      selected += entries;
    }
    counts.fetched += entries;
    counts.attended += entries + 1;
    if (!attended_by_layer.empty()) attended_by_layer[static_cast<size_t>(layer)] = entries + 1;
  }
  counts.engaged = selected < held;
  return counts;
}

uint64_t InfinigenStrategy::ReadbackBytes(const StepView& step) const {
  return step.decode_rows == 0 ? 0 : manager_.layout().fixed_host_bytes;
}

int32_t InfinigenStrategy::TokenBudget(const RequestShape& shape) const {
  return InfinigenFetchLimit(manager_.layout().parameters, shape);
}

EngagementRule InfinigenStrategy::engagement_rule() const {
  return {"fewer entries were fetched than were held beyond the full layers"};
}

bool InfinigenStrategy::EngagementExpected(const RequestShape& shape, int32_t tokens) const {
  return tokens > shape.prompt_tokens + 1;  // there was a decode step
}

}  // namespace kvsweep
