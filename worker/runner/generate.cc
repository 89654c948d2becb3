#include "worker/runner/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "worker/engine/batcher.h"
#include "worker/engine/engine.h"
#include "worker/engine/token_file.h"
#include "worker/runner/trial.h"
#include "worker/strategies/memory_model.h"

namespace kvsweep {
namespace {

constexpr uint64_t kCalibrationSeed = 0x67656e65;
constexpr RequestId kSequence = 0;

absl::StatusOr<std::vector<int32_t>> ReadIds(const std::string& path, int32_t vocabulary) {
  ASSIGN_OR_RETURN(const std::string content, ReadFile(path, limits::kTextFileBytes));
  return IsTokenFile(path) ? ParseTokenFile(content, path, vocabulary)
                           : ParseTokenList(content, path, vocabulary);
}

// The ids of one run: fed in order, all behind the first `prompt` of them chosen or scored.
struct Course {
  std::vector<int32_t> known;  // prompt, then the ids to score
  int32_t prompt = 0;
  int32_t output = 0;
  int32_t total() const { return prompt + output; }
};

absl::StatusOr<Course> PlanCourse(const GenerateRequest& request, const ModelConfig& config,
                                  const Tokenizer* tokenizer) {
  Course course;
  if (!request.prompt_ids_file().empty()) {
    ASSIGN_OR_RETURN(course.known, ReadIds(request.prompt_ids_file(), config.vocabulary));
  } else if (request.has_prompt()) {
    ASSIGN_OR_RETURN(course.known, tokenizer->Encode(request.prompt(), {.add_bos = true}));
    RETURN_IF_ERROR(CheckTokenIds(course.known, config.vocabulary));
  }
  course.prompt = static_cast<int32_t>(course.known.size());
  course.output = static_cast<int32_t>(request.max_tokens());
  if (!request.score_ids_file().empty()) {
    ASSIGN_OR_RETURN(const std::vector<int32_t> scored,
                     ReadIds(request.score_ids_file(), config.vocabulary));
    course.known.insert(course.known.end(), scored.begin(), scored.end());
    // Without a prompt the first of them is one: nothing comes before it that could predict it.
    course.prompt = std::max(course.prompt, std::min<int32_t>(1, course.known.size()));
    course.output = static_cast<int32_t>(course.known.size()) - course.prompt;
  }
  if (course.prompt == 0) {
    return absl::InvalidArgumentError(
        "the prompt has no tokens, and this tokenizer puts none "
        "before a text; give at least one");
  }
  if (course.output == 0) return absl::InvalidArgumentError("there is no token to score");
  if (course.total() > config.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a prompt of ", course.prompt, " tokens and ", course.output, " more exceed the model's ",
        config.max_positions, " positions; shorten the prompt or lower --tokens"));
  }
  return course;
}

// The most that any arm of these strategies takes for one sequence, and some.
uint64_t AmpleBytes(const ModelConfig& config, const Course& course) {
  const auto cache = static_cast<uint64_t>(config.KvBytesPerToken(DType::kF32)) *
                     static_cast<uint64_t>(course.total() + 1024);
  return 4 * cache + WeightBytes(config, DType::kF32) / 2 + (uint64_t{64} << 20);
}

TopLogits Largest(std::span<const float> logits, uint32_t count) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t kept = std::min<size_t>(count, order.size());
  std::partial_sort(
      order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  TopLogits top;
  for (size_t i = 0; i < kept; ++i) {
    top.add_tokens(order[i]);
    top.add_logits(logits[order[i]]);
  }
  return top;
}

double NegativeLogLikelihood(std::span<const float> logits, int32_t token) {
  const double maximum = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - maximum);
  return maximum + std::log(sum) - logits[static_cast<size_t>(token)];
}

// Takes the logits of the step that the plan was, and adds what they say of the next token.
void TakeLogits(const StepPlan& plan, const StepResult& result, const InferenceEngine& engine,
                const Course& course, uint32_t top_logits, GeneratedArm* arm) {
  const bool prompt_ended = !plan.prefill.empty() && plan.prefill[0].last_chunk;
  if (plan.decode.empty() && !prompt_ended) return;
  // The only sequence: its row is the first.
  const auto logits = result.logits.first(static_cast<size_t>(engine.config().vocabulary));
  const auto next = static_cast<size_t>(course.prompt + arm->tokens_size());
  const int32_t token = engine.Tokens(kSequence)[next];
  arm->add_tokens(token);
  arm->add_nll(NegativeLogLikelihood(logits, token));
  *arm->add_top_logits() = Largest(logits, top_logits);
}

