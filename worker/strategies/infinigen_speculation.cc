// InfiniGen's speculation: the matrices and weights it is made of, and what a step enqueues for it.

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/status_macros.h"
#include "worker/strategies/attention_calls.h"
#include "worker/strategies/infinigen.h"
#include "worker/strategies/prepared_weights.h"

namespace kvsweep {

// ----------------------------------------------------------------------------------------- skewing

absl::StatusOr<std::vector<float>> InfinigenStrategy::ReadFloats(const void* source, DType dtype,
                                                                 int64_t count) {
  std::vector<float> values(source == nullptr ? 0 : static_cast<size_t>(count));
  if (values.empty()) return values;
  std::vector<std::byte> bytes(static_cast<size_t>(count * DTypeBytes(dtype)));
  context_.backend->Copy(bytes.data(), source, bytes.size(), Stream::kCompute);
  RETURN_IF_ERROR(context_.backend->WaitAll());
  ToFloats(bytes.data(), dtype, values);
  return values;
}

absl::Status InfinigenStrategy::Put(const std::vector<float>& values, DType dtype, void* target) {
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
  FromFloats(values, dtype, bytes.data());
  context_.backend->Copy(target, bytes.data(), bytes.size(), Stream::kCompute);
  return context_.backend->WaitAll();  // the bytes end here
}

absl::Status InfinigenStrategy::Skew(const Skewing& skewing) {
  std::vector<float> frequency;
  if (context_.shape.rotary) {
    ASSIGN_OR_RETURN(frequency, ReadFloats(context_.shape.inverse_frequency, DType::kF32,
                                           context_.shape.head_dim / 2));
  }
  if (layout().folded()) {
    for (int32_t layer = 0; layer < layout().layers; ++layer) {
      RETURN_IF_ERROR(FoldLayer(skewing.layers[static_cast<size_t>(layer)], layer));
    }
  }
  for (int32_t layer = full_layers(); layer < layout().layers; ++layer) {
    RETURN_IF_ERROR(SkewLayer(skewing.layers[static_cast<size_t>(layer)], layer, frequency));
  }
  return absl::OkStatus();
}

// W_q A and W_k A instead of the layer's own, rounded to the weight type as the folded model would
// be.
absl::Status InfinigenStrategy::FoldLayer(const LayerSkewing& skewing, int32_t layer) {
  const ModelShape& shape = context_.shape;
  const QueryWeights& weights = context_.query_weights[static_cast<size_t>(layer)];
  const int32_t heads = shape.query_heads + shape.kv_heads;
  const int64_t rows = int64_t{heads} * shape.head_dim;
  ASSIGN_OR_RETURN(const std::vector<float> weight,
                   ReadFloats(weights.weight, context_.weight_dtype, rows * shape.hidden_size));
  ASSIGN_OR_RETURN(const std::vector<float> bias, ReadFloats(weights.bias, DType::kF32, rows));
  const auto fold = [&](int32_t first_head, int32_t count, int32_t group) -> absl::Status {
    const auto first = static_cast<size_t>(first_head * shape.head_dim);
    const auto taken = static_cast<size_t>(count * shape.head_dim);
    const auto width = static_cast<size_t>(shape.hidden_size);
    const ProjectedWeights folded = ThroughMatrices(
        std::span(weight).subspan(first * width, taken * width),
        bias.empty() ? std::span<const float>() : std::span(bias).subspan(first, taken),
        skewing.matrix, count, group, shape.head_dim, shape.head_dim);
    const int64_t target = layer * rows + static_cast<int64_t>(first);
    RETURN_IF_ERROR(
        Put(folded.weight, context_.weight_dtype,
            At(scratch_.folded_weight, target * shape.hidden_size, context_.weight_dtype)));
    return Put(folded.bias, DType::kF32, scratch_.folded_bias + target);
  };
  RETURN_IF_ERROR(fold(0, shape.query_heads, shape.query_heads / shape.kv_heads));
  return fold(shape.query_heads, shape.kv_heads, 1);
}

absl::Status InfinigenStrategy::SkewLayer(const LayerSkewing& skewing, int32_t layer,
                                          std::span<const float> inverse_frequency) {
  const ModelShape& shape = context_.shape;
  const Infinigen& parameters = layout().parameters;
  const int32_t partial_dim = layout().partial_dim;
  const int64_t matrix = int64_t{shape.kv_heads} * shape.head_dim * partial_dim;
  const float scale = shape.attention_scale();
  if (layout().query_path == QueryPath::kRequestColumns) {
    column_share_.push_back(static_cast<double>(partial_dim) / shape.head_dim);
    return Put(skewing.matrix, DType::kF32,
               scratch_.key_matrix +
                   Index(layer) * shape.kv_heads * shape.head_dim * int64_t{shape.head_dim});
  }
  const bool paired = shape.rotary && layout().query_path == QueryPath::kThinProjection;
  HeadColumns columns;
  if (paired) {
    const std::vector<int32_t> pairs = ChooseRotaryPairs(
        skewing.plain, parameters.column_score(), partial_dim, shape.kv_heads, shape.head_dim);
    std::vector<float> turning;
    for (const int32_t pair : pairs) {
      turning.push_back(inverse_frequency[static_cast<size_t>(pair)]);
    }
    RETURN_IF_ERROR(
        Put(turning, DType::kF32, scratch_.pair_frequency + Index(layer) * (partial_dim / 2)));
    columns = PairColumns(pairs, shape.kv_heads, shape.head_dim);
  } else {
    columns = ChooseColumns(skewing.skewed, parameters.column_score(),
                            parameters.partial_weight_ratio(), shape.kv_heads, shape.head_dim);
  }
  const double kept = std::accumulate(
      columns.begin(), columns.end(), 0.0,
      [](double sum, const std::vector<int32_t>& head) { return sum + head.size(); });
  column_share_.push_back(kept / (shape.kv_heads * shape.head_dim));

  // Pairs and folded models already stand in the space whose columns are picked.
  const bool picks = paired || layout().folded();
  const std::span<const float> skew =
      picks ? std::span<const float>() : std::span<const float>(skewing.matrix);
  RETURN_IF_ERROR(Put(ThinMatrices(skew, columns, shape.head_dim, partial_dim, 1.0f), DType::kF32,
                      scratch_.key_matrix + Index(layer) * matrix));
  const std::vector<float> queries =
      ThinMatrices(skew, columns, shape.head_dim, partial_dim, scale);
  if (layout().query_path == QueryPath::kProjectThenSkew) {
    return Put(queries, DType::kF32, scratch_.query_matrix + Index(layer) * matrix);
  }
  return PutThinProjection(layer, queries, skewing);
}

// W_q (or its folded copy) through the thin matrices: seconds for billions of weights, and the same
// for every trial of an arm.
absl::Status InfinigenStrategy::PutThinProjection(int32_t layer, const std::vector<float>& queries,
                                                  const LayerSkewing& skewing) {
  const ModelShape& shape = context_.shape;
  const int64_t rows = int64_t{shape.query_heads} * shape.head_dim;
  const int64_t columns = int64_t{shape.query_heads} * layout().partial_dim;
  const auto bytes_of = [](const std::vector<float>& values) {
    return absl::string_view(reinterpret_cast<const char*>(values.data()),
                             values.size() * sizeof(float));
  };
  DigestBuilder key;
  key.AddNumber(static_cast<uint64_t>(layer)).Add(bytes_of(queries));
  const void* weight = context_.query_weights[static_cast<size_t>(layer)].weight;
  const float* bias = context_.query_weights[static_cast<size_t>(layer)].bias;
  if (layout().folded()) {
    key.Add(bytes_of(skewing.matrix));
    const int64_t first = layer * (rows + int64_t{shape.kv_heads} * shape.head_dim);
    weight = At(scratch_.folded_weight, first * shape.hidden_size, context_.weight_dtype);
    bias = scratch_.folded_bias + first;
  }
  const auto make = [&]() -> absl::StatusOr<PreparedWeights::Matrix> {
    ASSIGN_OR_RETURN(const std::vector<float> source,
                     ReadFloats(weight, context_.weight_dtype, rows * shape.hidden_size));
    ASSIGN_OR_RETURN(const std::vector<float> shift, ReadFloats(bias, DType::kF32, rows));
    ProjectedWeights thin = ThroughMatrices(source, shift, queries, shape.query_heads,
                                            shape.query_heads / shape.kv_heads, shape.head_dim,
                                            layout().partial_dim);
    PreparedWeights::Matrix matrix{.weight = {}, .bias = std::move(thin.bias)};
    matrix.weight.resize(thin.weight.size() *
                         static_cast<size_t>(DTypeBytes(context_.weight_dtype)));
    FromFloats(thin.weight, context_.weight_dtype, matrix.weight.data());
    return matrix;
  };
  ASSIGN_OR_RETURN(const std::shared_ptr<const PreparedWeights::Matrix> thin,
                   context_.prepared_weights->Get(key.Finish(), make));
  context_.backend->Copy(At(scratch_.query_weight, Index(layer) * columns * shape.hidden_size,
                            context_.weight_dtype),
                         thin->weight.data(), thin->weight.size(), Stream::kCompute);
  RETURN_IF_ERROR(context_.backend->WaitAll());  // what is not kept ends here
  return Put(thin->bias, DType::kF32, scratch_.query_bias + Index(layer) * columns);
}

void InfinigenStrategy::FoldQueriesAndKeys(const StepView& step, int32_t layer,
                                           const AttentionInputs& inputs) {
  const ModelShape& shape = context_.shape;
  const int32_t columns = (shape.query_heads + shape.kv_heads) * shape.head_dim;
  context_.backend->Gemm(
      {.out = inputs.query,
       .in = input_[layer % 2],
       .weight = At(scratch_.folded_weight, int64_t{layer} * columns * shape.hidden_size,
                    context_.weight_dtype),
       .bias = scratch_.folded_bias + int64_t{layer} * columns,
       .rows = step.rows,
       .out_columns = columns,
       .in_columns = shape.hidden_size},
      Stream::kCompute);
}

// --------------------------------------------------------------------------------------- selection

SlotUse InfinigenStrategy::UseRule() const {
  if (!layout().remembers()) return SlotUse::kNone;
  switch (layout().parameters.eviction_policy()) {
    case Infinigen::EVICTION_POLICY_COUNTER:
      return SlotUse::kCount;
    case Infinigen::EVICTION_POLICY_LRU:
      return SlotUse::kStamp;
    default:
      return SlotUse::kNone;
  }
}

namespace {

SelectionScope ScopeOf(const Infinigen& parameters) {
  switch (parameters.count_scope()) {
    case Infinigen::COUNT_SCOPE_HEAD:
      return SelectionScope::kHead;
    case Infinigen::COUNT_SCOPE_BATCH:
      return SelectionScope::kBatch;
    default:
      return SelectionScope::kRequest;
  }
}

}  // namespace

// The speculated queries of a layer, seen through its kept columns and scaled.
void InfinigenStrategy::ProjectPartialQuery(const StepView& step, int32_t layer,
                                            const Activations& x) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int64_t index = Index(layer);
  const int32_t columns = shape.query_heads * layout().partial_dim;
  const Activations partial_query{scratch_.partial_query, columns};
  RotaryArgs rotary{
      .position = step.position, .rows = step.decode_rows, .heads = shape.query_heads};
  if (layout().query_path == QueryPath::kThinProjection) {
    backend.Gemm({.out = partial_query,
                  .in = x,
                  .weight = At(scratch_.query_weight, index * columns * shape.hidden_size,
                               context_.weight_dtype),
                  .bias = scratch_.query_bias + index * columns,
                  .rows = step.decode_rows,
                  .out_columns = columns,
                  .in_columns = shape.hidden_size},
                 Stream::kSpeculation);
    if (!shape.rotary) return;
    rotary.data = partial_query;
    rotary.inverse_frequency = scratch_.pair_frequency + index * (layout().partial_dim / 2);
    rotary.head_dim = layout().partial_dim;
    backend.Rotary(rotary, Stream::kSpeculation);
    return;
  }
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
  if (shape.rotary) {
    rotary.data = query;
    rotary.inverse_frequency = shape.inverse_frequency;
    rotary.head_dim = shape.head_dim;
    backend.Rotary(rotary, Stream::kSpeculation);
  }
  ProjectHeadsArgs project{.out = partial_query,
                           .in = query,
                           .rows = step.decode_rows,
                           .heads = shape.query_heads,
                           .group = shape.query_heads / shape.kv_heads,
                           .in_dim = shape.head_dim,
                           .out_dim = layout().partial_dim};
  if (layout().query_path == QueryPath::kRequestColumns) {
    PickColumns(layer, &project);
    project.scale = shape.attention_scale();
  } else {
    project.matrix = scratch_.query_matrix +
                     index * shape.kv_heads * shape.head_dim * int64_t{layout().partial_dim};
  }
  backend.ProjectHeads(project, Stream::kSpeculation);
}

