#include "experiments/spec.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <type_traits>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "experiments/arrivals.h"
#include "experiments/spec_checks.h"
#include "experiments/trace.h"

namespace kvsweep {
namespace {

// Groups of the spec that a sweep may vary.
constexpr absl::string_view kSweepable[] = {"load.", "kv.", "engine."};

std::string Join(absl::string_view prefix, absl::string_view name) {
  return absl::StrCat(prefix, prefix.empty() ? "" : ".", name);
}

void CheckName(const std::string& name, absl::string_view field, ProblemList* problems) {
  const bool sound = !name.empty() && name.size() <= limits::kNameLength &&
                     std::all_of(name.begin(), name.end(), [](char c) {
                       return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.';
                     });
  if (sound) return;
  problems->Add({.field = std::string(field),
                 .value = name,
                 .what = "is not a name",
                 .remedy = absl::StrCat("use 1 to ", limits::kNameLength,
                                        " letters, digits, '-', '_' and '.'")});
}

void CheckModel(const Model& model, const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  if (model.has_path() == model.has_shape()) {
    report.Add("", model.has_path() ? "names both path and shape" : "names neither path nor shape",
               "give exactly one of them");
  } else if (model.has_shape() && model.weights() != Model::WEIGHTS_RANDOM) {
    report.Add("weights", "a shape has no trained weights", "write \"weights: random\", or a path");
  }
  report.Useless(model.weights() != Model::WEIGHTS_RANDOM && model.has_weights_seed() &&
                     model.weights_seed() != 1,
                 "weights_seed", "weights are trained");
}

void CheckKv(const Kv& kv, const std::string& path, ProblemList* problems) {
  if (kv.has_device_bytes()) return;
  Reporter(path, problems)
      .Add("device_bytes", "missing", "give the device memory for the KV cache, such as 12MiB");
}

void CheckEngine(const Engine& engine, const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  if (engine.max_num_batched_tokens() < engine.max_num_seqs()) {
    report.Add("max_num_batched_tokens",
               absl::StrCat("a step of ", engine.max_num_batched_tokens(),
                            " tokens cannot hold one of each of ", engine.max_num_seqs(),
                            " running requests"),
               "raise it, or lower max_num_seqs");
  }
  report.Useless(engine.time() == Engine::TIME_REAL && engine.device_profile() != "h200",
                 "device_profile", "time is real");
}

// budget_base and budget_tokens of a strategy's block.
template <typename Block>
void CheckBudgetBase(const Block& block, const Reporter& report) {
  if (block.budget_base() == BUDGET_BASE_FINAL && !std::is_same_v<Block, H2o>) {
    report.Add("budget_base", "the final length is known to no server",
               "write limit, prompt or fixed; final is for h2o's fidelity runs");
  }
  const bool fixed = block.budget_base() == BUDGET_BASE_FIXED;
  if (fixed && !block.has_budget_tokens()) {
    report.Add("budget_tokens", "missing", "budget_base: fixed needs its number of tokens");
  }
  report.Useless(!fixed && block.has_budget_tokens(), "budget_tokens",
                 "budget_base is not \"fixed\"");
}

// How many tokens an H2o block keeps, and of what.
void CheckH2oBudget(const H2o& h2o, const Reporter& report) {
  const bool sizes = h2o.has_heavy_size() || h2o.has_recent_size();
  if (!sizes) {
    const double total = h2o.heavy_ratio() + h2o.recent_ratio();
    // Sums of decimal fractions miss 1 by a rounding.
    if (total > 1 + 1e-9 || total <= 0) {
      report.Add("", absl::StrCat("heavy_ratio and recent_ratio add up to ", FormatNumber(total)),
                 "their sum must lie above 0 and not exceed 1");
    }
    return CheckBudgetBase(h2o, report);
  }
  const uint64_t total = uint64_t{h2o.heavy_size()} + h2o.recent_size();
  if (!h2o.has_heavy_size() || !h2o.has_recent_size()) {
    report.Add(h2o.has_heavy_size() ? "recent_size" : "heavy_size", "missing",
               "a budget in tokens needs heavy_size and recent_size");
  } else if (total == 0) {
    report.Add("heavy_size", "a budget of 0 tokens keeps nothing", "raise it, or recent_size");
  } else if (h2o.sink_tokens() > total) {
    report.Add("sink_tokens",
               absl::StrCat(h2o.sink_tokens(), " sinks do not fit a budget of ", total),
               "lower it, or raise heavy_size or recent_size");
  }
  constexpr absl::string_view kInTokens = "the budget is given in tokens";
  report.Useless(h2o.heavy_ratio() != 0.1, "heavy_ratio", kInTokens);
  report.Useless(h2o.recent_ratio() != 0.1, "recent_ratio", kInTokens);
  report.Useless(h2o.budget_base() != BUDGET_BASE_LIMIT, "budget_base", kInTokens);
  report.Useless(h2o.has_budget_tokens(), "budget_tokens", kInTokens);
}

void CheckH2o(const H2o& h2o, const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  CheckH2oBudget(h2o, report);
  const bool equal = h2o.has_heavy_size() ? h2o.heavy_size() == h2o.recent_size()
                                          : h2o.heavy_ratio() == h2o.recent_ratio();
  if (h2o.evict_rule() == H2o::EVICT_RULE_SLOT_PROMOTE && !equal) {
    report.Add("evict_rule", "slot_promote keeps as many heavy hitters as recent tokens",
               "give both the same ratio or size");
  }
  report.Useless(
      h2o.evict_rule() == H2o::EVICT_RULE_CURRENT_ONLY && h2o.score_norm() != H2o::SCORE_NORM_SUM,
      "score_norm", "current_only keeps no scores beyond a step");
  report.Useless(h2o.score_norm() != H2o::SCORE_NORM_DECAYED && h2o.score_decay() != 0.98,
                 "score_decay", "score_norm is not \"decayed\"");
  if (h2o.tier() == H2o::TIER_HOST && h2o.full_layers() > 0) {
    report.Add("full_layers", "with tier: host every layer's entries lie on the host", "remove it");
  }
  if (h2o.tier() == H2o::TIER_HOST && h2o.preemption() == H2o::PREEMPTION_SWAP) {
    report.Add("preemption", "swap has nothing to bring to the host with tier: host",
               "write none or recompute");
  }
}

void CheckStreamingLlm(const StreamingLlm& streaming, const std::string& path,
                       ProblemList* problems) {
  const Reporter report(path, problems);
  if (!streaming.has_window_size()) {
    if (streaming.window_ratio() <= 0) {
      report.Add("window_ratio", "a budget of 0 tokens keeps nothing", "write more than 0");
    }
    return CheckBudgetBase(streaming, report);
  }
  if (streaming.window_size() <= streaming.sink_tokens()) {
    report.Add("window_size",
               absl::StrCat(streaming.sink_tokens(), " sinks leave nothing of ",
                            streaming.window_size(), " tokens to be a window"),
               "raise it, or lower sink_tokens");
  }
  constexpr absl::string_view kInTokens = "the window is given in tokens";
  report.Useless(streaming.window_ratio() != 0.2, "window_ratio", kInTokens);
  report.Useless(streaming.budget_base() != BUDGET_BASE_LIMIT, "budget_base", kInTokens);
  report.Useless(streaming.has_budget_tokens(), "budget_tokens", kInTokens);
}

void CheckPaged(const Paged& paged, const std::string& path, ProblemList* problems) {
  if (paged.reservation() == Paged::RESERVATION_PAGED) return;
  const Reporter report(path, problems);
  report.Useless(paged.preemption() == Paged::PREEMPTION_SWAP, "preemption",
                 "what is reserved at admission is never preempted");
  report.Useless(paged.victim() != Paged::VICTIM_LAST_IN, "victim",
                 "what is reserved at admission is never preempted");
  report.Useless(paged.prefix_caching() == Paged::PREFIX_CACHING_SHARED, "prefix_caching",
                 "a reserved piece belongs to one request");
  report.Useless(paged.watermark() > 0, "watermark", "reservation takes all at admission");
  report.Useless(paged.admit_whole_prompt(), "admit_whole_prompt",
                 "reservation takes all at admission");
}

void CheckInfinigen(const Infinigen& infinigen, const Reporter& report) {
  CheckBudgetBase(infinigen, report);
  const bool all = infinigen.fetch() == Infinigen::FETCH_ALL;
  const bool bounded = infinigen.capacity() < 1;
  const bool request_columns = infinigen.columns() == Infinigen::COLUMNS_REQUEST;
  constexpr absl::string_view kAll = "fetch is \"all\": nothing is speculated";
  constexpr absl::string_view kForced = "force_fetch_ratio says how many entries are fetched";
  const bool forced = infinigen.has_force_fetch_ratio();
  const bool counts = !all && !forced;  // how many are fetched depends on the scores
  const absl::string_view uncounted = all ? kAll : kForced;
  report.Useless(!counts && infinigen.alpha() != 4, "alpha", uncounted);
  report.Useless(!counts && infinigen.max_kv_ratio() != 0.2, "max_kv_ratio", uncounted);
  report.Useless(!counts && infinigen.count_scope() != Infinigen::COUNT_SCOPE_REQUEST,
                 "count_scope", uncounted);
  report.Useless(!counts && !bounded && infinigen.budget_base() != BUDGET_BASE_LIMIT, "budget_base",
                 uncounted);
  report.Useless(all && infinigen.partial_weight_ratio() != 0.3, "partial_weight_ratio", kAll);
  report.Useless(all && infinigen.n_full_layers() != 2, "n_full_layers", kAll);
  report.Useless(all && !infinigen.prefetch(), "prefetch", kAll);
  report.Useless(all && infinigen.calibration_tokens() != 1024, "calibration_tokens", kAll);
  report.Useless(all && infinigen.column_score() != Infinigen::COLUMN_SCORE_PRODUCT, "column_score",
                 kAll);
  report.Useless(all && infinigen.rope_speculation() != Infinigen::ROPE_SPECULATION_EXACT,
                 "rope_speculation", kAll);
  report.Useless(all && forced, "force_fetch_ratio", kAll);
  report.Useless(all && infinigen.skew() == Infinigen::SKEW_FOLDED, "skew", kAll);
  report.Useless(all && request_columns, "columns", kAll);
  report.Useless(all && infinigen.gather() == Infinigen::GATHER_STAGED, "gather", kAll);
  report.Useless(all && infinigen.full_layers_on_device(), "full_layers_on_device",
                 "with fetch: all every layer is a full layer");
  report.Useless(!bounded && infinigen.eviction_policy() != Infinigen::EVICTION_POLICY_COUNTER,
                 "eviction_policy", "a capacity of 1 evicts nothing");
  if (all && bounded && infinigen.eviction_policy() != Infinigen::EVICTION_POLICY_FIFO) {
    report.Add("eviction_policy", "with fetch: all every entry is used in every step",
               "write fifo");
  }
  if (all || !request_columns) return;
  if (infinigen.prefill_history() != Infinigen::PREFILL_HISTORY_WHOLE) {
    report.Add("columns", "columns of a request need its prompt in one piece",
               "set prefill_history: whole");
  }
  if (infinigen.skew() == Infinigen::SKEW_FOLDED ||
      infinigen.rope_speculation() == Infinigen::ROPE_SPECULATION_PAIRED ||
      infinigen.column_score() == Infinigen::COLUMN_SCORE_UNION) {
    report.Add("columns", "columns of a request are ranked over the whole skewed keys",
               "use skew speculative, rope_speculation exact and column_score product or query");
  }
}

// What an arm needs of the trial around it.
void CheckArmInTrial(const TrialSpec& trial, absl::string_view prefix, ProblemList* problems) {
  const Arm& arm = trial.arm();
  const bool paged = arm.strategy() == "paged";
  if (trial.kv().dtype() == Kv::DTYPE_FP8_E4M3 && !paged) {
    Reporter(Join(prefix, "kv"), problems)
        .Add("dtype",
             absl::StrCat("fp8_e4m3 is stored by paged only, and arm ", arm.name(), " is ",
                          arm.strategy()),
             "give the paged arm a kv of its own: arms[].kv: {dtype: fp8_e4m3}");
  }
  const bool swaps = (paged && arm.paged().preemption() == Paged::PREEMPTION_SWAP) ||
                     (arm.strategy() == "h2o" && arm.h2o().preemption() == H2o::PREEMPTION_SWAP);
  if (swaps && trial.kv().host_bytes() == 0) {
    Reporter(Join(prefix, "kv"), problems)
        .Add("host_bytes", "0 leaves no room to swap to", "raise it, or preempt by recompute");
  }
  const Infinigen& infinigen = arm.infinigen();
  const bool speculates = arm.strategy() == "infinigen" &&
                          infinigen.fetch() != Infinigen::FETCH_ALL &&
                          !infinigen.has_force_fetch_ratio();
  if (speculates && trial.model().weights() == Model::WEIGHTS_RANDOM &&
      trial.engine().time() == Engine::TIME_MODELLED) {
    Reporter(Join(prefix, "arm.infinigen"), problems)
        .Add("force_fetch_ratio",
             "missing: modelled time of random weights computes no scores to count by",
             "give the share of the entries to fetch, such as 5%");
  }
  if (trial.kind() == TrialSpec::KIND_LOAD &&
      trial.load().samples() > trial.engine().max_num_seqs()) {
    Reporter(Join(prefix, "load"), problems)
        .Add("samples",
             absl::StrCat(trial.load().samples(),
                          " samples of a prompt run side by side, "
                          "more than the ",
                          trial.engine().max_num_seqs(), " sequences of engine.max_num_seqs"),
             "lower it, or raise max_num_seqs");
  }
}

void CheckArm(const Arm& arm, const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  const std::vector<std::string> names = StrategyNames(*Arm::descriptor());
  if (std::find(names.begin(), names.end(), arm.strategy()) == names.end()) {
    const std::optional<std::string> nearest = NearestName(arm.strategy(), names);
    problems->Add({.field = Join(path, "strategy"),
                   .value = arm.strategy(),
                   .what = "no such strategy",
                   .remedy = nearest ? absl::StrCat("did you mean \"", *nearest, "\"?")
                                     : absl::StrCat("known are ", absl::StrJoin(names, ", "))});
    return;
  }
  for (const std::string& name : names) {
    const auto* field = Arm::descriptor()->FindFieldByName(name);
    report.Useless(name != arm.strategy() && arm.GetReflection()->HasField(arm, field), name,
                   absl::StrCat("the arm's strategy is ", arm.strategy()));
  }
  if (arm.strategy() == "paged") CheckPaged(arm.paged(), Join(path, "paged"), problems);
  if (arm.strategy() == "h2o") CheckH2o(arm.h2o(), Join(path, "h2o"), problems);
  if (arm.strategy() == "streaming_llm") {
    CheckStreamingLlm(arm.streaming_llm(), Join(path, "streaming_llm"), problems);
  }
  if (arm.strategy() == "infinigen") {
    CheckInfinigen(arm.infinigen(), Reporter(Join(path, "infinigen"), problems));
  }
}

void CheckQuality(const Quality& quality, const Model& model, bool has_text,
                  const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  if (model.weights() == Model::WEIGHTS_RANDOM) {
    report.Add("", "random weights have no quality", "remove the block, or name trained weights");
  }
  if (!has_text) report.Add("text", "missing", "give a text to score, here or as load.text");
  if (quality.prefill() >= quality.context()) {
    report.Add("prefill",
               absl::StrCat("a prefill of ", quality.prefill(), " leaves nothing of a window of ",
                            quality.context(), " to score"),
               "write less than context");
  }
  if (quality.text_tokens() < quality.context()) {
    report.Add("text_tokens",
               absl::StrCat(quality.text_tokens(), " tokens are less than one window of ",
                            quality.context()),
               "write at least context");
  }
  const Passkey& passkey = quality.passkey();
  if (passkey.question() == Passkey::QUESTION_IN_PROMPT && passkey.digits() < 2) {
    report.Add(
        "passkey.digits",
        absl::StrCat(passkey.digits(), ": the first digit of question: in_prompt is not counted"),
        "write at least 2");
  }
}

// -------------------------------------------------------------------------------------- axes

bool IsSweepable(absl::string_view path) {
  return std::any_of(std::begin(kSweepable), std::end(kSweepable),
                     [&](absl::string_view group) { return absl::StartsWith(path, group); });
}

void CheckSweep(const Experiment& experiment, ProblemList* problems) {
  std::map<std::string, std::string> groups;
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) {
    const Reporter report(absl::StrCat("sweep.", group, ".", axis.path()), problems);
    const auto [other, fresh] = groups.emplace(axis.path(), group);
    if (!fresh) {
      report.Add("", absl::StrCat("is varied by sweep.", other->second, " too"),
                 "name it in one of them");
    }
    if (!IsSweepable(axis.path())) {
      report.Add("", "cannot be an axis of the sweep",
                 "vary load, kv or engine here and arms by arms[].grid; write one spec for each "
                 "model");
    } else if (axis.path() == "load.arrivals.seed") {
      report.Add("", "cannot be an axis: all cells share their seeds", "use repeats");
    }
  }
}

// Whether `arm` has a value of its own for `path`, "kv.device_bytes" or the like: fixed or as an
// axis.
bool SetsItself(const Arm& arm, absl::string_view path) {
  if (!absl::ConsumePrefix(&path, "kv.")) return false;
  const auto* field = Kv::descriptor()->FindFieldByName(std::string(path));
  return (field != nullptr && arm.kv().GetReflection()->HasField(arm.kv(), field)) ||
         absl::c_any_of(arm.grid(),
                        [&](const Axis& axis) { return axis.path() == absl::StrCat("kv.", path); });
}

// What an arm sets for itself cannot be varied from outside.
void CheckArmAxes(const Experiment& experiment, const Arm& arm, const std::string& path,
                  ProblemList* problems) {
  for (const Axis& axis : arm.grid()) {
    if (absl::StartsWith(axis.path(), "kv.") ||
        absl::StartsWith(axis.path(), absl::StrCat(arm.strategy(), "."))) {
      continue;
    }
    Reporter(absl::StrCat(path, ".grid.", axis.path()), problems)
        .Add("", "cannot be an axis of this arm",
             absl::StrCat("vary fields of ", arm.strategy(), " or kv"));
  }
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) {
    if (!absl::StartsWith(axis.path(), "kv.")) continue;
    if (!SetsItself(arm, axis.path())) continue;
    Reporter(path, problems)
        .Add(axis.path(), "overrides what the sweep varies, so that its cells would be equal",
             "remove one of the two");
  }
}

