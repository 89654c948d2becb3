#include "worker/engine/batcher.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "base/check.h"
#include "base/planted_bug.h"

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

bool Batcher::Add(RequestId request, const RequestShape& shape, int32_t output_tokens,
                  std::span<const RequestId> samples) {
  KVSWEEP_CHECK(request >= 0 && shape.prompt_tokens >= 1 && output_tokens >= 1 &&
                output_tokens <= shape.max_tokens)
      << "request " << request << ": " << shape.prompt_tokens << "+" << output_tokens << " of "
      << shape.max_tokens;
  KVSWEEP_CHECK(samples.empty() || (manager_->can_fork() &&
                                    static_cast<int32_t>(samples.size()) < options_.max_sequences))
      << "request " << request << " with " << samples.size() << " further samples";
  const auto largest = samples.empty() ? request : std::max(request, std::ranges::max(samples));
  if (static_cast<size_t>(largest) >= requests_.size())
    requests_.resize(static_cast<size_t>(largest) + 1);
  TierBytes peak = manager_->FixedBytes();
  peak += manager_->PeakBytes(shape);
  if (peak.device > options_.budget.device || peak.host > options_.budget.host) return false;
  const auto add = [&](RequestId id, bool forking) {
    Request& state = Get(id);
    KVSWEEP_CHECK(!state.known) << "request " << id << " is in use";
    state = Request{.shape = shape,
                    .arrival = arrivals_++,
                    .output_tokens = output_tokens,
                    .to_compute = shape.prompt_tokens,
                    .known = true,
                    .forking = forking};
  };
  add(request, false);
  for (const RequestId sample : samples) add(sample, true);
  Get(request).samples.assign(samples.begin(), samples.end());
  waiting_.push_back(request);
  return true;
}

const StepPlan& Batcher::Plan() {
  KVSWEEP_CHECK(!outstanding_);
  outstanding_ = true;
  plan_.decode.clear();
  plan_.prefill.clear();
  plan_.samples.clear();
  plan_.admitted.clear();
  plan_.preempted.clear();
  plan_.short_of_memory = false;
  budget_left_ = options_.max_batched_tokens;
  prompt_under_way_ = false;
  short_of_memory_ = false;
  if (options_.chunked_prefill) {
    PlanRunning();
    if (!short_of_memory_ || BugPlanted("admitted_beside_preemption")) PlanWaiting();
  } else {
    PlanUnchunked();
  }
  if (plan_.empty()) PlanArriving();
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

// Whole prompts have the step for themselves; when none can enter, what runs goes on, and what was
// offloaded comes back.
void Batcher::PlanUnchunked() {
  while (!waiting_.empty() && !Get(waiting_.front()).offloaded && budget_left_ > 0) {
    const RequestId request = waiting_.front();
    if (!Enter(request, Get(request))) break;
  }
  if (!plan_.prefill.empty()) return;
  PlanRunning();
  while (!short_of_memory_ && !waiting_.empty() && Get(waiting_.front()).offloaded) {
    const RequestId request = waiting_.front();
    if (!Enter(request, Get(request))) break;
  }
  // With nothing running, only offloaded requests can stand in the way of the first.
  while (running_.empty() && !waiting_.empty() && DropOffloaded(waiting_.front())) {
    if (Enter(waiting_.front(), Get(waiting_.front()))) break;
  }
}

void Batcher::PlanRunning() {
  OrderByVictimRule();
  // Preemption takes from those that have not been planned yet.
  for (size_t index = 0; index < running_.size() && budget_left_ > 0;) {
    if (PlanOne(index)) ++index;
  }
}

// False when the request itself lost its memory; the next one then has its index.
bool Batcher::PlanOne(size_t index) {
  const RequestId request = running_[index];
  Request& state = Get(request);
  if (state.forking) return true;
  if (state.arriving && !manager_->Arrived(request)) return true;
  state.arriving = false;
  const int32_t tokens = state.prompt_done ? 1 : ChunkTokens(state);
  if (!state.prompt_done && state.computed + tokens < state.to_compute) prompt_under_way_ = true;
  if (tokens == 0) return true;
  if (!MakeRoom(index, state.computed + tokens)) return false;
  AddSegment(request, state, tokens, false);
  return true;
}

// Nothing else can run: the step waits for the copies that are under way.
void Batcher::PlanArriving() {
  for (const RequestId request : running_) {
    Request& state = Get(request);
    if (budget_left_ <= 0 || !std::exchange(state.arriving, false)) continue;
    AddSegment(request, state, 1, true);
  }
}

// Lets a running request hold `tokens` tokens, at the cost of others that have no place in the
// step. False: it was itself preempted.
bool Batcher::MakeRoom(size_t index, int32_t tokens) {
  const RequestId request = running_[index];
  while (!manager_->Grow(request, tokens)) {
    short_of_memory_ = plan_.short_of_memory = true;
    const bool last_resort = running_.size() == 1;
    if ((manager_->host_is_short() || last_resort) && DropOffloaded(request)) continue;
    KVSWEEP_CHECK(!last_resort) << "request " << request << " alone does not fit at " << tokens
                                << " tokens, although its peak was accepted";
    const size_t victim = ChooseVictim(index);
    PreemptAt(victim);
    if (victim == index) return false;
  }
  return true;
}

// What the rule would keep: the larger, the later it is preempted.
int64_t Batcher::Worth(RequestId request) const {
  if (manager_->victim_rule() == VictimRule::kLeastComputed) return Get(request).computed;
  return -static_cast<int64_t>(manager_->RequestBytes(request).device);
}

// Those that the rule would preempt first are planned last, so that they have no place in the step
// when somebody needs their memory; prompts behind decodes, since they take what budget is left.
// The first stays what it is.
void Batcher::OrderByVictimRule() {
  if (manager_->victim_rule() == VictimRule::kLastIn || running_.size() < 3) return;
  std::stable_sort(running_.begin() + 1, running_.end(), [&](RequestId a, RequestId b) {
    const bool done = Get(a).prompt_done;
    return done == Get(b).prompt_done ? Worth(a) > Worth(b) : done;
  });
}

// Of the running requests from `index` on, but never the first of all.
size_t Batcher::ChooseVictim(size_t index) const {
  size_t victim = running_.size() - 1;
  if (manager_->victim_rule() == VictimRule::kLastIn) return victim;
  for (size_t candidate = victim; candidate-- > std::max<size_t>(index, 1);) {
    if (Worth(running_[candidate]) < Worth(running_[victim])) victim = candidate;
  }
  return victim;
}

void Batcher::PreemptAt(size_t index) {
  const RequestId victim = running_[index];
  Request& state = Get(victim);
  const PreemptionMode mode = manager_->preemption_mode();
  KVSWEEP_CHECK(mode != PreemptionMode::kNone || !state.prompt_done)
      << "request " << victim << " must not be preempted";
  const bool can_offload = mode == PreemptionMode::kOffload && state.prompt_done;
  if (can_offload && (manager_->host_is_short() || !manager_->CanOffload(victim))) {
    manager_->Release(victim);  // an offload would free nothing of what is short, or has no room
    ForgetTokens(state);
  } else {
    manager_->Preempt(victim);
    if (can_offload) {
      state.offloaded = true;
    } else {
      ForgetTokens(state);
    }
  }
  state.arriving = false;
  ++state.tally.preemptions;
  FreeSlot(state);
  kept_slots_ -= static_cast<int32_t>(state.samples.size());
  running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(index));
  Wait(victim);
  plan_.preempted.push_back(victim);
}