absl::Status RunArm(InferenceEngine& engine, const Course& course, uint32_t top_logits,
                    GeneratedArm* arm) {
  Batcher batcher(engine.batcher_options(), &engine.manager());
  engine.AddSequence(kSequence, course.known, course.prompt);
  if (!batcher.Add(kSequence, {course.prompt, course.output}, course.output)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        course.total(), " tokens can never fit kv.device_bytes ", engine.options().device_bytes,
        " and kv.host_bytes ", engine.options().host_bytes));
  }
  double attended = 0;
  double full = 0;
  while (!batcher.idle()) {
    const StepPlan& plan = batcher.Plan();
    if (!plan.empty()) {
      ASSIGN_OR_RETURN(const StepResult result, engine.Execute(plan));
      TakeLogits(plan, result, engine, course, top_logits, arm);
      for (size_t i = 0; i < plan.decode.size(); ++i) {
        attended += engine.CollectDecode(i, {}).attended;
        full += static_cast<double>(engine.config().layers) * (plan.decode[i].start_position + 1);
      }
    }
    batcher.Complete();
  }
  arm->set_attended_fraction(full > 0 ? attended / full : 1);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> CalibrationIds(const GenerateRequest& request,
                                                    const ModelConfig& config,
                                                    const Tokenizer* tokenizer) {
  const auto count = static_cast<size_t>(config.max_positions);
  std::vector<int32_t> ids;
  const std::string& file = request.calibration_file();
  if (file.empty()) {
    Random random(kCalibrationSeed);
    while (ids.size() < count) {
      ids.push_back(static_cast<int32_t>(random.Uniform(static_cast<uint64_t>(config.vocabulary))));
    }
  } else if (IsTokenFile(file)) {
    ASSIGN_OR_RETURN(ids, ReadIds(file, config.vocabulary));
  } else if (tokenizer == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": random weights have no tokenizer; give token ids (.npy, .u16)"));
  } else {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(file, limits::kTextFileBytes));
    ASSIGN_OR_RETURN(ids, tokenizer->Encode(text, {.add_bos = true, .max_tokens = count}));
  }
  ids.resize(std::min(ids.size(), count));
  return ids;
}

// Texts are for people: where ids have none, there is simply none.
std::string TextOf(const Tokenizer* tokenizer, std::span<const int32_t> ids) {
  if (tokenizer == nullptr) return "";
  return tokenizer->Decode(ids).value_or("");
}

}  // namespace

absl::StatusOr<GenerateReply> Generate(const GenerateRequest& request, WarmDevice* device) {
  ASSIGN_OR_RETURN(Backend * backend, device->UseBackend(device->OptionsOf(request.engine())));
  const LoadedModel* model = nullptr;
  const Tokenizer* tokenizer = nullptr;
  if (request.model().has_shape()) {
    ASSIGN_OR_RETURN(model,
                     device->UseShape(request.model().shape(), request.model().weights_seed(), 0));
  } else {
    ASSIGN_OR_RETURN(model, device->UseFolder(request.model().path(), {}));
    // Only a text needs it; ids can do without.
    const absl::StatusOr<const Tokenizer*> found = device->UseTokenizer();
    if (!found.ok() && request.has_prompt()) return found.status();
    tokenizer = found.value_or(nullptr);
  }
  if (request.has_prompt() && tokenizer == nullptr) {
    return absl::InvalidArgumentError(
        "random weights have no tokenizer; give token ids with --prompt-ids");
  }
  const ModelConfig& config = model->config();
  ASSIGN_OR_RETURN(const Course course, PlanCourse(request, config, tokenizer));
  ASSIGN_OR_RETURN(const std::vector<int32_t> calibration,
                   CalibrationIds(request, config, tokenizer));

  GenerateReply reply;
  const std::span<const int32_t> prompt(course.known.data(), static_cast<size_t>(course.prompt));
  reply.mutable_prompt()->Assign(prompt.begin(), prompt.end());
  reply.set_prompt_text(TextOf(tokenizer, prompt));
  for (const Arm& arm : request.arms()) {
    GeneratedArm* generated = reply.add_arms();
    generated->set_arm(arm.name());
    generated->set_strategy(arm.strategy());
    const Kv& kv = arm.has_kv() ? arm.kv() : request.kv();
    const uint64_t ample = AmpleBytes(config, course);
    const EngineOptions options{
        .max_sequences = 1,
        .max_batched_tokens = static_cast<int32_t>(request.engine().max_num_batched_tokens()),
        .max_context = course.total(),
        .graphs = request.engine().graphs(),
        .logits = LogitsMode::kLast,
        .kv_dtype = KvDtype(request.kv(), config.dtype, backend->info().activation_dtype),
        .device_bytes = kv.has_device_bytes() ? kv.device_bytes() : ample,
        .host_bytes = kv.has_device_bytes() ? kv.host_bytes() : ample};
    absl::StatusOr<std::unique_ptr<InferenceEngine>> engine =
        InferenceEngine::Create(backend, model, arm, options, calibration);
    const absl::Status status =
        engine.ok() ? RunArm(**engine, course, request.top_logits(), generated) : engine.status();
    if (!status.ok()) {
      generated->set_error(std::string(status.message()));
      continue;
    }
    generated->set_text(TextOf(
        tokenizer, {generated->tokens().data(), static_cast<size_t>(generated->tokens_size())}));
  }
  return reply;
}

}  // namespace kvsweep