// The value of an axis that comes first: with these, the spec is one trial that can be judged.
// Unsound axes have been reported by their own check.
template <typename M>
void ApplyFirstValue(const Axis& axis, M* message) {
  if (axis.values_size() > 0) SetField(message, axis.path(), axis.values(0)).IgnoreError();
}

// Equal bytes are claimed by default, so whoever gives arms different ones has to say what is
// claimed instead.
void CheckEqualBytes(const Experiment& experiment, ProblemList* problems) {
  if (experiment.regime() != Experiment::REGIME_EQUAL_DEVICE_BYTES) return;
  // Arms that override an axis are reported by its own check.
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) {
    if (axis.path() == "kv.device_bytes") return;
  }
  const auto report = [&](const std::string& field) {
    problems->Add({.field = field,
                   .what = "gives arms different device memory, and the regime is "
                           "equal_device_bytes",
                   .remedy = "give all the same, or write \"regime: kv_fits\" or \"regime: "
                             "equal_batch\""});
  };
  std::optional<uint64_t> bytes;
  for (int i = 0; i < experiment.arms_size(); ++i) {
    Arm arm = experiment.arms(i);
    for (const Axis& axis : experiment.arms(i).grid()) {
      if (axis.path() != "kv.device_bytes") continue;
      if (axis.values_size() > 1) {
        return report(absl::StrCat("arms[", i, "].grid.kv.device_bytes"));
      }
      ApplyFirstValue(axis, &arm);
    }
    const Kv& kv = arm.kv().has_device_bytes() ? arm.kv() : experiment.kv();
    if (bytes && *bytes != kv.device_bytes()) {
      return report(absl::StrCat("arms[", i, "].kv.device_bytes"));
    }
    bytes = kv.device_bytes();
  }
}