// Puts a request into the waiting queue, which stands in the order of arrival.
void Batcher::Wait(RequestId request) {
  const auto later = [&](RequestId other) { return Get(other).arrival > Get(request).arrival; };
  waiting_.insert(std::find_if(waiting_.begin(), waiting_.end(), later), request);
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
  state.lost = state.computed;
  state.computed = 0;
  state.to_compute = state.shape.prompt_tokens + state.produced;
  state.prompt_done = false;
  state.offloaded = false;
}

void Batcher::PlanWaiting() {
  while (!waiting_.empty() && budget_left_ > 0) {
    const RequestId request = waiting_.front();
    if (Enter(request, Get(request))) continue;
    // With nothing running, only offloaded requests can stand in the way.
    if (running_.empty() && DropOffloaded(request)) continue;
    return;
  }
}

// Takes memory and a slot for the first waiting request and plans its first segment. False: nothing
// changed.
bool Batcher::Enter(RequestId request, Request& state) {
  const auto slots = static_cast<int32_t>(state.samples.size()) + 1;
  if (running() + kept_slots_ + slots > options_.max_sequences) return false;
  if (state.offloaded) {
    if (!manager_->Resume(request, state.computed + 1)) {
      plan_.short_of_memory = true;
      return false;
    }
    state.offloaded = false;
    state.arriving = !manager_->Arrived(request);
  } else if (!EnterPrompt(request, state)) {
    return false;
  }
  waiting_.pop_front();
  TakeSlot(state);
  running_.push_back(request);
  plan_.admitted.push_back(request);
  kept_slots_ += static_cast<int32_t>(state.samples.size());
  if (state.prompt_done) {
    if (!state.arriving) AddSegment(request, state, 1, true);
  } else {
    AddSegment(request, state, ChunkTokens(state), false);
  }
  return true;
}

