#include "experiments/workload.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

// What a derived seed is for; part of the contract, since results are named by seeds. Each sets its
// draws apart from the plain ones of the same seed.
constexpr uint64_t kWarmupSalt = 0x7761726d;  // "warm"
constexpr uint64_t kTurnSalt = 0x7475726e;    // "turn"
constexpr uint64_t kBlockSalt = 0x626c6f63;   // "bloc"
constexpr uint64_t kInputSalt = 0x696e70;     // "inp"
constexpr uint64_t kOutputSalt = 0x6f7574;    // "out"

uint32_t ClampLength(double tokens, double low, double high) {
  return static_cast<uint32_t>(std::clamp(std::round(tokens), low, high));
}

// A length of the trace, scaled.
uint32_t ScaleLength(uint32_t tokens, double scale) {
  return ClampLength(tokens * scale, 1, static_cast<double>(limits::kContextTokens));
}

uint32_t Draw(const Distribution& distribution, uint64_t seed) {
  Random random(seed);
  if (distribution.kind() == Distribution::KIND_UNIFORM) {
    const uint64_t choices = uint64_t{distribution.max()} - distribution.min() + 1;
    return distribution.min() + static_cast<uint32_t>(random.Uniform(choices));
  }
  // Of the logarithm: so that the length itself has the given mean and deviation before it is
  // clipped.
  const double ratio = distribution.deviation() / distribution.mean();
  const double variance = PortableLog(1 + ratio * ratio);
  const double log_mean = PortableLog(distribution.mean()) - variance / 2;
  const double drawn = PortableExp(log_mean + std::sqrt(variance) * random.Normal());
  return ClampLength(drawn, distribution.min(), distribution.max());
}

struct RequestLengths {
  uint32_t input = 0;
  uint32_t output = 0;
  const TraceRow* row = nullptr;
};

}  // namespace

// Lengths by index: of a trace row, drawn, or fixed. `max_output` is applied, `max_total` is not.
class Workload::LengthSource {
 public:
  LengthSource(const Load& load, uint64_t seed, const Trace* trace)
      : lengths_(load.lengths()), trace_(lengths_.has_trace() ? trace : nullptr), seed_(seed) {
    if (trace_ == nullptr) return;
    order_.resize(trace_->rows.size());
    std::iota(order_.begin(), order_.end(), 0);
    if (load.arrivals().process() == Arrivals::PROCESS_REPLAY) return;
    Random random(seed);
    random.Shuffle(std::span(order_));
  }

  // Rows of a trace begin again when they run out.
  RequestLengths At(uint64_t index) const {
    RequestLengths drawn = {.input = lengths_.input(), .output = lengths_.output()};
    if (trace_ != nullptr) {
      drawn.row = &trace_->rows[order_[index % order_.size()]];
      drawn.input = ScaleLength(drawn.row->context_tokens, lengths_.scale());
      drawn.output = ScaleLength(drawn.row->generated_tokens, lengths_.scale());
    }
    if (lengths_.has_input_distribution()) {
      drawn.input = Draw(lengths_.input_distribution(), MixSeed(seed_, kInputSalt, index));
    }
    if (lengths_.has_output_distribution()) {
      drawn.output = Draw(lengths_.output_distribution(), MixSeed(seed_, kOutputSalt, index));
    }
    if (lengths_.has_max_output()) drawn.output = std::min(drawn.output, lengths_.max_output());
    return drawn;
  }

  std::span<const uint64_t> BlocksOf(const RequestLengths& drawn) const {
    return drawn.row == nullptr ? std::span<const uint64_t>() : trace_->BlocksOf(*drawn.row);
  }

 private:
  const Lengths& lengths_;
  const Trace* trace_;
  uint64_t seed_;
  std::vector<uint32_t> order_;
};