void CheckReference(const Experiment& experiment, ProblemList* problems) {
  if (!experiment.has_reference()) return;
  std::vector<std::string> names;
  for (const Arm& arm : experiment.arms()) {
    names.push_back(arm.name());
    if (experiment.reference() == arm.name() ||
        (arm.grid_size() > 0 && absl::StartsWith(experiment.reference(), arm.name() + "/"))) {
      return;
    }
  }
  problems->Add({.field = "reference",
                 .value = experiment.reference(),
                 .what = "names no arm",
                 .remedy = absl::StrCat("write one of ", absl::StrJoin(names, ", "))});
}

// ------------------------------------------------------------------------------------ loading

// An override must take effect: nobody looks at a spec for why it did not.
absl::Status CheckOverrideReaches(const std::string& path, const Experiment& experiment) {
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) {
    if (axis.path() != path) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "override: ", path, ": has no effect, since the sweep varies it; edit the sweep"));
  }
  std::vector<std::string> names;
  for (const Arm& arm : experiment.arms()) {
    if (!SetsItself(arm, path)) return absl::OkStatus();
    names.push_back(arm.name());
  }
  if (names.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("override: ", path, ": has no effect, since every arm has a value of its own (",
                   absl::StrJoin(names, ", "), "); edit arms[].", path,
                   " in the spec, or remove it there and override it here"));
}

