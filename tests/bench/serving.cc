#include "tests/bench/serving.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "proto/schema.h"
#include "tests/bench/prefilled.h"
#include "worker/engine/calibration.h"
#include "worker/strategies/catalogue.h"
#include "worker/strategies/memory_model.h"

namespace kvsweep {
namespace {

// The first steps of a serving still prefill, or find caches cold; they are not counted.
constexpr int64_t kUncounted = 4;
// An arm without pages on the device is refused less than one of a byte.
constexpr uint64_t kPageOfNothing = 4096;
constexpr uint64_t kAmpleBytes = uint64_t{1} << 42;
// What a device has beside, so that the tiles of the host's tier are as long as in a real budget.
constexpr uint64_t kDeviceSlackBytes = uint64_t{1} << 30;

std::vector<int32_t> RandomIds(int64_t count, uint64_t vocabulary, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.Uniform(vocabulary));
  return ids;
}

// What the requests take side by side, so that memory decides nothing.
absl::StatusOr<TierBytes> BytesFor(const Backend& backend, const LoadedModel& model,
                                   const ServedLoad& load, const EngineOptions& options) {
  const int32_t decode_rows = PaddedDecodeRows(options.max_sequences);
  const StrategySizes sizes{.shape = model.shape(),
                            .kv_dtype = options.kv_dtype,
                            .activation_dtype = backend.info().activation_dtype,
                            .weight_dtype = backend.info().weight_dtype,
                            .device_bytes = kAmpleBytes,
                            .host_bytes = load.arm.strategy() == "paged" ? 0 : kAmpleBytes,
                            .max_sequences = options.max_sequences,
                            .max_context = options.max_context,
                            .max_rows = std::max(options.max_batched_tokens, decode_rows),
                            .max_decode_rows = decode_rows};
  ASSIGN_OR_RETURN(const std::unique_ptr<KvManager> manager, MakeManager(load.arm, sizes));
  const TierBytes peak =
      manager->PeakBytes({.prompt_tokens = static_cast<int32_t>(load.input),
                          .max_tokens = static_cast<int32_t>(load.output),
                          .oracle_tokens = static_cast<int32_t>(load.input + load.output)});
  TierBytes bytes = manager->FixedBytes();
  bytes.device += peak.device * static_cast<uint64_t>(load.rows);
  bytes.host += peak.host * static_cast<uint64_t>(load.rows);
  bytes.device += backend.info().beside_host ? kDeviceSlackBytes : kPageOfNothing;
  return bytes;
}

double MeanOf(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Standard error of the mean, relative.
double ErrorOf(const std::vector<double>& values) {
  const double mean = MeanOf(values);
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  const auto count = static_cast<double>(values.size());
  return std::sqrt(squares / (count - 1)) / mean / std::sqrt(count);
}

}  // namespace

absl::StatusOr<std::unique_ptr<LoadServer>> LoadServer::Create(Backend* backend,
                                                               const LoadedModel* model,
                                                               ServedLoad load) {
  ApplyDefaults(&load.arm);
  std::unique_ptr<LoadServer> server(new LoadServer(backend, model, std::move(load)));
  RETURN_IF_ERROR(server->MakeEngine());
  return server;
}

absl::Status LoadServer::MakeEngine() {
  EngineOptions options{
      .max_sequences = static_cast<int32_t>(load_.rows),
      .max_batched_tokens = static_cast<int32_t>(load_.max_batched_tokens),
      .max_context = static_cast<int32_t>(load_.input + load_.output),
      .kv_dtype = KvDtype(Kv(), model_.config().dtype, backend_->info().activation_dtype)};
  ASSIGN_OR_RETURN(const TierBytes bytes, BytesFor(*backend_, model_, load_, options));
  options.device_bytes = bytes.device;
  options.host_bytes = bytes.host;
  const auto make =
      [&](const StrategyContext& given) -> absl::StatusOr<std::unique_ptr<CacheStrategy>> {
    StrategyContext context = given;
    const std::vector<int32_t> ids =
        RandomIds(load_.arm.infinigen().calibration_tokens(),
                  static_cast<uint64_t>(model_.config().vocabulary), /*seed=*/3);
    context.calibrate = [&](int32_t tokens) {
      return CalibrateSkewing(backend_, &model_, std::span(ids).first(static_cast<size_t>(tokens)));
    };
    ASSIGN_OR_RETURN(std::unique_ptr<CacheStrategy> strategy, MakeStrategy(load_.arm, context));
    return load_.prefilled ? AsIfPrefilled(std::move(strategy)) : std::move(strategy);
  };
  ASSIGN_OR_RETURN(engine_, InferenceEngine::CreateWith(backend_, &model_, options, make));
  return engine_->CaptureSteps();
}

absl::StatusOr<ServeResult> LoadServer::Serve(const RequestSink& sink) {
  const std::vector<ServeRequest> requests(
      static_cast<size_t>(load_.rows),
      ServeRequest{.prompt_tokens = static_cast<int32_t>(load_.input),
                   .output_tokens = static_cast<int32_t>(load_.output),
                   .max_tokens = static_cast<int32_t>(load_.output)});
  const auto vocabulary = static_cast<uint64_t>(model_.config().vocabulary);
  const ServeSchedule schedule{.requests = requests,
                               .copy_prompt =
                                   [&](size_t index, std::span<int32_t> prompt) {
                                     std::ranges::copy(
                                         RandomIds(static_cast<int64_t>(prompt.size()), vocabulary,
                                                   /*seed=*/100 + index),
                                         prompt.begin());
                                   },
                               .open_loop = false};
  const ServeOptions options{.clock = &RealClock::Get(), .run_ahead = backend_->info().beside_host};
  ASSIGN_OR_RETURN(ServeResult result, ServeLoad(engine_.get(), schedule, options, sink));
  if (result.completed == load_.rows) return result;
  return absl::InternalError(
      absl::StrCat(result.completed, " of ", load_.rows, " requests were served"));
}

absl::StatusOr<ServedSteps> TimeDecode(Backend* backend, const LoadedModel* model,
                                       const DecodeQuestion& question, const StopRule& rule) {
  ServedLoad load{.arm = question.arm,
                  .rows = question.rows,
                  .input = question.context,
                  .prefilled = !question.real_prompts};
  // All requests decode while the last one's steps are timed: with real prompts the first ones have
  // begun that many steps before it.
  const int64_t ahead = question.real_prompts ? question.rows * question.context / 2048 + 2 : 2;
  load.output = kUncounted + question.steps + ahead;
  // Whoever counts as prefilled enters in the first step.
  if (load.prefilled) load.max_batched_tokens = std::max<int64_t>(2048, 128 * question.rows);
  ASSIGN_OR_RETURN(const std::unique_ptr<LoadServer> server,
                   LoadServer::Create(backend, model, load));
  ServedSteps served;
  served.tokens = static_cast<double>(question.context + kUncounted) +
                  static_cast<double>(question.steps) / 2.0;
  std::vector<double> gaps;   // between tokens
  std::vector<double> waits;  // of the device
  double stepped_ns = 0;
  const int64_t deadline =
      RealClock::Get().NowNs() + static_cast<int64_t>(rule.seconds * kNsPerSecond);
  std::string stop;
  while (stop.empty()) {
    std::optional<RequestRow> last;
    ASSIGN_OR_RETURN(const ServeResult result, server->Serve([&](RequestRow row) {
      if (row.index() + 1 == question.rows) last = std::move(row);
      return true;
    }));
    for (int64_t i = kUncounted; i < kUncounted + question.steps; ++i) {
      gaps.push_back(static_cast<double>(last->token_gap_ns(static_cast<int>(i))));
    }
    served.first_token_ns = static_cast<double>(last->first_token_ns());
    waits.insert(waits.end(), result.gap_ns.begin(), result.gap_ns.end());
    stepped_ns += result.stepped_ns;
    if (question.real_prompts) {
      stop = "once";
    } else if (ErrorOf(gaps) < rule.relative_error) {
      stop = "converged";
    } else if (RealClock::Get().NowNs() > deadline) {
      stop = "time-limit";
    }
  }
  if (!waits.empty()) {
    served.gap = Summarise(waits);
    const double waited_ns = MeanOf(waits) * static_cast<double>(waits.size());
    served.gap_share = waited_ns / (waited_ns + stepped_ns);
  }
  served.timing = Summarise(gaps);
  served.timing.stop = stop;
  return served;
}

absl::StatusOr<Timing> TimeServing(LoadServer* server, const RequestSink& sink,
                                   const StopRule& rule) {
  RETURN_IF_ERROR(server->Serve([](RequestRow) { return true; }).status());
  std::vector<double> samples;
  const int64_t deadline =
      RealClock::Get().NowNs() + static_cast<int64_t>(rule.seconds * kNsPerSecond);
  std::string stop;
  while (stop.empty()) {
    ASSIGN_OR_RETURN(const ServeResult result, server->Serve(sink));
    samples.push_back(static_cast<double>(result.duration_ns));
    if (static_cast<int>(samples.size()) < rule.least_samples) continue;
    if (samples.size() > 1 && ErrorOf(samples) < rule.relative_error) {
      stop = "converged";
    } else if (RealClock::Get().NowNs() > deadline) {
      stop = "time-limit";
    }
  }
  Timing timing = Summarise(samples);
  timing.stop = stop;
  return timing;
}

}  // namespace kvsweep
