#include "worker/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/engine/calibration.h"
#include "worker/strategies/catalogue.h"
#include "worker/strategies/memory_model.h"

namespace kvsweep {

// --------------------------------------------------------------------------------------------------
// model

LoadedModel::LoadedModel(Backend* backend, const ModelConfig& config)
    : backend_(backend),
      config_(config),
      skewing_cache_(std::make_unique<SkewingCache>()),
      prepared_weights_(std::make_unique<PreparedWeights>()) {}

LoadedModel::~LoadedModel() = default;

absl::StatusOr<std::unique_ptr<LoadedModel>> LoadedModel::Load(Backend* backend,
                                                               const std::string& folder) {
  ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(folder));
  std::unique_ptr<LoadedModel> model(new LoadedModel(backend, config));
  ASSIGN_OR_RETURN(model->weights_, LoadWeights(folder, config, backend));
  RETURN_IF_ERROR(model->MakeTables());
  return model;
}

absl::StatusOr<std::unique_ptr<LoadedModel>> LoadedModel::Random(Backend* backend,
                                                                 const ModelConfig& config,
                                                                 uint64_t seed) {
  std::unique_ptr<LoadedModel> model(new LoadedModel(backend, config));
  ASSIGN_OR_RETURN(model->weights_, RandomWeights(config, seed, backend));
  RETURN_IF_ERROR(model->MakeTables());
  return model;
}

absl::Status LoadedModel::MakeTables() {
  if (config_.positions != PositionKind::kRotary) return absl::OkStatus();
  const std::vector<float> frequencies = InverseFrequencies(config_);
  const uint64_t bytes = frequencies.size() * sizeof(float);
  ASSIGN_OR_RETURN(std::byte * memory, backend_->Allocate(Tier::kDevice, bytes));
  inverse_frequency_ = BackendMemory(memory, BackendFree{backend_});
  backend_->Copy(memory, frequencies.data(), bytes, Stream::kCompute);
  return backend_->WaitAll();
}

ModelShape LoadedModel::shape() const {
  ModelShape shape = config_.shape();
  shape.inverse_frequency = reinterpret_cast<const float*>(inverse_frequency_.get());
  return shape;
}

// -----------------------------------------------------------------------------------------------
// building

namespace {

absl::Status CheckBudget(absl::string_view field, uint64_t budget, uint64_t taken) {
  if (taken <= budget) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat(field, ": the strategy's structures take more than its budget: asked ", taken,
                   ", available ", budget));
}

std::vector<QueryWeights> QueryWeightsOf(const ModelWeights& weights) {
  std::vector<QueryWeights> all;
  for (const LayerWeights& layer : weights.layers) {
    // Queries are the first rows of the fused projection.
    all.push_back({layer.qkv.weight.data, layer.qkv.bias});
  }
  return all;
}

}  // namespace

absl::StatusOr<std::unique_ptr<InferenceEngine>> InferenceEngine::Create(
    Backend* backend, const LoadedModel* model, const Arm& arm, const EngineOptions& options,
    std::span<const int32_t> calibration) {
  return CreateWith(backend, model, options, [&](const StrategyContext& given) {
    StrategyContext context = given;
    context.calibrate = [backend, model, calibration](int32_t tokens) {
      const size_t count = std::min(calibration.size(), static_cast<size_t>(tokens));
      return CalibrateSkewing(backend, model, calibration.first(count));
    };
    return MakeStrategy(arm, context);
  });
}

absl::StatusOr<std::unique_ptr<InferenceEngine>> InferenceEngine::CreateWith(
    Backend* backend, const LoadedModel* model, const EngineOptions& options,
    const StrategyFactory& factory) {
  const ModelConfig& config = model->config();
  if (options.max_context > config.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "requests of up to ", options.max_context, " tokens exceed the model's ",
        config.max_positions, " positions",
        config.sliding_window.has_value() ? " (its sliding window: past it attention is no longer "
                                            "the full one that the strategies manage)"
                                          : "",
        "; lower load.lengths.max_total or quality.context"));
  }
  std::unique_ptr<InferenceEngine> engine(new InferenceEngine(backend, model, options));
  RETURN_IF_ERROR(engine->Build(factory));
  return engine;
}