absl::Status ApplyOverrides(const std::vector<std::string>& overrides, Experiment* experiment) {
  for (const std::string& text : overrides) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('=', 1));
    if (!absl::StrContains(text, '=')) {
      return absl::InvalidArgumentError(
          absl::StrCat("override \"", text, "\": write path=value, such as kv.device_bytes=12MiB"));
    }
    RETURN_IF_ERROR(Annotate(SetField(experiment, parts.first, parts.second), "override"));
    RETURN_IF_ERROR(CheckOverrideReaches(parts.first, *experiment));
  }
  return absl::OkStatus();
}

// Reads the traces that travel, so that a damaged one is told before anything runs; larger ones are
// left to the runner. What a replay needs of its trace is held to the first values of all axes.
void CheckTraces(const Experiment& experiment, const ResolvedInputs& resolved,
                 ProblemList* problems) {
  Experiment first = experiment;
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) ApplyFirstValue(axis, &first);
  ApplyDefaults(first.mutable_load());
  std::set<std::string> seen;
  for (const NamedPath& named : FindNamedPaths(experiment)) {
    if (!absl::EndsWith(named.field, "load.lengths.trace") || !seen.insert(named.value).second) {
      continue;
    }
    const FileReference* file = resolved.inputs.FindFile(named.value);
    if (file == nullptr || file->bytes() > uint64_t{limits::kTravellingFileBytes}) continue;
    const absl::StatusOr<std::string> text =
        ReadFile(resolved.local_paths.at(named.value), limits::kTravellingFileBytes);
    const absl::StatusOr<Trace> trace =
        text.ok() ? ParseTrace(*text, named.value) : absl::StatusOr<Trace>(text.status());
    absl::Status status = trace.status();
    const bool replayed = first.load().arrivals().process() == Arrivals::PROCESS_REPLAY &&
                          first.load().lengths().trace() == named.value;
    if (status.ok() && replayed) {
      status = DrawArrivals(first.load().arrivals(), 0, &*trace).status();
    }
    if (!status.ok()) {
      problems->Add({.field = named.field, .what = std::string(status.message())});
    }
  }
}

