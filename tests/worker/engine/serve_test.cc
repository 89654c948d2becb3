#include "worker/engine/serve.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "base/random.h"
#include "tests/worker/engine/stories_model.h"

namespace kvsweep {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

EngineOptions Options(uint64_t device_bytes) {
  return {.max_sequences = 4,
          .max_batched_tokens = 128,
          .max_context = 256,
          .graphs = true,
          .kv_dtype = DType::kF32,
          .device_bytes = device_bytes,
          .host_bytes = 16 * kMiB};
}

struct Served {
  ServeResult result;
  std::vector<RequestRow> rows;  // in the order they came
};

class ServeTest : public testing::Test {
 protected:
  // Requests of random lengths whose gaps are exponential with this mean.
  static std::vector<ServeRequest> Requests(int count, int64_t mean_gap_ns, uint64_t seed) {
    Random random(seed);
    std::vector<ServeRequest> requests;
    int64_t arrival_ns = 0;
    for (int i = 0; i < count; ++i) {
      arrival_ns += static_cast<int64_t>(random.Exponential(static_cast<double>(mean_gap_ns)));
      const int32_t prompt = 1 + static_cast<int32_t>(random.Uniform(100));
      const int32_t output = 1 + static_cast<int32_t>(random.Uniform(40));
      requests.push_back({.arrival_ns = arrival_ns,
                          .prompt_tokens = prompt,
                          .output_tokens = output,
                          .max_tokens = 60});
    }
    return requests;
  }

  Served Serve(const Arm& arm, const EngineOptions& engine_options,
               const std::vector<ServeRequest>& requests, ServeOptions options = {},
               bool open_loop = true, size_t sink_rows = 1'000'000, size_t samples = 1) {
    const std::unique_ptr<InferenceEngine> engine = stories_.MakeEngine(arm, engine_options);
    SimulatedClock clock;
    if (options.clock == nullptr) options.clock = options.modelled = &clock;
    const ServeSchedule schedule{.requests = requests,
                                 .copy_prompt =
                                     [this, samples](size_t index, std::span<int32_t> prompt) {
                                       const size_t row = index / samples % 64 * 512;
                                       std::copy_n(
                                           samples_.begin() + static_cast<std::ptrdiff_t>(row),
                                           prompt.size(), prompt.begin());
                                     },
                                 .open_loop = open_loop};
    Served served;
    absl::StatusOr<ServeResult> result =
        ServeLoad(engine.get(), schedule, options, [&](RequestRow row) {
          if (served.rows.size() == sink_rows) return false;
          served.rows.push_back(std::move(row));
          return true;
        });
    EXPECT_TRUE(result.ok()) << result.status();
    served.result = *std::move(result);
    engine->manager().CheckInvariants();
    EXPECT_EQ(engine->manager().ReservedBytes(), engine->manager().FixedBytes()) << "drained";
    return served;
  }

