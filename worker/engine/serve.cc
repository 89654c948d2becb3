#include "worker/engine/serve.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <queue>
#include <utility>

#include "base/check.h"
#include "base/digest.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

// A pause after which the cancel flag is looked at again.
constexpr int64_t kLongestSleepNs = 20 * kNsPerMs;

// What a request has gone through; becomes its row.
struct Book {
  int64_t scheduled_ns = 0;
  int64_t issued_ns = 0;
  int64_t admitted_ns = 0;
  std::vector<int64_t> token_ns;  // room for all of them from the beginning
  std::vector<int32_t> history;   // tokens that its prompt begins with
  double attended = 0;
  double full = 0;
  double fetched = 0;
  int64_t evicted = 0;
  TierBytes peak;
  bool issued = false;
  bool admitted = false;
  bool engaged = false;
  bool done = false;
  int32_t open_samples = 0;  // of its prompt, itself among them; of a first sample
};

// A step that has begun.
struct Begun {
  int64_t begin_ns = 0;
  bool follows = false;  // comes at once after the step before
  bool settled = false;  // the batcher's part is done, with this outcome
  StepSample state;
  StepEffects effects;
};

// An arrival to come.
struct Due {
  int64_t time_ns = 0;
  size_t index = 0;
  bool is_turn = false;  // a later turn of a session
  auto operator<=>(const Due&) const = default;
};

// A series of steps thinned as it grows: full, it drops every other one and takes half as many.
class ThinnedSamples {
 public:
  explicit ThinnedSamples(size_t capacity) : capacity_(capacity) { samples_.reserve(capacity); }

  void Add(const StepSample& sample) {
    if (count_++ % stride_ != 0) return;
    if (samples_.size() == capacity_) {
      for (size_t i = 0; 2 * i < samples_.size(); ++i) samples_[i] = samples_[2 * i];
      samples_.resize((samples_.size() + 1) / 2);
      stride_ *= 2;
      if ((count_ - 1) % stride_ != 0) return;
    }
    samples_.push_back(sample);
  }

  std::vector<StepSample> Take() { return std::move(samples_); }

 private:
  size_t capacity_;
  uint64_t stride_ = 1;
  uint64_t count_ = 0;
  std::vector<StepSample> samples_;
};

uint64_t DigestOfTokens(std::span<const int32_t> tokens) {
  const Digest digest =
      Sha256({reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t)});
  uint64_t first = 0;
  std::memcpy(&first, digest.bytes().data(), sizeof(first));
  return first;
}

class Server {
 public:
  Server(InferenceEngine* engine, const ServeSchedule& schedule, const ServeOptions& options,
         const RequestSink& sink)
      : engine_(*engine),
        schedule_(schedule),
        options_(options),
        sink_(sink),
        batcher_(engine->batcher_options(), &engine->manager()),
        books_(schedule.requests.size()),
        samples_(options.max_samples),
        layer_counts_(static_cast<size_t>(engine->config().layers)),
        start_ns_(options.clock->NowNs()) {
    result_.attended_by_layer.resize(layer_counts_.size());
    for (const ServeRequest& request : schedule.requests) {
      KVSWEEP_CHECK_LE(request.prompt_tokens + request.max_tokens, engine->options().max_context);
      longest_prompt_ = std::max(longest_prompt_, request.prompt_tokens);
    }
    prompt_.resize(static_cast<size_t>(longest_prompt_));
    for (size_t i = 0; i < books_.size(); ++i) ++books_[i - RequestAt(i).sample].open_samples;
    ended_ns_.reserve(schedule.requests.size());
  }

  absl::StatusOr<ServeResult> Run() {
    engine_.strategy().BeginMeasurement();
    ASSIGN_OR_RETURN(const LinkBytes before, engine_.CacheTraffic());
    while (done_ < books_.size() && result_.end == ServeResult::End::kServedAll) {
      const size_t done_before = done_;
      RETURN_IF_ERROR(Turn());
      if (options_.progress && done_ > done_before) options_.progress(done_);
    }
    RETURN_IF_ERROR(FinishSteps(0));
    Abandon();
    result_.duration_ns = NowNs();
    JudgeQueue();
    ASSIGN_OR_RETURN(const LinkBytes after, engine_.CacheTraffic());
    result_.kv_bytes_to_device = after.to_device - before.to_device;
    result_.kv_bytes_to_host = after.to_host - before.to_host;
    result_.samples = samples_.Take();
    return std::move(result_);
  }

