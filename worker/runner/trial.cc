#include "worker/runner/trial.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "base/version.h"
#include "experiments/matrix.h"
#include "experiments/metrics.h"
#include "experiments/spec.h"
#include "experiments/stats.h"
#include "worker/engine/manual_steps.h"

namespace kvsweep {
namespace {

// Windows or prompts of a quality trial side by side at most, and bytes of the full cache's logits
// at a time.
constexpr int32_t kSideBySide = 16;
constexpr uint64_t kReferenceLogitsBytes = uint64_t{128} << 20;

// The number behind `word` in a message, "asked 4096"; 0 if there is none.
uint64_t NumberAfter(absl::string_view message, absl::string_view word) {
  const size_t at = message.find(word);
  if (at == absl::string_view::npos) return 0;
  absl::string_view digits = message.substr(at + word.size());
  size_t count = 0;
  while (count < digits.size() && absl::ascii_isdigit(digits[count])) ++count;
  uint64_t number = 0;
  return absl::SimpleAtoi(digits.substr(0, count), &number) ? number : 0;
}

// Each request `samples` times, one behind the other.
std::vector<ServeRequest> ScheduleOf(const Workload& workload, uint32_t samples) {
  std::vector<ServeRequest> schedule;
  schedule.reserve(workload.requests().size() * samples);
  for (const WorkloadRequest& request : workload.requests()) {
    schedule.push_back({.arrival_ns = request.arrival.time_ns,
                        .after_ended = request.arrival.after_ended,
                        .think_ns = request.think_ns,
                        .prompt_tokens = static_cast<int32_t>(request.prompt_tokens),
                        .history_tokens = static_cast<int32_t>(request.history_tokens),
                        .output_tokens = static_cast<int32_t>(request.output_tokens),
                        .max_tokens = static_cast<int32_t>(request.max_tokens),
                        .session = request.session,
                        .turn = request.turn,
                        .last_turn = request.last_turn});
    for (uint32_t sample = 1; sample < samples; ++sample) {
      schedule.push_back(schedule.back());
      schedule.back().sample = sample;
    }
  }
  return schedule;
}

// The full cache that quality is measured against.
Arm ReferenceArm() {
  Arm arm;
  arm.set_name("full cache");
  arm.set_strategy("paged");
  arm.mutable_paged()->set_block_size(16);
  arm.mutable_paged()->set_watermark(0);
  return arm;
}

double ToMs(int64_t nanoseconds) { return static_cast<double>(nanoseconds) / kNsPerMs; }

const char* YesNo(bool value) { return value ? "yes" : "no"; }

}  // namespace

TrialOutcome OutcomeOfError(const absl::Status& status) {
  TrialOutcome outcome;
  // It may quote bytes of a file, and frames are UTF-8.
  std::string evidence(status.message().substr(0, limits::kEvidenceBytes));
  if (!IsValidUtf8(evidence)) {
    for (char& byte : evidence) {
      if (static_cast<unsigned char>(byte) >= 0x80) byte = '?';
    }
  }
  outcome.set_evidence(std::move(evidence));
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      outcome.set_outcome(OUTCOME_OOM);
      outcome.set_asked_bytes(NumberAfter(status.message(), "asked "));
      outcome.set_available_bytes(NumberAfter(status.message(), "available "));
      break;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kOutOfRange:
      outcome.set_outcome(OUTCOME_INFEASIBLE);
      break;
    case absl::StatusCode::kDeadlineExceeded:
      outcome.set_outcome(OUTCOME_TIMEOUT);
      break;
    case absl::StatusCode::kCancelled:
      outcome.set_outcome(OUTCOME_CANCELLED);
      break;
    default:
      outcome.set_outcome(OUTCOME_CRASHED);
  }
  return outcome;
}

Trial::Trial(const RunTrial& request, const TrialContext& context)
    : request_(request), context_(context), begun_ns_(RealClock::Get().NowNs()) {
  progress_.set_trial_id(request.trial_id());
}

