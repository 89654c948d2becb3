#include "tests/bench/targets.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "proto/schema.h"
#include "tests/bench/floors.h"
#include "tests/bench/serving.h"
#include "worker/runner/recorder.h"

namespace kvsweep {
namespace {

using Values = std::vector<std::pair<std::string, int64_t>>;

std::string Show(const std::string& kernel, const Values& values) {
  std::string text = kernel;
  for (const auto& [name, value] : values) absl::StrAppend(&text, " ", name, "=", value);
  return text;
}

// ------------------------------------------------------------------------------------------- arms

Arm PagedArm() {
  Arm arm;
  arm.set_name("paged");
  arm.set_strategy("paged");
  arm.mutable_paged();
  ApplyDefaults(&arm);
  return arm;
}

Arm H2oArm(const std::string& name, int64_t budget, H2o::Tier tier) {
  Arm arm;
  arm.set_name(name);
  arm.set_strategy("h2o");
  H2o& h2o = *arm.mutable_h2o();
  h2o.set_heavy_size(static_cast<uint32_t>(budget / 2));
  h2o.set_recent_size(static_cast<uint32_t>(budget - budget / 2));
  h2o.set_tier(tier);
  if (tier == H2o::TIER_HOST) h2o.set_evict_rule(H2o::EVICT_RULE_SLOT_PROMOTE);
  ApplyDefaults(&arm);
  return arm;
}

// Fetches `fetched` entries, rounded down to an even number as budgets are.
Arm InfinigenArm(const std::string& name, int64_t fetched) {
  Arm arm;
  arm.set_name(name);
  arm.set_strategy("infinigen");
  Infinigen& infinigen = *arm.mutable_infinigen();
  // Random weights: the count is given, not found. Every entry passes, and so many are taken.
  infinigen.set_alpha(std::numeric_limits<double>::infinity());
  infinigen.set_max_kv_ratio(1);
  infinigen.set_budget_base(BUDGET_BASE_FIXED);
  infinigen.set_budget_tokens(static_cast<uint32_t>(std::max<int64_t>(1, fetched / 2 * 2)));
  infinigen.set_calibration_tokens(128);
  ApplyDefaults(&arm);
  return arm;
}

Arm FetchAllArm(const std::string& name) {
  Arm arm;
  arm.set_name(name);
  arm.set_strategy("infinigen");
  arm.mutable_infinigen()->set_fetch(Infinigen::FETCH_ALL);
  ApplyDefaults(&arm);
  return arm;
}

// The three arms as every table but the offloading one has them.
std::vector<Arm> ThreeArms(int64_t context) {
  return {PagedArm(), H2oArm("h2o", context / 5, H2o::TIER_DEVICE),
          InfinigenArm("infinigen", context / 20)};
}

int64_t FetchedBy(const Arm& arm) {
  return arm.strategy() == "infinigen" ? arm.infinigen().budget_tokens() : 0;
}

StepShape ShapeOf(const LoadedModel& model, const Backend& backend, int64_t rows, double tokens,
                  int64_t fetched) {
  return {.rows = rows,
          .tokens = tokens,
          .element_bytes = static_cast<double>(DTypeBytes(backend.info().weight_dtype)),
          .kv_bytes = static_cast<double>(DTypeBytes(model.config().dtype)),
          .fetched_tokens = std::min(tokens, static_cast<double>(fetched))};
}

// ------------------------------------------------------------------------------------------ makers

// Collects rows; `shrink` divides what it is asked to.
class Maker {
 public:
  explicit Maker(const BenchSizes& sizes) : sizes_(sizes) {}

  // Of what there is at least one of; nothing stays nothing.
  int64_t Shrink(int64_t value) const {
    return value == 0 ? 0 : std::max<int64_t>(1, value / sizes_.shrink);
  }

  ResultRow& Add(std::string name, std::string what,
                 std::function<absl::Status(Bench&, ResultRow*)> measure) {
    rows_.push_back(
        {.row = {.name = std::move(name), .what = std::move(what)}, .measure = std::move(measure)});
    return rows_.back().row;
  }
  static void Hold(ResultRow& row, double target, bool at_least) {
    row.target = target;
    row.at_least = at_least;
  }

  void AddKernels();
  void AddPrefill();
  void AddSelections();
  void AddProducts();
  void AddSteps();
  void AddHostGaps();
  void AddBurst();
  void AddRecording();
  void AddBatchInvariance();
  void AddOffload();
  void AddHidden();
  void AddLongContexts();
  void AddShape(const std::string& model, int64_t rows, int64_t context);