  StoriesModel stories_{"laptop"};
  const std::vector<int32_t> samples_ = StoriesSamples();
};

TEST_F(ServeTest, EveryRequestGivesOneConsistentRow) {
  const std::vector<ServeRequest> requests = Requests(24, 2 * kNsPerMs, 1);
  const Served served = Serve(PagedArm(), Options(4 * kMiB), requests);
  EXPECT_EQ(served.result.completed, 24);
  EXPECT_EQ(served.result.infeasible + served.result.unfinished, 0);
  ASSERT_EQ(served.rows.size(), 24u);
  std::map<uint32_t, RequestRow> by_index;
  for (const RequestRow& row : served.rows) by_index[row.index()] = row;
  ASSERT_EQ(by_index.size(), 24u);
  int64_t tokens = 0;
  for (const auto& [index, row] : by_index) {
    SCOPED_TRACE(row.DebugString());
    const ServeRequest& request = requests[index];
    EXPECT_EQ(row.status(), RequestRow::STATUS_COMPLETED);
    EXPECT_EQ(row.scheduled_ns(), request.arrival_ns);
    EXPECT_LE(row.scheduled_ns(), row.issued_ns());
    EXPECT_LE(row.issued_ns(), row.admitted_ns());
    EXPECT_LT(row.admitted_ns(), row.first_token_ns());
    ASSERT_EQ(row.token_gap_ns_size(), request.output_tokens - 1);
    int64_t finished_ns = row.first_token_ns();
    for (const uint64_t gap : row.token_gap_ns()) finished_ns += static_cast<int64_t>(gap);
    EXPECT_EQ(row.finished_ns(), finished_ns);
    // The first token comes from the prompt; each later step reads all tokens so far in 5 layers.
    int64_t full = 0;
    for (int t = 1; t < request.output_tokens; ++t) full += 5 * (request.prompt_tokens + t);
    EXPECT_EQ(row.entries_full(), static_cast<uint64_t>(full));
    EXPECT_EQ(row.entries_attended(), row.entries_full());
    EXPECT_GT(row.kv_device_bytes_peak(), 0u);
    EXPECT_NE(row.output_digest(), 0u);
    EXPECT_FALSE(row.engagement_expected());
    tokens += request.output_tokens - 1;
  }
  EXPECT_EQ(served.result.decode_tokens, tokens);
  EXPECT_LE(served.result.samples.size(), 200u);
  EXPECT_FALSE(served.result.samples.empty());
  EXPECT_GT(served.result.captured_steps, 0);
}

TEST_F(ServeTest, TheSameScheduleGivesTheSameBytes) {
  const std::vector<ServeRequest> requests = Requests(16, kNsPerMs, 2);
  const auto bytes = [&] {
    std::string all;
    for (const RequestRow& row : Serve(PagedArm(), Options(1 * kMiB), requests).rows) {
      all += row.SerializeAsString();
    }
    return all;
  };
  EXPECT_EQ(bytes(), bytes());
}

TEST_F(ServeTest, ScarceMemoryPreemptsWithoutChangingTheOutput) {
  const std::vector<ServeRequest> requests = Requests(12, 0, 3);
  // κ = 2 * 5 layers * 4 heads * 8 * 4 bytes = 1280: 256 KiB hold about 190 tokens.
  const Served scarce = Serve(PagedArm(), Options(256 << 10), requests);
  const Served ample = Serve(PagedArm(), Options(4 * kMiB), requests);
  EXPECT_GT(scarce.result.preemptions, 0);
  EXPECT_GT(scarce.result.recomputed_tokens, 0);
  EXPECT_EQ(ample.result.preemptions, 0);
  EXPECT_LE(scarce.result.peak.device, uint64_t{256} << 10);
  std::map<uint32_t, uint64_t> digests;
  for (const RequestRow& row : ample.rows) digests[row.index()] = row.output_digest();
  for (const RequestRow& row : scarce.rows) {
    EXPECT_EQ(row.output_digest(), digests[row.index()]) << "request " << row.index();
  }
}

TEST_F(ServeTest, EvictionShowsInTheRows) {
  const std::vector<ServeRequest> requests = Requests(8, kNsPerMs, 4);
  const Served served = Serve(H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 32), Options(4 * kMiB), requests);
  int engaged = 0;
  for (const RequestRow& row : served.rows) {
    const uint32_t tokens = row.prompt_tokens() + row.output_tokens();
    EXPECT_EQ(row.engagement_expected(), tokens > 32) << row.DebugString();
    if (row.engaged()) {
      ++engaged;
      EXPECT_GT(row.tokens_evicted(), 0u);
    }
  }
  EXPECT_GT(engaged, 0);
  EXPECT_LT(served.result.attended_by_layer[0], served.result.decode_tokens);
}

// What a recompute drops again was lost before: the rows are those of ample memory.
TEST_F(ServeTest, ATokenIsEvictedOnceHoweverOftenItIsComputed) {
  const std::vector<ServeRequest> requests = Requests(60, 0, 3);
  constexpr int32_t kBudget = 64;
  Arm arm = H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, kBudget);
  arm.mutable_h2o()->set_preemption(H2o::PREEMPTION_RECOMPUTE);
  EngineOptions options = Options(448 << 10);
  options.max_sequences = 12;
  const Served scarce = Serve(arm, options, requests);
  ASSERT_EQ(scarce.result.completed, 60);
  int evicted_and_preempted = 0;
  for (const RequestRow& row : scarce.rows) {
    // The last token is never stored.
    const int64_t stored = int64_t{row.prompt_tokens()} + row.output_tokens() - 1;
    EXPECT_EQ(row.tokens_evicted(), std::max<int64_t>(0, stored - kBudget)) << row.DebugString();
    evicted_and_preempted += row.preemptions() > 0 && row.tokens_evicted() > 0;
  }
  EXPECT_GT(evicted_and_preempted, 0);
}