void Trial::Run() {
  struct Phase {
    const char* name;
    absl::Status (Trial::*run)();
  };
  static constexpr std::array<Phase, 8> kPhases = {{{"check", &Trial::Check},
                                                    {"load", &Trial::Load},
                                                    {"prepare", &Trial::Prepare},
                                                    {"warm up", &Trial::WarmUp},
                                                    {"measure", &Trial::Measure},
                                                    {"profile", &Trial::Profile},
                                                    {"drain", &Trial::Drain},
                                                    {"summarise", &Trial::Summarise}}};
  for (const Phase& phase : kPhases) {
    EnterPhase(phase.name, 0);
    absl::Status status = (this->*phase.run)();
    if (status.ok() && context_.cancel->load(std::memory_order_relaxed)) {
      status = absl::CancelledError("cancelled");
    }
    if (!status.ok() && outcome_.outcome() == OUTCOME_OK) {
      const int64_t duration_ns = outcome_.duration_ns();
      outcome_ = OutcomeOfError(status);
      outcome_.set_duration_ns(duration_ns);
    }
    if (!status.ok()) break;
  }
  outcome_.set_phase(progress_.phase());
  if (!started_) EmitStart();
  EmitOutcome();
}

// ------------------------------------------------------------------------------------------ check

absl::Status Trial::Check() {
  const TrialSpec& spec = request_.spec();
  ProblemList problems;
  CheckTrial(spec, "", &problems);
  RETURN_IF_ERROR(problems.ToStatus("trial"));
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------- prepare

EngineOptions Trial::ArmOptions() const {
  const TrialSpec& spec = request_.spec();
  EngineOptions options{
      .max_sequences = static_cast<int32_t>(spec.engine().max_num_seqs()),
      .max_batched_tokens = static_cast<int32_t>(spec.engine().max_num_batched_tokens()),
      .max_context = is_quality() ? quality_.context : static_cast<int32_t>(workload_->max_total()),
      .chunked_prefill = spec.engine().chunked_prefill(),
      .graphs = spec.engine().graphs(),
      .logits = is_quality() ? LogitsMode::kLast : LogitsMode::kNone,
      .kv_dtype = kv_dtype_,
      .device_bytes = spec.kv().device_bytes(),
      .host_bytes = spec.kv().host_bytes()};
  if (is_quality()) {
    options.max_sequences =
        std::min({options.max_sequences, kSideBySide,
                  std::max(quality_.windows, static_cast<int32_t>(passkeys_.size()))});
  }
  return options;
}

absl::Status Trial::Prepare() {
  ASSIGN_OR_RETURN(engine_, InferenceEngine::Create(backend_, model_, request_.spec().arm(),
                                                    ArmOptions(), calibration_));
  if (engine_->chunk_alignment() > engine_->options().max_batched_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "engine.max_num_batched_tokens: ", engine_->options().max_batched_tokens, ": ",
        request_.spec().arm().strategy(), " computes prompts in chunks of multiples of ",
        engine_->chunk_alignment(), " tokens; raise it to at least that"));
  }
  if (is_quality()) {
    engine_->strategy().Diagnose();
    RETURN_IF_ERROR(PrepareReference());
  }
  return CheckPreparation();
}