// The whole skewing of a layer and each request's own columns of it.
void InfinigenStrategy::PickColumns(int32_t layer, ProjectHeadsArgs* project) const {
  const ModelShape& shape = context_.shape;
  const int64_t of_layer = int64_t{shape.kv_heads} * layout().partial_dim;
  project->matrix = scratch_.key_matrix +
                    Index(layer) * shape.kv_heads * shape.head_dim * int64_t{shape.head_dim};
  project->column = scratch_.column + Index(layer) * of_layer;
  project->column_set = context_.step_state->Device(arrays_.column_set);
  project->column_stride = layout().speculating_layers() * of_layer;
}

// Predicts layer `layer`'s scores from the input `x` of the layer before, selects, and gathers.
void InfinigenStrategy::SpeculateLayer(const StepView& step, int32_t layer, const Activations& x) {
  if (step.decode_rows == 0) return;
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  Record(kInputReady, Stream::kCompute);
  Wait(kInputReady, Stream::kSpeculation);
  ProjectPartialQuery(step, layer, x);
  backend.Speculate({.margin = scratch_.margin,
                     .margin_stride = context_.max_context,
                     .count = scratch_.count,
                     .query = {scratch_.partial_query, shape.query_heads * layout().partial_dim},
                     .partial_key = PartialView(layer),
                     .row_active = step.row_active,
                     .alpha = static_cast<float>(layout().parameters.alpha()),
                     .rows = step.decode_rows,
                     .query_heads = shape.query_heads,
                     .kv_heads = shape.kv_heads,
                     .partial_dim = layout().partial_dim},
                    Stream::kSpeculation);
  SelectTopArgs select{.selected = Selected(layer),
                       .index = Chosen(layer),
                       .index_stride = layout().fetch_limit,
                       .margin = scratch_.margin,
                       .margin_stride = context_.max_context,
                       .count = scratch_.count,
                       .length = tables_.length(),
                       .limit = context_.step_state->Device(arrays_.limit),
                       .row_active = step.row_active,
                       .scope = ScopeOf(layout().parameters),
                       .rows = step.decode_rows,
                       .kv_heads = shape.kv_heads};
  if (layout().parameters.has_force_fetch_ratio()) {
    select.wanted = context_.step_state->Device(arrays_.wanted);
  }
  if (layout().remembers()) {
    select.slot_position = StateView(layer, 0);
    select.use_rule = UseRule();
    select.stamp = step.position;
    if (select.use_rule != SlotUse::kNone) select.use = StateView(layer, 1);
  }
  backend.SelectTop(select, Stream::kSpeculation);
  if (layout().staged()) return GatherStaged(step, layer);
  Record(OfParity(kSelected0, layer), Stream::kSpeculation);
  // The buffer's last reader, the layer before the last, was enqueued before the input that the
  // speculation waited for.
  Wait(OfParity(kSelected0, layer), Stream::kHostToDevice);
  backend.GatherRows({.target = FetchView(layer),
                      .source = HostView(layer),
                      .selected = select.selected,
                      .index = select.index,
                      .index_stride = layout().fetch_limit,
                      .row_active = step.row_active,
                      .rows = step.decode_rows,
                      .kv_heads = shape.kv_heads,
                      .head_dim = shape.head_dim},
                     Stream::kHostToDevice);
  Record(OfParity(kGathered0, layer), Stream::kHostToDevice);
}