TEST_F(ServeTest, ClosedLoopKeepsItsConcurrency) {
  std::vector<ServeRequest> requests = Requests(12, 0, 5);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (i >= 3) requests[i].after_ended = static_cast<uint32_t>(i - 2);
  }
  const Served served = Serve(PagedArm(), Options(4 * kMiB), requests, {}, false);
  ASSERT_EQ(served.result.completed, 12);
  // In flight at the moment that each request comes, itself included: always three.
  for (const RequestRow& row : served.rows) {
    const auto in_flight = std::ranges::count_if(served.rows, [&](const RequestRow& other) {
      return other.issued_ns() <= row.issued_ns() && other.finished_ns() > row.issued_ns() &&
             (other.issued_ns() < row.issued_ns() || other.index() <= row.index());
    });
    EXPECT_LE(in_flight, 3);
    if (row.index() >= 3) {
      EXPECT_TRUE(std::ranges::any_of(
          served.rows,
          [&](const RequestRow& other) { return other.finished_ns() == row.scheduled_ns(); }))
          << "request " << row.index();
    }
  }
}

TEST_F(ServeTest, AStaticBatchComesWhenAllBeforeItEnded) {
  std::vector<ServeRequest> requests = Requests(10, 0, 15);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].after_ended = static_cast<uint32_t>(i / 4 * 4);
  }
  const Served served = Serve(PagedArm(), Options(4 * kMiB), requests, {}, false);
  ASSERT_EQ(served.result.completed, 10);
  int64_t last_end_ns[3] = {};
  for (const RequestRow& row : served.rows) {
    last_end_ns[row.index() / 4] = std::max(last_end_ns[row.index() / 4], row.finished_ns());
  }
  for (const RequestRow& row : served.rows) {
    const size_t batch = row.index() / 4;
    EXPECT_EQ(row.scheduled_ns(), batch == 0 ? 0 : last_end_ns[batch - 1]);
  }
}

// Sessions of up to four turns with random lengths, arrivals and pauses.
std::vector<ServeRequest> Chats(int sessions, uint64_t seed) {
  Random random(seed);
  std::vector<ServeRequest> requests;
  const auto draw = [&](uint64_t most) { return 1 + static_cast<int32_t>(random.Uniform(most)); };
  for (int session = 0; session < sessions; ++session) {
    const int turns = draw(4);
    int32_t history = 0;
    for (int turn = 0; turn < turns; ++turn) {
      ServeRequest request = {.arrival_ns = session * kNsPerMs,
                              .think_ns = static_cast<int64_t>(random.Uniform(5 * kNsPerMs)),
                              .prompt_tokens = history + draw(30),
                              .history_tokens = history,
                              .output_tokens = draw(20),
                              .max_tokens = 30,
                              .session = static_cast<uint32_t>(session),
                              .turn = static_cast<uint32_t>(turn),
                              .last_turn = turn + 1 == turns};
      history = request.prompt_tokens + request.output_tokens;
      requests.push_back(request);
    }
  }
  return requests;
}

TEST_F(ServeTest, ATurnComesAfterTheTurnBeforeAndItsThinkTime) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const std::vector<ServeRequest> requests = Chats(8, seed);
    const Served served = Serve(PagedArm(), Options(4 * kMiB), requests);
    ASSERT_EQ(served.rows.size(), requests.size());
    std::map<uint32_t, RequestRow> by_index;
    for (const RequestRow& row : served.rows) by_index[row.index()] = row;
    for (const auto& [index, row] : by_index) {
      const ServeRequest& request = requests[index];
      EXPECT_EQ(row.session(), request.session);
      EXPECT_EQ(row.turn(), request.turn);
      EXPECT_EQ(row.scheduled_ns(), request.turn == 0
                                        ? request.arrival_ns
                                        : by_index[index - 1].finished_ns() + request.think_ns);
      EXPECT_LE(row.scheduled_ns(), row.issued_ns());
    }
  }
}