InferenceEngine::InferenceEngine(Backend* backend, const LoadedModel* model,
                                 const EngineOptions& options)
    : backend_(backend),
      model_(model),
      options_(options),
      max_decode_rows_(PaddedDecodeRows(options.max_sequences)),
      max_rows_(std::max({options.max_batched_tokens, max_decode_rows_,
                          options.chunked_prefill ? 0 : options.max_context})),
      max_logit_rows_(options.logits == LogitsMode::kAll
                          ? max_rows_
                          : max_decode_rows_ + options.max_sequences) {}

InferenceEngine::~InferenceEngine() {
  // Left behind by an error, which somebody has been told.
  if (steps_under_way() > 0) backend_->WaitAll().IgnoreError();
  DropGraphs();
  for (std::byte* memory : memory_) backend_->Free(memory);
}

absl::Status InferenceEngine::Build(const StrategyFactory& factory) {
  step_state_ = std::make_unique<StepState>(backend_);
  arrays_.token_id = step_state_->Add(max_rows_);
  arrays_.position = step_state_->Add(max_rows_);
  if (config().projects_embeddings()) arrays_.position_row = step_state_->Add(max_rows_);
  arrays_.row_active = step_state_->Add(max_decode_rows_);
  arrays_.logit_row = step_state_->Add(max_logit_rows_);
  arrays_.sample_target = step_state_->Add(max_logit_rows_);
  arrays_.sample_rank = step_state_->Add(max_logit_rows_);
  for (Flight& flight : flights_) {
    flight.begun = backend_->CreateEvent();
    flight.done = backend_->CreateEvent();
  }
  StrategyContext context;
  static_cast<StrategySizes&>(context) = {.shape = model_->shape(),
                                          .kv_dtype = options_.kv_dtype,
                                          .activation_dtype = backend_->info().activation_dtype,
                                          .weight_dtype = backend_->info().weight_dtype,
                                          .device_bytes = options_.device_bytes,
                                          .host_bytes = options_.host_bytes,
                                          .max_sequences = options_.max_sequences,
                                          .max_context = options_.max_context,
                                          .max_rows = max_rows_,
                                          .max_decode_rows = max_decode_rows_};
  context.backend = backend_;
  context.step_state = step_state_.get();
  context.query_weights = QueryWeightsOf(model_->weights());
  context.prepared_weights = &model_->prepared_weights();
  const uint64_t arrays = step_state_->device_bytes();
  const uint64_t device = backend_->allocated_bytes(Tier::kDevice);
  const uint64_t host = backend_->allocated_bytes(Tier::kHost);
  ASSIGN_OR_RETURN(strategy_, factory(context));
  manager().ReadTokensFrom([this](RequestId request) { return Tokens(request); });
  // Whatever the strategy computed, what it took is what counts.
  RETURN_IF_ERROR(CheckBudget(
      "kv.device_bytes", options_.device_bytes,
      backend_->allocated_bytes(Tier::kDevice) - device + step_state_->device_bytes() - arrays));
  RETURN_IF_ERROR(CheckBudget("kv.host_bytes", options_.host_bytes,
                              backend_->allocated_bytes(Tier::kHost) - host));
  RETURN_IF_ERROR(step_state_->Build());
  RETURN_IF_ERROR(AllocateBuffers());
  modelled_ns_ = backend_->modelled_ns();
  link_before_ = {backend_->link_bytes_to_device(), backend_->link_bytes_to_host()};
  return absl::OkStatus();
}

absl::StatusOr<Activations> InferenceEngine::AllocateRows(int64_t rows, int64_t columns,
                                                          DType dtype) {
  const int64_t bytes = rows * columns * DTypeBytes(dtype);
  ASSIGN_OR_RETURN(
      std::byte * memory,
      Annotate(backend_->Allocate(Tier::kDevice, static_cast<uint64_t>(bytes)), "activations"));
  memory_.push_back(memory);
  return Activations{memory, columns};
}

