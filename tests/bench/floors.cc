#include "tests/bench/floors.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace kvsweep {
namespace {

// Matrices of one layer, in elements.
double LayerWeights(const ModelConfig& model) {
  const double hidden = model.hidden_size;
  const double attended = double{1} * model.query_heads * model.head_dim;
  const double ffn = (model.gated_ffn ? 3.0 : 2.0) * model.ffn_size * hidden;
  return static_cast<double>(model.qkv_rows()) * hidden + attended * hidden + ffn;
}

double OutputWeights(const ModelConfig& model) {
  double weights = double{1} * model.vocabulary * model.embedding_size;
  if (model.projects_embeddings()) weights += 2.0 * model.embedding_size * model.hidden_size;
  return weights;
}

// Products and attention of one decode step; `read` entries of each row, layer and head.
double DecodeOperations(const ModelConfig& model, double rows, double read) {
  const double attention = 4.0 * model.query_heads * model.head_dim * read * model.layers;
  return rows * (2.0 * StepWeights(model) + attention);
}

double Budget(double ratio, const Arm& arm, const StepShape& shape) {
  // The same for every kind of arm: twice the floor of half of it.
  const auto base = [&]() -> double {
    const BudgetBase kind =
        arm.strategy() == "h2o" ? arm.h2o().budget_base() : arm.infinigen().budget_base();
    const double fixed =
        arm.strategy() == "h2o" ? arm.h2o().budget_tokens() : arm.infinigen().budget_tokens();
    return kind == BUDGET_BASE_FIXED ? fixed : shape.tokens;
  };
  return 2.0 * std::floor(ratio * base() / 2.0 + 1e-9);
}

double H2oBudget(const Arm& arm, const StepShape& shape) {
  const H2o& h2o = arm.h2o();
  if (h2o.has_heavy_size() || h2o.has_recent_size()) return h2o.heavy_size() + h2o.recent_size();
  return Budget(h2o.heavy_ratio() + h2o.recent_ratio(), arm, shape);
}

void AddH2o(const ModelConfig& model, const Arm& arm, const StepShape& shape, Cost* cost) {
  const auto rows = static_cast<double>(shape.rows);
  const double slots = std::min(shape.tokens, H2oBudget(arm, shape));
  const double kv = rows * slots * TokenElements(model) * shape.kv_bytes;
  (arm.h2o().tier() == H2o::TIER_HOST ? cost->link_bytes : cost->device_bytes) += kv;
  // Accumulated scores are read and written, emitted probabilities written and read.
  cost->device_bytes += rows * slots * model.layers * 8.0 * (model.kv_heads + model.query_heads);
  cost->operations += DecodeOperations(model, rows, slots);
}

void AddInfinigen(const ModelConfig& model, const Arm& arm, const StepShape& shape, Cost* cost) {
  const Infinigen& infinigen = arm.infinigen();
  const auto rows = static_cast<double>(shape.rows);
  const double of_layer = TokenElements(model) / model.layers * shape.kv_bytes;
  const bool all = infinigen.fetch() == Infinigen::FETCH_ALL;
  const double full = all ? model.layers : infinigen.n_full_layers();
  const double beyond = model.layers - full;
  const double full_bytes = rows * full * shape.tokens * of_layer;
  const double fetched_bytes = rows * beyond * shape.fetched_tokens * of_layer;
  if (!infinigen.full_layers_on_device()) cost->link_bytes += full_bytes;
  cost->link_bytes += fetched_bytes;
  cost->device_bytes += full_bytes + fetched_bytes;
  cost->operations += DecodeOperations(
      model, rows,
      (full * shape.tokens + beyond * shape.fetched_tokens) / static_cast<double>(model.layers));
  if (all) return;
  const double wanted = std::floor(infinigen.partial_weight_ratio() * model.head_dim + 1e-9);
  const double partial = std::min<double>(model.head_dim, std::ceil(wanted / 8.0) * 8.0);
  const double queries = double{1} * model.query_heads * model.hidden_size;
  const bool rotary = model.positions == PositionKind::kRotary;
  const bool paired = infinigen.rope_speculation() == Infinigen::ROPE_SPECULATION_PAIRED;
  cost->device_bytes +=
      beyond * queries * (rotary && !paired ? model.head_dim : partial) * shape.element_bytes;
  const double heads = rows * shape.tokens * beyond * model.kv_heads;
  cost->device_bytes += heads * partial * shape.kv_bytes;  // the scan of the partial keys
  cost->device_bytes += heads * 3.0 * sizeof(float);       // scores: one write, two reads
}

}  // namespace