// What the engine said is part of the next prompt: one session of two turns ends as a single
// request does that is given the first turn's own output.
TEST_F(ServeTest, ATurnCarriesTheOutputOfTheTurnBefore) {
  const auto prompt_of = [&](size_t index, std::span<int32_t> prompt) {
    for (size_t i = 0; i < prompt.size(); ++i) {
      prompt[i] = samples_[index * 100 + i];
    }
  };
  EngineOptions options = Options(4 * kMiB);
  const std::unique_ptr<InferenceEngine> engine = stories_.MakeEngine(PagedArm(), options);
  std::vector<int32_t> said;  // the second turn's prompt as the engine got it
  const std::vector<ServeRequest> requests = {
      {.prompt_tokens = 20, .output_tokens = 12, .max_tokens = 20, .last_turn = false},
      {.prompt_tokens = 40,
       .history_tokens = 32,
       .output_tokens = 10,
       .max_tokens = 20,
       .turn = 1}};
  const auto serve = [&](const std::vector<ServeRequest>& schedule, const auto& copy) {
    SimulatedClock clock;
    const ServeOptions serve_options = {.clock = &clock, .modelled = &clock};
    std::map<uint32_t, uint64_t> digests;
    const absl::StatusOr<ServeResult> result =
        ServeLoad(engine.get(), {.requests = schedule, .copy_prompt = copy}, serve_options,
                  [&](RequestRow row) {
                    digests[row.index()] = row.output_digest();
                    return true;
                  });
    EXPECT_TRUE(result.ok()) << result.status();
    return digests;
  };
  const auto chat = serve(requests, prompt_of);
  // The first turn alone, token by token, to learn its output.
  Batcher batcher({.max_sequences = 1, .max_batched_tokens = 128, .budget = {4 * kMiB, 0}},
                  &engine->manager());
  std::vector<int32_t> first(20);
  prompt_of(0, first);
  ASSERT_TRUE(batcher.Add(0, {20, 20}, 12));
  engine->AddSequence(0, first, 20);
  while (!batcher.idle()) {
    ASSERT_TRUE(engine->Execute(batcher.Plan()).ok());
    batcher.Complete();
  }
  said.assign(engine->Tokens(0).begin(), engine->Tokens(0).end());
  engine->RemoveSequence(0);
  ASSERT_EQ(said.size(), 32u);
  const auto alone = serve({{.prompt_tokens = 40, .output_tokens = 10, .max_tokens = 20}},
                           [&](size_t, std::span<int32_t> prompt) {
                             std::copy(said.begin(), said.end(), prompt.begin());
                             prompt_of(1, prompt.subspan(32));
                           });
  EXPECT_EQ(chat.at(1), alone.at(0));
}

TEST_F(ServeTest, WhatFollowsAnInfeasibleTurnIsInfeasibleToo) {
  std::vector<ServeRequest> requests = {
      {.prompt_tokens = 10, .output_tokens = 5, .max_tokens = 20, .last_turn = false},
      {.prompt_tokens = 215,
       .history_tokens = 15,
       .output_tokens = 2,
       .max_tokens = 40,
       .turn = 1,
       .last_turn = false},
      {.prompt_tokens = 220,
       .history_tokens = 217,
       .output_tokens = 2,
       .max_tokens = 30,
       .turn = 2},
      {.after_ended = 1, .prompt_tokens = 10, .output_tokens = 5, .max_tokens = 20, .session = 1}};
  const Served served = Serve(PagedArm(), Options(256 << 10), requests);
  EXPECT_EQ(served.result.completed, 2);
  EXPECT_EQ(served.result.infeasible, 2);
  for (const RequestRow& row : served.rows) {
    const bool fits = row.index() == 0 || row.index() == 3;
    EXPECT_EQ(row.status() == RequestRow::STATUS_COMPLETED, fits) << row.index();
  }
}