// Memory for a prompt's first chunk, behind what the cache has of it.
bool Batcher::EnterPrompt(RequestId request, Request& state) {
  if (prompt_under_way_) return false;
  // After a recompute the output so far belongs to the prompt; the limit stays.
  const RequestShape shape = {
      .prompt_tokens = state.to_compute,
      .max_tokens = state.shape.limit() - state.to_compute,
      .oracle_tokens = state.shape.oracle_tokens,
      .restarted_tokens = std::max(0, state.to_compute - state.shape.prompt_tokens)};
  state.computed = manager_->FindCached(request, shape);
  const int32_t tokens = ChunkTokens(state);
  if (tokens == 0 || !manager_->Admit(request, shape, state.computed + tokens)) {
    plan_.short_of_memory |= tokens > 0;
    state.computed = 0;
    return false;
  }
  // What is found again need not be computed again.
  state.tally.recomputed_tokens -= std::min(state.computed, std::exchange(state.lost, 0));
  prompt_under_way_ = state.computed + tokens < state.to_compute;
  return true;
}

// Tokens of a prompt's next chunk: what the budget allows, cut down to the alignment unless the
// prompt ends. May be 0.
int32_t Batcher::ChunkTokens(const Request& state) const {
  const int32_t missing = state.to_compute - state.computed;
  if (missing <= budget_left_ || BugPlanted("budget_overdrawn")) return missing;
  if (!options_.chunked_prefill) return plan_.empty() ? missing : 0;
  return budget_left_ / options_.chunk_alignment * options_.chunk_alignment;
}

void Batcher::AddSegment(RequestId request, Request& state, int32_t tokens, bool resumed) {
  auto& segments = state.prompt_done ? plan_.decode : plan_.prefill;
  segments.push_back(
      {.request = request,
       .slot = state.slot,
       .rows = tokens,
       .start_position = state.computed,
       .last_chunk = !state.prompt_done && state.computed + tokens == state.to_compute,
       .resumed = resumed});
  budget_left_ -= tokens;
  if (segments.back().last_chunk && !state.samples.empty()) StartSamples(state);
}

// The prompt ends in this step: its samples get their slots, right behind it.
void Batcher::StartSamples(Request& parent) {
  auto place =
      std::ranges::find_if(running_, [&](RequestId request) { return &Get(request) == &parent; });
  KVSWEEP_CHECK(place != running_.end());
  kept_slots_ -= static_cast<int32_t>(parent.samples.size());
  for (const RequestId sample : parent.samples) {
    Request& state = Get(sample);
    TakeSlot(state);
    place = running_.insert(place + 1, sample);
    plan_.samples.push_back({.request = sample,
                             .slot = state.slot,
                             .prefill = static_cast<int32_t>(plan_.prefill.size()) - 1});
  }
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
    ForkSamples(segment.request);
  }
  for (const RequestId request : effects_.finished) Drop(request);
  return effects_;
}

void Batcher::ForkSamples(RequestId parent) {
  const std::vector<RequestId> samples = std::exchange(Get(parent).samples, {});
  for (const RequestId sample : samples) {
    Request& state = Get(sample);
    manager_->Fork(parent, sample);
    state.computed = Get(parent).computed;
    state.prompt_done = true;
    state.forking = false;
    Produce(sample);
  }
}

void Batcher::Produce(RequestId request) {
  Request& state = Get(request);
  effects_.produced.push_back(request);
  if (++state.produced == state.output_tokens) effects_.finished.push_back(request);
}

bool Batcher::knows(RequestId request) const {
  return static_cast<size_t>(request) < requests_.size() && Get(request).known;
}

void Batcher::Drop(RequestId request) {
  KVSWEEP_CHECK(!outstanding_);
  Request& state = Get(request);
  KVSWEEP_CHECK(state.known) << "request " << request;
  KVSWEEP_CHECK(!state.forking) << "request " << request << " waits for another's prompt";
  for (const RequestId sample : state.samples) Get(sample).known = false;
  if (state.slot >= 0) {
    manager_->Release(request);
    FreeSlot(state);
    kept_slots_ -= static_cast<int32_t>(state.samples.size());
    running_.erase(std::find(running_.begin(), running_.end(), request));
  } else {
    if (state.offloaded) manager_->Release(request);
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), request));
  }
  state.known = false;
}

void Batcher::TakeSlot(Request& state) {
  std::pop_heap(free_slots_.begin(), free_slots_.end(), std::greater<>());
  state.slot = free_slots_.back();
  free_slots_.pop_back();
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
  const bool alone = !options_.chunked_prefill && plan_.decode.empty() && plan_.prefill.size() == 1;
  KVSWEEP_CHECK(tokens <= options_.max_batched_tokens || alone) << tokens << " tokens";
  KVSWEEP_CHECK(kept_slots_ >= 0 && running() + kept_slots_ <= options_.max_sequences);
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
    if (manager_->victim_rule() == VictimRule::kLastIn) check_order(state);
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