// Decides what runs side by side, and makes the full cache unless the arms before have asked it the
// same.
absl::Status Trial::PrepareReference() {
  side_by_side_ = WindowsSideBySide(engine_.get(), quality_);
  passkeys_side_by_side_ = static_cast<int32_t>(passkeys_.size());
  for (const PasskeyPrompt& prompt : passkeys_) {
    passkeys_side_by_side_ =
        SequencesSideBySide(engine_.get(), prompt.shape(), passkeys_side_by_side_);
  }
  if (side_by_side_ == 0 || (!passkeys_.empty() && passkeys_side_by_side_ == 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv.device_bytes: no room for one quality window of ", quality_.context,
                     " tokens; raise it or lower quality.context"));
  }
  // The batch is part of the question: it decides the last bits of the answer.
  TrialSpec question = request_.spec();
  question.clear_arm();
  const std::string key =
      absl::StrCat(question.SerializeAsString(), " ", side_by_side_, " ", passkeys_side_by_side_);
  KnownReference& known = *context_.reference;
  if (known.question != key) known = {.question = key};
  if (!known.logits.complete) {
    ASSIGN_OR_RETURN(reference_, InferenceEngine::Create(
                                     backend_, model_, ReferenceArm(),
                                     ReferenceOptions(model_->config(), quality_, side_by_side_,
                                                      kv_dtype_, kReferenceLogitsBytes),
                                     {}));
  }
  if (known.passkeys.size() < passkeys_.size()) {
    known.passkeys.clear();
    ASSIGN_OR_RETURN(
        passkey_reference_,
        InferenceEngine::Create(backend_, model_, ReferenceArm(),
                                PasskeyReferenceOptions(model_->config(), quality_.context,
                                                        passkeys_side_by_side_, kv_dtype_),
                                {}));
  }
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------- warm up

absl::Status Trial::WarmUp() {
  if (warmup_ != nullptr) RETURN_IF_ERROR(ServeWarmup());
  // Only where it saves time: a graph of the CPU backend is a list.
  if (!is_quality() && backend_->info().beside_host) RETURN_IF_ERROR(CaptureSteps());
  return CheckPreparation();
}

absl::Status Trial::CaptureSteps() {
  const int64_t begun_ns = RealClock::Get().NowNs();
  RETURN_IF_ERROR(engine_->CaptureSteps());
  capture_ns_ = RealClock::Get().NowNs() - begun_ns;
  captured_graphs_ = engine_->captured_graphs();
  return absl::OkStatus();
}