TEST_F(ServeTest, StepsShortOfMemoryAreCounted) {
  const std::vector<ServeRequest> requests = Requests(12, 0, 3);
  EXPECT_GT(Serve(PagedArm(), Options(256 << 10), requests).result.memory_short_steps, 0);
  EXPECT_EQ(Serve(PagedArm(), Options(4 * kMiB), requests).result.memory_short_steps, 0);
}

TEST_F(ServeTest, ARequestThatCanNeverFitIsRefusedAtOnce) {
  std::vector<ServeRequest> requests = Requests(4, kNsPerMs, 6);
  requests[1] = {.arrival_ns = requests[1].arrival_ns,
                 .prompt_tokens = 200,
                 .output_tokens = 2,
                 .max_tokens = 56};
  const Served served = Serve(PagedArm(), Options(256 << 10), requests);
  EXPECT_EQ(served.result.infeasible, 1);
  EXPECT_EQ(served.result.completed, 3);
  for (const RequestRow& row : served.rows) {
    EXPECT_EQ(row.status() == RequestRow::STATUS_INFEASIBLE, row.index() == 1);
  }
}

TEST_F(ServeTest, ModelledTimeIsBoundedByTheWallToo) {
  const std::vector<ServeRequest> requests = Requests(40, 5 * kNsPerMs, 7);
  SimulatedClock wall;
  const Served served =
      Serve(PagedArm(), Options(4 * kMiB), requests,
            {.wall = &wall, .wall_deadline_ns = 10 * kNsPerSecond, .progress = [&](size_t done) {
               wall.AdvanceNs(done >= 5 ? 10 * kNsPerSecond : 0);
             }});
  EXPECT_EQ(served.result.end, ServeResult::End::kTimeLimit);
  EXPECT_GE(served.result.completed, 5);
  EXPECT_GT(served.result.unfinished, 0);
}

TEST_F(ServeTest, TheTimeLimitLeavesUnfinishedRows) {
  const std::vector<ServeRequest> requests = Requests(40, 5 * kNsPerMs, 7);
  const Served served =
      Serve(PagedArm(), Options(4 * kMiB), requests, {.time_limit_ns = requests[20].arrival_ns});
  EXPECT_EQ(served.result.end, ServeResult::End::kTimeLimit);
  EXPECT_GT(served.result.completed, 0);
  EXPECT_GT(served.result.unfinished, 0);
  EXPECT_EQ(served.rows.size(), 40u);
  for (const RequestRow& row : served.rows) {
    if (row.status() == RequestRow::STATUS_UNFINISHED) {
      EXPECT_EQ(row.finished_ns(), 0);
    }
  }
}

// Every sample has a row, comes with the first and differs from it; forked or on its own, it says
// the same.
TEST_F(ServeTest, SamplesOfAPromptAreRowsOfTheirOwn) {
  std::vector<ServeRequest> requests;
  for (const ServeRequest& request : Requests(5, kNsPerMs, 12)) {
    for (uint32_t sample = 0; sample < 3; ++sample) {
      requests.push_back(request);
      requests.back().sample = sample;
    }
  }
  Arm reserved = PagedArm();
  reserved.mutable_paged()->set_reservation(Paged::RESERVATION_ORACLE);
  std::map<uint32_t, uint64_t> digests;
  int64_t prefill_tokens = 0;
  for (const Arm& arm : {reserved, PagedArm()}) {
    const Served served = Serve(arm, Options(4 * kMiB), requests, {}, true, 1'000'000, 3);
    ASSERT_EQ(served.result.completed, 15);
    std::map<uint32_t, RequestRow> rows;
    for (const RequestRow& row : served.rows) rows[row.index()] = row;
    for (const auto& [index, row] : rows) {
      EXPECT_EQ(row.scheduled_ns(), rows.at(index / 3 * 3).scheduled_ns());
      EXPECT_GE(row.admitted_ns(), row.issued_ns());
      EXPECT_GT(row.first_token_ns(), 0);
      if (index % 3 > 0) {
        EXPECT_NE(row.output_digest(), rows.at(index - 1).output_digest());
      }
      const auto [first, inserted] = digests.emplace(index, row.output_digest());
      EXPECT_EQ(row.output_digest(), first->second) << "request " << index;
    }
    EXPECT_TRUE(prefill_tokens == 0 || 3 * served.result.prefill_tokens == prefill_tokens);
    prefill_tokens = served.result.prefill_tokens;
  }
}