// Reads and checks a text; `places` receives where its fields stand.
absl::StatusOr<Experiment> Parse(absl::string_view text, absl::string_view source,
                                 const LoadOptions& options, SourceMap* places) {
  ProblemList problems;
  Experiment experiment;
  if (!ReadText(text, {.environment = options.environment}, &experiment, places, &problems)) {
    return problems.ToStatus(source);
  }
  RETURN_IF_ERROR(ApplyOverrides(options.overrides, &experiment));
  CheckMessage(experiment, "", &problems);
  if (problems.empty()) CheckExperiment(experiment, &problems);
  RETURN_IF_ERROR(problems.Located(*places).ToStatus(source));
  return experiment;
}

}  // namespace

std::string RegimeName(Experiment::Regime regime) {
  const std::string& name = Experiment::Regime_Name(regime);
  return absl::AsciiStrToLower(absl::StripPrefix(name, "REGIME_"));
}

std::vector<SweepAxis> SweepAxes(const Sweep& sweep) {
  std::vector<SweepAxis> axes;
  for (const Axis& axis : sweep.grid()) axes.push_back({axis, "grid"});
  for (const Axis& axis : sweep.zip()) axes.push_back({axis, "zip"});
  for (const Axis& axis : sweep.list()) axes.push_back({axis, "list"});
  return axes;
}