uint32_t NamedContext(const TrialSpec& trial) {
  if (trial.kind() == TrialSpec::KIND_QUALITY) {
    return std::min<uint32_t>(trial.quality().context(), limits::kContextTokens);
  }
  const Lengths& lengths = trial.load().lengths();
  const uint64_t most = std::max(
      {uint64_t{lengths.max_total()}, uint64_t{lengths.input()} + lengths.output(),
       uint64_t{lengths.input_distribution().max()} + lengths.output_distribution().max()});
  return static_cast<uint32_t>(std::min<uint64_t>(most, limits::kContextTokens));
}

absl::StatusOr<Workload> Workload::Build(const Load& load, const Seeds& seeds,
                                         const WorkloadInputs& inputs) {
  const Lengths& lengths = load.lengths();
  const uint32_t max_total = lengths.has_max_total() ? lengths.max_total() : inputs.context_tokens;
  if (max_total > inputs.context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("load.lengths.max_total: ", max_total,
                                                   " exceeds the model's context of ",
                                                   inputs.context_tokens, " tokens; lower it"));
  }
  if (lengths.has_trace() && (inputs.trace == nullptr || inputs.trace->rows.empty())) {
    return absl::InvalidArgumentError("load.lengths.trace has no rows");
  }
  if (max_total < 2 || inputs.vocabulary == 0) {
    return absl::InvalidArgumentError("the model has no context or no vocabulary");
  }

  Workload workload;
  workload.inputs_ = inputs;
  workload.content_seed_ = seeds.content();
  workload.max_total_ = max_total;
  workload.block_tokens_ = ScaleLength(kTraceBlockTokens, lengths.scale());
  ASSIGN_OR_RETURN(const std::vector<Arrival> arrivals,
                   DrawArrivals(load.arrivals(), seeds.schedule(), inputs.trace));
  const LengthSource source(load, seeds.order(), inputs.trace);
  for (const Arrival& arrival : arrivals) workload.AddSession(load, source, seeds, arrival);
  RETURN_IF_ERROR(workload.PlaceTexts());
  return workload;
}

// A request and, in a chat, the turns that follow it. Prompts give way to max_total first, but only
// so far that one output token fits.
void Workload::AddSession(const Load& load, const LengthSource& lengths, const Seeds& seeds,
                          const Arrival& arrival) {
  const uint32_t session = sessions_++;
  const RequestLengths drawn = lengths.At(session);
  WorkloadRequest request = {.arrival = arrival,
                             .session = session,
                             .prompt_tokens = std::min(drawn.input, max_total_ - 1),
                             .output_tokens = drawn.output,
                             .blocks = lengths.BlocksOf(drawn)};
  const uint64_t turns = load.has_sessions() ? load.sessions().turns() : 1;
  for (;;) {
    request.max_tokens = max_total_ - request.prompt_tokens;
    request.output_tokens = std::min(request.output_tokens, request.max_tokens);
    requests_.push_back(request);
    const uint64_t history = uint64_t{request.prompt_tokens} + request.output_tokens;
    const uint64_t prompt = history + load.sessions().turn_input();
    if (request.turn + 1 >= turns || prompt >= max_total_) return;
    requests_.back().last_turn = false;
    ++request.turn;
    // The draws of first turns come first, so that these do not depend on the number of turns.
    const uint64_t index = load.arrivals().requests() + session * (turns - 1) + (request.turn - 1);
    Random think(MixSeed(seeds.schedule(), kTurnSalt, session, request.turn));
    const double mean_ns = static_cast<double>(load.sessions().think_time());
    request.think_ns = std::llround(think.Exponential(mean_ns));
    request.history_tokens = static_cast<uint32_t>(history);
    request.prompt_tokens = static_cast<uint32_t>(prompt);
    request.output_tokens = lengths.At(index).output;
    request.blocks = {};
  }
}