// The authors' way: the host learns the selection, packs the rows into a pinned buffer, and copies
// that. It waits in the middle of the step.
void InfinigenStrategy::GatherStaged(const StepView& step, int32_t layer) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const EventName selected_event = OfParity(kSelected0, layer);
  const EventName gathered_event = OfParity(kGathered0, layer);
  int32_t* const selected = host_scratch_.selected + (Selected(layer) - scratch_.selected);
  backend.Copy(selected, Selected(layer), SelectedBytes(1), Stream::kSpeculation);
  backend.Copy(host_scratch_.staged_index, Chosen(layer),
               SelectedBytes(1) * static_cast<uint64_t>(layout().fetch_limit),
               Stream::kSpeculation);
  Record(selected_event, Stream::kSpeculation);
  KVSWEEP_CHECK_OK(backend.Wait(events_[selected_event].event));
  // The copies that last read this staging buffer.
  if (events_[gathered_event].recorded) {
    KVSWEEP_CHECK_OK(backend.Wait(events_[gathered_event].event));
  }
  Wait(selected_event, Stream::kHostToDevice);
  const KvView source = HostView(layer);
  const KvView target = FetchView(layer);
  const auto row_bytes = static_cast<size_t>(2 * shape.head_dim * DTypeBytes(context_.kv_dtype));
  const int64_t pairs = int64_t{context_.max_decode_rows} * shape.kv_heads;
  for (const Segment& segment : step.decode) {
    const std::span<const PageIndex> host = manager_.HostPages(segment.request);
    const std::span<const PageIndex> fetch = manager_.FetchPages(segment.request);
    const size_t half = layer % 2 * (fetch.size() / 2);
    for (int32_t head = 0; head < shape.kv_heads; ++head) {
      const int64_t pair = int64_t{segment.first_row} * shape.kv_heads + head;
      const int32_t* const index = host_scratch_.staged_index + pair * layout().fetch_limit;
      std::byte* const staged = host_scratch_.staged_rows + ((layer % 2) * pairs + pair) *
                                                                layout().fetch_limit *
                                                                static_cast<int64_t>(row_bytes);
      for (int32_t j = 0; j < selected[pair]; ++j) {
        const int64_t element =
            host[static_cast<size_t>(index[j] / source.block_size)] * source.block_stride +
            index[j] % source.block_size * source.token_stride + head * source.head_stride;
        std::memcpy(staged + j * row_bytes, At(source.key, element, source.dtype), row_bytes);
      }
      for (int32_t j = 0; j < selected[pair]; j += target.block_size) {
        const int64_t element =
            fetch[half + static_cast<size_t>(j / target.block_size)] * target.block_stride +
            head * target.head_stride;
        const int32_t rows = std::min(target.block_size, selected[pair] - j);
        backend.Copy(At(target.key, element, target.dtype), staged + j * row_bytes,
                     static_cast<uint64_t>(rows) * row_bytes, Stream::kHostToDevice);
      }
    }
  }
  Record(gathered_event, Stream::kHostToDevice);
}