absl::Status Trial::ServeWarmup() {
  const std::vector<ServeRequest> requests = ScheduleOf(*warmup_, samples());
  const ServeSchedule schedule{.requests = requests,
                               .copy_prompt = [this](size_t index, std::span<int32_t> prompt) {
                                 warmup_->CopyPrompt(index / samples(), prompt);
                               }};
  // Real time even in a modelled trial: its clock starts with the measurement.
  const ServeOptions options{
      .clock = &RealClock::Get(),
      .time_limit_ns = static_cast<int64_t>(request_.spec().limits().prepare()),
      .cancel = context_.cancel,
      .progress = [this](size_t done) { ReportProgress(done); },
      .run_ahead = runs_ahead()};
  EnterPhase("warm up", requests.size());
  const int64_t serving_ns = RealClock::Get().NowNs();
  ASSIGN_OR_RETURN(const ServeResult served,
                   ServeLoad(engine_.get(), schedule, options, [](RequestRow) { return true; }));
  start_ns_ = serving_ns - begun_ns_ + served.first_step_ns;
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------- measure

absl::Status Trial::Measure() {
  EmitStart();
  const uint64_t device_bytes = backend_->allocated_bytes(Tier::kDevice);
  const uint64_t host_bytes = backend_->allocated_bytes(Tier::kHost);
  const std::unique_ptr<DeviceSampler> sampler = SampleDevice();
  RETURN_IF_ERROR(is_quality() ? MeasureQuality() : MeasureLoad());
  // Here, since the profiling pass goes through the same strategy.
  figures_ = engine_->strategy().Figures();
  if (sampler != nullptr) device_use_ = sampler->End();
  if (capture_ns_ > 0) KVSWEEP_CHECK_EQ(engine_->captured_graphs(), captured_graphs_);
  // All memory was taken before the measurement.
  KVSWEEP_CHECK_EQ(backend_->allocated_bytes(Tier::kDevice), device_bytes);
  KVSWEEP_CHECK_EQ(backend_->allocated_bytes(Tier::kHost), host_bytes);
  return absl::OkStatus();
}

absl::Status Trial::MeasureLoad() {
  const Arrivals& arrivals = request_.spec().load().arrivals();
  const std::vector<ServeRequest> requests = ScheduleOf(*workload_, samples());
  const ServeSchedule schedule{.requests = requests,
                               .copy_prompt =
                                   [this](size_t index, std::span<int32_t> prompt) {
                                     workload_->CopyPrompt(index / samples(), prompt);
                                   },
                               .open_loop = IsOpenLoop(arrivals)};
  const auto limit_ns = static_cast<int64_t>(request_.spec().limits().trial());
  const ServeOptions options{
      .clock = &clock(),
      .modelled = modelled(),
      .time_limit_ns = limit_ns,
      .wall = is_modelled() ? context_.wall : nullptr,
      .wall_deadline_ns = context_.wall->NowNs() + limit_ns,
      .cancel = context_.cancel,
      .progress = [this](size_t done) { ReportProgress(done); },
      .run_ahead = runs_ahead()};
  EnterPhase("measure", requests.size());
  ASSIGN_OR_RETURN(served_, ServeLoad(engine_.get(), schedule, options, [this](RequestRow row) {
                     Record record = NewRecord();
                     *record.mutable_request() = std::move(row);
                     return context_.recorder->Offer(std::move(record));
                   }));
  outcome_.set_duration_ns(served_.duration_ns);
  JudgeLoad();
  return absl::OkStatus();
}

// In modelled time the limit holds of both clocks: what a timeout says beside its length.
const char* Trial::OfWhichClock(int64_t duration_ns) const {
  if (!is_modelled()) return "";
  const auto limit_ns = static_cast<int64_t>(request_.spec().limits().trial());
  return duration_ns < limit_ns ? " of real time" : " of modelled time";
}

void Trial::JudgeLoad() {
  const auto judge = [this](Outcome outcome, std::string evidence) {
    outcome_.set_outcome(outcome);
    outcome_.set_evidence(std::move(evidence));
  };
  const size_t total = workload_->requests().size();
  const std::array<double, 3>& waiting = served_.waiting_by_third;
  switch (served_.end) {
    case ServeResult::End::kCancelled:
      return judge(OUTCOME_CANCELLED, absl::StrCat("cancelled with ", served_.completed, " of ",
                                                   total, " requests served"));
    case ServeResult::End::kSinkFull:
      return judge(OUTCOME_RECORDER_OVERFLOW,
                   absl::StrCat("the worker took records too slowly: ", limits::kRecorderRows,
                                " wait, ", served_.completed, " of ", total, " requests served"));
    case ServeResult::End::kTimeLimit:
      return judge(OUTCOME_TIMEOUT,
                   absl::StrCat(served_.completed, " of ", total, " requests served within ",
                                request_.spec().limits().trial(), " ns",
                                OfWhichClock(served_.duration_ns), "; raise limits.trial"));
    case ServeResult::End::kServedAll:
      break;
  }
  if (served_.infeasible > 0) {
    judge(OUTCOME_INFEASIBLE,
          absl::StrCat(served_.infeasible, " of ", total, " requests can never fit ",
                       request_.spec().kv().device_bytes(), " bytes on the device and ",
                       request_.spec().kv().host_bytes(), " on the host"));
  } else if (served_.queue_grows) {
    judge(
        OUTCOME_UNSTABLE,
        absl::StrFormat("the queue kept growing: %.1f, %.1f and %.1f requests waited, in the mean "
                        "of the first, second and last third of %d arrivals",
                        waiting[0], waiting[1], waiting[2], total));
  }
}

absl::Status Trial::MeasureQuality() {
  const QualityOptions options{
      .clock = &clock(),
      .modelled = modelled(),
      .time_limit_ns = static_cast<int64_t>(request_.spec().limits().trial()),
      .cancel = context_.cancel,
      .progress = [this](size_t done) { ReportProgress(done); }};
  EnterPhase("measure", static_cast<uint64_t>(quality_.windows));
  ASSIGN_OR_RETURN(scored_, ScoreText(reference_.get(), engine_.get(), quality_, side_by_side_,
                                      options, &context_.reference->logits, [this](QualityRow row) {
                                        Record record = NewRecord();
                                        *record.mutable_quality() = std::move(row);
                                        return context_.recorder->Offer(std::move(record));
                                      }));
  outcome_.set_duration_ns(scored_.duration_ns);
  JudgeQuality("windows scored", static_cast<size_t>(quality_.windows));
  if (scored_.end == QualityResult::End::kScoredAll && !passkeys_.empty()) {
    return MeasurePasskeys();
  }
  return absl::OkStatus();
}

absl::Status Trial::MeasurePasskeys() {
  const auto limit_ns = static_cast<int64_t>(request_.spec().limits().trial());
  const QualityOptions options{.clock = &clock(),
                               .modelled = modelled(),
                               .time_limit_ns = limit_ns - std::min(limit_ns, scored_.duration_ns),
                               .cancel = context_.cancel,
                               .progress = [this](size_t done) { ReportProgress(done); }};
  EnterPhase("measure", passkeys_.size());
  const int64_t start_ns = clock().NowNs();
  ASSIGN_OR_RETURN(
      scored_.end,
      RecallPasskeys(passkey_reference_.get(), engine_.get(), passkeys_, passkeys_side_by_side_,
                     options, &context_.reference->passkeys, [this](PasskeyRow row) {
                       Record record = NewRecord();
                       *record.mutable_passkey() = std::move(row);
                       return context_.recorder->Offer(std::move(record));
                     }));
  outcome_.set_duration_ns(scored_.duration_ns + clock().NowNs() - start_ns);
  JudgeQuality("pass keys asked", passkeys_.size());
  return absl::OkStatus();
}

void Trial::JudgeQuality(absl::string_view what, size_t of) {
  const auto judge = [&](Outcome outcome) {
    outcome_.set_outcome(outcome);
    outcome_.set_evidence(absl::StrCat(progress_.done(), " of ", of, " ", what));
  };
  if (scored_.end == QualityResult::End::kCancelled) judge(OUTCOME_CANCELLED);
  if (scored_.end == QualityResult::End::kTimeLimit) judge(OUTCOME_TIMEOUT);
  if (scored_.end == QualityResult::End::kSinkFull) judge(OUTCOME_RECORDER_OVERFLOW);
}

// ------------------------------------------------------------------------------ drain, summarise

absl::Status Trial::Drain() {
  context_.recorder->Flush();
  return absl::OkStatus();
}

absl::Status Trial::Summarise() {
  if (is_quality()) {
    EmitCounter(recorded::kSteps, -1, static_cast<double>(scored_.steps));
    SummariseLayers(scored_.attended_by_layer, scored_.decode_rows);
  } else {
    SummariseLoad();
    SummariseSteps();
    SummariseLayers(served_.attended_by_layer, served_.decode_tokens);
  }
  SummariseDevice();
  for (const CacheStrategy::Figure& figure : figures_) {
    EmitCounter(figure.name, figure.layer, figure.value);
  }
  return absl::OkStatus();
}

void Trial::SummariseLoad() {
  const auto count = [this](absl::string_view name, auto value) {
    EmitCounter(name, -1, static_cast<double>(value));
  };
  count(recorded::kKvDeviceBytesPeak, served_.peak.device);
  count(recorded::kKvHostBytesPeak, served_.peak.host);
  count("kv_live_bytes_peak", served_.live_device_bytes_peak);
  count(recorded::kKvBytesHostToDevice, served_.kv_bytes_to_device);
  count(recorded::kKvBytesDeviceToHost, served_.kv_bytes_to_host);
  count(recorded::kSteps, served_.steps);
  count("captured_steps", served_.captured_steps);
  count(recorded::kMemoryShortSteps, served_.memory_short_steps);
  count("prefill_tokens", served_.prefill_tokens);
  count("decode_tokens", served_.decode_tokens);
  count("preemptions", served_.preemptions);
  count("recomputed_tokens", served_.recomputed_tokens);
  SummariseHost();
  for (const StepSample& sample : served_.samples) {
    const auto point = [&](absl::string_view name, auto value) {
      EmitSample(name, sample.time_ns, static_cast<double>(value));
    };
    point(recorded::kKvDeviceBytes, sample.reserved.device);
    point(recorded::kKvLiveBytes, sample.live_device_bytes);
    point(recorded::kKvHostBytes, sample.reserved.host);
    point(recorded::kRunning, sample.running);
    point(recorded::kWaiting, sample.waiting);
    point(recorded::kStepNs, sample.step_ns);
  }
}

// What the host did while it was no step's turn: the trial's start, captures, and how long the
// device had nothing to do between a step and the one behind it.
void Trial::SummariseHost() {
  if (is_modelled()) return;
  if (start_ns_ > 0) EmitCounter("trial_start_ms", -1, ToMs(start_ns_));
  if (!backend_->info().beside_host) return;
  EmitCounter("captured_graphs", -1, static_cast<double>(captured_graphs_));
  EmitCounter("capture_ms", -1, ToMs(capture_ns_));
  if (served_.gap_ns.empty()) return;
  std::vector<double> sorted(served_.gap_ns.begin(), served_.gap_ns.end());
  std::ranges::sort(sorted);
  const double all_ns = std::accumulate(sorted.begin(), sorted.end(), 0.0);
  EmitCounter("host_gap_us_median", -1, Percentile(sorted, 0.5) / kNsPerUs);
  EmitCounter("host_gap_us_p99", -1, Percentile(sorted, 0.99) / kNsPerUs);
  EmitCounter("host_gap_share", -1, all_ns / (all_ns + served_.stepped_ns));
}

// Attended fraction, mean over decode rows: of each layer, of all, and of those that the arm does
// not keep in full by its own parameters.
void Trial::SummariseLayers(std::span<const double> attended_by_layer, int64_t decode_rows) {
  if (decode_rows == 0) return;
  const size_t full = static_cast<size_t>(engine_->strategy().declared_full_layers());
  const size_t layers = attended_by_layer.size();
  double all = 0;
  double beyond = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    const double fraction = attended_by_layer[layer] / static_cast<double>(decode_rows);
    EmitCounter(recorded::kAttendedFraction, static_cast<int32_t>(layer), fraction);
    all += fraction;
    if (layer >= full) beyond += fraction;
  }
  EmitCounter(recorded::kAttendedFraction, -1, all / static_cast<double>(layers));
  if (full >= layers) return;
  EmitCounter(recorded::kAttendedBeyondFull, -1, beyond / static_cast<double>(layers - full));
}