 private:
  int64_t NowNs() const { return options_.clock->NowNs() - start_ns_; }
  const ServeRequest& RequestAt(size_t index) const { return schedule_.requests[index]; }

  absl::Status Turn() {
    if (options_.cancel != nullptr && options_.cancel->load(std::memory_order_relaxed)) {
      result_.end = ServeResult::End::kCancelled;
      return absl::OkStatus();
    }
    if (NowNs() >= options_.time_limit_ns ||
        (options_.wall != nullptr && options_.wall->NowNs() >= options_.wall_deadline_ns)) {
      result_.end = ServeResult::End::kTimeLimit;
      return absl::OkStatus();
    }
    if (engine_.strategy().NeedsHost()) RETURN_IF_ERROR(FinishSteps(0));
    IssueArrivals();
    if (!batcher_.idle()) return Step();
    if (engine_.steps_under_way() > 0) return FinishSteps(0);
    if (done_ < books_.size()) SleepUntilArrival();
    return absl::OkStatus();
  }

  // ----------------------------------------------------------------------------------- arrivals

  void IssueArrivals() {
    const int64_t now_ns = NowNs();
    for (std::optional<Due> due; (due = NextDue()) && due->time_ns <= now_ns;) {
      if (due->is_turn) {
        turns_.pop();
      } else {
        do ++next_;
        while (next_ < books_.size() && (RequestAt(next_).turn > 0 || RequestAt(next_).sample > 0));
      }
      Issue(due->index, due->time_ns, now_ns);
    }
  }

  // The arrival that comes next by what is known now; none while all that is left waits for others
  // to end. First turns come before later turns of the same instant.
  std::optional<Due> NextDue() const {
    std::optional<Due> due;
    if (next_ < books_.size()) {
      const ServeRequest& request = RequestAt(next_);
      if (request.after_ended == 0) {
        due = {request.arrival_ns, next_, false};
      } else if (request.after_ended <= ended_ns_.size()) {
        due = {ended_ns_[request.after_ended - 1], next_, false};
      }
    }
    if (!turns_.empty() && (!due || turns_.top().time_ns < due->time_ns)) due = turns_.top();
    return due;
  }

  static RequestShape ShapeOf(const ServeRequest& request) {
    return {.prompt_tokens = request.prompt_tokens,
            .max_tokens = request.max_tokens,
            .oracle_tokens = request.prompt_tokens + request.output_tokens};
  }

  // A request, and with it the further samples of its prompt.
  void Issue(size_t index, int64_t scheduled_ns, int64_t now_ns) {
    std::vector<RequestId> samples;
    for (size_t next = index + 1; next < books_.size() && RequestAt(next).sample > 0; ++next) {
      samples.push_back(static_cast<RequestId>(next));
    }
    const bool forks = engine_.manager().can_fork();
    const bool added = IssueOne(index, scheduled_ns, now_ns, [&](const ServeRequest& request) {
      return batcher_.Add(static_cast<RequestId>(index), ShapeOf(request), request.output_tokens,
                          forks ? samples : std::span<const RequestId>());
    });
    for (const RequestId sample : samples) {
      IssueOne(static_cast<size_t>(sample), scheduled_ns, now_ns, [&](const ServeRequest& request) {
        return forks ? added : batcher_.Add(sample, ShapeOf(request), request.output_tokens);
      });
    }
  }

  template <typename Add>
  bool IssueOne(size_t index, int64_t scheduled_ns, int64_t now_ns, const Add& add) {
    const ServeRequest& request = RequestAt(index);
    Book& book = books_[index];
    book.scheduled_ns = scheduled_ns;
    book.issued_ns = now_ns;
    book.issued = true;
    const bool added = add(request);
    if (added) {
      book.token_ns.reserve(static_cast<size_t>(request.output_tokens));
      const std::span<int32_t> prompt(prompt_.data(), static_cast<size_t>(request.prompt_tokens));
      KVSWEEP_CHECK_EQ(book.history.size(), static_cast<size_t>(request.history_tokens));
      std::copy(book.history.begin(), book.history.end(), prompt.begin());
      schedule_.copy_prompt(index, prompt.subspan(book.history.size()));
      engine_.AddSequence(static_cast<RequestId>(index), prompt, request.prompt_tokens,
                          static_cast<int32_t>(request.sample));
    } else {
      ++result_.infeasible;
      Close(index, RequestRow::STATUS_INFEASIBLE);
    }
    CountIssued();
    return added;
  }