  std::vector<BenchRow> Take() { return std::move(rows_); }

 private:
  void AddDecode(const std::string& what, int64_t rows, int64_t context, int64_t query_heads,
                 int64_t kv_heads, double target, bool against_peer);
  void AddPaging(int64_t kv_heads);

  const BenchSizes sizes_;
  std::vector<BenchRow> rows_;
};

// ----------------------------------------------------------------------------------------- kernels

void Maker::AddDecode(const std::string& what, int64_t rows, int64_t context, int64_t query_heads,
                      int64_t kv_heads, double target, bool against_peer) {
  const Values values = {
      {"B", Shrink(rows)}, {"context", Shrink(context)}, {"Hq", query_heads}, {"Hk", kv_heads}};
  const std::string name = Show("decode_attention", values);
  ResultRow& row = Add(name, what, [values, against_peer](Bench& bench, ResultRow* row) {
    RETURN_IF_ERROR(TimeKernel(bench, "decode_attention", values, row));
    if (!against_peer) return absl::OkStatus();
    const PeerRow* const best = bench.peers().Best(row->peer);
    row->ratio_is = "of the best peer";
    row->ratio = best == nullptr ? 1e9 : row->measured / best->measured_us;
    if (best != nullptr) return absl::OkStatus();
    return absl::FailedPreconditionError(
        "no peer was timed: run scripts/bench-peers and name its file with --peers");
  });
  row.peer = name;
  Hold(row, target, !against_peer);
}

// What pages cost against our own kernel over one piece of memory for each sequence.
void Maker::AddPaging(int64_t kv_heads) {
  const Values values = {
      {"B", Shrink(32)}, {"context", Shrink(4096)}, {"Hq", 32}, {"Hk", kv_heads}};
  ResultRow& row = Add(
      Show("paging", values),
      absl::StrCat("price of paging: decode attention, 32 heads over ", kv_heads, ", B 32, 4,096"),
      [values](Bench& bench, ResultRow* row) {
        Values contiguous = values;
        contiguous.emplace_back("page", 0);
        ResultRow plain;
        RETURN_IF_ERROR(TimeKernel(bench, "decode_attention", contiguous, &plain));
        RETURN_IF_ERROR(TimeKernel(bench, "decode_attention", values, row));
        row->ratio = row->measured / plain.measured - 1;
        row->ratio_is = "share";
        row->note = absl::StrFormat("over contiguous memory %.1f µs", plain.measured);
        return absl::OkStatus();
      });
  Hold(row, 0.01, false);
}

void Maker::AddKernels() {
  AddDecode("paged decode attention, 32 heads, B 32, 4,096 tokens", 32, 4096, 32, 32, 0.98, false);
  AddDecode("the same, 8 KV heads (groups of 4)", 32, 4096, 32, 8, 0.95, false);
  AddDecode("the same, 64 heads over 8 (groups of 8)", 32, 4096, 64, 8, 0.95, false);
  AddDecode("groups of 4, B 1, 4,096 tokens", 1, 4096, 32, 8, 0.75, true);
  AddDecode("groups of 4, B 8, 1,024 tokens", 8, 1024, 32, 8, 0.75, true);
  AddPaging(32);
  AddPaging(8);
}

void Maker::AddPrefill() {
  for (const int64_t history : {0, 14336}) {
    for (const int64_t kv_heads : {32, 8}) {
      const int64_t rows = history == 0 ? 8192 : 2048;
      const Values values = {
          {"rows", Shrink(rows)}, {"history", Shrink(history)}, {"Hq", 32}, {"Hk", kv_heads}};
      const std::string name = Show("prefill_attention", values);
      ResultRow& row = Add(
          name,
          history == 0 ? absl::StrCat("causal prefill of 8,192 tokens, 32 heads over ", kv_heads)
                       : absl::StrCat("a chunk of 2,048 behind 14,336 paged tokens, 32 heads over ",
                                      kv_heads),
          [values](Bench& bench, ResultRow* row) {
            RETURN_IF_ERROR(TimeKernel(bench, "prefill_attention", values, row));
            row->ratio = row->cost.operations / row->measured / 1e6;
            row->ratio_is = "TFLOP/s";
            return absl::OkStatus();
          });
      row.peer = name;
      Hold(row, history == 0 ? 600 : 540, true);
    }
  }
}

void Maker::AddSelections() {
  for (const int64_t history : {0, 14336}) {
    for (const int64_t kv_heads : {32, 8}) {
      const Values values = {
          {"rows", Shrink(2048)}, {"history", Shrink(history)}, {"Hq", 32}, {"Hk", kv_heads}};
      ResultRow& row =
          Add(Show("column_sum", values),
              absl::StrCat("H2O's column sums of 2,048 rows behind ", history, ", 32 heads over ",
                           kv_heads),
              [values](Bench& bench, ResultRow* row) {
                ResultRow attention;
                RETURN_IF_ERROR(TimeKernel(bench, "prefill_attention", values, &attention));
                RETURN_IF_ERROR(TimeKernel(bench, "column_sum", values, row));
                row->ratio = row->measured / attention.measured;
                row->ratio_is = "of the attention's time";
                row->note = absl::StrFormat("attention %.1f µs", attention.measured);
                return absl::OkStatus();
              });
      Hold(row, 0.6, false);
    }
  }
  for (const int64_t budget : {384, 818}) {
    const Values values = {{"B", Shrink(8)}, {"budget", Shrink(budget)}, {"Hk", 32}, {"group", 1}};
    ResultRow& row = Add(Show("evict_heavy", values),
                         absl::StrCat("H2O's score update and eviction of a layer, B 8, 32 heads, ",
                                      budget, " slots"),
                         [values](Bench& bench, ResultRow* row) {
                           RETURN_IF_ERROR(TimeKernel(bench, "evict_heavy", values, row));
                           row->ratio = row->measured;
                           row->ratio_is = "µs";
                           return absl::OkStatus();
                         });
    Hold(row, 5, false);
  }
  for (const int64_t kv_heads : {32, 8}) {
    const Values values = {
        {"B", Shrink(8)}, {"context", Shrink(4096)}, {"Hq", 32}, {"Hk", kv_heads}};
    ResultRow& row = Add(
        Show("speculate", values),
        absl::StrCat(
            "InfiniGen's speculation and selection of a layer, B 8, 4,096 tokens, 32 heads over ",
            kv_heads),
        [values](Bench& bench, ResultRow* row) {
          RETURN_IF_ERROR(TimeKernel(bench, "speculate", values, row));
          row->ratio = row->measured / (1.25 * row->floor + 8);
          row->ratio_is = "of 1.25 × bytes + 8 µs";
          return absl::OkStatus();
        });
    Hold(row, 1, false);
  }
}

// All matrices of a model, one product each, as a step reads them.
absl::Status TimeProducts(Bench& bench, const std::string& model_name, int64_t rows,
                          ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, 2));
  const ModelConfig& config = model->config();
  CaseMemory memory(*backend);
  const int64_t widest =
      std::max<int64_t>({config.hidden_size, int64_t{config.ffn_size} * 2, config.qkv_rows(),
                         int64_t{config.query_heads} * config.head_dim});
  const DType activation = backend->info().activation_dtype;
  ASSIGN_OR_RETURN(std::byte* const in, memory.Normal(rows * widest, activation));
  ASSIGN_OR_RETURN(
      std::byte* const out,
      memory.Room(static_cast<uint64_t>(rows * std::max<int64_t>(widest, config.vocabulary)) *
                  sizeof(float)));
  std::vector<GemmArgs> products;
  const auto add = [&](const MatrixWeights& weight, bool f32_out) {
    products.push_back({.out = {out, weight.rows},
                        .in = {in, weight.columns},
                        .weight = weight.data,
                        .f32_out = f32_out,
                        .rows = static_cast<int32_t>(rows),
                        .out_columns = static_cast<int32_t>(weight.rows),
                        .in_columns = static_cast<int32_t>(weight.columns)});
  };
  for (const LayerWeights& layer : model->weights().layers) {
    for (const LinearWeights* linear :
         {&layer.qkv, &layer.attention_output, &layer.ffn_in, &layer.ffn_out}) {
      add(linear->weight, false);
    }
  }
  add(model->weights().output, true);
  PreparedCase prepared;
  prepared.cost.device_bytes =
      StepWeights(config) * static_cast<double>(DTypeBytes(backend->info().weight_dtype));
  prepared.cost.operations = 2.0 * StepWeights(config) * static_cast<double>(rows);
  prepared.enqueue = [backend, products](int) {
    for (const GemmArgs& product : products) backend->Gemm(product, Stream::kCompute);
  };
  return TimePrepared(*backend, bench.rule(), bench.limits().profile, std::move(prepared), row);
}