// ---------------------------------------------------------------------------------------- records

void Trial::EnterPhase(absl::string_view phase, uint64_t total) {
  progress_.set_phase(std::string(phase));
  progress_.set_done(0);
  progress_.set_total(total);
  context_.recorder->SetProgress(progress_);
}

void Trial::ReportProgress(uint64_t done) {
  progress_.set_done(done);
  context_.recorder->SetProgress(progress_);
}

// limits.prepare covers everything before the measurement.
absl::Status Trial::CheckPreparation() const {
  const int64_t elapsed_ns = RealClock::Get().NowNs() - begun_ns_;
  const int64_t limit_ns = static_cast<int64_t>(request_.spec().limits().prepare());
  if (elapsed_ns <= limit_ns) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat(
      elapsed_ns, " ns of loading and preparing; limits.prepare is ", limit_ns, " ns"));
}

Record Trial::NewRecord() const {
  Record record;
  record.set_trial_id(request_.trial_id());
  return record;
}

void Trial::EmitStart() {
  started_ = true;
  const TrialSpec& spec = request_.spec();
  Record record = NewRecord();
  TrialStart* start = record.mutable_start();
  if (backend_ != nullptr) {
    start->set_backend(backend_->info().backend);
    start->set_device(backend_->info().device);
    // Threads that a spec asks for are part of its key, not of the device.
    start->set_device_class(is_modelled() || context_.slot_device_class.empty()
                                ? backend_->info().device_class
                                : context_.slot_device_class);
    start->set_driver(backend_->info().driver);
  }
  start->set_runner_build(GetBuildInfo().runner_digest);
  start->set_method_version(kMethodVersion);
  start->set_time_mode(is_modelled() ? absl::StrCat("modelled:", spec.engine().device_profile())
                                     : "real");
  start->set_started_unix_ns(RealClock::Get().UnixNs());
  start->set_execution(request_.execution());
  AddFacts(start);
  AddNodeFacts(start);
  context_.recorder->Put(std::move(record));
}