  void CountIssued() {
    KVSWEEP_CHECK_LT(issued_, books_.size());
    const size_t third = 3 * issued_ / books_.size();
    waiting_[third] += batcher_.waiting();
    ++arrivals_[third];
    ++issued_;
  }

  void SleepUntilArrival() {
    const std::optional<Due> due = NextDue();
    KVSWEEP_CHECK(due.has_value()) << "the loop stands still at request " << next_;
    const int64_t wake_ns =
        std::min({due->time_ns, options_.time_limit_ns, NowNs() + kLongestSleepNs});
    options_.clock->SleepUntilNs(start_ns_ + wake_ns);
    slept_ = true;
  }

  // -------------------------------------------------------------------------------------- steps

  absl::Status Step() {
    const int64_t begin_ns = NowNs();
    const StepPlan& plan = batcher_.Plan();
    BookPlan(plan, begin_ns);
    if (engine_.strategy().NeedsHost()) RETURN_IF_ERROR(FinishSteps(0));
    RETURN_IF_ERROR(engine_.Begin(plan));
    if (begun_steps_ == 0) result_.first_step_ns = begin_ns;
    Begun& begun = begun_[begun_steps_++ % begun_.size()];
    begun.follows = !std::exchange(slept_, false);
    begun.begin_ns = begin_ns;
    begun.settled = false;
    if (!options_.run_ahead || engine_.strategy().NeedsHost()) return FinishSteps(0);
    Settle(&begun);
    return FinishSteps(1);
  }

  // What a step does to requests, memory and queues is known when it begins; only its tokens and
  // its time are not.
  void Settle(Begun* begun) {
    if (std::exchange(begun->settled, true)) return;
    begun->state = {.reserved = engine_.manager().ReservedBytes(),
                    .live_device_bytes = engine_.manager().LiveBytes().device,
                    .running = batcher_.running(),
                    .waiting = batcher_.waiting()};
    begun->effects = batcher_.Complete();
  }

  // Finishes steps until at most so many are under way.
  absl::Status FinishSteps(int under_way) {
    while (engine_.steps_under_way() > under_way) RETURN_IF_ERROR(FinishStep());
    return absl::OkStatus();
  }

  absl::Status FinishStep() {
    Begun& begun =
        begun_[(begun_steps_ - static_cast<size_t>(engine_.steps_under_way())) % begun_.size()];
    ASSIGN_OR_RETURN(const StepResult step, engine_.Finish());
    if (options_.modelled != nullptr) options_.modelled->AdvanceNs(step.modelled_ns);
    const int64_t end_ns = NowNs();
    ++result_.steps;
    result_.captured_steps += step.captured;
    result_.memory_short_steps += step.plan->short_of_memory;
    if (begun.follows) {
      result_.gap_ns.push_back(static_cast<float>(step.gap_ns));
      result_.stepped_ns += step.step_ns;
    }
    BookDecodes(*step.plan);
    if (step.plan->prefill.empty()) {
      ++result_.decode_steps.steps;
      result_.decode_steps.ns += step.step_ns;
    }
    Settle(&begun);
    Sample(begun, end_ns);
    BookTokens(begun.effects, end_ns);
    return absl::OkStatus();
  }

  void BookPlan(const StepPlan& plan, int64_t now_ns) {
    const auto admit = [&](RequestId id) {
      Book& book = books_[static_cast<size_t>(id)];
      if (!std::exchange(book.admitted, true)) book.admitted_ns = now_ns;
    };
    for (const RequestId id : plan.admitted) admit(id);
    for (const SampleStart& sample : plan.samples) admit(sample.request);
    for (const Segment& segment : plan.decode) BookMemory(segment.request);
    for (const Segment& segment : plan.prefill) BookMemory(segment.request);
  }

  void BookMemory(RequestId id) {
    const TierBytes bytes = engine_.manager().RequestBytes(id);
    TierBytes& peak = books_[static_cast<size_t>(id)].peak;
    peak.device = std::max(peak.device, bytes.device);
    peak.host = std::max(peak.host, bytes.host);
  }