void Maker::AddProducts() {
  for (const int64_t rows : {1, 8, 32, 64}) {
    const std::string model = sizes_.grouped;
    const int64_t few = Shrink(rows);
    ResultRow& row =
        Add(absl::StrCat("products ", model, " rows=", few),
            absl::StrCat("skinny products, all weights of ", model, ", ", rows, " rows"),
            [model, few](Bench& bench, ResultRow* row) {
              return TimeProducts(bench, model, few, row);
            });
    row.peer = row.name;
    Hold(row, 0.9, true);
  }
}

// ------------------------------------------------------------------------------------------- steps

void Maker::AddSteps() {
  for (const int64_t rows : {1, 8, 32, 64}) {
    for (const int64_t context : {1024, 4096}) {
      const std::string model = sizes_.grouped;
      const int64_t few = Shrink(rows);
      const int64_t tokens = Shrink(context);
      ResultRow& row =
          Add(absl::StrCat("step ", model, " B=", few, " context=", tokens),
              absl::StrCat("whole decode step, ", model, ", B ", rows, ", ", context, " tokens"),
              [=](Bench& bench, ResultRow* row) {
                return TimeArmStep(bench, model, PagedArm(), few, tokens, 0, false, row);
              });
      row.peer = row.name;
      Hold(row, rows == 64 && context == 4096 ? 0.92 : 0.88, true);
    }
  }
  // The same with computed prompts: what taking them as computed changes.
  const std::string model = sizes_.grouped;
  const int64_t few = Shrink(8);
  const int64_t tokens = Shrink(1024);
  Add(absl::StrCat("step-computed ", model, " B=", few, " context=", tokens),
      absl::StrCat("whole decode step, ", model, ", B 8, 1024 tokens, prompts computed"),
      [=](Bench& bench, ResultRow* row) {
        return TimeArmStep(bench, model, PagedArm(), few, tokens, 0, true, row);
      });
}