double StepWeights(const ModelConfig& model) {
  return LayerWeights(model) * model.layers + OutputWeights(model);
}

double TokenElements(const ModelConfig& model) {
  return 2.0 * model.layers * model.kv_heads * model.head_dim;
}

Cost DecodeFloor(const ModelConfig& model, const Arm& arm, const StepShape& shape) {
  Cost cost;
  cost.device_bytes = StepWeights(model) * shape.element_bytes;
  if (arm.strategy() == "h2o") {
    AddH2o(model, arm, shape, &cost);
  } else if (arm.strategy() == "infinigen") {
    AddInfinigen(model, arm, shape, &cost);
  } else {
    KVSWEEP_CHECK_EQ(arm.strategy(), "paged");
    const auto rows = static_cast<double>(shape.rows);
    cost.device_bytes += rows * shape.tokens * TokenElements(model) * shape.kv_bytes;
    cost.operations = DecodeOperations(model, rows, shape.tokens);
  }
  return cost;
}

Cost PromptFloor(const ModelConfig& model, int64_t rows, int64_t input, double element_bytes) {
  const auto prompts = static_cast<double>(rows);
  const auto tokens = static_cast<double>(input);
  // Causal: a token attends to half of the prompt on average.
  const double attention =
      4.0 * model.query_heads * model.head_dim * model.layers * tokens * (tokens + 1) / 2.0;
  Cost cost;
  cost.operations = prompts * (2.0 * LayerWeights(model) * model.layers * tokens + attention +
                               2.0 * OutputWeights(model));
  cost.device_bytes = StepWeights(model) * element_bytes;
  return cost;
}

double FloorNs(const Cost& cost, const DeviceProfile& limits, std::string* bound) {
  const double device = cost.device_bytes / limits.device_bytes_per_s * 1e9;
  const double link = cost.link_bytes / limits.link_bytes_per_s * 1e9;
  const double operations = cost.operations / limits.operations_per_s * 1e9;
  const double floor = std::max({device, link, operations});
  if (bound != nullptr) *bound = floor == device ? "read" : floor == link ? "link" : "matrix";
  return floor;
}

double BurstFloorNs(const ModelConfig& model, int64_t rows, int64_t input, int64_t output,
                    double element_bytes, const DeviceProfile& limits) {
  double floor = FloorNs(PromptFloor(model, rows, input, element_bytes), limits, nullptr);
  Arm paged;
  paged.set_strategy("paged");
  for (int64_t step = 1; step < output; ++step) {
    const StepShape shape{.rows = rows,
                          .tokens = static_cast<double>(input + step - 1),
                          .element_bytes = element_bytes,
                          .kv_bytes = element_bytes};
    floor += FloorNs(DecodeFloor(model, paged, shape), limits, nullptr);
  }
  return floor;
}

HiddenTransfer HiddenShare(double step_ns, double compute_ns, double link_ns) {
  const double exposed = std::max(0.0, step_ns - compute_ns);
  const double hidden = std::max(0.0, link_ns - exposed);
  const double possible = std::min(link_ns, compute_ns);
  return {.of_transfer = hidden / link_ns, .of_possible = hidden / possible};
}

}  // namespace kvsweep
