// What the host reads of InfiniGen's steps: counts after each, figures at the end, and, in quality
// trials, how well speculation chose.

#include <algorithm>

#include "base/check.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/infinigen.h"

namespace kvsweep {
namespace {

// A diagnosis looks at every so many positions.
constexpr int32_t kDiagnosisPeriod = 16;

}  // namespace

size_t InfinigenStrategy::ColumnsOfRequest() const {
  return static_cast<size_t>(layout().speculating_layers() * context_.shape.kv_heads *
                             layout().partial_dim);
}

uint64_t InfinigenStrategy::SelectedBytes(int32_t layers) const {
  return sizeof(int32_t) *
         static_cast<uint64_t>(layers * context_.max_decode_rows * context_.shape.kv_heads);
}

void InfinigenStrategy::BeginMeasurement() {
  CacheStrategy::BeginMeasurement();
  for (LayerMeans* means : {&fetched_, &recall_, &covered_, &cosine_}) means->Clear();
}

DecodeCounts InfinigenStrategy::CollectDecode(const StepView& step, size_t index,
                                              std::span<double> attended_by_layer) {
  const Segment& segment = step.decode[index];
  const Decoded& decoded = decoded_[static_cast<size_t>(step.parity)][index];
  const double held = decoded.held;
  const int64_t heads = context_.shape.kv_heads;
  DecodeCounts counts;
  double selected_of_all = 0;
  for (int32_t layer = 0; layer < layout().layers; ++layer) {
    double entries = held;
    if (layer >= full_layers()) {
      const int32_t* const selected =
          host_scratch_.selected +
          (int64_t{layer} * context_.max_decode_rows + segment.first_row) * heads;
      int64_t sum = 0;
      for (int64_t head = 0; head < heads; ++head) sum += selected[head];
      entries = static_cast<double>(sum) / static_cast<double>(heads);
      selected_of_all += entries;
      fetched_.Add(layer, entries);
    }
    if (!IsResident(layer)) counts.fetched += entries;
    counts.attended += entries + 1;
    if (!attended_by_layer.empty()) attended_by_layer[static_cast<size_t>(layer)] = entries + 1;
  }
  counts.evicted = decoded.evicts ? 1 : 0;
  // Full offload is there to bring everything.
  counts.engaged = layout().fetches_all() ? counts.fetched > 0
                                          : selected_of_all < held * layout().speculating_layers();
  return counts;
}

int32_t InfinigenStrategy::PromptEvictions(const RequestShape& shape, int32_t tokens) const {
  return tokens - layout().SlotsOf(tokens, shape);
}

int32_t InfinigenStrategy::TokenBudget(const RequestShape& shape) const {
  const int32_t capacity = InfinigenCapacity(layout().parameters, shape);
  if (layout().fetches_all()) return capacity == kUnbounded ? -1 : capacity;
  return std::min(capacity, InfinigenFetchLimit(layout().parameters, shape));
}

double InfinigenStrategy::SelectionBytes(const MeanBatch& batch) const {
  const ModelShape& shape = context_.shape;
  const double layers = layout().speculating_layers();
  const double margins = 3.0 * sizeof(float) * shape.kv_heads * layers * batch.tokens;
  const int32_t query_columns =
      layout().query_path == QueryPath::kThinProjection ? layout().partial_dim : shape.head_dim;
  const double weights = layers * shape.hidden_size * shape.query_heads * query_columns *
                         static_cast<double>(DTypeBytes(context_.weight_dtype));
  return static_cast<double>(layout().partial_token_bytes) * batch.tokens + margins + weights;
}

uint64_t InfinigenStrategy::ReadbackBytes(const StepView& step) const {
  uint64_t bytes = 0;
  if (layout().query_path == QueryPath::kRequestColumns) {
    bytes += step.prefill.size() * ColumnsOfRequest() * sizeof(int32_t);
  }
  if (step.decode_rows == 0 || layout().fetches_all()) return bytes;
  bytes += SelectedBytes(layout().layers);
  if (layout().staged()) {
    bytes += static_cast<uint64_t>(layout().speculating_layers()) * SelectedBytes(1) *
             static_cast<uint64_t>(1 + layout().fetch_limit);
  }
  return bytes;
}

EngagementRule InfinigenStrategy::engagement_rule() const {
  if (layout().fetches_all()) return {"entries were fetched from the host"};
  return {"fewer entries were fetched than were held beyond the full layers"};
}

bool InfinigenStrategy::EngagementExpected(const RequestShape& shape, int32_t tokens) const {
  return tokens > shape.prompt_tokens + 1;  // there was a decode step
}

std::vector<CacheStrategy::Figure> InfinigenStrategy::Figures() const {
  std::vector<Figure> figures;
  for (size_t i = 0; i < column_share_.size(); ++i) {
    figures.push_back({.name = "partial_columns",
                       .layer = full_layers() + static_cast<int32_t>(i),
                       .value = column_share_[i]});
  }
  fetched_.AppendTo("fetched_entries", &figures);
  recall_.AppendTo("speculation_recall", &figures);
  covered_.AppendTo("covered_mass", &figures);
  cosine_.AppendTo("input_cosine", &figures);
  return figures;
}

// --------------------------------------------------------------------------------------- diagnosis

namespace {

// Row `row` of activations as f32.
std::vector<float> ReadRow(const StrategyContext& context, const Activations& from, int32_t row,
                           int32_t columns) {
  std::vector<std::byte> bytes(static_cast<size_t>(columns * DTypeBytes(context.activation_dtype)));
  context.backend->Copy(bytes.data(), FromRow(context, from, row).data, bytes.size(),
                        Stream::kCompute);
  KVSWEEP_CHECK_OK(context.backend->WaitAll());
  std::vector<float> values(static_cast<size_t>(columns));
  ToFloats(bytes.data(), context.activation_dtype, values);
  return values;
}

}  // namespace

// The true scores of a few rows, once all that was enqueued has run: the host pool holds their
// keys.
void InfinigenStrategy::DiagnoseLayer(const StepView& step, int32_t layer,
                                      const AttentionInputs& inputs) {
  const ModelShape& shape = context_.shape;
  for (const Segment& segment : step.decode) {
    const int32_t slots = layout().SlotsOf(segment.start_position, manager_.Shape(segment.request));
    if (segment.start_position % kDiagnosisPeriod != 0 || slots == 0) continue;
    if (layer > 0) {
      cosine_.Add(
          layer,
          Cosine(ReadRow(context_, input_[layer % 2], segment.first_row, shape.hidden_size),
                 ReadRow(context_, input_[(layer + 1) % 2], segment.first_row, shape.hidden_size)));
    }
    if (layer < full_layers()) continue;
    const std::vector<float> query =
        ReadRow(context_, inputs.query, segment.first_row, shape.query_heads * shape.head_dim);
    const std::vector<float> current =
        ReadRow(context_, inputs.key, segment.first_row, shape.kv_heads * shape.head_dim);
    const std::vector<float> keys = ReadKeys(segment.request, layer, slots);
    SelectionSample sample{.query = query,
                           .keys = keys,
                           .current_key = current,
                           .query_heads = shape.query_heads,
                           .kv_heads = shape.kv_heads,
                           .head_dim = shape.head_dim,
                           .scale = shape.attention_scale()};
    for (int32_t head = 0; head < shape.kv_heads; ++head) {
      sample.selected.push_back(ReadSelection(layer, segment.first_row, head));
    }
    const SelectionMatch match = MatchSelection(sample);
    recall_.Add(layer, match.recall);
    covered_.Add(layer, match.covered_mass);
  }
}

std::vector<int32_t> InfinigenStrategy::ReadSelection(int32_t layer, int32_t row,
                                                      int32_t head) const {
  Backend& backend = *context_.backend;
  const int64_t pair = int64_t{row} * context_.shape.kv_heads + head;
  int32_t count = 0;
  backend.Copy(&count, Selected(layer) + pair, sizeof(count), Stream::kCompute);
  KVSWEEP_CHECK_OK(backend.WaitAll());
  std::vector<int32_t> slots(static_cast<size_t>(count));
  backend.Copy(slots.data(), Chosen(layer) + pair * layout().fetch_limit,
               slots.size() * sizeof(int32_t), Stream::kCompute);
  KVSWEEP_CHECK_OK(backend.WaitAll());
  return slots;
}

// [Hk, slots, d] of the host pool.
std::vector<float> InfinigenStrategy::ReadKeys(RequestId request, int32_t layer,
                                               int32_t slots) const {
  const KvView view = HostView(layer);
  const std::span<const PageIndex> pages = manager_.HostPages(request);
  const int64_t dim = context_.shape.head_dim;
  std::vector<float> keys(static_cast<size_t>(context_.shape.kv_heads * slots * dim));
  for (int64_t head = 0; head < context_.shape.kv_heads; ++head) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t page = pages[static_cast<size_t>(slot / view.block_size)];
      const int64_t element = page * view.block_stride +
                              slot % view.block_size * view.token_stride + head * view.head_stride;
      ToFloats(At(view.key, element, view.dtype), view.dtype,
               std::span(keys).subspan(static_cast<size_t>((head * slots + slot) * dim),
                                       static_cast<size_t>(dim)));
    }
  }
  return keys;
}

}  // namespace kvsweep