// How long the device waits for the host between decode steps.
absl::Status TimeHostGap(Bench& bench, const std::string& model_name, const Arm& arm, int64_t rows,
                         int64_t context, ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, context + 128));
  ASSIGN_OR_RETURN(
      const ServedSteps served,
      TimeDecode(backend, model, {.arm = arm, .rows = rows, .context = context}, bench.rule()));
  row->SetTime(served.gap, "us");
  row->spread = 0;  // most gaps are nothing, so quartiles say nothing
  row->ratio = served.gap_share;
  row->ratio_is = "share";
  row->note = absl::StrFormat("step %.2f ms; the share is of all gaps, the time their median",
                              served.timing.median_ns / 1e6);
  return absl::OkStatus();
}

void Maker::AddHostGaps() {
  const std::string model = sizes_.grouped;
  const int64_t rows = Shrink(8);
  const int64_t context = Shrink(1024);
  for (const Arm& arm : ThreeArms(context)) {
    Hold(Add(absl::StrCat("host gap ", model, " B=", rows, " context=", context, " ", arm.name()),
             absl::StrCat("host gap between decode steps, ", model, ", B 8, 1,024 tokens, ",
                          arm.name()),
             [=](Bench& bench, ResultRow* row) {
               return TimeHostGap(bench, model, arm, rows, context, row);
             }),
         0.02, false);
  }
}

void Maker::AddBurst() {
  const std::string model = sizes_.grouped;
  const int64_t rows = Shrink(64);
  const int64_t input = Shrink(512);
  const int64_t output = std::max<int64_t>(2, Shrink(128));
  for (const int64_t tokens : {2048, 8192}) {
    ResultRow& row = Add(absl::StrCat("burst ", model, " B=", rows, " input=", input,
                                      " output=", output, " tokens=", tokens),
                         absl::StrCat("burst of 64 requests 512 + 128, ", model,
                                      ", steps of up to ", tokens, " tokens"),
                         [=](Bench& bench, ResultRow* row) {
                           return TimeBurst(bench, model, rows, input, output, tokens, row);
                         });
    Hold(row, 1.17, false);
  }
}