  void BookDecodes(const StepPlan& plan) {
    for (size_t i = 0; i < plan.decode.size(); ++i) {
      const Segment& segment = plan.decode[i];
      Book& book = books_[static_cast<size_t>(segment.request)];
      const DecodeCounts counts = engine_.CollectDecode(i, layer_counts_);
      book.attended += counts.attended;
      book.fetched += counts.fetched;
      book.evicted += counts.evicted;
      book.engaged |= counts.engaged;
      const double tokens = segment.start_position + 1;
      if (plan.prefill.empty()) {
        ServeResult::DecodeSteps& steps = result_.decode_steps;
        steps.rows += 1;
        steps.tokens += tokens;
        steps.attended += counts.attended;
        steps.fetched += counts.fetched;
      }
      book.full += tokens * static_cast<double>(layer_counts_.size());
      for (size_t layer = 0; layer < layer_counts_.size(); ++layer) {
        result_.attended_by_layer[layer] += layer_counts_[layer] / tokens;
      }
    }
    result_.decode_tokens += static_cast<int64_t>(plan.decode.size());
    for (const Segment& segment : plan.prefill) {
      result_.prefill_tokens += segment.rows;
      if (segment.last_chunk) BookPrompt(segment);
    }
  }

  // A prompt that is computed again after a preemption drops again what it had dropped; a token is
  // lost once.
  void BookPrompt(const Segment& segment) {
    const auto index = static_cast<size_t>(segment.request);
    Book& book = books_[index];
    const int32_t dropped = engine_.strategy().PromptEvictions(
        ShapeOf(RequestAt(index)), segment.start_position + segment.rows);
    book.evicted = std::max<int64_t>(book.evicted, dropped);
    book.engaged |= dropped > 0;
  }

  void Sample(const Begun& step, int64_t end_ns) {
    StepSample state = step.state;
    result_.peak.device = std::max(result_.peak.device, state.reserved.device);
    result_.peak.host = std::max(result_.peak.host, state.reserved.host);
    result_.live_device_bytes_peak =
        std::max(result_.live_device_bytes_peak, state.live_device_bytes);
    state.step_ns = end_ns - std::max(step.begin_ns, last_end_ns_);
    state.time_ns = last_end_ns_ = end_ns;
    samples_.Add(state);
  }

  void BookTokens(const StepEffects& effects, int64_t now_ns) {
    for (const RequestId id : effects.produced) {
      books_[static_cast<size_t>(id)].token_ns.push_back(now_ns);
    }
    for (const RequestId id : effects.finished) {
      ++result_.completed;
      Close(static_cast<size_t>(id), RequestRow::STATUS_COMPLETED);
      engine_.RemoveSequence(id);
    }
  }

  // --------------------------------------------------------------------------------------- rows

  void Close(size_t index, RequestRow::Status status) {
    books_[index].done = true;
    ++done_;
    if (books_[index].issued) {
      const Batcher::Tally tally = batcher_.tally(static_cast<RequestId>(index));
      result_.preemptions += tally.preemptions;
      result_.recomputed_tokens += tally.recomputed_tokens;
    }
    if (!sink_(MakeRow(index, status))) result_.end = ServeResult::End::kSinkFull;
    books_[index].token_ns = {};
    books_[index].history = {};
    EndTurn(index, status);
  }

  // What the end of a request lets come: the session's next turn, or those that wait for sessions
  // to end.
  void EndTurn(size_t index, RequestRow::Status status) {
    if (--books_[index - RequestAt(index).sample].open_samples > 0) return;
    if (RequestAt(index).last_turn) return ended_ns_.push_back(NowNs());
    const size_t next = index + 1;
    if (status == RequestRow::STATUS_COMPLETED) {
      const std::span<const int32_t> said = engine_.Tokens(static_cast<RequestId>(index));
      books_[next].history.assign(said.begin(), said.end());
      turns_.push({NowNs() + RequestAt(next).think_ns, next, true});
    } else if (status == RequestRow::STATUS_INFEASIBLE) {
      ++result_.infeasible;
      Close(next, status);
    }
  }