void ApplyArmDefaults(Arm* arm) {
  const std::vector<std::string> names = StrategyNames(*Arm::descriptor());
  if (std::find(names.begin(), names.end(), arm->strategy()) == names.end()) return;
  const auto* field = Arm::descriptor()->FindFieldByName(arm->strategy());
  ApplyDefaults(arm->GetReflection()->MutableMessage(arm, field));
}

void CheckTrial(const TrialSpec& trial, absl::string_view prefix, ProblemList* problems) {
  CheckModel(trial.model(), Join(prefix, "model"), problems);
  CheckKv(trial.kv(), Join(prefix, "kv"), problems);
  CheckEngine(trial.engine(), Join(prefix, "engine"), problems);
  CheckArm(trial.arm(), Join(prefix, "arm"), problems);
  CheckArmInTrial(trial, prefix, problems);
  if (trial.kind() == TrialSpec::KIND_QUALITY) {
    CheckQuality(trial.quality(), trial.model(), trial.quality().has_text(),
                 Join(prefix, "quality"), problems);
  } else {
    CheckLoad(trial.load(), Join(prefix, "load"), problems);
    CheckRegime(trial.regime(), trial.load(), trial.engine(), problems);
  }
}

void CheckExperiment(const Experiment& experiment, ProblemList* problems) {
  CheckName(experiment.name(), "name", problems);
  CheckSweep(experiment, problems);
  CheckReference(experiment, problems);

  Experiment first = experiment;
  first.mutable_engine();
  for (const auto& [axis, group] : SweepAxes(experiment.sweep())) ApplyFirstValue(axis, &first);
  CheckModel(first.model(), "model", problems);
  CheckLoad(first.load(), "load", problems);
  ApplyDefaults(first.mutable_engine());
  CheckRegime(first.regime(), first.load(), first.engine(), problems);
  CheckEqualBytes(experiment, problems);
  CheckEngine(first.engine(), "engine", problems);
  if (first.has_quality()) {
    ApplyDefaults(first.mutable_quality());
    CheckQuality(first.quality(), first.model(),
                 first.quality().has_text() || first.load().has_text(), "quality", problems);
  }

  std::set<std::string> names;
  bool every_arm_has_bytes = true;
  for (int i = 0; i < experiment.arms_size(); ++i) {
    const std::string path = absl::StrCat("arms[", i, "]");
    Arm arm = experiment.arms(i);
    CheckName(arm.name(), absl::StrCat(path, ".name"), problems);
    if (!names.insert(arm.name()).second) {
      problems->Add({.field = absl::StrCat(path, ".name"),
                     .value = arm.name(),
                     .what = "is the name of another arm",
                     .remedy = "name each arm differently"});
    }
    CheckArmAxes(experiment, arm, path, problems);
    for (const Axis& axis : experiment.arms(i).grid()) ApplyFirstValue(axis, &arm);
    ApplyArmDefaults(&arm);
    CheckArm(arm, path, problems);
    every_arm_has_bytes = every_arm_has_bytes && arm.kv().has_device_bytes();
  }
  if (!every_arm_has_bytes) CheckKv(first.kv(), "kv", problems);
}