// The same burst with its rows dropped and with them recorded as a runner does, in turn.
absl::Status TimeRecording(Bench& bench, const std::string& model_name, int64_t rows, int64_t input,
                           int64_t output, ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, input + output));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<LoadServer> server,
      LoadServer::Create(backend, model,
                         {.arm = PagedArm(), .rows = rows, .input = input, .output = output}));
  uint64_t sent = 0;
  Recorder recorder([&sent](const FromRunner& frame) {
    sent += frame.SerializeAsString().size();
    return absl::OkStatus();
  });
  const RequestSink drop = [](RequestRow) { return true; };
  const RequestSink record = [&recorder](RequestRow request) {
    Record kept;
    *kept.mutable_request() = std::move(request);
    return recorder.Offer(std::move(kept));
  };
  RETURN_IF_ERROR(server->Serve(drop).status());
  std::vector<double> off;
  std::vector<double> on;
  constexpr int kPairs = 5;
  for (int pair = 0; pair < kPairs; ++pair) {
    for (const bool recording : {pair % 2 == 0, pair % 2 != 0}) {
      ASSIGN_OR_RETURN(const ServeResult result, server->Serve(recording ? record : drop));
      (recording ? on : off).push_back(static_cast<double>(result.duration_ns));
    }
  }
  recorder.Flush();
  if (sent == 0) return absl::InternalError("nothing was recorded");
  const Timing without = Summarise(off);
  row->SetTime(Summarise(on), "s");
  row->ratio = Summarise(on).median_ns / without.median_ns - 1;
  row->ratio_is = "share";
  row->note =
      absl::StrFormat("%.4f s without recording, ± %.2f %%; %d pairs in turn, %d bytes sent",
                      without.median_ns / 1e9, 100 * without.spread, kPairs, sent);
  return absl::OkStatus();
}

void Maker::AddRecording() {
  const std::string model = sizes_.grouped;
  const int64_t rows = Shrink(64);
  const int64_t input = Shrink(512);
  const int64_t output = std::max<int64_t>(2, Shrink(128));
  ResultRow& row = Add(absl::StrCat("recording ", model, " B=", rows),
                       "what recording adds to a burst of 64 requests 512 + 128",
                       [=](Bench& bench, ResultRow* row) {
                         return TimeRecording(bench, model, rows, input, output, row);
                       });
  Hold(row, 0.005, false);
}

// What fixed reduction orders cost: the same step in both modes.
absl::Status TimeBatchInvariance(Bench& bench, const std::string& model_name, int64_t rows,
                                 int64_t context, ResultRow* row) {
  Timing timings[2];
  for (const bool invariant : {false, true}) {
    ASSIGN_OR_RETURN(Backend* const backend, bench.Use(invariant));
    ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, context + 64));
    ASSIGN_OR_RETURN(
        const ServedSteps served,
        TimeDecode(backend, model, {.arm = PagedArm(), .rows = rows, .context = context},
                   bench.rule()));
    timings[invariant] = served.timing;
  }
  row->SetTime(timings[1], "ms");
  row->ratio = timings[1].median_ns / timings[0].median_ns;
  row->ratio_is = "of the fast mode's time";
  return absl::OkStatus();
}

void Maker::AddBatchInvariance() {
  const std::string model = sizes_.grouped;
  for (const int64_t rows : {8, 64}) {
    const int64_t few = Shrink(rows);
    const int64_t tokens = Shrink(1024);
    Add(absl::StrCat("batch_invariant ", model, " B=", few, " context=", tokens),
        absl::StrCat("decode step with batch_invariant on, ", model, ", B ", rows, ", 1024 tokens"),
        [=](Bench& bench, ResultRow* row) {
          return TimeBatchInvariance(bench, model, few, tokens, row);
        });
  }
}

// ----------------------------------------------------------------------------------------- offload

void Maker::AddOffload() {
  const std::string model = sizes_.plain;
  const int64_t rows = Shrink(8);
  const int64_t context = Shrink(1920);
  for (const OffloadArm& offload : OffloadArms(context, Shrink(400))) {
    ResultRow& row = Add(
        absl::StrCat("offload ", model, " B=", rows, " context=", context, " ", offload.arm.name()),
        absl::StrCat("offload, ", model, ", B 8, 1,920 tokens: ", offload.arm.name()),
        [=](Bench& bench, ResultRow* row) {
          return TimeArmStep(bench, model, offload.arm, rows, context, offload.fetched, true, row);
        });
    Hold(row, offload.target, true);
  }
}