TEST_F(ServeTest, CancelAndAFullSinkEndTheServing) {
  const std::vector<ServeRequest> requests = Requests(10, kNsPerMs, 8);
  std::atomic<bool> cancel = false;
  const Served cancelled =
      Serve(PagedArm(), Options(4 * kMiB), requests,
            {.cancel = &cancel, .progress = [&](size_t done) { cancel = done >= 3; }});
  EXPECT_EQ(cancelled.result.end, ServeResult::End::kCancelled);
  EXPECT_LT(cancelled.result.completed, 10);
  const Served full = Serve(PagedArm(), Options(4 * kMiB), requests, {}, true, 4);
  EXPECT_EQ(full.result.end, ServeResult::End::kSinkFull);
  EXPECT_EQ(full.rows.size(), 4u);
}

// With one step ahead requests meet in other batches, but say the same, and their books are whole.
TEST_F(ServeTest, RunningAheadChangesNoOutput) {
  std::vector<ServeRequest> samples;
  for (const ServeRequest& request : Requests(5, kNsPerMs, 12)) {
    for (uint32_t sample = 0; sample < 3; ++sample) {
      samples.push_back(request);
      samples.back().sample = sample;
    }
  }
  std::vector<ServeRequest> closed_loop = Requests(12, 0, 5);
  for (size_t i = 3; i < closed_loop.size(); ++i) {
    closed_loop[i].after_ended = static_cast<uint32_t>(i - 2);
  }
  Arm swapping = PagedArm();
  swapping.mutable_paged()->set_preemption(Paged::PREEMPTION_SWAP);
  Arm caching = PagedArm();
  caching.mutable_paged()->set_block_size(4);
  caching.mutable_paged()->set_prefix_caching(Paged::PREFIX_CACHING_SHARED);
  struct Case {
    Arm arm;
    uint64_t device_bytes;
    std::vector<ServeRequest> requests;
    size_t samples = 1;
  };
  const std::vector<Case> cases = {
      {PagedArm(), 256 << 10, Requests(12, 0, 3)},
      {swapping, 300 << 10, Requests(12, 0, 3)},
      {PagedArm(), 4 * kMiB, samples, 3},
      {PagedArm(), 4 * kMiB, closed_loop},
      {caching, 4 * kMiB, Chats(6, 1)},
      {H2oArm(0.5, 0.5, BUDGET_BASE_FIXED, 32), 4 * kMiB, Requests(8, kNsPerMs, 4)}};
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "case " << i);
    const auto& [arm, device_bytes, requests, per_prompt] = cases[i];
    const auto serve = [&](const ServeOptions& options) {
      return Serve(arm, Options(device_bytes), requests, options, true, 1'000'000, per_prompt);
    };
    const Served waiting = serve({});
    const Served ahead = serve({.clock = &RealClock::Get(), .run_ahead = true});
    ASSERT_EQ(ahead.rows.size(), requests.size());
    EXPECT_EQ(ahead.result.completed, waiting.result.completed);
    EXPECT_LE(ahead.result.gap_ns.size(), static_cast<size_t>(ahead.result.steps) - 1);
    EXPECT_GT(ahead.result.stepped_ns, 0);
    std::map<uint32_t, RequestRow> rows;
    for (const RequestRow& row : waiting.rows) rows[row.index()] = row;
    for (const RequestRow& row : ahead.rows) {
      SCOPED_TRACE(row.DebugString());
      EXPECT_EQ(row.output_digest(), rows[row.index()].output_digest());
      EXPECT_EQ(row.tokens_evicted(), rows[row.index()].tokens_evicted());
      EXPECT_EQ(row.engaged(), rows[row.index()].engaged());
      EXPECT_EQ(row.token_gap_ns_size() + 1, static_cast<int>(row.output_tokens()));
      EXPECT_GE(row.first_token_ns(), row.admitted_ns());
    }
  }
}