void Trial::AddFacts(TrialStart* start) const {
  const TrialSpec& spec = request_.spec();
  auto& facts = *start->mutable_facts();
  const BuildInfo& build = GetBuildInfo();
  facts["version"] = build.version;
  facts["commit"] = build.commit;
  facts["compiler"] = build.compiler;
  facts["flags"] = build.flags;
  facts["threads"] = absl::StrCat(context_.device->OptionsOf(spec.engine()).threads);
  facts["stream_seed"] = absl::StrCat(spec.engine().stream_seed());
  facts["batch_invariant"] = YesNo(spec.engine().batch_invariant());
  facts["graphs"] = YesNo(spec.engine().graphs());
  if (backend_ != nullptr) facts["run_ahead"] = YesNo(runs_ahead());
  if (engine_ == nullptr) return;
  const EngineOptions& options = engine_->options();
  const uint64_t token_bytes =
      static_cast<uint64_t>(model_->config().KvBytesPerToken(options.kv_dtype));
  facts["kv_dtype"] = DTypeName(options.kv_dtype);
  facts["kv_bytes_per_token"] = absl::StrCat(token_bytes);
  facts["device_budget_tokens"] = absl::StrCat(options.device_bytes / token_bytes);
  facts["fixed_device_bytes"] = absl::StrCat(engine_->manager().FixedBytes().device);
  facts["fixed_host_bytes"] = absl::StrCat(engine_->manager().FixedBytes().host);
  facts["max_context"] = absl::StrCat(options.max_context);
  facts["chunk_alignment"] = absl::StrCat(engine_->chunk_alignment());
  facts["max_batched_tokens"] = absl::StrCat(options.max_batched_tokens);
  const int32_t prompt = is_quality() ? quality_.prefill : options.max_context - 1;
  const int32_t budget = engine_->strategy().TokenBudget({prompt, options.max_context - prompt});
  facts["token_budget"] = budget < 0 ? "all" : absl::StrCat(budget);
  facts["engagement_rule"] = engine_->strategy().engagement_rule().text;
  if (is_quality()) facts["windows_side_by_side"] = absl::StrCat(side_by_side_);
  if (!passkeys_.empty()) facts["passkeys_side_by_side"] = absl::StrCat(passkeys_side_by_side_);
}

void Trial::EmitCounter(absl::string_view name, int32_t layer, double value) {
  Record record = NewRecord();
  Counter* counter = record.mutable_counter();
  counter->set_name(std::string(name));
  counter->set_layer(layer);
  counter->set_value(value);
  context_.recorder->Put(std::move(record));
}

void Trial::EmitSample(absl::string_view name, int64_t time_ns, double value) {
  Record record = NewRecord();
  Sample* sample = record.mutable_sample();
  sample->set_name(std::string(name));
  sample->set_time_ns(time_ns);
  sample->set_value(value);
  context_.recorder->Put(std::move(record));
}

void Trial::EmitOutcome() {
  Record record = NewRecord();
  *record.mutable_outcome() = std::move(outcome_);
  context_.recorder->Put(std::move(record));
}

}  // namespace kvsweep