// Where in the text each request's own tokens begin. One draw a request, whatever its length, so
// that lengths do not shift the draws that follow.
absl::Status Workload::PlaceTexts() {
  const uint64_t text_tokens = inputs_.text_ids.size();
  if (text_tokens == 0) return absl::OkStatus();
  Random content(content_seed_);
  for (WorkloadRequest& request : requests_) {
    const double position =
        request.turn == 0 ? content.UniformDouble()
                          : Random(MixSeed(content_seed_, kTurnSalt, request.session, request.turn))
                                .UniformDouble();
    uint64_t needed = request.prompt_tokens - request.history_tokens;
    if (!request.blocks.empty()) {
      const uint64_t in_blocks = request.blocks.size() * uint64_t{block_tokens_};
      needed = std::max<uint64_t>(block_tokens_, needed - std::min(needed, in_blocks));
    } else if (request.turn == 0 && inputs_.bos_id) {
      --needed;
    }
    if (needed > text_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "load.text: its ", text_tokens, " tokens are fewer than the ", needed,
          " of a prompt; name a longer text, or lower load.lengths.max_total or scale"));
    }
    const uint64_t choices = text_tokens - needed + 1;
    request.text_offset = std::min<uint64_t>(
        choices - 1, static_cast<uint64_t>(position * static_cast<double>(choices)));
  }
  return absl::OkStatus();
}

absl::StatusOr<Workload> Workload::BuildWarmup(const Load& load, const Seeds& seeds,
                                               const WorkloadInputs& inputs, uint32_t requests) {
  Load warmup = load;
  warmup.mutable_arrivals()->set_process(Arrivals::PROCESS_BURST);
  warmup.mutable_arrivals()->set_requests(requests);
  warmup.clear_sessions();
  Seeds other;
  other.set_content(MixSeed(seeds.content(), kWarmupSalt));
  other.set_order(MixSeed(seeds.order(), kWarmupSalt));
  other.set_schedule(MixSeed(seeds.schedule(), kWarmupSalt));
  return Build(warmup, other, inputs);
}

void Workload::CopyPrompt(size_t index, std::span<int32_t> prompt) const {
  KVSWEEP_CHECK_LT(index, requests_.size());
  const WorkloadRequest& request = requests_[index];
  KVSWEEP_CHECK_EQ(prompt.size(), request.prompt_tokens - request.history_tokens);
  if (!request.blocks.empty()) {
    const size_t in_blocks = std::min(prompt.size(), request.blocks.size() * size_t{block_tokens_});
    CopyBlocks(request, prompt.first(in_blocks));
    CopyOwn(index, prompt.subspan(in_blocks));
    if (inputs_.bos_id) prompt[0] = *inputs_.bos_id;
    return;
  }
  if (request.turn == 0 && inputs_.bos_id) {
    prompt[0] = *inputs_.bos_id;
    prompt = prompt.subspan(1);
  }
  CopyOwn(index, prompt);
}

void Workload::CopyBlocks(const WorkloadRequest& request, std::span<int32_t> prompt) const {
  for (const uint64_t id : request.blocks) {
    if (prompt.empty()) return;
    const auto block = prompt.first(std::min<size_t>(prompt.size(), block_tokens_));
    prompt = prompt.subspan(block.size());
    Random random(MixSeed(content_seed_, kBlockSalt, id));
    if (inputs_.text_ids.empty()) {
      for (int32_t& token : block) token = static_cast<int32_t>(random.Uniform(inputs_.vocabulary));
      continue;
    }
    // The offset leaves room for a whole block, so that a clipped one begins alike.
    const uint64_t offset = random.Uniform(inputs_.text_ids.size() - block_tokens_ + 1);
    const auto text = inputs_.text_ids.subspan(offset, block.size());
    std::copy(text.begin(), text.end(), block.begin());
  }
}

// What belongs to the request alone.
void Workload::CopyOwn(size_t index, std::span<int32_t> tokens) const {
  const WorkloadRequest& request = requests_[index];
  if (!inputs_.text_ids.empty()) {
    const auto text = inputs_.text_ids.subspan(request.text_offset, tokens.size());
    std::copy(text.begin(), text.end(), tokens.begin());
    return;
  }
  Random random(request.turn == 0
                    ? MixSeed(content_seed_, request.session)
                    : MixSeed(content_seed_, kTurnSalt, request.session, request.turn));
  for (int32_t& id : tokens) id = static_cast<int32_t>(random.Uniform(inputs_.vocabulary));
}

}  // namespace kvsweep
