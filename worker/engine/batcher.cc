#include "worker/engine/batcher.h"

#include <algorithm>
#include <functional>

#include "base/check.h"

namespace kvsweep {

Batcher::Batcher(const BatcherOptions& options, KvManager* manager)
    : options_(options), manager_(manager) {
  KVSWEEP_CHECK_GE(options.max_sequences, 1);
  KVSWEEP_CHECK_GE(options.chunk_alignment, 1);
  KVSWEEP_CHECK_GE(options.max_batched_tokens, options.chunk_alignment);
  const size_t sequences = static_cast<size_t>(options.max_sequences);
  running_.reserve(sequences);
  for (auto* list : {&plan_.decode, &plan_.prefill}) list->reserve(sequences);
  for (auto* list : {&plan_.admitted, &plan_.preempted, &effects_.produced, &effects_.finished})
    list->reserve(sequences);
  for (int32_t slot = 0; slot < options.max_sequences; ++slot)
    free_slots_.push_back(slot);  // ascending is a heap
}

Batcher::Request& Batcher::Get(RequestId request) {
  KVSWEEP_CHECK(request >= 0 && static_cast<size_t>(request) < requests_.size())
      << "request " << request;
  return requests_[static_cast<size_t>(request)];
}

const Batcher::Request& Batcher::Get(RequestId request) const {
  return const_cast<Batcher*>(this)->Get(request);
}

bool Batcher::Add(RequestId request, const RequestShape& shape, int32_t output_tokens) {
  KVSWEEP_CHECK(request >= 0 && shape.prompt_tokens >= 1 && output_tokens >= 1 &&
                output_tokens <= shape.max_tokens)
      << "request " << request << ": " << shape.prompt_tokens << "+" << output_tokens << " of "
      << shape.max_tokens;
  if (static_cast<size_t>(request) >= requests_.size())
    requests_.resize(static_cast<size_t>(request) + 1);
  Request& state = Get(request);
  KVSWEEP_CHECK(!state.known) << "request " << request << " is in use";
  TierBytes peak = manager_->FixedBytes();
  peak += manager_->PeakBytes(shape);
  if (peak.device > options_.budget.device || peak.host > options_.budget.host) return false;
  state = Request{.shape = shape,
                  .arrival = arrivals_++,
                  .output_tokens = output_tokens,
                  .to_compute = shape.prompt_tokens,
                  .known = true};
  waiting_.push_back(request);
  return true;
}

const StepPlan& Batcher::Plan() {
  KVSWEEP_CHECK(!outstanding_);
  outstanding_ = true;
  plan_.decode.clear();
  plan_.prefill.clear();
  plan_.admitted.clear();
  plan_.preempted.clear();
  budget_left_ = options_.max_batched_tokens;
  prompt_under_way_ = false;
  short_of_memory_ = false;
  PlanRunning();
  if (!short_of_memory_) PlanWaiting();
  KVSWEEP_CHECK(!plan_.empty() || idle())
      << "no request makes progress: " << running() << " run, " << waiting() << " wait";
  int32_t row = 0;
  for (auto* segments : {&plan_.decode, &plan_.prefill}) {
    for (Segment& segment : *segments) {
      segment.first_row = row;
      row += segment.rows;
    }
  }
  return plan_;
}

void Batcher::PlanRunning() {
  // Preemption takes from the end, so whatever it takes has not been planned yet.
  for (size_t index = 0; index < running_.size() && budget_left_ > 0; ++index) {
    if (!PlanOne(index)) break;
  }
}

// False when the request itself lost its memory.
bool Batcher::PlanOne(size_t index) {
  const RequestId request = running_[index];
  const Request& state = Get(request);
  const int32_t tokens = state.prompt_done ? 1 : ChunkTokens(state);
  if (!state.prompt_done && state.computed + tokens < state.to_compute) prompt_under_way_ = true;
  if (tokens == 0) return true;
  if (!MakeRoom(request, state.computed + tokens)) return false;
  AddSegment(request, state, tokens, false);
  return true;
}

// Lets a running request hold `tokens` tokens, at the cost of those that were admitted after it.
// False: it was itself preempted, being the last.
bool Batcher::MakeRoom(RequestId request, int32_t tokens) {
  while (!manager_->Grow(request, tokens)) {
    short_of_memory_ = true;
    const bool last_resort = running_.size() == 1;
    if ((manager_->host_is_short() || last_resort) && DropOffloaded(request)) continue;
    KVSWEEP_CHECK(!last_resort) << "request " << request << " alone does not fit at " << tokens
                                << " tokens, although its peak was accepted";
    const bool itself = running_.back() == request;
    PreemptLast();
    if (itself) return false;
  }
  return true;
}

void Batcher::PreemptLast() {
  const RequestId victim = running_.back();
  Request& state = Get(victim);
  const PreemptionMode mode = manager_->preemption_mode();
  KVSWEEP_CHECK(mode != PreemptionMode::kNone || !state.prompt_done)
      << "request " << victim << " must not be preempted";
  const bool can_offload = mode == PreemptionMode::kOffload && state.prompt_done;
  if (can_offload && manager_->host_is_short()) {
    manager_->Release(victim);  // an offload would free nothing of what is short
    ForgetTokens(state);
  } else {
    manager_->Preempt(victim);
    if (can_offload) {
      state.offloaded = true;
    } else {
      ForgetTokens(state);
    }
  }
  ++state.tally.preemptions;
  FreeSlot(state);
  running_.pop_back();
  waiting_.push_front(victim);
  plan_.preempted.push_back(victim);
}

// Takes its host memory too from an offloaded request, the last to arrive first, so that `keep` may
// go on. False: there is none.
bool Batcher::DropOffloaded(RequestId keep) {
  for (auto it = waiting_.rbegin(); it != waiting_.rend(); ++it) {
    Request& state = Get(*it);
    if (!state.offloaded || *it == keep) continue;
    manager_->Release(*it);
    ForgetTokens(state);
    return true;
  }
  return false;
}

void Batcher::ForgetTokens(Request& state) {
  state.tally.recomputed_tokens += state.computed;
  state.computed = 0;
  state.to_compute = state.shape.prompt_tokens + state.produced;
  state.prompt_done = false;
  state.offloaded = false;
}

void Batcher::PlanWaiting() {
  while (!waiting_.empty() && budget_left_ > 0 && running() < options_.max_sequences) {
    const RequestId request = waiting_.front();
    Request& state = Get(request);
    if (!Enter(request, state)) {
      // With nothing running, only offloaded requests can stand in the way.
      if (running_.empty() && DropOffloaded(request)) continue;
      return;
    }
    waiting_.pop_front();
    running_.push_back(request);
    plan_.admitted.push_back(request);
  }
}

// Takes memory and a slot for a waiting request and plans its first segment. False: nothing
// changed.
bool Batcher::Enter(RequestId request, Request& state) {
  const bool resumed = state.offloaded;
  const int32_t tokens = resumed ? 1 : ChunkTokens(state);
  if (resumed) {
    if (!manager_->Resume(request, state.computed + tokens)) return false;
    state.offloaded = false;
  } else {
    if (prompt_under_way_ || tokens == 0) return false;
    // After a recompute the output so far belongs to the prompt; the limit stays.
    const RequestShape shape = {state.to_compute, state.shape.limit() - state.to_compute};
    if (!manager_->Admit(request, shape, tokens)) return false;
    prompt_under_way_ = tokens < state.to_compute;
  }
  std::pop_heap(free_slots_.begin(), free_slots_.end(), std::greater<>());
  state.slot = free_slots_.back();
  free_slots_.pop_back();
  AddSegment(request, state, tokens, resumed);
  return true;
}

// Tokens of a prompt's next chunk: what the budget allows, cut down to the alignment unless the
// prompt ends. May be 0.
int32_t Batcher::ChunkTokens(const Request& state) const {
  const int32_t missing = state.to_compute - state.computed;
  if (missing <= budget_left_) return missing;
  return budget_left_ / options_.chunk_alignment * options_.chunk_alignment;
}

void Batcher::AddSegment(RequestId request, const Request& state, int32_t tokens, bool resumed) {
  auto& segments = state.prompt_done ? plan_.decode : plan_.prefill;
  segments.push_back(
      {.request = request,
       .slot = state.slot,
       .rows = tokens,
       .start_position = state.computed,
       .last_chunk = !state.prompt_done && state.computed + tokens == state.to_compute,
       .resumed = resumed});
  budget_left_ -= tokens;
}

const StepEffects& Batcher::Complete() {
  KVSWEEP_CHECK(outstanding_);
  outstanding_ = false;
  effects_.produced.clear();
  effects_.finished.clear();
  for (const Segment& segment : plan_.decode) {
    Get(segment.request).computed += segment.rows;
    Produce(segment.request);
  }
  for (const Segment& segment : plan_.prefill) {
    Request& state = Get(segment.request);
    state.computed += segment.rows;
    if (!segment.last_chunk) continue;
    state.prompt_done = true;
    manager_->EndPrompt(segment.request);
    Produce(segment.request);
  }
  for (const RequestId request : effects_.finished) Drop(request);
  return effects_;
}

void Batcher::Produce(RequestId request) {
  Request& state = Get(request);
  effects_.produced.push_back(request);
  if (++state.produced == state.output_tokens) effects_.finished.push_back(request);
}

void Batcher::Drop(RequestId request) {
  KVSWEEP_CHECK(!outstanding_);
  Request& state = Get(request);
  KVSWEEP_CHECK(state.known) << "request " << request;
  if (state.slot >= 0) {
    manager_->Release(request);
    FreeSlot(state);
    running_.erase(std::find(running_.begin(), running_.end(), request));
  } else {
    if (state.offloaded) manager_->Release(request);
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), request));
  }
  state.known = false;
}