absl::Status InferenceEngine::AllocateBuffers() {
  const ModelConfig& config = model_->config();
  const DType dtype = backend_->info().activation_dtype;
  const int64_t ffn_in = int64_t{config.ffn_size} * (config.gated_ffn ? 2 : 1);
  if (config.projects_embeddings()) {
    ASSIGN_OR_RETURN(buffers_.embedded, AllocateRows(max_rows_, config.embedding_size, dtype));
    ASSIGN_OR_RETURN(buffers_.projected,
                     AllocateRows(max_logit_rows_, config.embedding_size, dtype));
  }
  ASSIGN_OR_RETURN(buffers_.hidden, AllocateRows(max_rows_, config.hidden_size, dtype));
  for (int parity = 0; parity < 2; ++parity) {
    ASSIGN_OR_RETURN(buffers_.normed[parity], AllocateRows(max_rows_, config.hidden_size, dtype));
    ASSIGN_OR_RETURN(buffers_.qkv[parity], AllocateRows(max_rows_, config.qkv_rows(), dtype));
  }
  ASSIGN_OR_RETURN(buffers_.attended,
                   AllocateRows(max_rows_, int64_t{config.query_heads} * config.head_dim, dtype));
  ASSIGN_OR_RETURN(buffers_.ffn_normed, AllocateRows(max_rows_, config.hidden_size, dtype));
  ASSIGN_OR_RETURN(buffers_.ffn_in, AllocateRows(max_rows_, ffn_in, dtype));
  buffers_.ffn_gated = buffers_.ffn_in;
  if (config.gated_ffn) {
    ASSIGN_OR_RETURN(buffers_.ffn_gated, AllocateRows(max_rows_, config.ffn_size, dtype));
  }
  ASSIGN_OR_RETURN(buffers_.last, AllocateRows(max_logit_rows_, config.hidden_size, dtype));
  ASSIGN_OR_RETURN(buffers_.last_normed, AllocateRows(max_logit_rows_, config.hidden_size, dtype));
  ASSIGN_OR_RETURN(buffers_.logits, AllocateRows(max_logit_rows_, config.vocabulary, DType::kF32));

  auto allocate = [&](Tier tier, int64_t count, auto** pointer) -> absl::Status {
    ASSIGN_OR_RETURN(std::byte * memory,
                     backend_->Allocate(tier, static_cast<uint64_t>(count) * sizeof(**pointer)));
    memory_.push_back(memory);
    *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(memory);
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(allocate(Tier::kDevice, options_.max_sequences, &buffers_.sampled));
  RETURN_IF_ERROR(allocate(Tier::kHost, options_.max_sequences, &buffers_.sampled_host));
  if (options_.logits != LogitsMode::kNone) {
    RETURN_IF_ERROR(
        allocate(Tier::kHost, int64_t{max_logit_rows_} * config.vocabulary, &buffers_.logits_host));
  }
  return absl::OkStatus();
}

// ----------------------------------------------------------------------------------------------
// sequences

void InferenceEngine::AddSequence(RequestId request, std::span<const int32_t> tokens,
                                  int32_t prompt_tokens, int32_t rank) {
  KVSWEEP_CHECK_LE(prompt_tokens, static_cast<int32_t>(tokens.size()));
  const bool added =
      sequences_
          .emplace(request, Sequence{.tokens = std::vector<int32_t>(tokens.begin(), tokens.end()),
                                     .prompt_tokens = prompt_tokens,
                                     .rank = rank})
          .second;
  KVSWEEP_CHECK(added) << "request " << request;
}

std::span<const int32_t> InferenceEngine::Tokens(RequestId request) const {
  return sequences_.at(request).tokens;
}

BatcherOptions InferenceEngine::batcher_options() const {
  return {.max_sequences = options_.max_sequences,
          .max_batched_tokens = options_.max_batched_tokens,
          .chunk_alignment = chunk_alignment(),
          .chunked_prefill = options_.chunked_prefill,
          .budget = {options_.device_bytes, options_.host_bytes}};
}

void InferenceEngine::RemoveSequence(RequestId request) { sequences_.erase(request); }

// ---------------------------------------------------------------------------------------------------
// step

namespace {

uint64_t SampledBytes(const EngineOptions& options) {
  return sizeof(int32_t) * static_cast<uint64_t>(options.max_sequences);
}

uint64_t LogitBytes(int32_t rows, const ModelConfig& config) {
  return sizeof(float) * static_cast<uint64_t>(rows) * static_cast<uint64_t>(config.vocabulary);
}

}  // namespace

StepView InferenceEngine::MakeView(const StepPlan& plan) const {
  StepView view;
  view.decode = plan.decode;
  view.prefill = plan.prefill;
  view.samples = plan.samples;
  view.captured = options_.graphs && plan.prefill.empty() && strategy_->capturable();
  const auto decode = static_cast<int32_t>(plan.decode.size());
  view.decode_rows = view.captured ? PaddedDecodeRows(decode) : decode;
  view.rows = view.decode_rows;
  for (const Segment& segment : plan.prefill) view.rows += segment.rows;
  view.parity = static_cast<int32_t>(begun_ % kMostStepsUnderWay);
  view.position = step_state_->Device(arrays_.position);
  view.row_active = step_state_->Device(arrays_.row_active);
  view.graph_key = strategy_->GraphKey(view);
  KVSWEEP_CHECK_LE(view.rows, max_rows_);
  return view;
}

int32_t InferenceEngine::LogitRows(const StepView& view) const {
  if (options_.logits == LogitsMode::kAll) return view.rows;
  return view.decode_rows + static_cast<int32_t>(view.prefill.size() + view.samples.size());
}

void InferenceEngine::FillStepState(const StepView& view) {
  std::span<int32_t> token_id = step_state_->Host(arrays_.token_id);
  std::span<int32_t> position = step_state_->Host(arrays_.position);
  std::span<int32_t> row_active = step_state_->Host(arrays_.row_active);
  std::ranges::fill(token_id.first(static_cast<size_t>(view.rows)), 0);
  std::ranges::fill(position.first(static_cast<size_t>(view.rows)), 0);
  std::ranges::fill(row_active, 0);
  for (const Segment& segment : view.decode) {
    const auto row = static_cast<size_t>(segment.first_row);
    token_id[row] = TokenToFeed(segment);
    position[row] = segment.start_position;
    row_active[row] = 1;
  }
  for (const Segment& segment : view.prefill) {
    const Sequence& sequence = sequences_.at(segment.request);
    for (int32_t i = 0; i < segment.rows; ++i) {
      const auto row = static_cast<size_t>(segment.first_row + i);
      token_id[row] = sequence.tokens.at(static_cast<size_t>(segment.start_position + i));
      position[row] = segment.start_position + i;
    }
  }
  if (config().projects_embeddings()) {
    std::ranges::transform(position, step_state_->Host(arrays_.position_row).begin(),
                           [&](int32_t at) { return at + config().position_offset; });
  }
  FillLogitRows(view);
}

// What the step under way samples the host has not seen: it is taken from the sequence's slot.
int32_t InferenceEngine::TokenToFeed(const Segment& decode) const {
  const std::vector<int32_t>& tokens = sequences_.at(decode.request).tokens;
  const auto at = static_cast<size_t>(decode.start_position);
  if (at < tokens.size()) return tokens[at];
  KVSWEEP_CHECK(at == tokens.size() && steps_under_way() == 1)
      << "request " << decode.request << " has " << tokens.size() << " tokens, token " << at
      << " is wanted";
  return -1 - decode.slot;
}

void InferenceEngine::FillLogitRows(const StepView& view) {
  std::span<int32_t> logit_row = step_state_->Host(arrays_.logit_row);
  std::span<int32_t> target = step_state_->Host(arrays_.sample_target);
  const auto rows = static_cast<size_t>(LogitRows(view));
  std::ranges::fill(logit_row.first(rows), -1);
  std::ranges::fill(target.first(rows), -1);
  std::ranges::fill(step_state_->Host(arrays_.sample_rank).first(rows), 0);
  const bool all = options_.logits == LogitsMode::kAll;
  for (const Segment& segment : view.decode) {
    logit_row[static_cast<size_t>(segment.first_row)] = segment.first_row;
    target[static_cast<size_t>(segment.first_row)] = segment.slot;
  }
  for (size_t i = 0; i < view.prefill.size(); ++i) {
    const Segment& segment = view.prefill[i];
    const int32_t last = segment.first_row + segment.rows - 1;
    if (all) {
      for (int32_t row = segment.first_row; row <= last; ++row) {
        logit_row[static_cast<size_t>(row)] = row;
      }
    }
    const size_t index =
        all ? static_cast<size_t>(last) : static_cast<size_t>(view.decode_rows) + i;
    logit_row[index] = last;
    target[index] = segment.last_chunk ? segment.slot : -1;
    const Sequence& sequence = sequences_.at(segment.request);
    if (segment.start_position + segment.rows == sequence.prompt_tokens) {
      step_state_->Host(arrays_.sample_rank)[index] = sequence.rank;
    }
  }
  FillSamples(view);
}

// Further samples of a prompt read its last row once more.
void InferenceEngine::FillSamples(const StepView& view) {
  KVSWEEP_CHECK(view.samples.empty() || options_.logits != LogitsMode::kAll);
  for (size_t i = 0; i < view.samples.size(); ++i) {
    const SampleStart& sample = view.samples[i];
    const Segment& prompt = view.prefill[static_cast<size_t>(sample.prefill)];
    const size_t index = static_cast<size_t>(view.decode_rows) + view.prefill.size() + i;
    step_state_->Host(arrays_.logit_row)[index] = prompt.first_row + prompt.rows - 1;
    step_state_->Host(arrays_.sample_target)[index] = sample.slot;
    step_state_->Host(arrays_.sample_rank)[index] = sequences_.at(sample.request).rank;
  }
}

absl::Status InferenceEngine::Begin(const StepPlan& plan) {
  KVSWEEP_CHECK(!plan.empty());
  KVSWEEP_CHECK_LT(steps_under_way(), strategy_->NeedsHost() ? 1 : kMostStepsUnderWay);
  EnqueueReadback();
  Flight& flight = FlightAt(begun_);
  flight.plan = plan;
  flight.view = MakeView(flight.plan);
  flight.read_back = false;
  const StepView& view = flight.view;
  backend_->Enter(StepPart::kOther);
  RETURN_IF_ERROR(step_state_->Begin());
  FillStepState(view);
  strategy_->BeginStep(view);
  backend_->RecordEvent(flight.begun, Stream::kCompute);
  strategy_->MoveMemory(view);
  step_state_->Commit();
  control_.to_device += step_state_->device_bytes();
  if (view.captured) {
    RETURN_IF_ERROR(LaunchCaptured(view));
  } else {
    EnqueueForward(view);
  }
  backend_->Enter(StepPart::kNone);
  ++begun_;
  return absl::OkStatus();
}

// What the host reads of a step has one place, so it is copied there once the host has read what
// the step before left. Copies behind a step stand outside of its graph for that reason.
void InferenceEngine::EnqueueReadback() {
  if (steps_under_way() == 0) return;
  Flight& flight = FlightAt(begun_ - 1);
  if (std::exchange(flight.read_back, true)) return;
  KVSWEEP_CHECK_EQ(steps_under_way(), 1);
  strategy_->ReadBack(flight.view);
  backend_->Copy(buffers_.sampled_host, buffers_.sampled, SampledBytes(options_), Stream::kCompute);
  if (options_.logits != LogitsMode::kNone) {
    backend_->Copy(buffers_.logits_host, buffers_.logits.data,
                   LogitBytes(LogitRows(flight.view), config()), Stream::kCompute);
  }
  // Only the step's own work: copies that later steps need go on.
  backend_->RecordEvent(flight.done, Stream::kCompute);
  control_.to_host += ReadbackBytes(flight.view);
}

absl::StatusOr<StepResult> InferenceEngine::Finish() {
  KVSWEEP_CHECK_GE(steps_under_way(), 1);
  if (steps_under_way() == 1) EnqueueReadback();
  const Flight& flight = FlightAt(finished_);
  RETURN_IF_ERROR(backend_->Wait(flight.done));
  ++finished_;
  strategy_->StepDone();

  ReadSampled(flight.plan);
  StepResult result{.plan = &flight.plan, .sampled = sampled_, .captured = flight.view.captured};
  if (options_.logits != LogitsMode::kNone) {
    result.logits = {buffers_.logits_host, static_cast<size_t>(LogitRows(flight.view)) *
                                               static_cast<size_t>(config().vocabulary)};
  }
  if (finished_ > 1) {
    result.gap_ns = backend_->ElapsedNs(FlightAt(finished_ - 2).done, flight.begun);
  }
  result.step_ns = backend_->ElapsedNs(flight.begun, flight.done);
  const int64_t modelled_ns = backend_->modelled_ns();
  result.modelled_ns = modelled_ns - modelled_ns_;
  modelled_ns_ = modelled_ns;
  return result;
}

absl::StatusOr<StepResult> InferenceEngine::Execute(const StepPlan& plan) {
  KVSWEEP_CHECK_EQ(steps_under_way(), 0);
  RETURN_IF_ERROR(Begin(plan));
  return Finish();
}

absl::StatusOr<LinkBytes> InferenceEngine::CacheTraffic() {
  KVSWEEP_CHECK_EQ(steps_under_way(), 0);
  RETURN_IF_ERROR(backend_->WaitAll());
  modelled_ns_ = backend_->modelled_ns();
  return LinkBytes{backend_->link_bytes_to_device() - link_before_.to_device - control_.to_device,
                   backend_->link_bytes_to_host() - link_before_.to_host - control_.to_host};
}

void InferenceEngine::DropGraphs() {
  for (const auto& [key, graph] : graphs_) backend_->DestroyGraph(graph);
  graphs_.clear();
}

absl::Status InferenceEngine::LaunchCaptured(const StepView& view) {
  ASSIGN_OR_RETURN(const Graph graph, CapturedGraph(view));
  backend_->Launch(graph);
  return absl::OkStatus();
}

absl::StatusOr<Graph> InferenceEngine::CapturedGraph(const StepView& view) {
  const std::pair<int32_t, int32_t> key{view.decode_rows, view.graph_key};
  const auto found = graphs_.find(key);
  if (found != graphs_.end()) return found->second;
  backend_->BeginCapture();
  EnqueueForward(view);
  ASSIGN_OR_RETURN(const Graph graph, backend_->EndCapture());
  graphs_.emplace(key, graph);
  return graph;
}

absl::Status InferenceEngine::CaptureSteps() {
  KVSWEEP_CHECK_EQ(steps_under_way(), 0);
  if (!options_.graphs || !strategy_->capturable()) return absl::OkStatus();
  for (int32_t rows = 1; rows <= max_decode_rows_; rows = PaddedDecodeRows(rows + 1)) {
    for (const int32_t key : strategy_->GraphKeys(rows)) {
      // A step of padding alone, which is never launched; the strategy plans what it captures.
      StepView view = MakeView(StepPlan());
      view.decode_rows = view.rows = rows;
      view.captured = true;
      view.graph_key = key;
      RETURN_IF_ERROR(step_state_->Begin());
      FillStepState(view);
      strategy_->BeginStep(view);
      step_state_->Commit();
      control_.to_device += step_state_->device_bytes();
      RETURN_IF_ERROR(CapturedGraph(view).status());
    }
  }
  return CacheTraffic().status();
}

void InferenceEngine::ReadSampled(const StepPlan& plan) {
  sampled_.clear();
  auto read = [&](const Segment& segment, bool produces) {
    const int32_t token = buffers_.sampled_host[segment.slot];
    sampled_.push_back(token);
    std::vector<int32_t>& tokens = sequences_.at(segment.request).tokens;
    const auto next = static_cast<size_t>(segment.start_position + segment.rows);
    if (produces && tokens.size() == next) tokens.push_back(token);
  };
  for (const Segment& segment : plan.decode) read(segment, true);
  for (const Segment& segment : plan.prefill) read(segment, segment.last_chunk);
  for (const SampleStart& sample : plan.samples) {
    std::vector<int32_t>& tokens = sequences_.at(sample.request).tokens;
    tokens.push_back(buffers_.sampled_host[sample.slot]);
  }
}

// ------------------------------------------------------------------------------------------------
// forward

namespace {

NormArgs NormOf(const NormWeights& weights, const ModelConfig& config, const Activations& out,
                const Activations& in, int32_t rows) {
  return {.out = out,
          .in = in,
          .weight = weights.weight,
          .bias = weights.bias,
          .epsilon = static_cast<float>(config.norm_epsilon),
          .rows = rows,
          .columns = config.hidden_size};
}

GemmArgs ProductOf(const LinearWeights& weights, const Activations& out, const Activations& in,
                   int32_t rows) {
  return {.out = out,
          .in = in,
          .weight = weights.weight.data,
          .bias = weights.bias,
          .rows = rows,
          .out_columns = static_cast<int32_t>(weights.weight.rows),
          .in_columns = static_cast<int32_t>(weights.weight.columns)};
}

}  // namespace

// Positions are added as wide as the layers are. So where embeddings are narrower they come first,
// and the projection is added to them.
void InferenceEngine::EnqueueEmbedding(const StepView& view) {
  const ModelConfig& config = model_->config();
  const ModelWeights& weights = model_->weights();
  const bool projects = config.projects_embeddings();
  backend_->Embed({.out = projects ? buffers_.embedded : buffers_.hidden,
                   .token_id = step_state_->Device(arrays_.token_id),
                   .sampled = buffers_.sampled,
                   .position = view.position,
                   .table = weights.token_embedding.data,
                   .position_table = projects ? nullptr : weights.position_embedding.data,
                   .position_offset = config.position_offset,
                   .rows = view.rows,
                   .columns = config.embedding_size},
                  Stream::kCompute);
  if (!projects) return;
  backend_->Embed({.out = buffers_.hidden,
                   .token_id = step_state_->Device(arrays_.position_row),
                   .table = weights.position_embedding.data,
                   .rows = view.rows,
                   .columns = config.hidden_size},
                  Stream::kCompute);
  GemmArgs project = ProductOf(weights.project_in, buffers_.hidden, buffers_.embedded, view.rows);
  project.accumulate = true;
  backend_->Gemm(project, Stream::kCompute);
}

void InferenceEngine::EnqueueForward(const StepView& view) {
  const ModelConfig& config = model_->config();
  EnqueueEmbedding(view);
  for (int32_t layer = 0; layer < config.layers; ++layer) EnqueueLayer(view, layer);
  backend_->Enter(StepPart::kOther);
  strategy_->EndStep(view);
  backend_->Enter(StepPart::kSampling);
  EnqueueLogits(view);
}

void InferenceEngine::EnqueueLayer(const StepView& view, int32_t layer) {
  const ModelConfig& config = model_->config();
  const LayerWeights& weights = model_->weights().layers[static_cast<size_t>(layer)];
  const Activations& normed = buffers_.normed[layer % 2];
  const Activations& qkv = buffers_.qkv[layer % 2];
  const int32_t query_columns = config.query_heads * config.head_dim;
  const int32_t kv_columns = config.kv_heads * config.head_dim;
  const int32_t rows = view.rows;
  auto column = [&](int32_t first) {
    const int64_t bytes = first * DTypeBytes(backend_->info().activation_dtype);
    return Activations{static_cast<std::byte*>(qkv.data) + bytes, qkv.stride};
  };

  backend_->Enter(StepPart::kProjections);
  if (config.norm_before) {
    backend_->Norm(NormOf(weights.attention_norm, config, normed, buffers_.hidden, rows),
                   Stream::kCompute);
  } else {
    // The layer reads the residual stream itself, which it is about to change while look-ahead
    // may still read it.
    const int64_t bytes =
        int64_t{rows} * config.hidden_size * DTypeBytes(backend_->info().activation_dtype);
    backend_->Copy(normed.data, buffers_.hidden.data, static_cast<uint64_t>(bytes),
                   Stream::kCompute);
  }
  backend_->Enter(StepPart::kSpeculation);
  strategy_->BeforeLayer(view, layer, normed);
  backend_->Enter(StepPart::kProjections);
  backend_->Gemm(ProductOf(weights.qkv, qkv, normed, rows), Stream::kCompute);
  backend_->Enter(StepPart::kAttention);
  strategy_->Attend(
      view, layer,
      {.query = qkv, .key = column(query_columns), .value = column(query_columns + kv_columns)},
      buffers_.attended);
  backend_->Enter(StepPart::kProjections);
  GemmArgs output = ProductOf(weights.attention_output, buffers_.hidden, buffers_.attended, rows);
  output.accumulate = true;
  backend_->Gemm(output, Stream::kCompute);

  backend_->Enter(StepPart::kMlp);
  const Activations& hidden = buffers_.hidden;
  const Activations& ffn_normed = buffers_.ffn_normed;
  if (config.norm_before) {
    backend_->Norm(NormOf(weights.ffn_norm, config, ffn_normed, hidden, rows), Stream::kCompute);
    EnqueueFfn(weights, ffn_normed, hidden, rows);
  } else {
    backend_->Norm(NormOf(weights.attention_norm, config, ffn_normed, hidden, rows),
                   Stream::kCompute);
    EnqueueFfn(weights, ffn_normed, ffn_normed, rows);
    backend_->Norm(NormOf(weights.ffn_norm, config, hidden, ffn_normed, rows), Stream::kCompute);
  }
}

// residual += FFN(in).
void InferenceEngine::EnqueueFfn(const LayerWeights& weights, const Activations& in,
                                 const Activations& residual, int32_t rows) {
  const ModelConfig& config = model_->config();
  GemmArgs ffn_in = ProductOf(weights.ffn_in, buffers_.ffn_in, in, rows);
  ffn_in.relu = config.activation == Activation::kRelu;
  if (config.gated_ffn) {
    backend_->GatedGemm({.product = ffn_in, .gated = buffers_.ffn_gated}, Stream::kCompute);
  } else {
    backend_->Gemm(ffn_in, Stream::kCompute);
  }
  GemmArgs ffn_out = ProductOf(weights.ffn_out, residual, buffers_.ffn_gated, rows);
  ffn_out.accumulate = true;
  backend_->Gemm(ffn_out, Stream::kCompute);
}

void InferenceEngine::EnqueueLogits(const StepView& view) {
  const ModelConfig& config = model_->config();
  const ModelWeights& weights = model_->weights();
  const int32_t rows = LogitRows(view);
  backend_->TakeRows({.out = buffers_.last,
                      .in = buffers_.hidden,
                      .row = step_state_->Device(arrays_.logit_row),
                      .rows = rows,
                      .columns = config.hidden_size},
                     Stream::kCompute);
  Activations last = buffers_.last;
  if (config.final_norm) {
    backend_->Norm(NormOf(weights.final_norm, config, buffers_.last_normed, last, rows),
                   Stream::kCompute);
    last = buffers_.last_normed;
  }
  if (config.projects_embeddings()) {
    backend_->Gemm(ProductOf(weights.project_out, buffers_.projected, last, rows),
                   Stream::kCompute);
    last = buffers_.projected;
  }
  backend_->Gemm({.out = buffers_.logits,
                  .in = last,
                  .weight = weights.output.data,
                  .f32_out = true,
                  .rows = rows,
                  .out_columns = config.vocabulary,
                  .in_columns = config.embedding_size},
                 Stream::kCompute);
  backend_->Argmax(
      {.token = buffers_.sampled,
       .logits = buffers_.logits,
       .target = step_state_->Device(arrays_.sample_target),
       .rank = view.prefill.empty() ? nullptr : step_state_->Device(arrays_.sample_rank),
       .rows = rows,
       .columns = config.vocabulary},
      Stream::kCompute);
}

uint64_t InferenceEngine::ReadbackBytes(const StepView& view) const {
  const uint64_t logits =
      options_.logits == LogitsMode::kNone ? 0 : LogitBytes(LogitRows(view), config());
  return SampledBytes(options_) + logits + strategy_->ReadbackBytes(view);
}

}  // namespace kvsweep