  RequestRow MakeRow(size_t index, RequestRow::Status status) const {
    const ServeRequest& request = RequestAt(index);
    const Book& book = books_[index];
    RequestRow row;
    row.set_index(static_cast<uint32_t>(index));
    row.set_session(request.session);
    row.set_turn(request.turn);
    row.set_status(status);
    row.set_prompt_tokens(static_cast<uint32_t>(request.prompt_tokens));
    row.set_output_tokens(static_cast<uint32_t>(
        status == RequestRow::STATUS_COMPLETED ? request.output_tokens : book.token_ns.size()));
    row.set_scheduled_ns(book.issued ? book.scheduled_ns
                                     : std::max<int64_t>(request.arrival_ns, 0));
    row.set_issued_ns(book.issued_ns);
    if (status == RequestRow::STATUS_INFEASIBLE || !book.issued) return row;
    row.set_admitted_ns(book.admitted_ns);
    AddTimes(book, status, &row);
    const RequestId id = static_cast<RequestId>(index);
    const Batcher::Tally tally = batcher_.tally(id);
    row.set_preemptions(static_cast<uint32_t>(tally.preemptions));
    row.set_recomputed_tokens(static_cast<uint32_t>(tally.recomputed_tokens));
    row.set_entries_attended(static_cast<uint64_t>(std::llround(book.attended)));
    row.set_entries_full(static_cast<uint64_t>(std::llround(book.full)));
    row.set_entries_fetched(static_cast<uint64_t>(std::llround(book.fetched)));
    row.set_tokens_evicted(static_cast<uint64_t>(book.evicted));
    row.set_kv_device_bytes_peak(book.peak.device);
    row.set_kv_host_bytes_peak(book.peak.host);
    if (status != RequestRow::STATUS_COMPLETED) return row;
    row.set_output_digest(
        DigestOfTokens(engine_.Tokens(id).subspan(static_cast<size_t>(request.prompt_tokens))));
    const int32_t tokens = request.prompt_tokens + request.output_tokens;
    const bool expected = engine_.strategy().EngagementExpected(ShapeOf(request), tokens);
    row.set_engagement_expected(expected);
    row.set_engaged(expected && book.engaged);
    return row;
  }

  static void AddTimes(const Book& book, RequestRow::Status status, RequestRow* row) {
    if (book.token_ns.empty()) return;
    row->set_first_token_ns(book.token_ns.front());
    if (status == RequestRow::STATUS_COMPLETED) row->set_finished_ns(book.token_ns.back());
    row->mutable_token_gap_ns()->Reserve(static_cast<int>(book.token_ns.size()) - 1);
    for (size_t i = 1; i < book.token_ns.size(); ++i) {
      row->add_token_gap_ns(static_cast<uint64_t>(book.token_ns[i] - book.token_ns[i - 1]));
    }
  }

  // Closes what has not ended: the time is up, or nobody wants the rest.
  void Abandon() {
    for (size_t index = 0; index < books_.size(); ++index) {
      if (books_[index].done) continue;
      if (books_[index].issued) {
        const RequestId id = static_cast<RequestId>(index);
        if (batcher_.knows(id)) batcher_.Drop(id);
        engine_.RemoveSequence(static_cast<RequestId>(index));
      }
      ++result_.unfinished;
      if (result_.end == ServeResult::End::kSinkFull) continue;
      Close(index, RequestRow::STATUS_UNFINISHED);
    }
  }

  void JudgeQueue() {
    for (size_t third = 0; third < 3; ++third) {
      if (arrivals_[third] == 0) continue;
      result_.waiting_by_third[third] =
          static_cast<double>(waiting_[third]) / static_cast<double>(arrivals_[third]);
    }
    if (!schedule_.open_loop || result_.end != ServeResult::End::kServedAll) return;
    result_.queue_grows = QueueGrows(result_.waiting_by_third, books_.size());
  }

  InferenceEngine& engine_;
  const ServeSchedule& schedule_;
  const ServeOptions& options_;
  const RequestSink& sink_;
  Batcher batcher_;
  std::vector<Book> books_;
  ThinnedSamples samples_;
  std::vector<double> layer_counts_;
  std::vector<int32_t> prompt_;
  int32_t longest_prompt_ = 0;
  const int64_t start_ns_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> turns_;  // later turns that will come
  std::array<Begun, InferenceEngine::kMostStepsUnderWay> begun_;      // steps, in turn
  size_t begun_steps_ = 0;
  int64_t last_end_ns_ = 0;        // of a step
  bool slept_ = true;              // before the next step
  std::vector<int64_t> ended_ns_;  // when sessions ended, in that order
  size_t next_ = 0;                // first turn that has not been issued
  size_t issued_ = 0;
  std::array<int64_t, 3> waiting_ = {};   // summed over the arrivals of each third
  std::array<int64_t, 3> arrivals_ = {};  // of each third
  size_t done_ = 0;
  ServeResult result_;
};

}  // namespace

bool QueueGrows(const std::array<double, 3>& waiting_by_third, size_t requests) {
  const double margin = std::max(2.0, 0.7 * std::sqrt(static_cast<double>(requests)));
  return waiting_by_third[2] - std::max(waiting_by_third[0], waiting_by_third[1]) > margin;
}

absl::StatusOr<ServeResult> ServeLoad(InferenceEngine* engine, const ServeSchedule& schedule,
                                      const ServeOptions& options, const RequestSink& sink) {
  return Server(engine, schedule, options, sink).Run();
}

}  // namespace kvsweep