void Maker::AddHidden() {
  const std::string plain = sizes_.plain;
  const int64_t rows = Shrink(8);
  const int64_t context = Shrink(1920);
  for (const OffloadArm& offload : OffloadArms(context, Shrink(400))) {
    const std::string& name = offload.arm.name();
    if (offload.target == 0 || name == "h2o-device") continue;
    ResultRow& row = Add(
        absl::StrCat("hidden ", plain, " B=", rows, " context=", context, " ", name),
        absl::StrCat("transfer hidden behind compute, ", plain, ", B 8, 1,920 tokens: ", name),
        [=](Bench& bench, ResultRow* row) {
          return TimeHidden(bench, plain, offload.arm, rows, context, offload.fetched, true, row);
        });
    Hold(row, 0.9, true);
  }
  // Where compute is longer than the transfer, all of it can be hidden.
  const std::string grouped = sizes_.grouped;
  const int64_t tokens = Shrink(4096);
  Arm arm = InfinigenArm("infinigen-resident", Shrink(74));
  arm.mutable_infinigen()->set_full_layers_on_device(true);
  ResultRow& row =
      Add(absl::StrCat("hidden ", grouped, " B=", rows, " context=", tokens, " infinigen-resident"),
          absl::StrCat("transfer hidden behind compute, ", grouped,
                       ", B 8, 4,096 tokens, 74 fetched, layers 0 and 1 resident"),
          [=](Bench& bench, ResultRow* row) {
            return TimeHidden(bench, grouped, arm, rows, tokens, FetchedBy(arm), false, row);
          });
  Hold(row, 0.9, true);
}

// ------------------------------------------------------------------------------------ long
// contexts

// How much of a decode step selecting takes, at one layer's time for each layer beyond the full
// ones.
absl::Status TimeSelectionShare(Bench& bench, const std::string& model_name, int64_t context,
                                ResultRow* row) {
  ASSIGN_OR_RETURN(const ModelConfig config, FindBenchModel(model_name));
  ResultRow selecting;
  RETURN_IF_ERROR(TimeKernel(
      bench, "speculate",
      {{"B", 1}, {"context", context}, {"Hq", config.query_heads}, {"Hk", config.kv_heads}},
      &selecting));
  const Arm arm = ThreeArms(context)[2];
  RETURN_IF_ERROR(TimeArmStep(bench, model_name, arm, 1, context, FetchedBy(arm), false, row));
  const double layers = config.layers - arm.infinigen().n_full_layers();
  row->ratio = selecting.measured * layers / (row->measured * 1e3);
  row->ratio_is = "share";
  row->note = absl::StrFormat("speculation and selection %.1f µs a layer", selecting.measured);
  return absl::OkStatus();
}

// How much of a prompt's last chunk H2O's column sums take.
absl::Status TimeColumnSumShare(Bench& bench, const std::string& model_name, int64_t context,
                                int64_t chunk, ResultRow* row) {
  ASSIGN_OR_RETURN(const ModelConfig config, FindBenchModel(model_name));
  const Values values = {{"rows", chunk},
                         {"history", context - chunk},
                         {"Hq", config.query_heads},
                         {"Hk", config.kv_heads}};
  ResultRow attention;
  ResultRow sums;
  RETURN_IF_ERROR(TimeKernel(bench, "prefill_attention", values, &attention));
  RETURN_IF_ERROR(TimeKernel(bench, "column_sum", values, &sums));
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  // The chunk's products at the matrix rate: the least that the step takes beside attention.
  Cost products =
      PromptFloor(config, 1, chunk, static_cast<double>(DTypeBytes(backend->info().weight_dtype)));
  const double products_us = FloorNs(products, bench.limits().profile, nullptr) / 1e3;
  const double layers = config.layers;
  row->measured = sums.measured * layers / 1e3;
  row->unit = "ms";
  row->spread = sums.spread;
  row->samples = sums.samples;
  row->stop = sums.stop;
  row->ratio =
      sums.measured * layers / ((sums.measured + attention.measured) * layers + products_us);
  row->ratio_is = "share";
  row->note = absl::StrFormat(
      "of a chunk of %d rows: attention %.1f ms, products at the matrix rate %.1f ms", chunk,
      attention.measured * layers / 1e3, products_us / 1e3);
  return absl::OkStatus();
}

