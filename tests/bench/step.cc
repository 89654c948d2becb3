#include "tests/bench/step.h"

#include <cmath>
#include <memory>

#include "base/status_macros.h"

namespace kvsweep {
namespace {

struct Layer {
  NormArgs attention_norm;
  GemmArgs qkv;
  RotaryArgs rotary_query;
  RotaryArgs rotary_key;
  DecodeAttentionArgs attention;
  AppendArgs append;
  GemmArgs attention_out;
  NormArgs ffn_norm;
  GemmArgs up;
  SiluGateArgs gate;
  GemmArgs down;
};

struct Step {
  bool rotary = true;
  bool gated = true;
  EmbedArgs embed;
  std::vector<Layer> layers;
  NormArgs final_norm;
  GemmArgs logits;
  ArgmaxArgs argmax;
};

void Enqueue(Backend& backend, const Step& step) {
  constexpr Stream kStream = Stream::kCompute;
  backend.Embed(step.embed, kStream);
  for (const Layer& layer : step.layers) {
    backend.Norm(layer.attention_norm, kStream);
    backend.Gemm(layer.qkv, kStream);
    if (step.rotary) {
      backend.Rotary(layer.rotary_query, kStream);
      backend.Rotary(layer.rotary_key, kStream);
    }
    backend.DecodeAttention(layer.attention, kStream);
    backend.Append(layer.append, kStream);
    backend.Gemm(layer.attention_out, kStream);
    backend.Norm(layer.ffn_norm, kStream);
    backend.Gemm(layer.up, kStream);
    if (step.gated) backend.SiluGate(layer.gate, kStream);
    backend.Gemm(layer.down, kStream);
  }
  backend.Norm(step.final_norm, kStream);
  backend.Gemm(step.logits, kStream);
  backend.Argmax(step.argmax, kStream);
}

// Builds the arguments of a step; every array is the case's.
class StepMaker {
 public:
  StepMaker(CaseMemory& memory, const ModelConfig& model, int64_t rows, int64_t context)
      : memory_(memory), model_(model), rows_(static_cast<int32_t>(rows)), context_(context) {}

  absl::StatusOr<Step> Make(Cost* cost) {
    RETURN_IF_ERROR(MakeShared());
    Step step;
    step.rotary = model_.positions == PositionKind::kRotary;
    step.gated = model_.gated_ffn;
    const int32_t hidden = model_.hidden_size;
    ASSIGN_OR_RETURN(const std::byte* const table, Weight(int64_t{model_.vocabulary} * hidden));
    step.embed = {.out = hidden_,
                  .token_id = ids_,
                  .sampled = ids_,
                  .position = positions_,
                  .table = table,
                  .rows = rows_,
                  .columns = hidden};
    for (int32_t l = 0; l < model_.layers; ++l) {
      ASSIGN_OR_RETURN(Layer layer, MakeLayer(cost, static_cast<uint64_t>(l)));
      step.layers.push_back(layer);
    }
    step.final_norm = Norm(normed_, hidden_);
    ASSIGN_OR_RETURN(const std::byte* const output, Weight(int64_t{model_.vocabulary} * hidden));
    ASSIGN_OR_RETURN(std::byte* const logits,
                     memory_.Room(int64_t{rows_} * model_.vocabulary * sizeof(float)));
    step.logits = Product({.data = logits, .stride = model_.vocabulary}, normed_, output,
                          model_.vocabulary, hidden);
    step.logits.f32_out = true;
    ASSIGN_OR_RETURN(std::byte* const tokens, memory_.Room(rows_ * sizeof(int32_t)));
    step.argmax = {.token = reinterpret_cast<int32_t*>(tokens),
                   .logits = step.logits.out,
                   .target = sequence_,
                   .rows = rows_,
                   .columns = model_.vocabulary};
    *cost += GemmCost(step.logits, element_bytes_);
    return step;
  }

 private:
  absl::StatusOr<const std::byte*> Weight(int64_t count) {
    return memory_.Normal(count, memory_.backend().info().weight_dtype, Tier::kDevice, 0.02f);
  }
  absl::StatusOr<Activations> Rows(int64_t columns) {
    ASSIGN_OR_RETURN(std::byte* const data,
                     memory_.Normal(rows_ * columns, memory_.backend().info().activation_dtype));
    return Activations{.data = data, .stride = columns};
  }
  NormArgs Norm(const Activations& out, const Activations& in) const {
    return {.out = out,
            .in = in,
            .weight = norm_weight_,
            .bias = model_.norm == NormKind::kLayer ? norm_weight_ : nullptr,
            .rows = rows_,
            .columns = model_.hidden_size};
  }
  GemmArgs Product(const Activations& out, const Activations& in, const void* weight,
                   int64_t out_columns, int64_t in_columns) const {
    return {.out = out,
            .in = in,
            .weight = weight,
            .rows = rows_,
            .out_columns = static_cast<int32_t>(out_columns),
            .in_columns = static_cast<int32_t>(in_columns)};
  }
  Activations Columns(const Activations& rows, int64_t first) const {
    return {.data = static_cast<std::byte*>(rows.data) +
                    first * DTypeBytes(memory_.backend().info().activation_dtype),
            .stride = rows.stride};
  }