TEST_F(ServeTest, AServingThatRunsAheadEndsEarlyWithWholeBooks) {
  const std::vector<ServeRequest> requests = Requests(10, 0, 8);
  std::atomic<bool> cancel = false;
  const Served cancelled = Serve(PagedArm(), Options(4 * kMiB), requests,
                                 {.clock = &RealClock::Get(),
                                  .cancel = &cancel,
                                  .progress = [&](size_t done) { cancel = done >= 3; },
                                  .run_ahead = true});
  EXPECT_EQ(cancelled.result.end, ServeResult::End::kCancelled);
  EXPECT_EQ(cancelled.rows.size(), 10u);
  EXPECT_EQ(cancelled.result.completed + cancelled.result.unfinished, 10);
  const Served full = Serve(PagedArm(), Options(4 * kMiB), requests,
                            {.clock = &RealClock::Get(), .run_ahead = true}, true, 4);
  EXPECT_EQ(full.result.end, ServeResult::End::kSinkFull);
  EXPECT_EQ(full.rows.size(), 4u);
}

// The share of runs of a queue before `servers` servers, with Poisson arrivals at `load` times what
// they can serve and exponential service times, of which it is said that the queue grew.
double ShareSaidToGrow(size_t requests, size_t servers, double load, Random& random) {
  constexpr int kRuns = 400;
  int said = 0;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<double> begun;
    std::vector<double> free(servers, 0.0);  // when each is, the first one first
    std::array<double, 3> waiting = {};
    double now = 0;
    for (size_t i = 0; i < requests; ++i) {
      now += -std::log(1 - random.UniformDouble());
      const double begin = std::max(now, free.front());
      begun.push_back(begin);
      free.front() =
          begin - load * static_cast<double>(servers) * std::log(1 - random.UniformDouble());
      std::ranges::sort(free);
      // They begin in the order of their arrival.
      const auto served = std::ranges::upper_bound(begun, now) - begun.begin();
      waiting[3 * i / requests] += static_cast<double>(i + 1 - static_cast<size_t>(served));
    }
    for (double& sum : waiting) sum /= static_cast<double>(requests) / 3;
    said += QueueGrows(waiting, requests) ? 1 : 0;
  }
  return static_cast<double>(said) / kRuns;
}

TEST(QueueGrowsTest, TellsLoadPastTheLimitFromBadMoments) {
  constexpr uint64_t kSeed = 20261130;
  Random random(kSeed);
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  for (const size_t servers : {2, 8, 32}) {
    SCOPED_TRACE(testing::Message() << servers << " servers");
    EXPECT_LE(ShareSaidToGrow(200, servers, 0.7, random), 0.02);
    EXPECT_LE(ShareSaidToGrow(200, servers, 0.9, random), 0.08);
    EXPECT_GE(ShareSaidToGrow(200, servers, 1.2, random), 0.5);
    EXPECT_GE(ShareSaidToGrow(200, servers, 1.5, random), 0.9);
    EXPECT_LE(ShareSaidToGrow(1500, servers, 0.9, random), 0.05);
    EXPECT_GE(ShareSaidToGrow(1500, servers, 1.1, random), 0.7);
    EXPECT_GE(ShareSaidToGrow(1500, servers, 1.2, random), 0.95);
    // So few requests can tell little, and must not say too much.
    EXPECT_LE(ShareSaidToGrow(24, servers, 0.9, random), 0.12);
  }
}

TEST_F(ServeTest, AGrowingQueueIsSeenInOpenLoopsOnly) {
  // About a hundred times what one sequence slot serves.
  EngineOptions options = Options(4 * kMiB);
  options.max_sequences = 1;
  const std::vector<ServeRequest> fast = Requests(60, 10 * kNsPerUs, 9);
  EXPECT_TRUE(Serve(PagedArm(), options, fast).result.queue_grows);
  EXPECT_FALSE(Serve(PagedArm(), options, fast, {}, false).result.queue_grows);
  const std::vector<ServeRequest> slow = Requests(60, kNsPerSecond, 9);
  EXPECT_FALSE(Serve(PagedArm(), options, slow).result.queue_grows);
}

}  // namespace
}  // namespace kvsweep