absl::Status ValidateExperiment(const Experiment& experiment) {
  ProblemList problems;
  CheckMessage(experiment, "", &problems);
  if (problems.empty()) CheckExperiment(experiment, &problems);
  return problems.ToStatus("experiment");
}

absl::StatusOr<Experiment> ParseExperiment(absl::string_view text, absl::string_view source,
                                           const LoadOptions& options) {
  SourceMap places;
  return Parse(text, source, options, &places);
}

absl::StatusOr<LoadedExperiment> LoadExperiment(const std::string& path,
                                                const LoadOptions& options) {
  LoadedExperiment loaded;
  ASSIGN_OR_RETURN(loaded.text, ReadFile(path, limits::kSpecFileBytes));
  loaded.source = path;
  SourceMap places;
  ASSIGN_OR_RETURN(loaded.experiment, Parse(loaded.text, path, options, &places));
  ProblemList problems;
  loaded.resolved = ResolveInputs(loaded.experiment,
                                  std::filesystem::path(path).parent_path().string(), &problems);
  if (problems.empty()) CheckTraces(loaded.experiment, loaded.resolved, &problems);
  if (problems.empty() && options.check) {
    options.check(loaded.experiment, loaded.resolved, &problems);
  }
  RETURN_IF_ERROR(problems.Located(places).ToStatus(path));
  return loaded;
}

Environment SystemEnvironment() {
  return [](absl::string_view name) -> std::optional<std::string> {
    const char* value = std::getenv(std::string(name).c_str());
    if (value == nullptr) return std::nullopt;
    return std::string(value);
  };
}

}  // namespace kvsweep