void Maker::AddLongContexts() {
  const std::string model = sizes_.grouped;
  for (const int64_t context : {65536, 131072 - 128}) {
    const int64_t tokens = Shrink(context);
    for (const int64_t rows : {1, 4}) {
      for (const Arm& arm : ThreeArms(tokens)) {
        // The pool of four such requests is more pinned memory than a trial can wait for.
        if (arm.strategy() == "infinigen" && rows == 4 && context > 65536) continue;
        Add(absl::StrCat("long ", model, " B=", rows, " context=", tokens, " ", arm.name()),
            absl::StrCat("decode step at ", context, " tokens, ", model, ", B ", rows, ", ",
                         arm.name()),
            [=](Bench& bench, ResultRow* row) {
              return TimeArmStep(bench, model, arm, rows, tokens, FetchedBy(arm), false, row);
            });
      }
    }
    Hold(Add(absl::StrCat("selection ", model, " context=", tokens),
             absl::StrCat("speculation and selection in a step at ", context, " tokens, B 1"),
             [=](Bench& bench, ResultRow* row) {
               return TimeSelectionShare(bench, model, tokens, row);
             }),
         0.1, false);
    Hold(Add(absl::StrCat("column sums ", model, " context=", tokens),
             absl::StrCat("H2O's column sums in a prompt's last chunk at ", context, " tokens"),
             [=, chunk = Shrink(2048)](Bench& bench, ResultRow* row) {
               return TimeColumnSumShare(bench, model, tokens, chunk, row);
             }),
         0.1, false);
  }
}

void Maker::AddShape(const std::string& model, int64_t rows, int64_t context) {
  const int64_t few = Shrink(rows);
  const int64_t tokens = Shrink(context);
  Add(absl::StrCat("step ", model, " B=", few, " context=", tokens),
      absl::StrCat(model, ", B ", rows, ", ", context, " tokens"),
      [=](Bench& bench, ResultRow* row) {
        const absl::Status status =
            TimeArmStep(bench, model, PagedArm(), few, tokens, 0, false, row);
        if (!absl::IsResourceExhausted(status)) return status;
        return absl::ResourceExhaustedError(kDoesNotFit);
      });
}

}  // namespace

std::vector<OffloadArm> OffloadArms(int64_t context, int64_t selected) {
  std::vector<OffloadArm> arms;
  arms.push_back({.arm = FetchAllArm("fetch-all"), .target = 0.9});
  Arm all_late = FetchAllArm("fetch-all-no-prefetch");
  all_late.mutable_infinigen()->set_prefetch(false);
  arms.push_back({.arm = all_late});
  const Arm infinigen = InfinigenArm("infinigen", selected);
  const int64_t fetched = FetchedBy(infinigen);
  arms.push_back({.arm = infinigen, .fetched = fetched, .target = 0.85});
  Arm late = InfinigenArm("infinigen-no-prefetch", selected);
  late.mutable_infinigen()->set_prefetch(false);
  arms.push_back({.arm = late, .fetched = fetched});
  Arm resident = InfinigenArm("infinigen-resident", selected);
  resident.mutable_infinigen()->set_full_layers_on_device(true);
  arms.push_back({.arm = resident, .fetched = fetched});
  const int64_t budget = std::max<int64_t>(2, context / 5 / 2 * 2);
  arms.push_back({.arm = H2oArm("h2o-device", budget, H2o::TIER_DEVICE), .target = 0.85});
  arms.push_back({.arm = H2oArm("h2o-host", budget, H2o::TIER_HOST), .target = 0.85});
  return arms;
}

absl::Status TimeArmStep(Bench& bench, const std::string& model_name, const Arm& arm, int64_t rows,
                         int64_t context, int64_t fetched, bool real_prompts, ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, context + 128));
  ASSIGN_OR_RETURN(const ServedSteps served, TimeDecode(backend, model,
                                                        {.arm = arm,
                                                         .rows = rows,
                                                         .context = context,
                                                         .steps = real_prompts ? 12 : 32,
                                                         .real_prompts = real_prompts},
                                                        bench.rule()));
  row->SetTime(served.timing, "ms");
  row->cost =
      DecodeFloor(model->config(), arm, ShapeOf(*model, *backend, rows, served.tokens, fetched));
  row->SetFloor(bench.limits().profile);
  return absl::OkStatus();
}

