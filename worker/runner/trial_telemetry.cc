// What a trial tells beside its requests: the device's readings, how far its steps are from what
// the node can carry, and where their time goes.
#include <algorithm>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "experiments/metrics.h"
#include "worker/runner/trial.h"
#include "worker/telemetry/machine_facts.h"
#include "worker/telemetry/prediction.h"

namespace kvsweep {
namespace {

// Of the tokens that a trial prefilled, the profile prefills so many again at most (one prompt at
// least): its time stays a fraction of the trial's.
constexpr double kProfileShare = 0.125;

double Elements(const LinearWeights& weights) {
  return static_cast<double>(weights.weight.rows) * static_cast<double>(weights.weight.columns);
}

// Elements of the matrices that a step multiplies by.
double MatrixElements(const ModelWeights& weights) {
  double elements =
      Elements(weights.project_in) + Elements(weights.project_out) +
      static_cast<double>(weights.output.rows) * static_cast<double>(weights.output.columns);
  for (const LayerWeights& layer : weights.layers) {
    elements += Elements(layer.qkv) + Elements(layer.attention_output) + Elements(layer.ffn_in) +
                Elements(layer.ffn_out);
  }
  return elements;
}

}  // namespace

// ---------------------------------------------------------------------------------------- readings

std::unique_ptr<DeviceSampler> Trial::SampleDevice() const {
  const bool on_device = !backend_->info().pci_address.empty();
  if (!on_device || context_.node == nullptr || context_.node->nvml() == nullptr) return nullptr;
  const Nvml* const nvml = context_.node->nvml();
  return std::make_unique<DeviceSampler>([nvml] { return nvml->Read(); });
}

void Trial::SummariseDevice() {
  if (backend_->info().pci_address.empty()) return;
  const auto count = [this](absl::string_view name, auto value) {
    if (value) EmitCounter(name, -1, static_cast<double>(*value));
  };
  const DeviceUse& use = device_use_;
  count(recorded::kEnergyJ, use.energy_j);
  const auto doubt = [&](absl::string_view name, EnergyDoubt bit) {
    EmitCounter(name, -1, (use.energy_doubts & bit) != 0 ? 1 : 0);
  };
  doubt(recorded::kEnergyNotRead, kEnergyNotRead);
  doubt(recorded::kEnergyTooShort, kEnergyTooFewUpdates);
  doubt(recorded::kEnergyShared, kEnergyShared);
  doubt(recorded::kEnergyThrottled, kEnergyThrottled);
  if (use.readings == 0) return;
  count(recorded::kPowerMean, use.power_w_mean);
  count("power_w_max", use.power_w_max);
  count(recorded::kSmClockMean, use.sm_clock_mhz_mean);
  count("sm_clock_mhz_min", use.sm_clock_mhz_min);
  count("memory_clock_mhz_min", use.memory_clock_mhz_min);
  count(recorded::kTemperatureMax, use.temperature_c_max);
  count("device_memory_bytes_used", use.memory_used_bytes_max);
  count("device_processes", use.processes_max);
  count("pcie_generation", use.link_generation_max);
  count("pcie_width", use.link_width_max);
  EmitCounter("device_memory_bytes_own", -1,
              static_cast<double>(backend_->allocated_bytes(Tier::kDevice)));
  EmitCounter("device_readings", -1, use.readings);
  for (const auto& [reason, share] : use.clock_reason_shares) {
    EmitCounter(absl::StrCat("clock_reason_", reason), -1, share);
  }
  EmitCounter("throttled_share", -1, use.throttled_share);
}

// ------------------------------------------------------------------------------------------- steps

// Only what was served to its end is worth it; what is wrong with the device shows, a lack of room
// or time does not.
absl::Status Trial::Profile() {
  if (is_quality() || outcome_.outcome() != OUTCOME_OK || served_.decode_steps.steps == 0) {
    return absl::OkStatus();
  }
  const ServeResult::DecodeSteps& steps = served_.decode_steps;
  // A request of the mean batch in the middle of the profiled steps.
  const auto stored = static_cast<int32_t>(steps.tokens / steps.rows);
  const int32_t context = engine_->options().max_context;
  if (context < kProfileTokens + 2) return absl::OkStatus();
  const int32_t prompt = std::clamp(stored - kProfileTokens / 2, 1, context - kProfileTokens - 1);
  double limit = 0;
  for (const WorkloadRequest& request : workload_->requests()) {
    limit += request.prompt_tokens + request.max_tokens;
  }
  limit /= static_cast<double>(workload_->requests().size());
  const int32_t longest =
      std::clamp(static_cast<int32_t>(limit), prompt + kProfileTokens + 1, context);
  const double affordable = kProfileShare * static_cast<double>(served_.prefill_tokens) / prompt;
  const double batch = steps.rows / static_cast<double>(steps.steps);
  const std::vector<int32_t> text = ProfileText(prompt);
  absl::StatusOr<StepProfile> profile = ProfileSteps(
      backend_, engine_.get(),
      {.sequences = std::max(1, static_cast<int32_t>(std::min(affordable, batch + 0.5))),
       .shape = {.prompt_tokens = prompt, .max_tokens = longest - prompt, .oracle_tokens = longest},
       .text = text,
       .fetches = steps.fetched > 0,
       .cancel = context_.cancel});
  if (absl::IsResourceExhausted(profile.status())) {
    LogWarning("no profile: ", profile.status().message());
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(profile.status());
  profile_ = *profile;
  return absl::OkStatus();
}

// Tokens like those of the trial's prompts, `tokens` at least.
std::vector<int32_t> Trial::ProfileText(int32_t tokens) const {
  std::vector<int32_t> text;
  const std::span<const WorkloadRequest> requests = workload_->requests();
  for (size_t i = 0; text.size() < static_cast<size_t>(tokens) && i < 1024; ++i) {
    const WorkloadRequest& request = requests[i % requests.size()];
    const size_t at = text.size();
    text.resize(at + request.prompt_tokens - request.history_tokens);
    workload_->CopyPrompt(i % requests.size(), std::span(text).subspan(at));
  }
  return text;
}

void Trial::SummariseSteps() {
  const ServeResult::DecodeSteps& steps = served_.decode_steps;
  if (steps.steps == 0) return;
  const auto count = static_cast<double>(steps.steps);
  EmitCounter(recorded::kDecodeStepNs, -1, steps.ns / count);
  EmitCounter("decode_step_rows", -1, steps.rows / count);
  EmitCounter("decode_step_tokens", -1, steps.tokens / count);
  if (const std::optional<DeviceProfile> machine = Machine()) {
    EmitCounter(recorded::kPredictedDecodeStepNs, -1, PredictedDecodeStepNs(*machine));
  }
  if (!profile_) return;
  EmitStack(recorded::kStackPrefix, profile_->decode);
  EmitStack("stack_prefill_", profile_->prefill);
  if (!served_.gap_ns.empty()) {
    double gaps_ns = 0;
    for (const float gap_ns : served_.gap_ns) gaps_ns += gap_ns;
    EmitCounter(absl::StrCat(recorded::kStackPrefix, "host_gap_ns"), -1,
                gaps_ns / static_cast<double>(served_.gap_ns.size()));
  }
  EmitCounter("profile_rows", -1, profile_->sequences);
  EmitCounter("profile_tokens", -1, profile_->tokens);
  EmitCounter("profile_step_ns", -1, profile_->step_ns);
  if (profile_->transfer_ns == 0) return;
  // Taken from the profiled steps to all that only decoded.
  EmitCounter(recorded::kTransferNs, -1, profile_->transfer_ns * count);
  EmitCounter(recorded::kTransferExposedNs, -1, profile_->exposed_ns() * count);
}

void Trial::EmitStack(absl::string_view prefix, const TimeStack& stack) {
  for (size_t i = 0; i < kStackParts; ++i) {
    const auto part = static_cast<StackPart>(i);
    EmitCounter(absl::StrCat(prefix, StackPartName(part), "_ns"), -1, stack[part]);
  }
}

// What the trial's device can carry: as its preflight measured it, or as modelled time has it.
std::optional<DeviceProfile> Trial::Machine() const {
  if (is_modelled()) {
    const absl::StatusOr<DeviceProfile> profile =
        FindDeviceProfile(request_.spec().engine().device_profile());
    return profile.ok() ? std::optional<DeviceProfile>(*profile) : std::nullopt;
  }
  const bool on_device = !backend_->info().pci_address.empty();
  if (!on_device || context_.node == nullptr || context_.node->preflight() == nullptr) {
    return std::nullopt;
  }
  return context_.node->preflight()->Profile();
}

double Trial::PredictedDecodeStepNs(const DeviceProfile& machine) const {
  const ModelConfig& config = model_->config();
  const double elements = MatrixElements(model_->weights());
  const ModelWork model{
      .weight_bytes = elements * machine.element_bytes,
      .operations_per_row = 2 * elements,
      .entry_bytes = static_cast<double>(config.KvBytesPerToken(kv_dtype_)) / config.layers,
      .operations_per_entry = 4.0 * config.query_heads * config.head_dim,
      .layers = static_cast<double>(config.layers)};
  const ServeResult::DecodeSteps& steps = served_.decode_steps;
  const auto count = static_cast<double>(steps.steps);
  const CacheStrategy::MeanBatch batch{.rows = steps.rows / count,
                                       .tokens = steps.tokens / count,
                                       .attended = steps.attended / count};
  const DecodeWork work{.rows = batch.rows,
                        .attended = batch.attended,
                        .fetched = steps.fetched / count,
                        .selection_bytes = engine_->strategy().SelectionBytes(batch)};
  return FloorNs(DecodeCost(model, work), machine);
}

void Trial::AddNodeFacts(TrialStart* start) const {
  auto& facts = *start->mutable_facts();
  facts["host_clock"] = HostClockText();
  if (backend_ == nullptr) return;
  if (!backend_->info().host_memory.empty()) facts["host_memory"] = backend_->info().host_memory;
  if (context_.node == nullptr || backend_->info().pci_address.empty()) return;
  for (auto& [name, value] : context_.node->Facts()) facts[name] = value;
}

}  // namespace kvsweep