// ----------------------------------------------------------------------------------------
// appending

// A prompt's own columns, once it is there (it comes in one piece).
void InfinigenStrategy::RankRequestColumns(const StepView& step, int32_t layer,
                                           const AttentionInputs& inputs) {
  const ModelShape& shape = context_.shape;
  ProjectHeadsArgs picked;
  PickColumns(layer, &picked);
  for (const Segment& segment : step.prefill) {
    KVSWEEP_CHECK(segment.start_position == 0 && segment.last_chunk);
    context_.backend->RankColumns(
        {.column = const_cast<int32_t*>(picked.column) + segment.slot * picked.column_stride,
         .query = FromRow(context_, inputs.query, segment.first_row),
         .key = FromRow(context_, inputs.key, segment.first_row),
         .matrix = picked.matrix,
         .query_alone = layout().parameters.column_score() == Infinigen::COLUMN_SCORE_QUERY,
         .rows = segment.rows,
         .query_heads = shape.query_heads,
         .kv_heads = shape.kv_heads,
         .head_dim = shape.head_dim,
         .partial_dim = layout().partial_dim},
        Stream::kDeviceToHost);
  }
}

// Partial keys of the step's tokens, placed and stored on the device, ahead of what goes to the host
// in the same stream; returns the arguments, whose slots also hold for the host pool.
AppendArgs InfinigenStrategy::PartialAppend(const StepView& step, int32_t layer,
                                            const AttentionInputs& inputs) {
  Backend& backend = *context_.backend;
  const ModelShape& shape = context_.shape;
  const int32_t columns = shape.kv_heads * layout().partial_dim;
  const Activations partial_key{
      At(scratch_.partial_key, int64_t{layer % 2} * context_.max_rows * columns,
         context_.activation_dtype),
      columns};
  ProjectHeadsArgs project{.out = partial_key,
                           .in = inputs.key,
                           .rows = step.rows,
                           .heads = shape.kv_heads,
                           .group = 1,
                           .in_dim = shape.head_dim,
                           .out_dim = layout().partial_dim};
  if (layout().query_path == QueryPath::kRequestColumns) {
    RankRequestColumns(step, layer, inputs);
    PickColumns(layer, &project);
  } else {
    project.matrix = scratch_.key_matrix +
                     Index(layer) * shape.kv_heads * shape.head_dim * int64_t{layout().partial_dim};
  }
  backend.ProjectHeads(project, Stream::kDeviceToHost);
  AppendArgs append{.target = PartialView(layer),
                    .key = partial_key,
                    .table_row = tables_.token_row(),
                    .slot = tables_.token_slot(),
                    .rows = step.rows,
                    .kv_heads = shape.kv_heads,
                    .head_dim = layout().partial_dim};
  if (layout().remembers()) {
    int32_t* const slot = scratch_.slot + int64_t{layer % 2} * context_.max_rows * shape.kv_heads;
    PlaceTokensArgs place{.slot = slot,
                          .slot_position = StateView(layer, 0),
                          .use_rule = UseRule(),
                          .table_row = tables_.token_row(),
                          .position = step.position,
                          .planned = tables_.token_slot(),
                          .capacity = context_.step_state->Device(arrays_.capacity),
                          .decided_rows = step.decode_rows,
                          .rows = step.rows,
                          .kv_heads = shape.kv_heads};
    if (place.use_rule != SlotUse::kNone) place.use = StateView(layer, 1);
    backend.PlaceTokens(place, Stream::kDeviceToHost);
    append.slot = slot;
    append.slot_by_head = true;
  }
  backend.Append(append, Stream::kDeviceToHost);
  return append;
}

}  // namespace kvsweep