void Batcher::FreeSlot(Request& state) {
  free_slots_.push_back(state.slot);
  std::push_heap(free_slots_.begin(), free_slots_.end(), std::greater<>());
  state.slot = -1;
}

Batcher::Tally Batcher::tally(RequestId request) const { return Get(request).tally; }

void Batcher::CheckInvariants() const {
  int32_t tokens = 0;
  for (const auto* segments : {&plan_.decode, &plan_.prefill}) {
    for (const Segment& segment : *segments) tokens += segment.rows;
  }
  KVSWEEP_CHECK_LE(tokens, options_.max_batched_tokens);
  KVSWEEP_CHECK_LE(running(), options_.max_sequences);
  KVSWEEP_CHECK_EQ(free_slots_.size() + running_.size(),
                   static_cast<size_t>(options_.max_sequences));
  std::vector<bool> taken(static_cast<size_t>(options_.max_sequences), false);
  int64_t last_arrival = -1;
  int32_t prompts_under_way = 0;
  const auto check_order = [&](const Request& state) {
    KVSWEEP_CHECK(state.known && state.arrival > last_arrival);
    last_arrival = state.arrival;
  };
  for (const RequestId request : running_) {
    const Request& state = Get(request);
    check_order(state);
    KVSWEEP_CHECK(state.slot >= 0 && !taken[static_cast<size_t>(state.slot)])
        << "slot " << state.slot;
    taken[static_cast<size_t>(state.slot)] = true;
    if (!state.prompt_done && !outstanding_) ++prompts_under_way;
  }
  for (const RequestId request : waiting_) check_order(Get(request));
  KVSWEEP_CHECK_LE(prompts_under_way, 1);
  const TierBytes reserved = manager_->ReservedBytes();
  KVSWEEP_CHECK(reserved.device <= options_.budget.device && reserved.host <= options_.budget.host);
  manager_->CheckInvariants();
}

}  // namespace kvsweep