absl::Status TimeBurst(Bench& bench, const std::string& model_name, int64_t rows, int64_t input,
                       int64_t output, int64_t max_batched_tokens, ResultRow* row) {
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, input + output));
  ASSIGN_OR_RETURN(const std::unique_ptr<LoadServer> server,
                   LoadServer::Create(backend, model,
                                      {.arm = PagedArm(),
                                       .rows = rows,
                                       .input = input,
                                       .output = output,
                                       .max_batched_tokens = max_batched_tokens}));
  StopRule rule = bench.rule();
  rule.least_samples = 3;
  ASSIGN_OR_RETURN(const Timing timing, TimeServing(
                                            server.get(), [](RequestRow) { return true; }, rule));
  row->SetTime(timing, "s");
  const auto element_bytes = static_cast<double>(DTypeBytes(backend->info().weight_dtype));
  row->floor =
      BurstFloorNs(model->config(), rows, input, output, element_bytes, bench.limits().profile) /
      1e9;
  row->bound = "matrix, then read";
  row->ratio = row->measured / row->floor;
  row->ratio_is = "× floor";
  return absl::OkStatus();
}

// What kernels that read host memory reach, which is less than the copy engine does.
double GatherBytesPerSecond(const MachineLimits& limits) {
  for (const Limit& limit : limits.rows) {
    if (limit.name == "gather of 512 B rows from the host") return limit.value;
  }
  return limits.profile.link_bytes_per_s;
}

absl::Status TimeHidden(Bench& bench, const std::string& model_name, const Arm& arm, int64_t rows,
                        int64_t context, int64_t fetched, bool real_prompts, ResultRow* row) {
  const DecodeQuestion question{.arm = arm,
                                .rows = rows,
                                .context = context,
                                .steps = real_prompts ? 12 : 32,
                                .real_prompts = real_prompts};
  ASSIGN_OR_RETURN(Backend* const backend, bench.Use());
  ASSIGN_OR_RETURN(const LoadedModel* const model, bench.UseModel(model_name, context + 128));
  ASSIGN_OR_RETURN(const ServedSteps whole, TimeDecode(backend, model, question, bench.rule()));
  backend->SkipFetches(true);
  const absl::StatusOr<ServedSteps> hidden_all = TimeDecode(backend, model, question, bench.rule());
  backend->SkipFetches(false);
  RETURN_IF_ERROR(hidden_all.status());
  const Cost cost =
      DecodeFloor(model->config(), arm, ShapeOf(*model, *backend, rows, whole.tokens, fetched));
  const double rate = GatherBytesPerSecond(bench.limits());
  const double link_ns = cost.link_bytes / rate * 1e9;
  const double step_ns = whole.timing.median_ns;
  const double compute_ns = hidden_all->timing.median_ns;
  row->SetTime(whole.timing, "ms");
  row->cost = cost;
  row->SetFloor(bench.limits().profile);
  const HiddenTransfer hidden = HiddenShare(step_ns, compute_ns, link_ns);
  row->ratio = hidden.of_possible;
  row->ratio_is = "share";
  row->note = absl::StrFormat(
      "without fetches %.2f ms, transfer alone %.2f ms at %.1f GB/s: %.0f %% of the transfer "
      "hidden, %.0f %% of what can be",
      compute_ns / 1e6, link_ns / 1e6, rate / 1e9, 100 * hidden.of_transfer,
      100 * hidden.of_possible);
  return absl::OkStatus();
}

std::vector<BenchRow> TargetRows(const BenchSizes& sizes) {
  Maker maker(sizes);
  maker.AddKernels();
  maker.AddPrefill();
  maker.AddSelections();
  maker.AddProducts();
  maker.AddSteps();
  maker.AddHostGaps();
  maker.AddBurst();
  maker.AddRecording();
  maker.AddOffload();
  maker.AddLongContexts();
  maker.AddBatchInvariance();
  maker.AddHidden();
  return maker.Take();
}

std::vector<BenchRow> ShapeRows(const BenchSizes& sizes) {
  Maker maker(sizes);
  for (const std::string& model : sizes.shapes) {
    for (const int64_t context : {512, 1024, 2048, 4096, 8192, 16384, 32768}) {
      for (const int64_t rows : {1, 8, 32, 64}) maker.AddShape(model, rows, context);
    }
  }
  for (const int64_t context : {65536, 131072 - 128}) {
    for (const int64_t rows : {1, 2, 4}) maker.AddShape(sizes.grouped, rows, context);
  }
  for (const std::string& model : sizes.trained) {  // with positions for 2,048 tokens
    for (const int64_t context : {512, 1024}) {
      for (const int64_t rows : {1, 8, 32, 64}) maker.AddShape(model, rows, context);
    }
  }
  return maker.Take();
}

}  // namespace kvsweep