  // What all layers use in turn.
  absl::Status MakeShared() {
    element_bytes_ = static_cast<double>(DTypeBytes(memory_.backend().info().weight_dtype));
    const int64_t ffn = int64_t{model_.ffn_size} * (model_.gated_ffn ? 2 : 1);
    ASSIGN_OR_RETURN(hidden_, Rows(model_.hidden_size));
    ASSIGN_OR_RETURN(normed_, Rows(model_.hidden_size));
    ASSIGN_OR_RETURN(qkv_, Rows(model_.qkv_rows()));
    ASSIGN_OR_RETURN(attended_, Rows(int64_t{model_.query_heads} * model_.head_dim));
    ASSIGN_OR_RETURN(up_, Rows(ffn));
    ASSIGN_OR_RETURN(gated_, Rows(model_.ffn_size));
    ASSIGN_OR_RETURN(norm_weight_, memory_.Values(std::vector<float>(model_.hidden_size, 1.0f)));
    ASSIGN_OR_RETURN(frequency_, memory_.Values(std::vector<float>(model_.head_dim / 2, 0.1f)));
    ASSIGN_OR_RETURN(ids_, memory_.Values(std::vector<int32_t>(rows_, 1)));
    const auto place = static_cast<int32_t>(context_ - 1);
    ASSIGN_OR_RETURN(positions_, memory_.Values(std::vector<int32_t>(rows_, place)));
    std::vector<int32_t> sequence(rows_);
    for (int32_t b = 0; b < rows_; ++b) sequence[b] = b;
    ASSIGN_OR_RETURN(sequence_, memory_.Values(sequence));
    return absl::OkStatus();
  }

  absl::StatusOr<Layer> MakeLayer(Cost* cost, uint64_t seed) {
    const int64_t d = model_.head_dim;
    const int64_t hidden = model_.hidden_size;
    const int64_t attended = model_.query_heads * d;
    const int64_t up_columns = int64_t{model_.ffn_size} * (model_.gated_ffn ? 2 : 1);
    const Activations key = Columns(qkv_, attended);
    const Activations value = Columns(qkv_, attended + model_.kv_heads * d);
    Layer layer;
    layer.attention_norm = Norm(normed_, hidden_);
    ASSIGN_OR_RETURN(const std::byte* const qkv, Weight(model_.qkv_rows() * hidden));
    layer.qkv = Product(qkv_, normed_, qkv, model_.qkv_rows(), hidden);
    layer.rotary_query = {.data = qkv_,
                          .position = positions_,
                          .inverse_frequency = frequency_,
                          .rows = rows_,
                          .heads = model_.query_heads,
                          .head_dim = model_.head_dim};
    layer.rotary_key = layer.rotary_query;
    layer.rotary_key.data = key;
    layer.rotary_key.heads = model_.kv_heads;
    ASSIGN_OR_RETURN(const BenchView view,
                     MakeBenchView(memory_, rows_, context_ - 1, 1, model_.kv_heads, d, 16,
                                   Tier::kDevice, true, seed));
    layer.attention.out = attended_;
    layer.attention.query = qkv_;
    layer.attention.current_key = key;
    layer.attention.current_value = value;
    layer.attention.view = view.view;
    layer.attention.plan =
        memory_.backend().PlanAttention(rows_, static_cast<int32_t>(context_), model_.kv_heads);
    layer.attention.rows = rows_;
    layer.attention.query_heads = model_.query_heads;
    layer.attention.kv_heads = model_.kv_heads;
    layer.attention.head_dim = model_.head_dim;
    layer.attention.scale = 1.0f / std::sqrt(static_cast<float>(d));
    layer.append = {.target = view.view,
                    .key = key,
                    .value = value,
                    .table_row = sequence_,
                    .slot = positions_,
                    .rows = rows_,
                    .kv_heads = model_.kv_heads,
                    .head_dim = model_.head_dim};
    ASSIGN_OR_RETURN(const std::byte* const out, Weight(hidden * attended));
    layer.attention_out = Product(hidden_, attended_, out, hidden, attended);
    layer.attention_out.accumulate = true;
    layer.ffn_norm = Norm(normed_, hidden_);
    ASSIGN_OR_RETURN(const std::byte* const up, Weight(up_columns * hidden));
    layer.up = Product(up_, normed_, up, up_columns, hidden);
    layer.up.relu = !model_.gated_ffn;
    layer.gate = {.out = gated_, .in = up_, .rows = rows_, .columns = model_.ffn_size};
    ASSIGN_OR_RETURN(const std::byte* const down, Weight(hidden * model_.ffn_size));
    layer.down = Product(hidden_, model_.gated_ffn ? gated_ : up_, down, hidden, model_.ffn_size);
    layer.down.accumulate = true;
    // Activations stay in the caches: what must be moved is weights, keys and values.
    for (const GemmArgs* product : {&layer.qkv, &layer.attention_out, &layer.up, &layer.down}) {
      Cost of_product = GemmCost(*product, element_bytes_);
      of_product.device_bytes =
          element_bytes_ * static_cast<double>(product->out_columns) * product->in_columns;
      *cost += of_product;
    }
    *cost += DecodeAttentionCost(layer.attention, int64_t{rows_} * model_.kv_heads * (context_ - 1),
                                 element_bytes_, false);
    return layer;
  }

  CaseMemory& memory_;
  const ModelConfig& model_;
  const int32_t rows_;
  const int64_t context_;
  double element_bytes_ = 0;
  Activations hidden_, normed_, qkv_, attended_, up_, gated_;
  const float* norm_weight_ = nullptr;
  const float* frequency_ = nullptr;
  const int32_t* ids_ = nullptr;
  const int32_t* positions_ = nullptr;
  const int32_t* sequence_ = nullptr;
};

}  // namespace

absl::StatusOr<PreparedCase> PrepareStep(CaseMemory& memory, const ModelConfig& model, int64_t rows,
                                         int64_t context) {
  PreparedCase prepared;
  ASSIGN_OR_RETURN(const Step step, StepMaker(memory, model, rows, context).Make(&prepared.cost));
  RETURN_IF_ERROR(memory.backend().WaitAll());
  Backend& backend = memory.backend();
  prepared.enqueue = [&backend, step](int) { Enqueue(backend, step); };
  return prepared;
}

}  // namespace kvsweep
